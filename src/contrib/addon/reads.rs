//! What an add-on reads: the final embedding, or the tokens of an intermediate layer.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use crate::{Channels, Error, Layout, Result, TokenGrid, projector::TokenNorm};

/// The layer that an add-on reads: coupled with the base loss, or decoupled from it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::{Layout, contrib::addon::{Care, CareConfig, Reads}};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = CareConfig { chunks: 1, ..Default::default() };
/// let coupled = Care::new(config, Reads::Final, 16, vb.pp("coupled"))?;
/// let decoupled = Care::new(config, Reads::Tokens(Layout::default()), 16, vb.pp("decoupled"))?;
///
/// let final_embedding = Tensor::ones((4, 16), DType::F32, &Device::Cpu)?;
/// let tapped = Tensor::ones((4, 49, 16), DType::F32, &Device::Cpu)?;
/// coupled.forward([&final_embedding, &final_embedding])?;
/// decoupled.forward([&tapped, &tapped])?;
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The encoder's final embedding (B, D), as it is.
    Final,
    /// A tapped token map (B, N, C) or (B, C, H, W), as `h = mean over tokens of LayerNorm(T)`; prefix tokens are left out.
    /// The LayerNorm is the add-on's own, with scale and shift.
    Tokens(Layout),
}

/// [`Reads`] with its variables, `norm.weight` and `norm.bias` for tokens.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    reads: Reads,
    norm: Option<TokenNorm>,
    channels: usize,
    dtype: DType,
}

impl Reader {
    pub(super) fn new(reads: Reads, channels: usize, vb: VarBuilder) -> Result<Self> {
        super::nn::check_widths(&[("channels", channels)])?;
        if !matches!(vb.dtype(), DType::F32 | DType::F64) {
            return Err(Error::config(
                "vb",
                "weights of type f32 or f64 (features in half precision are read in f32)",
                vb.dtype().as_str(),
            ));
        }
        Ok(Self {
            reads,
            norm: match reads {
                Reads::Final => None,
                Reads::Tokens(_) => Some(TokenNorm::new(channels, vb.pp("norm"))?),
            },
            channels,
            dtype: vb.dtype(),
        })
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// One row a sample, (B, C), in the type of the weights; differentiable.
    pub(super) fn features(&self, op: &'static str, x: &Tensor) -> Result<Tensor> {
        let own = match x.dtype() {
            DType::F16 | DType::BF16 => DType::F32,
            other => other,
        };
        if own != self.dtype {
            let expected = format!("features of type {}, as the weights", self.dtype.as_str());
            return Err(Error::input(op, expected, x.dtype().as_str()));
        }
        let c = self.channels;
        let fail = |expected: String| Err(Error::input(op, expected, format!("{:?}", x.dims())));
        let (Reads::Tokens(layout), Some(norm)) = (self.reads, &self.norm) else {
            return match x.dims() {
                // a class token that is cut out of a map is not contiguous, which products on CUDA ask for
                &[b, d] if b > 0 && d == c => Ok(x.to_dtype(own)?.contiguous()?),
                _ => fail(format!(
                    "final embeddings (B, {c}) of at least one sample (Reads::Tokens takes the tokens of a layer)"
                )),
            };
        };
        let (tokens, width) = match (x.dims(), layout.channels) {
            (&[_, n, d], _) => (n.saturating_sub(layout.prefix), d),
            (&[_, d, h, w], Channels::First) | (&[_, h, w, d], Channels::Last) => (h * w, d),
            _ => (0, 0),
        };
        if tokens == 0 || width != c || x.dim(0)? == 0 {
            return fail(format!(
                "tokens (B, {} + N, {c}) or a map of {c} channels, with at least one token and sample (Reads::Final takes embeddings)",
                layout.prefix
            ));
        }
        // The mean knows no order, so that any grid of so many cells will do.
        let grid = match (x.dims(), layout.channels) {
            (&[_, _, h, w], Channels::First) | (&[_, h, w, _], Channels::Last) => {
                TokenGrid::new(h, w)?
            }
            _ => TokenGrid::new(1, tokens)?,
        };
        let tokens = layout.tokens(x, grid)?.to_dtype(own)?;
        Ok(norm.forward(&tokens)?.mean(1)?)
    }

    /// The features of several tensors of one batch size.
    pub(super) fn all<const N: usize>(
        &self,
        op: &'static str,
        inputs: [&Tensor; N],
    ) -> Result<Vec<Tensor>> {
        let features = inputs.map(|x| self.features(op, x));
        let features: Vec<Tensor> = features.into_iter().collect::<Result<_>>()?;
        for x in features.iter().skip(1) {
            if x.dims() != features[0].dims() {
                let batch = features[0].dims()[0];
                return Err(Error::input(
                    op,
                    format!("views of one batch, {batch} samples here"),
                    x.dims()[0],
                ));
            }
        }
        Ok(features)
    }
}
