//! Options that the trainers have in common.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use clap::Parser;
use ser_reg::{
    Layout, partition::Partition, projector::ProjectorConfig, ser::SerConfig, view::ViewConfig,
};

use super::data::{self, Data};

#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Weight of the equivariance loss; 0 is the control: the same batches and encoder, without that loss.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub lambda: f64,
    /// The base method alone: no partition, no poses, CLS before the first block.
    #[arg(long)]
    pub baseline: bool,
    /// A run of under a minute that fails if the loss does not fall.
    #[arg(long)]
    pub smoke: bool,
    /// IDX files (plain or gzipped), CIFAR-10 binaries, or a folder of class sub-folders [default: 10,000 pictures of
    /// Fashion-MNIST that come with the repository].
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Everything random follows from it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[arg(long, default_value_t = 12)]
    pub epochs: usize,
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// The equivariance loss sits on the output of this block (of 4), and CLS joins after it.
    #[arg(long, default_value_t = 2)]
    pub layer: usize,
    /// Fraction of a batch that gets two poses of one crop, and the equivariance loss.
    #[arg(long, default_value_t = 0.125)]
    pub ratio: f64,
    /// Temperature of the equivariance loss.
    #[arg(long, default_value_t = 0.3)]
    pub temperature: f64,
    /// cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

impl Args {
    /// The options, with those replaced that a smoke run decides for itself.
    pub fn read() -> Self {
        let args = Self::parse();
        match args.smoke {
            true => Self { epochs: 2, ..args },
            false => args,
        }
    }

    pub fn device(&self) -> Result<Device> {
        device(&self.device)
    }

    /// The pictures; a smoke run takes a part of them.
    pub fn data(&self) -> Result<Data> {
        let path = self.data.clone().unwrap_or_else(data::embedded);
        let mut data = data::load(&path)?;
        if self.smoke {
            data.train = data.train.take(1536);
            data.test = data.test.take(300);
            data.note += "; smoke run on 1,536 and 300 of them";
        }
        ensure!(
            (2..=data.train.len()).contains(&self.batch_size),
            "--batch-size: expected 2 to {}, the number of training pictures, got {}",
            data.train.len(),
            self.batch_size
        );
        ensure!(self.epochs > 0, "--epochs: expected at least 1, got 0");
        Ok(data)
    }

    /// The equivariance loss of the preset, on maps that `prefix` tokens lead.
    pub fn ser(&self, prefix: usize) -> SerConfig {
        SerConfig {
            lambda: self.lambda,
            temperature: self.temperature,
            projector: Some(ProjectorConfig {
                hidden: 128,
                out: 128,
                norm: true,
            }),
            layout: Layout {
                prefix,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    /// Poses of the preset: each view of each picture draws one of the eight turns and flips; no scaling.
    pub fn poses(&self) -> ViewConfig {
        ViewConfig {
            area: (1.0, 1.0),
            aspect: (1.0, 1.0),
            ..Default::default()
        }
    }

    /// The part of a batch that is given poses; none in the baseline.
    pub fn partition(&self) -> Result<Option<Partition>> {
        match self.baseline {
            true => Ok(None),
            false => Ok(Some(Partition::new(self.batch_size, self.ratio)?)),
        }
    }

    /// What the run is called in its report.
    pub fn mode(&self) -> &'static str {
        match (self.baseline, self.lambda == 0.0) {
            (true, _) => "baseline",
            (false, true) => "lambda0",
            (false, false) => "ser",
        }
    }
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
