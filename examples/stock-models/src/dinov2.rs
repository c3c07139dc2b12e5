//! DINOv2 as in candle-transformers, parameter names and all, with the three changes that SER needs.
//!
//! 1. A layer norm that has a backward pass.
//! 2. Positions resized by an operator that has one too, so that any image size can be trained.
//! 3. Batches of more than one image (the CLS token is broadcast), and a tap after each block.

use candle_core::{D, IndexOp, Result, Tensor};
use candle_nn::{
    Conv2d, Conv2dConfig, Init, Linear, Module, VarBuilder, conv2d, linear,
    ops::{layer_norm_slow, softmax},
};
use ser_reg::{Filter, GridOperator, TokenGrid, group::Scale, tap};

/// The stock model's image and patch size.
pub const IMAGE: usize = 518;
pub const PATCH: usize = 14;

struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(dim, "weight", Init::Const(1.))?;
        let bias = vb.get(dim, "bias")?;
        Ok(Self { weight, bias })
    }
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: usize,
}

impl Attention {
    fn new(dim: usize, heads: usize, vb: VarBuilder) -> Result<Self> {
        let qkv = linear(dim, dim * 3, vb.pp("qkv"))?;
        let proj = linear(dim, dim, vb.pp("proj"))?;
        Ok(Self { qkv, proj, heads })
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let head = c / self.heads;
        let qkv = self.qkv.forward(x)?.reshape((b, n, 3, self.heads, head))?;
        let qkv = qkv.permute((2, 0, 3, 1, 4))?;
        let q = (qkv.i(0)? * (head as f64).powf(-0.5))?.contiguous()?;
        let (k, v) = (qkv.i(1)?.contiguous()?, qkv.i(2)?.contiguous()?);
        let attention = softmax(&q.matmul(&k.t()?)?, D::Minus1)?;
        let x = attention.matmul(&v)?.transpose(1, 2)?.reshape((b, n, c))?;
        self.proj.forward(&x)
    }
}

struct Block {
    norm1: Norm,
    attention: Attention,
    scale1: Tensor,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    scale2: Tensor,
}

impl Block {
    fn new(dim: usize, heads: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm1: Norm::new(dim, vb.pp("norm1"))?,
            attention: Attention::new(dim, heads, vb.pp("attn"))?,
            scale1: vb.pp("ls1").get(dim, "gamma")?,
            norm2: Norm::new(dim, vb.pp("norm2"))?,
            fc1: linear(dim, dim * 4, vb.pp("mlp.fc1"))?,
            fc2: linear(dim * 4, dim, vb.pp("mlp.fc2"))?,
            scale2: vb.pp("ls2").get(dim, "gamma")?,
        })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.attention.forward(&self.norm1.forward(x)?)?;
        let x = (x + y.broadcast_mul(&self.scale1)?)?;
        let y = self.fc1.forward(&self.norm2.forward(&x)?)?.gelu()?;
        let y = self.fc2.forward(&y)?;
        x + y.broadcast_mul(&self.scale2)?
    }
}

/// The trunk; call it for the normalized CLS token, and capture `"block{i}"` for a map with one prefix token.
pub struct DinoV2 {
    patches: Conv2d,
    cls: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
}

impl DinoV2 {
    pub fn new(vb: VarBuilder, depth: usize, dim: usize, heads: usize) -> Result<Self> {
        let stride = Conv2dConfig { stride: PATCH, ..Default::default() };
        let tokens = (IMAGE / PATCH).pow(2);
        let blocks = (0..depth).map(|i| Block::new(dim, heads, vb.pp("blocks").pp(i)));
        Ok(Self {
            patches: conv2d(3, dim, PATCH, stride, vb.pp("patch_embed.proj"))?,
            cls: vb.get((1, 1, dim), "cls_token")?,
            positions: vb.get((1, 1 + tokens, dim), "pos_embed")?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::new(dim, vb.pp("norm"))?,
        })
    }

    /// The positions on `grid`; nearest, as the stock model resizes them.
    fn positions_on(&self, grid: TokenGrid) -> Result<Tensor> {
        let own = TokenGrid::square(IMAGE / PATCH)?;
        let scale = Scale::to_grid(own, grid);
        let resize = GridOperator::between(&[scale], own, grid, &Filter::Nearest.into())?;
        let cells = resize.apply(&self.positions.i((.., 1..))?)?;
        Tensor::cat(&[&self.positions.i((.., ..1))?, &cells], 1)
    }
}

impl Module for DinoV2 {
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let map = self.patches.forward(images)?;
        let (b, c, rows, cols) = map.dims4()?;
        let cls = self.cls.broadcast_as((b, 1, c))?;
        let tokens = Tensor::cat(&[&cls, &map.flatten_from(2)?.transpose(1, 2)?], 1)?;
        let mut x = tokens.broadcast_add(&self.positions_on(TokenGrid::new(rows, cols)?)?)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x)?;
            tap::record(format_args!("block{i}"), &x)?;
        }
        self.norm.forward(&x)?.i((.., 0))
    }
}
