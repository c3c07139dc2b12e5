//! The Lie derivative: equivariance under motions so small that no grid stands in the way.

use candle_core::{DType, Tensor};

use super::{
    generator::Generator,
    harness::{Harness, host, pixels, values},
    layer::Layer,
    unit::norm,
};
use crate::{
    Error, Filter, GridOperator, GroupAction, Padding, Resample, Result, TokenGrid, group::Affine,
};

/// The Lie derivative of a closure of images.
///
/// `L_X F(x) = d/dt ρ(exp(−tX)) F(exp(tX)·x)` at `t = 0`: how fast the output, transformed back,
/// changes when the image starts to move. It is 0 for an equivariant map, and for invariant vectors
/// (`ρ` is the identity then). We take the central difference `(f(t) − f(−t)) / 2t`.
///
/// Source: Gruver et al., arXiv 2210.02984: bilinear resampling with reflected borders; their local
/// equivariance error is [`lee`](LieReport::lee), on softmax probabilities (which the closure must
/// return).
///
/// - *Units*: the derivative is per unit of the [`Generator`]'s `t`, and scales with the output.
///   Compare models by [`relative`](LieReport::relative).
/// - *Coarse maps* cannot be carried by a fraction of a token without error. Average pooling of an
///   image scores above 0 by the image's detail finer than a token. Compare a layer with a pooled
///   image.
/// - *Step*: the error falls with `t`, the rounding of the model grows with `1/t`. The default
///   moves the border of an image by a small fraction of a pixel, which suits `f32`. Half precision
///   needs a larger step. A step that the images' type does not resolve is refused; if the closure
///   works in a coarser type than the images, choose the step for that type. Interpolation has
///   kinks where a sample passes a pixel's center; around `t = 0` the central difference takes the
///   mean of both sides.
/// - A low error does not prove an equivariant architecture: training on augmented images lowers it
///   too.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, metric::{Generator, LieDerivative}};
///
/// let images = Tensor::rand(0f64, 1., (4, 3, 16, 16), &Device::Cpu)?;
/// // a function of each pixel is equivariant
/// let map = LieDerivative::of_maps(TokenGrid::square(16)?);
/// let reports = map.measure(&images, &Generator::ALL, |x| x.affine(2., 1.))?;
/// assert!(reports.iter().all(|r| r.relative < 0.1), "{reports:?}");
/// // a row of pixels is not invariant
/// let vector = LieDerivative::of_vectors();
/// let reports = vector.measure(&images, &[Generator::ROTATION], |x| x.narrow(2, 0, 1)?.flatten_from(1))?;
/// assert!(reports[0].relative > 0.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LieDerivative {
    /// How the closure's output becomes tokens, which are transformed back; `None`: it returns
    /// vectors `(B, D)`, which stay as they are.
    pub output: Option<Layer>,
    /// `t` of the central difference, above 0.
    pub step: f64,
    /// How images and tokens are resampled.
    pub resample: Resample,
    /// Images per call of the closure.
    pub chunk: usize,
}

/// The Lie derivative along one generator.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LieReport {
    /// The generator.
    pub generator: Generator,
    /// The local equivariance error `E_x ‖L_X F(x)‖² / dim`: the mean square of the derivative.
    pub lee: f64,
    /// The mean magnitude of the derivative.
    pub mean_abs: f64,
    /// `‖L_X F‖ / ‖F‖` over all images together; NaN if `F` is zero.
    pub relative: f64,
}

const OP: &str = "LieDerivative::measure";

impl LieDerivative {
    /// For token maps on `grid`: no prefix tokens, channels first, a step of 0.001, bilinear with
    /// reflected borders, 64 images at a time.
    pub fn of_maps(grid: TokenGrid) -> Self {
        Self { output: Some(grid.into()), ..Self::of_vectors() }
    }

    /// For vectors, which no motion of the image should change; else as [`of_maps`](Self::of_maps).
    pub fn of_vectors() -> Self {
        Self {
            output: None,
            step: 0.001,
            resample: Resample { filter: Filter::Bilinear, padding: Padding::Reflection },
            chunk: 64,
        }
    }

    /// The derivative of `map` along each generator, on `images` of shape `(B, C, H, W)`. `map`
    /// runs once on each image, and twice more for each generator, all images moved by the same
    /// step.
    ///
    /// # Errors
    /// Those of `map`. If the step is not above 0 or too small for the type of the images, there is
    /// no image or generator, or the output does not fit or holds a NaN or infinity.
    pub fn measure(
        &self,
        images: &Tensor,
        generators: &[Generator],
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Vec<LieReport>> {
        if !(self.step > 0. && self.step.is_finite()) {
            return Err(Error::config("LieDerivative::step", "a step above 0", self.step));
        }
        let one = TokenGrid::square(1)?;
        let harness = Harness {
            op: OP,
            grid: self.output.map_or(one, |layer| layer.grid),
            resample: &self.resample,
            chunk: self.chunk,
        };
        harness.check(images, generators.len())?;
        let px = pixels(images)?;
        for generator in generators {
            self.check_step(generator, px, images.dtype())?;
        }
        let mut output = |mover: Option<&GridOperator>| match &self.output {
            None => harness.vectors(images, mover, &mut map),
            Some(layer) => {
                let mut map = |x: &Tensor| map(x).map(|y| vec![y]);
                let mut all =
                    harness.tokens(images, mover, std::slice::from_ref(layer), &mut map)?;
                Ok(all.remove(0))
            }
        };
        let still = values(&output(None)?)?;
        finite(&still)?;
        let mut reports = Vec::with_capacity(generators.len());
        for generator in generators {
            let mut moved = |t: f64| -> Result<Vec<f64>> {
                let g = generator.flow(t, px)?;
                let operator = |g: Affine, grid| GridOperator::new(&[g], grid, &self.resample);
                let out = output(Some(&operator(g, px)?))?;
                let back = match &self.output {
                    None => out,
                    Some(layer) => operator(g.inverse(), layer.grid)?.apply(&out)?,
                };
                let back = values(&host(&back)?)?;
                finite(&back)?;
                Ok(back)
            };
            let (plus, minus) = (moved(self.step)?, moved(-self.step)?);
            if plus.len() != still.len() || minus.len() != still.len() {
                let expected = format!("{} values for the transformed images too", still.len());
                return Err(Error::input(OP, expected, plus.len()));
            }
            let derivative: Vec<f64> =
                plus.iter().zip(&minus).map(|(p, m)| (p - m) / (2. * self.step)).collect();
            let n = derivative.len() as f64;
            let (size, still) = (norm(&derivative), norm(&still));
            reports.push(LieReport {
                generator: *generator,
                lee: size * size / n,
                mean_abs: derivative.iter().map(|d| d.abs()).sum::<f64>() / n,
                relative: size / still,
            });
        }
        Ok(reports)
    }

    /// Refuses a step that moves no pixel by more than the rounding of the images' type: the
    /// difference would be exactly 0, as if the closure were equivariant.
    fn check_step(&self, generator: &Generator, px: TokenGrid, dtype: DType) -> Result<()> {
        let resolved = match dtype {
            DType::F16 => 64. * 9.8e-4,
            DType::BF16 => 64. * 7.8e-3,
            DType::F64 => SNAPPED,
            _ => 64. * f64::from(f32::EPSILON),
        };
        let speed = generator.speed(px);
        if speed > 0. && self.step * speed < resolved {
            return Err(Error::config(
                "LieDerivative::step",
                format!(
                    "a step of at least {:.1e} for {dtype:?} images of {px} pixels under {generator:?} \
                     (a smaller one moves no pixel by more than rounding)",
                    resolved / speed
                ),
                format!("{:e}", self.step),
            ));
        }
        Ok(())
    }
}

/// Grid operators round shifts of 1e-9 of a cell away; in `f64` this bounds the step.
const SNAPPED: f64 = 1e-6;

fn finite(x: &[f64]) -> Result<()> {
    match x.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(v) => Err(Error::input(OP, "finite values from the closure", v)),
    }
}
