//! The checks of all settings. They run before images are read and before any file of an older run is touched.

use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use ser_reg::{Filter, SerLoss, TokenGrid, ViewConfig, ViewSampler, ser::Objective};

use super::{Method, Settings};
use crate::addon;

/// The most steps or epochs between two events: a larger number is a slip.
pub const MOST: usize = u32::MAX as usize;

/// The most images in a batch.
const BATCH: usize = 1 << 24;

/// Checks that a number lies in `range`. NaN lies in none.
pub fn number(flag: &str, range: RangeInclusive<f64>, value: f64) -> Result<()> {
    let (least, most) = (range.start(), range.end());
    ensure!(
        range.contains(&value),
        "{flag}: expected a number from {} to {}, got {}",
        shown(*least),
        shown(*most),
        shown(value)
    );
    Ok(())
}

/// Checks the weight of a loss, in f32 too.
pub fn weight(flag: &str, value: f64) -> Result<()> {
    ensure!(
        value == 0.0 || (1e-30..=1e6).contains(&value),
        "{flag}: expected 0, or a number from 1e-30 to 1000000, got {}",
        shown(value)
    );
    Ok(())
}

/// Checks that a count lies in `range`.
pub fn count(flag: &str, range: RangeInclusive<usize>, value: usize) -> Result<()> {
    let (least, most) = (range.start(), range.end());
    ensure!(range.contains(&value), "{flag}: expected {least} to {most}, got {value}");
    Ok(())
}

/// Checks that a fraction is at least 0 and below 1, in f32 too.
pub fn below_one(flag: &str, value: f64) -> Result<()> {
    ensure!(
        value >= 0.0 && (value as f32) < 1.0,
        "{flag}: expected a fraction, at least 0 and below 1, got {value}"
    );
    Ok(())
}

/// Checks that `LO,HI` are in order and within `range`; `what` they are ranges of.
fn range(
    flag: &str,
    what: &str,
    range: RangeInclusive<f64>,
    (low, high): (f64, f64),
) -> Result<()> {
    let (least, most) = (range.start(), range.end());
    ensure!(
        low <= high && range.contains(&low) && range.contains(&high),
        "{flag}: expected LO,HI with {least} <= LO <= HI <= {most}, {what}, got {},{}",
        shown(low),
        shown(high)
    );
    Ok(())
}

/// A number with few digits, however large it is.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 1e7 || (size > 0.0 && size < 1e-4) => format!("{value:e}"),
        _ => value.to_string(),
    }
}

impl Settings {
    pub(super) fn check(&self) -> Result<()> {
        count("--epochs", 1..=MOST, self.epochs)?;
        count("--batch-size", 2..=BATCH, self.batch_size)?;
        number("--crop-min", 1e-6..=1.0, self.crop_min)?;
        number("--learning-rate", 0.0..=f64::from(f32::MAX), self.optimizer.learning_rate)?;
        number("--weight-decay", 0.0..=1e3, self.optimizer.weight_decay)?;
        if let Some(clip) = self.optimizer.clip {
            number("--clip", 1e-30..=1e30, clip)?;
        }
        below_one("--warm-up", self.optimizer.warm_up)?;
        below_one("--momentum", self.momentum.unwrap_or(0.0))?;
        below_one("--drop-path", self.drop_path)?;
        self.check_regularizer()?;
        self.check_addon()?;
        self.check_serialized()
    }

    /// The regularizer's settings are checked in the baseline too: `config.json` holds them.
    fn check_regularizer(&self) -> Result<()> {
        let ser = &self.ser;
        weight("--lambda", ser.loss.lambda)?;
        if let Objective::NtXent(contrastive) = ser.loss.objective {
            // Beyond these the softmax of f32 is saturated, or flat, and the loss has no gradient.
            number("--temperature", 0.01..=1e3, contrastive.temperature)?;
        }
        number("--ratio", 0.0..=1.0, ser.ratio)?;
        let depth = self.preset.depth();
        ensure!(
            (1..=depth).contains(&ser.layer),
            "--layer: expected one of the {depth} blocks, got block {}",
            ser.layer
        );
        check_views(&ser.views)?;
        // What the options cannot set. The grid does not matter for these checks, which need no images.
        ViewSampler::new(TokenGrid::square(1)?, ser.views).context("the views")?;
        SerLoss::new(ser.loss).context("the regularizer")?;
        if let Some(balance) = &ser.balance {
            count("--balance-every", 1..=MOST, balance.every)?;
            balance.check(if self.baseline { 0.0 } else { ser.loss.lambda })?;
        }
        if let Some(last) = ser.final_lambda {
            weight("--lambda-end", last)?;
            ensure!(
                self.mode() == "ser" && ser.balance.is_none_or(|rule| rule.target.is_none()),
                "--lambda-end: expected a run with the regularizer, without --baseline, with --lambda above 0 and without \
                 --balance-target, which moves lambda too"
            );
        }
        self.partition()?;
        Ok(())
    }

    /// What cannot be written into the configuration, or comes back as something else, is refused before any file is touched.
    fn check_serialized(&self) -> Result<()> {
        let text = serde_json::to_string(self);
        let text = text.context("expected UTF-8 paths in --data and --init")?;
        let back = serde_json::from_str::<Self>(&text).ok();
        ensure!(
            back.as_ref() == Some(self),
            "expected settings that config.json can hold, got {self:?}"
        );
        Ok(())
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
        weight("--addon-lambda", addon.lambda)?;
        let plain = self.batch_size - self.shared()?;
        ensure!(
            plain >= 2,
            "--addon {name}: expected at least 2 images of a batch beside those of the regularizer, got {plain} of {} \
             (--ratio, --batch-size)",
            self.batch_size
        );
        addon::extras(self)?;
        Ok(())
    }
}

fn check_views(views: &ViewConfig) -> Result<()> {
    // A view of sixteen times the area has so many times the tokens, and their attention 256 times the memory.
    range("--scale", "areas relative to the image's", 0.0625..=16.0, views.area)?;
    range("--aspect", "columns over rows", 0.0625..=16.0, views.aspect)?;
    if let Some(crop) = views.crop {
        range("--crops", "fractions of the image's area", 1e-6..=1.0, crop.area)?;
    }
    if let Some(affine) = views.affine {
        range("--rotation", "degrees", -360.0..=360.0, affine.rotation)?;
        let side = "fractions of the view's side";
        range("--translation", side, -0.999..=0.999, affine.translation)?;
        range("--shear", "tangents of angles", -0.999..=0.999, affine.shear)?;
    }
    number("--min-overlap", 0.0..=1.0, views.min_overlap)?;
    let partial = views.crop.is_some() || views.affine.is_some();
    ensure!(
        views.min_overlap > 0.0 || !partial,
        "--min-overlap: expected a fraction above 0 with --crops, --rotation, --translation or --shear, got 0: two views \
         without a common token end the run"
    );
    ensure!(
        views.resample.filter != Filter::Fourier || !partial,
        "--filter: expected another filter than Fourier with --crops, --rotation, --translation or --shear, since it takes \
         whole images only, got fourier"
    );
    Ok(())
}
