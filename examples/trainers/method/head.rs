//! The multi-layer perceptron between an encoder's features and a loss.

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::nn::{self, BatchNorm, Linear};

/// What stands between two linear maps, after the normalization if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    Relu,
    /// In its tanh form.
    Gelu,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadConfig {
    /// Features in, hidden widths, features out.
    pub widths: Vec<usize>,
    pub activation: Activation,
    /// Batch normalization between each hidden map and its activation.
    pub norm: bool,
    /// Batch normalization of the output, without scale and shift.
    pub last_norm: bool,
    pub bias: bool,
}

impl HeadConfig {
    /// Batch normalization and ReLU after each hidden map; no biases, which the normalization would take out again.
    pub fn batch_norm(widths: &[usize]) -> Self {
        Self {
            widths: widths.to_vec(),
            activation: Activation::Relu,
            norm: true,
            last_norm: false,
            bias: false,
        }
    }

    /// GELU after each hidden map, biases, no normalization.
    pub fn gelu(widths: &[usize]) -> Self {
        Self { activation: Activation::Gelu, norm: false, bias: true, ..Self::batch_norm(widths) }
    }

    /// With a normalized output: for losses that look at directions only, it spreads them over the batch.
    pub fn with_last_norm(self) -> Self {
        Self { last_norm: true, ..self }
    }
}

/// Linear maps with an activation between them.
#[derive(Clone, Debug)]
pub struct Head {
    layers: Vec<(Linear, Option<BatchNorm>)>,
    activation: Activation,
}

impl Head {
    pub fn new(config: &HeadConfig, vb: VarBuilder) -> Result<Self> {
        let maps = config.widths.len().saturating_sub(1);
        if maps == 0 {
            bail!("expected at least two widths, got {:?}", config.widths);
        }
        let mut layers = Vec::with_capacity(maps);
        for (i, pair) in config.widths.windows(2).enumerate() {
            let vb = vb.pp(format!("layer{}", i + 1));
            let linear = match config.bias {
                true => Linear::new(pair[0], pair[1], vb.clone())?,
                false => Linear::without_bias(pair[0], pair[1], vb.clone())?,
            };
            let norm = match i + 1 == maps {
                true => config.last_norm.then(BatchNorm::without_affine),
                false if config.norm => Some(BatchNorm::new(pair[1], vb.pp("norm"))?),
                false => None,
            };
            layers.push((linear, norm));
        }
        Ok(Self { layers, activation: config.activation })
    }

    /// Features `(B, in)` to embeddings `(B, out)`. With batch normalization the rows depend on each other: give each
    /// view of a batch a call of its own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, (linear, norm)) in self.layers.iter().enumerate() {
            x = linear.forward(&x)?;
            if let Some(norm) = norm {
                x = norm.forward(&x)?;
            }
            if i + 1 < self.layers.len() {
                x = match self.activation {
                    Activation::Relu => x.relu()?,
                    Activation::Gelu => nn::gelu(&x)?,
                };
            }
        }
        Ok(x)
    }
}
