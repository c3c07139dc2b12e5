//! The state that a resumed run needs: weights, moments, the step, and the configuration that they belong to.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor, Var, safetensors::Load};
use safetensors::SafeTensors;
use serde_json::Value;

use super::file;
use crate::{
    data::Fingerprint,
    encoder::{self, Card},
    optimizer::AdamW,
    records::Epoch,
    settings::Settings,
    weights::Weights,
};

/// Raised with each change that readers of the last version do not understand.
const VERSION: &str = "2";

/// The state of a training.
pub struct State {
    pub online: Weights,
    /// The key or teacher encoder.
    pub momentum: Option<Weights>,
    pub optimizer: AdamW,
    /// Buffers of a method: DINO's center.
    pub buffers: Vec<(&'static str, Var)>,
}

impl State {
    /// Of these weights, with AdamW. `momentum` is the key or teacher encoder.
    pub fn new(online: &Weights, momentum: Option<&Weights>) -> Result<Self> {
        Ok(Self {
            online: online.clone(),
            momentum: momentum.cloned(),
            optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?,
            buffers: Vec::new(),
        })
    }

    /// All variables, by the names they have in a checkpoint.
    fn vars(&self) -> Vec<(String, Var)> {
        let named = |part: &str, weights: &Weights| {
            let name = |(name, var)| (format!("{part}/{name}"), var);
            weights.named().into_iter().map(name).collect::<Vec<_>>()
        };
        let mut vars = named("online", &self.online);
        if let Some(momentum) = &self.momentum {
            vars.extend(named("momentum", momentum));
        }
        let buffer = |(name, var): &(&str, Var)| (format!("buffer/{name}"), var.clone());
        vars.extend(self.buffers.iter().map(buffer));
        vars
    }
}

/// What a checkpoint knows of its run besides the state.
pub struct Header<'a> {
    pub settings: &'a Settings,
    /// The images of the run.
    pub data: &'a Fingerprint,
    /// It lets the encoder in the checkpoint be evaluated.
    pub card: &'a Card,
    /// Steps made.
    pub step: usize,
    /// At the end of an epoch, its record as far as it is known before the evaluation.
    pub epoch: Option<&'a Epoch>,
}

/// Where a restored run goes on.
pub struct Restored {
    /// Steps made.
    pub step: usize,
    /// The epoch that has just ended, without its evaluation.
    pub epoch: Option<Epoch>,
}

/// Writes the state of a run.
///
/// Nothing else is random: what a step draws follows from `settings.seed` and its number.
pub fn save(path: &Path, state: &State, header: &Header) -> Result<()> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (name, var) in state.vars() {
        tensors.push((name, var.as_detached_tensor()));
    }
    for (name, tensor) in state.optimizer.state()? {
        tensors.push((format!("optimizer/{name}"), tensor));
    }
    let metadata = HashMap::from([
        ("version".to_string(), VERSION.to_string()),
        ("step".to_string(), header.step.to_string()),
        ("settings".to_string(), serde_json::to_string(header.settings)?),
        ("data".to_string(), serde_json::to_string(header.data)?),
        ("epoch".to_string(), serde_json::to_string(&header.epoch)?),
        encoder::metadata(header.card)?,
    ]);
    let bytes =
        safetensors::serialize(tensors.iter().map(|(name, t)| (name.as_str(), t)), Some(metadata))?;
    file::write(path, &bytes)
}

/// Restores the state of a run with these settings and images.
///
/// Fails without having changed anything.
pub fn restore(
    path: &Path,
    state: &mut State,
    settings: &Settings,
    data: &Fingerprint,
) -> Result<Restored> {
    let bytes = file::read(path)?;
    let load = || -> Result<(Restored, HashMap<String, Tensor>)> {
        let (_, header) =
            SafeTensors::read_metadata(&bytes).context("truncated or not a checkpoint")?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| {
            let value = metadata.get(name);
            value.with_context(|| {
                format!("not a checkpoint of this version: the header has no {name}")
            })
        };
        let version = field("version")?;
        ensure!(version == VERSION, "expected a checkpoint of version {VERSION}, got {version}");
        let saved: Value = serde_json::from_str(field("settings")?)?;
        let differences = Settings::differences(&saved, &serde_json::to_value(settings)?);
        ensure!(
            differences.is_empty(),
            "the checkpoint is of another configuration; it had {}. Give these options again, or another --out",
            differences.join("; ")
        );
        let of: Fingerprint = serde_json::from_str(field("data")?)?;
        ensure!(
            of == *data,
            "--data: expected the images that the run began with, {of}, got {data}. Put the files back, or give another \
             --out for a new run"
        );
        let restored = Restored {
            step: field("step")?.parse().context("step is no number")?,
            epoch: serde_json::from_str(field("epoch")?)?,
        };
        let tensors = SafeTensors::deserialize(&bytes).context("truncated or damaged")?;
        let load = |(name, view): (String, safetensors::tensor::TensorView)| {
            Ok((name, view.load(&Device::Cpu)?))
        };
        let tensors = tensors.tensors().into_iter().map(load);
        Ok((restored, tensors.collect::<Result<_>>()?))
    };
    let cannot = || format!("cannot resume from {}", path.display());
    let (restored, tensors) = load().with_context(cannot)?;
    let vars = state.vars();
    for (name, var) in &vars {
        match tensors.get(name) {
            Some(t) if t.shape() == var.shape() && t.dtype() == var.dtype() => {}
            Some(t) => {
                let (want, got) = (var.shape(), t.shape());
                return Err(anyhow::anyhow!(
                    "{name}: expected {want:?} {:?}, got {got:?} {:?}",
                    var.dtype(),
                    t.dtype()
                ))
                .with_context(cannot);
            }
            None => bail!("{}: it has no {name}", cannot()),
        }
    }
    let moments = tensors.iter().filter_map(|(name, t)| {
        let name = name.strip_prefix("optimizer/")?;
        Some((name.to_string(), t.clone()))
    });
    state.optimizer.restore(&moments.collect()).with_context(cannot)?;
    for (name, var) in &vars {
        var.set(&tensors[name].to_device(var.device())?)?;
    }
    Ok(restored)
}
