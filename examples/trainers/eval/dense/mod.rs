//! The stand-in for detection: what the frozen tokens of canvases say about objects.
//!
//! One to three objects of the data set stand on a textured canvas, under any element of D4. From the token map
//! of one block, linear maps read the class of each token and the box around its object; and tokens of a canvas look for
//! their counterparts in the canvas turned.

pub mod boxes;
pub mod correspondence;
pub mod precision;
pub mod scene;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rand::{rngs::StdRng, seq::SliceRandom};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::{
    boxes::{Box, Detection},
    correspondence::Correspondence,
    precision::Truth,
    scene::Scene,
};
use super::{
    corruption::{generator, picture},
    features::{self, patches},
    probe::Probe,
    subject::Subject,
};
use crate::data::{Images, draw};

/// Strength of the token classifier's and the box regression's penalty.
const L2: f64 = 1e-3;
/// Canvases that go through the encoder at a time.
const CHUNK: usize = 20;

/// How many canvases, how large, and which block.
#[derive(Clone, Debug)]
pub struct Options {
    /// Canvases with objects of the training images, for the linear maps.
    pub train: usize,
    /// Canvases with objects of the test images.
    pub test: usize,
    /// `None`: 64 pixels, or twice the side of an image where that is more; the encoder's own side where its positions
    /// allow no other.
    pub side: Option<usize>,
    /// The block whose tokens are read, counted from 1; `None`: the one with the equivariance loss.
    pub layer: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self { train: 300, test: 150, side: None, layer: None }
    }
}

/// Figures in percent, of each kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dense {
    pub canvas_side: usize,
    /// Rows, and columns, of the token grid.
    pub grid: usize,
    pub layer: usize,
    pub train_canvases: usize,
    pub test_canvases: usize,
    pub rows: Vec<Row>,
}

/// Figures in percent of one kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub features: String,
    /// Mean intersection over union of background and classes, token by token.
    pub miou: f64,
    pub token_accuracy: f64,
    /// Mean intersection over union of the boxes read from tokens that belong to an object.
    pub box_iou: f64,
    /// Average precision at an intersection over union of a half, the mean over classes.
    pub ap50: f64,
    pub correspondence: Correspondence,
}

/// Canvases with their tensor, one token grid each.
struct Set {
    scenes: Vec<Scene>,
    x: Tensor,
}

/// Scores each of `subjects`, and the patches of pixels as they are if `raw`.
pub fn measure(
    subjects: &[&Subject],
    raw: bool,
    bank: &Images,
    test: &Images,
    options: &Options,
    seed: u64,
    mut done: impl FnMut(),
) -> Result<Dense> {
    let first = subjects.first().context("expected an encoder, got none")?;
    let config = &first.card.vit;
    let (patch, layer) = (config.patch, first.layer(options.layer)?);
    ensure!(
        !bank.is_empty() && !test.is_empty(),
        "expected training and test images for the canvases, got {} and {}",
        bank.len(),
        test.len()
    );
    ensure!(
        options.train > 0 && options.test > 0,
        "expected at least one canvas to fit and one to test, got {} and {}",
        options.train,
        options.test
    );
    let side = match options.side {
        Some(side) => side,
        None if first.any_side() => (2 * config.side).max(64).next_multiple_of(patch),
        None => config.side,
    };
    ensure!(
        side > 0 && side.is_multiple_of(patch),
        "expected canvases whose side is a multiple of the patch size {patch}, got {side}"
    );
    let grid = side / patch;
    let set = |images: &Images, count: usize, stream: u64| -> Result<Set> {
        let deck = deck(images, 3 * count, &mut generator(draw::SEED, stream, 0));
        let draw = |i: usize| {
            let objects = [0, 1, 2].map(|k| deck[3 * i + k]);
            Scene::draw(images, objects, side, patch, &mut generator(seed, stream, i as u64))
        };
        let scenes: Vec<Scene> = (0..count).into_par_iter().map(draw).collect();
        let pictures: Vec<_> = scenes.iter().map(|s| s.canvas.clone()).collect();
        let x = picture::normalized(&pictures, &first.card.statistics, &first.device)?;
        Ok(Set { scenes, x })
    };
    let sets = [set(bank, options.train, 200)?, set(test, options.test, 201)?];

    let mut rows = Vec::new();
    for subject in subjects {
        let vit = subject.at_side(side)?;
        rows.push(row(&subject.name, &sets, grid, |x| subject.tokens(&vit, x, layer))?);
        done();
    }
    if raw {
        rows.push(row("raw patches", &sets, grid, |x| patches(x, patch))?);
        done();
    }
    Ok(Dense {
        canvas_side: side,
        grid,
        layer,
        train_canvases: options.train,
        test_canvases: options.test,
        rows,
    })
}

/// `count` images for objects in random order, drawn by class; each of them again once all were taken.
fn deck(images: &Images, count: usize, rng: &mut StdRng) -> Vec<usize> {
    let mut deck = Vec::with_capacity(count);
    while deck.len() < count {
        let mut drawn = images.drawn(count - deck.len());
        drawn.shuffle(rng);
        deck.extend(drawn);
    }
    deck
}

fn row(
    name: &str,
    [train, test]: &[Set; 2],
    grid: usize,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Row> {
    let flat = |set: &Set| -> Result<Tensor> {
        let map = features::chunked(&set.x, CHUNK, &encode)?;
        Ok(map.flatten_to(1)?.to_device(&Device::Cpu)?)
    };
    let (train_tokens, test_tokens) = (flat(train)?, flat(test)?);
    let labels = |set: &Set| -> Vec<u32> {
        set.scenes.iter().flat_map(|s| s.labels.iter().copied()).collect()
    };
    let (train_labels, test_labels) = (labels(train), labels(test));

    let classifier = Probe::with_l2(&train_tokens, &train_labels, L2)?;
    let probabilities = classifier.probabilities(&test_tokens)?;
    let predicted: Vec<u32> = probabilities.iter().map(|p| best(p).0 as u32).collect();
    let right = predicted.iter().zip(&test_labels).filter(|(p, l)| p == l).count();

    let owners = |set: &Set| -> Vec<Option<Box>> {
        let boxes =
            set.scenes.iter().flat_map(|s| s.owners.iter().map(|o| o.map(|o| s.objects[o].at)));
        boxes.collect()
    };
    let regression = boxes::Regression::fit(&train_tokens, &owners(train), grid, L2)?;
    let read = regression.boxes(&test_tokens, grid)?;
    let overlaps: Vec<f64> = owners(test)
        .iter()
        .zip(&read)
        .filter_map(|(owner, read)| owner.map(|owner| owner.iou(read)))
        .collect();

    // Every token proposes its box as one of its most probable class but background.
    let area = grid * grid;
    let mut detections = Vec::new();
    for canvas in 0..test.scenes.len() {
        let tokens = canvas * area..(canvas + 1) * area;
        let proposals = tokens.map(|t| {
            let (class, score) = best(&probabilities[t][1..]);
            Detection { canvas, class: class as u32 + 1, score, at: read[t] }
        });
        detections.extend(boxes::suppress(proposals.collect()));
    }
    let truth: Vec<Truth> = test
        .scenes
        .iter()
        .enumerate()
        .flat_map(|(canvas, s)| {
            s.objects.iter().map(move |o| Truth {
                canvas,
                class: o.class + 1,
                at: o.at,
                difficult: false,
            })
        })
        .collect();
    let positive: Vec<bool> = test_labels.iter().map(|&l| l > 0).collect();
    Ok(Row {
        features: name.to_string(),
        miou: 100.0 * boxes::mean_iou(&predicted, &test_labels),
        token_accuracy: 100.0 * right as f64 / test_labels.len() as f64,
        box_iou: 100.0 * overlaps.iter().sum::<f64>() / overlaps.len().max(1) as f64,
        ap50: 100.0 * precision::mean(&detections, &truth),
        correspondence: correspondence::measure(&test.x, &positive, grid, |x| {
            features::chunked(x, CHUNK, &encode)
        })?,
    })
}

/// The most probable class and its probability; of equals, the first.
fn best(probabilities: &[f32]) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    let better = |a: (usize, f32), b: (usize, &f32)| if *b.1 > a.1 { (b.0, *b.1) } else { a };
    probabilities.iter().enumerate().fold(first, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_come_from_every_class_and_again_when_all_were_taken() {
        let labels: Vec<u32> = (0..40).map(|i| i / 10).collect();
        let images = Images { pixels: vec![0; 40], labels, channels: 1, side: 1 };
        let rng = &mut generator(draw::SEED, 0, 0);
        let of_classes = |deck: &[usize]| {
            let count = |class| deck.iter().filter(|&&i| images.labels[i] == class).count();
            [0, 1, 2, 3].map(count)
        };
        assert_eq!(of_classes(&deck(&images, 12, rng)), [3; 4]);
        assert_eq!(of_classes(&deck(&images, 92, rng)), [23; 4]);
    }
}
