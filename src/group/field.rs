//! Representations on channels, without tensors: how the fibre over a point changes when the grid turns.

use super::{Affine, D4, GroupAction, Subgroup};
use crate::{Error, Result};

/// How a block of channels changes when the grid turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Representation {
    /// One channel that stays as it is.
    #[default]
    Trivial,
    /// One channel per element of the group, in the order of [`Subgroup::elements`]; the element `g` carries channel `h`
    /// to channel `g∘h`. The channels of a group convolution are blocks of these.
    Regular(Subgroup),
}

impl Representation {
    /// Number of channels of one block.
    pub const fn size(self) -> usize {
        match self {
            Self::Trivial => 1,
            Self::Regular(group) => group.order(),
        }
    }

    /// For every channel of the turned block the channel that it comes from: `h` comes from `g⁻¹∘h`.
    ///
    /// # Errors
    /// If `g` is not in the group of a regular representation.
    pub fn source_indices(self, g: D4) -> Result<Vec<u32>> {
        let Self::Regular(group) = self else {
            return Ok(vec![0]);
        };
        let elements = group.elements();
        let inverse = g.inverse();
        let source = |h: &D4| {
            let from = inverse.compose(h);
            let index = elements.iter().position(|e| *e == from);
            index.map(|i| i as u32).ok_or_else(|| {
                Error::input(
                    "Representation::source_indices",
                    format!(
                        "an element of {group:?}, which the regular representation belongs to (draw views from that \
                         subgroup, or take the regular representation of D4)"
                    ),
                    format!("{g:?}"),
                )
            })
        };
        elements.iter().map(source).collect()
    }
}

/// What a map's channels are: blocks of representations, one after another.
///
/// The fibre over a position of the grid is its vector of channels. A *field* says how the fibre changes when the grid
/// turns: `(g·F)(p) = ρ(g) F(g⁻¹p)`, with `ρ` the direct sum of the blocks' representations. With only trivial blocks the
/// channels are left alone.
///
/// ```
/// use ser_reg::group::{D4, FieldType, Subgroup};
/// // 16 channels that stay as they are, then 4 blocks of the regular representation of D4
/// let field = FieldType::trivial(16).and(FieldType::regular(Subgroup::D4, 4 * 8)?);
/// assert_eq!(field.channels(), 48);
/// // under a quarter turn the channel of the identity goes to the channel of the quarter turn
/// let source = field.source_indices(D4::ROT90)?;
/// assert_eq!((source[15], source[16 + D4::ROT90.index()]), (15, 16));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FieldType {
    /// Representations with their number of blocks; neighbors differ, numbers are above 0.
    parts: Vec<(Representation, usize)>,
}

impl FieldType {
    /// `channels` channels that stay as they are.
    pub fn trivial(channels: usize) -> Self {
        Self::of(Representation::Trivial, channels)
    }

    /// `channels` channels that are blocks of the regular representation of `group`: the elements of the group vary
    /// fastest.
    ///
    /// # Errors
    /// If the order of the group does not divide the number of channels.
    pub fn regular(group: Subgroup, channels: usize) -> Result<Self> {
        let order = group.order();
        if channels == 0 || !channels.is_multiple_of(order) {
            return Err(Error::config(
                "FieldType::regular",
                format!(
                    "a number of channels that {order}, the order of {group:?}, divides (leave the others to \
                     FieldType::trivial, and join them with FieldType::and)"
                ),
                channels,
            ));
        }
        Ok(Self::of(Representation::Regular(group), channels / order))
    }

    fn of(representation: Representation, blocks: usize) -> Self {
        let parts = match blocks {
            0 => Vec::new(),
            _ => vec![(representation, blocks)],
        };
        Self { parts }
    }

    /// The direct sum: the channels of `self`, then those of `next`.
    pub fn and(mut self, next: Self) -> Self {
        for (representation, blocks) in next.parts {
            match self.parts.last_mut() {
                Some((last, count)) if *last == representation => *count += blocks,
                _ => self.parts.push((representation, blocks)),
            }
        }
        self
    }

    /// The representations in order, each with its number of blocks.
    pub fn parts(&self) -> &[(Representation, usize)] {
        &self.parts
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.parts.iter().map(|(r, blocks)| r.size() * blocks).sum()
    }

    /// Whether every channel stays as it is, whatever the element.
    pub fn is_trivial(&self) -> bool {
        self.parts
            .iter()
            .all(|(r, _)| *r == Representation::Trivial)
    }

    /// For every channel of the turned fibre the channel that it comes from.
    ///
    /// # Errors
    /// If `g` is not in the group of one of the regular representations.
    pub fn source_indices(&self, g: D4) -> Result<Vec<u32>> {
        let mut indices = Vec::with_capacity(self.channels());
        for &(representation, blocks) in &self.parts {
            let block = representation.source_indices(g)?;
            for _ in 0..blocks {
                let start = indices.len() as u32;
                indices.extend(block.iter().map(|i| start + i));
            }
        }
        Ok(indices)
    }
}

/// Entries of a normalized linear part below this are rounding.
const ZERO: f64 = 1e-12;

/// The D4 element `g` of a map `p ↦ S·g·p + b` with `S` diagonal and positive: what is left of it without its scale and
/// its shift. `None` if the map is no such map, as a turn by 30° or a shear.
pub(super) fn d4_part(map: &Affine) -> Option<D4> {
    let (a, _) = map.source_map();
    let scale = a.iter().flatten().fold(0.0f64, |m, v| m.max(v.abs()));
    D4::ALL.into_iter().find(|turn| {
        // The columns of the inverse map, turned: a positive diagonal if this is the turn.
        let forward = |v| turn.inverse().source_centered(v);
        let (u, v) = (forward([a[0][0], a[1][0]]), forward([a[0][1], a[1][1]]));
        let off = u[1].abs().max(v[0].abs());
        u[0] > 0.0 && v[1] > 0.0 && off <= ZERO * scale
    })
}
