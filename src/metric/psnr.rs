//! Equivariance in decibels: the peak signal-to-noise ratio of the map of the moved image against the moved map.

use candle_core::Tensor;

use super::{
    Layer,
    run::{Run, finite_host, values},
};
use crate::{Error, GroupAction, Layout, Resample, Result, TokenGrid, group::Affine};

/// `10·log₁₀(range² / MSE)` of two tensors of one shape, in dB; infinite if they are equal.
///
/// `range` is the distance of the largest from the smallest value there can be: 1 for images within `[0, 1]`, 2 within
/// `[−1, 1]`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::metric::psnr;
/// let x = Tensor::new(&[0f32, 0.5, 1.], &Device::Cpu)?;
/// let y = (&x + 0.1)?;
/// assert!((psnr(&x, &y, 1.)? - 20.).abs() < 1e-5);
/// assert_eq!(psnr(&x, &x, 1.)?, f64::INFINITY);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the shapes differ, there is no value, one is not finite, or `range` is not above 0.
pub fn psnr(reference: &Tensor, x: &Tensor, range: f64) -> Result<f64> {
    let op = "psnr";
    check_range(range)?;
    if reference.dims() != x.dims() || x.elem_count() == 0 {
        return Err(Error::input(
            op,
            "two tensors of one shape with at least one value",
            format!("{:?} and {:?}", reference.dims(), x.dims()),
        ));
    }
    let (a, b) = (finite_host(op, reference)?, finite_host(op, x)?);
    let (sum, count) = squared_error(&values(&a)?, &values(&b)?);
    Ok(decibels(sum, count, range))
}

/// Equivariance as a peak signal-to-noise ratio: EQ-T under translations, EQ-R under rotations.
///
/// The reference is the moved map `ρ(g)F(x)`, the output `F(g·x)`; the squared error is taken over all images and the
/// positions that have a preimage. Source: Karras et al. (StyleGAN3), arXiv 2106.12423, which takes `range = 2` for
/// images within `[−1, 1]`, fractional shifts with a Lanczos filter and any angle with a band-limited one. Ours are
/// whole-token shifts and quarter turns, which are exact on the grid: not to be compared with published figures.
///
/// A ratio in dB means little where the range is not that of the values: of feature maps say which range was taken, or
/// read [`EqScore`](super::EqScore) instead.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, group::D4, metric::EqPsnr};
///
/// let images = Tensor::rand(0f32, 1., (4, 3, 16, 16), &Device::Cpu)?;
/// let grid = TokenGrid::square(8)?;
/// let eq = EqPsnr::new(grid, 1.);
/// let ramp = Tensor::arange(0f32, 8., &Device::Cpu)?;
/// let eq_r = eq.measure(&images, &D4::ALL[1..4], |x| x.avg_pool2d(2))?;
/// assert!(eq_r.mean > 100.);
/// let eq_t = eq.measure(&images, &EqPsnr::shifts(grid, 1)?, |x| x.avg_pool2d(2)?.broadcast_mul(&ramp))?;
/// assert!(eq_t.mean < 20.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EqPsnr {
    /// The token grid of an image as it comes.
    pub grid: TokenGrid,
    /// How the closure's output becomes tokens.
    pub layout: Layout,
    /// How images and tokens are resampled where an element needs it.
    pub resample: Resample,
    /// Images per call of the closure.
    pub chunk: usize,
    /// The distance of the largest from the smallest value that the map can take, above 0.
    pub range: f64,
}

/// Equivariance in decibels.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PsnrReport<G> {
    /// Each element with its ratio in dB, in the order they were handed in.
    pub elements: Vec<(G, f64)>,
    /// The ratio, in dB, of the squared error over all elements together.
    pub mean: f64,
}

const OP: &str = "EqPsnr::measure";

impl EqPsnr {
    /// For maps on `grid` with values of this range: no prefix tokens, channels first, the default filter, 64 images at
    /// a time.
    pub fn new(grid: TokenGrid, range: f64) -> Self {
        Self {
            grid,
            layout: Layout::default(),
            resample: Resample::default(),
            chunk: 64,
            range,
        }
    }

    /// The shifts by so many whole tokens down, up, right and left, for EQ-T; exact but for what leaves the image.
    /// StyleGAN3 shifts by up to an eighth of the image.
    ///
    /// # Errors
    /// If `tokens` is zero or leaves nothing of the image.
    pub fn shifts(grid: TokenGrid, tokens: usize) -> Result<[Affine; 4]> {
        if tokens == 0 || tokens >= grid.rows().min(grid.cols()) {
            return Err(Error::config(
                "EqPsnr::shifts",
                format!("at least one token and fewer than the {grid} grid has"),
                tokens,
            ));
        }
        let (dy, dx) = (
            tokens as f64 / grid.rows() as f64,
            tokens as f64 / grid.cols() as f64,
        );
        Ok([
            Affine::translation(dy, 0.)?,
            Affine::translation(-dy, 0.)?,
            Affine::translation(0., dx)?,
            Affine::translation(0., -dx)?,
        ])
    }

    /// Measures `map`, from images to maps, on `images` of shape `(B, C, H, W)`; arguments as in
    /// [`EqScore::measure`](super::EqScore::measure).
    ///
    /// # Errors
    /// As [`EqScore::measure`](super::EqScore::measure), and if the range is not above 0 or a map holds a NaN or
    /// infinity.
    pub fn measure<G: GroupAction, E: From<Error>>(
        &self,
        images: &Tensor,
        elements: &[G],
        mut map: impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<PsnrReport<G>, E> {
        check_range(self.range)?;
        let run = Run {
            op: OP,
            grid: self.grid,
            resample: &self.resample,
            chunk: self.chunk,
            field: None,
        };
        run.check(images, elements.len())?;
        let layer = [Layer {
            grid: self.grid,
            layout: self.layout,
        }];
        let mut map = |x: &Tensor| map(x).map(|y| vec![y]);
        let upright = run.tokens(images, None, &layer, &mut map)?;
        let mut scored = Vec::with_capacity(elements.len());
        let (mut sum, mut count) = (0., 0);
        for g in elements {
            run.pairs(images, g, &layer, &upright, &mut map, |_, pair| {
                let (aligned, moved) = pair.matched()?;
                let (aligned, moved) = (finite_host(OP, &aligned)?, finite_host(OP, &moved)?);
                let (error, n) = squared_error(&values(&aligned)?, &values(&moved)?);
                scored.push((g.clone(), decibels(error, n, self.range)));
                sum += error;
                count += n;
                Ok(())
            })?;
        }
        Ok(PsnrReport {
            elements: scored,
            mean: decibels(sum, count, self.range),
        })
    }
}

fn check_range(range: f64) -> Result<()> {
    if range > 0. && range.is_finite() {
        return Ok(());
    }
    Err(Error::config("range", "a range of values above 0", range))
}

/// The sum of the squared differences and their number.
fn squared_error(a: &[f64], b: &[f64]) -> (f64, usize) {
    let sum = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    (sum, a.len())
}

fn decibels(sum: f64, count: usize, range: f64) -> f64 {
    10. * (range * range * count as f64 / sum).log10()
}
