//! Real boxes: what a light head on frozen tokens finds on photographs, upright and turned.
//!
//! All images are scaled by one factor, for which the median box of the training images is some tokens wide. Windows of the
//! encoder's own side cover each image without overlap, and the encoder sees them one by one. From each token of one block a
//! linear classifier reads the class, and a linear regression the box. Both are fitted to upright training images; the test
//! images stand in all eight elements of D4, and their boxes move with them.

pub mod scene;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::scene::{Scene, Target};
use super::{
    dense::{
        boxes::{self, Box, Detection, Regression},
        precision::{self, Truth},
    },
    features::patches,
    probe::Probe,
    subject::Subject,
    watch::POSES,
};
use crate::data::{Voc, draw, voc::Annotated};

/// Width of the median box, in tokens.
const TOKENS: f64 = 6.0;
/// Strength of the penalty of the classifier and of the regression.
const L2: f64 = 1e-3;
/// Proposals less probable than this are dropped: they cannot raise an average precision by much.
const LEAST: f32 = 0.01;
/// Windows that go through the encoder at a time.
const CHUNK: usize = 100;

/// Which images, how many of them, and which block.
#[derive(Clone, Debug)]
pub struct Options {
    pub set: Voc,
    /// The most training images, and test images; they are drawn.
    pub train: usize,
    pub test: usize,
    /// The most tokens that the head is fitted to, drawn by class.
    pub tokens: usize,
    /// The block whose tokens are read, counted from 1; `None`: the one with the equivariance loss.
    pub layer: Option<usize>,
}

impl Options {
    /// 500 training images, 500 test images, and 40,000 tokens.
    pub fn new(set: Voc) -> Self {
        Self { set, train: 500, test: 500, tokens: 40_000, layer: None }
    }
}

/// Values in percent, of each kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detect {
    /// What was read, and what was dropped.
    pub data: String,
    pub classes: Vec<String>,
    pub layer: usize,
    /// Side of the windows, in pixels of the scaled images.
    pub window: usize,
    /// Side of a token, in pixels of the scaled images.
    pub patch: usize,
    /// Factor by which the images were scaled.
    pub scale: f64,
    pub train_images: usize,
    pub test_images: usize,
    pub rows: Vec<Row>,
}

/// Values of one kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub features: String,
    /// Of each element of D4, the identity first.
    pub poses: Vec<Score>,
    /// Mean over the seven elements that are not the identity.
    pub moved: Score,
}

/// Values in percent under one element of D4.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub pose: String,
    /// Average precision at an intersection over union of a half, the mean over classes.
    pub ap50: f64,
    /// The same of each class; `None`: no test image shows it.
    pub classes: Vec<Option<f64>>,
    /// Mean intersection over union of the boxes that were found with their detections; `None`: none were found.
    pub miou: Option<f64>,
    /// Boxes that were found, at whatever precision.
    pub recall: f64,
}

impl Score {
    /// The mean over elements of D4, each value over the elements that have it.
    fn mean(pose: &str, of: &[Self], classes: usize) -> Self {
        Self {
            pose: pose.to_string(),
            ap50: mean(of.iter().map(|p| p.ap50)).unwrap_or(f64::NAN),
            classes: (0..classes).map(|c| mean(of.iter().filter_map(|p| p.classes[c]))).collect(),
            miou: mean(of.iter().filter_map(|p| p.miou)),
            recall: mean(of.iter().map(|p| p.recall)).unwrap_or(f64::NAN),
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v, n + 1));
    (n > 0).then(|| sum / f64::from(n))
}

/// How tokens are read: the same for all kinds of tokens.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Side of the windows in pixels.
    pub window: usize,
    /// Side of a token in pixels.
    pub patch: usize,
    /// Mean and standard deviation of each channel.
    pub statistics: Vec<(f32, f32)>,
    pub device: Device,
    /// The number of classes.
    pub classes: usize,
    /// The most tokens that the head is fitted to.
    pub tokens: usize,
    /// The draw of these tokens follows from it.
    pub seed: u64,
}

/// Scores each of `subjects`, and the patches of pixels if `raw`. `done` is called after each fit and after each element.
pub fn measure(
    subjects: &[&Subject],
    raw: bool,
    options: &Options,
    seed: u64,
    mut done: impl FnMut(),
) -> Result<Detect> {
    let first = subjects.first().context("expected an encoder, got none")?;
    let (config, set) = (&first.card.vit, &options.set);
    let layer = first.layer(options.layer)?;
    ensure!(
        config.channels == 3,
        "--boxes: expected an encoder of color images, got one of {} channel",
        config.channels
    );
    let scale = scale(&set.train, config.patch)?;
    let mut skipped = Vec::new();
    let mut read = |images: &[Annotated], count: usize, what| -> Result<Vec<Scene>> {
        let drawn = draw::by_class(&vec![0; images.len()], count, draw::SEED);
        let one = |&i: &usize| {
            let scene = Scene::read(&images[i], scale, config.side);
            scene.map_err(|why| (images[i].image.clone(), format!("{why:#}")))
        };
        let read: Vec<Result<Scene, (PathBuf, String)>> = drawn.par_iter().map(one).collect();
        let mut scenes = Vec::new();
        for scene in read {
            match scene {
                Ok(scene) => scenes.push(scene),
                Err(why) => skipped.push(why),
            }
        }
        let named = skipped.first().map(|(path, why)| format!("; {}: {why}", path.display()));
        ensure!(
            scenes.iter().any(|s| s.objects.iter().any(|o| !o.difficult)),
            "--boxes: expected {what} images with boxes, got none among {} that can be read{}",
            scenes.len(),
            named.unwrap_or_default()
        );
        Ok(scenes)
    };
    let train = read(&set.train, options.train, "training")?;
    let test = read(&set.test, options.test, "test")?;
    let damaged = match skipped.first() {
        None => String::new(),
        Some((path, why)) => {
            format!("; {} images cannot be read ({}: {why})", skipped.len(), path.display())
        }
    };
    let reading = Reading {
        window: config.side,
        patch: config.patch,
        statistics: first.card.statistics.clone(),
        device: first.device.clone(),
        classes: set.classes.len(),
        tokens: options.tokens,
        seed,
    };
    let mut rows = Vec::new();
    for subject in subjects {
        let vit = subject.at_side(config.side)?;
        let encode = |x: &Tensor| subject.tokens(&vit, x, layer);
        rows.push(row(&subject.name, &train, &test, &reading, encode, &mut done)?);
    }
    if raw {
        let encode = |x: &Tensor| patches(x, config.patch);
        rows.push(row("raw patches", &train, &test, &reading, encode, &mut done)?);
    }
    Ok(Detect {
        data: format!("{}{damaged}", set.note),
        classes: set.classes.clone(),
        layer,
        window: config.side,
        patch: config.patch,
        scale,
        train_images: train.len(),
        test_images: test.len(),
        rows,
    })
}

/// How often [`measure`] calls `done` for each kind of tokens.
pub const STEPS: usize = 1 + POSES.len();

/// The factor for which the median box of the training images is [`TOKENS`] wide; images are not enlarged.
fn scale(images: &[Annotated], patch: usize) -> Result<f64> {
    let objects = images.iter().flat_map(|i| &i.objects).filter(|o| !o.difficult);
    let mut widths: Vec<f64> =
        objects.map(|o| ((o.bottom - o.top) * (o.right - o.left)).sqrt()).collect();
    widths.sort_by(f64::total_cmp);
    let median = widths.get(widths.len() / 2).context("expected training boxes, got none")?;
    Ok((TOKENS * patch as f64 / median).min(1.0))
}

/// Fits a head to the tokens of `train`, and finds the boxes of `test` in all elements of D4. `encode` gives the tokens
/// `(n, N, d)` of windows `(n, 3, S, S)`.
///
/// # Errors
/// If no token of `train` belongs to an object.
pub fn row(
    name: &str,
    train: &[Scene],
    test: &[Scene],
    reading: &Reading,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
    mut done: impl FnMut(),
) -> Result<Row> {
    let head = Head::fit(train, reading, &encode)?;
    done();
    let mut poses = Vec::new();
    for (pose, g) in POSES {
        let (mut detections, mut truth) = (Vec::new(), Vec::new());
        for (canvas, scene) in test.iter().enumerate() {
            let scene = scene.moved(g)?;
            detections.extend(head.detect(canvas, &scene, reading, &encode)?);
            truth.extend(scene.objects.iter().map(|o| Truth {
                canvas,
                class: o.class,
                at: o.at,
                difficult: o.difficult,
            }));
        }
        poses.push(score(pose, &detections, &truth, reading.classes));
        done();
    }
    let moved = Score::mean("moved", &poses[1..], reading.classes);
    Ok(Row { features: name.to_string(), poses, moved })
}

fn score(pose: &str, detections: &[Detection], truth: &[Truth], classes: usize) -> Score {
    let judged: Vec<Option<precision::Found>> = (0..classes as u32)
        .into_par_iter()
        .map(|class| precision::judge(detections, truth, class))
        .collect();
    let found = || judged.iter().flatten();
    let overlaps = || found().flat_map(|f| f.overlaps.iter().copied());
    let wanted: usize = found().map(|f| f.wanted).sum();
    Score {
        pose: pose.to_string(),
        ap50: 100.0 * mean(found().map(|f| f.precision)).unwrap_or(0.0),
        classes: judged.iter().map(|f| f.as_ref().map(|f| 100.0 * f.precision)).collect(),
        miou: mean(overlaps()).map(|overlap| 100.0 * overlap),
        recall: 100.0 * overlaps().count() as f64 / wanted.max(1) as f64,
    }
}

/// A linear classifier and a linear regression of tokens. Class 0 is the background.
struct Head {
    classifier: Probe,
    regression: Regression,
}

impl Head {
    fn fit(
        scenes: &[Scene],
        reading: &Reading,
        encode: &impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        // Which tokens: of each scene their numbers, labels and boxes as they see them, in tokens.
        let (mut owner, mut labels) = (Vec::new(), Vec::new());
        let mut offsets = Vec::new();
        for (i, scene) in scenes.iter().enumerate() {
            let centers = scene.centers(reading.window, reading.patch);
            let targets = scene.targets(&centers, reading.patch);
            for (token, (target, center)) in targets.into_iter().zip(centers).enumerate() {
                let object = match target {
                    Target::Ignored => continue,
                    Target::Background => None,
                    Target::Object(object) => Some(&scene.objects[object]),
                };
                let seen = |at: &Box| at.seen_from(center).map(|v| v / reading.patch as f64);
                owner.push((i, token as u32));
                labels.push(object.map_or(0, |o| o.class + 1));
                offsets.push(object.map(|o| seen(&o.at)));
            }
        }
        let drawn = draw::by_class(&labels, reading.tokens, reading.seed);
        let labels: Vec<u32> = drawn.iter().map(|&i| labels[i]).collect();
        let owned: Vec<(usize, [f64; 4])> = drawn
            .iter()
            .enumerate()
            .filter_map(|(row, &i)| offsets[i].map(|offset| (row, offset)))
            .collect();
        let mut tokens = Vec::new();
        for some in drawn.chunk_by(|&a, &b| owner[a].0 == owner[b].0) {
            let all = encoded(&scenes[owner[some[0]].0], reading, encode)?;
            let rows: Vec<u32> = some.iter().map(|&i| owner[i].1).collect();
            let rows = Tensor::new(rows, all.device())?;
            tokens.push(all.index_select(&rows, 0)?);
        }
        let tokens = Tensor::cat(&tokens, 0)?;
        Ok(Self {
            classifier: Probe::with_l2(&tokens, &labels, L2)?,
            regression: Regression::to_offsets(&tokens, &owned, L2)?,
        })
    }

    /// Each token proposes a box of its most probable class; boxes end at the border of the image.
    fn detect(
        &self,
        canvas: usize,
        scene: &Scene,
        reading: &Reading,
        encode: &impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<Detection>> {
        let tokens = encoded(scene, reading, encode)?;
        let probabilities = self.classifier.probabilities(&tokens)?;
        let offsets = self.regression.offsets(&tokens)?;
        let centers = scene.centers(reading.window, reading.patch);
        let mut proposals = Vec::new();
        for ((probabilities, offset), center) in probabilities.iter().zip(offsets).zip(centers) {
            let offset = offset.map(|v| v * reading.patch as f64);
            let at = Box::at(center, offset).within(&scene.image);
            let best = (1..probabilities.len())
                .rev()
                .max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
            let class = best.context("expected a class beside the background, got none")?;
            let score = probabilities[class];
            if score >= LEAST && at.bottom > at.top && at.right > at.left {
                proposals.push(Detection { canvas, class: class as u32 - 1, score, at });
            }
        }
        Ok(boxes::suppress(proposals))
    }
}

/// The tokens `(n, d)` of all windows of a scene.
fn encoded(
    scene: &Scene,
    reading: &Reading,
    encode: &impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let windows = scene.windows(reading.window, &reading.statistics, &reading.device)?;
    let count = windows.dim(0)?;
    let mut tokens = Vec::new();
    for start in (0..count).step_by(CHUNK) {
        let some = windows.narrow(0, start, CHUNK.min(count - start))?;
        tokens.push(encode(&some)?.detach().flatten_to(1)?.to_device(&Device::Cpu)?);
    }
    Ok(Tensor::cat(&tokens, 0)?)
}
