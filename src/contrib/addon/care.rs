//! CARE (arXiv 2306.13924): an augmentation shall act on embeddings as an orthogonal map.

use std::ops::Range;

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::{AddonOutput, Reads, nn, reads::Reader};
use crate::{Error, Result};

/// How [`Care`] counts the pairs of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GramMean {
    /// `2 · mean_i Σ_{j≠i}`: the authors' code, which their weight of 0.01 belongs to. It grows with the chunk.
    #[default]
    Code,
    /// The mean over all pairs `i ≠ j`: the formula of the paper.
    Paper,
}

/// The settings of [`Care`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CareConfig {
    /// Parts of a batch whose pictures share their augmentations.
    pub chunks: usize,
    /// How pairs are counted.
    pub mean: GramMean,
    /// Weight w; finite and at least 0.
    pub lambda: f64,
}

impl Default for CareConfig {
    /// The authors': 8 chunks, w = 0.01 on the sum that their code has.
    fn default() -> Self {
        Self {
            chunks: 8,
            mean: GramMean::Code,
            lambda: 0.01,
        }
    }
}

impl CareConfig {
    /// The chunks of a batch: rows that must have been augmented alike. Sizes differ by one at most.
    ///
    /// ```
    /// use ser_reg::contrib::addon::CareConfig;
    /// let config = CareConfig { chunks: 2, ..Default::default() };
    /// assert_eq!(config.ranges(5)?, [0..2, 2..5]);
    /// assert!(config.ranges(3).is_err(), "a picture alone has no inner product to keep");
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// If a chunk would have fewer than two pictures.
    pub fn ranges(&self, batch: usize) -> Result<Vec<Range<usize>>> {
        if self.chunks == 0 || batch / self.chunks < 2 {
            return Err(Error::input(
                "Care",
                format!(
                    "at least 2 samples in each of {} chunks (CareConfig::chunks)",
                    self.chunks
                ),
                format!("a batch of {batch}"),
            ));
        }
        // In u128: no batch is too large for the product.
        let start = |k: usize| (batch as u128 * k as u128 / self.chunks as u128) as usize;
        Ok((0..self.chunks).map(|k| start(k)..start(k + 1)).collect())
    }
}

/// CARE's consistency of Gram matrices.
///
/// ```text
/// L = w · 2/B Σ_i Σ_{j≠i, same chunk} ( ⟨z(a₁x_i), z(a₁x_j)⟩ − ⟨z(a₂x_i), z(a₂x_j)⟩ )²,   z of unit length
/// ```
///
/// or the mean over these pairs with [`GramMean::Paper`]. All pictures of a chunk had the same augmentation `a₁` in view 1 and the
/// same `a₂` in view 2; [`CareConfig::ranges`] says which they are. There is no head, and nothing but the LayerNorm of
/// [`Reads::Tokens`] to train: the loss is a demand on the features. It vanishes for every orthogonal action, the trivial one
/// included: invariant features satisfy it. The authors hand in the projector's output, which is [`Reads::Final`] of it. The
/// figure `gram` is the root of the mean squared difference of inner products.
///
/// An example is at [`Reads`].
#[derive(Clone, Debug)]
pub struct Care {
    config: CareConfig,
    reader: Reader,
}

impl Care {
    const OP: &'static str = "Care";

    /// The add-on for features of `channels` channels at the layer that `reads` names. Variables: `norm.*` (tokens only).
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` cannot hand out the variables.
    pub fn new(config: CareConfig, reads: Reads, channels: usize, vb: VarBuilder) -> Result<Self> {
        if config.chunks == 0 {
            return Err(Error::config("CareConfig::chunks", "at least 1 chunk", 0));
        }
        nn::check_weight("CareConfig::lambda", config.lambda)?;
        Ok(Self {
            config,
            reader: Reader::new(reads, channels, vb)?,
        })
    }

    /// The loss of two views' features, (B, D) or token maps as [`Reads`] says.
    ///
    /// # Errors
    /// If a chunk would have fewer than two samples, batches differ, or shapes or types do not fit the layer that is read.
    pub fn forward(&self, views: [&Tensor; 2]) -> Result<AddonOutput> {
        let features = self.reader.all(Self::OP, views)?;
        let [h1, h2] = &features[..] else {
            return Err(Error::input(Self::OP, "two views", features.len()));
        };
        let batch = h1.dim(0)?;
        let chunks = self.config.ranges(batch)?;
        let (z1, z2) = (nn::unit(h1)?, nn::unit(h2)?);
        let (mut sums, mut pairs) = (Vec::with_capacity(chunks.len()), 0);
        // Neighbors of one size, all of them as a rule, are one product.
        for equal in chunks.chunk_by(|a, b| a.len() == b.len()) {
            let Some(first) = equal.first() else { continue };
            let (count, n) = (equal.len(), first.len());
            let gram = |z: &Tensor| -> candle_core::Result<Tensor> {
                let z = z
                    .narrow(0, first.start, count * n)?
                    .reshape((count, n, ()))?;
                z.matmul(&z.t()?)
            };
            let off_diagonal = nn::off_diagonal(n, z1.dtype(), z1.device())?;
            let difference = (gram(&z1)? - gram(&z2)?)?.broadcast_mul(&off_diagonal)?;
            sums.push(difference.sqr()?.sum_all()?);
            pairs += count * n * (n - 1);
        }
        let sum = Tensor::stack(&sums, 0)?.sum_all()?;
        let mean = (&sum / pairs as f64)?;
        let loss = match self.config.mean {
            GramMean::Code => (sum * (2.0 / batch as f64))?,
            GramMean::Paper => mean.clone(),
        };
        let figures = vec![("gram", mean.detach().sqrt()?)];
        AddonOutput::weighted(loss, self.config.lambda, figures)
    }
}
