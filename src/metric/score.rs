//! The equivariance score: does the map of the moved image equal the moved map?

use candle_core::Tensor;
use rand::Rng;

use super::{
    Layer,
    run::{Run, values},
};
use crate::group::FieldType;
use crate::{Error, GroupAction, Layout, Resample, Result, TokenGrid};

/// How to measure the equivariance of a closure from images to maps.
///
/// Let `A = ρ(g)F(x)` be the map of the image, moved, and `V = F(g·x)` the map of the moved image; `a_bp` and `v_bp` are
/// their tokens at image `b` and position `p`, over all images and those positions that have a preimage. This
/// measures how far `A` and `V` agree:
///
/// | score | formula | equivariant |
/// |---|---|---|
/// | [`cosine`](Scores::cosine) | mean over `b, p` of `cos(a_bp, v_bp)` | 1 |
/// | [`centered`](Scores::centered) | the same of `a_bp − ā` and `v_bp − v̄` | 1 |
/// | [`correlation`](Scores::correlation) | Pearson's, per channel over `b, p`; then the mean over channels | 1 |
/// | [`relative_error`](Scores::relative_error) | `‖A − V‖ / ‖V‖` | 0 |
/// | [`max_abs`](Scores::max_abs) | `max abs(A − V)` | 0 |
///
/// The mean tokens `ā` and `v̄` are taken over all images and positions, each side its own. Read the plain cosine beside
/// the centered one: tokens of a ViT share a large common part, which any two tokens agree on. And read each beside its
/// nulls, the same score of `A` with its positions shuffled within each image, and with its images shuffled: what is left
/// of the score when the positions, or the images, no longer match.
///
/// This is our estimator. The SER paper's "Rotation Equiv" (0.804 → 0.840) is not defined in its public code, and no
/// figure of this module claims to reproduce it. Correlation: after Bruintjes et al., arXiv 2304.02628.
///
/// Under a [`Scale`](crate::group::Scale) with [`Filter::Fourier`](crate::Filter::Fourier), the square of the relative error is
/// the scale-equivariance error `E_s = ‖D_s F(x) − F(D_s x)‖² / ‖F(D_s x)‖²` of arXiv 2311.02922; `docs/symmetries.md` has an
/// example.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, group::D4, metric::EqScore};
///
/// // average pooling commutes with the quarter turns and flips
/// let images = Tensor::rand(0f64, 1., (4, 3, 8, 8), &Device::Cpu)?;
/// let score = EqScore::new(TokenGrid::square(4)?);
/// let others = &D4::ALL[1..]; // all but the identity
/// let report = score.measure(&images, others, &mut StdRng::seed_from_u64(0), |x| x.avg_pool2d(2))?;
/// assert!((report.mean.score.centered - 1.).abs() < 1e-12);
/// assert!(report.mean.shuffled_positions.unwrap().centered < 0.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EqScore {
    /// The token grid of an image as it comes.
    pub grid: TokenGrid,
    /// How the closure's output becomes tokens.
    pub layout: Layout,
    /// How images and tokens are resampled where an element needs it.
    pub resample: Resample,
    /// Images per call of the closure.
    pub chunk: usize,
    /// How the channels of the maps turn with the grid, those of every layer alike; `None`: they stay as they are.
    pub field: Option<FieldType>,
}

/// How far two maps agree; the table above. What is undefined (the cosine of a zero token, the correlation of a constant
/// channel) is left out of its mean; if nothing is left, the score is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scores {
    /// Mean cosine of the tokens.
    pub cosine: f64,
    /// Mean cosine of the tokens, less the mean token of either map.
    pub centered: f64,
    /// Pearson's correlation of each channel, averaged over channels.
    pub correlation: f64,
    /// Norm of the difference, relative to the map of the moved image; over all images together.
    pub relative_error: f64,
    /// Largest difference of two values. Over several elements: the largest, not the mean.
    pub max_abs: f64,
}

/// The scores of one element, or their mean over elements, beside their nulls.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// The score.
    pub score: Scores,
    /// With the positions shuffled within each image; `None` if there is only one.
    pub shuffled_positions: Option<Scores>,
    /// With the images shuffled; `None` if there is only one.
    pub shuffled_images: Option<Scores>,
}

/// The equivariance of a closure under some elements of a group.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report<G> {
    /// Each element with its scores, in the order they were handed in.
    pub elements: Vec<(G, Comparison)>,
    /// The mean over the elements.
    pub mean: Comparison,
}

impl EqScore {
    /// For maps whose tokens lie on `grid`: no prefix tokens, channels first that stay as they are, the default
    /// filter, 64 images at a time.
    pub fn new(grid: TokenGrid) -> Self {
        Self {
            grid,
            layout: Layout::default(),
            resample: Resample::default(),
            chunk: 64,
            field: None,
        }
    }

    /// Scores `map` under each of `elements`, on `images` of shape `(B, C, H, W)`.
    ///
    /// `map` takes images to tokens `(B, prefix + N, C')` or a map of rank 4, as [`layout`](Self::layout) says. An element
    /// moves an image onto its own token grid times the patch, so that a moved image may have another height and width.
    /// The identity scores 1 by construction: leave it out. `rng` shuffles the nulls.
    ///
    /// `map` runs `1 + elements.len()` times on each image; the rest is computed in `f64` on the host, where the tokens of
    /// all images are held twice.
    ///
    /// # Errors
    /// Those of `map`. If there is no image or element, the grid does not divide the images, the tokens do not fit it, an
    /// element leaves no position with a preimage, or the field does not fit the channels or an element.
    pub fn measure<G: GroupAction, E: From<Error>>(
        &self,
        images: &Tensor,
        elements: &[G],
        rng: &mut (impl Rng + ?Sized),
        mut map: impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<Report<G>, E> {
        let layer = Layer {
            grid: self.grid,
            layout: self.layout,
        };
        let map = |x: &Tensor| map(x).map(|y| vec![y]);
        let mut reports = self.reports("EqScore::measure", images, elements, &[layer], rng, map)?;
        Ok(reports.remove(0))
    }

    /// [`measure`](Self::measure) at several layers of one model: `map` returns one map for each of `layers`, in their
    /// order, and the reports come in it too.
    ///
    /// The model runs once per element, whatever the number of layers. [`grid`](Self::grid) says how images move; take the
    /// coarsest layer's. Each layer has a grid and a layout of its own, and [`layout`](Self::layout) is not read. The
    /// tokens of all images are held twice for every layer, in `f64`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use rand::{SeedableRng, rngs::StdRng};
    /// use ser_reg::{TokenGrid, group::D4, metric::{EqScore, Layer}, tap};
    ///
    /// fn model(x: &Tensor) -> candle_core::Result<Tensor> {
    ///     let x = x.avg_pool2d(2)?;
    ///     tap::record("pooled", &x);
    ///     let x = x.cumsum(3)?; // knows left from right
    ///     tap::record("summed", &x);
    ///     x.mean_all()
    /// }
    ///
    /// let images = Tensor::randn(0f64, 1., (8, 3, 8, 8), &Device::Cpu)?;
    /// let grid = TokenGrid::square(4)?;
    /// let layers = [Layer::from(grid); 2];
    /// let rng = &mut StdRng::seed_from_u64(0);
    /// let reports = EqScore::new(grid).measure_layers(&images, &D4::ALL[1..], &layers, rng, |x| {
    ///     Ok::<_, ser_reg::Error>(tap::capture_all(&["pooled", "summed"], || model(x).map_err(ser_reg::Error::from))?.1)
    /// })?;
    /// assert!(reports[0].mean.score.centered > 0.999);
    /// assert!(reports[1].mean.score.centered < 0.9);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`measure`](Self::measure), and if there is no layer, the closure returns another number of maps, or an element
    /// moves images to sides that are no multiples of a layer's pixels per token.
    pub fn measure_layers<G: GroupAction, E: From<Error>>(
        &self,
        images: &Tensor,
        elements: &[G],
        layers: &[Layer],
        rng: &mut (impl Rng + ?Sized),
        map: impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Report<G>>, E> {
        let op = "EqScore::measure_layers";
        if layers.is_empty() {
            return Err(Error::input(op, "at least one layer", "none").into());
        }
        self.reports(op, images, elements, layers, rng, map)
    }

    fn reports<G: GroupAction, E: From<Error>>(
        &self,
        op: &'static str,
        images: &Tensor,
        elements: &[G],
        layers: &[Layer],
        rng: &mut (impl Rng + ?Sized),
        mut map: impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Report<G>>, E> {
        let run = self.run(op);
        run.check(images, elements.len())?;
        let batch = images.dims()[0];
        let upright = run.tokens(images, None, layers, &mut map)?;
        let mut scored = vec![Vec::with_capacity(elements.len()); layers.len()];
        for g in elements {
            run.pairs(images, g, layers, &upright, &mut map, |i, pair| {
                let (aligned, moved) = pair.matched()?;
                let channels = moved.dims()[2];
                let comparison =
                    compare(&values(&aligned)?, &values(&moved)?, channels, batch, rng);
                scored[i].push((g.clone(), comparison));
                Ok(())
            })?;
        }
        Ok(scored.into_iter().map(Report::of).collect())
    }

    pub(super) fn run(&self, op: &'static str) -> Run<'_> {
        Run {
            op,
            grid: self.grid,
            resample: &self.resample,
            chunk: self.chunk,
            field: self.field.as_ref(),
        }
    }
}

impl<G> Report<G> {
    fn of(elements: Vec<(G, Comparison)>) -> Self {
        let comparisons = || elements.iter().map(|(_, c)| c);
        let mean = Comparison {
            score: Scores::mean(&comparisons().map(|c| c.score).collect::<Vec<_>>()),
            shuffled_positions: Scores::mean_of_some(comparisons().map(|c| c.shuffled_positions)),
            shuffled_images: Scores::mean_of_some(comparisons().map(|c| c.shuffled_images)),
        };
        Self { elements, mean }
    }
}

/// The score of rows `a` against rows `v` of `channels` values each, with both nulls.
fn compare(
    a: &[f64],
    v: &[f64],
    channels: usize,
    images: usize,
    rng: &mut (impl Rng + ?Sized),
) -> Comparison {
    let rows = a.len() / channels;
    let positions = rows / images;
    let score = |row: &dyn Fn(usize) -> usize| Scores::between(a, v, channels, row);
    Comparison {
        score: score(&|i| i),
        shuffled_positions: (positions > 1).then(|| {
            let shuffles: Vec<usize> = (0..images)
                .flat_map(|b| {
                    cycle(positions, rng)
                        .into_iter()
                        .map(move |p| b * positions + p)
                })
                .collect();
            score(&|i| shuffles[i])
        }),
        shuffled_images: (images > 1).then(|| {
            let image = cycle(images, rng);
            score(&|i| image[i / positions] * positions + i % positions)
        }),
    }
}

/// A random permutation of `0..n` that is one cycle (Sattolo): nothing stays in its place.
pub(super) fn cycle(n: usize, rng: &mut (impl Rng + ?Sized)) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..i));
    }
    order
}

impl Scores {
    /// Of row `row(i)` of `a` against row `i` of `v`.
    fn between(a: &[f64], v: &[f64], channels: usize, row: &dyn Fn(usize) -> usize) -> Self {
        let (mean_a, mean_v) = (mean_row(a, channels), mean_row(v, channels));
        let (mut cosine, mut centered, mut correlation) = <(Mean, Mean, Mean)>::default();
        let (mut error, mut norm, mut max_abs) = (0., 0., 0.);
        let mut per_channel = vec![(Products::default(), Products::default()); channels];
        for (i, v) in v.chunks_exact(channels).enumerate() {
            let a = &a[row(i) * channels..][..channels];
            let (mut raw, mut less_mean) = <(Products, Products)>::default();
            for (c, (raw_c, less_mean_c)) in per_channel.iter_mut().enumerate() {
                let (x, y) = (a[c], v[c]);
                let (x0, y0) = (x - mean_a[c], y - mean_v[c]);
                raw.add(x, y);
                raw_c.add(x, y);
                less_mean.add(x0, y0);
                less_mean_c.add(x0, y0);
                let d = (x - y).abs();
                error += d * d;
                norm += y * y;
                max_abs = largest(max_abs, d);
            }
            cosine.add(raw.cosine(&raw));
            centered.add(less_mean.cosine(&raw));
        }
        for (raw, less_mean) in &per_channel {
            correlation.add(less_mean.cosine(raw));
        }
        Self {
            cosine: cosine.get(),
            centered: centered.get(),
            correlation: correlation.get(),
            relative_error: (error / norm).sqrt(),
            max_abs,
        }
    }

    fn mean(scores: &[Self]) -> Self {
        let of =
            |field: fn(&Self) -> f64| scores.iter().map(field).sum::<f64>() / scores.len() as f64;
        Self {
            cosine: of(|s| s.cosine),
            centered: of(|s| s.centered),
            correlation: of(|s| s.correlation),
            relative_error: of(|s| s.relative_error),
            max_abs: scores.iter().map(|s| s.max_abs).fold(0., largest),
        }
    }

    fn mean_of_some(scores: impl Iterator<Item = Option<Self>>) -> Option<Self> {
        let some: Vec<_> = scores.flatten().collect();
        (!some.is_empty()).then(|| Self::mean(&some))
    }
}

/// The larger of two; unlike `f64::max`, NaN if either is.
fn largest(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

fn mean_row(x: &[f64], channels: usize) -> Vec<f64> {
    let mut mean = vec![0.; channels];
    for row in x.chunks_exact(channels) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let rows = (x.len() / channels) as f64;
    mean.iter_mut().for_each(|m| *m /= rows);
    mean
}

/// The mean of what is defined; NaN of nothing.
#[derive(Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, x: Option<f64>) {
        if let Some(x) = x {
            self.sum += x;
            self.count += 1;
        }
    }

    fn get(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// The inner products of two vectors `x` and `y`.
#[derive(Clone, Copy, Default)]
struct Products {
    xx: f64,
    yy: f64,
    xy: f64,
}

impl Products {
    fn add(&mut self, x: f64, y: f64) {
        self.xx += x * x;
        self.yy += y * y;
        self.xy += x * y;
    }

    /// `⟨x, y⟩ / (‖x‖‖y‖)`, unless a vector is zero but for the rounding of the mean that was subtracted from `raw`.
    fn cosine(&self, raw: &Self) -> Option<f64> {
        let zero = |own: f64, raw: f64| own <= 1e-24 * raw;
        let defined = !zero(self.xx, raw.xx) && !zero(self.yy, raw.yy);
        defined.then(|| self.xy / (self.xx.sqrt() * self.yy.sqrt()))
    }
}
