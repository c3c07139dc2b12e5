//! A run: its folder, its pictures, its steps.
//!
//! ```text
//! runs/moco_v3-ser-0/
//!   config.json             what was asked for
//!   metrics.jsonl           a line a step, a line an epoch
//!   checkpoint.safetensors  what --resume needs
//!   encoder.safetensors     the trained encoder, for evaluate and for VarBuilder::from_mmaped_safetensors
//!   result.json             the last measurements
//!   report.html             all of it to look at
//!   compare.html            with --compare, this run beside lambda0/ and baseline/
//! ```

pub mod checkpoint;
pub mod file;
pub mod finish;
mod interrupt;
pub mod log;
mod saved;
pub mod variants;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use ser_reg::ser::SerOutput;

use self::{checkpoint::State, interrupt::Interrupt, log::Log, saved::Saved};
use super::{
    addon,
    augment::Augment,
    balance::Balance,
    cli::Args,
    data::{self, Data, Wanted},
    encoder::{self, Card},
    eval::Evaluation,
    knn::spread,
    loader::{Drawn, Loader, LoaderConfig},
    overhead,
    progress::Progress,
    records::{Epoch, Record, Step, finite},
    settings::{Method, Preset, Settings},
    views::Posed,
    vit::{Vit, VitConfig},
    weights::Weights,
};

/// Pictures of the evaluations between epochs: neighbors are looked for among so many, for so many.
const BANK: usize = 2000;
const QUERIES: usize = 500;

/// The regularizer is timed by itself at one step in so many, not at the first ones, when all is cold: for one that takes
/// a quarter of a step, that is less than a hundredth of a run.
const PROBE_EVERY: usize = 32;
const PROBE_FIRST: usize = 8;

/// What a run leaves besides its configuration, its metrics and its checkpoint.
const OUTPUTS: [&str; 5] = [
    "encoder.safetensors",
    "result.json",
    "evaluation.json",
    "report.html",
    "compare.html",
];

pub struct Run {
    pub settings: Settings,
    pub device: Device,
    pub vit: VitConfig,
    data: Data,
    augment: Augment,
    folder: PathBuf,
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

/// The pictures of one step, in two views.
pub struct Batch {
    /// Steps made before this one.
    pub step: usize,
    pub first: Tensor,
    pub second: Tensor,
    /// What an add-on needs besides.
    pub drawn: Drawn,
}

impl Run {
    /// Reads the pictures and makes the folder. What is in it stays until [`Self::begin`].
    pub fn open(method: Method, args: &Args) -> Result<Self> {
        let start = Instant::now();
        let settings = Settings::new(method, args)?;
        variants::check(&settings, args)?;
        let device = args.device()?;
        let (data, augment) = pictures(&settings)?;
        let vit = settings.vit(&data.bank)?;
        let epoch_steps = data.train.len() / settings.batch_size;
        ensure!(
            epoch_steps > 0,
            "--batch-size: expected at most {}, the number of training pictures, got {}",
            data.train.len(),
            settings.batch_size
        );
        let steps = settings.epochs * epoch_steps;
        let name = format!("{}-{}-{}", method.name(), settings.label(), settings.seed);
        let folder = match (&args.out, settings.smoke) {
            (Some(folder), _) => folder.clone(),
            (None, true) => PathBuf::from("runs").join(format!("smoke-{name}")),
            (None, false) => PathBuf::from("runs").join(name),
        };
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        println!("{} {} | {}", method.name(), settings.label(), data.note);
        for (path, reason) in &data.skipped {
            println!("skipped {}: {reason}", path.display());
        }
        println!("run folder {}", folder.display());
        let large = settings.preset == Preset::ImagenetVitS16;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Self {
            device,
            vit,
            resume: args.resume,
            brief: args.brief,
            compare: args.compare,
            checkpoint_every: args.checkpoint_every,
            evaluate_every: args.evaluate_every.unwrap_or(if large { 10 } else { 1 }),
            workers: args.workers.unwrap_or(if large { cores } else { 1 }),
            loader: None,
            log: Log::new(&folder),
            progress: Progress::new(steps, settings.batch_size)?,
            interrupt: Interrupt::listen(),
            step: 0,
            epoch_steps,
            steps,
            saved: Saved::new(&folder),
            stopped: false,
            start,
            waited: Duration::ZERO,
            probes: Vec::new(),
            data,
            augment,
            folder,
            settings,
        })
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// So many steps for a fraction of the run.
    pub fn fraction(&self, of: f64) -> usize {
        (self.steps as f64 * of) as usize
    }

    /// How views are made.
    pub fn augment(&self) -> &Augment {
        &self.augment
    }

    /// Whether the step at hand is the last one of an epoch.
    pub fn epoch_ends(&self) -> bool {
        (self.step + 1).is_multiple_of(self.epoch_steps)
    }

    /// Restores the state if the run is resumed, or clears the folder of an earlier run's files; starts to load pictures. To
    /// be called once, when all is built.
    pub fn begin(&mut self, encoder: &Vit, state: &mut State) -> Result<()> {
        if self.resume && self.saved.path().exists() {
            self.step = checkpoint::restore(self.saved.path(), state, &self.settings)?;
            self.saved.resume(self.step);
            self.log.resume(self.step)?;
            self.progress.resume(self.step);
            println!("resumed after {} of {} steps", self.step, self.steps);
        } else {
            self.clear()?;
            let config = serde_json::to_vec_pretty(&self.settings)?;
            file::write(&self.folder.join("config.json"), &config)?;
            self.log.begin()?;
            if self.evaluate_every > 0 {
                let untrained = self.evaluate(encoder, 0.0, 0.0, Vec::new())?;
                self.log.write(Record::Epoch(untrained))?;
            }
        }
        self.loader = Some(Loader::with_wishes(
            self.data.train.clone(),
            self.augment.clone(),
            LoaderConfig {
                batch: self.settings.batch_size,
                shared: self.settings.posed()?,
                seed: self.settings.seed,
                first_step: self.step,
                steps: self.steps,
                workers: self.workers,
                prefetch: 2,
            },
            addon::wishes(&self.settings)?,
        )?);
        self.progress.begin_epoch();
        Ok(())
    }

    /// Removes what an earlier run left in the folder: it must not pass for this one's. The checkpoint goes first, so that
    /// nothing is resumed without its metrics.
    fn clear(&self) -> Result<()> {
        let outputs = OUTPUTS.map(|name| self.folder.join(name));
        let mut paths: Vec<PathBuf> = Saved::files(&self.folder)
            .into_iter()
            .chain(outputs)
            .collect();
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if file::is_unfinished(&path) {
                paths.push(path);
            }
        }
        for path in paths.iter().filter(|path| path.exists()) {
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// The pictures of the next step; `None` when the run is over, or was asked to stop.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.stopped || self.step == self.steps {
            return Ok(None);
        }
        let loader = self.loader.as_mut().context("the run was not begun")?;
        let batch = loader.next(&self.device)?;
        for (path, reason) in batch.skipped {
            // Some were named when the pictures were listed.
            if self.data.skipped.iter().any(|(known, _)| *known == path) {
                continue;
            }
            self.progress
                .say(&format!("skipped {}: {reason}", path.display()));
            self.data.skipped.push((path, reason));
        }
        Ok(Some(Batch {
            step: self.step,
            first: batch.first,
            second: batch.second,
            drawn: batch.drawn,
        }))
    }

    /// At a step in `PROBE_EVERY`, times `loss`, the regularizer's, on copies of the maps of `posed`, once more and by
    /// itself. Training goes on as if it had not been; neither does that time count as the step's.
    pub fn probe(
        &mut self,
        posed: &Posed,
        loss: impl FnOnce([&Tensor; 2]) -> ser_reg::Result<SerOutput>,
    ) -> Result<()> {
        let due = self.step % PROBE_EVERY == PROBE_FIRST;
        if due && self.settings.ser.lambda > 0.0 {
            let start = Instant::now();
            self.probes.push(overhead::time(posed, loss, &self.device)?);
            self.progress.leave_out(start.elapsed());
        }
        Ok(())
    }

    /// Compares the gradients of both losses if it is time, and writes the result down; `out` has the weight
    /// that [`Balance::lambda`] gives.
    pub fn measure(
        &mut self,
        balance: &Balance,
        invariance: &Tensor,
        out: &SerOutput,
        online: &Weights,
    ) -> Result<()> {
        let start = Instant::now();
        let measured = balance.measure(self.step, invariance, out, online)?;
        self.progress.leave_out(start.elapsed());
        if let Some(measured) = measured {
            self.progress.balance(&measured);
            self.log.write(Record::Balance(measured))?;
        }
        Ok(())
    }

    /// What the regularizer adds to the time of a step of this epoch; begins to collect for the next one.
    fn regularizer(&mut self) -> Option<f64> {
        let mut probes = std::mem::take(&mut self.probes);
        probes.sort_by(f64::total_cmp);
        let seconds = probes.get(probes.len() / 2)?;
        let rest = self.progress.step_seconds() - seconds;
        (rest > 0.0).then(|| seconds / rest)
    }

    /// Ends a step: writes down what was `seen`, and evaluates and saves when it is time.
    ///
    /// `extra` names figures of the method that are worth a line an epoch.
    pub fn end_step(
        &mut self,
        seen: Step,
        extra: Vec<(&'static str, f64)>,
        encoder: &Vit,
        state: &mut State,
    ) -> Result<()> {
        self.log.write(Record::Step(seen))?;
        self.progress.step(&seen);
        self.step += 1;
        let epoch_ends = self.step.is_multiple_of(self.epoch_steps);
        if epoch_ends {
            self.end_epoch(encoder, extra)?;
        }
        let stop = self.interrupt.asked() && self.step < self.steps;
        let due = self
            .checkpoint_every
            .is_some_and(|n| n > 0 && self.step.is_multiple_of(n));
        if epoch_ends || due || stop {
            let (settings, card, step) = (&self.settings, self.card(), self.step);
            let save = |path: &Path| checkpoint::save(path, state, settings, &card, step);
            let saved = self.saved.replace(step, save);
            saved.with_context(|| self.saved.last_good())?;
        }
        if epoch_ends {
            self.progress.begin_epoch();
        }
        self.stopped = stop;
        Ok(())
    }

    fn end_epoch(&mut self, encoder: &Vit, extra: Vec<(&'static str, f64)>) -> Result<()> {
        let epoch = self.step / self.epoch_steps;
        let (speed, seconds) = self.progress.epoch_speed();
        let waited = self.loader.as_ref().map_or(Duration::ZERO, Loader::waiting);
        let waiting = (waited - self.waited).as_secs_f64() / seconds.max(1e-9);
        self.waited = waited;
        let evaluated = self.evaluate_every > 0
            && (epoch.is_multiple_of(self.evaluate_every) || epoch == self.settings.epochs);
        let regularizer = self.regularizer();
        let record = match evaluated {
            true => Epoch {
                regularizer,
                ..self.evaluate(encoder, speed, waiting, extra)?
            },
            false => Epoch {
                epoch,
                step: self.step,
                images_per_s: speed,
                waiting,
                regularizer,
                extra: extra.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
                ..Default::default()
            },
        };
        self.progress.end_epoch(&record, self.settings.ser.layer);
        self.log.write(Record::Epoch(record))
    }

    /// Features, equivariance and accuracy of the encoder as it is, on a part of the pictures.
    fn evaluate(
        &self,
        encoder: &Vit,
        images_per_s: f64,
        waiting: f64,
        extra: Vec<(&'static str, f64)>,
    ) -> Result<Epoch> {
        let bank = self.data.bank.spread(BANK);
        let test = self.data.test.spread(QUERIES);
        let evaluation = Evaluation {
            bank: &bank,
            test: &test,
            statistics: &self.augment.statistics,
            device: &self.device,
        };
        let encode = |x: &Tensor| Ok(encoder.forward(x)?);
        let mut figures: std::collections::BTreeMap<_, _> =
            extra.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        figures.retain(|_, v: &mut f64| v.is_finite());
        Ok(Epoch {
            epoch: self.step / self.epoch_steps,
            step: self.step,
            feature_std: Some(spread(&evaluation.test_features(encode)?)?),
            // Of a run that diverges, what is no number is left out.
            equivariance: scores(&evaluation, encoder)?,
            accuracy: evaluation.poses(encode)?.to_vec(),
            images_per_s,
            waiting,
            regularizer: None,
            extra: figures,
        })
    }

    /// To be called with the losses of a step before they are differentiated: whether they are finite.
    pub fn check(&mut self, seen: &Step) -> Result<()> {
        if seen.loss.is_finite() && seen.invariance.is_finite() {
            return self.saved.vouch();
        }
        self.saved.roll_back()?;
        let equivariance = match seen.equivariance {
            Some(loss) => format!(", the equivariance loss {loss}"),
            None => String::new(),
        };
        let addon = match seen.addon {
            Some(loss) => format!(", the add-on's loss {loss}"),
            None => String::new(),
        };
        bail!(
            "step {}: the loss is {}; the base method's is {}{equivariance}{addon}. {}",
            seen.step,
            seen.loss,
            seen.invariance,
            self.saved.last_good()
        )
    }

    /// Where a step has failed, and what to go on from.
    pub fn position(&self) -> String {
        format!("step {}. {}", self.step, self.saved.last_good())
    }

    fn card(&self) -> Card {
        Card {
            vit: self.vit.clone(),
            statistics: self.augment.statistics.clone(),
            layer: self.settings.ser.layer,
            method: self.settings.method.name().to_string(),
            mode: self.settings.mode().to_string(),
            seed: self.settings.seed,
        }
    }

    fn save_encoder(&self, state: &State) -> Result<()> {
        let weights: Vec<_> = state
            .online
            .named()
            .into_iter()
            .filter_map(|(name, var)| {
                let name = name.strip_prefix("encoder.")?;
                Some((name.to_string(), var.as_detached_tensor()))
            })
            .collect();
        let bytes = encoder::to_bytes(&weights, &self.card())?;
        file::write(&self.folder.join("encoder.safetensors"), &bytes)
    }
}

/// The centered equivariance score of each block.
fn scores(evaluation: &Evaluation, encoder: &Vit) -> Result<Vec<Option<f64>>> {
    let scores = evaluation.equivariance(encoder)?;
    Ok(scores.into_iter().map(finite).collect())
}

/// The pictures of a run, and how its views are cut from them.
pub(crate) fn pictures(settings: &Settings) -> Result<(Data, Augment)> {
    let wanted = match settings.preset {
        Preset::FashionTiny => Wanted::default(),
        Preset::ImagenetVitS16 => Wanted::streamed(224),
    };
    let mut data = match (&settings.data, settings.preset) {
        (Some(path), _) => data::load(path, &wanted)?,
        (None, Preset::FashionTiny) => data::load(&data::embedded(), &wanted)?,
        (None, Preset::ImagenetVitS16) => {
            bail!("--preset imagenet-vit-s16: expected --data, a folder of class sub-folders")
        }
    };
    if settings.smoke {
        data = data.take(1536, 300);
        data.note += "; smoke run on 1,536 and 300 of them at most";
    }
    let mut augment = match settings.preset {
        Preset::FashionTiny => Augment::small(data.bank.side, data.bank.statistics()),
        Preset::ImagenetVitS16 => Augment::imagenet(settings.crop_min as f32),
    };
    augment.crop.area.0 = settings.crop_min as f32;
    augment.check()?;
    Ok((data, augment))
}
