//! A small vision transformer (pre-norm, GELU) whose CLS token joins after a block of choice.

mod block;

use std::cell::Cell;

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{GridOperator, Resample, TokenGrid, contrib::ReynoldsPenalty, group::Scale, tap};
use serde::{Deserialize, Serialize};

use self::block::{Block, Branch, drop_path};
use super::{
    data::Images,
    nn::{LayerNorm, Linear},
};

/// The encoding of the position of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Fixed two-dimensional sines and cosines.
    SinCos,
    /// A trained table, resampled by a bicubic filter for other grids.
    Learned,
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
    /// Whether the patch embedding keeps its initial values, as in MoCo-v3.
    pub frozen_patches: bool,
    /// Probability that the last block is skipped in training, for each image; it rises linearly from 0 at the first one.
    pub drop_path: f64,
    /// Averages the patch kernel over D4: a rotation of a patch then changes nothing.
    pub symmetric_patches: bool,
}

impl VitConfig {
    /// Blocks of [`Self::small`] and of [`Self::s16`].
    pub const SMALL_DEPTH: usize = 4;
    pub const S16_DEPTH: usize = 12;

    /// The preset for such images, with a tap on block `layer`, counted from 1.
    ///
    /// The CLS token joins after that block, so that the tapped map has patches only, or before the first one if
    /// `early_cls`. After the last block it would see no patches, so it then joins before it.
    pub fn small(images: &Images, layer: usize, early_cls: bool) -> Result<Self> {
        Self {
            channels: images.channels,
            side: images.side,
            patch: 4,
            dim: 64,
            depth: Self::SMALL_DEPTH,
            heads: 2,
            mlp_ratio: 2,
            cls_after: 0,
            positions: Positions::SinCos,
            last_map: true,
            frozen_patches: false,
            drop_path: 0.0,
            symmetric_patches: false,
        }
        .tapped(layer, early_cls)
    }

    /// ViT-S/16 at 224 pixels, tapped like [`Self::small`].
    pub fn s16(layer: usize, early_cls: bool) -> Result<Self> {
        Self {
            channels: 3,
            side: 224,
            patch: 16,
            dim: 384,
            depth: Self::S16_DEPTH,
            heads: 6,
            mlp_ratio: 4,
            cls_after: 0,
            positions: Positions::Learned,
            last_map: true,
            frozen_patches: false,
            drop_path: 0.0,
            symmetric_patches: false,
        }
        .tapped(layer, early_cls)
    }

    fn tapped(self, layer: usize, early_cls: bool) -> Result<Self> {
        let depth = self.depth;
        if !(1..=depth).contains(&layer) {
            bail!("--layer: expected one of the {depth} blocks, got block {layer}");
        }
        Ok(Self {
            cls_after: if early_cls { 0 } else { layer.min(depth - 1) },
            last_map: layer == depth,
            ..self
        })
    }

    /// Prefix tokens in the output of block `layer`: the CLS token, once it has joined.
    pub fn prefix(&self, layer: usize) -> usize {
        usize::from(self.cls_after < layer)
    }

    /// Rows, and columns, of the token grid.
    pub fn grid(&self) -> usize {
        self.side / self.patch
    }
}

#[derive(Clone, Debug)]
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
        let VitConfig { side, patch, dim, .. } = *config;
        if patch == 0 || !side.is_multiple_of(patch) {
            bail!("expected images whose side is a multiple of the patch size {patch}, got {side}");
        }
        if config.heads == 0 || dim % config.heads != 0 || dim % 4 != 0 {
            bail!("expected a width that 4 and the {} heads divide, got {dim}", config.heads);
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
                Positions::SinCos => Some(sin_cos(
                    TokenGrid::square(config.grid())?,
                    config.grid(),
                    dim,
                    vb.device(),
                )?),
                Positions::Learned => Some(vb.get_with_hints(
                    (1, config.grid() * config.grid(), dim),
                    "positions",
                    normal(0.02),
                )?),
                Positions::None => None,
            },
            cls: vb.get_with_hints((1, 1, dim), "cls", normal(0.02))?,
            blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(dim, vb.pp("norm"))?,
        })
    }

    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// The same encoder, which computes all tokens of its last block.
    pub fn with_last_map(&self) -> Self {
        let mut vit = self.clone();
        vit.config.last_map = true;
        vit
    }

    /// Images `(B, C, H, W)` to the normalized CLS token `(B, D)`; `H` and `W` are multiples of the patch size, by default
    /// the side of the configuration.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.run(images, &mut |_, branch| Ok(branch))
    }

    /// The same in training: branches of blocks are dropped at random, with a generator seeded by `seed`.
    pub fn forward_training(&self, images: &Tensor, seed: u64) -> Result<Tensor> {
        if self.config.drop_path == 0.0 {
            return self.forward(images);
        }
        let mut rng = StdRng::seed_from_u64(seed);
        let last = (self.blocks.len() - 1).max(1) as f64;
        self.run(images, &mut |block, branch| {
            drop_path(branch, self.config.drop_path * block as f64 / last, &mut rng)
        })
    }

    /// The encoder in training. Each of its forward passes drops other branches.
    pub fn training(&self, seed: u64) -> Training<'_> {
        Training { vit: self, seed: Cell::new(seed) }
    }

    /// `branch` is applied to the output of each half of each block, before it is added.
    fn run(&self, images: &Tensor, branch: &mut Branch) -> Result<Tensor> {
        let mut x = self.embed(images)?;
        if self.config.cls_after == 0 {
            x = self.join_cls(&x)?;
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let (last, joins) = (i + 1 == self.blocks.len(), self.config.cls_after == i + 1);
            let mut branch = |x| branch(i, x);
            x = match last && !joins && !self.config.last_map {
                true => block.forward_cls(&x, &mut branch)?,
                false => block.forward(&x, &mut branch)?,
            };
            tap::record(format_args!("block{}", i + 1), &x)?; // SER: the one line in the model
            if joins {
                x = self.join_cls(&x)?;
            }
        }
        self.norm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)
    }

    /// One token for each patch, with its position.
    fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let VitConfig { channels, patch, .. } = self.config;
        let (batch, _, height, width) = images.dims4()?;
        if height % patch != 0 || width % patch != 0 {
            bail!(
                "expected sides that are multiples of the patch size {patch}, got {height}x{width}"
            );
        }
        let grid = TokenGrid::new(height / patch, width / patch)?;
        let patches = images
            .reshape(&[batch, channels, grid.rows(), patch, grid.cols(), patch])?
            .permute(vec![0, 2, 4, 1, 3, 5])?
            .contiguous()?
            .reshape((batch, grid.len(), channels * patch * patch))?;
        let mut tokens = match self.config.symmetric_patches {
            true => self.symmetric_patch()?.forward(&patches)?,
            false => self.patch.forward(&patches)?,
        };
        if self.config.frozen_patches {
            tokens = tokens.detach();
        }
        match self.positions_on(grid)? {
            Some(positions) => tokens.broadcast_add(&positions),
            None => Ok(tokens),
        }
    }

    /// The positions of a grid over the same image: coarser or finer than that of the configuration, or the same.
    fn positions_on(&self, grid: TokenGrid) -> Result<Option<Tensor>> {
        let side = self.config.grid();
        let own = TokenGrid::square(side)?;
        Ok(match (self.config.positions, &self.positions) {
            (_, Some(table)) if grid == own => Some(table.clone()),
            (Positions::SinCos, Some(table)) => {
                Some(sin_cos(grid, side, self.config.dim, table.device())?)
            }
            (Positions::Learned, Some(table)) => {
                let scale = |n: usize| n as f64 / side as f64;
                let stretch = Scale::new(scale(grid.rows()), scale(grid.cols()))?;
                let operator = GridOperator::between(&[stretch], own, grid, &Resample::default())?;
                Some(operator.apply(table)?)
            }
            _ => None,
        })
    }

    /// The patch embedding with its kernel averaged over D4.
    fn symmetric_patch(&self) -> Result<Linear> {
        let VitConfig { channels, patch, dim, .. } = self.config;
        self.patch.map_weight(|weight| {
            let kernel = weight.t()?.reshape((dim, channels, patch, patch))?;
            let kernel = ReynoldsPenalty::default().project(&kernel)?;
            kernel.reshape((dim, channels * patch * patch))?.t()?.contiguous()
        })
    }

    fn join_cls(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, dim) = x.dims3()?;
        Tensor::cat(&[&self.cls.expand((batch, 1, dim))?, x], 1)
    }
}

/// An encoder in training: see [`Vit::training`].
pub struct Training<'a> {
    vit: &'a Vit,
    seed: Cell<u64>,
}

impl Training<'_> {
    /// As [`Vit::forward_training`], with another seed for each call.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let seed = self.seed.get();
        self.seed.set(seed.wrapping_add(1));
        self.vit.forward_training(images, seed)
    }
}

fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0.0, stdev }
}

/// Fixed positions `(1, rows·cols, dim)`: a quarter of the channels each for sine and cosine along columns and rows. Another
/// grid than the own one, of `side × side`, spreads over the same coordinates.
fn sin_cos(grid: TokenGrid, side: usize, dim: usize, device: &Device) -> Result<Tensor> {
    let quarter = dim / 4;
    let place = |i: usize, n: usize| match n == side {
        true => i as f64,
        false => (i as f64 + 0.5) * side as f64 / n as f64 - 0.5,
    };
    let mut values = Vec::with_capacity(grid.len() * dim);
    for row in 0..grid.rows() {
        for col in 0..grid.cols() {
            let (row, col) = (place(row, grid.rows()), place(col, grid.cols()));
            for (place, wave) in [
                (col, f64::sin as fn(f64) -> f64),
                (col, f64::cos),
                (row, f64::sin),
                (row, f64::cos),
            ] {
                for i in 0..quarter {
                    let omega = 10_000f64.powf(-(i as f64) / quarter as f64);
                    values.push(wave(place * omega) as f32);
                }
            }
        }
    }
    Tensor::from_vec(values, (1, grid.len(), dim), device)
}
