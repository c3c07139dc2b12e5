//! Progress of a run: a bar for the step at hand, a line for each epoch, and whether the loss fell.

use std::time::Instant;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

/// Values of one step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step {
    /// What is minimised.
    pub loss: f32,
    /// Loss of the base method.
    pub invariance: f32,
    /// Equivariance loss before its weight.
    pub equivariance: f32,
    /// Fraction of tokens that are nearest to their own counterpart.
    pub matching: f32,
}

impl Step {
    fn mean(steps: &[Step]) -> Step {
        let n = steps.len().max(1) as f32;
        let mean = |value: fn(&Step) -> f32| steps.iter().map(value).sum::<f32>() / n;
        Step {
            loss: mean(|s| s.loss),
            invariance: mean(|s| s.invariance),
            equivariance: mean(|s| s.equivariance),
            matching: mean(|s| s.matching),
        }
    }
}

pub struct Progress {
    bar: ProgressBar,
    batch: usize,
    steps: Vec<Step>,
    epoch_start: usize,
    /// Seconds in the steps of this epoch, and in all steps; evaluation does not count.
    seconds: (f64, f64),
    clock: Instant,
}

impl Progress {
    /// For `steps` steps with `batch` pictures each.
    pub fn new(steps: usize, batch: usize) -> Result<Self> {
        let bar = ProgressBar::new(steps as u64);
        bar.set_style(ProgressStyle::with_template(
            "{bar:24} {pos}/{len}  {msg}  {eta} left",
        )?);
        Ok(Self {
            bar,
            batch,
            steps: Vec::with_capacity(steps),
            epoch_start: 0,
            seconds: (0.0, 0.0),
            clock: Instant::now(),
        })
    }

    pub fn begin_epoch(&mut self) {
        self.epoch_start = self.steps.len();
        self.seconds.0 = 0.0;
        self.clock = Instant::now();
    }

    pub fn steps_done(&self) -> usize {
        self.steps.len()
    }

    /// To be called at the end of each step.
    pub fn step(&mut self, step: Step, lambda: f64, momentum: f64) -> Result<()> {
        ensure!(
            step.loss.is_finite(),
            "the loss is {} at step {}",
            step.loss,
            self.steps.len()
        );
        let seconds = self.clock.elapsed().as_secs_f64();
        self.clock = Instant::now();
        self.seconds = (self.seconds.0 + seconds, self.seconds.1 + seconds);
        self.steps.push(step);
        self.bar.set_message(format!(
            "loss {:.3}  lambda {lambda}  momentum {momentum:.4}  {:.0} images/s",
            step.loss,
            self.epoch_speed()
        ));
        self.bar.inc(1);
        Ok(())
    }

    /// Prints the means of the epoch beside what was measured after it.
    pub fn end_epoch(&self, epoch: usize, spread: f32, score: f64) {
        let mean = Step::mean(&self.steps[self.epoch_start..]);
        // Without an equivariance loss there is none to show.
        let equivariance = match mean.equivariance > 0.0 {
            true => format!(
                "equivariance {:.4}  matching {:.1} %  ",
                mean.equivariance,
                100.0 * mean.matching
            ),
            false => String::new(),
        };
        // `suspend` and not `println` of the bar, which is silent where there is no terminal.
        self.bar.suspend(|| {
            println!(
                "epoch {epoch:>2}  invariance {:.4}  {equivariance}feature std {spread:.3}  \
                 equivariance score {score:.3}  {:.0} images/s",
                mean.invariance,
                self.epoch_speed()
            );
        });
    }

    /// Means over the first and the last eighth of the run.
    pub fn ends(&self) -> (Step, Step) {
        self.bar.finish_and_clear();
        let n = self.steps.len();
        let eighth = n.div_ceil(8);
        (
            Step::mean(&self.steps[..eighth]),
            Step::mean(&self.steps[n - eighth..]),
        )
    }

    /// Pictures per second over the whole run, evaluation not counted.
    pub fn speed(&self) -> f64 {
        (self.steps.len() * self.batch) as f64 / self.seconds.1
    }

    fn epoch_speed(&self) -> f64 {
        ((self.steps.len() - self.epoch_start) * self.batch) as f64 / self.seconds.0
    }
}
