//! The dihedral group of the square: quarter turns and flips.

use super::{Affine, GroupAction, Point};
use crate::{Error, Result, TokenGrid};

/// One of the eight symmetries of the square, exact in integers.
///
/// Written `rot90^k ∘ hflip^f`: the flip acts first. `k` counts counter-clockwise quarter turns as displayed (rows
/// downward), as `torch.rot90(x, k, [2, 3])` does; `hflip` reverses the columns. The index is `k + 4·f`.
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

    /// Two elements that generate the group.
    pub const GENERATORS: [Self; 2] = [Self::ROT90, Self::HFLIP];

    const fn of(turns: u8, flip: bool) -> Self {
        Self { turns, flip }
    }

    /// `rot90^turns ∘ hflip^flip`; any integer number of counter-clockwise quarter turns.
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

    /// The Cayley table: `table[b][a]` is the index of `b ∘ a` (`a` first).
    pub fn cayley_table() -> [[usize; 8]; 8] {
        Self::ALL.map(|b| Self::ALL.map(|a| b.compose(&a).index()))
    }

    /// For every cell of the turned grid the index of the cell of `grid` that it comes from; integers only.
    pub fn source_indices(self, grid: TokenGrid) -> Vec<u32> {
        let (h, w) = (grid.rows(), grid.cols());
        let (rows, cols) = if self.swaps_axes() { (w, h) } else { (h, w) };
        // Undo the turns, then the flip; `move |i, j|` is written per element so that the inner loop is one affine step.
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
            let step = if cols > 1 {
                source(i, 1) as i64 - start
            } else {
                0
            };
            indices.extend((0..cols as i64).map(|j| (start + step * j) as u32));
        }
        indices
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

impl GroupAction for D4 {
    fn identity() -> Self {
        Self::IDENTITY
    }

    fn compose(&self, first: &Self) -> Self {
        // hflip ∘ rot90^k = rot90^−k ∘ hflip
        let turns = if self.flip {
            4 - first.turns
        } else {
            first.turns
        };
        Self::of((self.turns + turns) % 4, self.flip ^ first.flip)
    }

    fn inverse(&self) -> Self {
        let turns = if self.flip {
            self.turns
        } else {
            (4 - self.turns) % 4
        };
        Self::of(turns, self.flip)
    }

    fn source(&self, [y, x]: Point) -> Point {
        let [y, x] = self.source_centered([y - 0.5, x - 0.5]);
        [y + 0.5, x + 0.5]
    }

    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        Ok(if self.swaps_axes() {
            grid.transposed()
        } else {
            grid
        })
    }

    fn affine(&self) -> Option<Affine> {
        Some(Affine::from(*self))
    }
}

/// The ten subgroups of [`D4`].
///
/// ```
/// use ser_reg::group::{D4, Subgroup};
/// assert_eq!(Subgroup::Flips.elements(), [D4::IDENTITY, D4::ROT180, D4::HFLIP, D4::VFLIP]);
/// assert_eq!(Subgroup::C4.generators(), [D4::ROT90]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Subgroup {
    /// The identity alone.
    Trivial,
    /// Half turns, C2.
    C2,
    /// The flip of columns.
    HFlip,
    /// The flip of rows.
    VFlip,
    /// The flip at the main diagonal.
    Transpose,
    /// The flip at the other diagonal.
    AntiTranspose,
    /// Both axis-aligned flips and the half turn: all that keeps every grid.
    Flips,
    /// Both diagonal flips and the half turn.
    DiagonalFlips,
    /// Quarter turns, C4.
    C4,
    /// The whole group, order 8.
    #[default]
    D4,
}

impl Subgroup {
    /// All ten subgroups, by order.
    pub const ALL: [Self; 10] = [
        Self::Trivial,
        Self::C2,
        Self::HFlip,
        Self::VFlip,
        Self::Transpose,
        Self::AntiTranspose,
        Self::Flips,
        Self::DiagonalFlips,
        Self::C4,
        Self::D4,
    ];

    /// The elements, by index; the identity first.
    pub const fn elements(self) -> &'static [D4] {
        match self {
            Self::Trivial => &[D4::IDENTITY],
            Self::C2 => &[D4::IDENTITY, D4::ROT180],
            Self::HFlip => &[D4::IDENTITY, D4::HFLIP],
            Self::VFlip => &[D4::IDENTITY, D4::VFLIP],
            Self::Transpose => &[D4::IDENTITY, D4::TRANSPOSE],
            Self::AntiTranspose => &[D4::IDENTITY, D4::ANTI_TRANSPOSE],
            Self::Flips => &[D4::IDENTITY, D4::ROT180, D4::HFLIP, D4::VFLIP],
            Self::DiagonalFlips => &[D4::IDENTITY, D4::ROT180, D4::TRANSPOSE, D4::ANTI_TRANSPOSE],
            Self::C4 => &[D4::IDENTITY, D4::ROT90, D4::ROT180, D4::ROT270],
            Self::D4 => &D4::ALL,
        }
    }

    /// Elements whose products are the whole subgroup; none for the trivial one.
    pub const fn generators(self) -> &'static [D4] {
        match self {
            Self::Trivial => &[],
            Self::C2 => &[D4::ROT180],
            Self::HFlip => &[D4::HFLIP],
            Self::VFlip => &[D4::VFLIP],
            Self::Transpose => &[D4::TRANSPOSE],
            Self::AntiTranspose => &[D4::ANTI_TRANSPOSE],
            Self::Flips => &[D4::HFLIP, D4::VFLIP],
            Self::DiagonalFlips => &[D4::TRANSPOSE, D4::ANTI_TRANSPOSE],
            Self::C4 => &[D4::ROT90],
            Self::D4 => &D4::GENERATORS,
        }
    }

    /// Number of elements.
    pub const fn order(self) -> usize {
        self.elements().len()
    }
}
