//! Trainable weights from a seed, and their moving average.
//!
//! candle cannot seed its CPU generator, so a `VarMap` starts every run with other values. This store implements the same
//! `VarBuilder` interface, for any module that takes a builder.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

use super::vit::VitConfig;

/// Variables by name, in the order in which modules asked for them.
#[derive(Clone)]
pub struct Weights(Arc<Mutex<Store>>);

struct Store {
    vars: Vec<(String, Var)>,
    source: Source,
}

enum Source {
    /// Draw new values; hand out variables.
    Seed(Box<StdRng>),
    /// Copy the values of other weights; hand out tensors that no gradient reaches.
    Copy(Vec<(String, Var)>),
}

impl Weights {
    /// Weights that are drawn from `seed` when a module requests them.
    pub fn seeded(seed: u64) -> Self {
        Self::new(Source::Seed(Box::new(StdRng::seed_from_u64(seed))))
    }

    /// A copy of these weights outside the graph: modules built from it keep no activations for a backward pass.
    pub fn momentum_copy(&self) -> Self {
        Self::new(Source::Copy(self.named()))
    }

    fn new(source: Source) -> Self {
        let vars = Vec::new();
        Self(Arc::new(Mutex::new(Store { vars, source })))
    }

    /// The builder that modules take.
    pub fn builder(&self, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, device.clone())
    }

    /// All variables with their names.
    pub fn named(&self) -> Vec<(String, Var)> {
        self.lock().vars.clone()
    }

    /// Moves each weight towards the one of the same name in `online`: `w ← m·w + (1 − m)·online`.
    pub fn follow(&self, online: &Weights, m: f64) -> Result<()> {
        let online = online.lock();
        for (name, var) in &self.lock().vars {
            let target = find(&online.vars, name)
                .with_context(|| format!("no weight {name} to follow"))?
                .as_detached_tensor();
            var.set(&((var.as_detached_tensor() * m)? + (target * (1.0 - m))?)?)?;
        }
        Ok(())
    }

    /// Sets the weights whose names begin with `prefix` to `tensors`, which lack it in their names.
    ///
    /// # Errors
    /// If a name is in one of both only, or a shape differs. Nothing is changed then.
    pub fn load(&self, prefix: &str, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let own = under(&self.named(), prefix);
        let own = own.iter().map(|(name, var)| (&name[prefix.len()..], var));
        let own: HashMap<&str, &Var> = own.collect();
        let mut problems: Vec<String> = Vec::new();
        for (name, var) in &own {
            match tensors.get(*name) {
                None => problems.push(format!("{name} is missing in the file")),
                Some(t) if t.shape() != var.shape() => problems.push(format!(
                    "{name}: expected {:?}, got {:?}",
                    var.shape(),
                    t.shape()
                )),
                Some(_) => {}
            }
        }
        let extra = tensors.keys().filter(|name| !own.contains_key(name.as_str()));
        problems.extend(extra.map(|name| format!("{name} is not in this encoder")));
        problems.sort();
        ensure!(problems.is_empty(), "the weights do not fit: {}", problems.join("; "));
        for (name, var) in own {
            let value = tensors[name].to_dtype(var.dtype())?.to_device(var.device())?;
            var.set(&value)?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Store> {
        // The lock is held for look-ups only; a panic leaves the store intact.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The parameters whose names begin with `prefix`.
pub fn under(named: &[(String, Var)], prefix: &str) -> Vec<(String, Var)> {
    let begins = |(name, _): &&(String, Var)| name.starts_with(prefix);
    named.iter().filter(begins).cloned().collect()
}

/// The parameters that the regularizer's loss must reach: patches, blocks up to `layer`, and its projector.
pub fn tapped(named: &[(String, Var)], vit: &VitConfig, layer: usize) -> Vec<(String, Var)> {
    let mut vars = under(named, "ser.");
    if !vit.frozen_patches {
        vars.extend(under(named, "encoder.patch."));
    }
    for block in 1..=layer {
        vars.extend(under(named, &format!("encoder.block{block}.")));
    }
    vars
}

/// The encoder's parameters that learn.
pub fn trained(named: &[(String, Var)], vit: &VitConfig) -> Vec<(String, Var)> {
    let mut vars = under(named, "encoder.");
    vars.retain(|(name, _)| !(vit.frozen_patches && name.starts_with("encoder.patch.")));
    vars
}

fn find<'a>(vars: &'a [(String, Var)], name: &str) -> Option<&'a Var> {
    vars.iter().find(|(n, _)| n == name).map(|(_, v)| v)
}

impl SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let Store { vars, source } = &mut *self.lock();
        if find(vars, name).is_some() {
            bail!("weight {name} is asked for twice; expected each name once");
        }
        let value = match source {
            Source::Seed(rng) => draw(&shape, init, rng)?.to_device(device)?.to_dtype(dtype)?,
            Source::Copy(from) => match find(from, name) {
                Some(var) if var.shape() == &shape => var.as_detached_tensor().copy()?,
                Some(var) => bail!("weight {name}: expected {shape:?}, got {:?}", var.shape()),
                None => bail!("no weight {name} to copy"),
            },
        };
        let var = Var::from_tensor(&value)?;
        let tensor = match source {
            Source::Seed(_) => var.as_tensor().clone(),
            // Shares the storage of the variable, so that the module sees what `follow` writes.
            Source::Copy(_) => var.as_detached_tensor(),
        };
        vars.push((name.to_string(), var));
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        bail!("weight {name}: expected a shape to make it with")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        find(&self.lock().vars, name).is_some()
    }
}

/// Initial values, always drawn on the CPU so that every device starts from the same ones.
fn draw(shape: &Shape, init: Init, rng: &mut StdRng) -> candle_core::Result<Tensor> {
    let n = shape.elem_count();
    let mut uniform = |lo: f64, up: f64| -> Vec<f32> {
        let draw = |_| (lo + (up - lo) * rng.random::<f64>()) as f32;
        (0..n).map(draw).collect()
    };
    let values = match init {
        Init::Const(value) => vec![value as f32; n],
        Init::Uniform { lo, up } => uniform(lo, up),
        Init::Randn { mean, stdev } => normal(n, mean, stdev, rng),
        Init::Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                candle_nn::init::NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    uniform(-bound, bound)
                }
                candle_nn::init::NormalOrUniform::Normal => normal(n, 0.0, std, rng),
            }
        }
    };
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Normal numbers.
fn normal(n: usize, mean: f64, std: f64, rng: &mut StdRng) -> Vec<f32> {
    let draw = |_| {
        let z: f64 = StandardNormal.sample(rng);
        (mean + std * z) as f32
    };
    (0..n).map(draw).collect()
}
