//! The end of a step and of an epoch: records, evaluation, checkpoints.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::{Run, State, checkpoint, file};
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
        let stop = self.interrupt.asked() && self.step < self.steps;
        let due = self.checkpoint_every.is_some_and(|n| n > 0 && self.step.is_multiple_of(n));
        let epoch_ends = self.step.is_multiple_of(self.epoch_steps);
        if epoch_ends || due || stop {
            self.check_weights(state)?;
        }
        if epoch_ends {
            self.end_epoch(encoder, figures)?;
        }
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

    fn end_epoch(&mut self, encoder: &Vit, figures: Vec<(&'static str, f64)>) -> Result<()> {
        let epoch = self.step / self.epoch_steps;
        let (speed, seconds) = self.progress.epoch_speed();
        let waited = self.loader.as_ref().map_or(Duration::ZERO, Loader::waiting);
        let waiting = (waited - self.waited).as_secs_f64() / seconds.max(1e-9);
        self.waited = waited;
        let evaluated = self.evaluate_every > 0
            && (epoch.is_multiple_of(self.evaluate_every) || epoch == self.settings.epochs);
        let regularizer = self.regularizer();
        let record = match evaluated {
            true => Epoch { regularizer, ..self.evaluate(encoder, speed, waiting, figures)? },
            false => Epoch {
                epoch,
                step: self.step,
                images_per_s: speed,
                waiting,
                regularizer,
                extra: figures.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
                ..Default::default()
            },
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

    /// Features, equivariance and accuracy of the encoder, on a part of the images.
    pub(super) fn evaluate(
        &self,
        encoder: &Vit,
        images_per_s: f64,
        waiting: f64,
        figures: Vec<(&'static str, f64)>,
    ) -> Result<Epoch> {
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
        let mut extra: BTreeMap<_, _> =
            figures.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        extra.retain(|_, v: &mut f64| v.is_finite());
        Ok(Epoch {
            epoch: self.step / self.epoch_steps,
            step: self.step,
            feature_std: Some(spread(&evaluation.test_features(encode)?)?),
            // A run that diverges has values that JSON cannot hold.
            equivariance: scores(&evaluation, encoder)?,
            accuracy: evaluation.accuracies(encode)?,
            images_per_s,
            waiting,
            regularizer: None,
            extra,
        })
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
