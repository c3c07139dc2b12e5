//! Options that the trainers have in common. What is not given is the preset's.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use clap::Parser;

use super::balance::BalanceRule;
use super::settings::{Addon, AddonName, FilterName, FormName, Group, Preset, Ser, Settings};

// Of an option that is given twice the last one counts, so that a command can be taken and changed.
#[derive(Clone, Debug, Parser)]
#[command(
    args_override_self = true,
    after_help = "What is not given is the preset's; config.json in the run's folder has all values."
)]
pub struct Args {
    /// Hyper-parameters to start from.
    #[arg(long, value_enum, default_value = "fashion-tiny")]
    pub preset: Preset,
    /// The base method alone: no partition, no poses, CLS before the first block.
    #[arg(long)]
    pub baseline: bool,
    /// A run of under a minute: 2 epochs of few pictures. It fails if the losses do not fall.
    #[arg(long)]
    pub smoke: bool,
    /// IDX files (plain or gzipped), CIFAR-10 binaries, or a folder of class sub-folders [default: 10,000 pictures of
    /// Fashion-MNIST that come with the repository].
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Everything random follows from it [default: 0].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Passes over the training pictures.
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Pictures in a batch.
    #[arg(long)]
    pub batch_size: Option<usize>,

    /// Weight of the equivariance loss; 0 is the control: the same batches and encoder, without that loss.
    #[arg(long, allow_negative_numbers = true, help_heading = "Regularizer")]
    pub lambda: Option<f64>,
    /// The equivariance loss sits on the output of this block, counted from 1; CLS joins after it, or before the last block.
    #[arg(long, help_heading = "Regularizer")]
    pub layer: Option<usize>,
    /// Fraction of a batch that gets two poses of one crop, and the equivariance loss.
    #[arg(long, help_heading = "Regularizer")]
    pub ratio: Option<f64>,
    /// Temperature of the equivariance loss.
    #[arg(long, help_heading = "Regularizer")]
    pub temperature: Option<f64>,
    /// Which tokens are negatives.
    #[arg(long, value_enum, help_heading = "Regularizer")]
    pub form: Option<FormName>,
    /// Turns and flips that a view draws from.
    #[arg(long, value_enum, help_heading = "Regularizer")]
    pub group: Option<Group>,
    /// Range of a view's area in tokens, relative to the picture's: 0.7,1.3.
    #[arg(long, value_parser = range, value_name = "LO,HI", help_heading = "Regularizer")]
    pub scale: Option<(f64, f64)>,
    /// Range of a view's columns over rows.
    #[arg(long, value_parser = range, value_name = "LO,HI", help_heading = "Regularizer")]
    pub aspect: Option<(f64, f64)>,
    /// Each view crops this fraction of the shared crop's area; the loss compares where both overlap: 0.3,1.
    #[arg(long, value_parser = range, value_name = "LO,HI", help_heading = "Regularizer")]
    pub crops: Option<(f64, f64)>,
    /// Each view is rotated by such an angle in degrees, besides its quarter turns; the loss compares where both overlap:
    /// -30,30.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub rotation: Option<(f64, f64)>,
    /// Each view is shifted so far down and right, in fractions of its side: -0.1,0.1.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub translation: Option<(f64, f64)>,
    /// Each view is sheared along rows and columns: -0.2,0.2.
    #[arg(long, value_parser = range, value_name = "LO,HI", allow_hyphen_values = true, help_heading = "Regularizer")]
    pub shear: Option<(f64, f64)>,
    /// With crops and such poses: a second view that shares a smaller fraction of tokens with the first is drawn again
    /// [default: 0.1].
    #[arg(long, value_name = "FRACTION", help_heading = "Regularizer")]
    pub min_overlap: Option<f64>,
    /// How scaled and cropped views and tokens are resampled.
    #[arg(long, value_enum, help_heading = "Regularizer")]
    pub filter: Option<FilterName>,
    /// Steps between measurements of how the gradients of both losses compare, block by block: two more backward passes each
    /// [default: none; with --balance-target 50].
    #[arg(long, value_name = "STEPS", help_heading = "Regularizer")]
    pub balance_every: Option<usize>,
    /// Lets lambda follow them, from --lambda on, until the gradient of the equivariance loss is this fraction of the base
    /// method's on the weights that both reach: 0.2.
    #[arg(
        long,
        value_name = "RATIO",
        allow_negative_numbers = true,
        help_heading = "Regularizer"
    )]
    pub balance_target: Option<f64>,

    /// One more loss on the pictures that are not posed, of another method.
    #[arg(long, value_enum, help_heading = "Add-on (moco_v3)")]
    pub addon: Option<AddonName>,
    /// The block that it reads, counted from 1 [default: the last one, whose reading is the final embedding].
    #[arg(long, requires = "addon", help_heading = "Add-on (moco_v3)")]
    pub addon_layer: Option<usize>,
    /// Its weight [default: its authors'].
    #[arg(long, requires = "addon", help_heading = "Add-on (moco_v3)")]
    pub addon_lambda: Option<f64>,

    /// Its peak, after the warm-up.
    #[arg(long, help_heading = "Base method")]
    pub learning_rate: Option<f64>,
    /// Fraction of the steps in which the learning rate rises.
    #[arg(long, help_heading = "Base method")]
    pub warm_up: Option<f64>,
    /// Of matrices, constant; without it, the preset's schedule.
    #[arg(long, help_heading = "Base method")]
    pub weight_decay: Option<f64>,
    /// Longest gradient: of all weights together, or of each with imagenet-vit-s16.
    #[arg(long, help_heading = "Base method")]
    pub clip: Option<f64>,
    /// First momentum of the key or teacher encoder.
    #[arg(long, help_heading = "Base method")]
    pub momentum: Option<f64>,
    /// Smallest area of a random crop, as a fraction of the picture.
    #[arg(long, help_heading = "Base method")]
    pub crop_min: Option<f64>,
    /// Probability that the last block is skipped, for each picture; it rises from 0 at the first one.
    #[arg(long, help_heading = "Base method")]
    pub drop_path: Option<f64>,

    /// Folder of the run: configuration, metrics, checkpoint, encoder, report [default: runs/METHOD-MODE-SEED, with MODE ser,
    /// lambda0 or baseline; smoke- before it for --smoke]. What an earlier run left there is replaced, unless resumed.
    #[arg(long, value_name = "FOLDER", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Go on from the checkpoint in the run's folder, as if never stopped; start anew if there is none.
    #[arg(long, help_heading = "Run")]
    pub resume: bool,
    /// Steps between checkpoints, beside those after each epoch.
    #[arg(long, value_name = "STEPS", help_heading = "Run")]
    pub checkpoint_every: Option<usize>,
    /// Epochs between evaluations; 0: only at the end [default: 1, of imagenet-vit-s16: 10].
    #[arg(long, value_name = "EPOCHS", help_heading = "Run")]
    pub evaluate_every: Option<usize>,
    /// At the end, measure the trained encoder alone: no untrained one, no raw pixels.
    #[arg(long, help_heading = "Run")]
    pub brief: bool,
    /// Train the baseline and lambda = 0 too, in folders below the run's, and compare the three on one page.
    #[arg(long, help_heading = "Run")]
    pub compare: bool,
    /// Threads that decode and augment pictures [default: 1, of imagenet-vit-s16: one for each core].
    #[arg(long, help_heading = "Run")]
    pub workers: Option<usize>,
    /// cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "cpu", help_heading = "Run")]
    pub device: String,
}

impl Args {
    /// `preset` with the options that were given.
    pub fn replace(&self, preset: Settings) -> Settings {
        let old = &preset.optimizer;
        let optimizer = super::settings::Optimizer {
            learning_rate: self.learning_rate.unwrap_or(old.learning_rate),
            warm_up: self.warm_up.unwrap_or(old.warm_up),
            weight_decay: self.weight_decay.unwrap_or(old.weight_decay),
            final_weight_decay: self.weight_decay.unwrap_or(old.final_weight_decay),
            clip: self.clip.or(old.clip),
            ..old.clone()
        };
        let old = &preset.ser;
        let ser = Ser {
            lambda: self.lambda.unwrap_or(old.lambda),
            layer: self.layer.unwrap_or(old.layer),
            ratio: self.ratio.unwrap_or(old.ratio),
            temperature: self.temperature.unwrap_or(old.temperature),
            form: self.form.unwrap_or(old.form),
            group: self.group.unwrap_or(old.group),
            scale: self.scale.unwrap_or(old.scale),
            aspect: self.aspect.unwrap_or(old.aspect),
            crops: self.crops.or(old.crops),
            rotation: self.rotation.or(old.rotation),
            translation: self.translation.or(old.translation),
            shear: self.shear.or(old.shear),
            min_overlap: self.min_overlap.or(old.min_overlap),
            filter: self.filter.unwrap_or(old.filter),
            balance: BalanceRule::new(self.balance_every, self.balance_target).or(old.balance),
            ..*old
        };
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
            data: self.data.clone(),
            epochs: match self.smoke {
                true => 2,
                false => self.epochs.unwrap_or(preset.epochs),
            },
            batch_size: self.batch_size.unwrap_or(preset.batch_size),
            crop_min: self.crop_min.unwrap_or(preset.crop_min),
            // A method without momentum encoder has no use for one.
            momentum: preset.momentum.map(|m| self.momentum.unwrap_or(m)),
            drop_path: self.drop_path.unwrap_or(preset.drop_path),
            optimizer,
            ser,
            ..preset
        }
    }

    pub fn device(&self) -> Result<Device> {
        device(&self.device)
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

/// The device that `name` stands for.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse().ok()),
        None => (name, Some(0)),
    };
    match (kind, index) {
        ("cpu", Some(0)) => Ok(Device::Cpu),
        ("cuda", Some(n)) => Device::new_cuda(n)
            .with_context(|| format!("no CUDA device {n} (built with --features cuda?)")),
        ("metal", Some(n)) => Device::new_metal(n)
            .with_context(|| format!("no Metal device {n} (built with --features metal?)")),
        _ => bail!("--device: expected cpu, cuda, cuda:N or metal, got {name}"),
    }
}
