//! A run: its folder, its images, its steps.
//!
//! ```text
//! runs/moco_v3-ser-0/
//!   config.json             all settings
//!   metrics.jsonl           a line a step, a line an epoch
//!   checkpoint.safetensors  what --resume needs
//!   encoder.safetensors     the trained encoder, for evaluate and for VarBuilder::from_mmaped_safetensors; of DINO the teacher
//!   student.safetensors     of DINO only: the student
//!   result.json             the last measurements
//!   report.html             curves and figures
//!   compare.html            with --compare, this run beside lambda0/ and baseline/
//!   .lock                   while a program writes into the folder
//! ```

pub mod checkpoint;
mod epoch;
pub mod file;
pub mod finish;
pub mod interrupt;
pub mod lock;
pub mod log;
mod open;
mod options;
mod saved;
mod step;
pub mod variants;

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use ser_reg::Partition;

pub(crate) use open::images;
pub use step::{Batch, Losses, Term};

use self::{
    checkpoint::State, epoch::scores, interrupt::Interrupt, lock::Lock, log::Log, saved::Saved,
};
use super::{
    augment::Augment,
    balance::Balance,
    data::{Data, Fingerprint},
    loader::Loader,
    progress::Progress,
    settings::{Schedules, Settings},
    vit::VitConfig,
};

/// The regularizer is timed by itself at one step in this many, and not at the first ones, when caches are cold. If it takes
/// a quarter of a step, the measurement takes less than a hundredth of a run.
const PROBE_EVERY: usize = 32;
const PROBE_FIRST: usize = 8;

/// The results of a run, which --resume never removes.
const RESULTS: [&str; 4] =
    ["encoder.safetensors", "student.safetensors", "result.json", "evaluation.json"];

/// The pages that are made from the other files.
const PAGES: [&str; 2] = ["report.html", "compare.html"];

pub struct Run {
    pub settings: Settings,
    pub device: Device,
    pub vit: VitConfig,
    /// The encoder of `--init`, until it is taken over.
    init: Option<HashMap<String, Tensor>>,
    part: Option<Partition>,
    schedules: Schedules,
    balance: Balance,
    data: Data,
    fingerprint: Fingerprint,
    augment: Augment,
    folder: PathBuf,
    lock: Lock,
    resume: bool,
    brief: bool,
    compare: bool,
    checkpoint_every: Option<usize>,
    evaluate_every: usize,
    workers: usize,
    loader: Option<Loader>,
    log: Log,
    progress: Progress,
    interrupt: Interrupt,
    /// Steps made; steps of an epoch; steps in all.
    step: usize,
    epoch_steps: usize,
    steps: usize,
    saved: Saved,
    stopped: bool,
    start: Instant,
    /// The loader's waiting time when the epoch began.
    waited: Duration,
    /// Seconds of the regularizer by itself, at steps of this epoch.
    probes: Vec<f64>,
}

impl Run {
    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The number of steps in a fraction of the run.
    pub fn fraction(&self, of: f64) -> usize {
        (self.steps as f64 * of) as usize
    }

    /// How crops are made.
    pub fn augment(&self) -> &Augment {
        &self.augment
    }
}
