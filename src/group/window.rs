//! Crops.

use super::{Affine, GroupAction, Point};
use crate::{Error, Result, TokenGrid};

/// A crop: the view is the window `[top, top + height] × [left, left + width]` of the source, in
/// units of its side.
///
/// The grid shrinks with the window, so a crop of whole cells resamples nothing. Compose with
/// [`Scale`](super::Scale) to resize the crop. A window may reach beyond the source. Its inverse
/// puts the window back; cells outside of it are lost, and the operator's mask marks them.
///
/// ```
/// use ser_reg::{TokenGrid, group::{GroupAction, Window}};
/// let grid = TokenGrid::square(8)?;
/// let crop = Window::new(0.25, 0.0, 0.5, 1.0)?;
/// assert_eq!(crop.out_grid(grid)?, TokenGrid::new(4, 8)?);
/// assert_eq!(crop.source([0.0, 0.0]), [0.25, 0.0]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    origin: Point,
    size: [f64; 2],
}

impl Window {
    /// The window with its upper left corner at `(top, left)`, in units of the source's side.
    ///
    /// # Errors
    /// If a value is not finite or a side is not positive.
    pub fn new(top: f64, left: f64, height: f64, width: f64) -> Result<Self> {
        if !(top.is_finite() && left.is_finite()) {
            return Err(Error::config(
                "Window",
                "a finite corner (top, left)",
                format!("({top}, {left})"),
            ));
        }
        for s in [height, width] {
            if !(s.is_finite() && s > 0.0 && (1.0 / s).is_finite()) {
                return Err(Error::config("Window", "finite sides above zero", s));
            }
        }
        Ok(Self { origin: [top, left], size: [height, width] })
    }

    /// The window of `height × width` whole cells of `grid`, its upper left cell at `(top, left)`.
    ///
    /// # Errors
    /// If a side is zero.
    pub fn from_cells(
        top: i64,
        left: i64,
        height: usize,
        width: usize,
        grid: TokenGrid,
    ) -> Result<Self> {
        let (rows, cols) = (grid.rows() as f64, grid.cols() as f64);
        Self::new(top as f64 / rows, left as f64 / cols, height as f64 / rows, width as f64 / cols)
    }

    /// The sides `[height, width]`.
    pub(super) fn size(&self) -> [f64; 2] {
        self.size
    }
}

impl From<Window> for Affine {
    fn from(w: Window) -> Self {
        let map = |w: Window| {
            let ([y, x], [h, l]) = (w.origin, w.size);
            ([[h, 0.0], [0.0, l]], [y + (h - 1.0) / 2.0, x + (l - 1.0) / 2.0])
        };
        Affine::from_pair(map(w.inverse()), map(w))
    }
}

impl GroupAction for Window {
    fn identity() -> Self {
        Self { origin: [0.0, 0.0], size: [1.0, 1.0] }
    }

    fn compose(&self, first: &Self) -> Self {
        Self {
            origin: first.source(self.origin),
            size: [self.size[0] * first.size[0], self.size[1] * first.size[1]],
        }
    }

    fn inverse(&self) -> Self {
        Self {
            origin: [-self.origin[0] / self.size[0], -self.origin[1] / self.size[1]],
            size: [1.0 / self.size[0], 1.0 / self.size[1]],
        }
    }

    fn source(&self, [y, x]: Point) -> Point {
        [self.origin[0] + y * self.size[0], self.origin[1] + x * self.size[1]]
    }

    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        grid.zoomed(self.size)
    }

    fn affine(&self) -> Option<Affine> {
        Some(Affine::from(*self))
    }
}
