//! MoCo-v3 (arXiv 2104.02057): projector, predictor and contrastive loss.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::{Head, HeadConfig};
use crate::nn::normalize;

/// Widths of hidden layers and of embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Widths {
    pub hidden: usize,
    pub out: usize,
}

impl Widths {
    pub const SMALL: Self = Self { hidden: 512, out: 64 };
    pub const PAPER: Self = Self { hidden: 4096, out: 256 };
}

/// Encoder output to embedding, three layers. The output is normalized without a scale: the loss looks at directions only.
pub fn projector(dim: usize, widths: Widths, vb: VarBuilder) -> Result<Head> {
    let Widths { hidden, out } = widths;
    Head::new(&HeadConfig::batch_norm(&[dim, hidden, hidden, out]).with_last_norm(), vb)
}

/// Embedding to a guess of the other view's embedding, two layers.
pub fn predictor(widths: Widths, vb: VarBuilder) -> Result<Head> {
    let Widths { hidden, out } = widths;
    Head::new(&HeadConfig::batch_norm(&[out, hidden, out]).with_last_norm(), vb)
}

/// `2τ · CE(q̂·k̂ᵀ/τ, own)`: each query must pick out its own key among all of them. Query `i` belongs to key `first + i`;
/// `first` is 0 unless keys were gathered from several processes.
pub fn contrast(queries: &Tensor, keys: &Tensor, first: usize, temperature: f64) -> Result<Tensor> {
    let logits = (normalize(queries)?.matmul(&normalize(keys)?.t()?)? / temperature)?;
    let own = Tensor::arange(first as u32, (first + queries.dim(0)?) as u32, queries.device())?;
    candle_nn::loss::cross_entropy(&logits, &own)? * (2.0 * temperature)
}
