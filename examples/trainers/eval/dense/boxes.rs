//! Boxes: how they overlap, how tokens propose them, and how proposals are judged.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use nalgebra::{DMatrix, DVector};

/// Edges, in pixels or in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Box {
    pub top: f64,
    pub left: f64,
    pub bottom: f64,
    pub right: f64,
}

impl Box {
    fn area(&self) -> f64 {
        (self.bottom - self.top).max(0.0) * (self.right - self.left).max(0.0)
    }

    /// In units of `unit`.
    pub fn over(&self, unit: f64) -> Self {
        Self {
            top: self.top / unit,
            left: self.left / unit,
            bottom: self.bottom / unit,
            right: self.right / unit,
        }
    }

    /// Intersection over union.
    pub fn iou(&self, other: &Self) -> f64 {
        let both = Self {
            top: self.top.max(other.top),
            left: self.left.max(other.left),
            bottom: self.bottom.min(other.bottom),
            right: self.right.min(other.right),
        };
        let union = self.area() + other.area() - both.area();
        match union > 0.0 {
            true => both.area() / union,
            false => 0.0,
        }
    }
}

/// A proposed box.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    pub canvas: usize,
    pub class: u32,
    pub score: f32,
    pub at: Box,
}

/// Boxes of one class and canvas that overlap a better one by half are dropped; the best first.
pub fn suppress(mut proposals: Vec<Detection>) -> Vec<Detection> {
    // Stable: equals keep their order.
    proposals.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<Detection> = Vec::new();
    for proposal in proposals {
        let same = |k: &Detection| (k.canvas, k.class) == (proposal.canvas, proposal.class);
        if !kept.iter().any(|k| same(k) && k.at.iou(&proposal.at) >= 0.5) {
            kept.push(proposal);
        }
    }
    kept
}

/// Average precision at an overlap of a half, the mean over the classes that `truth`, `(canvas, class, box)`, holds.
pub fn mean_average_precision(detections: &[Detection], truth: &[(usize, u32, Box)]) -> f64 {
    let mut classes: Vec<u32> = truth.iter().map(|t| t.1).collect();
    classes.sort_unstable();
    classes.dedup();
    let total: f64 = classes
        .iter()
        .map(|&class| {
            let truth = truth.iter().filter(|t| t.1 == class).map(|t| (t.0, t.2));
            let detections = detections.iter().filter(|d| d.class == class);
            average_precision(detections.copied().collect(), &truth.collect::<Vec<_>>())
        })
        .sum();
    total / classes.len().max(1) as f64
}

/// The area under precision over recall, precision being the best at that recall or beyond. Each true box is found once.
fn average_precision(mut detections: Vec<Detection>, truth: &[(usize, Box)]) -> f64 {
    detections.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut found = vec![false; truth.len()];
    let mut hits = Vec::with_capacity(detections.len());
    for detection in &detections {
        let overlaps = truth.iter().enumerate().filter(|(_, t)| t.0 == detection.canvas);
        let best =
            overlaps.map(|(i, t)| (i, t.1.iou(&detection.at))).max_by(|a, b| a.1.total_cmp(&b.1));
        hits.push(match best {
            Some((i, overlap)) if overlap >= 0.5 && !found[i] => {
                found[i] = true;
                true
            }
            _ => false,
        });
    }
    // From the last detection back: precision there, and the recall that each hit adds.
    let mut right = hits.iter().filter(|h| **h).count();
    let (mut area, mut precision) = (0.0, 0f64);
    for (i, hit) in hits.iter().enumerate().rev() {
        precision = precision.max(right as f64 / (i + 1) as f64);
        if *hit {
            area += precision / truth.len() as f64;
            right -= 1;
        }
    }
    area
}

/// Mean intersection over union of the classes that `predicted` or `labels` name.
pub fn mean_iou(predicted: &[u32], labels: &[u32]) -> f64 {
    let classes = predicted.iter().chain(labels).max().map_or(0, |&c| c as usize + 1);
    let (mut both, mut either) = (vec![0; classes], vec![0; classes]);
    for (&p, &l) in predicted.iter().zip(labels) {
        either[p as usize] += 1;
        if p == l {
            both[p as usize] += 1;
        } else {
            either[l as usize] += 1;
        }
    }
    let named = (0..classes).filter(|&c| either[c] > 0);
    let ratios: Vec<f64> = named.map(|c| f64::from(both[c]) / f64::from(either[c])).collect();
    ratios.iter().sum::<f64>() / ratios.len().max(1) as f64
}

/// Ridge regression from a token to the box of its object: offset of the center, height and width, in tokens.
pub struct Regression {
    mean: DVector<f64>,
    scale: DVector<f64>,
    /// `(d + 1, 4)`, the constant last.
    weights: DMatrix<f64>,
}

impl Regression {
    /// Fits to the tokens `(n, d)` that have an owner; token `i` of a canvas stands at row `i / grid`. `l2` is relative to the
    /// mean square of a feature.
    pub fn fit(tokens: &Tensor, owners: &[Option<Box>], grid: usize, l2: f64) -> Result<Self> {
        let owned: Vec<(usize, Box)> = owners
            .iter()
            .enumerate()
            .filter_map(|(i, owner)| owner.map(|owner| (i, owner)))
            .collect();
        ensure!(!owned.is_empty(), "expected tokens that belong to an object, got none");
        let (owned, values) = (&owned, &tokens.to_vec2::<f32>()?);
        let (n, d) = (owned.len(), tokens.dim(1)?);
        let column = |c: usize| owned.iter().map(move |(i, _)| f64::from(values[*i][c]));
        let mean = DVector::from_fn(d, |c, _| column(c).sum::<f64>() / n as f64);
        let scale = DVector::from_fn(d, |c, _| {
            let variance = column(c).map(|v| (v - mean[c]).powi(2)).sum::<f64>() / n as f64;
            variance.sqrt().max(1e-6)
        });
        let x = DMatrix::from_fn(n, d + 1, |i, c| match c < d {
            true => (f64::from(values[owned[i].0][c]) - mean[c]) / scale[c],
            false => 1.0,
        });
        let y = DMatrix::from_fn(n, 4, |i, c| target(owned[i].0, grid, &owned[i].1)[c]);
        let mut normal = x.tr_mul(&x) / n as f64;
        for c in 0..d {
            normal[(c, c)] += l2;
        }
        let normal = normal.cholesky().context("the tokens cannot tell boxes apart")?;
        let weights = normal.solve(&(x.tr_mul(&y) / n as f64));
        Ok(Self { mean, scale, weights })
    }

    /// The box that each token `(n, d)` proposes.
    pub fn boxes(&self, tokens: &Tensor, grid: usize) -> Result<Vec<Box>> {
        let d = self.mean.len();
        let read = |(i, token): (usize, Vec<f32>)| {
            let mut out = [0.0; 4];
            for (k, out) in out.iter_mut().enumerate() {
                let terms = token.iter().enumerate().map(|(c, v)| {
                    (f64::from(*v) - self.mean[c]) / self.scale[c] * self.weights[(c, k)]
                });
                *out = terms.sum::<f64>() + self.weights[(d, k)];
            }
            let ([row, col], [down, right, height, width]) = (center(i, grid), out);
            Box {
                top: row + down - height / 2.0,
                left: col + right - width / 2.0,
                bottom: row + down + height / 2.0,
                right: col + right + width / 2.0,
            }
        };
        Ok(tokens.to_vec2::<f32>()?.into_iter().enumerate().map(read).collect())
    }
}

/// The center of token `i` of a series of canvases, in tokens.
fn center(i: usize, grid: usize) -> [f64; 2] {
    let place = i % (grid * grid);
    [(place / grid) as f64 + 0.5, (place % grid) as f64 + 0.5]
}

fn target(i: usize, grid: usize, at: &Box) -> [f64; 4] {
    let [row, col] = center(i, grid);
    [
        (at.top + at.bottom) / 2.0 - row,
        (at.left + at.right) / 2.0 - col,
        at.bottom - at.top,
        at.right - at.left,
    ]
}
