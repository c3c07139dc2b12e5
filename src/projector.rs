//! The token-wise head in front of the equivariance loss.

use candle_core::{Module, Tensor};
use candle_nn::{Init, Linear, VarBuilder, ops::layer_norm_slow};

use crate::group::{FieldType, Representation, Subgroup};
use crate::{Error, Result, check};

/// The shape of a [`Projector`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct ProjectorConfig {
    /// Width between the two linear maps.
    pub hidden: usize,
    /// Width of the projected tokens.
    pub out: usize,
    /// Whether a LayerNorm of the head comes first. Blocks of a pre-norm transformer need one.
    pub norm: bool,
}

impl Default for ProjectorConfig {
    /// 512 and 512 after a LayerNorm, as in the authors' code.
    fn default() -> Self {
        Self { hidden: 512, out: 512, norm: true }
    }
}

/// `W₂ · GELU(W₁ · LN(x))` on each token, without biases: 1×1 convolutions where tokens form a map.
///
/// The head treats all tokens alike, so it commutes with every action on the token grid. Therefore the maps are projected
/// first and aligned afterwards. Weights start Xavier-uniform. Variables: `norm.weight`, `norm.bias`, `hidden.weight`,
/// `out.weight`.
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
    field: FieldType,
    output_field: FieldType,
    norm: Option<[Tensor; 2]>,
    hidden: Linear,
    out: Linear,
    /// Channels of one block of the field. The linear maps see one channel of each block at a time.
    order: usize,
}

impl Projector {
    const EPS: f32 = 1e-6;

    /// A head for tokens of `channels` channels.
    ///
    /// # Errors
    /// If a width is 0, a weight has more than 2^31 numbers, or `vb` cannot provide the variables.
    pub fn new(channels: usize, config: ProjectorConfig, vb: VarBuilder) -> Result<Self> {
        Self::on_field(FieldType::trivial(channels), config, vb)
    }

    /// A head for tokens whose channels transform as `field` says.
    ///
    /// On a trivial field it is [`Projector::new`]. On blocks of one regular representation it is the same head for the
    /// channels of each group element, from `C/order` channels to [`out`](ProjectorConfig::out) blocks. So it commutes with
    /// the permutation of the channels. With few blocks set [`norm`](ProjectorConfig::norm) to false: a norm over two
    /// channels keeps little but a sign.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::VarBuilder;
    /// use ser_reg::group::{FieldType, Subgroup};
    /// use ser_reg::projector::{Projector, ProjectorConfig};
    /// let field = FieldType::regular(Subgroup::C4, 32)?; // 8 blocks of 4 channels
    /// let config = ProjectorConfig { hidden: 16, out: 8, norm: true };
    /// let head = Projector::on_field(field, config, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    /// assert_eq!(head.output_field(), &FieldType::regular(Subgroup::C4, 8 * 4)?);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Projector::new`], and for a mixed field, or a norm over a single channel per group element.
    pub fn on_field(field: FieldType, config: ProjectorConfig, vb: VarBuilder) -> Result<Self> {
        check::size("channels", field.channels())?;
        check::weight("ProjectorConfig::hidden", field.channels(), config.hidden)?;
        check::weight("ProjectorConfig::out", config.hidden, config.out)?;
        let (group, blocks) = match *field.parts() {
            [(Representation::Trivial, channels)] => (Subgroup::Trivial, channels),
            [(Representation::Regular(_), 1)] if config.norm => {
                return Err(Error::config(
                    "ProjectorConfig::norm",
                    "false where each group element has one channel: the norm of one value is constant",
                    config.norm,
                ));
            }
            [(Representation::Regular(group), blocks)] => (group, blocks),
            _ => {
                return Err(Error::config(
                    "Projector::on_field",
                    "a trivial field, or blocks of one regular representation (compare the tokens of a mixed field \
                     without a head)",
                    format!("{field:?}"),
                ));
            }
        };
        let norm = match config.norm {
            true => {
                let vb = vb.pp("norm");
                let weight = vb.get_with_hints(blocks, "weight", Init::Const(1.0))?;
                Some([weight, vb.get_with_hints(blocks, "bias", Init::Const(0.0))?])
            }
            false => None,
        };
        let order = group.order();
        let output_field = match field.is_trivial() {
            true => FieldType::trivial(config.out),
            false => FieldType::regular(group, order * config.out)?,
        };
        Ok(Self {
            norm,
            hidden: linear(blocks, config.hidden, vb.pp("hidden"))?,
            out: linear(config.hidden, config.out, vb.pp("out"))?,
            field,
            output_field,
            order,
        })
    }

    /// How the channels of the input transform.
    pub fn field(&self) -> &FieldType {
        &self.field
    }

    /// How the channels of the output transform.
    pub fn output_field(&self) -> &FieldType {
        &self.output_field
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let (dtype, channels) = (self.hidden.weight().dtype(), self.field.channels());
        if x.rank() < 2 || x.dims().last() != Some(&channels) || x.dtype() != dtype {
            let expected = format!("tokens (…, {channels}) of type {}", dtype.as_str());
            let got = format!("{:?} of type {}", x.dims(), x.dtype().as_str());
            return Err(Error::input("Projector", expected, got));
        }
        Ok(())
    }

    /// The head on rows of one channel per block.
    fn rows(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = match &self.norm {
            // candle-nn's own LayerNorm cuts the gradient; this function does not.
            Some([weight, bias]) => layer_norm_slow(x, weight, bias, Self::EPS)?,
            None => x.clone(),
        };
        self.out.forward(&gelu(&self.hidden.forward(&x)?)?)
    }
}

impl Module for Projector {
    /// `(B, N, C)` or `(M, C)` to the same with the channels of the output; differentiable.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.check(x)?;
        if self.order == 1 {
            return self.rows(x);
        }
        // One row per group element: the same head for all of them commutes with their permutation.
        let (leading, blocks) = (&x.dims()[..x.rank() - 1], x.dims()[x.rank() - 1] / self.order);
        let rows = x.reshape([leading, &[blocks, self.order]].concat())?;
        let rows = rows.transpose(x.rank() - 1, x.rank())?.contiguous()?;
        let rows = self.rows(&rows)?.transpose(x.rank() - 1, x.rank())?;
        rows.contiguous()?.flatten_from(x.rank() - 1)
    }
}

fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = (6.0 / (inputs + outputs) as f64).sqrt();
    let xavier = Init::Uniform { lo: -bound, up: bound };
    let weight = vb.get_with_hints((outputs, inputs), "weight", xavier)?;
    Ok(Linear::new(weight, None))
}

/// `x·Φ(x)` by `erf`. The derivative of candle's `gelu_erf` has six digits only, too few for the tests in f64.
fn gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    let phi = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (x * 0.5)? * phi
}
