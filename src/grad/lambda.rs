//! The weight of a regularizer that keeps a target ratio of gradients.

use super::{GradientBalance, balance::check_positive};
use crate::{Error, Result};

/// The settings of a [`LambdaBalancer`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LambdaConfig {
    /// The target of `‖λ∇L_equiv‖ / ‖∇L_inv‖`; finite and above 0.
    pub target_ratio: f64,
    /// The weight of the old value in the moving average, in `[0, 1)`.
    pub momentum: f64,
    /// `λ` before the first suggestion, clamped to the bounds; finite and above 0.
    pub initial: f64,
    /// The smallest `λ`; finite and above 0.
    pub min: f64,
    /// The largest `λ`, which bounds the suggestion for a vanishing equivariance gradient; finite
    /// and at least `min`.
    pub max: f64,
}

impl Default for LambdaConfig {
    /// Target ratio 0.2, momentum 0.9, `λ` from 1, between 1e-3 and 1e3.
    fn default() -> Self {
        Self { target_ratio: 0.2, momentum: 0.9, initial: 1.0, min: 1e-3, max: 1e3 }
    }
}

/// `λ` over training: a moving average of the suggestions of each [`GradientBalance`].
///
/// ```text
/// log λ ← m·log λ + (1 − m)·log(target / ratio), clamped to [min, max]
/// ```
///
/// In the average of logarithms a factor of 2 and a factor of 1/2 cancel. The first suggestion is
/// taken without averaging. A measurement without a suggestion, as with a gradient that is NaN or
/// infinite, leaves `λ` unchanged.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad::{GradientBalance, LambdaBalancer, LambdaConfig};
/// let mut balancer = LambdaBalancer::new(LambdaConfig { target_ratio: 0.1, momentum: 0.5, ..Default::default() })?;
/// let w = Var::new(1f32, &Device::Cpu)?;
/// for (scale, lambda) in [(1., 0.1), (4., 0.05)] {
///     let equiv = (w.as_tensor() * scale)?;
///     let balance = GradientBalance::of_losses(&w, &equiv, [("w", &w)], &[])?;
///     assert!((balancer.update(&balance) - lambda).abs() < 1e-12);
/// }
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambdaBalancer {
    config: LambdaConfig,
    lambda: Option<f64>,
}

impl LambdaBalancer {
    /// A balancer at `config.initial`.
    ///
    /// # Errors
    /// If the target, a bound or the initial value is not finite and above 0. If `min` exceeds
    /// `max`, or the momentum is not in `[0, 1)`.
    pub fn new(config: LambdaConfig) -> Result<Self> {
        check_positive("LambdaConfig::target_ratio", config.target_ratio)?;
        check_positive("LambdaConfig::initial", config.initial)?;
        check_positive("LambdaConfig::min", config.min)?;
        check_positive("LambdaConfig::max", config.max)?;
        if config.min > config.max {
            let expected = format!("at least min, {:?}", config.min);
            return Err(Error::config("LambdaConfig::max", expected, config.max));
        }
        if !(0.0..1.0).contains(&config.momentum) {
            return Err(Error::config(
                "LambdaConfig::momentum",
                "the weight of the old value, in [0, 1)",
                config.momentum,
            ));
        }
        Ok(Self { config, lambda: None })
    }

    /// A balancer whose average is `lambda`, clamped to the bounds, to resume from a checkpoint.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if `lambda` is not finite and above 0.
    pub fn resume(config: LambdaConfig, lambda: f64) -> Result<Self> {
        check_positive("lambda", lambda)?;
        let new = Self::new(config)?;
        Ok(Self { lambda: Some(lambda.clamp(config.min, config.max)), ..new })
    }

    /// The current `λ`, within its bounds.
    pub fn lambda(&self) -> f64 {
        let LambdaConfig { initial, min, max, .. } = self.config;
        self.lambda.unwrap_or(initial).clamp(min, max)
    }

    /// Adds a measurement to the average, and returns `λ`.
    pub fn update(&mut self, balance: &GradientBalance) -> f64 {
        // `new` has checked the target, so an error cannot occur.
        if let Ok(Some(suggested)) = balance.suggested_lambda(self.config.target_ratio) {
            let m = self.config.momentum;
            let next = match self.lambda {
                Some(old) => (m * old.ln() + (1.0 - m) * suggested.ln()).exp(),
                None => suggested,
            };
            self.lambda = Some(next.clamp(self.config.min, self.config.max));
        }
        self.lambda()
    }
}
