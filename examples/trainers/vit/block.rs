//! A block of the transformer.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use rand::{Rng, rngs::StdRng};

use super::VitConfig;
use crate::nn::{self, LayerNorm, Linear};

/// Attention and MLP, each on a normalized copy and added back.
#[derive(Clone, Debug)]
pub(super) struct Block {
    heads: usize,
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    pub(super) fn new(config: &VitConfig, vb: VarBuilder) -> Result<Self> {
        let (dim, hidden) = (config.dim, config.dim * config.mlp_ratio);
        Ok(Self {
            heads: config.heads,
            norm1: LayerNorm::new(dim, vb.pp("norm1"))?,
            // Queries, keys and values are three matrices, each with the variance of its own.
            qkv: Linear::with_init(dim, 3 * dim, nn::xavier(dim, dim), vb.pp("qkv"))?,
            out: Linear::new(dim, dim, vb.pp("out"))?,
            norm2: LayerNorm::new(dim, vb.pp("norm2"))?,
            up: Linear::new(dim, hidden, vb.pp("up"))?,
            down: Linear::new(hidden, dim, vb.pp("down"))?,
        })
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        branch: &mut dyn FnMut(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let mixed = self.out.forward(&nn::attention(&qkv, self.heads)?)?;
        self.mlp(&(x + branch(mixed)?)?, branch)
    }

    /// [`Self::forward`] for the first token alone, `(B, 1, D)`: all tokens give keys and values, one gives a query.
    pub(super) fn forward_cls(
        &self,
        x: &Tensor,
        branch: &mut dyn FnMut(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, tokens, dim) = x.dims3()?;
        let (heads, head) = (self.heads, dim / self.heads);
        let normed = self.norm1.forward(x)?;
        let query = normed.narrow(1, 0, 1)?.contiguous()?;
        let query = self.qkv.narrow(0..dim)?.forward(&query)?;
        let query = query.reshape((batch, heads, 1, head))?;
        let pairs = self.qkv.narrow(dim..3 * dim)?.forward(&normed)?;
        let pairs = pairs.reshape((batch, tokens, 2, heads, head))?;
        let pairs = pairs.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let (keys, values) = (pairs.get(0)?, pairs.get(1)?);
        let scores = (query.matmul(&keys.t()?)? / (head as f64).sqrt())?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&values)?;
        let mixed = self.out.forward(&mixed.reshape((batch, 1, dim))?)?;
        self.mlp(&(x.narrow(1, 0, 1)? + branch(mixed)?)?, branch)
    }

    fn mlp(&self, x: &Tensor, branch: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let hidden = nn::gelu(&self.up.forward(&self.norm2.forward(x)?)?)?;
        x + branch(self.down.forward(&hidden)?)?
    }
}

/// Maps the output of a half of a block before it is added, given the number of the block.
pub(super) type Branch<'a> = dyn FnMut(usize, Tensor) -> Result<Tensor> + 'a;

/// Stochastic depth (arXiv 1603.09382): each sample loses the branch with probability `p`, and otherwise has it over `1 − p`.
pub(super) fn drop_path(branch: Tensor, p: f64, rng: &mut StdRng) -> Result<Tensor> {
    if p == 0.0 {
        return Ok(branch);
    }
    let kept = (1.0 / (1.0 - p)) as f32;
    let factors: Vec<f32> =
        (0..branch.dim(0)?).map(|_| if rng.random_bool(p) { 0.0 } else { kept }).collect();
    let shape = (factors.len(), 1, 1);
    branch.broadcast_mul(&Tensor::from_vec(factors, shape, branch.device())?)
}
