//! Batches of two views. Separate threads make them while the model trains on the batches before.
//!
//! A batch follows from the seed and the number of its step alone. A resumed run sees the batches that it would have seen,
//! whatever the number of workers.

mod producer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use rayon::ThreadPoolBuilder;
use ser_reg::contrib::AugmentationParameters;

use self::producer::{Made, Producer};
use super::{
    augment::{Augment, SmallCrop},
    data::{Skipped, Source},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch.
    pub batch: usize,
    /// The number of images, at the end of a batch, with one crop in both views.
    pub shared: usize,
    pub seed: u64,
    /// The step of the first batch: 0, or where a run goes on.
    pub first_step: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// Threads that make images.
    pub workers: usize,
    /// Finished batches that wait for the model.
    pub prefetch: usize,
}

/// What an add-on needs of a batch besides the two views.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extras {
    /// For each of the first images of a batch, the one whose crops and colors it shares; empty: all draw their own.
    pub alike: Vec<usize>,
    /// A third view of the first images, those that do not have one crop in both views.
    pub third: Option<Third>,
}

/// A third view.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Third {
    /// The image without augmentation.
    Untouched,
    /// One more crop, small in pixels.
    Small(SmallCrop),
}

impl Third {
    fn side(&self, views: usize) -> usize {
        match self {
            Self::Untouched => views,
            Self::Small(crop) => crop.side,
        }
    }
}

/// What belongs to the images of a batch that do not have one crop in both views.
pub struct Drawn {
    /// What was drawn for either view.
    pub parameters: [Vec<AugmentationParameters>; 2],
    /// The third view, if an add-on needs one.
    pub third: Option<Tensor>,
}

pub struct Batch {
    /// The two views, `(B, C, S, S)`.
    pub first: Tensor,
    pub second: Tensor,
    pub drawn: Drawn,
    /// The images shown.
    pub indices: Vec<usize>,
    /// Images that could not be read, each the first time that it is met; others stand in for them.
    pub skipped: Vec<Skipped>,
}

pub struct Loader {
    batches: Option<Receiver<Result<Made>>>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Of a batch of views, and of third views.
    shape: (usize, usize, usize, usize),
    third: (usize, usize, usize, usize),
    next: usize,
    steps: usize,
    waiting: Duration,
    replaced: usize,
}

impl Loader {
    /// Steps in an epoch: whole batches only.
    pub fn steps_per_epoch(source: &Source, batch: usize) -> usize {
        source.len() / batch.max(1)
    }

    /// Starts to make batches.
    pub fn new(source: Source, augment: Augment, config: LoaderConfig) -> Result<Self> {
        Self::with_extras(source, augment, config, Extras::default())
    }

    /// Starts to make batches with more than two views in them, or with views that images share.
    pub fn with_extras(
        source: Source,
        augment: Augment,
        config: LoaderConfig,
        extras: Extras,
    ) -> Result<Self> {
        ensure!(
            (1..=source.len()).contains(&config.batch),
            "expected batches of 1 to {} images, as many as there are to train on, got {}",
            source.len(),
            config.batch
        );
        ensure!(
            config.shared <= config.batch,
            "expected at most {} images of a batch with one crop in both views, got {}",
            config.batch,
            config.shared
        );
        let plain = config.batch - config.shared;
        ensure!(
            extras.alike.len() <= plain && extras.alike.iter().all(|&p| p < plain),
            "expected at most {plain} images of a batch that share their views with one of them, got {:?}",
            extras.alike
        );
        ensure!(config.workers > 0, "expected at least one worker for the data, got 0");
        augment.check().context("augmentation")?;
        ensure!(
            augment.statistics.len() == source.channels(),
            "expected statistics of {} channels, as many as the images have, got {}",
            source.channels(),
            augment.statistics.len()
        );
        // Not the global pool: the model computes there.
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|i| format!("data {i}"))
            .build()?;
        let (send, batches) = sync_channel(config.prefetch);
        let stop = Arc::new(AtomicBool::new(false));
        let shape = (config.batch, source.channels(), augment.side, augment.side);
        let side = extras.third.map_or(0, |third| third.side(augment.side));
        let third = (plain, source.channels(), side, side);
        let producer = Producer { source, augment, config, extras, stop: stop.clone() };
        let thread =
            thread::Builder::new().name("data".into()).spawn(move || producer.run(&pool, &send))?;
        Ok(Self {
            batches: Some(batches),
            thread: Some(thread),
            stop,
            shape,
            third,
            next: config.first_step,
            steps: config.steps,
            waiting: Duration::ZERO,
            replaced: 0,
        })
    }

    /// The batch of the next step.
    pub fn next(&mut self, device: &Device) -> Result<Batch> {
        ensure!(self.next < self.steps, "expected at most {} steps, got one more", self.steps);
        let start = Instant::now();
        let made = self.receive()?;
        let [first, second] = made.views.map(|view| Tensor::from_vec(view, self.shape, device));
        let third = made.third.map(|view| Tensor::from_vec(view, self.third, device));
        let batch = Batch {
            first: first?,
            second: second?,
            drawn: Drawn { parameters: made.parameters, third: third.transpose()? },
            indices: made.indices,
            skipped: made.skipped,
        };
        self.next += 1;
        self.replaced += made.replaced;
        self.waiting += start.elapsed();
        Ok(batch)
    }

    /// Time in [`Loader::next`] so far: until batches were there, and on their way to the device.
    pub fn waiting(&self) -> Duration {
        self.waiting
    }

    /// How often an image stood in for one that could not be read.
    pub fn replaced(&self) -> usize {
        self.replaced
    }

    fn receive(&mut self) -> Result<Made> {
        let received = self.batches.as_ref().and_then(|b| b.recv().ok());
        if let Some(made) = received {
            return made.with_context(|| format!("cannot load the batch of step {}", self.next));
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => {
                let said = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or(panic.downcast_ref::<&str>().copied());
                bail!("the data thread failed: {}", said.unwrap_or("no message"))
            }
            _ => bail!("the data thread has stopped after an error"),
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A thread that waits to send wakes up when there is nobody to receive.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
