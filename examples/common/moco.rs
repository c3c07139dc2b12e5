//! MoCo-v3 (arXiv 2104.02057): projector, predictor and contrastive loss, scaled down.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::nn::{BatchNorm, Linear, normalize};

const HIDDEN: usize = 512;
const OUT: usize = 64;

/// Linear maps with batch normalisation after each, and ReLU between them.
pub struct Head {
    layers: Vec<(Linear, BatchNorm)>,
}

impl Head {
    /// Encoder output to embedding, three layers.
    pub fn projector(dim: usize, vb: VarBuilder) -> Result<Self> {
        Self::new(&[dim, HIDDEN, HIDDEN, OUT], vb)
    }

    /// Embedding to a guess of the other view's embedding, two layers.
    pub fn predictor(vb: VarBuilder) -> Result<Self> {
        Self::new(&[OUT, HIDDEN, OUT], vb)
    }

    fn new(widths: &[usize], vb: VarBuilder) -> Result<Self> {
        let count = widths.len() - 1;
        let mut layers = Vec::with_capacity(count);
        for (i, pair) in widths.windows(2).enumerate() {
            let vb = vb.pp(format!("layer{}", i + 1));
            let linear = Linear::without_bias(pair[0], pair[1], vb.clone())?;
            // The last normalisation has no scale to learn: the loss looks at directions only.
            let norm = match i + 1 == count {
                true => BatchNorm::without_affine(),
                false => BatchNorm::new(pair[1], vb.pp("norm"))?,
            };
            layers.push((linear, norm));
        }
        Ok(Self { layers })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, (linear, norm)) in self.layers.iter().enumerate() {
            x = norm.forward(&linear.forward(&x)?)?;
            if i + 1 < self.layers.len() {
                x = x.relu()?;
            }
        }
        Ok(x)
    }
}

/// `2τ · CE(q̂·k̂ᵀ/τ, own)`: each query must pick out its own key among all of them. Query `i` belongs to key `first + i`;
/// `first` is 0 unless keys were gathered from several processes.
pub fn contrast(queries: &Tensor, keys: &Tensor, first: usize, temperature: f64) -> Result<Tensor> {
    let logits = (normalize(queries)?.matmul(&normalize(keys)?.t()?)? / temperature)?;
    let own = Tensor::arange(
        first as u32,
        (first + queries.dim(0)?) as u32,
        queries.device(),
    )?;
    candle_nn::loss::cross_entropy(&logits, &own)? * (2.0 * temperature)
}
