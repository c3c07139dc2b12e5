//! AdamW (arXiv 1711.05101) with weight decay on matrices only, and with moments that can be saved.
//!
//! candle-nn's AdamW keeps its moments private, so a run that uses it cannot be resumed; it counts steps once for all
//! parameters, so the moments of one that joins late (DINO's frozen last layer) are not corrected for their bias; and it
//! decays everything that it is given.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{
    CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Tensor, Var, backprop::GradStore, bail,
};
use rayon::prelude::*;

/// `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`, `w ← (1 − ηλ)w − η·m̂ / (√v̂ + eps)` with `m̂ = m/(1 − β₁ᵗ)`,
/// `v̂ = v/(1 − β₂ᵗ)`; λ is zero for vectors (biases, scales, shifts, CLS).
pub struct AdamW {
    parameters: Vec<Parameter>,
    betas: (f64, f64),
    eps: f64,
    /// Whether `f32` on the CPU is updated in place, on all threads; the values are the same either way.
    pub fused: bool,
}

struct Parameter {
    name: String,
    var: Var,
    decays: bool,
    first: Tensor,
    second: Tensor,
    /// Steps in which this parameter had a gradient.
    steps: u32,
}

impl AdamW {
    pub fn new(named: &[(String, Var)], betas: (f64, f64), eps: f64) -> Result<Self> {
        let parameter = |(name, var): &(String, Var)| {
            Ok(Parameter {
                name: name.clone(),
                var: var.clone(),
                decays: var.dims().iter().filter(|&&d| d > 1).count() > 1,
                first: var.as_detached_tensor().zeros_like()?,
                second: var.as_detached_tensor().zeros_like()?,
                steps: 0,
            })
        };
        Ok(Self {
            parameters: named.iter().map(parameter).collect::<Result<_>>()?,
            betas,
            eps,
            fused: true,
        })
    }

    /// Moves every parameter that has a gradient in `grads`; the others, and their moments, stay as they are.
    pub fn step(&mut self, grads: &GradStore, learning_rate: f64, weight_decay: f64) -> Result<()> {
        let (beta1, beta2) = self.betas;
        for parameter in &mut self.parameters {
            let Some(grad) = grads.get(&parameter.var) else {
                continue;
            };
            parameter.steps += 1;
            let t = f64::from(parameter.steps);
            let decay = if parameter.decays { weight_decay } else { 0.0 };
            let rule = Rule {
                betas: self.betas,
                keep: 1.0 - learning_rate * decay,
                rate: learning_rate / (1.0 - beta1.powf(t)),
                scale: 1.0 / (1.0 - beta2.powf(t)),
                eps: self.eps,
            };
            let (device, dtype) = (parameter.var.device(), parameter.var.dtype());
            let advanced = match self.fused && device.is_cpu() && dtype == DType::F32 {
                true => parameter.advance_fused(grad, &rule),
                false => parameter.advance_plain(grad, &rule),
            };
            advanced.with_context(|| format!("AdamW step of {}", parameter.name))?;
        }
        Ok(())
    }

    /// Copies of what the next step depends on besides the weights: `NAME.first`, `NAME.second` and `NAME.steps`.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::with_capacity(3 * self.parameters.len());
        for p in &self.parameters {
            // The step overwrites moments in place, so a shared tensor would change under the caller.
            state.push((format!("{}.first", p.name), p.first.copy()?));
            state.push((format!("{}.second", p.name), p.second.copy()?));
            let steps = Tensor::new(p.steps, p.var.device())?;
            state.push((format!("{}.steps", p.name), steps));
        }
        Ok(state)
    }

    /// Takes up what [`AdamW::state`] gave; on an error nothing is changed. Other names in `state` are ignored.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let get = |p: &Parameter, part: &str, dims: &[usize], dtype: DType| -> Result<Tensor> {
            let name = format!("{}.{part}", p.name);
            let tensor = state
                .get(&name)
                .with_context(|| format!("expected {name} in the optimizer's state, got none"))?;
            ensure!(
                tensor.dims() == dims && tensor.dtype() == dtype,
                "{name}: expected {dims:?} of {dtype:?}, got {:?} of {:?}",
                tensor.dims(),
                tensor.dtype()
            );
            // A tensor of its own: see `state`.
            Ok(tensor.to_device(p.var.device())?.copy()?)
        };
        let restored = self.parameters.iter().map(|p| {
            let (dims, dtype) = (p.var.dims(), p.var.dtype());
            let steps = get(p, "steps", &[], DType::U32)?.to_scalar()?;
            Ok((get(p, "first", dims, dtype)?, get(p, "second", dims, dtype)?, steps))
        });
        let restored = restored.collect::<Result<Vec<_>>>()?;
        for (p, (first, second, steps)) in self.parameters.iter_mut().zip(restored) {
            (p.first, p.second, p.steps) = (first, second, steps);
        }
        Ok(())
    }
}

/// The numbers of one step of one parameter.
struct Rule {
    betas: (f64, f64),
    /// `1 − ηλ`
    keep: f64,
    /// `η / (1 − β₁ᵗ)`
    rate: f64,
    /// `1 / (1 − β₂ᵗ)`
    scale: f64,
    eps: f64,
}

impl Parameter {
    /// In candle operations: any device and type.
    fn advance_plain(&mut self, grad: &Tensor, rule: &Rule) -> candle_core::Result<()> {
        let (beta1, beta2) = rule.betas;
        // A gradient from candle may hang on the graph of its step; moments would keep the graphs of all steps.
        let grad = &grad.detach();
        self.first = ((&self.first * beta1)? + (grad * (1.0 - beta1))?)?;
        self.second = ((&self.second * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let length = ((&self.second * rule.scale)?.sqrt()? + rule.eps)?;
        let kept = (self.var.as_detached_tensor() * rule.keep)?;
        self.var.set(&(kept - ((&self.first * rule.rate)? / length)?)?)
    }

    /// The same roundings, in place and on all threads.
    fn advance_fused(&mut self, grad: &Tensor, rule: &Rule) -> candle_core::Result<()> {
        let grad = grad.contiguous()?;
        let (beta1, beta2) = rule.betas;
        self.first.inplace_op2(&grad, &Moment { beta: beta1, power: 1 })?;
        self.second.inplace_op2(&grad, &Moment { beta: beta2, power: 2 })?;
        self.var.inplace_op3(&self.first, &self.second, rule)
    }
}

/// Values that one task works on.
const PIECE: usize = 1 << 14;

/// `m ← βm + (1 − β)gᵖ` with `p` as `power`, 1 or 2.
struct Moment {
    beta: f64,
    power: u32,
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adam-moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (moment, grad) = (floats_mut(moment, layout)?, floats(grad, grad_layout)?);
        let (beta, rest) = (self.beta as f32, (1.0 - self.beta) as f32);
        let pieces = moment.par_chunks_mut(PIECE).zip(grad.par_chunks(PIECE));
        pieces.for_each(|(moment, grad)| {
            let pairs = moment.iter_mut().zip(grad);
            match self.power {
                1 => pairs.for_each(|(m, g)| *m = *m * beta + g * rest),
                _ => pairs.for_each(|(m, g)| *m = *m * beta + g * g * rest),
            }
        });
        Ok(())
    }
}

impl InplaceOp3 for Rule {
    fn name(&self) -> &'static str {
        "adam-step"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> candle_core::Result<()> {
        let weights = floats_mut(weights, layout)?;
        let (first, second) = (floats(first, first_layout)?, floats(second, second_layout)?);
        let [keep, rate, scale, eps] =
            [self.keep, self.rate, self.scale, self.eps].map(|v| v as f32);
        let moments = first.par_chunks(PIECE).zip(second.par_chunks(PIECE));
        let pieces = weights.par_chunks_mut(PIECE).zip(moments);
        pieces.for_each(|(weights, (first, second))| {
            for ((w, m), v) in weights.iter_mut().zip(first).zip(second) {
                *w = *w * keep - m * rate / ((v * scale).sqrt() + eps);
            }
        });
        Ok(())
    }
}

/// The values behind a contiguous layout.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected a contiguous tensor, got {layout:?}"),
    }
}

fn floats_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => bail!("expected a contiguous f32 tensor, got {layout:?}"),
    }
}
