//! The settings of a run: the presets, and the options that replace parts of them.

mod addon;
pub mod check;
mod presets;

use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_nn::VarBuilder;
use clap::ValueEnum;
use ser_reg::{
    Layout, Partition, Projector, ProjectorConfig, Regularizer, Schedule, SerConfig, SerLoss,
    TokenGrid, ViewConfig, ViewSampler, loss::Negatives, ser::Objective,
};
use serde::{Deserialize, Serialize};

pub use addon::{Addon, AddonName};

use super::{
    balance::BalanceRule,
    cli::Args,
    data::Images,
    method::{HeadConfig, moco},
    records::Step,
    vit::VitConfig,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Method {
    MocoV3,
    Dino,
    BarlowTwins,
}

impl Method {
    pub const ALL: [Self; 3] = [Self::MocoV3, Self::Dino, Self::BarlowTwins];

    /// The name of its example, its folders and its rows.
    pub fn name(self) -> &'static str {
        match self {
            Self::MocoV3 => "moco_v3",
            Self::Dino => "dino",
            Self::BarlowTwins => "barlow_twins",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Small images and a small encoder: minutes on two CPU cores.
    FashionTiny,
    /// A folder of images and ViT-S/16 at 224 pixels: the paper's configuration, for GPUs.
    ImagenetVitS16,
}

impl Preset {
    /// Blocks of its encoder.
    pub fn depth(self) -> usize {
        match self {
            Self::FashionTiny => VitConfig::SMALL_DEPTH,
            Self::ImagenetVitS16 => VitConfig::S16_DEPTH,
        }
    }
}

/// The images that the regularizer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SerImages {
    /// Views of some images of the batch, drawn for the regularizer alone. They pass through the encoder up to the tap. The
    /// base method keeps its whole batch.
    Own,
    /// The paper's form: a part of the batch is in rotated and flipped views, which serve both losses.
    Batch,
}

/// What the regularizer adds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ser {
    /// The images that it sees.
    pub images: SerImages,
    /// The block whose tokens it compares, counted from 1.
    pub layer: usize,
    /// Fraction of a batch that it sees.
    pub ratio: f64,
    /// Weight, objective and filter.
    pub loss: SerConfig,
    /// Widths of its head.
    pub head: ProjectorConfig,
    /// The distribution of its views.
    pub views: ViewConfig,
    /// When the gradients of both losses are compared, and whether λ follows. It is left out where there is none: older runs
    /// can be resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalanceRule>,
    /// λ after the last step; `None`: λ stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_lambda: Option<f64>,
}

impl Ser {
    /// The regularizer of an encoder: views, tap, head and loss.
    pub fn regularizer(&self, vit: &VitConfig, vb: VarBuilder) -> Result<Regularizer> {
        let layout = Layout { prefix: vit.prefix(self.layer), ..Layout::default() };
        let sampler = ViewSampler::new(TokenGrid::square(vit.grid())?, self.views)?;
        let head = Projector::new(vit.dim, self.head, vb)?;
        let loss = SerLoss::new(SerConfig { layout, ..self.loss })?;
        let layer = format!("block{}", self.layer);
        Ok(Regularizer::from_parts(layer, sampler, Some(head), loss))
    }

    /// The tokens that the loss has as negatives.
    pub fn negatives(&self) -> Result<Negatives> {
        match self.loss.objective {
            Objective::NtXent(contrastive) => Ok(contrastive.negatives),
            _ => bail!("expected NT-Xent as the objective of the regularizer"),
        }
    }
}

/// AdamW and its schedules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Peak, after the warm-up; it falls to `final_learning_rate` by a cosine.
    pub learning_rate: f64,
    pub final_learning_rate: f64,
    /// Fraction of the steps with a linearly rising rate.
    pub warm_up: f64,
    /// Of matrices only; it moves to `final_weight_decay` by a cosine.
    pub weight_decay: f64,
    pub final_weight_decay: f64,
    /// Whether the last step of the warm-up has the peak already, as in DINO's code; if not, the first one after it.
    pub warm_up_inclusive: bool,
    /// Longest gradient.
    pub clip: Option<f64>,
    /// Whether that holds for each parameter by itself, as in DINO's code, or for all together.
    pub clip_each: bool,
}

/// Learning rate, weight decay and momentum over the steps.
pub struct Schedules {
    rate: Schedule,
    decay: Schedule,
    momentum: Option<Schedule>,
}

impl Schedules {
    /// The record of a step, with the values that it trains with.
    pub fn at(&self, step: usize) -> Step {
        Step {
            step,
            learning_rate: self.rate.at(step),
            weight_decay: self.decay.at(step),
            momentum: self.momentum.map(|m| m.at(step)),
            ..Default::default()
        }
    }
}

/// The settings of one method.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum Base {
    MocoV3(MocoV3),
    Dino(Dino),
    BarlowTwins(BarlowTwins),
}

impl Base {
    /// The settings of MoCo-v3.
    ///
    /// # Errors
    /// If they are those of another method.
    pub fn moco_v3(&self) -> Result<&MocoV3> {
        match self {
            Self::MocoV3(base) => Ok(base),
            other => bail!("expected the settings of MoCo-v3, got {other:?}"),
        }
    }

    /// The settings of DINO, as [`Self::moco_v3`].
    pub fn dino(&self) -> Result<&Dino> {
        match self {
            Self::Dino(base) => Ok(base),
            other => bail!("expected the settings of DINO, got {other:?}"),
        }
    }

    /// The settings of Barlow Twins, as [`Self::moco_v3`].
    pub fn barlow_twins(&self) -> Result<&BarlowTwins> {
        match self {
            Self::BarlowTwins(base) => Ok(base),
            other => bail!("expected the settings of Barlow Twins, got {other:?}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MocoV3 {
    pub temperature: f64,
    pub widths: moco::Widths,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dino {
    /// The perceptron before the prototypes.
    pub mlp: HeadConfig,
    pub prototypes: usize,
    pub student_temperature: f64,
    /// It rises linearly from the first to the second value over this fraction of the steps.
    pub teacher_temperature: (f64, f64),
    pub teacher_warm_up: f64,
    pub center_momentum: f64,
    /// Fraction of the steps in which prototypes stay as they are.
    pub freeze_prototypes: f64,
    /// Whether lengths of prototypes are learned.
    pub learned_lengths: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BarlowTwins {
    pub projector: HeadConfig,
    /// Weight of the redundancy term.
    pub redundancy: f64,
    /// Factor on the loss.
    pub scale: f64,
}

/// The configuration of a run, as `config.json` holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub method: Method,
    pub preset: Preset,
    /// The base method alone: no partition, no rotated views, CLS before the first block.
    pub baseline: bool,
    pub smoke: bool,
    pub seed: u64,
    /// `None`: the images that come with the repository.
    pub data: Option<PathBuf>,
    pub epochs: usize,
    pub batch_size: usize,
    /// Smallest area of the base method's random crops.
    pub crop_min: f64,
    /// First momentum of the key or teacher encoder; it rises to 1.
    pub momentum: Option<f64>,
    pub drop_path: f64,
    pub base: Base,
    pub ser: Ser,
    pub optimizer: Optimizer,
    /// It is left out where there is none: older runs can be resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addon: Option<Addon>,
    /// The encoder to start from, a file of this package; `None`: seeded initial values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

impl Settings {
    /// The preset's values, and `args` where it has some.
    pub fn new(method: Method, args: &Args) -> Result<Self> {
        let preset = match args.preset {
            Preset::FashionTiny => Self::fashion_tiny(method),
            Preset::ImagenetVitS16 => Self::imagenet_vit_s16(method, args.batch_size),
        };
        let settings = args.replace(preset);
        settings.check()?;
        Ok(settings)
    }

    /// Images of a batch that the regularizer sees.
    pub fn regularized(&self) -> Result<usize> {
        Ok(self.partition()?.map_or(0, |p| p.regularized().len()))
    }

    /// Images of a batch whose views serve both losses.
    pub fn shared(&self) -> Result<usize> {
        match self.ser.images {
            SerImages::Own => Ok(0),
            SerImages::Batch => self.regularized(),
        }
    }

    /// The encoder for such images.
    pub fn vit(&self, images: &Images) -> Result<VitConfig> {
        let (layer, early_cls) = (self.ser.layer, self.baseline);
        let config = match self.preset {
            Preset::FashionTiny => VitConfig::small(images, layer, early_cls)?,
            Preset::ImagenetVitS16 => VitConfig {
                frozen_patches: self.method == Method::MocoV3,
                ..VitConfig::s16(layer, early_cls)?
            },
        };
        Ok(VitConfig { drop_path: self.drop_path, ..config })
    }

    /// The schedules over `steps` steps.
    pub fn schedules(&self, steps: usize) -> Result<Schedules> {
        let rule = &self.optimizer;
        let warm_up = (steps as f64 * rule.warm_up) as usize;
        let (peak, last) = (rule.learning_rate, rule.final_learning_rate);
        let momentum = self.momentum.map(|m| Schedule::cosine(m, 1.0, steps));
        let rate = Schedule::cosine(peak, last, steps - warm_up)?;
        Ok(Schedules {
            rate: match rule.warm_up_inclusive {
                true => rate.warm_up_inclusive(warm_up),
                false => rate.warm_up(warm_up),
            },
            decay: Schedule::cosine(rule.weight_decay, rule.final_weight_decay, steps)?,
            momentum: momentum.transpose()?,
        })
    }

    /// The part of a batch that the regularizer sees; none in the baseline.
    pub fn partition(&self) -> Result<Option<Partition>> {
        match self.baseline {
            true => Ok(None),
            false => Ok(Some(Partition::new(self.batch_size, self.ser.ratio)?)),
        }
    }

    /// `ser`, `lambda0` or `baseline`.
    pub fn mode(&self) -> &'static str {
        match (self.baseline, self.ser.loss.lambda == 0.0) {
            (true, _) => "baseline",
            (false, true) => "lambda0",
            (false, false) => "ser",
        }
    }

    /// The mode, with `-own` for images of its own, and the add-on with its layer.
    pub fn label(&self) -> String {
        let mut label = self.mode().to_string();
        if label == "ser" && self.ser.images == SerImages::Own {
            label += "-own";
        }
        if let Some(addon) = &self.addon {
            label += &format!("-{}{}", addon.name.name(), addon.layer);
        }
        label
    }

    /// Names of the fields in which two configurations differ, with both values: `epochs: 10, now 5`.
    pub fn differences(saved: &serde_json::Value, now: &serde_json::Value) -> Vec<String> {
        fn walk(path: &str, a: &serde_json::Value, b: &serde_json::Value, out: &mut Vec<String>) {
            use serde_json::Value::{Null, Object};
            match (a, b) {
                (Object(x), Object(y)) => {
                    let mut keys: Vec<_> = x.keys().chain(y.keys()).collect();
                    keys.sort();
                    keys.dedup();
                    for key in keys {
                        let dot = if path.is_empty() { "" } else { "." };
                        let (a, b) = (x.get(key).unwrap_or(&Null), y.get(key).unwrap_or(&Null));
                        walk(&format!("{path}{dot}{key}"), a, b, out);
                    }
                }
                _ if a != b => out.push(format!("{path}: {a}, now {b}")),
                _ => {}
            }
        }
        let mut out = Vec::new();
        walk("", saved, now, &mut out);
        out
    }
}
