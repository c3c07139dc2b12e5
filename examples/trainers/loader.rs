//! Batches of two views, made by threads of their own while the model trains on the batches before.
//!
//! What is in a batch follows from the seed and the number of its step alone: a run that goes on at step `k` sees the
//! batches that it would have seen, whatever the number of workers.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use ser_reg::contrib::AugmentationParameters;

use super::{
    augment::{Augment, SmallCrop},
    data::{Shaper, Skipped, Source},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch.
    pub batch: usize,
    /// The last so many of a batch have one crop in both views.
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

/// What an add-on wants of a batch besides the two views.
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
    /// The third view, if one was wished for.
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

/// A batch on its way to the device.
struct Made {
    views: [Vec<f32>; 2],
    third: Option<Vec<f32>>,
    parameters: [Vec<AugmentationParameters>; 2],
    indices: Vec<usize>,
    skipped: Vec<Skipped>,
    replaced: usize,
}

/// Where an image of a batch goes.
struct Place<'a> {
    views: [&'a mut [f32]; 2],
    third: Option<&'a mut [f32]>,
    drawn: [AugmentationParameters; 2],
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
        ensure!(
            config.workers > 0,
            "expected at least one worker for the data, got 0"
        );
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
        let producer = Producer {
            source,
            augment,
            config,
            extras,
            stop: stop.clone(),
        };
        let thread = thread::Builder::new()
            .name("data".into())
            .spawn(move || producer.run(&pool, &send))?;
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
        ensure!(
            self.next < self.steps,
            "expected at most {} steps, got one more",
            self.steps
        );
        let start = Instant::now();
        let made = self.receive()?;
        let [first, second] = made
            .views
            .map(|view| Tensor::from_vec(view, self.shape, device));
        let third = made
            .third
            .map(|view| Tensor::from_vec(view, self.third, device));
        let batch = Batch {
            first: first?,
            second: second?,
            drawn: Drawn {
                parameters: made.parameters,
                third: third.transpose()?,
            },
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

struct Producer {
    source: Source,
    augment: Augment,
    config: LoaderConfig,
    extras: Extras,
    stop: Arc<AtomicBool>,
}

/// Images tried in the place of one that cannot be read.
const SUBSTITUTES: usize = 8;

impl Producer {
    fn run(&self, pool: &ThreadPool, send: &SyncSender<Result<Made>>) {
        let per_epoch = self.source.len() / self.config.batch;
        let mut order = Vec::new();
        let mut shuffled = None;
        let mut named = HashSet::new();
        for step in self.config.first_step..self.config.steps {
            let epoch = step / per_epoch;
            if shuffled != Some(epoch) {
                order = self.order(epoch);
                shuffled = Some(epoch);
            }
            let start = step % per_epoch * self.config.batch;
            let made = pool.install(|| self.make(step, &order, start, &mut named));
            let failed = made.is_err();
            if self.stopped() || send.send(made).is_err() || failed {
                return;
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The images as epoch `epoch` shows them.
    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.source.len()).collect();
        order.shuffle(&mut stream(self.config.seed, Purpose::Order, [epoch, 0]));
        order
    }

    fn make(
        &self,
        step: usize,
        order: &[usize],
        start: usize,
        named: &mut HashSet<usize>,
    ) -> Result<Made> {
        let batch = self.config.batch;
        let mut indices = order[start..start + batch].to_vec();
        let size = self.source.channels() * self.augment.side * self.augment.side;
        let plain = batch - self.config.shared;
        let mut views = [vec![0f32; batch * size], vec![0f32; batch * size]];
        let third = self.extras.third.map(|t| t.side(self.augment.side));
        let third_size = third.map_or(0, |side| self.source.channels() * side * side);
        let mut third = third.map(|_| vec![0f32; plain * third_size]);
        let [first, second] = &mut views;
        let mut thirds = third
            .iter_mut()
            .flat_map(|t| t.chunks_exact_mut(third_size));
        let each = first
            .chunks_exact_mut(size)
            .zip(second.chunks_exact_mut(size));
        let mut places: Vec<Place> = each
            .map(|(a, b)| Place {
                views: [a, b],
                third: thirds.next(),
                drawn: [AugmentationParameters::default(); 2],
            })
            .collect();
        let failures: Vec<(usize, anyhow::Error)> = places
            .par_iter_mut()
            .zip(indices.par_iter().enumerate())
            .map_init(Shaper::default, |shaper, (place, (position, &index))| {
                let shown = self.show(index, (step, position), shaper, place);
                shown.err().map(|why| (position, why))
            })
            .flatten_iter()
            .collect();
        let replaced = failures.len();
        let lost: Vec<usize> = failures.iter().map(|(position, _)| *position).collect();
        // One that can be read, once it was found.
        let mut known = (0..batch).find(|p| !lost.contains(p)).map(|p| indices[p]);
        let mut skipped = Vec::new();
        let mut name = |index: usize, why: anyhow::Error| {
            if named.insert(index) {
                skipped.push((self.source.path(index), format!("{why:#}")));
            }
        };
        for (position, why) in failures {
            let path = self.source.path(indices[position]);
            let mut last = format!("{}: {why:#}", path.display());
            name(indices[position], why);
            let place = &mut places[position];
            let mut shaper = Shaper::default();
            let found = self
                .substitutes(order, start, position, known)
                .find(
                    |&index| match self.show(index, (step, position), &mut shaper, place) {
                        Ok(()) => true,
                        Err(why) => {
                            last = format!("{}: {why:#}", self.source.path(index).display());
                            name(index, why);
                            false
                        }
                    },
                );
            let Some(found) = found else {
                let all = order.len();
                return Err(
                    anyhow!(last).context(format!("none of the {all} images can be read"))
                );
            };
            indices[position] = found;
            known = known.or(Some(found));
        }
        let parameters = [0, 1].map(|view| places[..plain].iter().map(|p| p.drawn[view]).collect());
        Ok(Made {
            views,
            third,
            parameters,
            indices,
            skipped,
            replaced,
        })
    }

    /// Images to try at `position` of the batch that begins at `start`: a few of the same epoch that are not in the batch,
    /// and last one that is `known` to be readable; all others while none is.
    fn substitutes(
        &self,
        order: &[usize],
        start: usize,
        position: usize,
        known: Option<usize>,
    ) -> impl Iterator<Item = usize> {
        let batch = self.config.batch;
        let others = order.len() - batch;
        let tries = match known {
            Some(_) => SUBSTITUTES.min(others),
            None if others > 0 => SUBSTITUTES + others,
            None => 0,
        };
        // Steps of a batch, so that the lost ones of a batch take different images; then every image in turn.
        let ahead = move |k: usize| match k < SUBSTITUTES {
            true => position + k * batch,
            false => k - SUBSTITUTES,
        };
        let outside =
            (0..tries).map(move |k| order[(start + batch + ahead(k) % others) % order.len()]);
        outside.chain(known)
    }

    /// Writes the views of an image at a place of a batch.
    fn show(
        &self,
        index: usize,
        (step, position): (usize, usize),
        shaper: &mut Shaper,
        place: &mut Place,
    ) -> Result<()> {
        if self.stopped() {
            return Ok(());
        }
        let picture = self.source.picture(index)?;
        let shared = position + self.config.shared >= self.config.batch;
        let [first, second] = &mut place.views;
        let views = [&mut **first, &mut **second];
        place.drawn = match self.extras.alike.get(position) {
            None => {
                let rng = &mut stream(self.config.seed, Purpose::Views, [step, position]);
                self.augment.views(&picture, shared, rng, shaper, views)?
            }
            Some(&with) => {
                let rng = &mut stream(self.config.seed, Purpose::Views, [step, with]);
                let sheet = (self.augment.side, self.augment.side);
                self.augment
                    .views_on(sheet, &picture, shared, rng, shaper, views)?
            }
        };
        match (&self.extras.third, &mut place.third) {
            (Some(Third::Untouched), Some(out)) => self.augment.untouched(&picture, shaper, out),
            (Some(Third::Small(small)), Some(out)) => {
                let rng = &mut stream(self.config.seed, Purpose::Third, [step, position]);
                self.augment.small_crop(&picture, small, rng, shaper, out)
            }
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy)]
enum Purpose {
    Order = 1,
    Views = 2,
    Third = 3,
}

/// A generator for one purpose at one place of the run.
fn stream(seed: u64, purpose: Purpose, [a, b]: [usize; 2]) -> StdRng {
    let mut key = [0; 32];
    let words = [seed, purpose as u64, a as u64, b as u64];
    for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    StdRng::from_seed(key)
}
