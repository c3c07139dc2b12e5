//! The end of a run: it measures the encoder, prints the scores beside other variants, and writes the report.

use anyhow::{Result, bail, ensure};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{PROBE_EVERY, PROBE_FIRST, Run, State, file, interrupt::STOPPED, scores};
use crate::{
    encoder::Network,
    eval::{self, Evaluation},
    finite,
    knn::spread,
    overhead,
    records::{Record, Step, mean},
    report::folder::{self, Folder},
    settings::Method,
    vit::Vit,
    weights::Weights,
};

/// `result.json`: the last measurements of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub method: String,
    pub mode: String,
    /// Which network was measured.
    #[serde(default)]
    pub network: Network,
    pub seed: u64,
    pub epochs: usize,
    pub steps: usize,
    /// Means over the first and the last eighth of the steps, and over the eighth with the least base loss; `None` if the
    /// metrics are gone.
    pub first: Option<Means>,
    pub last: Option<Means>,
    pub lowest: Option<Means>,
    /// Weighted 20-NN accuracy in percent, upright and under the seven rotations and flips; and the mean of these seven.
    /// Empty and `None` where the images have no labels.
    pub knn: Vec<f64>,
    pub knn_poses: Option<f64>,
    /// Centered equivariance score of each block; `None` where it has no value.
    pub equivariance: Vec<Option<f64>>,
    pub feature_std: f32,
    /// Training images per second without evaluation; share of that time spent waiting for images.
    pub images_per_s: f64,
    pub waiting: f64,
    /// `(base + regularizer) / base`: multiply–adds counted from the settings by `crate::cost`, and time, of the
    /// regularizer by itself at a few steps and of the rest of a step; `None` where no regularizer ran, or none was timed.
    #[serde(default)]
    pub overhead_predicted: Option<f64>,
    #[serde(default)]
    pub overhead_measured: Option<f64>,
    /// Of the process that ended the run.
    pub seconds: f64,
    /// Most memory the process held, where the system tells.
    pub peak_mib: Option<f64>,
    pub skipped: usize,
    pub note: String,
    /// The untrained encoder and raw pixels; empty with `--brief`.
    #[serde(default)]
    pub references: Vec<Reference>,
}

impl Outcome {
    /// The equivariance score of a block, counted from 1.
    pub fn score(&self, block: usize) -> Option<f64> {
        self.equivariance.get(block.checked_sub(1)?).copied().flatten()
    }
}

/// Scores without training, to compare a run with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reference {
    pub name: String,
    /// As for the encoder; empty where there are no tokens.
    pub equivariance: Vec<Option<f64>>,
    pub knn: Vec<f64>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Means {
    pub loss: f32,
    pub invariance: f32,
    pub equivariance: Option<f32>,
    pub matching: Option<f32>,
}

impl Means {
    fn of(steps: &[&Step]) -> Option<Self> {
        let mean = |value: fn(&Step) -> Option<f32>| {
            Some(mean(steps.iter().filter_map(|&s| value(s)))? as f32)
        };
        Some(Self {
            loss: mean(|s| Some(s.loss))?,
            invariance: mean(|s| Some(s.invariance))?,
            equivariance: mean(|s| s.equivariance),
            matching: mean(|s| s.matching),
        })
    }
}

impl Run {
    /// Saves the encoder that the method's paper evaluates (of DINO the teacher), measures it on all images, and writes the
    /// report. With `--compare` it trains the variants too. After
    /// Ctrl-C it says how to go on instead, and ends the program.
    pub fn finish(mut self, encoder: &Vit, state: &State) -> Result<()> {
        self.progress.finish();
        if self.stopped {
            println!("{}", self.last_words());
            drop(self.lock);
            std::process::exit(STOPPED);
        }
        // The rest is done again if the run is resumed.
        self.interrupt.idle(self.last_words());
        let evaluation = Evaluation {
            bank: &self.data.bank,
            test: &self.data.test,
            statistics: &self.augment.statistics,
            device: &self.device,
        };
        let outcome = match self.outcome(&evaluation, encoder) {
            Ok(outcome) => outcome,
            Err(e) => {
                self.saved.roll_back()?;
                return Err(e.context(format!(
                    "cannot measure the encoder after {} steps. {}",
                    self.step,
                    self.saved.last_good()
                )));
            }
        };
        self.save_encoder(state)?;
        let json = serde_json::to_vec_pretty(&outcome)?;
        file::write(&self.folder.join("result.json"), &json)?;
        let page = self.folder.join("report.html");
        let run = Folder::read(&self.folder)?;
        let panel = || {
            let (layer, statistics) = (self.settings.ser.layer, &self.augment.statistics);
            folder::panel(encoder, &self.data.test, 4, statistics, layer, &self.device)
        };
        if !self.compare {
            run.print()?;
        }
        file::write(&page, run.page(Some(panel()?))?.as_bytes())?;
        if self.compare {
            self.interrupt.busy();
            self.train_variants()?;
            self.interrupt.idle(self.last_words());
            run.print()?;
            // Once more, with the scores of the variants.
            file::write(&page, run.page(Some(panel()?))?.as_bytes())?;
            self.write_comparison()?;
        }
        println!("\nreport {}", page.display());
        print_overhead(&outcome);
        print_line(&outcome, self.settings.ser.layer);
        match self.settings.smoke {
            true => check_losses(&outcome, self.settings.method),
            false => Ok(()),
        }
    }

    fn outcome(&self, evaluation: &Evaluation, encoder: &Vit) -> Result<Outcome> {
        // The weights were checked by themselves.
        let encode = |x: &Tensor| finite::features(encoder, [], x);
        let trained = evaluation.accuracies(encode)?;
        let records = self.log.records();
        let steps: Vec<&Step> = records
            .iter()
            .filter_map(|r| match r {
                Record::Step(step) => Some(step),
                _ => None,
            })
            .collect();
        let eighth = steps.len().div_ceil(8);
        let eighths = steps.chunks(eighth.max(1)).filter_map(Means::of);
        let lowest = eighths.min_by(|a, b| a.invariance.total_cmp(&b.invariance));
        let (images_per_s, waiting) = self.speed();
        let features = evaluation.test_features(encode)?;
        Ok(Outcome {
            method: self.settings.method.name().to_string(),
            mode: self.settings.mode().to_string(),
            network: Network::of(self.settings.method),
            seed: self.settings.seed,
            epochs: self.settings.epochs,
            steps: self.steps,
            first: Means::of(&steps[..eighth]),
            last: Means::of(&steps[steps.len() - eighth..]),
            lowest,
            knn_poses: eval::pose_mean(&trained),
            knn: trained,
            equivariance: scores(evaluation, encoder)?,
            feature_std: spread(&features)?,
            images_per_s,
            waiting,
            overhead_predicted: overhead::predicted(&self.settings, &self.vit)?
                .map(|cost| cost.overhead()),
            overhead_measured: self.overhead(),
            seconds: self.start.elapsed().as_secs_f64(),
            peak_mib: peak_mib(),
            skipped: self.data.skipped.len(),
            note: self.data.note.clone(),
            references: match self.brief {
                true => Vec::new(),
                false => self.references(evaluation)?,
            },
        })
    }

    fn references(&self, evaluation: &Evaluation) -> Result<Vec<Reference>> {
        let untrained = Weights::seeded(self.settings.seed);
        let untrained = Vit::new(&self.vit, untrained.builder(&self.device).pp("encoder"))?;
        Ok(vec![
            Reference {
                name: "untrained encoder".to_string(),
                equivariance: scores(evaluation, &untrained)?,
                knn: evaluation.accuracies(|x| Ok(untrained.forward(x)?))?,
            },
            Reference {
                name: "raw pixels".to_string(),
                equivariance: Vec::new(),
                knn: evaluation.accuracies(eval::raw_pixels)?,
            },
        ])
    }

    /// Images per second over all epochs, whichever process trained them, and the share of that time spent waiting.
    fn speed(&self) -> (f64, f64) {
        let (mut epochs, mut seconds, mut waited) = (0.0, 0.0, 0.0);
        for record in self.log.records() {
            if let Record::Epoch(epoch) = record
                && epoch.images_per_s > 0.0
            {
                // Of an epoch of one image.
                let time = 1.0 / epoch.images_per_s;
                epochs += 1.0;
                seconds += time;
                waited += time * epoch.waiting;
            }
        }
        match epochs > 0.0 {
            true => (epochs / seconds, waited / seconds),
            false => (0.0, 0.0),
        }
    }

    /// What the regularizer was seen to cost, on average over the epochs in which it was timed.
    fn overhead(&self) -> Option<f64> {
        let records = self.log.records().iter();
        let timed: Vec<f64> = records
            .filter_map(|record| match record {
                Record::Epoch(epoch) => epoch.regularizer,
                _ => None,
            })
            .collect();
        let mean = timed.iter().sum::<f64>() / timed.len() as f64;
        (!timed.is_empty()).then_some(1.0 + mean)
    }
}

/// Whether a smoke run learned: its losses have fallen at last, what is minimized and the base loss by 3 %, the equivariance loss
/// by 5 %. DINO's targets move with the teacher and its loss rises again in some runs: of it the lowest counts.
fn check_losses(outcome: &Outcome, method: Method) -> Result<()> {
    let all = (outcome.first, outcome.last, outcome.lowest);
    let (Some(first), Some(last), Some(lowest)) = all else {
        bail!("there are no metrics to tell whether the losses fell");
    };
    let base = match method {
        Method::Dino => lowest,
        Method::MocoV3 | Method::BarlowTwins => last,
    };
    for (name, first, then) in
        [("base method's loss", first.invariance, base.invariance), ("loss", first.loss, base.loss)]
    {
        ensure!(then < 0.97 * first, "the {name} did not fall by 3 %: {first:.4}, then {then:.4}");
    }
    if let (Some(first), Some(last)) = (first.equivariance, last.equivariance) {
        ensure!(
            last < 0.95 * first,
            "the equivariance loss did not fall by 5 %: {first:.4} at first, {last:.4} at last"
        );
    }
    Ok(())
}

/// Prints the counted and the timed cost of the regularizer; nothing where none ran.
fn print_overhead(outcome: &Outcome) {
    let Some(predicted) = outcome.overhead_predicted else {
        return;
    };
    println!(
        "predicted overhead {predicted:.4}x: multiply-adds with the regularizer over those without"
    );
    match outcome.overhead_measured {
        Some(measured) => println!(
            "measured overhead {measured:.4}x: time of the views, the head and the loss, forward and backward, and with \
             --ser-images own of the blocks up to the tap; at one step in {PROBE_EVERY}, relative to the rest"
        ),
        None => println!("measured overhead -: no step was timed, the first is step {PROBE_FIRST}"),
    }
}

/// One line for machines: CI reads it.
fn print_line(outcome: &Outcome, layer: usize) {
    let number = |value: Option<f32>| value.map_or(f64::NAN, f64::from);
    let [first, last] = [&outcome.first, &outcome.last].map(Option::as_ref);
    println!(
        "\nresult method={} mode={} seed={} epochs={} steps={} loss_first={:.4} loss_last={:.4} invariance_last={:.4} \
         equivariance_last={:.4} score={:.4} knn={:.2} knn_poses={:.2} images_per_s={:.0} waiting={:.3} peak_mib={:.0} \
         seconds={:.0} overhead_predicted={:.4} overhead_measured={:.4}",
        outcome.method,
        outcome.mode,
        outcome.seed,
        outcome.epochs,
        outcome.steps,
        number(first.map(|m| m.loss)),
        number(last.map(|m| m.loss)),
        number(last.map(|m| m.invariance)),
        number(last.and_then(|m| m.equivariance)),
        outcome.score(layer).unwrap_or(f64::NAN),
        outcome.knn.first().copied().unwrap_or(f64::NAN),
        outcome.knn_poses.unwrap_or(f64::NAN),
        outcome.images_per_s,
        outcome.waiting,
        outcome.peak_mib.unwrap_or(f64::NAN),
        outcome.seconds,
        outcome.overhead_predicted.unwrap_or(f64::NAN),
        outcome.overhead_measured.unwrap_or(f64::NAN),
    );
}

/// The most memory that this process held, in MiB; Linux only.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}
