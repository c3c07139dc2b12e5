//! The subgroups of D4.

use super::D4;

/// The ten subgroups of [`D4`].
///
/// `Dn` is the dihedral group of order `2n`, `Cn` the cyclic group of order `n`.
/// [`Subgroup::Flips`] is the group that is usually called D2.
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
    /// C2: the identity and the half turn.
    C2,
    /// The identity and the flip of columns (order 2).
    HFlip,
    /// The identity and the flip of rows (order 2).
    VFlip,
    /// The identity and the flip at the main diagonal (order 2).
    Transpose,
    /// The identity and the flip at the other diagonal (order 2).
    AntiTranspose,
    /// D2, the Klein four-group of both axis-aligned flips and the half turn. It keeps every grid.
    Flips,
    /// The other Klein four-group (D2 turned by 45°): both diagonal flips and the half turn.
    DiagonalFlips,
    /// C4: all quarter turns.
    C4,
    /// D4: the whole group, order 8.
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

    /// The elements in ascending [`D4::index`]; the identity is first.
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

    /// Elements that generate the subgroup; none for the trivial one.
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
            Self::D4 => &[D4::ROT90, D4::HFLIP],
        }
    }

    /// Number of elements.
    pub const fn order(self) -> usize {
        self.elements().len()
    }
}
