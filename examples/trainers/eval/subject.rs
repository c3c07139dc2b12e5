//! An encoder under evaluation, with what it takes to build it again for images of another size.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use ser_reg::tap;

use crate::{
    data::Images,
    encoder::{self, Card},
    finite,
    run::file,
    settings::Settings,
    vit::{Positions, Vit, VitConfig},
    weights::Weights,
};

/// A frozen encoder.
pub struct Subject {
    /// What it is called in tables.
    pub name: String,
    pub vit: Vit,
    pub card: Card,
    pub device: Device,
    weights: HashMap<String, Tensor>,
}

impl Subject {
    /// The block whose tokens are read: the one that `--dense-layer` names, or the regularized one.
    pub fn layer(&self, named: Option<usize>) -> Result<usize> {
        let (layer, depth) = (named.unwrap_or(self.card.layer), self.card.vit.depth);
        ensure!(
            (1..=depth).contains(&layer),
            "--dense-layer: expected one of the {depth} blocks, got {layer}"
        );
        Ok(layer)
    }

    /// From weights under the names that [`Vit::new`] asks for.
    pub fn new(
        name: impl Into<String>,
        weights: impl IntoIterator<Item = (String, Tensor)>,
        card: &Card,
        device: &Device,
    ) -> Result<Self> {
        // Outside the graph: nothing is kept for a backward pass.
        let weights: HashMap<_, _> = weights.into_iter().map(|(n, t)| (n, t.detach())).collect();
        let vb = VarBuilder::from_tensors(weights.clone(), DType::F32, device);
        Ok(Self {
            name: name.into(),
            vit: Vit::new(&card.vit, vb)?,
            card: card.clone(),
            device: device.clone(),
            weights,
        })
    }

    /// From an exported encoder, a checkpoint, or the folder of a run.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let (weights, card) = encoder::read(&file(path), device)?;
        Self::new("encoder", weights, &card, device)
            .with_context(|| format!("cannot load the encoder {}", path.display()))
    }

    /// The same under another name.
    pub fn named(self, name: impl Into<String>) -> Self {
        let name = name.into();
        Self { name, ..self }
    }

    /// The encoder of `card` before its first step.
    pub fn untrained(card: &Card, device: &Device) -> Result<Self> {
        let weights = Weights::seeded(card.seed);
        Vit::new(&card.vit, weights.builder(device).pp("encoder"))?;
        let strip = |name: String| name.trim_start_matches("encoder.").to_string();
        let named = weights.named().into_iter();
        let tensors = named.map(|(name, var)| (strip(name), var.as_detached_tensor()));
        Self::new("untrained encoder", tensors, card, device)
    }

    /// The same weights for square images of `side` pixels, with the tokens of every block.
    pub fn at_side(&self, side: usize) -> Result<Vit> {
        let config = VitConfig { side, last_map: true, ..self.card.vit.clone() };
        ensure!(
            side == self.card.vit.side || self.any_side(),
            "expected images of side {}, which the trained positions of this encoder are for, got {side}",
            self.card.vit.side
        );
        let vb = VarBuilder::from_tensors(self.weights.clone(), DType::F32, &self.device);
        Ok(Vit::new(&config, vb)?)
    }

    /// Whether positions are computed, not trained.
    pub fn any_side(&self) -> bool {
        matches!(self.card.vit.positions, Positions::SinCos | Positions::None)
    }

    /// Features `(n, d)` of normalized images.
    ///
    /// # Errors
    /// If a feature is not finite: the layer in which such a value appears first.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        finite::features(&self.vit, self.weights(), x).with_context(|| self.name.clone())
    }

    /// The grid tokens `(n, N, d)` of block `layer` of `vit`, this encoder or what [`Self::at_side`] made of it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn tokens(&self, vit: &Vit, x: &Tensor, layer: usize) -> Result<Tensor> {
        let tokens = finite::encode(vit, self.weights(), x, |x| {
            let map = tap::capture_until(&format!("block{layer}"), || vit.forward(x))?;
            let prefix = vit.config().prefix(layer);
            map.narrow(1, prefix, map.dim(1)? - prefix)?.contiguous()
        });
        tokens.with_context(|| self.name.clone())
    }

    fn weights(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.weights.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Fails unless the encoder takes such images.
    pub fn expect(&self, images: &Images) -> Result<()> {
        let (expected, got) =
            ((self.card.vit.channels, self.card.vit.side), (images.channels, images.side));
        ensure!(
            expected == got,
            "the {}: expected images of (channels, side) {expected:?}, which it was trained on, got {got:?}",
            self.name
        );
        Ok(())
    }
}

/// The images that the run was trained on to which `weights`, a file in its folder, belongs: where its configuration says
/// so; `None` if there is no run, or it took the repository's.
pub fn data_of_run(weights: &Path) -> Result<Option<PathBuf>> {
    let config = weights.with_file_name("config.json");
    if !file::exists(&config)? {
        return Ok(None);
    }
    let read = || -> Result<Option<PathBuf>> {
        let settings: Settings = serde_json::from_slice(&std::fs::read(&config)?)?;
        Ok(settings.data)
    };
    read().with_context(|| format!("cannot read {}", config.display()))
}

/// The file itself, or what a run leaves in its folder: the encoder when it is finished, before that its checkpoint.
pub fn file(path: &Path) -> PathBuf {
    if !path.is_dir() {
        return path.to_path_buf();
    }
    let (encoder, checkpoint) =
        (path.join("encoder.safetensors"), path.join("checkpoint.safetensors"));
    match !encoder.exists() && checkpoint.exists() {
        true => checkpoint,
        false => encoder,
    }
}
