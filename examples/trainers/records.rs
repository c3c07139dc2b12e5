//! The records of a run, one JSON object a line: `step` lines, `epoch` lines and, on request, `balance` lines.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// `None` for what JSON cannot hold.
pub fn finite(value: f64) -> Option<f64> {
    Some(value).filter(|v| v.is_finite())
}

/// The mean, summed in f64: in f32 a sum over many steps loses digits. `None` without values.
pub fn mean(values: impl Iterator<Item = f32>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, n), v| (sum + f64::from(v), n + 1));
    (count > 0).then(|| sum / count as f64)
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    Step(Step),
    Epoch(Epoch),
    Balance(Balanced),
}

/// Values of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps finished before this one.
    pub step: usize,
    /// The loss that is minimized.
    pub loss: f32,
    /// Loss of the base method.
    pub invariance: f32,
    /// Equivariance loss before its weight; `None` where there is none.
    pub equivariance: Option<f32>,
    /// Fraction of tokens that are nearest to their own counterpart.
    pub matching: Option<f32>,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub lambda: f64,
    /// Momentum of the key or teacher encoder; `None` in a method without one.
    pub momentum: Option<f64>,
    /// Length of the gradient before clipping, where it is clipped.
    pub gradient: Option<f64>,
    /// Loss of an add-on before its weight; `None`, and not written, where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addon: Option<f32>,
}

impl Step {
    /// With the values of the regularizer. At λ = 0 it trains nothing, and they are left out.
    pub fn regularized(
        self,
        unweighted: &Tensor,
        accuracy: Option<&Tensor>,
        lambda: f64,
    ) -> Result<Self> {
        let number = |x: &Tensor| x.to_scalar::<f32>();
        if lambda == 0.0 {
            return Ok(self);
        }
        Ok(Self {
            equivariance: Some(number(unweighted)?),
            matching: accuracy.map(number).transpose()?,
            lambda,
            ..self
        })
    }
}

/// How the gradients of both losses compared at one step, by [`ser_reg::grad::GradientBalance`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balanced {
    /// Steps finished before this one.
    pub step: usize,
    /// The weight of the equivariance loss from the next step on.
    pub lambda: f64,
    /// On the parameters that both losses reach.
    pub shared: BalancedLayer,
    /// On the patch embedding, if it learns, and on each block.
    pub layers: Vec<BalancedLayer>,
}

/// The same on some parameters; `None` for what is not finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BalancedLayer {
    pub name: String,
    /// `‖∇L_inv‖`.
    pub norm_inv: Option<f64>,
    /// `‖∇L_equiv‖`, before λ.
    pub norm_equiv: Option<f64>,
    pub cosine: Option<f64>,
}

impl BalancedLayer {
    /// `‖∇L_equiv‖ / ‖∇L_inv‖`, where it has a value.
    pub fn ratio(&self) -> Option<f64> {
        finite(self.norm_equiv? / self.norm_inv?)
    }
}

/// The measurements after an epoch, on test images; empty where there were none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Epochs finished; 0 is the untrained encoder.
    pub epoch: usize,
    /// Steps finished.
    pub step: usize,
    /// Standard deviation of unit-length features times the root of their number: 1 fills all directions, 0 is collapse.
    pub feature_std: Option<f32>,
    /// Centered equivariance score of each block's output, the first block first; `None` where it has no value.
    pub equivariance: Vec<Option<f64>>,
    /// Weighted 20-NN accuracy in percent under each element of D4, the identity first.
    pub accuracy: Vec<f64>,
    /// Training images per second, and the share of that time spent waiting for images.
    pub images_per_s: f64,
    pub waiting: f64,
    /// Time that the regularizer takes over that of the rest of a step, by itself at a few steps; `None` where it was not
    /// timed.
    #[serde(default)]
    pub regularizer: Option<f64>,
    /// Further figures of the method (entropy of the teacher, say), by name.
    pub extra: std::collections::BTreeMap<String, f64>,
}

impl Epoch {
    /// Whether anything was measured besides the speed: evaluation may be rarer than epochs.
    pub fn is_measured(&self) -> bool {
        self.feature_std.is_some()
            || !(self.equivariance.is_empty() && self.accuracy.is_empty() && self.extra.is_empty())
    }
}
