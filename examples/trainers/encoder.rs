//! A trained encoder on disk: one safetensors file whose header says how to build the model.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::{
    finite,
    settings::{Method, Settings},
    vit::{Vit, VitConfig},
};

/// Key of the header's metadata under which the card stands.
const CARD: &str = "ser_reg_encoder";

/// What one must know of an encoder besides its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    pub vit: VitConfig,
    /// Mean and standard deviation of each channel, which normalize the images.
    pub statistics: Vec<(f32, f32)>,
    /// The block whose output the equivariance loss compared, counted from 1.
    pub layer: usize,
    /// `moco_v3`, `dino` or `barlow_twins`.
    pub method: String,
    /// `ser`, `lambda0` or `baseline`.
    pub mode: String,
    pub seed: u64,
    /// Which network of the method this is.
    #[serde(default)]
    pub network: Network,
}

/// Which network of a method is the encoder that is evaluated and exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The encoder that gradients train. Files of older versions hold it for all methods, without a name.
    #[default]
    Encoder,
    /// The moving average of the student: DINO's encoder, as in its paper (arXiv 2104.14294, section 5.2).
    Teacher,
}

impl Network {
    /// The network that the paper of this method evaluates. MoCo-v3 takes its encoder, not the key encoder.
    pub fn of(method: Method) -> Self {
        match method {
            Method::MocoV3 | Method::BarlowTwins => Self::Encoder,
            Method::Dino => Self::Teacher,
        }
    }

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Teacher => "teacher",
        }
    }

    /// What the names of the encoder's weights begin with in a checkpoint.
    fn in_checkpoint(self) -> &'static str {
        match self {
            Self::Encoder => "online/encoder.",
            Self::Teacher => "momentum/encoder.",
        }
    }
}

impl Card {
    /// `vit`, the encoder that a run wants, as the one that starts from this file: its CLS token joins where it was trained to.
    ///
    /// # Errors
    /// If both differ in anything that a forward pass depends on: the names of the fields.
    pub fn fitted(&self, vit: VitConfig) -> Result<VitConfig> {
        let fitted = VitConfig { cls_after: self.vit.cls_after, ..vit };
        // These belong to a run and not to its weights.
        let own = VitConfig {
            last_map: fitted.last_map,
            frozen_patches: fitted.frozen_patches,
            drop_path: fitted.drop_path,
            ..self.vit.clone()
        };
        let [file, run] = [&own, &fitted].map(serde_json::to_value);
        let differences = Settings::differences(&file?, &run?);
        ensure!(
            differences.is_empty(),
            "expected an encoder like that of this run, got one with {}",
            differences.join("; ")
        );
        Ok(fitted)
    }
}

/// Bytes of the file: tensors under the names that [`Vit::new`] asks for, the card in the header.
pub fn to_bytes(weights: &[(String, Tensor)], card: &Card) -> Result<Vec<u8>> {
    let metadata = HashMap::from([metadata(card)?]);
    let tensors = weights.iter().map(|(name, t)| (name.as_str(), t));
    Ok(safetensors::serialize(tensors, Some(metadata))?)
}

/// The metadata that makes a file with an encoder in it one that [`read`] understands.
pub fn metadata(card: &Card) -> Result<(String, String)> {
    Ok((CARD.to_string(), serde_json::to_string(card)?))
}

/// The encoder in `path`, frozen.
pub fn load(path: &Path, device: &Device) -> Result<(Vit, Card)> {
    let (weights, card) = read(path, device)?;
    let vb = VarBuilder::from_tensors(weights, DType::F32, device);
    let vit = Vit::new(&card.vit, vb);
    Ok((vit.with_context(|| cannot_load(path))?, card))
}

/// Its weights, under the names that [`Vit::new`] asks for, and its card: from an exported encoder, or from a checkpoint, which
/// holds more.
///
/// # Errors
/// If the file is no encoder of this version, or a weight is not finite.
pub fn read(path: &Path, device: &Device) -> Result<(HashMap<String, Tensor>, Card)> {
    let read = || {
        let bytes = std::fs::read(path)?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).context("truncated, or not a safetensors file")?;
        let card = header.metadata().as_ref().and_then(|m| m.get(CARD));
        let card = card.with_context(|| {
            format!("expected the header to hold {CARD}; was this file written by a trainer?")
        })?;
        let card: Card = serde_json::from_str(card)
            .with_context(|| format!("{CARD} in the header is of another version"))?;
        ensure!(
            card.statistics.len() == card.vit.channels,
            "expected statistics of {} channels, got {}",
            card.vit.channels,
            card.statistics.len()
        );
        let mut weights = candle_core::safetensors::load_buffer(&bytes, device)?;
        let prefix = card.network.in_checkpoint();
        if weights.keys().any(|name| name.starts_with(prefix)) {
            weights = weights
                .into_iter()
                .filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_string(), t)))
                .collect();
        }
        finite::ensure_weights(weights.iter().map(|(name, t)| (name.as_str(), t)))?;
        Ok((weights, card))
    };
    read().with_context(|| cannot_load(path))
}

fn cannot_load(path: &Path) -> String {
    format!("cannot load the encoder {}", path.display())
}
