//! The linear probe on few labels: fitted to some drawn images of each class, upright; tested upright and over D4.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use ser_reg::{Filter, GridOperator, Resample, TokenGrid};
use serde::{Deserialize, Serialize};

use super::{
    border::Border,
    features, pose,
    probe::{Probe, accuracy},
    subject::Subject,
};
use crate::{
    data::{Images, draw},
    random::{Purpose, seed},
};

/// Draws of labels for each number of them.
pub const DRAWS: usize = 20;

/// The probe on one number of labels. Values are means over the draws, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FewRow {
    pub labels_per_class: usize,
    pub draws: usize,
    /// Accuracy on all upright test images.
    pub upright: f64,
    /// Accuracy over the eight elements of D4, on the test images that are moved.
    pub d4: f64,
}

/// Features of upright images, and the labels of those for training.
pub struct Upright<'a> {
    pub train: &'a Tensor,
    pub labels: &'a [u32],
    pub test: &'a Tensor,
}

/// Refuses numbers of labels that some class does not have.
pub fn check(flag: &str, counts: &[usize], labels: &[u32]) -> Result<()> {
    let mut sizes = std::collections::BTreeMap::<u32, usize>::new();
    labels.iter().for_each(|&label| *sizes.entry(label).or_default() += 1);
    let least = sizes.into_values().min().unwrap_or(0);
    for &count in counts {
        ensure!(
            (1..=least).contains(&count),
            "{flag}: expected 1 to {least}, the training images of the smallest class, got {count}"
        );
    }
    Ok(())
}

/// A row for each number of labels. A draw depends on the seed and the labels alone, so all encoders get the same. `posed` is
/// the number of test images that are moved.
pub fn measure(
    subject: &Subject,
    upright: &Upright,
    test: &Images,
    border: Border,
    counts: &[usize],
    posed: usize,
    run: u64,
) -> Result<Vec<FewRow>> {
    check("labels a class", counts, upright.labels)?;
    let shown = test.draw(posed);
    let moved = moved(subject, &shown, border)?;
    let row = |&labels_per_class: &usize| -> Result<FewRow> {
        let (mut on_upright, mut over_d4) = (0.0, 0.0);
        for i in 0..DRAWS {
            let drawn =
                draw::of_each_class(upright.labels, labels_per_class, seed(run, Purpose::Draw, i));
            let labels: Vec<u32> = drawn.iter().map(|&i| upright.labels[i]).collect();
            let rows: Vec<u32> = drawn.iter().map(|&i| i as u32).collect();
            let rows = Tensor::new(rows, upright.train.device())?;
            let probe = Probe::fit(&upright.train.index_select(&rows, 0)?, &labels)?;
            on_upright += accuracy(&probe.predict(upright.test)?, &test.labels);
            for features in &moved {
                over_d4 += accuracy(&probe.predict(features)?, &shown.labels) / moved.len() as f64;
            }
        }
        let draws = DRAWS as f64;
        let (upright, d4) = (on_upright / draws, over_d4 / draws);
        Ok(FewRow { labels_per_class, draws: DRAWS, upright, d4 })
    };
    counts.iter().map(row).collect()
}

/// Features of `images` under each element of D4.
fn moved(subject: &Subject, images: &Images, border: Border) -> Result<Vec<Tensor>> {
    let grid = TokenGrid::square(images.side)?;
    let resample = Resample { filter: Filter::Bilinear, padding: border.padding() };
    let statistics = &subject.card.statistics;
    let features = |(_, g)| {
        let pose = GridOperator::new(&[g], grid, &resample)?;
        let encode = |x: &Tensor| subject.encode(&border.moved(&pose, x, statistics)?);
        features::of(images, statistics, &subject.device, None, encode)
    };
    pose::d4().into_iter().map(features).collect()
}
