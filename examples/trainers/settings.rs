//! Everything that decides what a run computes: the presets, and the options that replace parts of them.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use ser_reg::{
    Filter, Layout, Resample, TokenGrid,
    group::Subgroup,
    loss::{Negatives, SameImage},
    partition::Partition,
    projector::ProjectorConfig,
    schedule::Schedule,
    ser::{Objective, SerConfig},
    view::{AffineRange, CropRange, Pairing, ViewConfig, ViewSampler},
};
use serde::{Deserialize, Serialize};

use super::{
    addon,
    balance::BalanceRule,
    cli::Args,
    data::Images,
    method::{HeadConfig, barlow, dino::DinoHead, moco},
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
    /// Small pictures, a small encoder: minutes on two CPU cores.
    FashionTiny,
    /// A folder of pictures, ViT-S/16 at 224 pixels: the paper's set-up, for GPUs.
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

/// The turns and flips that views draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Quarter turns and flips.
    D4,
    /// Quarter turns.
    Rotations,
    /// Flips of rows and columns.
    Flips,
    /// Nothing: what remains is scales or crops.
    None,
    /// Flip and half turn of the second view complement those of the first, as in the authors' code.
    Complement,
}

/// How tokens and images are resampled where a view is scaled or cropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FilterName {
    Nearest,
    Bilinear,
    Bicubic,
    BilinearAntialias,
    BicubicAntialias,
    Area,
    /// For turns and scales of whole pictures only, which then compose exactly.
    Fourier,
}

/// Which tokens are negatives: the paper and the authors' code differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FormName {
    /// Those of other pictures in both views: the paper's formula.
    Paper,
    /// Those of other pictures in the other view: the authors' code.
    CrossView,
}

/// What the regularizer adds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ser {
    /// Weight of its loss.
    pub lambda: f64,
    /// The block whose tokens it compares, counted from 1.
    pub layer: usize,
    /// Fraction of a batch that it sees.
    pub ratio: f64,
    pub temperature: f64,
    pub form: FormName,
    /// Widths of its projector.
    pub hidden: usize,
    pub out: usize,
    pub group: Group,
    /// Range of a view's area in tokens, and of its columns over rows.
    pub scale: (f64, f64),
    pub aspect: (f64, f64),
    /// Range of the area that each view crops from the shared crop; none: both show all of it.
    pub crops: Option<(f64, f64)>,
    /// Ranges of a continuous pose of each view: degrees, fractions of a side, shears; none: quarter turns and flips only.
    pub rotation: Option<(f64, f64)>,
    pub translation: Option<(f64, f64)>,
    pub shear: Option<(f64, f64)>,
    /// Smallest share of a view's tokens that the other one sees too, where views are cropped or in continuous poses; none:
    /// a tenth.
    pub min_overlap: Option<f64>,
    pub filter: FilterName,
    /// Whether gradients of both losses are compared, and λ follows. Not written where not: older runs go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalanceRule>,
}

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
    /// Applies a transformation seen on another picture (arXiv 2501.08712).
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
        Self {
            name,
            layer: preset.depth(),
            lambda,
            hidden,
            out,
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

/// What belongs to one method.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum Base {
    MocoV3(MocoV3),
    Dino(Dino),
    BarlowTwins(BarlowTwins),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MocoV3 {
    pub temperature: f64,
    pub widths: moco::Widths,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dino {
    /// What leads to the prototypes.
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
    /// The base method alone: no partition, no poses, CLS before the first block.
    pub baseline: bool,
    pub smoke: bool,
    pub seed: u64,
    /// `None`: the pictures that come with the repository.
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
    /// Not written where there is none: runs from before there were any go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addon: Option<Addon>,
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

    /// Values that work in minutes; docs/results.md says how well.
    fn fashion_tiny(method: Method) -> Self {
        Self {
            method,
            preset: Preset::FashionTiny,
            baseline: false,
            smoke: false,
            seed: 0,
            data: None,
            epochs: 10,
            batch_size: 64,
            crop_min: 0.3,
            // A memory of twenty to thirty steps: a run has a thousand, not a hundred thousand.
            momentum: match method {
                Method::MocoV3 => Some(0.95),
                Method::Dino => Some(0.97),
                Method::BarlowTwins => None,
            },
            drop_path: 0.0,
            base: match method {
                Method::MocoV3 => Base::MocoV3(MocoV3 {
                    temperature: 0.2,
                    widths: moco::Widths::SMALL,
                }),
                Method::Dino => Base::Dino(Dino {
                    mlp: DinoHead::small(64),
                    prototypes: 256,
                    student_temperature: 0.1,
                    teacher_temperature: (0.05, 0.05),
                    teacher_warm_up: 0.0,
                    center_momentum: 0.9,
                    freeze_prototypes: 0.0,
                    learned_lengths: false,
                }),
                // The scale brings 256 dimensions' loss to the size of the other methods'.
                Method::BarlowTwins => Base::BarlowTwins(BarlowTwins {
                    projector: barlow::small(64),
                    redundancy: 0.02,
                    scale: 10.0 / 256.0,
                }),
            },
            ser: Ser {
                lambda: 1.0,
                layer: 2,
                ratio: 0.125,
                temperature: 0.3,
                form: FormName::Paper,
                hidden: 128,
                out: 128,
                group: Group::D4,
                scale: (1.0, 1.0),
                aspect: (1.0, 1.0),
                crops: None,
                rotation: None,
                translation: None,
                shear: None,
                min_overlap: None,
                filter: FilterName::Bicubic,
                balance: None,
            },
            optimizer: Optimizer {
                learning_rate: 2e-3,
                final_learning_rate: 0.0,
                warm_up: 0.1,
                weight_decay: 0.05,
                final_weight_decay: 0.05,
                warm_up_inclusive: false,
                clip: (method == Method::Dino).then_some(1.0),
                clip_each: false,
            },
            addon: None,
        }
    }

    /// The hyper-parameters of arXiv 2603.06693. Its sources differ in layer (3; 12 by the scripts' defaults), λ (1.0, 0.5,
    /// DINO 0.3), τ (0.3; 0.5 or 0.4), ratio (0.01; DINO 0.02) and the negatives (both views; the other one): all are options.
    ///
    /// Ours differs from the authors' code in three ways: weight decay leaves vectors alone for all methods, where theirs does
    /// so for DINO only; the regularizer's keys come from a momentum copy of its head for DINO too, where theirs share the
    /// student's; and the loss has a gradient.
    fn imagenet_vit_s16(method: Method, batch_size: Option<usize>) -> Self {
        let batch_size = batch_size.unwrap_or(2048);
        let linear = |rate: f64| rate * batch_size as f64 / 256.0;
        Self {
            method,
            preset: Preset::ImagenetVitS16,
            baseline: false,
            smoke: false,
            seed: 0,
            data: None,
            epochs: 100,
            batch_size,
            crop_min: match method {
                Method::Dino => 0.25,
                _ => 0.08,
            },
            momentum: match method {
                Method::MocoV3 => Some(0.99),
                Method::Dino => Some(0.982),
                Method::BarlowTwins => None,
            },
            drop_path: if method == Method::Dino { 0.1 } else { 0.0 },
            base: match method {
                Method::MocoV3 => Base::MocoV3(MocoV3 {
                    temperature: 0.2,
                    widths: moco::Widths::PAPER,
                }),
                Method::Dino => Base::Dino(Dino {
                    mlp: DinoHead::paper(384),
                    prototypes: 65536,
                    student_temperature: 0.1,
                    teacher_temperature: (0.04, 0.07),
                    teacher_warm_up: 0.1,
                    center_momentum: 0.9,
                    freeze_prototypes: 0.01,
                    learned_lengths: true,
                }),
                Method::BarlowTwins => Base::BarlowTwins(BarlowTwins {
                    projector: barlow::paper(384),
                    redundancy: 0.0051,
                    scale: 1.0,
                }),
            },
            ser: Ser {
                lambda: if method == Method::Dino { 0.3 } else { 1.0 },
                layer: 3,
                ratio: 0.01,
                temperature: if method == Method::Dino { 0.5 } else { 0.3 },
                form: FormName::Paper,
                hidden: 512,
                out: 512,
                group: Group::D4,
                scale: (0.7, 1.3),
                aspect: (3.0 / 4.0, 4.0 / 3.0),
                crops: None,
                rotation: None,
                translation: None,
                shear: None,
                min_overlap: None,
                filter: FilterName::Bicubic,
                balance: None,
            },
            optimizer: Optimizer {
                learning_rate: linear(match method {
                    Method::MocoV3 => 3e-4,
                    _ => 1e-4,
                }),
                final_learning_rate: match method {
                    Method::MocoV3 => 0.0,
                    Method::Dino => 1e-5,
                    Method::BarlowTwins => 0.001 * linear(1e-4),
                },
                warm_up: 0.1,
                weight_decay: if method == Method::Dino { 0.04 } else { 0.1 },
                final_weight_decay: if method == Method::Dino { 0.4 } else { 0.1 },
                warm_up_inclusive: method == Method::Dino,
                clip: (method != Method::MocoV3).then_some(0.3),
                clip_each: true,
            },
            addon: None,
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(self.epochs > 0, "--epochs: expected at least 1, got 0");
        ensure!(
            self.batch_size >= 2,
            "--batch-size: expected at least 2, got {}",
            self.batch_size
        );
        ensure!(
            self.crop_min > 0.0 && self.crop_min <= 1.0,
            "--crop-min: expected a fraction above 0, at most 1, got {}",
            self.crop_min
        );
        for (name, value) in [
            ("--learning-rate", self.optimizer.learning_rate),
            ("--weight-decay", self.optimizer.weight_decay),
        ] {
            ensure!(
                value.is_finite() && value >= 0.0,
                "{name}: expected a finite number, at least 0, got {value}"
            );
        }
        if let Some(clip) = self.optimizer.clip {
            ensure!(
                clip.is_finite() && clip > 0.0,
                "--clip: expected a finite number above 0, got {clip}"
            );
        }
        for (name, value) in [
            ("--warm-up", self.optimizer.warm_up),
            ("--momentum", self.momentum.unwrap_or(0.0)),
            ("--drop-path", self.drop_path),
        ] {
            ensure!(
                (0.0..1.0).contains(&value),
                "{name}: expected a fraction, at least 0 and below 1, got {value}"
            );
        }
        self.partition()?;
        // Ranges and filter, said before pictures are read; the grid does not matter.
        ViewSampler::new(TokenGrid::square(1)?, self.ser.views())?;
        if let Some(balance) = &self.ser.balance {
            balance.check(if self.baseline { 0.0 } else { self.ser.lambda })?;
        }
        self.check_addon()
    }

    fn check_addon(&self) -> Result<()> {
        let Some(addon) = &self.addon else {
            return Ok(());
        };
        let name = addon.name.name();
        ensure!(
            self.method == Method::MocoV3,
            "--addon: expected with moco_v3, got {name} with {}",
            self.method.name()
        );
        let depth = self.preset.depth();
        ensure!(
            (1..=depth).contains(&addon.layer),
            "--addon-layer: expected one of the {depth} blocks, got block {}",
            addon.layer
        );
        ensure!(
            addon.lambda.is_finite() && addon.lambda >= 0.0,
            "--addon-lambda: expected a finite number, at least 0, got {}",
            addon.lambda
        );
        let plain = self.batch_size - self.posed()?;
        ensure!(
            plain >= 2,
            "--addon {name}: expected at least 2 pictures of a batch that are not posed, which it reads; {plain} of {} are \
             left (--ratio, --batch-size)",
            self.batch_size
        );
        addon::wishes(self)?;
        Ok(())
    }

    /// Pictures of a batch that are posed.
    pub fn posed(&self) -> Result<usize> {
        Ok(self.partition()?.map_or(0, |p| p.equivariant().len()))
    }

    /// The encoder for such pictures.
    pub fn vit(&self, images: &Images) -> Result<VitConfig> {
        let (layer, early_cls) = (self.ser.layer, self.baseline);
        let config = match self.preset {
            Preset::FashionTiny => VitConfig::small(images, layer, early_cls)?,
            Preset::ImagenetVitS16 => VitConfig {
                frozen_patches: self.method == Method::MocoV3,
                ..VitConfig::s16(layer, early_cls)?
            },
        };
        Ok(VitConfig {
            drop_path: self.drop_path,
            ..config
        })
    }

    /// What changes over `steps` steps.
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
        match (self.baseline, self.ser.lambda == 0.0) {
            (true, _) => "baseline",
            (false, true) => "lambda0",
            (false, false) => "ser",
        }
    }

    /// The mode, and the add-on with its layer, if there is one.
    pub fn label(&self) -> String {
        match &self.addon {
            None => self.mode().to_string(),
            Some(addon) => format!("{}-{}{}", self.mode(), addon.name.name(), addon.layer),
        }
    }

    /// Names of the fields in which two configurations differ, with both values: `ser.lambda: 1.0, now 0.5`.
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

impl Ser {
    /// The loss, on maps that `prefix` tokens lead.
    pub fn loss(&self, prefix: usize) -> SerConfig {
        SerConfig {
            objective: Objective::NtXent {
                form: match self.form {
                    FormName::Paper => Negatives::BothViews,
                    FormName::CrossView => Negatives::OtherView,
                },
                same_image: SameImage::Exclude,
            },
            lambda: self.lambda,
            temperature: self.temperature,
            projector: Some(ProjectorConfig {
                hidden: self.hidden,
                out: self.out,
                norm: true,
            }),
            layout: Layout {
                prefix,
                ..Default::default()
            },
            resample: self.resample(),
            ..Default::default()
        }
    }

    /// What views are drawn from.
    pub fn views(&self) -> ViewConfig {
        ViewConfig {
            pairing: match self.group {
                Group::D4 => Pairing::Independent(Subgroup::D4),
                Group::Rotations => Pairing::Independent(Subgroup::C4),
                Group::Flips => Pairing::Independent(Subgroup::Flips),
                Group::None => Pairing::Independent(Subgroup::Trivial),
                Group::Complement => Pairing::Complement,
            },
            area: self.scale,
            aspect: self.aspect,
            crop: self.crops.map(|area| CropRange {
                area,
                ..Default::default()
            }),
            affine: self.affine(),
            min_overlap: self.min_overlap.unwrap_or(0.1),
            resample: self.resample(),
        }
    }

    /// The continuous poses of a view, if it has any.
    fn affine(&self) -> Option<AffineRange> {
        let ranges = [self.rotation, self.translation, self.shear];
        let [rotation, translation, shear] = ranges.map(Option::unwrap_or_default);
        ranges.iter().any(Option::is_some).then_some(AffineRange {
            rotation,
            translation,
            shear,
        })
    }

    fn resample(&self) -> Resample {
        Resample::from(match self.filter {
            FilterName::Nearest => Filter::Nearest,
            FilterName::Bilinear => Filter::Bilinear,
            FilterName::Bicubic => Filter::Bicubic,
            FilterName::BilinearAntialias => Filter::BilinearAntialias,
            FilterName::BicubicAntialias => Filter::BicubicAntialias,
            FilterName::Area => Filter::Area,
            FilterName::Fourier => Filter::Fourier,
        })
    }
}
