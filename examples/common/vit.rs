//! A small vision transformer (pre-norm, GELU) whose CLS token joins after a block of choice.

use candle_core::{D, Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use ser_reg::tap;

use super::{
    data::Images,
    nn::{self, LayerNorm, Linear},
};

/// What stands for the position of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Fixed two-dimensional sines and cosines.
    SinCos,
    /// Nothing: patches are a set.
    None,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VitConfig {
    pub channels: usize,
    pub side: usize,
    pub patch: usize,
    pub dim: usize,
    pub depth: usize,
    pub heads: usize,
    /// Hidden width of an MLP over `dim`.
    pub mlp_ratio: usize,
    /// The CLS token joins after this many blocks; 0 is the usual place, before the first one.
    pub cls_after: usize,
    pub positions: Positions,
    /// Whether the tokens of the last block are wanted; if not, it computes its CLS token only, which is all that the
    /// output needs.
    pub last_map: bool,
    /// Averages the patch kernel over the eight poses of a square: turning a patch then changes nothing.
    pub symmetric_patches: bool,
}

impl VitConfig {
    /// The preset for such pictures, with a tap on block `layer`, counted from 1.
    ///
    /// The CLS token joins after that block, so that the tapped map has patches only, or before the first one if
    /// `early_cls`. After the last block it would see no patches, so it then joins before it.
    pub fn small(images: &Images, layer: usize, early_cls: bool) -> Result<Self> {
        let depth = 4;
        if !(1..=depth).contains(&layer) {
            bail!("expected one of the {depth} blocks, got block {layer}");
        }
        Ok(Self {
            channels: images.channels,
            side: images.side,
            patch: 4,
            dim: 64,
            depth,
            heads: 2,
            mlp_ratio: 2,
            cls_after: if early_cls { 0 } else { layer.min(depth - 1) },
            positions: Positions::SinCos,
            last_map: layer == depth,
            symmetric_patches: false,
        })
    }

    /// Tokens that lead the output of block `layer` before those of the grid: the CLS token, once it has joined.
    pub fn prefix(&self, layer: usize) -> usize {
        usize::from(self.cls_after < layer)
    }

    /// Rows, and columns, of the token grid.
    pub fn grid(&self) -> usize {
        self.side / self.patch
    }
}

pub struct Vit {
    config: VitConfig,
    patch: Linear,
    positions: Option<Tensor>,
    cls: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Vit {
    pub fn new(config: &VitConfig, vb: VarBuilder) -> Result<Self> {
        let VitConfig {
            side, patch, dim, ..
        } = *config;
        if patch == 0 || !side.is_multiple_of(patch) {
            bail!(
                "expected pictures whose side is a multiple of the patch size {patch}, got {side}"
            );
        }
        if config.heads == 0 || dim % config.heads != 0 || dim % 4 != 0 {
            bail!(
                "expected a width that 4 and the {} heads divide, got {dim}",
                config.heads
            );
        }
        if config.cls_after > config.depth {
            bail!(
                "expected the CLS token to join after one of the {} blocks, got {}",
                config.depth,
                config.cls_after
            );
        }
        let block = |i: usize| Block::new(config, vb.pp(format!("block{}", i + 1)));
        Ok(Self {
            config: config.clone(),
            patch: Linear::new(config.channels * patch * patch, dim, vb.pp("patch"))?,
            positions: match config.positions {
                Positions::SinCos => Some(sin_cos(config.grid(), dim, vb.device())?),
                Positions::None => None,
            },
            cls: vb.get_with_hints(
                (1, 1, dim),
                "cls",
                Init::Randn {
                    mean: 0.0,
                    stdev: 0.02,
                },
            )?,
            blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(dim, vb.pp("norm"))?,
        })
    }

    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Pictures `(B, C, S, S)` to the normalised CLS token `(B, D)`.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(images)?;
        if self.config.cls_after == 0 {
            x = self.join_cls(&x)?;
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let (last, joins) = (i + 1 == self.blocks.len(), self.config.cls_after == i + 1);
            x = match last && !joins && !self.config.last_map {
                true => block.forward_cls(&x)?,
                false => block.forward(&x)?,
            };
            tap::record(&format!("block{}", i + 1), &x); // SER: the one line in the model
            if joins {
                x = self.join_cls(&x)?;
            }
        }
        self.norm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)
    }

    /// One token for each patch, with its position.
    fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let VitConfig {
            channels, patch, ..
        } = self.config;
        let (batch, grid) = (images.dim(0)?, self.config.grid());
        let patches = images
            .reshape(&[batch, channels, grid, patch, grid, patch])?
            .permute(vec![0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((batch, grid * grid, channels * patch * patch))?;
        let patches = match self.config.symmetric_patches {
            true => symmetrize(&patches, channels, patch)?,
            false => patches,
        };
        let tokens = self.patch.forward(&patches)?;
        match &self.positions {
            Some(positions) => tokens.broadcast_add(positions),
            None => Ok(tokens),
        }
    }

    fn join_cls(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, dim) = x.dims3()?;
        Tensor::cat(&[&self.cls.expand((batch, 1, dim))?, x], 1)
    }
}

/// Attention and MLP, each on a normalised copy and added back.
struct Block {
    heads: usize,
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(config: &VitConfig, vb: VarBuilder) -> Result<Self> {
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

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let x = (x + self.out.forward(&nn::attention(&qkv, self.heads)?)?)?;
        let hidden = nn::gelu(&self.up.forward(&self.norm2.forward(&x)?)?)?;
        x + self.down.forward(&hidden)?
    }

    /// What [`Self::forward`] makes of the first token, as `(B, 1, D)`: all tokens give keys and values, one asks.
    fn forward_cls(&self, x: &Tensor) -> Result<Tensor> {
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
        let x = (x.narrow(1, 0, 1)? + self.out.forward(&mixed.reshape((batch, 1, dim))?)?)?;
        let hidden = nn::gelu(&self.up.forward(&self.norm2.forward(&x)?)?)?;
        x + self.down.forward(&hidden)?
    }
}

/// Fixed positions `(1, grid², dim)`: a quarter of the channels each for sine and cosine along columns and rows.
fn sin_cos(grid: usize, dim: usize, device: &Device) -> Result<Tensor> {
    let quarter = dim / 4;
    let mut values = Vec::with_capacity(grid * grid * dim);
    for row in 0..grid {
        for col in 0..grid {
            for (place, wave) in [
                (col, f64::sin as fn(f64) -> f64),
                (col, f64::cos),
                (row, f64::sin),
                (row, f64::cos),
            ] {
                for i in 0..quarter {
                    let omega = 10_000f64.powf(-(i as f64) / quarter as f64);
                    values.push(wave(place as f64 * omega) as f32);
                }
            }
        }
    }
    Tensor::from_vec(values, (1, grid * grid, dim), device)
}

/// The mean of each patch `(.., C·P·P)` over its eight poses; the same as a symmetric kernel.
fn symmetrize(patches: &Tensor, channels: usize, side: usize) -> Result<Tensor> {
    let shape = patches.dims().to_vec();
    let square = patches.reshape(((), channels, side, side))?;
    let transposed = square.transpose(2, 3)?.contiguous()?;
    let mut total = square.zeros_like()?;
    for pose in [square, transposed] {
        let mirrored = pose.flip(&[3])?;
        for half in [&pose, &mirrored] {
            total = ((total + half)? + half.flip(&[2])?)?;
        }
    }
    (total / 8.0)?.reshape(shape)
}
