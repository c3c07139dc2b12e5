//! Layers whose gradients arrive.
//!
//! candle-nn's `LayerNorm`, `RmsNorm` and `softmax_last_dim` cut the graph without an error, so a network that is to be
//! trained needs its own. [`plain`] spells each operation out in candle operations, for any device and type; [`fused`] is
//! the same in one pass over the rows, for `f32` on the CPU, where plain operations run on one thread.

pub mod fused;
mod kernels;
pub mod plain;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `(x − mean) / √(variance + eps) · scale + shift` over the last axis.
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Tensor> {
    match fused::applies(x) {
        true => fused::layer_norm(x, scale, shift, eps),
        false => plain::layer_norm(x, scale, shift, eps),
    }
}

/// Gaussian error linear unit, in its tanh form.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    match fused::applies(x) {
        true => fused::gelu(x),
        false => plain::gelu(x),
    }
}

/// Multi-head self-attention of `(B, N, 3·C)`: queries, keys and values side by side; gives `(B, N, C)`.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    match fused::applies(qkv) {
        true => fused::attention(qkv, heads),
        false => plain::attention(qkv, heads),
    }
}

/// `x·W + b` of rows `(M, in)`, with `W` as `(in, out)`.
pub fn affine(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    match fused::applies(x) {
        true => fused::affine(x, weight, bias),
        false => plain::affine(x, weight, bias),
    }
}

/// Unit length along the last axis; a zero vector stays zero, with a finite gradient.
pub fn normalize(x: &Tensor) -> Result<Tensor> {
    let length = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    x.broadcast_div(&length)
}

/// The mean row `(1, d)` of `(n, d)`, summed in f64: in f32 a sum over many rows loses digits.
pub fn mean_row(x: &Tensor) -> Result<Tensor> {
    // Some devices have no f64.
    let rows = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    rows.mean_keepdim(0)?.to_dtype(x.dtype())?.to_device(x.device())
}

/// Uniform values whose variance suits a map from `fan_in` to `fan_out` features.
pub fn xavier(fan_in: usize, fan_out: usize) -> Init {
    let bound = (6.0 / (fan_in + fan_out) as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// `x·W + b` with `W` stored as `(in, out)`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Self::with_init(inputs, outputs, xavier(inputs, outputs), vb)
    }

    pub fn with_init(inputs: usize, outputs: usize, init: Init, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((inputs, outputs), "weight", init)?;
        let bias = Some(vb.get_with_hints(outputs, "bias", Init::Const(0.0))?);
        Ok(Self { weight, bias })
    }

    pub fn without_bias(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((inputs, outputs), "weight", xavier(inputs, outputs))?;
        Ok(Self { weight, bias: None })
    }

    /// The map with another weight `(in, out)`.
    pub fn map_weight(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(&self.weight)?, bias: self.bias.clone() })
    }

    /// The map to the outputs `columns` only.
    pub fn narrow(&self, columns: std::ops::Range<usize>) -> Result<Self> {
        let cut = |t: &Tensor, axis| t.narrow(axis, columns.start, columns.len())?.contiguous();
        let bias = self.bias.as_ref().map(|b| cut(b, 0)).transpose()?;
        Ok(Self { weight: cut(&self.weight, 1)?, bias })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (inputs, outputs) = self.weight.dims2()?;
        // One large product: a batched one would loop over the samples.
        let rows = x.reshape(((), inputs))?;
        let rows = match &self.bias {
            Some(bias) => affine(&rows, &self.weight, bias)?,
            None => rows.matmul(&self.weight)?,
        };
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = outputs;
        rows.reshape(shape)
    }
}

/// Layer normalization with a learned scale and shift.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    scale: Tensor,
    shift: Tensor,
}

impl LayerNorm {
    pub fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            scale: vb.get_with_hints(width, "scale", Init::Const(1.0))?,
            shift: vb.get_with_hints(width, "shift", Init::Const(0.0))?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.scale, &self.shift, 1e-6)
    }
}

/// Batch normalization of `(B, C)` by the statistics of the batch at hand.
///
/// The heads that use it are thrown away after training, so there are no running averages.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    affine: Option<(Tensor, Tensor)>,
}

impl BatchNorm {
    pub fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let scale = vb.get_with_hints(width, "scale", Init::Const(1.0))?;
        let shift = vb.get_with_hints(width, "shift", Init::Const(0.0))?;
        Ok(Self { affine: Some((scale, shift)) })
    }

    pub fn without_affine() -> Self {
        Self { affine: None }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let centered = x.broadcast_sub(&batch_mean(x)?)?;
        let std = (batch_mean(&centered.sqr()?)? + 1e-5)?.sqrt()?;
        let x = centered.broadcast_div(&std)?;
        match &self.affine {
            Some((scale, shift)) => x.broadcast_mul(scale)?.broadcast_add(shift),
            None => Ok(x),
        }
    }
}

/// Mean over the batch, `(1, C)`; as a product, since candle sums slowly along the first axis.
fn batch_mean(x: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    Tensor::full(1.0 / batch as f64, (1, batch), x.device())?.to_dtype(x.dtype())?.matmul(x)
}
