//! Blocks of anchors, and the value of a pass over them.

use crate::loss::contrastive::Contrastive;

/// What a pass over the anchors finds.
#[derive(Default)]
pub(super) struct Value {
    pub loss: f64,
    pub accuracy: f64,
}

/// Anchors to a block that may see `width` tokens.
pub(super) fn block_rows<T>(config: &Contrastive, width: usize, anchors: usize) -> usize {
    (config.block_bytes / (width * size_of::<T>())).clamp(1, anchors)
}
