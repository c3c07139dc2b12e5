//! What an encoder computes for one image.

use super::at_least_one;
use ser_reg::{Error, Result};

/// A vision transformer (arXiv 2010.11929), by what decides its multiply–adds. Nets of another kind are counted by other
/// means and go into [`Training::encoder_macs`](super::Training::encoder_macs) as a number.
///
/// With `n` tokens in a block, width `d` and `h` hidden channels a block takes
///
/// ```text
/// n·(4d² + 2dh) + 2n²d   multiply–adds:  queries, keys, values, output; two linear maps;  scores, mixing
/// ```
///
/// and the patch embedding `N·(channels·patch²)·d`. Norms, activations, softmax and biases are left out, as is usual.
///
/// ```
/// use ser_reg_trainers::cost::Vit;
/// let giga = Vit::s16().macs()? / 1e9;
/// assert!((giga - 4.6).abs() < 0.01, "{giga}"); // "4.6 GFLOPs" in papers, which count a multiply–add as one
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vit {
    /// Pixels along a side of the square image; a multiple of `patch`.
    pub side: usize,
    /// Pixels along a side of a patch.
    pub patch: usize,
    /// Channels of the image.
    pub channels: usize,
    /// Channels of a token.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Hidden channels of a block's MLP.
    pub mlp: usize,
    /// Prefix tokens: CLS and registers.
    pub prefix: usize,
    /// Blocks that run before the prefix tokens join: 0 in the usual model; in SER's, the tapped one is the last of them.
    pub joins_after: usize,
    /// Whether the last block computes its first token only, which may be all that the output needs.
    pub first_token_last: bool,
}

impl Vit {
    /// ViT-S/16 at 224 pixels, as in the paper; CLS token from the start.
    pub fn s16() -> Self {
        Self {
            side: 224,
            patch: 16,
            channels: 3,
            dim: 384,
            depth: 12,
            mlp: 1536,
            prefix: 1,
            joins_after: 0,
            first_token_last: false,
        }
    }

    /// Tokens of the grid, `N`.
    ///
    /// # Errors
    /// If a size is 0, or the side is no multiple of the patch.
    pub fn tokens(&self) -> Result<usize> {
        for (field, size) in [
            ("Vit::side", self.side),
            ("Vit::patch", self.patch),
            ("Vit::channels", self.channels),
            ("Vit::dim", self.dim),
            ("Vit::depth", self.depth),
            ("Vit::mlp", self.mlp),
        ] {
            at_least_one(field, size)?;
        }
        if !self.side.is_multiple_of(self.patch) {
            return Err(Error::config(
                "Vit::side",
                format!("a multiple of the patch size {}", self.patch),
                self.side,
            ));
        }
        if self.joins_after > self.depth {
            return Err(Error::config(
                "Vit::joins_after",
                format!("at most the depth, {}", self.depth),
                self.joins_after,
            ));
        }
        Ok((self.side / self.patch).saturating_pow(2))
    }

    /// Multiply–adds of one forward pass of one image.
    ///
    /// # Errors
    /// As [`Vit::tokens`].
    pub fn macs(&self) -> Result<f64> {
        let grid = self.tokens()? as f64;
        let (dim, mlp) = (self.dim as f64, self.mlp as f64);
        let patch = self.channels as f64 * (self.patch as f64).powi(2);
        let linear = 4.0 * dim * dim + 2.0 * dim * mlp;
        let block = |i: usize| {
            let prefix = if self.joins_after <= i {
                self.prefix
            } else {
                0
            };
            let tokens = grid + prefix as f64;
            match self.first_token_last && i + 1 == self.depth {
                // All tokens give keys and values, one asks.
                true => linear + (tokens - 1.0) * 2.0 * dim * dim + 2.0 * tokens * dim,
                false => tokens * linear + 2.0 * tokens * tokens * dim,
            }
        };
        Ok(grid * patch * dim + (0..self.depth).map(block).sum::<f64>())
    }
}
