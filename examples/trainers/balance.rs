//! The comparison of the gradients of both losses within a run, and the λ that follows it.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use ser_reg::{
    Schedule,
    grad::{GradientBalance, GradientPair, LambdaBalancer, LambdaConfig},
};
use serde::{Deserialize, Serialize};

use super::{
    records::{Balanced, BalancedLayer, finite},
    settings::Ser,
    vit::VitConfig,
    weights::Weights,
};

/// Steps between measurements, if λ is to follow them and nothing is said.
const EVERY: usize = 50;

/// When a run compares both gradients, and what it does with λ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BalanceRule {
    /// Steps between two measurements, the first of which is at the first step.
    pub every: usize,
    /// `λ‖∇L_equiv‖ / ‖∇L_inv‖` to aim at; none: λ stays as it is.
    pub target: Option<f64>,
}

impl BalanceRule {
    /// The rule of the options; `None` if neither is given.
    pub fn new(every: Option<usize>, target: Option<f64>) -> Option<Self> {
        (every.is_some() || target.is_some())
            .then_some(Self { every: every.unwrap_or(EVERY), target })
    }

    /// Checks the target, for a run with this λ.
    pub fn check(&self, lambda: f64) -> Result<()> {
        ensure!(
            lambda > 0.0,
            "--balance-every, --balance-target: expected a run with the regularizer, without --baseline and with --lambda \
             above 0: there is no second gradient"
        );
        if let Some(target) = self.target {
            ensure!(
                (1e-6..=1e6).contains(&target),
                "--balance-target: expected a ratio above 0, from 1e-6 to 1e6, got {target:e}"
            );
        }
        Ok(())
    }
}

/// λ over a run, and the measurements that move it.
pub struct Balance {
    rule: Option<BalanceRule>,
    /// λ over the steps where no measurement moves it.
    planned: Schedule,
    /// The balancer's λ, 0 before its first measurement. It is a variable so that a checkpoint holds it.
    average: Var,
    prefixes: Vec<String>,
}

impl Balance {
    /// Over `steps` steps.
    pub fn new(ser: &Ser, vit: &VitConfig, steps: usize) -> Result<Self> {
        let mut prefixes: Vec<String> =
            (1..=vit.depth).map(|block| format!("encoder.block{block}")).collect();
        if !vit.frozen_patches {
            prefixes.insert(0, "encoder.patch".to_string());
        }
        Ok(Self {
            rule: ser.balance,
            planned: Schedule::cosine(
                ser.loss.lambda,
                ser.final_lambda.unwrap_or(ser.loss.lambda),
                steps,
            )?,
            average: Var::zeros((), DType::F64, &Device::Cpu)?,
            prefixes,
        })
    }

    /// The variables for a checkpoint: none, unless λ follows the measurements.
    pub fn buffers(&self) -> Vec<(&'static str, Var)> {
        let follows = self.rule.is_some_and(|rule| rule.target.is_some());
        follows.then(|| ("lambda", self.average.clone())).into_iter().collect()
    }

    /// The weight of the equivariance loss in this step.
    pub fn lambda(&self, step: usize) -> Result<f64> {
        match self.average.to_scalar::<f64>()? {
            0.0 => Ok(self.planned.at(step)),
            lambda => Ok(lambda),
        }
    }

    /// If it is due, compares both gradients on the parameters `online` and sets λ for the next steps. The graph
    /// of both losses stays as it was.
    pub fn measure(
        &self,
        step: usize,
        invariance: &Tensor,
        equivariance: &Tensor,
        online: &Weights,
    ) -> Result<Option<Balanced>> {
        let Some(rule) = self.rule.filter(|rule| step.is_multiple_of(rule.every)) else {
            return Ok(None);
        };
        let prefixes: Vec<&str> = self.prefixes.iter().map(String::as_str).collect();
        let balance =
            GradientBalance::of_losses(invariance, equivariance, online.named(), &prefixes)?;
        // A measurement without a suggestion must not count as the first one.
        if let Some(target_ratio) = rule.target
            && balance.suggested_lambda(target_ratio)?.is_some()
        {
            let initial = self.planned.at(step);
            let config = LambdaConfig { target_ratio, initial, ..Default::default() };
            let mut balancer = match self.average.to_scalar::<f64>()? {
                0.0 => LambdaBalancer::new(config)?,
                average => LambdaBalancer::resume(config, average)?,
            };
            let next = balancer.update(&balance);
            self.average.set(&Tensor::new(next, &Device::Cpu)?)?;
        }
        Ok(Some(Balanced {
            step,
            lambda: self.lambda(step + 1)?,
            shared: layer(&balance.shared),
            layers: balance.groups.iter().map(layer).collect(),
        }))
    }
}

fn layer(pair: &GradientPair) -> BalancedLayer {
    BalancedLayer {
        name: pair.name.trim_start_matches("encoder.").to_string(),
        norm_inv: finite(pair.norm_inv),
        norm_equiv: finite(pair.norm_equiv),
        cosine: finite(pair.cosine),
    }
}
