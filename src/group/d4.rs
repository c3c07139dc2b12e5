//! The dihedral group of the square: quarter turns and flips.

use super::{Affine, GroupAction, Point};
use crate::{Error, Result, TokenGrid};

/// Entries of a normalized linear part below this are rounding.
const ZERO: f64 = 1e-12;

/// One of the eight symmetries of the square, exact in integers.
///
/// It is `rot90^k ∘ hflip^f`: the flip acts first. `k` counts counter-clockwise quarter turns as
/// displayed (rows downward), like `torch.rot90(x, k, [2, 3])`; `hflip` reverses the columns. The
/// index is `k + 4·f`.
///
/// ```
/// use ser_reg::group::{D4, GroupAction};
/// assert_eq!(D4::ROT90.compose(&D4::ROT90), D4::ROT180);
/// assert_eq!(D4::ROT90.compose(&D4::HFLIP), D4::TRANSPOSE);
/// assert_ne!(D4::ROT90.compose(&D4::HFLIP), D4::HFLIP.compose(&D4::ROT90)); // not commutative
/// assert_eq!(D4::relative(&D4::ROT90, &D4::HFLIP), D4::TRANSPOSE);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct D4 {
    turns: u8,
    flip: bool,
}

impl D4 {
    /// The neutral element.
    pub const IDENTITY: Self = Self::of(0, false);
    /// A quarter turn counter-clockwise: `y[i, j] = x[j, W−1−i]`.
    pub const ROT90: Self = Self::of(1, false);
    /// A half turn.
    pub const ROT180: Self = Self::of(2, false);
    /// A quarter turn clockwise.
    pub const ROT270: Self = Self::of(3, false);
    /// Columns reversed: `y[i, j] = x[i, W−1−j]`.
    pub const HFLIP: Self = Self::of(0, true);
    /// Rows and columns exchanged: `y[i, j] = x[j, i]`.
    pub const TRANSPOSE: Self = Self::of(1, true);
    /// Rows reversed: `y[i, j] = x[H−1−i, j]`.
    pub const VFLIP: Self = Self::of(2, true);
    /// Mirrored at the other diagonal: `y[i, j] = x[H−1−j, W−1−i]`.
    pub const ANTI_TRANSPOSE: Self = Self::of(3, true);

    /// All eight elements, by index.
    pub const ALL: [Self; 8] = [
        Self::IDENTITY,
        Self::ROT90,
        Self::ROT180,
        Self::ROT270,
        Self::HFLIP,
        Self::TRANSPOSE,
        Self::VFLIP,
        Self::ANTI_TRANSPOSE,
    ];

    const fn of(turns: u8, flip: bool) -> Self {
        Self { turns, flip }
    }

    /// `rot90^turns ∘ hflip^flip`, for any integer number of counter-clockwise quarter turns.
    pub const fn new(turns: i64, flip: bool) -> Self {
        Self::of(turns.rem_euclid(4) as u8, flip)
    }

    /// `turns` quarter turns counter-clockwise; negative ones turn clockwise.
    pub const fn rot90(turns: i64) -> Self {
        Self::new(turns, false)
    }

    /// The element of index `k + 4·f`.
    ///
    /// # Errors
    /// If `index > 7`.
    pub fn from_index(index: usize) -> Result<Self> {
        Self::ALL
            .get(index)
            .copied()
            .ok_or_else(|| Error::config("D4::from_index", "an index in 0..=7", index))
    }

    /// The index `k + 4·f`, in `0..8`.
    pub const fn index(self) -> usize {
        self.turns as usize + 4 * self.flip as usize
    }

    /// Number of counter-clockwise quarter turns `k`, in `0..4`, after the flip.
    pub const fn turns(self) -> u8 {
        self.turns
    }

    /// Whether columns are reversed first.
    pub const fn flip(self) -> bool {
        self.flip
    }

    /// Whether rows and columns change places.
    pub const fn swaps_axes(self) -> bool {
        self.turns % 2 == 1
    }

    /// For every cell of the turned grid, the index of its source cell in `grid`.
    pub fn source_indices(self, grid: TokenGrid) -> Vec<u32> {
        let (h, w) = (grid.rows(), grid.cols());
        let (rows, cols) = if self.swaps_axes() { (w, h) } else { (h, w) };
        // Undoes the turns, then the flip. The index is affine in `j`, so two values fix a row.
        let source = |i: usize, j: usize| -> usize {
            let (y, x) = match self.turns {
                0 => (i, j),
                1 => (j, w - 1 - i),
                2 => (h - 1 - i, w - 1 - j),
                _ => (h - 1 - j, i),
            };
            y * w + if self.flip { w - 1 - x } else { x }
        };
        let mut indices = Vec::with_capacity(grid.len());
        for i in 0..rows {
            let start = source(i, 0) as i64;
            let step = if cols > 1 { source(i, 1) as i64 - start } else { 0 };
            indices.extend((0..cols as i64).map(|j| (start + step * j) as u32));
        }
        indices
    }

    /// The D4 element `g` of a map `p ↦ S·g·p + b` with `S` diagonal and positive; `None` for other
    /// maps, for example a turn by 30° or a shear.
    pub(super) fn part_of(map: &Affine) -> Option<Self> {
        let (a, _) = map.source_map();
        let scale = a.iter().flatten().fold(0.0f64, |m, v| m.max(v.abs()));
        Self::ALL.into_iter().find(|turn| {
            // The columns of the inverse map, turned: a positive diagonal if this is the turn.
            let forward = |v| turn.inverse().source_centered(v);
            let (u, v) = (forward([a[0][0], a[1][0]]), forward([a[0][1], a[1][1]]));
            let off = u[1].abs().max(v[0].abs());
            u[0] > 0.0 && v[1] > 0.0 && off <= ZERO * scale
        })
    }

    /// The inverse on points relative to the center of the image.
    pub(crate) fn source_centered(self, [y, x]: Point) -> Point {
        let [y, x] = match self.turns {
            0 => [y, x],
            1 => [x, -y],
            2 => [-y, -x],
            _ => [-x, y],
        };
        [y, if self.flip { -x } else { x }]
    }
}

impl From<D4> for Affine {
    fn from(g: D4) -> Self {
        let map = |g: D4| {
            let (u, v) = (g.source_centered([1.0, 0.0]), g.source_centered([0.0, 1.0]));
            // `+ 0.0` turns a negative zero into zero.
            ([[u[0] + 0.0, v[0] + 0.0], [u[1] + 0.0, v[1] + 0.0]], [0.0; 2])
        };
        Affine::from_pair(map(g.inverse()), map(g))
    }
}

impl Affine {
    /// The D4 element that equals this map to the bit; `None` if there is none.
    pub fn as_d4(&self) -> Option<D4> {
        D4::ALL.into_iter().find(|&g| *self == Self::from(g))
    }
}

impl GroupAction for D4 {
    fn identity() -> Self {
        Self::IDENTITY
    }

    fn compose(&self, first: &Self) -> Self {
        // hflip ∘ rot90^k = rot90^−k ∘ hflip
        let turns = if self.flip { 4 - first.turns } else { first.turns };
        Self::of((self.turns + turns) % 4, self.flip ^ first.flip)
    }

    fn inverse(&self) -> Self {
        let turns = if self.flip { self.turns } else { (4 - self.turns) % 4 };
        Self::of(turns, self.flip)
    }

    fn source(&self, [y, x]: Point) -> Point {
        let [y, x] = self.source_centered([y - 0.5, x - 0.5]);
        [y + 0.5, x + 0.5]
    }

    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        Ok(if self.swaps_axes() { grid.transposed() } else { grid })
    }

    fn affine(&self) -> Option<Affine> {
        Some(Affine::from(*self))
    }
}
