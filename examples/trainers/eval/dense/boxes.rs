//! Boxes: how they overlap, and how tokens propose them.

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
    pub fn area(&self) -> f64 {
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

    /// The box as a point sees it: offset of the center down and right, height and width.
    pub fn seen_from(&self, [row, col]: [f64; 2]) -> [f64; 4] {
        [
            (self.top + self.bottom) / 2.0 - row,
            (self.left + self.right) / 2.0 - col,
            self.bottom - self.top,
            self.right - self.left,
        ]
    }

    /// The box that a point sees so.
    pub fn at([row, col]: [f64; 2], [down, right, height, width]: [f64; 4]) -> Self {
        Self {
            top: row + down - height / 2.0,
            left: col + right - width / 2.0,
            bottom: row + down + height / 2.0,
            right: col + right + width / 2.0,
        }
    }

    /// The part inside of another box; it may be empty.
    pub fn within(&self, other: &Self) -> Self {
        Self {
            top: self.top.max(other.top),
            left: self.left.max(other.left),
            bottom: self.bottom.min(other.bottom),
            right: self.right.min(other.right),
        }
    }

    /// Intersection over union.
    pub fn iou(&self, other: &Self) -> f64 {
        let both = self.within(other);
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
        let owned = owners.iter().enumerate();
        let owned =
            owned.filter_map(|(i, owner)| owner.map(|owner| (i, owner.seen_from(center(i, grid)))));
        Self::to_offsets(tokens, &owned.collect::<Vec<_>>(), l2)
    }

    /// Fits to the tokens `(n, d)` of these numbers and their [offsets](Box::seen_from).
    pub fn to_offsets(tokens: &Tensor, owned: &[(usize, [f64; 4])], l2: f64) -> Result<Self> {
        ensure!(!owned.is_empty(), "expected tokens that belong to an object, got none");
        let values = &tokens.to_vec2::<f32>()?;
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
        let y = DMatrix::from_fn(n, 4, |i, c| owned[i].1[c]);
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
        let offsets = self.offsets(tokens)?.into_iter().enumerate();
        Ok(offsets.map(|(i, offset)| Box::at(center(i, grid), offset)).collect())
    }

    /// The offsets that each token `(n, d)` proposes.
    pub fn offsets(&self, tokens: &Tensor) -> Result<Vec<[f64; 4]>> {
        let d = self.mean.len();
        let read = |token: Vec<f32>| {
            std::array::from_fn(|k| {
                let terms = token.iter().enumerate().map(|(c, v)| {
                    (f64::from(*v) - self.mean[c]) / self.scale[c] * self.weights[(c, k)]
                });
                terms.sum::<f64>() + self.weights[(d, k)]
            })
        };
        Ok(tokens.to_vec2::<f32>()?.into_iter().map(read).collect())
    }
}

/// The center of token `i` of a series of canvases, in tokens.
fn center(i: usize, grid: usize) -> [f64; 2] {
    let place = i % (grid * grid);
    [(place / grid) as f64 + 0.5, (place % grid) as f64 + 0.5]
}
