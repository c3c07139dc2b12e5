//! Infinitesimal motions of the plane.

use crate::{Error, Result, TokenGrid, group::Affine};

/// An infinitesimal motion of the plane: the flow `exp(t·X)` that it generates is a one-parameter
/// group of affine maps.
///
/// The matrix acts on offsets `(y, x)` from the center in pixels, the shift is in units of the
/// image's sides. So `t` is an angle in radians, a fraction of a side, the logarithm of a
/// magnification or the tangent of a shear.
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
        Self { matrix, shift: [0.; 2] }
    }

    const fn constant(shift: [f64; 2]) -> Self {
        Self { matrix: [[0.; 2]; 2], shift }
    }

    /// The largest distance in pixels per unit of `t` that the generator moves a point of the
    /// image.
    pub(super) fn speed(&self, pixels: TokenGrid) -> f64 {
        let [rows, cols] = [pixels.rows() as f64, pixels.cols() as f64];
        let along =
            |[a, b]: [f64; 2], shift: f64| (a * rows).abs() / 2. + (b * cols).abs() / 2. + shift;
        let [y, x] = self.shift;
        along(self.matrix[0], (y * rows).abs()).max(along(self.matrix[1], (x * cols).abs()))
    }

    /// `exp(t·X)` on an image of `pixels`.
    ///
    /// # Errors
    /// If a value times `t` is not finite, or 100 or more: a motion that no image shows.
    pub fn flow(&self, t: f64, pixels: TokenGrid) -> Result<Affine> {
        let [[a, b], [c, d]] = self.matrix;
        let aspect = pixels.cols() as f64 / pixels.rows() as f64;
        let [y, x] = self.shift;
        let generator = [[a, b * aspect, y], [c / aspect, d, x], [0.; 3]].map(|r| r.map(|v| v * t));
        // Beyond, the exponential overflows.
        if !generator.as_flattened().iter().all(|v| v.abs() < LARGEST) {
            return Err(Error::config(
                "Generator",
                format!("finite values, below {LARGEST} once multiplied by t"),
                format!("{self:?} at t = {t:?}"),
            ));
        }
        let [[a, b, y], [c, d, x], _] = exp(generator);
        Affine::new([[a, b], [c, d]], [y, x])
    }
}

type Matrix = [[f64; 3]; 3];

fn product(a: Matrix, b: Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

/// The exponential: its series at `m / 2ⁿ`, where it converges at once, squared `n` times.
fn exp(m: Matrix) -> Matrix {
    /// Entries below 1/16 leave less than 1e-17 of the series behind these terms.
    const TERMS: usize = 12;
    let largest = m.as_flattened().iter().fold(0f64, |m, v| m.max(v.abs()));
    let squarings = (largest * 16.0).max(1.0).log2().ceil() as i32;
    let small = m.map(|r| r.map(|v| v * 0.5f64.powi(squarings)));
    let identity = [[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]];
    let (mut sum, mut term) = (identity, identity);
    for k in 1..=TERMS {
        term = product(term, small).map(|r| r.map(|v| v / k as f64));
        sum = std::array::from_fn(|i| std::array::from_fn(|j| sum[i][j] + term[i][j]));
    }
    (0..squarings).fold(sum, |e, _| product(e, e))
}
