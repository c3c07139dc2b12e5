//! The equivariance score: does the map of the transformed image equal the transformed map?

use candle_core::Tensor;
use rand::Rng;

use super::{
    harness::{Harness, values},
    layer::Layer,
    scores::{Comparison, Scores, compare},
};
use crate::{Error, GroupAction, Resample, Result, group::FieldType};

#[cfg(feature = "metrics")]
use super::matched::MatchedMaps;

/// Measures the equivariance of a closure from images to maps.
///
/// Let `A = ρ(g)F(x)` be the transformed map of the image and `V = F(g·x)` the map of the
/// transformed image. Their tokens are `a_bp` and `v_bp` at image `b` and position `p`, over all
/// images and the positions that have a preimage. The score says how far `A` and `V` agree:
///
/// | score | formula | best | chance |
/// |---|---|---|---|
/// | [`cosine`](Scores::cosine) | mean over `b, p` of `cos(a_bp, v_bp)` | 1 | the nulls; near 1 for a ViT |
/// | [`centered`](Scores::centered) | the same of `a_bp − ā` and `v_bp − v̄` | 1 | the nulls; near 0 |
/// | [`correlation`](Scores::correlation) | Pearson's, per channel over `b, p`; then the mean over channels | 1 | the nulls; near 0 |
/// | [`relative_error`](Scores::relative_error) | `‖A − V‖ / ‖V‖` | 0 | the nulls; up to √2 |
/// | [`mse`](Scores::mse), [`psnr`](Scores::psnr) | `‖A − V‖² / n` | 0, ∞ dB | the nulls |
/// | [`max_abs`](Scores::max_abs) | `max abs(A − V)` | 0 | the nulls |
///
/// The mean tokens `ā` and `v̄` are taken over all images and positions, for each map by itself.
/// The tokens of a ViT share a large common part, on which any two tokens agree: read the centered
/// cosine beside the plain one. Read both beside the nulls, the same scores of `A` with its
/// positions shuffled within each image, and with its images shuffled. A null is what remains of
/// the score if positions, or images, do not match.
///
/// This is our estimator. The SER paper's "Rotation Equiv" (0.804 → 0.840) is not defined in its
/// public code, and no score of this module claims to reproduce it. Correlation: after Bruintjes et
/// al., arXiv 2304.02628.
///
/// Under a [`Scale`](crate::group::Scale) with [`Filter::Fourier`](crate::Filter::Fourier), the
/// square of the relative error is the scale-equivariance error
/// `E_s = ‖D_s F(x) − F(D_s x)‖² / ‖F(D_s x)‖²` of arXiv 2311.02922; `docs/symmetries.md` has an
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
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EqScore {
    /// The layers that the closure returns, in its order. Elements that scale take the coarsest
    /// layer to whole tokens.
    pub layers: Vec<Layer>,
    /// How images and tokens are resampled where an element needs it.
    pub resample: Resample,
    /// Images per call of the closure.
    pub chunk: usize,
    /// How the channels of all maps turn with the grid; `None`: they do not turn.
    pub field: Option<FieldType>,
}

/// The equivariance of a closure under some elements of a group.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report<G> {
    /// Each element with its scores, in the order of the call.
    pub elements: Vec<(G, Comparison)>,
    /// The mean over the elements.
    pub mean: Comparison,
}

impl EqScore {
    /// For maps of one layer, given by its token grid (no prefix tokens, channels first) or as a
    /// [`Layer`]; channels that do not turn, the default filter, 64 images at a time.
    pub fn new(layer: impl Into<Layer>) -> Self {
        Self { layers: vec![layer.into()], resample: Resample::default(), chunk: 64, field: None }
    }

    /// Scores `map` under each of `elements`, on `images` of shape `(B, C, H, W)`.
    ///
    /// `map` takes images to tokens `(B, prefix + N, C')` or to a map of rank 4, as the layout of
    /// the one layer says. The transformed images may have another height and width. If the token
    /// grid divides the images, they consist of whole tokens of the same patch. If it does not (a
    /// convolution with padding: side 9 to grid 5), an element must keep the size of the image, but
    /// for a quarter turn. The identity scores 1 by construction: leave it out. `rng` shuffles the
    /// nulls.
    ///
    /// `map` runs `1 + elements.len()` times on each image. Everything else is computed in `f64` on
    /// the host, which holds the tokens of all images twice.
    ///
    /// # Errors
    /// Those of `map`. If there is no image or element, there are several layers, the tokens do not
    /// fit the grid, an element scales images that the grid does not divide or leaves no position
    /// with a preimage, or the field does not fit the channels or an element.
    pub fn measure<G: GroupAction>(
        &self,
        images: &Tensor,
        elements: &[G],
        rng: &mut (impl Rng + ?Sized),
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Report<G>> {
        let op = "EqScore::measure";
        if self.layers.len() != 1 {
            let expected = "one layer (EqScore::measure_layers takes several)";
            return Err(Error::input(op, expected, self.layers.len()));
        }
        let map = |x: &Tensor| map(x).map(|y| vec![y]);
        let mut reports = self.reports(op, images, elements, rng, map)?;
        Ok(reports.remove(0))
    }

    /// [`measure`](Self::measure) at several layers of one model. `map` returns one map for each of
    /// [`layers`](Self::layers), in their order; the reports come in the same order.
    ///
    /// The model runs once per element, whatever the number of layers. The tokens of all images are
    /// held twice for every layer, in `f64`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use rand::{SeedableRng, rngs::StdRng};
    /// use ser_reg::{TokenGrid, group::D4, metric::{EqScore, Layer}};
    ///
    /// fn model(x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    ///     let pooled = x.avg_pool2d(2)?;
    ///     let summed = pooled.cumsum(3)?; // knows left from right
    ///     Ok(vec![pooled, summed])
    /// }
    ///
    /// let images = Tensor::randn(0f64, 1., (8, 3, 8, 8), &Device::Cpu)?;
    /// let grid = TokenGrid::square(4)?;
    /// let score = EqScore { layers: vec![Layer::from(grid); 2], ..EqScore::new(grid) };
    /// let rng = &mut StdRng::seed_from_u64(0);
    /// let reports = score.measure_layers(&images, &D4::ALL[1..], rng, model)?;
    /// assert!(reports[0].mean.score.centered > 0.999);
    /// assert!(reports[1].mean.score.centered < 0.9);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// With taps in the model the closure is `|x| Ok(tap::capture_all(&names, ||
    /// model.forward(x))?.1)`.
    ///
    /// # Errors
    /// As [`measure`](Self::measure), and if there is no layer, the closure returns another number
    /// of maps, or an element takes images to sides that are no multiples of a layer's pixels per
    /// token.
    pub fn measure_layers<G: GroupAction>(
        &self,
        images: &Tensor,
        elements: &[G],
        rng: &mut (impl Rng + ?Sized),
        map: impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
    ) -> Result<Vec<Report<G>>> {
        self.reports("EqScore::measure_layers", images, elements, rng, map)
    }

    /// The maps of all layers under `g`, for the metrics that compare two representations:
    /// [`cka`](super::cka), [`Seis`](super::Seis). `images` are `(B, C, H, W)`; `map` returns one
    /// map per layer.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use rand::{SeedableRng, rngs::StdRng};
    /// use ser_reg::{TokenGrid, group::D4, metric::{EqScore, Hsic, Seis, cka}};
    ///
    /// let images = Tensor::rand(0f64, 1., (32, 3, 8, 8), &Device::Cpu)?;
    /// let score = EqScore::new(TokenGrid::square(4)?);
    /// let maps = score.matched_maps(&images, &D4::ROT90, |x| Ok(vec![x.avg_pool2d(2)?]))?;
    /// let (aligned, moved) = maps[0].matched()?;
    /// assert!((cka(&aligned, &moved, Hsic::Auto)? - 1.).abs() < 1e-9); // equivariant
    /// assert!(cka(&maps[0].upright, &moved, Hsic::Auto)? < 0.5); // not invariant
    /// // SEIS finds the action by itself
    /// let seis = Seis::default().measure(&maps[0].upright, &moved, &mut StdRng::seed_from_u64(0))?;
    /// assert!(seis.score.equivariance > 0.99 && seis.score.invariance < 0.7);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`measure_layers`](Self::measure_layers).
    #[cfg(feature = "metrics")]
    pub fn matched_maps<G: GroupAction>(
        &self,
        images: &Tensor,
        g: &G,
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
    ) -> Result<Vec<MatchedMaps>> {
        let harness = self.harness("EqScore::matched_maps")?;
        harness.check(images, 1)?;
        let upright = harness.tokens(images, None, &self.layers, &mut map)?;
        let mut all = Vec::with_capacity(self.layers.len());
        let (field, layers) = (self.field.as_ref(), (&self.layers[..], &upright[..]));
        harness.matched(images, g, field, layers, &mut map, |_, maps| {
            all.push(maps);
            Ok(())
        })?;
        Ok(all)
    }

    fn reports<G: GroupAction>(
        &self,
        op: &'static str,
        images: &Tensor,
        elements: &[G],
        rng: &mut (impl Rng + ?Sized),
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
    ) -> Result<Vec<Report<G>>> {
        let harness = self.harness(op)?;
        harness.check(images, elements.len())?;
        let batch = images.dims()[0];
        let upright = harness.tokens(images, None, &self.layers, &mut map)?;
        let mut scored = vec![Vec::with_capacity(elements.len()); self.layers.len()];
        let (field, layers) = (self.field.as_ref(), (&self.layers[..], &upright[..]));
        for g in elements {
            harness.matched(images, g, field, layers, &mut map, |i, maps| {
                let (aligned, moved) = maps.matched()?;
                let channels = moved.dims()[2];
                let comparison =
                    compare(&values(&aligned)?, &values(&moved)?, channels, batch, rng);
                scored[i].push((g.clone(), comparison));
                Ok(())
            })?;
        }
        Ok(scored.into_iter().map(Report::of).collect())
    }

    /// Images are transformed as the coarsest layer says.
    fn harness(&self, op: &'static str) -> Result<Harness<'_>> {
        let grids = self.layers.iter().map(|layer| layer.grid);
        let Some(grid) = grids.min_by_key(|grid| grid.len()) else {
            return Err(Error::input(op, "at least one layer", "none"));
        };
        Ok(Harness { op, grid, resample: &self.resample, chunk: self.chunk })
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
