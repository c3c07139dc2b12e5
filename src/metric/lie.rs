//! The Lie derivative: equivariance under motions so small that no grid stands in the way.

use candle_core::Tensor;
use nalgebra::Matrix3;

use super::{
    Layer,
    run::{Run, host, pixels, values},
};
use crate::{
    Error, Filter, GridOperator, GroupAction, Padding, Resample, Result, TokenGrid, group::Affine,
};

/// An infinitesimal motion of the plane: the flow `exp(t·X)` that it generates is a one-parameter group of affine maps.
///
/// The matrix acts on offsets `(y, x)` from the center in pixels, the shift is in units of the image's sides. So `t` is
/// an angle in radians, a fraction of a side, the logarithm of a magnification or the tangent of a shear.
///
/// ```
/// use ser_reg::{TokenGrid, group::{Affine, GroupAction}, metric::Generator};
/// let px = TokenGrid::square(32)?;
/// let turned = Generator::ROTATION.flow(0.1, px)?;
/// let expected = Affine::rotation(0.1f64.to_degrees())?;
/// for (a, b) in turned.source([0.2, 0.7]).into_iter().zip(expected.source([0.2, 0.7])) {
///     assert!((a - b).abs() < 1e-12);
/// }
/// // any other: content runs along x and grows along y
/// let mixed = Generator { matrix: [[1., 0.], [0., 0.]], shift: [0., 1.] };
/// assert!(mixed.flow(0.01, px).is_ok());
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generator {
    /// The linear part, rows and columns `(y, x)`.
    pub matrix: [[f64; 2]; 2],
    /// The velocity of the center, `(y, x)`.
    pub shift: [f64; 2],
}

/// Bound on the entries of `t·X`.
const LARGEST: f64 = 100.;

impl Generator {
    /// Counter-clockwise as displayed, `t` in radians.
    pub const ROTATION: Self = Self::linear([[0., -1.], [1., 0.]]);
    /// Down; `t` in heights of the image.
    pub const TRANSLATION_Y: Self = Self::constant([1., 0.]);
    /// To the right; `t` in widths of the image.
    pub const TRANSLATION_X: Self = Self::constant([0., 1.]);
    /// Magnification by `exp(t)`.
    pub const SCALE: Self = Self::linear([[1., 0.], [0., 1.]]);
    /// Magnification along y by `exp(t)`, along x by `exp(−t)`.
    pub const STRETCH: Self = Self::linear([[1., 0.], [0., -1.]]);
    /// `y += t·x`.
    pub const SHEAR_Y: Self = Self::linear([[0., 1.], [0., 0.]]);
    /// `x += t·y`.
    pub const SHEAR_X: Self = Self::linear([[0., 0.], [1., 0.]]);
    /// All of the above.
    pub const ALL: [Self; 7] = [
        Self::ROTATION,
        Self::TRANSLATION_Y,
        Self::TRANSLATION_X,
        Self::SCALE,
        Self::STRETCH,
        Self::SHEAR_Y,
        Self::SHEAR_X,
    ];

    const fn linear(matrix: [[f64; 2]; 2]) -> Self {
        Self {
            matrix,
            shift: [0.; 2],
        }
    }

    const fn constant(shift: [f64; 2]) -> Self {
        Self {
            matrix: [[0.; 2]; 2],
            shift,
        }
    }

    /// `exp(t·X)` on an image of `pixels`.
    ///
    /// # Errors
    /// If a value times `t` is not finite, or 100 or more: a motion that no image shows.
    pub fn flow(&self, t: f64, pixels: TokenGrid) -> Result<Affine> {
        let [[a, b], [c, d]] = self.matrix;
        let aspect = pixels.cols() as f64 / pixels.rows() as f64;
        let [y, x] = self.shift;
        let generator = Matrix3::new(a, b * aspect, y, c / aspect, d, x, 0., 0., 0.) * t;
        // Beyond, the exponential overflows, and the squaring by which it is computed does not end.
        if !generator.iter().all(|v| v.abs() < LARGEST) {
            return Err(Error::config(
                "Generator",
                format!("finite values, below {LARGEST} once multiplied by t"),
                format!("{self:?} at t = {t}"),
            ));
        }
        let e = generator.exp();
        Affine::new([[e.m11, e.m12], [e.m21, e.m22]], [e.m13, e.m23])
    }
}

/// How to take the Lie derivative of a closure of images.
///
/// `L_X F(x) = d/dt ρ(exp(−tX)) F(exp(tX)·x)` at `t = 0`: how fast the output, carried back, changes when the image
/// starts to move. It is 0 for an equivariant map; of vectors, where `ρ` is the identity, for an invariant one. We take
/// the central difference `(f(t) − f(−t)) / 2t`.
///
/// Source: Gruver et al., arXiv 2210.02984: bilinear resampling with reflected borders; their local equivariance error
/// is [`lee`](LieReport::lee), on softmax probabilities (which the closure must return).
///
/// - *Units*: the derivative is per unit of the [`Generator`]'s `t`, and scales with the output. Compare models by
///   [`relative`](LieReport::relative).
/// - *Coarse maps* cannot be carried by a fraction of a token without error: average pooling of a picture scores above
///   0, by what the picture has of detail finer than a token. Read a layer beside a pooled image.
/// - *Step*: the error falls with `t`, the rounding of the model grows with `1/t`. The default moves the border of a
///   picture by a small fraction of a pixel, and suits `f32`; half precision needs a larger one. Interpolation has
///   kinks where a sample passes a pixel's center; around `t = 0` the central difference takes the mean of both sides.
/// - A low error need not mean an equivariant architecture: training on augmented images may lower it further.
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
    /// How the closure's output becomes tokens, which are carried back; `None`: it returns vectors `(B, D)`, left as
    /// they are.
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
    /// For token maps on `grid`: no prefix tokens, channels first, a step of 0.001, bilinear with reflected borders, 64
    /// images at a time.
    pub fn of_maps(grid: TokenGrid) -> Self {
        Self {
            output: Some(grid.into()),
            ..Self::of_vectors()
        }
    }

    /// For vectors, which no motion of the image should change; else as [`of_maps`](Self::of_maps).
    pub fn of_vectors() -> Self {
        Self {
            output: None,
            step: 0.001,
            resample: Resample {
                filter: Filter::Bilinear,
                padding: Padding::Reflection,
            },
            chunk: 64,
        }
    }

    /// The derivative of `map` along each generator, on `images` of shape `(B, C, H, W)`. `map` runs
    /// once on each image, and twice more for each generator, all images moved by the same step.
    ///
    /// # Errors
    /// Those of `map`. If the step is not above 0, there is no image or generator, the token grid does not divide the
    /// images, or the output does not fit or holds a NaN or infinity.
    pub fn measure<E: From<Error>>(
        &self,
        images: &Tensor,
        generators: &[Generator],
        mut map: impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<Vec<LieReport>, E> {
        if !(self.step > 0. && self.step.is_finite()) {
            return Err(Error::config("LieDerivative::step", "a step above 0", self.step).into());
        }
        let run = Run {
            op: OP,
            grid: match self.output {
                Some(layer) => layer.grid,
                None => TokenGrid::square(1)?,
            },
            resample: &self.resample,
            chunk: self.chunk,
            field: None,
        };
        run.check(images, generators.len())?;
        let px = pixels(images)?;
        let mut output = |mover: Option<&GridOperator>| match &self.output {
            None => run.vectors(images, mover, &mut map),
            Some(layer) => {
                let mut map = |x: &Tensor| map(x).map(|y| vec![y]);
                let mut all = run.tokens(images, mover, std::slice::from_ref(layer), &mut map)?;
                Ok(all.remove(0))
            }
        };
        let square = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>();
        let still = values(&output(None)?)?;
        finite(&still)?;
        let mut reports = Vec::with_capacity(generators.len());
        for generator in generators {
            let mut moved = |t: f64| -> Result<Vec<f64>, E> {
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
                let expected = format!("{} values for the moved images too", still.len());
                return Err(Error::input(OP, expected, plus.len()).into());
            }
            let derivative: Vec<f64> = plus
                .iter()
                .zip(&minus)
                .map(|(p, m)| (p - m) / (2. * self.step))
                .collect();
            let n = derivative.len() as f64;
            reports.push(LieReport {
                generator: *generator,
                lee: square(&derivative) / n,
                mean_abs: derivative.iter().map(|d| d.abs()).sum::<f64>() / n,
                relative: (square(&derivative) / square(&still)).sqrt(),
            });
        }
        Ok(reports)
    }
}

fn finite(x: &[f64]) -> Result<()> {
    match x.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(v) => Err(Error::input(OP, "finite values from the closure", v)),
    }
}
