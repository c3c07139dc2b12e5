//! Robustness to transformations: a classifier of upright images gets rotated, scaled and shifted ones.

use anyhow::Result;
use candle_core::Tensor;
use ser_reg::{
    Filter, GridOperator, Resample, TokenGrid,
    group::{Affine, D4},
};
use serde::{Deserialize, Serialize};

use super::{
    border::Border,
    features,
    probe::{Probe, accuracy},
    subject::Subject,
    watch::POSES,
};
use crate::{data::Images, knn::Bank};

/// How two classifiers fare over the elements of an orbit, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Orbit {
    /// `d4`, or `continuous`: the upright image with small rotations, scales and shifts.
    pub name: String,
    /// The upright one first.
    pub elements: Vec<String>,
    pub probe: Robustness,
    pub knn: Robustness,
    /// Accuracy of the probe with probabilities averaged over the orbit.
    pub averaged: f64,
}

/// How one classifier fares over an orbit, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Robustness {
    /// Of each element.
    pub accuracy: Vec<f64>,
    /// Mean over the orbit.
    pub mean: f64,
    /// Mean over the elements that are not upright.
    pub moved: f64,
    /// Of the element with the lowest accuracy.
    pub worst_element: f64,
    /// Images that are classified correctly under every transformation.
    pub worst_case: f64,
    /// Moved images that are given the class of the upright one, right or wrong.
    pub consistency: f64,
}

impl Robustness {
    /// From the predictions under each element, the upright one first.
    pub fn of(predictions: &[Vec<u32>], labels: &[u32]) -> Self {
        let accuracies: Vec<f64> = predictions.iter().map(|p| accuracy(p, labels)).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let moved = predictions.get(1..).unwrap_or_default();
        let agreement: Vec<f64> = moved.iter().map(|p| accuracy(p, &predictions[0])).collect();
        let always = |(i, label): &(usize, &u32)| predictions.iter().all(|p| p[*i] == **label);
        let always = labels.iter().enumerate().filter(always).count();
        Self {
            mean: mean(&accuracies),
            moved: mean(accuracies.get(1..).unwrap_or_default()),
            worst_element: accuracies.iter().copied().fold(100.0, f64::min),
            worst_case: 100.0 * always as f64 / labels.len().max(1) as f64,
            consistency: mean(&agreement),
            accuracy: accuracies,
        }
    }
}

/// Both orbits. `upright` are the features of `test`; `border` fills what moved images leave.
pub fn measure(
    subject: &Subject,
    probe: &Probe,
    bank: &Bank,
    test: &Images,
    upright: &Tensor,
    border: Border,
    mut done: impl FnMut(),
) -> Result<Vec<Orbit>> {
    let grid = TokenGrid::square(test.side)?;
    let resample = Resample { filter: Filter::Bilinear, padding: border.padding() };
    let mut orbits = Vec::new();
    for (name, elements) in [("d4", d4()), ("continuous", continuous()?)] {
        let (mut predicted, mut near) = (Vec::new(), Vec::new());
        let mut total: Option<Tensor> = None;
        for (i, (_, g)) in elements.iter().enumerate() {
            let features = match i {
                0 => upright.clone(),
                _ => {
                    let pose = GridOperator::new(&[*g], grid, &resample)?;
                    let statistics = &subject.card.statistics;
                    let encode = |x: &Tensor| subject.encode(&border.moved(&pose, x, statistics)?);
                    features::of(test, statistics, &subject.device, None, encode)?
                }
            };
            let logits = probe.logits(&features)?;
            predicted.push(logits.argmax(1)?.to_vec1::<u32>()?);
            near.push(bank.predict(&features)?);
            let probabilities = candle_nn::ops::softmax(&logits, 1)?;
            total = Some(match total {
                Some(total) => (total + probabilities)?,
                None => probabilities,
            });
            done();
        }
        let averaged = match total {
            Some(total) => accuracy(&total.argmax(1)?.to_vec1::<u32>()?, &test.labels),
            None => f64::NAN,
        };
        orbits.push(Orbit {
            name: name.to_string(),
            elements: elements.into_iter().map(|(name, _)| name).collect(),
            probe: Robustness::of(&predicted, &test.labels),
            knn: Robustness::of(&near, &test.labels),
            averaged,
        });
    }
    Ok(orbits)
}

/// Elements of both orbits, which [`measure`] reports one by one.
pub const ELEMENTS: usize = 8 + 15;

/// The elements of D4 by name, the identity first.
pub fn d4() -> Vec<(String, Affine)> {
    let affine = |(name, g): (&str, D4)| (name.to_string(), Affine::from(g));
    POSES.into_iter().map(affine).collect()
}

fn continuous() -> Result<Vec<(String, Affine)>> {
    let mut elements = vec![("upright".to_string(), Affine::from(D4::IDENTITY))];
    for degrees in [-45.0, -30.0, -15.0, 15.0, 30.0, 45.0] {
        elements.push((format!("rot{degrees:+}"), Affine::rotation(degrees)?));
    }
    for scale in [0.7, 0.85, 1.15, 1.3] {
        elements.push((format!("scale{scale}"), Affine::zoom(scale, scale)?));
    }
    let eighth = 0.125;
    for (name, dy, dx) in [
        ("up", -eighth, 0.0),
        ("down", eighth, 0.0),
        ("left", 0.0, -eighth),
        ("right", 0.0, eighth),
    ] {
        elements.push((name.to_string(), Affine::translation(dy, dx)?));
    }
    Ok(elements)
}
