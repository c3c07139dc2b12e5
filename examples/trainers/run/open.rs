//! The begin of a run: every setting is checked before any file of an older run is touched.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ser_reg::Regularizer;

use super::{
    PAGES, RESULTS, Run,
    checkpoint::{self, State},
    epoch::{BANK, QUERIES},
    file,
    interrupt::Interrupt,
    lock::Lock,
    log::Log,
    options::Options,
    saved::Saved,
    variants,
};
use crate::{
    addon,
    augment::Augment,
    balance::Balance,
    cli::Args,
    data::{self, Data, Wanted},
    encoder,
    loader::{Loader, LoaderConfig},
    progress::Progress,
    records::{Epoch, Record},
    settings::{Method, Preset, Settings},
    vit::Vit,
};

impl Run {
    /// Checks the settings, takes the folder and reads the images. Files in the folder stay until [`Self::begin`].
    pub fn open(method: Method, args: &Args) -> Result<Self> {
        let start = Instant::now();
        let interrupt = Interrupt::listen("stopped before the first step; nothing was changed");
        let settings = Settings::new(method, args)?;
        variants::check(&settings, args)?;
        let Options { folder, resume, brief, compare, checkpoint_every, evaluate_every, workers } =
            Options::new(&settings, args)?;
        let device = args.device()?;
        // A new folder is made when all else is in order.
        let lock = folder.is_dir().then(|| Lock::take(&folder, "--out")).transpose()?;
        let (data, augment) = images(&settings)?;
        let root = settings.data.clone().unwrap_or_else(data::embedded);
        let fingerprint = data.fingerprint(&root);
        let mut vit = settings.vit(&data.bank)?;
        let init = match &settings.init {
            None => None,
            Some(path) => {
                let (weights, card) = encoder::read(path, &device)?;
                vit = card.fitted(vit).with_context(|| format!("--init {}", path.display()))?;
                Some(weights)
            }
        };
        let epoch_steps = data.train.len() / settings.batch_size;
        ensure!(
            epoch_steps > 0,
            "--batch-size: expected at most {}, the number of training images ({}), got {}",
            data.train.len(),
            data.note,
            settings.batch_size
        );
        let steps = settings.epochs.checked_mul(epoch_steps);
        // Schedules and file formats count in exact floating-point numbers.
        let steps = steps.filter(|&steps| steps < 1 << 50).with_context(|| {
            format!("--epochs: expected fewer than 2^50 steps, got {} epochs", settings.epochs)
        })?;
        let schedules = settings.schedules(steps)?;
        let balance = Balance::new(&settings.ser, &vit, steps)?;
        let lock = match lock {
            Some(lock) => lock,
            None => {
                std::fs::create_dir_all(&folder).with_context(|| {
                    format!("--out: cannot make the folder {}", folder.display())
                })?;
                Lock::take(&folder, "--out")?
            }
        };
        println!("{} {} | {}", method.name(), settings.label(), data.note);
        for (path, reason) in &data.skipped {
            println!("skipped {}: {reason}", path.display());
        }
        if let (n, m) = (data.bank.len().min(BANK), data.test.len().min(QUERIES))
            && (n, m) != (data.bank.len(), data.test.len())
        {
            println!("evaluated between epochs with {n} and {m} of them, drawn by class");
        }
        println!("run folder {}", folder.display());
        Ok(Self {
            device,
            vit,
            init,
            part: settings.partition()?,
            schedules,
            balance,
            resume,
            brief,
            compare,
            checkpoint_every,
            evaluate_every,
            workers,
            loader: None,
            log: Log::new(&folder),
            progress: Progress::new(steps, settings.batch_size)?,
            interrupt,
            step: 0,
            epoch_steps,
            steps,
            saved: Saved::new(&folder),
            stopped: false,
            start,
            waited: Duration::ZERO,
            probes: Vec::new(),
            data,
            fingerprint,
            augment,
            folder,
            lock,
            settings,
        })
    }

    /// Restores the state if the run is resumed. Otherwise takes over the encoder of `--init` and removes the files of an
    /// earlier run. Starts to load images. `encoder` is the network that the run measures. To be called once, when all modules are built.
    pub fn begin(&mut self, encoder: &Vit, ser: &mut Regularizer, state: &mut State) -> Result<()> {
        state.buffers.extend(self.balance.buffers());
        let resumed = match self.resume && file::exists(self.saved.path())? {
            true => Some(self.restore(state)?),
            false => None,
        };
        if resumed.is_none() {
            self.check_nothing_is_lost()?;
            if let Some(weights) = self.init.take() {
                state.online.load("encoder.", &weights).context("--init")?;
                if let Some(momentum) = &state.momentum {
                    momentum.follow(&state.online, 0.0)?;
                }
            }
        }
        ser.set_lambda(self.balance.lambda(self.step)?)?;
        let config = serde_json::to_vec_pretty(&self.settings)?;
        self.loader = Some(self.loader()?);
        // Up to here no file was touched.
        self.interrupt.busy();
        self.remove_unfinished()?;
        match resumed {
            Some((records, ended)) => {
                self.saved.resume(self.step);
                self.log.resume(records)?;
                self.progress.resume(self.step);
                println!("resumed after {} of {} steps", self.step, self.steps);
                if let Some(ended) = ended {
                    self.end_epoch(encoder, ended)?;
                }
            }
            None => {
                self.clear()?;
                file::write(&self.folder.join("config.json"), &config)?;
                self.log.begin()?;
                if self.evaluate_every > 0 {
                    let untrained = self.evaluate(encoder, Epoch::default())?;
                    self.log.write(Record::Epoch(untrained))?;
                }
            }
        }
        self.progress.begin_epoch();
        Ok(())
    }

    /// Restores the state. Gives the records before it, and the epoch that ended with it if its evaluation is missing.
    fn restore(&mut self, state: &mut State) -> Result<(Vec<Record>, Option<Epoch>)> {
        let path = self.saved.path();
        let restored = checkpoint::restore(path, state, &self.settings, &self.fingerprint)?;
        self.step = restored.step;
        let records = self.log.before(self.step)?;
        let is_recorded = |ended: &Epoch| {
            let is_it =
                |record: &Record| matches!(record, Record::Epoch(e) if e.epoch == ended.epoch);
            records.iter().any(is_it)
        };
        let missing = restored.epoch.filter(|ended| !is_recorded(ended));
        Ok((records, missing))
    }

    /// A run that is to be resumed and has no checkpoint begins again, unless it has results.
    fn check_nothing_is_lost(&self) -> Result<()> {
        for name in RESULTS {
            ensure!(
                !(self.resume && file::exists(&self.folder.join(name))?),
                "--resume: the run in {} has ended with {name}, and its checkpoint is gone; give another --out, or leave out \
                 --resume to replace the run",
                self.folder.display()
            );
        }
        Ok(())
    }

    fn loader(&self) -> Result<Loader> {
        Loader::with_extras(
            self.data.train.clone(),
            self.augment.clone(),
            LoaderConfig {
                batch: self.settings.batch_size,
                shared: self.settings.shared()?,
                seed: self.settings.seed,
                first_step: self.step,
                steps: self.steps,
                workers: self.workers,
                prefetch: 2,
            },
            addon::extras(&self.settings)?,
        )
    }

    /// Removes the files of an earlier run, which must not be taken for this one's. The checkpoint goes first, so that no run
    /// is resumed without its metrics.
    fn clear(&self) -> Result<()> {
        let outputs =
            [&RESULTS[..], &PAGES].concat().into_iter().map(|name| self.folder.join(name));
        let paths = Saved::files(&self.folder).into_iter().chain(outputs);
        paths.filter(|path| path.exists()).try_for_each(|path| remove(&path))
    }

    /// Removes what a killed program has left of a file.
    fn remove_unfinished(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if file::is_unfinished(&path) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// The images of a run, and how its crops are made from them.
pub(crate) fn images(settings: &Settings) -> Result<(Data, Augment)> {
    let wanted = match settings.preset {
        Preset::FashionTiny => Wanted::default(),
        Preset::ImagenetVitS16 => Wanted::streamed(224),
    };
    if let Some(path) = &settings.data {
        ensure!(
            path.to_str().is_some(),
            "--data: expected a path in UTF-8, because config.json keeps it, got {}",
            path.display()
        );
    }
    let mut data = match (&settings.data, settings.preset) {
        (Some(path), _) => data::load(path, &wanted)?,
        (None, Preset::FashionTiny) => data::load(&data::embedded(), &wanted)?,
        (None, Preset::ImagenetVitS16) => {
            bail!("--preset imagenet-vit-s16: expected --data, a folder of images")
        }
    };
    if settings.smoke {
        data = data.take(1536, 300);
        let (train, test) = (data.train.len(), data.test.len());
        data.note += &format!("; smoke run on {train} and {test} of them, drawn by class");
    }
    let constant = data.bank.constant();
    ensure!(
        constant < data.bank.len(),
        "--data: expected images with content, got {constant} images of one color each (transparent parts are white): {}",
        data.note
    );
    let mut augment = match settings.preset {
        Preset::FashionTiny => Augment::small(data.bank.side, data.bank.statistics()),
        Preset::ImagenetVitS16 => Augment::imagenet(settings.crop_min as f32),
    };
    augment.crop.area.0 = settings.crop_min as f32;
    augment.check()?;
    Ok((data, augment))
}
