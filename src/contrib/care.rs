//! CARE (arXiv 2306.13924): an augmentation acts on embeddings as an orthogonal map.

use std::ops::Range;

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::{AddonInput, AddonOutput, addon::Reader, check, nn, orbit};
use crate::{Error, Result};

/// How [`Care`] averages over the pairs of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum GramMean {
    /// `2 · mean_i Σ_{j≠i}`, as in the authors' code. It grows with the chunk. The authors' weight
    /// of 0.01 belongs to it.
    #[default]
    Code,
    /// The mean over all pairs `i ≠ j`, as in the paper.
    Paper,
}

/// The settings of [`Care`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CareConfig {
    /// Number of chunks of a batch; all images of a chunk share their augmentations.
    pub chunks: usize,
    /// The mean over pairs.
    pub mean: GramMean,
    /// Weight `λ` of the loss; finite and at least 0.
    pub lambda: f64,
}

impl Default for CareConfig {
    /// The authors' values: 8 chunks, and `λ = 0.01` with the sum of their code.
    fn default() -> Self {
        Self { chunks: 8, mean: GramMean::Code, lambda: 0.01 }
    }
}

impl CareConfig {
    /// The rows of each chunk of a batch. The sizes of two chunks differ by at most one.
    ///
    /// ```
    /// use ser_reg::contrib::CareConfig;
    /// let config = CareConfig { chunks: 2, ..Default::default() };
    /// assert_eq!(config.ranges(5)?, [0..2, 2..5]);
    /// assert!(config.ranges(3).is_err(), "one image alone has no inner product");
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// If a chunk has fewer than two images.
    pub fn ranges(&self, batch: usize) -> Result<Vec<Range<usize>>> {
        if self.chunks == 0 || batch / self.chunks < 2 {
            let expected = format!(
                "at least 2 samples in each of {} chunks (CareConfig::chunks)",
                self.chunks
            );
            return Err(Error::input("Care", expected, format!("a batch of {batch}")));
        }
        // The product may exceed a usize.
        let start = |k: usize| (batch as u128 * k as u128 / self.chunks as u128) as usize;
        Ok((0..self.chunks).map(|k| start(k)..start(k + 1)).collect())
    }
}

/// The loss of CARE: the Gram matrices of two views agree.
///
/// ```text
/// L = λ · 2/B Σ_i Σ_{j≠i, same chunk} ( ⟨z(a₁x_i), z(a₁x_j)⟩ − ⟨z(a₂x_i), z(a₂x_j)⟩ )²,   |z| = 1
/// ```
///
/// [`GramMean::Paper`] takes the mean over these pairs instead. All images of a chunk have the same
/// augmentation `a₁` in view 1 and the same `a₂` in view 2; [`CareConfig::ranges`] returns the
/// chunks. CARE has no head. The LayerNorm of [`AddonInput::Tokens`] holds its only variables.
///
/// The loss vanishes for every orthogonal action. This includes the trivial action, so invariant
/// features satisfy it. The authors apply it to the output of the projector, which goes in as
/// [`AddonInput::Embedding`]. The metric `gram` is the root mean square of the differences of inner
/// products.
///
/// [`AddonInput`] has an example. Source: arXiv 2306.13924.
#[derive(Clone, Debug)]
pub struct Care {
    config: CareConfig,
    reader: Reader,
}

impl Care {
    const OP: &'static str = "Care";

    /// An add-on for features of `channels` channels. Variables: `norm.*` (tokens only).
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` fails to return a variable.
    pub fn new(
        config: CareConfig,
        input: AddonInput,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        if config.chunks == 0 {
            return Err(Error::config("CareConfig::chunks", "at least 1 chunk", 0));
        }
        check::not_negative("CareConfig::lambda", config.lambda)?;
        Ok(Self { config, reader: Reader::new(input, channels, vb)? })
    }

    /// The loss of the features of two views, `(B, D)` or token maps as [`AddonInput`] says.
    ///
    /// # Errors
    /// If a chunk has fewer than two samples, the batches differ, or shapes or types do not fit the
    /// input.
    pub fn forward(&self, views: [&Tensor; 2]) -> Result<AddonOutput> {
        let [h1, h2] = self.reader.pair(Self::OP, views)?;
        let batch = h1.dim(0)?;
        let chunks = self.config.ranges(batch)?;
        let (z1, z2) = (nn::unit(&h1)?, nn::unit(&h2)?);
        let (mut sums, mut pairs) = (Vec::with_capacity(chunks.len()), 0);
        // Neighboring chunks of one size, usually all of them, form one product.
        for equal in chunks.chunk_by(|a, b| a.len() == b.len()) {
            let (start, count, n) = (equal[0].start, equal.len(), equal[0].len());
            let gram = |z: &Tensor| -> candle_core::Result<Tensor> {
                let z = z.narrow(0, start, count * n)?.reshape((count, n, ()))?;
                z.matmul(&z.t()?)
            };
            let off_diagonal = nn::off_diagonal(n, z1.dtype(), z1.device())?;
            let difference = (gram(&z1)? - gram(&z2)?)?.broadcast_mul(&off_diagonal)?;
            sums.push(difference.sqr()?.sum_all()?);
            pairs += count * n * (n - 1);
        }
        let sum = orbit::sum(&sums)?;
        let mean = (&sum / pairs as f64)?;
        let metrics = vec![("gram", mean.detach().sqrt()?)];
        let loss = match self.config.mean {
            GramMean::Code => (sum * (2.0 / batch as f64))?,
            GramMean::Paper => mean,
        };
        AddonOutput::new(loss, self.config.lambda, metrics)
    }
}
