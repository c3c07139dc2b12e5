//! The frame of one view: its anchors, and how keys of the other view come into it.

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;

use super::weights::Anchors;
use super::{MapPair, SerConfig};
use crate::fibre::FibreOperator;
use crate::group::{Affine, FieldType};
use crate::{GridOperator, GroupAction, Result};

pub(super) struct Frame {
    operator: GridOperator,
    /// `None`: channels stay as they are.
    fibre: Option<FibreOperator>,
    pub anchors: Anchors,
}

impl Frame {
    /// Whether keys come into this frame with their channels unchanged.
    pub fn keeps_channels(&self) -> bool {
        self.fibre.is_none()
    }

    /// The frame of `view`, 0 or 1; tokens that are compared transform as `field`.
    pub fn new<G: GroupAction>(
        pair: &MapPair<G>,
        view: usize,
        field: &FieldType,
        images: usize,
        config: &SerConfig,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let relative = pair.relative;
        let operator = match view {
            0 => relative.to_first(&config.resample)?,
            _ => relative.to_second(&config.resample)?,
        };
        let fibre = match field.is_trivial() {
            true => None,
            false => {
                let forward = FibreOperator::new(field, relative.elements())?;
                Some(if view == 0 { forward.inverse() } else { forward })
            }
        };
        let weights = pair.weights.of_view(view, images, operator.out_grid().len());
        let anchors = Anchors::choose(&operator, images, weights, config.max_tokens, rng);
        Ok(Self { operator, fibre, anchors })
    }

    /// The anchors of this view and their aligned keys, row by row (M, D) each; `keys` are tokens of the other view.
    pub fn rows(&self, anchors: &Tensor, keys: &Tensor) -> Result<[Tensor; 2]> {
        let mut keys = self.operator.apply(keys)?;
        if let Some(fibre) = &self.fibre {
            keys = fibre.apply(&keys)?;
        }
        let (images, n, _) = anchors.dims3()?;
        let both = [anchors.flatten(0, 1)?, keys.flatten(0, 1)?];
        if self.anchors.len() == images * n {
            return Ok(both);
        }
        let rows = self.anchors.rows(n);
        let rows = Tensor::new(rows, anchors.device())?;
        let [anchors, keys] = both;
        let select = |x: Tensor| x.contiguous()?.index_select(&rows, 0);
        Ok([select(anchors)?, select(keys)?])
    }
}

/// Whether every relative element is a turn or flip of the whole grid.
///
/// Then the pairs of one frame are the pairs of the other frame, with the rows of each image permuted.
pub(super) fn is_permutation<G: GroupAction>(pair: &MapPair<G>) -> bool {
    let (from, to) = (pair.relative.from_grid(), pair.relative.to_grid());
    pair.relative.elements().iter().all(|g| {
        let d4 = g.affine().as_ref().and_then(Affine::as_d4);
        d4.is_some_and(|g| g.out_grid(from).is_ok_and(|grid| grid == to))
    })
}

/// `tokens` (B, N, C) with zeros where a token does not count.
///
/// A token counts if it is an anchor in the frame `own` of its view, or if an anchor's key in the frame `reader` reads it.
pub(super) fn blank(tokens: Tensor, own: Option<&Frame>, reader: Option<&Frame>) -> Result<Tensor> {
    let (images, n, channels) = tokens.dims3()?;
    if own.is_some_and(|frame| frame.anchors.len() == images * n) {
        return Ok(tokens);
    }
    let mut used = vec![0u8; images * n];
    if let Some(frame) = own {
        for row in frame.anchors.rows(n) {
            used[row as usize] = 1;
        }
    }
    if let Some(frame) = reader {
        for (image, cells) in frame.anchors.cells.iter().enumerate() {
            let reads = frame.operator.reads(image, cells);
            let used = &mut used[image * n..(image + 1) * n];
            used.iter_mut().zip(reads).for_each(|(used, read)| *used |= u8::from(read));
        }
    }
    if used.iter().all(|&used| used == 1) {
        return Ok(tokens);
    }
    let used = Tensor::from_vec(used, (images, n, 1), &Device::Cpu)?.to_device(tokens.device())?;
    let used = used.broadcast_as((images, n, channels))?;
    Ok(used.where_cond(&tokens, &tokens.zeros_like()?)?)
}
