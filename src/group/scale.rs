//! Resizing.

use super::{Affine, GroupAction, Point};
use crate::{Error, Result, TokenGrid};

/// Resizing by `(sy, sx)`: points of the unit square do not move, and the grid changes from
/// `(rows, cols)` to `(round(sy·rows), round(sx·cols))`.
///
/// ```
/// use ser_reg::{TokenGrid, group::{GroupAction, Scale}};
/// let grid = TokenGrid::square(14)?;
/// let scale = Scale::to_grid(grid, TokenGrid::new(12, 16)?);
/// assert_eq!(scale.out_grid(grid)?, TokenGrid::new(12, 16)?);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    sy: f64,
    sx: f64,
}

impl Scale {
    /// Resizing rows by `sy` and columns by `sx` (ratios, dimensionless; above 1 enlarges).
    ///
    /// # Errors
    /// If either is not finite and positive.
    pub fn new(sy: f64, sx: f64) -> Result<Self> {
        for s in [sy, sx] {
            if !(s.is_finite() && s > 0.0 && (1.0 / s).is_finite()) {
                return Err(Error::config("Scale", "finite factors above zero", s));
            }
        }
        Ok(Self { sy, sx })
    }

    /// The scale that takes grid `from` to grid `to`.
    pub fn to_grid(from: TokenGrid, to: TokenGrid) -> Self {
        Self {
            sy: to.rows() as f64 / from.rows() as f64,
            sx: to.cols() as f64 / from.cols() as f64,
        }
    }

    /// The factors `[sy, sx]`.
    pub(super) fn factors(&self) -> [f64; 2] {
        [self.sy, self.sx]
    }
}

impl GroupAction for Scale {
    fn identity() -> Self {
        Self { sy: 1.0, sx: 1.0 }
    }

    fn compose(&self, first: &Self) -> Self {
        Self { sy: self.sy * first.sy, sx: self.sx * first.sx }
    }

    fn inverse(&self) -> Self {
        Self { sy: 1.0 / self.sy, sx: 1.0 / self.sx }
    }

    fn source(&self, p: Point) -> Point {
        p
    }

    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        grid.zoomed([self.sy, self.sx])
    }

    fn affine(&self) -> Option<Affine> {
        Some(Affine::identity())
    }
}
