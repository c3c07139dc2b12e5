//! Two views of a batch, and what the encoder makes of them.
//!
//! The regularizer splits a batch: the plain part has two crops of each picture, the posed part two poses of one crop. The
//! base method sees both parts as one batch; the regularizer sees the tokens of the posed part.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Tensor;
use ser_reg::{
    group::Element,
    partition::Partition,
    tap,
    view::{Relative, ViewPair},
};

use super::vit::Vit;

/// Pictures `(B, C, H, W)`, normalized, in two views.
pub struct Views {
    plain: [Tensor; 2],
    /// Poses may have another height and width than crops.
    posed: Option<([Tensor; 2], Relative<Element>)>,
    /// Time that posing took.
    posing: Duration,
}

/// The encoder's output.
pub struct Encoded {
    /// Features `(B, D)` of either view, in the order of the batch.
    pub features: [Tensor; 2],
    pub posed: Option<Posed>,
    /// What an add-on reads of the plain part of either view; `None` if all pictures are posed.
    pub plain: Option<[Tensor; 2]>,
}

/// What the regularizer compares.
pub struct Posed {
    /// Tokens of the tapped block for the posed part of either view.
    maps: [Tensor; 2],
    /// What carries the first view's into the frame of the second.
    pub relative: Relative<Element>,
    /// Time that posing the pictures took; of a device that works ahead, that of asking for it.
    pub posing: Duration,
}

impl Posed {
    pub fn maps(&self) -> [&Tensor; 2] {
        self.maps.each_ref()
    }
}

impl Views {
    /// The base method's: two crops of every picture.
    pub fn plain(first: Tensor, second: Tensor) -> Self {
        Self {
            plain: [first, second],
            posed: None,
            posing: Duration::ZERO,
        }
    }

    /// With the last pictures, as `part` says, in the poses of `pair`.
    pub fn posed(
        first: &Tensor,
        second: &Tensor,
        part: &Partition,
        pair: ViewPair,
    ) -> Result<Self> {
        let (plain1, shared1) = part.split(first)?;
        let (plain2, shared2) = part.split(second)?;
        let start = Instant::now();
        let posed = [pair.first.apply(&shared1)?, pair.second.apply(&shared2)?];
        Ok(Self {
            plain: [plain1, plain2],
            posed: Some((posed, pair.relative())),
            posing: start.elapsed(),
        })
    }

    /// Runs everything through `encoder`, pictures of one size at once, and keeps the posed part's tokens of `block`.
    /// `drop_path` seeds the stochastic depth of an encoder in training; without it nothing is dropped.
    pub fn encode(&self, encoder: &Vit, block: &str, drop_path: Option<u64>) -> Result<Encoded> {
        self.encode_and_tap(encoder, block, None, drop_path)
    }

    /// The same for an add-on, which reads the tokens of the block `addon` in the plain part, or the features if there is none.
    pub fn encode_and_tap(
        &self,
        encoder: &Vit,
        block: &str,
        addon: Option<&str>,
        drop_path: Option<u64>,
    ) -> Result<Encoded> {
        // First view, second view, unless all pictures are posed; then their posed parts.
        let plain: &[Tensor] = match self.plain[0].dim(0)? {
            0 => &[],
            _ => &self.plain,
        };
        let parts: Vec<&Tensor> = plain
            .iter()
            .chain(self.posed.iter().flat_map(|(views, _)| views))
            .collect();
        let mut blocks = vec![block];
        blocks.extend(addon.filter(|&other| other != block));
        let (mut features, mut maps) = (Vec::new(), vec![Vec::new(); blocks.len()]);
        for group in parts.chunk_by(|a, b| a.dims()[1..] == b.dims()[1..]) {
            let x = Tensor::cat(group, 0)?;
            let (output, tapped) = tap::capture_all(&blocks, || match drop_path {
                Some(seed) => {
                    encoder.forward_training(&x, seed.wrapping_add(features.len() as u64))
                }
                None => encoder.forward(&x),
            })?;
            let mut start = 0;
            for part in group {
                let count = part.dim(0)?;
                features.push(output.narrow(0, start, count)?);
                for (maps, tapped) in maps.iter_mut().zip(&tapped) {
                    maps.push(tapped.narrow(0, start, count)?);
                }
                start += count;
            }
        }
        let read = match addon {
            None => &features,
            Some(_) => &maps[blocks.len() - 1],
        };
        let of_plain = (!plain.is_empty()).then(|| pair(read[..2].to_vec()));
        let Some((_, relative)) = &self.posed else {
            return Ok(Encoded {
                features: pair(features),
                posed: None,
                plain: of_plain,
            });
        };
        let posed = features.split_off(plain.len());
        let features = match features.is_empty() {
            true => posed,
            false => {
                let both = features.iter().zip(&posed);
                let join = both.map(|(plain, posed)| Tensor::cat(&[plain, posed], 0));
                join.collect::<candle_core::Result<_>>()?
            }
        };
        Ok(Encoded {
            features: pair(features),
            posed: Some(Posed {
                maps: pair(maps[0].split_off(plain.len())),
                relative: relative.clone(),
                posing: self.posing,
            }),
            plain: of_plain,
        })
    }
}

/// The two tensors of a list of two.
fn pair(list: Vec<Tensor>) -> [Tensor; 2] {
    list.try_into().expect("one tensor for each of two views")
}
