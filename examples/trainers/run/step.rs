//! One step of a run: the batch goes out to the trainer, and its losses come back.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use rand::rngs::StdRng;
use ser_reg::{Projector, Regularizer, SerOutput, regularizer::RegularizerOutput};

use super::{PROBE_EVERY, PROBE_FIRST, Run, State};
use crate::{
    addon::AddOn,
    clip::{clip_to, freeze},
    encoder::Network,
    loader::Drawn,
    overhead,
    random::{Purpose, generator, seed},
    reach,
    records::{Record, Step},
    settings::SerImages,
    views::{self, Images},
    vit::Vit,
    weights::{tapped, trained},
};

/// The images of one step.
pub struct Batch {
    /// The step's record so far: its number and the scheduled values.
    pub now: Step,
    /// Two crops of each image of the base method, without those whose views also serve the regularizer.
    pub crops: [Tensor; 2],
    /// The regularizer's images; `None` where it does not run.
    pub ser: Option<Images>,
    /// The parameters of the augmentation and the third views that an add-on needs.
    pub drawn: Drawn,
    seed: u64,
}

impl Batch {
    /// Steps made before this one.
    pub fn step(&self) -> usize {
        self.now.step
    }

    /// Momentum of the key or teacher encoder.
    pub fn momentum(&self) -> Result<f64> {
        self.now.momentum.context("expected a method with a momentum encoder")
    }

    /// Features of both crops, as [`views::encode`].
    pub fn encode(
        &self,
        model: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Option<[Tensor; 2]>> {
        views::encode(&self.crops, model)
    }

    /// The images of the regularizer as one tensor.
    fn ser_images(&self) -> Option<&Tensor> {
        self.ser.as_ref().map(|(Images::Own(images) | Images::Shared(images))| images)
    }

    /// The generator of the regularizer's views. It is separate: crops and order are the same without the regularizer.
    pub fn rng(&self) -> StdRng {
        generator(self.seed, Purpose::Views, self.step())
    }

    /// The seed of the blocks that stochastic depth drops.
    pub fn drop_path(&self) -> u64 {
        seed(self.seed, Purpose::DropPath, self.step())
    }
}

/// The regularizer's part of a step.
pub struct Term {
    /// `λ·L`, and `L` with its graph.
    pub loss: Tensor,
    pub unweighted: Tensor,
    pub accuracy: Option<Tensor>,
}

impl From<SerOutput> for Term {
    fn from(out: SerOutput) -> Self {
        Self { loss: out.loss, unweighted: out.unweighted, accuracy: out.accuracy }
    }
}

impl Term {
    /// The loss and the features of both views, those of the encoder and those of the momentum encoder.
    pub fn and_outputs<T, K>(
        out: RegularizerOutput<T, K>,
    ) -> (Option<Self>, Option<[T; 2]>, Option<[K; 2]>) {
        let term = Self { loss: out.loss, unweighted: out.unweighted, accuracy: out.accuracy };
        (Some(term), Some(out.outputs), Some(out.key_outputs))
    }
}

/// What a trainer computes in one step.
pub struct Losses<'a> {
    /// The base method's loss.
    pub base: Tensor,
    pub ser: Option<Term>,
    /// The momentum encoder and its head: the regularizer is timed with them.
    pub keys: Option<(&'a Vit, &'a Projector)>,
    pub addon: Option<&'a AddOn>,
    /// Parameters whose names begin so keep their values.
    pub frozen: Option<&'a str>,
    /// After the update the momentum encoder follows with this momentum.
    pub follow: Option<f64>,
    /// Values of the method that are recorded once an epoch.
    pub figures: Vec<(&'static str, f64)>,
}

impl Losses<'_> {
    pub fn new(base: Tensor, ser: Option<Term>) -> Self {
        Self { base, ser, keys: None, addon: None, frozen: None, follow: None, figures: Vec::new() }
    }
}

impl Run {
    /// The images of the next step; `None` when the run is over or was asked to stop.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.stopped || self.step == self.steps {
            return Ok(None);
        }
        let loader = self.loader.as_mut().context("the run was not begun")?;
        let batch = loader.next(&self.device)?;
        for (path, reason) in batch.skipped {
            // Some were named when the images were listed.
            if self.data.skipped.iter().any(|(known, _)| *known == path) {
                continue;
            }
            self.progress.say(&format!("skipped {}: {reason}", path.display()));
            self.data.skipped.push((path, reason));
        }
        let crops = [batch.first, batch.second];
        let (crops, ser) = match (&self.part, self.settings.ser.images) {
            (None, _) => (crops, None),
            (Some(part), SerImages::Batch) => views::shared(part, &crops)?,
            // Without a weight nothing would come of these images.
            (Some(_), SerImages::Own) if self.settings.ser.loss.lambda == 0.0 => (crops, None),
            (Some(part), SerImages::Own) => {
                let own = part.split(&crops[0])?.1;
                (crops, Some(Images::Own(own)))
            }
        };
        Ok(Some(Batch {
            now: self.schedules.at(self.step),
            crops,
            ser,
            drawn: batch.drawn,
            seed: self.settings.seed,
        }))
    }

    /// Everything of a step that is the same for all methods: checks, gradients, their comparison and clipping, the update,
    /// records, evaluation and checkpoints.
    pub fn step(
        &mut self,
        batch: &Batch,
        losses: Losses,
        encoder: &Vit,
        ser: &mut Regularizer,
        state: &mut State,
    ) -> Result<()> {
        let named = state.online.named();
        let mut loss = losses.base.clone();
        let (mut seen, mut figures) = (batch.now, losses.figures);
        if let Some(addon) = losses.addon.filter(|addon| addon.is_on()) {
            let dropped = seed(self.settings.seed, Purpose::AddonDropPath, self.step);
            let out = addon.loss(encoder, &batch.drawn, dropped)?;
            loss = (loss + &out.loss)?;
            seen.addon = Some(out.unweighted.to_scalar()?);
            for (name, value) in &out.metrics {
                figures.push((name, f64::from(value.to_scalar::<f32>()?)));
            }
            if self.step == 0 {
                addon.assert_reaches(&out, &named, &self.vit, &batch.crops.each_ref())?;
            }
        }
        if let Some(term) = &losses.ser {
            loss = (loss + &term.loss)?;
            seen = seen.regularized(
                &term.unweighted,
                term.accuracy.as_ref(),
                ser.loss().config().lambda,
            )?;
        }
        (seen.loss, seen.invariance) = (loss.to_scalar()?, losses.base.to_scalar()?);
        self.check(&seen)?;
        if let Some(term) = &losses.ser {
            self.measure(&losses.base, term, ser, state)?;
            self.probe(batch, losses.keys, encoder, ser)?;
            if self.step == 0 {
                let reached = tapped(&named, &self.vit, self.settings.ser.layer);
                reach::assert_reaches(&term.unweighted, reached, batch.ser_images())?;
            }
        }
        if self.step == 0 {
            let images = batch.crops.iter().chain(batch.ser_images());
            reach::assert_reaches(&loss, trained(&named, &self.vit), images)?;
        }

        let mut grads = loss.backward()?;
        let clipped = clip_to(&self.settings.optimizer, &named, &mut grads);
        seen.gradient = clipped.with_context(|| self.position())?;
        if let Some(prefix) = losses.frozen {
            freeze(&named, &mut grads, prefix)?;
        }
        let update = state.optimizer.step(&grads, seen.learning_rate, seen.weight_decay);
        update.with_context(|| self.position())?;
        if let Some(m) = losses.follow {
            let momentum = state.momentum.as_ref().context("expected momentum weights")?;
            momentum.follow(&state.online, m)?;
        }
        // What is measured between epochs is the network that the run will save.
        let measured = match (Network::of(self.settings.method), losses.keys) {
            (Network::Teacher, Some((teacher, _))) => teacher,
            _ => encoder,
        };
        self.end_step(seen, figures, measured, state)
    }

    /// Compares the gradients of both losses if it is due, records the result and sets λ for the next step.
    fn measure(
        &mut self,
        base: &Tensor,
        term: &Term,
        ser: &mut Regularizer,
        state: &State,
    ) -> Result<()> {
        let start = Instant::now();
        let measured = self.balance.measure(self.step, base, &term.unweighted, &state.online)?;
        ser.set_lambda(self.balance.lambda(self.step + 1)?)?;
        self.progress.leave_out(start.elapsed());
        if let Some(measured) = measured {
            self.progress.balance(&measured);
            self.log.write(Record::Balance(measured))?;
        }
        Ok(())
    }

    /// At one step in `PROBE_EVERY`, times the regularizer once more and by itself. It changes nothing in the training, and
    /// the time of the step excludes it.
    fn probe(
        &mut self,
        batch: &Batch,
        keys: Option<(&Vit, &Projector)>,
        encoder: &Vit,
        ser: &Regularizer,
    ) -> Result<()> {
        let due = self.step % PROBE_EVERY == PROBE_FIRST && self.settings.mode() == "ser";
        if let Some(images) = batch.ser.as_ref().filter(|_| due) {
            let start = Instant::now();
            let seconds = overhead::time(ser, images, encoder, keys, &mut batch.rng())?;
            self.probes.push(seconds);
            self.progress.leave_out(start.elapsed());
        }
        Ok(())
    }

    /// Whether the losses of a step are finite; to be called before they are differentiated.
    fn check(&mut self, seen: &Step) -> Result<()> {
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

    /// The step that failed, and the checkpoint to continue from.
    fn position(&self) -> String {
        format!("step {}. {}", self.step, self.saved.last_good())
    }
}
