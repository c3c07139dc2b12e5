//! The options of the trainers. The preset has the value of each option that is not given.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::Device;
use clap::Parser;
use ser_reg::view::CropRange;
use ser_reg::{
    Filter, Resample, SerConfig, ViewConfig, loss::Negatives, ser::Objective, view::Pairing,
};
use serde::de::DeserializeOwned;

use super::balance::BalanceRule;
use super::settings::{Addon, AddonName, Optimizer, Preset, Ser, SerImages, Settings};

// An option that is given twice has its last value, so that a command can be copied and changed.
#[derive(Clone, Debug, Parser)]
#[command(
    args_override_self = true,
    allow_negative_numbers = true,
    after_help = "The preset has the value of each option that is not given. config.json in the run's folder lists all values."
)]
pub struct Args {
    /// Hyper-parameters to start from.
    #[arg(long, value_enum, default_value = "fashion-tiny")]
    pub preset: Preset,
    /// Train the base method alone: no partition, no rotated views, CLS before the first block.
    #[arg(long)]
    pub baseline: bool,
    /// Run for less than a minute: 2 epochs of few images. The run fails if the losses do not fall.
    #[arg(long)]
    pub smoke: bool,
    /// IDX files (plain or gzipped), CIFAR-10 binaries, or a folder of images: with a sub-folder for each class, or without
    /// classes, and divided into train and val or not [default: the 10,000 images of Fashion-MNIST that come with the
    /// repository].
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Start from this encoder: the encoder.safetensors or the checkpoint of another run. Its names and shapes must fit.
    #[arg(long, value_name = "FILE")]
    pub init: Option<PathBuf>,
    /// All random numbers follow from the seed [default: 0].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Passes over the training images.
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Images in a batch.
    #[arg(long)]
    pub batch_size: Option<usize>,

    /// Weight of the equivariance loss. 0 is the control: the same batches and encoder without that loss.
    #[arg(long, help_heading = "Regularizer")]
    pub lambda: Option<f64>,
    /// Lambda after the last step: it moves there from --lambda by a cosine over the run [default: lambda stays].
    #[arg(long, value_name = "LAMBDA", help_heading = "Regularizer")]
    pub lambda_end: Option<f64>,
    /// The images of the equivariance loss: its own views, up to the tap, or a part of the batch whose views also serve the
    /// base method (the paper's form).
    #[arg(long, value_enum, help_heading = "Regularizer")]
    pub ser_images: Option<SerImages>,
    /// The loss compares the output of this block, counted from 1. CLS joins after it, or before the last block.
    #[arg(long, help_heading = "Regularizer")]
    pub layer: Option<usize>,
    /// Fraction of a batch that the equivariance loss sees.
    #[arg(long, help_heading = "Regularizer")]
    pub ratio: Option<f64>,
    /// Temperature of the equivariance loss.
    #[arg(long, help_heading = "Regularizer")]
    pub temperature: Option<f64>,
    /// The tokens that are negatives: both-views (the paper) or other-view (the authors' code).
    #[arg(long, value_parser = named::<Negatives>, value_name = "NAME", help_heading = "Regularizer")]
    pub negatives: Option<Negatives>,
    /// The rotations and flips that a view is drawn from: d4, c4, flips, trivial or another subgroup of D4. complement draws
    /// both views as the authors' code does.
    #[arg(long, value_parser = pairing, value_name = "NAME", help_heading = "Regularizer")]
    pub group: Option<Pairing>,
    /// Range of a view's area in tokens, relative to the image's: 0.7,1.3.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub scale: Option<(f64, f64)>,
    /// Range of a view's aspect ratio, columns over rows.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub aspect: Option<(f64, f64)>,
    /// Each view crops this fraction of the image's area. The loss compares the overlap: 0.3,1.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub crops: Option<(f64, f64)>,
    /// Each view is rotated by an angle from this range of degrees, besides its rotation by 90°. The loss compares the
    /// overlap: -30,30.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub rotation: Option<(f64, f64)>,
    /// Each view is shifted down and right by fractions of its side from this range: -0.1,0.1.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub translation: Option<(f64, f64)>,
    /// Each view is sheared along rows and columns: -0.2,0.2.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub shear: Option<(f64, f64)>,
    /// With crops and continuous transformations, the second view is drawn again if it shares a smaller fraction of tokens
    /// with the first [default: 0.1].
    #[arg(long, value_name = "FRACTION", help_heading = "Regularizer")]
    pub min_overlap: Option<f64>,
    /// The filter that resamples views and tokens: nearest, bilinear, bicubic, bilinear-antialias, bicubic-antialias, area
    /// or fourier.
    #[arg(long, value_parser = named::<Filter>, value_name = "NAME", help_heading = "Regularizer")]
    pub filter: Option<Filter>,
    /// Steps between comparisons of the gradients of both losses, block by block. Each one takes two more backward passes
    /// [default: none; with --balance-target 50].
    #[arg(long, value_name = "STEPS", help_heading = "Regularizer")]
    pub balance_every: Option<usize>,
    /// Lambda follows these comparisons, starting from --lambda. On the weights that both losses reach, the norm of the
    /// equivariance gradient becomes this fraction of the base method's: 0.2.
    #[arg(long, value_name = "RATIO", help_heading = "Regularizer")]
    pub balance_target: Option<f64>,

    /// Add the loss of another method, on the images that the regularizer does not share with the base method.
    #[arg(long, value_enum, help_heading = "Add-on (moco_v3)")]
    pub addon: Option<AddonName>,
    /// The block that it reads, counted from 1 [default: the last one, which stands for the final embedding].
    #[arg(long, requires = "addon", help_heading = "Add-on (moco_v3)")]
    pub addon_layer: Option<usize>,
    /// Its weight [default: its authors' value].
    #[arg(long, requires = "addon", help_heading = "Add-on (moco_v3)")]
    pub addon_lambda: Option<f64>,

    /// The highest learning rate, after the warm-up.
    #[arg(long, help_heading = "Base method")]
    pub learning_rate: Option<f64>,
    /// Fraction of the steps in which the learning rate rises.
    #[arg(long, help_heading = "Base method")]
    pub warm_up: Option<f64>,
    /// Constant weight decay of matrices [default: the preset's schedule].
    #[arg(long, help_heading = "Base method")]
    pub weight_decay: Option<f64>,
    /// Largest norm of the gradient: of all parameters together; with imagenet-vit-s16 of each parameter.
    #[arg(long, help_heading = "Base method")]
    pub clip: Option<f64>,
    /// First momentum of the key or teacher encoder.
    #[arg(long, help_heading = "Base method")]
    pub momentum: Option<f64>,
    /// Smallest area of a random crop, as a fraction of the image.
    #[arg(long, help_heading = "Base method")]
    pub crop_min: Option<f64>,
    /// Probability that the last block is skipped for an image. It rises from 0 at the first block.
    #[arg(long, help_heading = "Base method")]
    pub drop_path: Option<f64>,

    /// Folder of the run: configuration, metrics, checkpoint, encoder, report [default: runs/METHOD-MODE-SEED, with MODE ser,
    /// ser-own, lambda0 or baseline, and smoke- before it for --smoke]. Without --resume the files of an earlier run are replaced.
    #[arg(long, value_name = "FOLDER", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Continue from the checkpoint in the run's folder, bit for bit. Start a new run if the folder has none.
    #[arg(long, help_heading = "Run")]
    pub resume: bool,
    /// Steps between checkpoints, besides those after each epoch, at least 1.
    #[arg(long, value_name = "STEPS", help_heading = "Run")]
    pub checkpoint_every: Option<usize>,
    /// Epochs between evaluations; 0: at the end only [default: 1, of imagenet-vit-s16: 10].
    #[arg(long, value_name = "EPOCHS", help_heading = "Run")]
    pub evaluate_every: Option<usize>,
    /// At the end, measure the trained encoder alone: no untrained encoder, no raw pixels.
    #[arg(long, help_heading = "Run")]
    pub brief: bool,
    /// Train the baseline and lambda = 0 too, in folders below the run's, and compare the three on one page.
    #[arg(long, help_heading = "Run")]
    pub compare: bool,
    /// Threads that decode and augment images [default: 1, of imagenet-vit-s16: one for each core].
    #[arg(long, help_heading = "Run")]
    pub workers: Option<usize>,
    /// cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "cpu", help_heading = "Run")]
    pub device: String,
}

impl Args {
    /// `preset` with the options that were given.
    pub fn replace(&self, preset: Settings) -> Settings {
        let addon = self.addon.map(|name| {
            let old = Addon::new(name, preset.preset);
            Addon {
                layer: self.addon_layer.unwrap_or(old.layer),
                lambda: self.addon_lambda.unwrap_or(old.lambda),
                ..old
            }
        });
        Settings {
            addon,
            baseline: self.baseline,
            smoke: self.smoke,
            seed: self.seed.unwrap_or(preset.seed),
            data: self.data.as_deref().map(whole),
            init: self.init.as_deref().map(whole),
            epochs: match self.smoke {
                true => 2,
                false => self.epochs.unwrap_or(preset.epochs),
            },
            batch_size: self.batch_size.unwrap_or(preset.batch_size),
            crop_min: self.crop_min.unwrap_or(preset.crop_min),
            // A method without a momentum encoder does not use it.
            momentum: preset.momentum.map(|m| self.momentum.unwrap_or(m)),
            drop_path: self.drop_path.unwrap_or(preset.drop_path),
            optimizer: self.optimizer(&preset.optimizer),
            ser: self.ser(&preset.ser),
            ..preset
        }
    }

    fn optimizer(&self, old: &Optimizer) -> Optimizer {
        Optimizer {
            learning_rate: self.learning_rate.unwrap_or(old.learning_rate),
            warm_up: self.warm_up.unwrap_or(old.warm_up),
            weight_decay: self.weight_decay.unwrap_or(old.weight_decay),
            final_weight_decay: self.weight_decay.unwrap_or(old.final_weight_decay),
            clip: self.clip.or(old.clip),
            ..old.clone()
        }
    }

    fn ser(&self, old: &Ser) -> Ser {
        let resample = self.filter.map(Resample::from);
        let mut objective = old.loss.objective;
        if let Objective::NtXent(contrastive) = &mut objective {
            contrastive.temperature = self.temperature.unwrap_or(contrastive.temperature);
            contrastive.negatives = self.negatives.unwrap_or(contrastive.negatives);
        }
        Ser {
            images: self.ser_images.unwrap_or(old.images),
            layer: self.layer.unwrap_or(old.layer),
            ratio: self.ratio.unwrap_or(old.ratio),
            loss: SerConfig {
                lambda: self.lambda.unwrap_or(old.loss.lambda),
                objective,
                resample: resample.unwrap_or(old.loss.resample),
                ..old.loss
            },
            views: ViewConfig {
                resample: resample.unwrap_or(old.views.resample),
                ..self.views(old.views)
            },
            balance: BalanceRule::new(self.balance_every, self.balance_target).or(old.balance),
            final_lambda: self.lambda_end.or(old.final_lambda),
            ..old.clone()
        }
    }

    fn views(&self, old: ViewConfig) -> ViewConfig {
        let continuous = [self.rotation, self.translation, self.shear];
        let mut affine = old.affine;
        if continuous.iter().any(Option::is_some) {
            let ranges = affine.get_or_insert_default();
            ranges.rotation = self.rotation.unwrap_or(ranges.rotation);
            ranges.translation = self.translation.unwrap_or(ranges.translation);
            ranges.shear = self.shear.unwrap_or(ranges.shear);
        }
        let crop = |area| CropRange { area, ..CropRange::default() };
        ViewConfig {
            pairing: self.group.unwrap_or(old.pairing),
            area: self.scale.unwrap_or(old.area),
            aspect: self.aspect.unwrap_or(old.aspect),
            crop: self.crops.map(crop).or(old.crop),
            affine,
            min_overlap: self.min_overlap.unwrap_or(old.min_overlap),
            ..old
        }
    }

    pub fn device(&self) -> Result<Device> {
        device(&self.device)
    }
}

/// A setting of the library by the name that it has in configuration files.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let value = serde_json::Value::String(text.to_string());
    serde_json::from_value(value).map_err(|e| e.to_string())
}

/// `complement`, or the subgroup that each view is drawn from.
fn pairing(text: &str) -> Result<Pairing, String> {
    match text {
        "complement" => Ok(Pairing::Complement),
        _ => named(text).map(Pairing::Independent),
    }
}

/// Two numbers with a comma between them.
fn range(text: &str) -> Result<(f64, f64), String> {
    let parse = || {
        let (low, high) = text.split_once(',')?;
        Some((low.trim().parse().ok()?, high.trim().parse().ok()?))
    };
    parse().ok_or_else(|| format!("expected two numbers, LO,HI, got {text}"))
}

/// The path from the root, one for all ways to write it: a run may be resumed from another folder.
fn whole(path: &Path) -> PathBuf {
    let whole = path.canonicalize().or_else(|_| std::path::absolute(path));
    // What does not exist is refused where it is read.
    whole.unwrap_or_else(|_| path.to_path_buf())
}

/// The device that `name` stands for.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse().ok()),
        None => (name, Some(0)),
    };
    match (kind, index) {
        ("cpu", Some(0)) => Ok(Device::Cpu),
        ("cuda", Some(n)) => Device::new_cuda(n)
            .with_context(|| format!("--device: no CUDA device {n} (built with --features cuda?)")),
        ("metal", Some(n)) => Device::new_metal(n).with_context(|| {
            format!("--device: no Metal device {n} (built with --features metal?)")
        }),
        _ => bail!("--device: expected cpu, cuda, cuda:N or metal, got {name}"),
    }
}
