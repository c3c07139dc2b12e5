//! The end of a step and of an epoch: records, evaluation, checkpoints.

use std::time::Duration;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::{
    Run, State,
    checkpoint::{self, Header},
    file,
};
use crate::{
    encoder::{self, Card, Network},
    eval::Evaluation,
    finite,
    knn::spread,
    loader::Loader,
    records::{Epoch, Record, Step, finite},
    vit::Vit,
    weights::Weights,
};

/// Images of the evaluations between epochs: the neighbors come from this many, for this many queries.
pub(super) const BANK: usize = 2000;
pub(super) const QUERIES: usize = 500;

impl Run {
    /// Whether the current step is the last one of an epoch.
    pub fn epoch_ends(&self) -> bool {
        (self.step + 1).is_multiple_of(self.epoch_steps)
    }

    /// Ends a step: records `seen`, and evaluates and saves when they are due. `figures` are recorded once an epoch.
    pub(super) fn end_step(
        &mut self,
        seen: Step,
        figures: Vec<(&'static str, f64)>,
        encoder: &Vit,
        state: &mut State,
    ) -> Result<()> {
        self.log.write(Record::Step(seen))?;
        self.progress.step(&seen);
        self.step += 1;
        let epoch_ends = self.step.is_multiple_of(self.epoch_steps);
        let ended = epoch_ends.then(|| self.ended_epoch(figures));
        let stop = self.interrupt.asked() && self.step < self.steps;
        let asked = self.interrupt.take_checkpoint();
        let due = self.checkpoint_every.is_some_and(|n| self.step.is_multiple_of(n));
        if epoch_ends || due || stop || asked {
            self.check_weights(state)?;
            self.save(state, ended.as_ref())?;
        }
        if asked {
            self.progress.say(&format!("checkpoint after {} steps", self.step));
        }
        if let Some(ended) = ended {
            self.end_epoch(encoder, ended)?;
            self.progress.begin_epoch();
        }
        self.stopped = stop;
        Ok(())
    }

    /// Whether the weights after the last update are finite: no loss shows those of the last step.
    fn check_weights(&self, state: &State) -> Result<()> {
        for weights in [Some(&state.online), state.momentum.as_ref()].into_iter().flatten() {
            let named = weights.named();
            finite::ensure_weights(
                named.iter().map(|(name, var)| (name.as_str(), var.as_tensor())),
            )
            .with_context(|| format!("after {} steps. {}", self.step, self.saved.last_good()))?;
        }
        Ok(())
    }

    fn save(&mut self, state: &State, epoch: Option<&Epoch>) -> Result<()> {
        self.log.sync()?;
        let (settings, data, card, step) =
            (&self.settings, &self.fingerprint, &self.card(), self.step);
        let header = Header { settings, data, card, step, epoch };
        let saved = self.saved.replace(step, |path| checkpoint::save(path, state, &header));
        saved.with_context(|| self.saved.last_good())
    }

    /// What is known of an epoch before its evaluation.
    fn ended_epoch(&mut self, figures: Vec<(&'static str, f64)>) -> Epoch {
        let (images_per_s, seconds) = self.progress.epoch_speed();
        let waited = self.loader.as_ref().map_or(Duration::ZERO, Loader::waiting);
        let waiting = (waited - self.waited).as_secs_f64() / seconds.max(1e-9);
        self.waited = waited;
        let finite = figures.into_iter().filter(|(_, value)| value.is_finite());
        Epoch {
            epoch: self.step / self.epoch_steps,
            step: self.step,
            images_per_s,
            waiting,
            regularizer: self.regularizer(),
            extra: finite.map(|(name, value)| (name.to_string(), value)).collect(),
            ..Default::default()
        }
    }

    /// Evaluates if it is due, and records the epoch. Its checkpoint is written: a resumed run does this again.
    pub(super) fn end_epoch(&mut self, encoder: &Vit, ended: Epoch) -> Result<()> {
        let every = self.evaluate_every;
        let last = ended.epoch == self.settings.epochs;
        let record = match every > 0 && (ended.epoch.is_multiple_of(every) || last) {
            true => self.evaluate(encoder, ended)?,
            false => ended,
        };
        self.progress.end_epoch(&record, self.settings.ser.layer);
        self.log.write(Record::Epoch(record))
    }

    /// The time that the regularizer adds to a step of this epoch, relative to the rest. It clears the measurements.
    fn regularizer(&mut self) -> Option<f64> {
        let mut probes = std::mem::take(&mut self.probes);
        probes.sort_by(f64::total_cmp);
        let seconds = probes.get(probes.len() / 2)?;
        let rest = self.progress.step_seconds() - seconds;
        (rest > 0.0).then(|| seconds / rest)
    }

    /// The record with features, equivariance and accuracy of the encoder, on a part of the images. A request to stop ends the
    /// program at once.
    pub(super) fn evaluate(&self, encoder: &Vit, record: Epoch) -> Result<Epoch> {
        self.interrupt.idle(self.last_words());
        let bank = self.data.bank.draw(BANK);
        let test = self.data.test.draw(QUERIES);
        let evaluation = Evaluation {
            bank: &bank,
            test: &test,
            statistics: &self.augment.statistics,
            device: &self.device,
        };
        // The weights were checked by themselves.
        let encode = |x: &Tensor| finite::features(encoder, [], x);
        let record = Epoch {
            feature_std: Some(spread(&evaluation.test_features(encode)?)?),
            // A run that diverges has values that JSON cannot hold.
            equivariance: scores(&evaluation, encoder)?,
            accuracy: evaluation.accuracies(encode)?,
            ..record
        };
        self.interrupt.busy();
        Ok(record)
    }

    /// How a run that was asked to stop goes on.
    pub(super) fn last_words(&self) -> String {
        let path = self.saved.path();
        match self.step {
            0 => "stopped before the first step; the same command with --resume begins again"
                .to_string(),
            step => format!(
                "stopped after {step} of {} steps; the same command with --resume goes on from {}",
                self.steps,
                path.display()
            ),
        }
    }

    fn card(&self) -> Card {
        Card {
            vit: self.vit.clone(),
            statistics: self.augment.statistics.clone(),
            layer: self.settings.ser.layer,
            method: self.settings.method.name().to_string(),
            mode: self.settings.mode().to_string(),
            seed: self.settings.seed,
            network: Network::of(self.settings.method),
        }
    }

    /// Writes the encoder that is evaluated, and beside DINO's teacher its student.
    pub(super) fn save_encoder(&self, state: &State) -> Result<()> {
        let card = self.card();
        let save = |weights: &Weights, card: &Card, name: &str| {
            let encoder = weights.named().into_iter().filter_map(|(name, var)| {
                let name = name.strip_prefix("encoder.")?;
                Some((name.to_string(), var.as_detached_tensor()))
            });
            let bytes = encoder::to_bytes(&encoder.collect::<Vec<_>>(), card)?;
            file::write(&self.folder.join(name), &bytes)
        };
        if card.network == Network::Encoder {
            return save(&state.online, &card, "encoder.safetensors");
        }
        let teacher = state.momentum.as_ref().context("expected the weights of the teacher")?;
        save(teacher, &card, "encoder.safetensors")?;
        let student = Card { network: Network::Encoder, ..card };
        save(&state.online, &student, "student.safetensors")
    }
}

/// The centered equivariance score of each block.
pub(super) fn scores(evaluation: &Evaluation, encoder: &Vit) -> Result<Vec<Option<f64>>> {
    let scores = evaluation.equivariance(encoder)?;
    Ok(scores.into_iter().map(finite).collect())
}
