//! The few layers that heads are made of, out of differentiable candle operations.

use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::{Init, Linear, VarBuilder};

use crate::{Error, Result, projector::TokenNorm};

/// Inside the root of a norm.
const EPS: f64 = 1e-6;

/// `Wx`, or `Wx + b`; weights start uniform within `1/√inputs`.
pub(super) fn linear(inputs: usize, outputs: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let bound = 1.0 / (inputs as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
    let bias = match bias {
        true => Some(vb.get_with_hints(outputs, "bias", init)?),
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

/// Batch normalization of (B, C) by the statistics of the batch at hand.
///
/// Heads are thrown away after training, so there are no running averages; candle-nn's layer keeps them as variables of the
/// builder, where an optimizer and a gradient check would take them for weights.
#[derive(Clone, Debug)]
pub(super) struct BatchNorm(Option<(Tensor, Tensor)>);

impl BatchNorm {
    const EPS: f64 = 1e-5;

    pub(super) fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(1.0))?;
        let bias = vb.get_with_hints(width, "bias", Init::Const(0.0))?;
        Ok(Self(Some((weight, bias))))
    }

    pub(super) fn without_affine() -> Self {
        Self(None)
    }
}

impl Module for BatchNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.broadcast_sub(&batch_mean(x)?)?;
        let deviation = (batch_mean(&x.sqr()?)? + Self::EPS)?.sqrt()?;
        let x = x.broadcast_div(&deviation)?;
        match &self.0 {
            Some((weight, bias)) => x.broadcast_mul(weight)?.broadcast_add(bias),
            None => Ok(x),
        }
    }
}

/// Mean over the batch, (1, C); as a product, since candle sums slowly along the first axis.
fn batch_mean(x: &Tensor) -> candle_core::Result<Tensor> {
    let batch = x.dim(0)?;
    Tensor::ones((1, batch), x.dtype(), x.device())?
        .affine(1.0 / batch as f64, 0.0)?
        .matmul(x)
}

/// What stands between two linear maps, before the ReLU.
#[derive(Clone, Debug)]
enum Norm {
    Batch(BatchNorm),
    Layer(TokenNorm),
    None,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Batch(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
            Self::None => Ok(x.clone()),
        }
    }
}

/// Linear maps with a normalization and a ReLU between them. Variables: `layer1.weight`, `layer1.norm.weight`, ….
#[derive(Clone, Debug)]
pub(super) struct Mlp(Vec<(Linear, Norm, bool)>);

impl Mlp {
    /// Batch normalization after each hidden map, which has no bias then; the last map has one if `last_bias`.
    pub(super) fn batch_norm(widths: &[usize], last_bias: bool, vb: VarBuilder) -> Result<Self> {
        let last = widths.len().saturating_sub(1);
        let mut layers = Vec::with_capacity(last);
        for (i, pair) in widths.windows(2).enumerate() {
            let (vb, hidden) = (vb.pp(format!("layer{}", i + 1)), i + 1 < last);
            let map = linear(pair[0], pair[1], !hidden && last_bias, vb.clone())?;
            let norm = match hidden {
                true => Norm::Batch(BatchNorm::new(pair[1], vb.pp("norm"))?),
                false => Norm::None,
            };
            layers.push((map, norm, hidden));
        }
        Ok(Self(layers))
    }

    /// The same, with a normalized output without scale and shift.
    pub(super) fn with_last_norm(mut self) -> Self {
        if let Some((_, norm, _)) = self.0.last_mut() {
            *norm = Norm::Batch(BatchNorm::without_affine());
        }
        self
    }

    /// Biases and layer normalization everywhere; a ReLU after the maps that `relu` says.
    pub(super) fn layer_norm(widths: &[usize], relu: &[bool], vb: VarBuilder) -> Result<Self> {
        let last = widths.len().saturating_sub(1);
        let mut layers = Vec::with_capacity(last);
        for ((i, pair), &relu) in widths.windows(2).enumerate().zip(relu) {
            let vb = vb.pp(format!("layer{}", i + 1));
            let map = linear(pair[0], pair[1], true, vb.clone())?;
            let norm = match i + 1 < last {
                true => Norm::Layer(TokenNorm::new(pair[1], vb.pp("norm"))?),
                false => Norm::None,
            };
            layers.push((map, norm, relu));
        }
        Ok(Self(layers))
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for (map, norm, relu) in &self.0 {
            x = norm.forward(&map.forward(&x)?)?;
            if *relu {
                x = x.relu()?;
            }
        }
        Ok(x)
    }
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

/// Mean cross-entropy of rows of logits (B, K) with one class each.
pub(super) fn cross_entropy(logits: &Tensor, classes: &[u32]) -> candle_core::Result<Tensor> {
    let classes = Tensor::new(classes, logits.device())?;
    candle_nn::loss::cross_entropy(logits, &classes)
}

/// Share of rows whose largest logit is that of their class; a scalar of the logits' type.
pub(super) fn accuracy(logits: &Tensor, classes: &[u32]) -> candle_core::Result<Tensor> {
    let classes = Tensor::new(classes, logits.device())?;
    let hits = logits.detach().argmax(D::Minus1)?.eq(&classes)?;
    hits.to_dtype(logits.dtype())?.mean_all()
}

/// Numbers of the host as a tensor of this type; cast on the host, since not every device knows f64.
pub(super) fn constant(
    values: Vec<f64>,
    shape: (usize, usize),
    dtype: DType,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
    values.to_dtype(dtype)?.to_device(device)
}

/// Ones with zeros along the diagonal, (n, n).
pub(super) fn off_diagonal(n: usize, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let value = |at: usize| if at.is_multiple_of(n + 1) { 0.0 } else { 1.0 };
    constant((0..n * n).map(value).collect(), (n, n), dtype, device)
}

/// That `widths` are usable, named by their fields.
pub(super) fn check_widths(widths: &[(&'static str, usize)]) -> Result<()> {
    match widths.iter().find(|(_, width)| *width == 0) {
        Some(&(field, width)) => Err(Error::config(field, "a width of at least 1", width)),
        None => Ok(()),
    }
}

/// That a weight of a loss is usable.
pub(super) fn check_weight(field: &'static str, weight: f64) -> Result<()> {
    if weight.is_finite() && weight >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        field,
        "a finite weight of at least 0",
        weight,
    ))
}

/// That a batch has at least two samples: normalized over one, everything is zero.
pub(super) fn check_batch(op: &'static str, batch: usize) -> Result<()> {
    if batch >= 2 {
        return Ok(());
    }
    Err(Error::input(
        op,
        "a batch of at least 2 samples (its head normalizes over the batch, and one sample would become zero)",
        batch,
    ))
}
