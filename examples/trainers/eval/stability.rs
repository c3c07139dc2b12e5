//! Errors under corruption and flips under perturbation, of one encoder relative to another.

use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    border::Border,
    corruption::{Corruption, Picture, SEVERITIES},
    features,
    perturbation::Perturbation,
    probe::{Probe, accuracy},
    subject::Subject,
};
use crate::data::Images;

/// An encoder with a classifier of its upright features.
pub struct Classifier<'a> {
    pub subject: &'a Subject,
    pub probe: &'a Probe,
}

/// Images that are changed and classified at a time.
const BLOCK: usize = 100;

/// The classes that `classifier` and `reference` give to what `make` makes of each of the images of `indices`.
fn predict(
    [classifier, reference]: [&Classifier; 2],
    indices: &[usize],
    make: impl Fn(usize) -> Vec<Picture> + Sync,
) -> Result<[Vec<u32>; 2]> {
    let (mut own, mut of_reference) = (Vec::new(), Vec::new());
    let same = std::ptr::eq(classifier.subject, reference.subject);
    for block in indices.chunks(BLOCK) {
        let pictures: Vec<Picture> = block.par_iter().flat_map_iter(|&i| make(i)).collect();
        own.extend(classifier.predict(&pictures)?);
        if !same {
            of_reference.extend(reference.predict(&pictures)?);
        }
    }
    if same {
        of_reference = own.clone();
    }
    Ok([own, of_reference])
}

impl Classifier<'_> {
    fn predict(&self, pictures: &[Picture]) -> Result<Vec<u32>> {
        let subject = self.subject;
        let (statistics, device) = (&subject.card.statistics, &subject.device);
        let features = features::of_pictures(pictures, statistics, device, |x| subject.encode(x))?;
        self.probe.predict(&features)
    }
}

/// Errors in percent under the fifteen corruptions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Corruptions {
    pub reference: String,
    /// Test images that were corrupted, drawn by class.
    pub pictures: usize,
    pub clean_error: f64,
    pub clean_error_of_reference: f64,
    pub each: Vec<CorruptionErrors>,
    /// Accuracy, the mean over corruptions and severities.
    pub mean_accuracy: f64,
    /// Mean corruption error: the mean of `ce`.
    pub mce: Option<f64>,
    /// The mean of `relative_ce`.
    pub relative_mce: Option<f64>,
}

/// Errors in percent under one corruption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorruptionErrors {
    pub name: String,
    /// At severities 1 to 5.
    pub errors: Vec<f64>,
    pub errors_of_reference: Vec<f64>,
    /// Sum of errors, in percent of the reference's; `None` where the reference makes none.
    pub ce: Option<f64>,
    /// The same of the errors beyond those on clean images; `None` where the reference does not get worse.
    pub relative_ce: Option<f64>,
}

/// Runs all corruptions and severities past both classifiers, on `count` images that are drawn by class.
pub fn corruptions(
    classifier: &Classifier,
    reference: &Classifier,
    test: &Images,
    count: usize,
    seed: u64,
    mut done: impl FnMut(),
) -> Result<Corruptions> {
    let indices = test.drawn(count);
    let labels: Vec<u32> = indices.iter().map(|&i| test.labels[i]).collect();
    let both = [classifier, reference];
    let errors = |make: &(dyn Fn(usize) -> Picture + Sync)| -> Result<[f64; 2]> {
        let predicted = predict(both, &indices, |i| vec![make(i)])?;
        Ok(predicted.map(|p| 100.0 - accuracy(&p, &labels)))
    };
    let clean = errors(&|i| Picture::of(test, i))?;
    let mut each = Vec::new();
    for corruption in Corruption::ALL {
        let (mut own, mut of_reference) = (Vec::new(), Vec::new());
        for severity in 1..=SEVERITIES {
            let corrupt = |i| corruption.of(&Picture::of(test, i), severity, seed, i);
            let [error, error_of_reference] = errors(&corrupt)?;
            own.push(error);
            of_reference.push(error_of_reference);
            done();
        }
        let name = corruption.name();
        each.push(CorruptionErrors::new(name, own, of_reference, clean));
    }
    Ok(Corruptions {
        reference: reference.subject.name.clone(),
        pictures: indices.len(),
        clean_error: clean[0],
        clean_error_of_reference: clean[1],
        mean_accuracy: 100.0
            - mean(each.iter().flat_map(|c| c.errors.iter().copied())).unwrap_or(0.0),
        mce: mean(each.iter().filter_map(|c| c.ce)),
        relative_mce: mean(each.iter().filter_map(|c| c.relative_ce)),
        each,
    })
}

impl CorruptionErrors {
    /// From errors at each severity, and the clean errors of encoder and reference.
    pub fn new(name: &str, errors: Vec<f64>, of_reference: Vec<f64>, clean: [f64; 2]) -> Self {
        let sum = |e: &[f64], clean: f64| e.iter().map(|e| e - clean).sum::<f64>();
        let ratio = |a: f64, b: f64| (b > 0.0).then(|| 100.0 * a / b);
        Self {
            name: name.to_string(),
            ce: ratio(sum(&errors, 0.0), sum(&of_reference, 0.0)),
            relative_ce: ratio(sum(&errors, clean[0]), sum(&of_reference, clean[1])),
            errors,
            errors_of_reference: of_reference,
        }
    }
}

/// Flips under slowly changing perturbations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perturbations {
    pub reference: String,
    /// Sequences of each kind, of test images that are drawn by class.
    pub sequences: usize,
    pub each: Vec<Flips>,
    /// Mean flip rate: the mean of flip probabilities in percent of the reference's.
    pub mfr: Option<f64>,
}

/// Flips under one perturbation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flips {
    pub name: String,
    /// Probability, in percent, that a frame is given another class than the one before (noise: than the clean one).
    pub probability: f64,
    pub probability_of_reference: f64,
    /// In percent of the reference's; `None` where that never flips.
    pub rate: Option<f64>,
}

/// Runs sequences of each perturbation past both classifiers, of `count` images that are drawn by class. Beyond the border
/// of an image lies `border`.
pub fn perturbations(
    classifier: &Classifier,
    reference: &Classifier,
    test: &Images,
    border: Border,
    count: usize,
    seed: u64,
    mut done: impl FnMut(),
) -> Result<Perturbations> {
    let indices = test.drawn(count);
    let mut each = Vec::new();
    for perturbation in Perturbation::ALL {
        let frames = |i| perturbation.frames(&Picture::of(test, i), border.edge(), seed, i as u64);
        let predicted = predict([classifier, reference], &indices, frames)?;
        let [own, of_reference] = predicted.map(|classes| {
            let sequences: Vec<_> = classes.chunks(perturbation.length()).collect();
            100.0 * flip_probability(&sequences, perturbation.is_noise())
        });
        each.push(Flips {
            name: perturbation.name().to_string(),
            probability: own,
            probability_of_reference: of_reference,
            rate: (of_reference > 0.0).then(|| 100.0 * own / of_reference),
        });
        done();
    }
    Ok(Perturbations {
        reference: reference.subject.name.clone(),
        sequences: indices.len(),
        mfr: mean(each.iter().filter_map(|f| f.rate)),
        each,
    })
}

/// How often a prediction differs from that of the frame before; of `noise`, from that of the first frame.
pub fn flip_probability(sequences: &[&[u32]], noise: bool) -> f64 {
    let rate = |s: &&[u32]| {
        let flipped = |i: &usize| s[*i] != if noise { s[0] } else { s[*i - 1] };
        (1..s.len()).filter(flipped).count() as f64 / (s.len() - 1) as f64
    };
    let long = sequences.iter().filter(|s| s.len() > 1);
    mean(long.map(rate)).unwrap_or(0.0)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(s, n), v| (s + v, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}
