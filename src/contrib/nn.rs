//! The layers and losses of the heads, composed of differentiable candle operations.

use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::{Init, Linear, VarBuilder, ops::layer_norm_slow};

use super::check;
use crate::{
    Result,
    loss::{Contrastive, ContrastiveOutput, Negatives, SameImage, nt_xent_symmetric},
};

/// Added to the squared norm inside its root.
const EPS: f64 = 1e-6;

/// `Wx`, or `Wx + b`; weights start uniform within `1/√inputs`.
pub(super) fn linear(inputs: usize, outputs: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    check::weight(inputs, outputs)?;
    let bound = 1.0 / (inputs as f64).sqrt();
    let init = Init::Uniform { lo: -bound, up: bound };
    let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
    let bias = match bias {
        true => Some(vb.get_with_hints(outputs, "bias", init)?),
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

/// Scale and shift, which start at 1 and 0.
fn affine(width: usize, vb: &VarBuilder) -> Result<(Tensor, Tensor)> {
    check::weight(1, width)?;
    Ok((
        vb.get_with_hints(width, "weight", Init::Const(1.0))?,
        vb.get_with_hints(width, "bias", Init::Const(0.0))?,
    ))
}

/// Layer normalization over the last axis. (`candle_nn::LayerNorm` has no gradient on contiguous
/// input.)
#[derive(Clone, Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    pub(super) fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = affine(width, &vb)?;
        Ok(Self { weight, bias })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        layer_norm_slow(x, &self.weight, &self.bias, EPS as f32)
    }
}

/// Batch normalization of `(B, C)` by the statistics of the current batch.
///
/// Heads are needed in training only, so there are no running averages. `candle_nn::BatchNorm`
/// registers them as variables, which an optimizer would train.
#[derive(Clone, Debug)]
pub(super) struct BatchNorm {
    affine: Option<(Tensor, Tensor)>,
}

impl BatchNorm {
    const EPS: f64 = 1e-5;

    pub(super) fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { affine: Some(affine(width, &vb)?) })
    }

    pub(super) fn without_affine() -> Self {
        Self { affine: None }
    }
}

impl Module for BatchNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.broadcast_sub(&batch_mean(x)?)?;
        let deviation = (batch_mean(&x.sqr()?)? + Self::EPS)?.sqrt()?;
        let x = x.broadcast_div(&deviation)?;
        match &self.affine {
            Some((weight, bias)) => x.broadcast_mul(weight)?.broadcast_add(bias),
            None => Ok(x),
        }
    }
}

/// Mean over the batch, `(1, C)`. It is a matrix product, because candle sums slowly along the
/// first axis.
fn batch_mean(x: &Tensor) -> candle_core::Result<Tensor> {
    let batch = x.dim(0)?;
    let ones = Tensor::ones((1, batch), x.dtype(), x.device())?;
    (ones * (1.0 / batch as f64))?.matmul(x)
}

/// The normalization after a linear map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norm {
    /// Batch normalization with scale and shift. The map before it has no bias.
    Batch,
    /// Batch normalization without scale and shift. The map before it has no bias.
    PlainBatch,
    /// Layer normalization. The map before it has a bias.
    Layer,
}

/// The output map of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Linear without bias.
    Linear,
    /// Linear with bias.
    Affine,
    /// Linear, then this norm.
    Normalized(Norm),
}

/// The settings of an [`Mlp`].
#[derive(Clone, Copy, Debug)]
pub(super) struct MlpConfig<'a> {
    /// Widths of the input, the hidden layers and the output.
    pub widths: &'a [usize],
    /// The norm before each ReLU.
    pub norm: Norm,
    /// The output map.
    pub output: Output,
}

/// Linear maps; each but the last is followed by a norm and a ReLU. Variables: `layer1.weight`,
/// `layer1.norm.weight`, ….
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    hidden: Vec<Normalized>,
    output: Normalized,
}

/// A linear map and its norm.
#[derive(Clone, Debug)]
struct Normalized {
    map: Linear,
    norm: Option<NormLayer>,
}

#[derive(Clone, Debug)]
enum NormLayer {
    Batch(BatchNorm),
    Layer(LayerNorm),
}

impl Mlp {
    pub(super) fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        let maps = config.widths.len() - 1;
        let layer = |i: usize, output| {
            let (inputs, outputs) = (config.widths[i - 1], config.widths[i]);
            Normalized::new(inputs, outputs, output, vb.pp(format!("layer{i}")))
        };
        let hidden = (1..maps).map(|i| layer(i, Output::Normalized(config.norm)));
        Ok(Self { hidden: hidden.collect::<Result<_>>()?, output: layer(maps, config.output)? })
    }
}

impl Normalized {
    fn new(inputs: usize, outputs: usize, kind: Output, vb: VarBuilder) -> Result<Self> {
        let bias = matches!(kind, Output::Affine | Output::Normalized(Norm::Layer));
        let map = linear(inputs, outputs, bias, vb.clone())?;
        let vb = vb.pp("norm");
        let norm = match kind {
            Output::Linear | Output::Affine => None,
            Output::Normalized(Norm::PlainBatch) => {
                Some(NormLayer::Batch(BatchNorm::without_affine()))
            }
            Output::Normalized(Norm::Batch) => Some(NormLayer::Batch(BatchNorm::new(outputs, vb)?)),
            Output::Normalized(Norm::Layer) => Some(NormLayer::Layer(LayerNorm::new(outputs, vb)?)),
        };
        Ok(Self { map, norm })
    }
}

impl Module for Normalized {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.map.forward(x)?;
        match &self.norm {
            Some(NormLayer::Batch(norm)) => norm.forward(&x),
            Some(NormLayer::Layer(norm)) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.hidden {
            x = layer.forward(&x)?.relu()?;
        }
        self.output.forward(&x)
    }
}

/// NT-Xent of rows `(M, D)`: each row must find its partner in the other set among all other rows
/// of both sets.
pub(super) fn contrast(a: &Tensor, b: &Tensor, temperature: f64) -> Result<ContrastiveOutput> {
    let config = Contrastive {
        negatives: Negatives::BothViews,
        same_image: SameImage::Keep,
        temperature,
        ..Contrastive::default()
    };
    nt_xent_symmetric(&a.unsqueeze(1)?, &b.unsqueeze(1)?, &config)
}

/// Rows of unit length; a zero row stays zero, with a finite gradient.
pub(super) fn unit(x: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + EPS)?.sqrt()?)
}

/// Mean cosine of corresponding rows, detached.
pub(super) fn mean_cosine(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let product = (unit(&a.detach())? * unit(&b.detach())?)?;
    product.sum(D::Minus1)?.mean_all()
}

/// Mean cross-entropy of logits `(B, K)` with one class per row.
pub(super) fn cross_entropy(logits: &Tensor, classes: &[u32]) -> candle_core::Result<Tensor> {
    let classes = Tensor::new(classes, logits.device())?;
    candle_nn::loss::cross_entropy(logits, &classes)
}

/// The fraction of rows whose largest logit belongs to their class; a scalar of the type of the
/// logits.
pub(super) fn accuracy(logits: &Tensor, classes: &[u32]) -> candle_core::Result<Tensor> {
    let classes = Tensor::new(classes, logits.device())?;
    let hits = logits.detach().argmax(D::Minus1)?.eq(&classes)?;
    hits.to_dtype(logits.dtype())?.mean_all()
}

/// Host values as a tensor of this type. The cast happens on the host, because Metal has no f64.
pub(super) fn constant(
    values: Vec<f64>,
    shape: (usize, usize),
    dtype: DType,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
    values.to_dtype(dtype)?.to_device(device)
}

/// Ones with zeros along the diagonal, `(n, n)`.
pub(super) fn off_diagonal(n: usize, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let value = |at: usize| if at.is_multiple_of(n + 1) { 0.0 } else { 1.0 };
    constant((0..n * n).map(value).collect(), (n, n), dtype, device)
}
