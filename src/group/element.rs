//! The group that turns, flips, scales, crops and affine maps generate together.

use super::{Affine, D4, GroupAction, Point, Scale, Window};
use crate::{Result, TokenGrid};

/// An element of the group that turns, flips, scales, crops and affine maps generate together.
///
/// It consists of an affine map of the plane and its effect on the grid: rows and columns are
/// swapped or not, then multiplied by a zoom. A chain of D4 elements stays exact; other chains
/// round in `f64`.
///
/// ```
/// use ser_reg::{TokenGrid, group::{D4, Element, GroupAction, Scale, Window}};
/// let grid = TokenGrid::square(8)?;
/// let view = Element::from(Window::new(0.0, 0.25, 0.5, 0.75)?) // crop,
///     .then(Scale::new(2.0, 4.0 / 3.0)?)                       // resize to 8x8 again,
///     .then(D4::ROT90);                                        // and turn
/// assert_eq!(view.out_grid(grid)?, grid);
/// assert_eq!(Element::from(D4::ROT90).then(D4::HFLIP).as_d4(), Some(D4::HFLIP.compose(&D4::ROT90)));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Element {
    map: Affine,
    swap: bool,
    zoom: [f64; 2],
}

impl Element {
    /// The product `next ∘ self`: `next` acts after this element.
    pub fn then(&self, next: impl Into<Element>) -> Self {
        next.into().compose(self)
    }

    /// The factors `[rows, columns]` of the sides of the resulting grid.
    pub(crate) fn zoom(&self) -> [f64; 2] {
        self.zoom
    }

    /// The D4 element that equals this element to the bit; `None` if there is none.
    pub fn as_d4(&self) -> Option<D4> {
        self.map.as_d4().filter(|g| self.zoom == [1.0, 1.0] && self.swap == g.swaps_axes())
    }
}

impl From<D4> for Element {
    fn from(g: D4) -> Self {
        Self { map: g.into(), swap: g.swaps_axes(), zoom: [1.0, 1.0] }
    }
}

impl From<Scale> for Element {
    fn from(s: Scale) -> Self {
        Self { map: Affine::identity(), swap: false, zoom: s.factors() }
    }
}

impl From<Window> for Element {
    fn from(w: Window) -> Self {
        Self { map: w.into(), swap: false, zoom: w.size() }
    }
}

impl From<Affine> for Element {
    fn from(map: Affine) -> Self {
        Self { map, swap: false, zoom: [1.0, 1.0] }
    }
}

fn swapped([a, b]: [f64; 2], swap: bool) -> [f64; 2] {
    if swap { [b, a] } else { [a, b] }
}

impl GroupAction for Element {
    fn identity() -> Self {
        Self::from(D4::IDENTITY)
    }

    fn compose(&self, first: &Self) -> Self {
        let zoom = swapped(first.zoom, self.swap);
        Self {
            map: self.map.compose(&first.map),
            swap: self.swap ^ first.swap,
            zoom: [self.zoom[0] * zoom[0], self.zoom[1] * zoom[1]],
        }
    }

    fn inverse(&self) -> Self {
        Self {
            map: self.map.inverse(),
            swap: self.swap,
            zoom: swapped([1.0 / self.zoom[0], 1.0 / self.zoom[1]], self.swap),
        }
    }

    fn source(&self, p: Point) -> Point {
        self.map.source(p)
    }

    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        let grid = if self.swap { grid.transposed() } else { grid };
        grid.zoomed(self.zoom)
    }

    fn affine(&self) -> Option<Affine> {
        Some(self.map)
    }
}
