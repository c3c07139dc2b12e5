//! The thread that makes batches, and the workers that it shares them out to.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
};

use anyhow::{Result, anyhow};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rayon::{ThreadPool, prelude::*};
use ser_reg::contrib::AugmentationParameters;

use super::{Extras, LoaderConfig, Third};
use crate::{
    augment::Augment,
    data::{Shaper, Skipped, Source},
};

/// A batch on its way to the device.
pub(super) struct Made {
    pub(super) views: [Vec<f32>; 2],
    pub(super) third: Option<Vec<f32>>,
    pub(super) parameters: [Vec<AugmentationParameters>; 2],
    pub(super) indices: Vec<usize>,
    pub(super) skipped: Vec<Skipped>,
    pub(super) replaced: usize,
}

/// Where an image of a batch goes.
struct Place<'a> {
    views: [&'a mut [f32]; 2],
    third: Option<&'a mut [f32]>,
    drawn: [AugmentationParameters; 2],
}

pub(super) struct Producer {
    pub(super) source: Source,
    pub(super) augment: Augment,
    pub(super) config: LoaderConfig,
    pub(super) extras: Extras,
    pub(super) stop: Arc<AtomicBool>,
}

/// Images tried in the place of one that cannot be read.
const SUBSTITUTES: usize = 8;

impl Producer {
    pub(super) fn run(&self, pool: &ThreadPool, send: &SyncSender<Result<Made>>) {
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
        let mut thirds = third.iter_mut().flat_map(|t| t.chunks_exact_mut(third_size));
        let each = first.chunks_exact_mut(size).zip(second.chunks_exact_mut(size));
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
            let found = self.substitutes(order, start, position, known).find(|&index| {
                match self.show(index, (step, position), &mut shaper, place) {
                    Ok(()) => true,
                    Err(why) => {
                        last = format!("{}: {why:#}", self.source.path(index).display());
                        name(index, why);
                        false
                    }
                }
            });
            let Some(found) = found else {
                let all = order.len();
                return Err(anyhow!(last).context(format!("none of the {all} images can be read")));
            };
            indices[position] = found;
            known = known.or(Some(found));
        }
        let parameters = [0, 1].map(|view| places[..plain].iter().map(|p| p.drawn[view]).collect());
        Ok(Made { views, third, parameters, indices, skipped, replaced })
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
                self.augment.views_on(sheet, &picture, shared, rng, shaper, views)?
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
