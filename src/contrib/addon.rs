//! The input of an add-on, a final embedding or the tokens of a layer, and its output.

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;

use super::{check, nn::LayerNorm};
use crate::{Channels, Error, Layout, Result, TokenGrid};

/// The features that an add-on reads.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::{Layout, contrib::{AddonInput, Care, CareConfig}};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = CareConfig { chunks: 1, ..Default::default() };
/// let coupled = Care::new(config, AddonInput::Embedding, 16, vb.pp("coupled"))?;
/// let decoupled = Care::new(config, AddonInput::Tokens(Layout::default()), 16, vb.pp("decoupled"))?;
///
/// let embedding = Tensor::ones((4, 16), DType::F32, &Device::Cpu)?;
/// let tapped = Tensor::ones((4, 49, 16), DType::F32, &Device::Cpu)?;
/// coupled.forward([&embedding, &embedding])?;
/// decoupled.forward([&tapped, &tapped])?;
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddonInput {
    /// The final embedding `(B, D)`. The loss is coupled with the base loss.
    Embedding,
    /// A tapped token map `(B, N, C)` or `(B, C, H, W)`, pooled to `h = mean over tokens of
    /// LayerNorm(T)`.
    ///
    /// Prefix tokens are left out. The add-on owns the LayerNorm, with scale and shift.
    Tokens(Layout),
}

/// The result of an add-on.
#[derive(Clone, Debug)]
pub struct AddonOutput {
    /// `λ · unweighted`, a differentiable scalar to add to the base loss.
    pub loss: Tensor,
    /// The loss before `λ`, with its graph. Check it with
    /// [`grad::assert_reaches`](crate::grad::assert_reaches).
    pub unweighted: Tensor,
    /// Values to log, by name; detached scalars.
    pub metrics: Vec<(&'static str, Tensor)>,
}

impl AddonOutput {
    pub(super) fn new(
        unweighted: Tensor,
        lambda: f64,
        metrics: Vec<(&'static str, Tensor)>,
    ) -> Result<Self> {
        Ok(Self { loss: (&unweighted * lambda)?, unweighted, metrics })
    }

    /// The weighted sum of at least one named term `(name, weight, loss)`. The metrics are the
    /// terms before their weights.
    pub(super) fn of_terms(terms: &[(&'static str, f64, Tensor)], lambda: f64) -> Result<Self> {
        let weighted = terms.iter().map(|(_, weight, loss)| loss * *weight);
        let weighted: Vec<Tensor> = weighted.collect::<candle_core::Result<_>>()?;
        let metrics = terms.iter().map(|(name, _, loss)| (*name, loss.detach()));
        Self::new(super::orbit::sum(&weighted)?, lambda, metrics.collect())
    }
}

/// [`AddonInput`] with its variables: `norm.weight` and `norm.bias` for tokens, none for an
/// embedding.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    /// The layout of the tokens and their norm; `None` for an embedding.
    tokens: Option<(Layout, LayerNorm)>,
    channels: usize,
    dtype: DType,
}

impl Reader {
    pub(super) fn new(input: AddonInput, channels: usize, vb: VarBuilder) -> Result<Self> {
        check::widths(&[("channels", channels)])?;
        if !matches!(vb.dtype(), DType::F32 | DType::F64) {
            return Err(Error::config(
                "vb",
                "weights of type f32 or f64 (features in half precision are computed in f32)",
                vb.dtype().as_str(),
            ));
        }
        Ok(Self {
            tokens: match input {
                AddonInput::Embedding => None,
                AddonInput::Tokens(layout) => {
                    Some((layout, LayerNorm::new(channels, vb.pp("norm"))?))
                }
            },
            channels,
            dtype: vb.dtype(),
        })
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// One row per sample, `(B, C)`, in the type of the weights; differentiable.
    pub(super) fn features(&self, op: &'static str, x: &Tensor) -> Result<Tensor> {
        let dtype = check::work_dtype(op, x)?;
        if dtype != self.dtype {
            let expected = format!("features of type {}, as the weights", self.dtype.as_str());
            return Err(Error::input(op, expected, x.dtype().as_str()));
        }
        let c = self.channels;
        let fail = |expected: String| Err(Error::input(op, expected, format!("{:?}", x.dims())));
        let Some((layout, norm)) = &self.tokens else {
            return match x.dims() {
                // A class token narrowed out of a map is not contiguous, but matrix products on
                // CUDA need contiguous rows.
                &[b, d] if b > 0 && d == c => Ok(x.to_dtype(dtype)?.contiguous()?),
                _ => fail(format!(
                    "embeddings (B, {c}) of at least one sample (AddonInput::Tokens reads token maps)"
                )),
            };
        };
        let prefix = layout.prefix;
        // The mean over tokens ignores their order, so a sequence may be a grid of one row.
        let grid = match (x.dims(), layout.channels) {
            (&[b, n, d], _) if b > 0 && n > prefix && d == c => TokenGrid::new(1, n - prefix)?,
            (&[b, d, h, w], Channels::First) | (&[b, h, w, d], Channels::Last)
                if b * h * w > 0 && d == c =>
            {
                TokenGrid::new(h, w)?
            }
            _ => {
                return fail(format!(
                    "tokens (B, {prefix} + N, {c}) or a map of {c} channels, of at least one token and sample \
                     (AddonInput::Embedding reads embeddings)"
                ));
            }
        };
        let tokens = layout.tokens(x, grid)?.to_dtype(dtype)?;
        Ok(norm.forward(&tokens)?.mean(1)?)
    }

    /// The features of two views of one batch.
    pub(super) fn pair(&self, op: &'static str, views: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let [a, b] = views;
        let (a, b) = (self.features(op, a)?, self.features(op, b)?);
        check_batch(op, &a, &b)?;
        Ok([a, b])
    }
}

/// Two sets of features have one number of samples.
pub(super) fn check_batch(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    let (a, b) = (a.dim(0)?, b.dim(0)?);
    if a == b {
        return Ok(());
    }
    Err(Error::input(op, format!("views of one batch, {a} samples"), b))
}
