//! Representations of D4 on channels, without tensors.

use super::{D4, GroupAction, Subgroup};
use crate::{Error, Result};

/// How a block of channels changes when the grid turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Representation {
    /// One channel that does not change.
    #[default]
    Trivial,
    /// One channel per element of the group, in the order of [`Subgroup::elements`]. The element
    /// `g` moves channel `h` to channel `g∘h`. Group convolutions produce such blocks.
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

    /// For every channel of the turned block, its source channel: `h` comes from `g⁻¹∘h`.
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

/// The type of a map's channels: a direct sum of representations.
///
/// The fibre over a position of the grid is its vector of channels. The type defines how the fibre
/// changes when the grid turns: `(g·F)(p) = ρ(g) F(g⁻¹p)`, with `ρ` the direct sum of the blocks'
/// representations. Trivial blocks do not change.
///
/// ```
/// use ser_reg::group::{D4, FieldType, Subgroup};
/// // 16 trivial channels, then 4 blocks of the regular representation of D4
/// let field = FieldType::trivial(16).and(FieldType::regular(Subgroup::D4, 4 * 8)?);
/// assert_eq!(field.channels(), 48);
/// // a quarter turn moves the channel of the identity to the channel of the quarter turn
/// let source = field.source_indices(D4::ROT90)?;
/// assert_eq!((source[15], source[16 + D4::ROT90.index()]), (15, 16));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FieldType {
    /// Representations with their number of blocks; neighbors differ, numbers are above 0.
    parts: Vec<(Representation, usize)>,
}

/// The most channels of a field. It keeps an absurd size an error, where a vector of so many elements could not exist.
const MOST_CHANNELS: usize = 1 << 24;

impl FieldType {
    /// `channels` channels that do not change.
    pub fn trivial(channels: usize) -> Self {
        Self::of(Representation::Trivial, channels)
    }

    /// `channels` channels in blocks of the regular representation of `group`. The elements of the
    /// group vary fastest.
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

    /// The direct sum: the channels of `self`, then the channels of `next`.
    pub fn and(mut self, next: Self) -> Self {
        for (representation, blocks) in next.parts {
            match self.parts.last_mut() {
                Some((last, count)) if *last == representation => {
                    *count = count.saturating_add(blocks);
                }
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
        let channels = |(r, blocks): &(Representation, usize)| r.size().saturating_mul(*blocks);
        let parts = self.parts.iter().map(channels);
        parts.fold(0, usize::saturating_add)
    }

    /// Whether no element changes any channel.
    pub fn is_trivial(&self) -> bool {
        self.parts.iter().all(|(r, _)| *r == Representation::Trivial)
    }

    /// For every channel of the turned fibre, its source channel.
    ///
    /// # Errors
    /// If `g` is not in the group of every regular representation, or there are more than 2^24
    /// channels.
    pub fn source_indices(&self, g: D4) -> Result<Vec<u32>> {
        let channels = self.channels();
        if channels > MOST_CHANNELS {
            return Err(Error::input(
                "FieldType::source_indices",
                "at most 2^24 channels",
                channels,
            ));
        }
        let mut indices = Vec::with_capacity(channels);
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
