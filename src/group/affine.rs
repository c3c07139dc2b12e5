//! General affine maps: any rotation angle, shear, translation.

use super::{GroupAction, Point};
use crate::{Error, Result, TokenGrid};

pub(super) type Matrix = [[f64; 2]; 2];

/// `p ↦ A·p + b` in coordinates relative to the center of the image. Quarter turns and flips are
/// then signed permutations with `b = 0`, which `f64` composes without rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Centered {
    a: Matrix,
    b: Point,
}

impl Centered {
    const IDENTITY: Self = Self { a: [[1.0, 0.0], [0.0, 1.0]], b: [0.0, 0.0] };

    fn apply(&self, [y, x]: Point) -> Point {
        [
            self.a[0][0] * y + self.a[0][1] * x + self.b[0],
            self.a[1][0] * y + self.a[1][1] * x + self.b[1],
        ]
    }

    fn after(&self, first: &Self) -> Self {
        let mut a = Matrix::default();
        for (i, row) in a.iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = self.a[i][0] * first.a[0][j] + self.a[i][1] * first.a[1][j];
            }
        }
        Self { a, b: self.apply(first.b) }
    }
}

/// An affine map of the plane, in coordinates relative to the unit square.
///
/// It stores forward and inverse map, so `g.inverse().inverse() == g` to the bit. The grid does not
/// change: for a quarter turn that swaps the grid take [`D4`](super::D4), and on grids with `H ≠ W`
/// take [`Affine::rotation_on`] for turns that are rigid in cells.
///
/// ```
/// use ser_reg::group::{Affine, D4, GroupAction};
/// assert_eq!(Affine::rotation(90.0)?, Affine::from(D4::ROT90));
/// let turn = Affine::rotation(30.0)?;
/// let [y, x] = turn.source(Affine::rotation(30.0)?.inverse().source([0.2, 0.7]));
/// assert!((y - 0.2).abs() < 1e-12 && (x - 0.7).abs() < 1e-12);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    forward: Centered,
    backward: Centered,
}

impl Affine {
    /// `p ↦ c + A·(p − c) + b` with `c` the center of the image. Rows and columns of `A` and `b`
    /// are in the order `(y, x)`; `b` is in units of the image's side.
    ///
    /// # Errors
    /// If a value is not finite or `A` is singular (its determinant below `1e-12·‖A‖²`).
    pub fn new(a: [[f64; 2]; 2], b: [f64; 2]) -> Result<Self> {
        let det = a[0][0] * a[1][1] - a[0][1] * a[1][0];
        let norm: f64 = a.iter().flatten().map(|v| v * v).sum();
        let finite = a.iter().flatten().chain(&b).all(|v| v.is_finite());
        if !finite || det.is_nan() || det.abs() <= 1e-12 * norm {
            return Err(Error::config(
                "Affine",
                "finite values and an invertible matrix",
                format!("A = {a:?}, b = {b:?}, det A = {det:e}"),
            ));
        }
        let inverse = [[a[1][1] / det, -a[0][1] / det], [-a[1][0] / det, a[0][0] / det]];
        let forward = Centered { a, b };
        let [y, x] = Centered { a: inverse, b: [0.0; 2] }.apply(b);
        let backward = Centered { a: inverse, b: [-y, -x] };
        Ok(Self { forward, backward })
    }

    /// A rotation about the center by `degrees`, counter-clockwise as displayed; multiples of 90°
    /// are exact.
    ///
    /// # Errors
    /// If the angle is not finite.
    pub fn rotation(degrees: f64) -> Result<Self> {
        let (s, c) = match degrees.rem_euclid(360.0) {
            0.0 => (0.0, 1.0),
            90.0 => (1.0, 0.0),
            180.0 => (0.0, -1.0),
            270.0 => (-1.0, 0.0),
            _ => degrees.to_radians().sin_cos(),
        };
        Self::new([[c, -s], [s, c]], [0.0; 2])
    }

    /// A rotation about the center that is rigid in cells, counter-clockwise, in degrees. Cells
    /// keep their size from `from` to `to`, so a grid with `H ≠ W` is turned and not sheared.
    ///
    /// # Errors
    /// If the angle is not finite.
    pub fn rotation_on(degrees: f64, from: TokenGrid, to: TokenGrid) -> Result<Self> {
        let a = Self::rotation(degrees)?.forward.a;
        let (to, from) =
            ([to.rows() as f64, to.cols() as f64], [from.rows() as f64, from.cols() as f64]);
        let cell = |i: usize, j: usize| a[i][j] * from[j] / to[i];
        Self::new([[cell(0, 0), cell(0, 1)], [cell(1, 0), cell(1, 1)]], [0.0; 2])
    }

    /// A shift by `(dy, dx)` in units of the image's side, down and to the right.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn translation(dy: f64, dx: f64) -> Result<Self> {
        Self::new([[1.0, 0.0], [0.0, 1.0]], [dy, dx])
    }

    /// A shear about the center: `y += sy·x`, `x += sx·y` (both from the old values).
    ///
    /// # Errors
    /// If a value is not finite or `sy·sx = 1`.
    pub fn shear(sy: f64, sx: f64) -> Result<Self> {
        Self::new([[1.0, sy], [sx, 1.0]], [0.0; 2])
    }

    /// A magnification about the center by `(zy, zx)`. The grid stays, the content grows.
    ///
    /// # Errors
    /// If a factor is zero or not finite.
    pub fn zoom(zy: f64, zx: f64) -> Result<Self> {
        Self::new([[zy, 0.0], [0.0, zx]], [0.0; 2])
    }

    /// From PyTorch's `affine_grid` matrix: rows `(x, y)`, coordinates in `[−1, 1]`, output to
    /// input.
    ///
    /// # Errors
    /// If the matrix is singular or not finite.
    pub fn from_theta(theta: [[f64; 3]; 2]) -> Result<Self> {
        let [[xx, xy, tx], [yx, yy, ty]] = theta;
        Ok(Self::new([[yy, yx], [xy, xx]], [ty / 2.0, tx / 2.0])?.inverse())
    }

    /// The map `p ↦ A·p + b` on points relative to the center, from `(A, b)` of the map and of its
    /// inverse.
    pub(super) fn from_pair(forward: (Matrix, Point), backward: (Matrix, Point)) -> Self {
        let centered = |(a, b)| Centered { a, b };
        Self { forward: centered(forward), backward: centered(backward) }
    }

    /// `g⁻¹` on points relative to the center: the matrix (rows and columns `(y, x)`) and the
    /// shift.
    pub(crate) fn source_map(&self) -> (Matrix, Point) {
        (self.backward.a, self.backward.b)
    }
}

impl GroupAction for Affine {
    fn identity() -> Self {
        Self { forward: Centered::IDENTITY, backward: Centered::IDENTITY }
    }

    fn compose(&self, first: &Self) -> Self {
        Self {
            forward: self.forward.after(&first.forward),
            backward: first.backward.after(&self.backward),
        }
    }

    fn inverse(&self) -> Self {
        Self { forward: self.backward, backward: self.forward }
    }

    fn source(&self, [y, x]: Point) -> Point {
        let [y, x] = self.backward.apply([y - 0.5, x - 0.5]);
        [y + 0.5, x + 0.5]
    }

    fn affine(&self) -> Option<Affine> {
        Some(*self)
    }
}
