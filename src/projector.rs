//! The token-wise head in front of the equivariance loss.

use candle_core::{D, DType, Module, Tensor};
use candle_nn::{Init, Linear, VarBuilder};

use crate::{Error, Result};

/// The shape of a [`Projector`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProjectorConfig {
    /// Width between the two linear maps.
    pub hidden: usize,
    /// Width of the projected tokens.
    pub out: usize,
    /// Whether tokens pass a LayerNorm of the head's own first; blocks of a pre-norm transformer need one.
    pub norm: bool,
}

impl Default for ProjectorConfig {
    /// 512 and 512 after a LayerNorm, as in the authors' code.
    fn default() -> Self {
        Self {
            hidden: 512,
            out: 512,
            norm: true,
        }
    }
}

/// `W₂ · GELU(W₁ · LN(x))` on each token, without biases: 1×1 convolutions where tokens form a map.
///
/// It treats all tokens alike, so it commutes with every permutation of them. Weights start Xavier-uniform. Variables:
/// `norm.weight`, `norm.bias`, `hidden.weight`, `out.weight`.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::projector::{Projector, ProjectorConfig};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let head = Projector::new(384, ProjectorConfig::default(), vb)?;
/// let tokens = Tensor::zeros((2, 49, 384), DType::F32, &Device::Cpu)?;
/// assert_eq!(head.forward(&tokens)?.dims(), [2, 49, 512]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Projector {
    norm: Option<TokenNorm>,
    hidden: Linear,
    out: Linear,
    channels: usize,
}

impl Projector {
    /// A head for tokens of `channels` channels.
    ///
    /// # Errors
    /// If a width is 0, or `vb` cannot hand out the variables.
    pub fn new(channels: usize, config: ProjectorConfig, vb: VarBuilder) -> Result<Self> {
        for (field, width) in [
            ("channels", channels),
            ("ProjectorConfig::hidden", config.hidden),
            ("ProjectorConfig::out", config.out),
        ] {
            if width == 0 {
                return Err(Error::config(field, "a width of at least 1", width));
            }
        }
        let norm = match config.norm {
            true => Some(TokenNorm::new(channels, vb.pp("norm"))?),
            false => None,
        };
        Ok(Self {
            norm,
            hidden: linear(channels, config.hidden, vb.pp("hidden"))?,
            out: linear(config.hidden, config.out, vb.pp("out"))?,
            channels,
        })
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let dtype = self.hidden.weight().dtype();
        if x.rank() < 2 || x.dims().last() != Some(&self.channels) || x.dtype() != dtype {
            return Err(Error::input(
                "Projector",
                format!("tokens (…, {}) of type {}", self.channels, dtype.as_str()),
                format!("{:?} of type {}", x.dims(), x.dtype().as_str()),
            ));
        }
        Ok(())
    }
}

impl Module for Projector {
    /// `(B, N, C)` or `(M, C)` to the same with `out` channels; differentiable.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.check(x)?;
        let x = match &self.norm {
            Some(norm) => norm.forward(x)?,
            None => x.clone(),
        };
        self.out.forward(&gelu(&self.hidden.forward(&x)?)?)
    }
}

fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = (6.0 / (inputs + outputs) as f64).sqrt();
    let xavier = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let weight = vb.get_with_hints((outputs, inputs), "weight", xavier)?;
    Ok(Linear::new(weight, None))
}

/// `x·Φ(x)`, from `erf`: candle's own `gelu_erf` has a derivative of six digits.
fn gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    let phi = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * 0.5)? * phi
}

/// LayerNorm out of differentiable operations: candle-nn's own cuts the gradient.
#[derive(Clone, Debug)]
pub(crate) struct TokenNorm {
    weight: Tensor,
    bias: Tensor,
}

impl TokenNorm {
    const EPS: f64 = 1e-6;

    pub(crate) fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(channels, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let dtype = x.dtype();
        let wide = match dtype {
            DType::F16 | DType::BF16 => DType::F32,
            other => other,
        };
        let x = x.to_dtype(wide)?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + Self::EPS)?.sqrt()?;
        x.broadcast_div(&deviation)?
            .to_dtype(dtype)?
            .broadcast_mul(&self.weight)?
            .broadcast_add(&self.bias)
    }
}
