//! The options of a run that are no settings: a resumed run may change them.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::{
    cli::Args,
    settings::{
        Preset, Settings,
        check::{MOST, below_one, count},
    },
};

/// The most threads that load images.
const WORKERS: usize = 1024;

pub(super) struct Options {
    pub folder: PathBuf,
    pub resume: bool,
    pub brief: bool,
    pub compare: bool,
    pub checkpoint_every: Option<usize>,
    pub evaluate_every: usize,
    pub workers: usize,
}

impl Options {
    /// # Errors
    /// If an option is out of range: its flag.
    pub fn new(settings: &Settings, args: &Args) -> Result<Self> {
        let large = settings.preset == Preset::ImagenetVitS16;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let options = Self {
            folder: folder(settings, args),
            resume: args.resume,
            brief: args.brief,
            compare: args.compare,
            checkpoint_every: args.checkpoint_every,
            evaluate_every: args.evaluate_every.unwrap_or(if large { 10 } else { 1 }),
            workers: args.workers.unwrap_or(if large { cores.min(WORKERS) } else { 1 }),
        };
        count("--workers", 1..=WORKERS, options.workers)?;
        count("--checkpoint-every", 1..=MOST, options.checkpoint_every.unwrap_or(1))?;
        count("--evaluate-every", 0..=MOST, options.evaluate_every)?;
        // A smoke run has its own number of epochs, and Barlow Twins no momentum: what is not used is checked too.
        count("--epochs", 1..=MOST, args.epochs.unwrap_or(1))?;
        below_one("--momentum", args.momentum.unwrap_or(0.0))?;
        options.check_init(settings)?;
        Ok(options)
    }

    /// A new run removes what an older one left in its folder, and must not remove what it starts from.
    fn check_init(&self, settings: &Settings) -> Result<()> {
        let Some(init) = &settings.init else {
            return Ok(());
        };
        let inside = self.folder.canonicalize().is_ok_and(|out| init.parent() == Some(&out));
        ensure!(
            !inside,
            "--init: expected a file outside the folder of the run, which replaces the files in it, got {}; give another \
             --out",
            init.display()
        );
        Ok(())
    }
}

fn folder(settings: &Settings, args: &Args) -> PathBuf {
    let smoke = if settings.smoke { "smoke-" } else { "" };
    let (method, label, seed) = (settings.method.name(), settings.label(), settings.seed);
    match &args.out {
        Some(folder) => folder.clone(),
        None => Path::new("runs").join(format!("{smoke}{method}-{label}-{seed}")),
    }
}
