//! The checks of all settings. They run before images are read and before any file of an older run is touched.

use anyhow::{Context, Result, ensure};
use ser_reg::{SerLoss, TokenGrid, ViewSampler};

use super::{Method, Settings};
use crate::addon;

impl Settings {
    pub(super) fn check(&self) -> Result<()> {
        ensure!(self.epochs > 0, "--epochs: expected at least 1, got 0");
        ensure!(self.batch_size >= 2, "--batch-size: expected at least 2, got {}", self.batch_size);
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
        self.partition().context("--ratio, --batch-size")?;
        // The grid does not matter for these checks, which need no images.
        ViewSampler::new(TokenGrid::square(1)?, self.ser.views).context("the views")?;
        SerLoss::new(self.ser.loss).context("the regularizer")?;
        if let Some(balance) = &self.ser.balance {
            balance.check(if self.baseline { 0.0 } else { self.ser.loss.lambda })?;
        }
        // A path that cannot be written into the configuration is refused before any file is touched.
        serde_json::to_value(self).context("expected UTF-8 paths in --data and --init")?;
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
