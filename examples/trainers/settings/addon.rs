//! The loss of another method, added to the base method's.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Preset;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum AddonName {
    /// Predicts how an augmentation moves the embedding (arXiv 2211.01244).
    EquiMod,
    /// Tells how two augmentations differ (arXiv 2111.09613).
    AugSelf,
    /// Tells which way up a small crop is (arXiv 2111.00899).
    ESsl,
    /// Applies a transformation seen on another image (arXiv 2501.08712).
    Stl,
    /// Keeps inner products (arXiv 2306.13924).
    Care,
}

impl AddonName {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::EquiMod => "equimod",
            Self::AugSelf => "augself",
            Self::ESsl => "essl",
            Self::Stl => "stl",
            Self::Care => "care",
        }
    }
}

/// A loss of another method beside the base method's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Addon {
    pub name: AddonName,
    /// The block that it reads, counted from 1; the last one stands for the final embedding.
    pub layer: usize,
    pub lambda: f64,
    /// Widths of its heads, of those that it has.
    pub hidden: usize,
    pub out: usize,
}

impl Addon {
    /// The authors' weight, at the final embedding. With the small encoder, heads are an eighth as wide as the authors'; EquiMod's
    /// is as wide as the encoder, as in SER's runs. STL's transformation has a quarter, or its 128·D² weights would outnumber
    /// the encoder's.
    pub fn new(name: AddonName, preset: Preset) -> Self {
        let small = preset == Preset::FashionTiny;
        let (lambda, hidden, out) = match (name, small) {
            (AddonName::EquiMod, true) => (1.0, 64, 64),
            (AddonName::EquiMod, false) => (1.0, 384, 128),
            (AddonName::AugSelf, true) => (1.0, 64, 0),
            (AddonName::AugSelf, false) => (1.0, 512, 0),
            (AddonName::ESsl, true) => (0.4, 256, 16),
            (AddonName::ESsl, false) => (0.4, 2048, 128),
            (AddonName::Stl, true) => (1.0, 64, 32),
            (AddonName::Stl, false) => (1.0, 512, 128),
            (AddonName::Care, _) => (0.01, 0, 0),
        };
        Self { name, layer: preset.depth(), lambda, hidden, out }
    }
}
