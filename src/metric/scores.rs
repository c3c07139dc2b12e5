//! How far two maps agree, and what is left of it by chance.

use rand::Rng;

use super::unit::unit;
use crate::{Error, Result};

/// How far two maps agree; the formulas are in the table of [`EqScore`](super::EqScore).
///
/// What is undefined (the cosine of a zero token, the correlation of a constant channel) is left
/// out of its mean. If nothing is left, the score is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scores {
    /// Mean cosine of the tokens; 1 is best.
    pub cosine: f64,
    /// Mean cosine of the tokens after the mean token of each map is subtracted; 1 is best.
    pub centered: f64,
    /// Pearson's correlation of each channel, averaged over channels; 1 is best.
    pub correlation: f64,
    /// Norm of the difference, relative to the map of the transformed image, over all images
    /// together; 0 is best.
    pub relative_error: f64,
    /// Mean squared difference of two values; 0 is best.
    pub mse: f64,
    /// Largest difference of two values; 0 is best. Over several elements: the largest, not the
    /// mean.
    pub max_abs: f64,
}

/// The scores of one element, or their mean over elements, beside their chance levels.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// The score.
    pub score: Scores,
    /// The chance level if positions do not match: positions are shuffled within each image. `None`
    /// if there is one position only.
    pub shuffled_positions: Option<Scores>,
    /// The chance level if images do not match: images are shuffled. `None` if there is one only.
    pub shuffled_images: Option<Scores>,
}

impl Scores {
    /// The peak signal-to-noise ratio `10·log₁₀(range² / mse)` in dB; infinite for an exact map.
    ///
    /// `range` is the distance of the largest from the smallest value that the map can take: 1 for
    /// images within `[0, 1]`, 2 within `[−1, 1]`. For feature maps, which have no range, report
    /// the range that was taken, or read the other scores.
    ///
    /// Under translations this is EQ-T, under rotations EQ-R of Karras et al. (StyleGAN3), arXiv
    /// 2106.12423. They take fractional shifts and any angle with band-limited filters; whole-token
    /// shifts and quarter turns are exact on the grid, and not to be compared with those values.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use rand::{SeedableRng, rngs::StdRng};
    /// use ser_reg::{TokenGrid, group::{Affine, D4}, metric::EqScore};
    ///
    /// let images = Tensor::rand(0f64, 1., (4, 3, 16, 16), &Device::Cpu)?;
    /// let score = EqScore::new(TokenGrid::square(8)?);
    /// let rng = &mut StdRng::seed_from_u64(0);
    /// let eq_r = score.measure(&images, &D4::ALL[1..4], rng, |x| x.avg_pool2d(2))?;
    /// assert!(eq_r.mean.score.psnr(1.)? > 250.);
    /// let ramp = Tensor::arange(0f64, 8., &Device::Cpu)?; // knows left from right
    /// let right = [Affine::translation(0., 1. / 8.)?]; // by one token
    /// let eq_t = score.measure(&images, &right, rng, |x| x.avg_pool2d(2)?.broadcast_mul(&ramp))?;
    /// assert!(eq_t.mean.score.psnr(1.)? < 20.);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// If `range` is not above 0.
    pub fn psnr(&self, range: f64) -> Result<f64> {
        if !(range > 0. && range.is_finite()) {
            let expected = "a range of values above 0";
            return Err(Error::config("Scores::psnr: range", expected, range));
        }
        Ok(20. * range.log10() - 10. * self.mse.log10())
    }

    /// Of row `row(i)` of `a` against row `i` of `v`.
    ///
    /// Values are multiplied by `units` before they are squared. Each map has a unit of its own for
    /// the products; the smaller one serves the differences.
    fn between(
        (a, v): (&[f64], &[f64]),
        (unit_a, unit_v): (f64, f64),
        channels: usize,
        row: &dyn Fn(usize) -> usize,
    ) -> Self {
        let unit = unit_a.min(unit_v);
        let (mean_a, mean_v) = (mean_row(a, unit_a, channels), mean_row(v, unit_v, channels));
        let (mut cosine, mut centered, mut correlation) = <(Mean, Mean, Mean)>::default();
        let (mut error, mut norm, mut max_abs) = (0., 0., 0.);
        let mut per_channel = vec![(Products::default(), Products::default()); channels];
        for (i, v) in v.chunks_exact(channels).enumerate() {
            let a = &a[row(i) * channels..][..channels];
            let (mut raw, mut less_mean) = <(Products, Products)>::default();
            for (c, (raw_c, less_mean_c)) in per_channel.iter_mut().enumerate() {
                let (x, y) = (a[c] * unit_a, v[c] * unit_v);
                let (x0, y0) = (x - mean_a[c], y - mean_v[c]);
                raw.add(x, y);
                raw_c.add(x, y);
                less_mean.add(x0, y0);
                less_mean_c.add(x0, y0);
                let (x, y) = (a[c] * unit, v[c] * unit);
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
            mse: error / v.len() as f64 / unit / unit,
            max_abs: max_abs / unit,
        }
    }

    pub(super) fn mean(scores: &[Self]) -> Self {
        let of =
            |field: fn(&Self) -> f64| scores.iter().map(field).sum::<f64>() / scores.len() as f64;
        Self {
            cosine: of(|s| s.cosine),
            centered: of(|s| s.centered),
            correlation: of(|s| s.correlation),
            relative_error: of(|s| s.relative_error),
            mse: of(|s| s.mse),
            max_abs: scores.iter().map(|s| s.max_abs).fold(0., largest),
        }
    }

    pub(super) fn mean_of_some(scores: impl Iterator<Item = Option<Self>>) -> Option<Self> {
        let some: Vec<_> = scores.flatten().collect();
        (!some.is_empty()).then(|| Self::mean(&some))
    }
}

/// The score of rows `a` against rows `v` of `channels` values each, with both nulls.
pub(super) fn compare(
    a: &[f64],
    v: &[f64],
    channels: usize,
    images: usize,
    rng: &mut (impl Rng + ?Sized),
) -> Comparison {
    let units = (unit(a), unit(v));
    let rows = a.len() / channels;
    let positions = rows / images;
    let score = |row: &dyn Fn(usize) -> usize| Scores::between((a, v), units, channels, row);
    Comparison {
        score: score(&|i| i),
        shuffled_positions: (positions > 1).then(|| {
            let shuffles: Vec<usize> = (0..images)
                .flat_map(|b| cycle(positions, rng).into_iter().map(move |p| b * positions + p))
                .collect();
            score(&|i| shuffles[i])
        }),
        shuffled_images: (images > 1).then(|| {
            let image = cycle(images, rng);
            score(&|i| image[i / positions] * positions + i % positions)
        }),
    }
}

/// A random permutation of `0..n` that is one cycle (Sattolo): nothing keeps its place.
pub(super) fn cycle(n: usize, rng: &mut (impl Rng + ?Sized)) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..i));
    }
    order
}

/// The larger of two; unlike `f64::max`, NaN if either is.
fn largest(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

fn mean_row(x: &[f64], unit: f64, channels: usize) -> Vec<f64> {
    let mut mean = vec![0.; channels];
    for row in x.chunks_exact(channels) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x * unit);
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

    /// `⟨x, y⟩ / (‖x‖‖y‖)`, unless a vector is zero but for the rounding of the mean that was
    /// subtracted from `raw`.
    fn cosine(&self, raw: &Self) -> Option<f64> {
        let zero = |own: f64, raw: f64| own <= 1e-24 * raw;
        let defined = !zero(self.xx, raw.xx) && !zero(self.yy, raw.yy);
        defined.then(|| self.xy / (self.xx.sqrt() * self.yy.sqrt()))
    }
}
