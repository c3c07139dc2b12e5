//! Progress of a run: a bar for the step at hand, a line for each epoch.

use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::records::{Balanced, Epoch, Step, mean};

pub struct Progress {
    bar: ProgressBar,
    batch: usize,
    /// Steps of this epoch, or those made since the run was resumed.
    steps: Vec<Step>,
    /// Seconds in them; evaluation does not count.
    seconds: f64,
    clock: Instant,
}

impl Progress {
    /// For `steps` steps with `batch` images each.
    pub fn new(steps: usize, batch: usize) -> Result<Self> {
        let bar = ProgressBar::new(steps as u64);
        bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {eta} left")?);
        Ok(Self { bar, batch, steps: Vec::new(), seconds: 0.0, clock: Instant::now() })
    }

    /// Starts at `step`.
    pub fn resume(&mut self, step: usize) {
        self.bar.set_position(step as u64);
        self.bar.reset_eta();
    }

    pub fn begin_epoch(&mut self) {
        self.steps.clear();
        self.seconds = 0.0;
        self.clock = Instant::now();
    }

    /// To be called at the end of each step.
    pub fn step(&mut self, step: &Step) {
        let seconds = self.clock.elapsed().as_secs_f64();
        self.clock = Instant::now();
        self.seconds += seconds;
        self.steps.push(*step);
        let momentum = step.momentum.map_or(String::new(), |m| format!("  momentum {m:.4}"));
        self.bar.set_message(format!(
            "loss {:.3}  lambda {}{momentum}  {:.0} images/s",
            step.loss,
            step.lambda,
            self.epoch_speed().0
        ));
        self.bar.inc(1);
    }

    /// Leaves out time that was not spent on training.
    pub fn leave_out(&mut self, time: Duration) {
        self.clock += time;
    }

    /// Seconds of a step of this epoch, on average.
    pub fn step_seconds(&self) -> f64 {
        self.seconds / self.steps.len().max(1) as f64
    }

    /// Prints the means of the epoch beside what was measured after it, of all blocks the one numbered `layer`.
    pub fn end_epoch(&self, measured: &Epoch, layer: usize) {
        let mean = |value: fn(&Step) -> Option<f32>| mean(self.steps.iter().filter_map(value));
        let mut line = format!("epoch {:>2}", measured.epoch);
        let mut say = |name: &str, value: Option<f64>, digits: usize| {
            if let Some(value) = value {
                line += &format!("  {name} {value:.digits$}");
            }
        };
        say("invariance", mean(|s| Some(s.invariance)), 4);
        say("equivariance", mean(|s| s.equivariance), 4);
        say("matching %", mean(|s| s.matching).map(|m| 100.0 * m), 1);
        if !measured.accuracy.is_empty() {
            say("feature std", measured.feature_std.map(f64::from), 3);
            say("score", measured.equivariance.get(layer - 1).copied().flatten(), 3);
            say("kNN %", measured.accuracy.first().copied(), 1);
        }
        for (name, value) in &measured.extra {
            say(name, Some(*value), 3);
        }
        say("images/s", Some(measured.images_per_s), 0);
        say("waiting %", Some(100.0 * measured.waiting), 1);
        self.say(&line);
    }

    /// Prints how the gradients of both losses compare on what both reach.
    pub fn balance(&self, measured: &Balanced) {
        let number = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.3}"));
        self.say(&format!(
            "step {:>3}  gradients: equivariance/invariance {}  cosine {}  lambda {:.3}",
            measured.step,
            number(measured.shared.ratio()),
            number(measured.shared.cosine),
            measured.lambda
        ));
    }

    /// Prints a line above the bar.
    pub fn say(&self, line: &str) {
        // `suspend` and not `println` of the bar, which is silent where there is no terminal.
        self.bar.suspend(|| println!("{line}"));
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Images per second in this epoch, and its seconds.
    pub fn epoch_speed(&self) -> (f64, f64) {
        let images = (self.steps.len() * self.batch) as f64;
        (images / self.seconds.max(1e-9), self.seconds)
    }
}

/// Runs `step` on all whole batches of `count` images, in a random order that is the same for each call. `step` returns the
/// text beside the progress bar.
pub fn epoch(
    name: &str,
    count: usize,
    batch: usize,
    mut step: impl FnMut(usize, &[usize]) -> Result<String>,
) -> Result<()> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut StdRng::seed_from_u64(0));
    let batches = order.chunks_exact(batch);
    let bar = ProgressBar::new(batches.len() as u64).with_prefix(name.to_string());
    bar.set_style(ProgressStyle::with_template(
        "{prefix} {bar:24} {pos}/{len}  {msg}  {eta} left",
    )?);
    for (i, indices) in batches.enumerate() {
        bar.set_message(step(i, indices)?);
        bar.inc(1);
    }
    bar.finish();
    Ok(())
}
