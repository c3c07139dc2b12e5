//! The linear probe: multinomial logistic regression on standardised features.
//!
//! Minimizes `mean cross-entropy + ½·l2·‖W‖²` by L-BFGS over the whole set: no step size, no order of batches, no seed.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::{finite, nn::mean_row};

/// Strengths that are tried, the strongest first: each starts where the one before ended.
pub const GRID: [f64; 5] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5];
/// What is taken where there are too few samples to hold some out.
const FALLBACK: f64 = 1e-3;

/// Gradients this small, in the largest component, end the search.
const TOLERANCE: f64 = 1e-4;
const ITERATIONS: usize = 400;
/// Pairs of steps and gradient differences that L-BFGS remembers.
const MEMORY: usize = 10;

/// A linear classifier of features.
pub struct Probe {
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    /// The strength it was fitted with.
    pub l2: f64,
    /// Accuracy on the held-out tenth, in percent, where one chose the strength.
    pub held_out: Option<f64>,
}

impl Probe {
    /// Fits with the strength that does best on a tenth held out, then on all.
    pub fn fit(features: &Tensor, labels: &[u32]) -> Result<Self> {
        finite::ensure("a linear probe: the features", features)?;
        // Every tenth sample of each class, in whatever order they come.
        let mut seen = vec![0; classes(labels)];
        let indices = 0..labels.len() as u32;
        let (test, train): (Vec<u32>, Vec<u32>) = indices.partition(|&i| {
            let seen = &mut seen[labels[i as usize] as usize];
            *seen += 1;
            *seen % 10 == 0
        });
        if test.is_empty() {
            return Self::with_l2(features, labels, FALLBACK);
        }
        let part = |indices: &[u32]| -> Result<(Tensor, Vec<u32>)> {
            let rows = Tensor::new(indices, features.device())?;
            let labels = indices.iter().map(|&i| labels[i as usize]).collect();
            Ok((features.index_select(&rows, 0)?, labels))
        };
        let ((train, train_labels), (test, test_labels)) = (part(&train)?, part(&test)?);
        let problem = Problem::new(&train, &train_labels, classes(labels))?;
        let mut theta = problem.start();
        let (mut l2, mut held_out, mut start) = (FALLBACK, None, theta.clone());
        for strength in GRID {
            theta = problem.solve(strength, theta);
            let probe = problem.probe(&theta, strength)?;
            let accuracy = accuracy(&probe.predict(&test)?, &test_labels);
            // Of equals, the stronger.
            if held_out.is_none_or(|best| accuracy > best) {
                (l2, held_out, start) = (strength, Some(accuracy), theta.clone());
            }
        }
        let whole = Problem::new(features, labels, classes(labels))?;
        let theta = whole.solve(l2, start);
        let probe = whole.probe(&theta, l2)?;
        Ok(Self { held_out, ..probe })
    }

    /// Fits with one strength.
    pub fn with_l2(features: &Tensor, labels: &[u32], l2: f64) -> Result<Self> {
        let problem = Problem::new(features, labels, classes(labels))?;
        let theta = problem.solve(l2, problem.start());
        problem.probe(&theta, l2)
    }

    /// Logits `(n, classes)` of features `(n, d)`.
    ///
    /// # Errors
    /// If a feature is not finite.
    pub fn logits(&self, features: &Tensor) -> Result<Tensor> {
        finite::ensure("a linear probe: the features", features)?;
        let x = features.broadcast_sub(&self.mean)?.broadcast_div(&self.scale)?;
        Ok(x.matmul(&self.weight)?.broadcast_add(&self.bias)?)
    }

    /// The most probable class of each.
    pub fn predict(&self, features: &Tensor) -> Result<Vec<u32>> {
        Ok(self.logits(features)?.argmax(1)?.to_vec1()?)
    }

    /// Probabilities of the classes, a row for each sample.
    pub fn probabilities(&self, features: &Tensor) -> Result<Vec<Vec<f32>>> {
        let logits = self.logits(features)?;
        Ok(candle_nn::ops::softmax(&logits, 1)?.to_vec2()?)
    }
}

/// The percentage of `predictions` that equal their label.
pub fn accuracy(predictions: &[u32], labels: &[u32]) -> f64 {
    let right = predictions.iter().zip(labels).filter(|(p, l)| p == l);
    100.0 * right.count() as f64 / labels.len().max(1) as f64
}

fn classes(labels: &[u32]) -> usize {
    labels.iter().max().map_or(0, |&l| l as usize + 1)
}

/// The objective on one set of samples. Parameters are the weights `(d, classes)`, then the biases.
struct Problem {
    mean: Tensor,
    scale: Tensor,
    x: Tensor,
    labels: Vec<u32>,
    classes: usize,
}

impl Problem {
    fn new(features: &Tensor, labels: &[u32], classes: usize) -> Result<Self> {
        ensure!(
            features.dim(0)? == labels.len() && !labels.is_empty(),
            "expected one label for each of {} features, got {}",
            features.dim(0)?,
            labels.len()
        );
        ensure!(
            labels.iter().any(|l| *l != labels[0]),
            "a linear probe: expected samples of at least two classes, got only class {}",
            labels[0]
        );
        finite::ensure("a linear probe: the features", features)?;
        let features = features.detach();
        let mean = mean_row(&features)?;
        let centered = features.broadcast_sub(&mean)?;
        // A constant feature stays zero, and so does its weight.
        let scale = mean_row(&centered.sqr()?)?.sqrt()?.maximum(1e-6)?;
        Ok(Self {
            x: centered.broadcast_div(&scale)?.to_device(&Device::Cpu)?,
            mean,
            scale,
            labels: labels.to_vec(),
            classes,
        })
    }

    fn start(&self) -> Vec<f64> {
        vec![0.0; (self.x.dims()[1] + 1) * self.classes]
    }

    fn split(&self, theta: &[f64]) -> Result<(Tensor, Tensor)> {
        let values: Vec<f32> = theta.iter().map(|&t| t as f32).collect();
        let (weight, bias) = values.split_at(self.x.dims()[1] * self.classes);
        let weight = Tensor::from_slice(weight, (self.x.dims()[1], self.classes), &Device::Cpu)?;
        Ok((weight, Tensor::from_slice(bias, (1, self.classes), &Device::Cpu)?))
    }

    fn probe(&self, theta: &[f64], l2: f64) -> Result<Probe> {
        let (weight, bias) = self.split(theta)?;
        let device = self.mean.device();
        Ok(Probe {
            mean: self.mean.clone(),
            scale: self.scale.clone(),
            weight: weight.to_device(device)?,
            bias: bias.to_device(device)?,
            l2,
            held_out: None,
        })
    }

    /// Value and gradient.
    fn evaluate(&self, theta: &[f64], l2: f64) -> Result<(f64, Vec<f64>)> {
        let (n, k) = (self.labels.len(), self.classes);
        let (weight, bias) = self.split(theta)?;
        let logits = self.x.matmul(&weight)?.broadcast_add(&bias)?;
        let mut rows: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        // Logits become probabilities less the label; sums run over fixed chunks, whatever the number of threads.
        const ROWS: usize = 256;
        let sums: Vec<(f64, Vec<f64>)> = rows
            .par_chunks_mut(ROWS * k)
            .zip(self.labels.par_chunks(ROWS))
            .map(|(rows, labels)| {
                let (mut loss, mut bias) = (0.0, vec![0f64; k]);
                for (row, &label) in rows.chunks_exact_mut(k).zip(labels) {
                    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    let own = f64::from(row[label as usize] - max);
                    row.iter_mut().for_each(|v| *v = (*v - max).exp());
                    let total: f32 = row.iter().sum();
                    loss += f64::from(total).ln() - own;
                    row.iter_mut().for_each(|v| *v /= total);
                    row[label as usize] -= 1.0;
                    bias.iter_mut().zip(&*row).for_each(|(b, v)| *b += f64::from(*v));
                }
                (loss, bias)
            })
            .collect();
        let residuals = Tensor::from_vec(rows, (n, k), &Device::Cpu)?;
        let weights = &theta[..self.x.dims()[1] * k];
        let slope = product(&self.x, &residuals)?;
        let penalty = 0.5 * l2 * weights.iter().map(|w| w * w).sum::<f64>();
        let value = sums.iter().map(|s| s.0).sum::<f64>() / n as f64 + penalty;
        let mut gradient: Vec<f64> =
            slope.iter().zip(weights).map(|(g, w)| g / n as f64 + l2 * w).collect();
        gradient.extend((0..k).map(|c| sums.iter().map(|s| s.1[c]).sum::<f64>() / n as f64));
        Ok((value, gradient))
    }

    fn solve(&self, l2: f64, start: Vec<f64>) -> Vec<f64> {
        minimize(start, |theta| self.evaluate(theta, l2).ok())
    }
}

/// `xᵀ·y` of rows `(n, d)` and `(n, k)`, row by row: products of blocks of rows, summed in f64.
fn product(x: &Tensor, y: &Tensor) -> Result<Vec<f64>> {
    const ROWS: usize = 4096;
    let n = x.dim(0)?;
    let mut total = vec![0.0; x.dim(1)? * y.dim(1)?];
    for start in (0..n).step_by(ROWS) {
        let rows = |t: &Tensor| t.narrow(0, start, ROWS.min(n - start));
        let part: Vec<f32> = rows(x)?.t()?.matmul(&rows(y)?)?.flatten_all()?.to_vec1()?;
        total.iter_mut().zip(part).for_each(|(t, p)| *t += f64::from(p));
    }
    Ok(total)
}

/// The minimum of a convex function by L-BFGS with a backtracking line search, from `x`; ends early where `f` fails.
pub fn minimize(mut x: Vec<f64>, f: impl Fn(&[f64]) -> Option<(f64, Vec<f64>)>) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let Some((mut value, mut gradient)) = f(&x) else {
        return x;
    };
    // Steps, differences of gradients, and one over their product; the latest last.
    let mut memory: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    for _ in 0..ITERATIONS {
        if gradient.iter().all(|g| g.abs() < TOLERANCE) {
            break;
        }
        // The gradient times an estimate of the inverse Hessian, by two loops over the memory.
        let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut factors = Vec::with_capacity(memory.len());
        for (s, y, rho) in memory.iter().rev() {
            let a = rho * dot(s, &direction);
            direction.iter_mut().zip(y).for_each(|(d, y)| *d -= a * y);
            factors.push(a);
        }
        let scale = match memory.back() {
            Some((_, y, rho)) => 1.0 / (rho * dot(y, y)),
            None => 1.0 / dot(&gradient, &gradient).sqrt(),
        };
        direction.iter_mut().for_each(|d| *d *= scale);
        for ((s, y, rho), a) in memory.iter().zip(factors.into_iter().rev()) {
            let b = a - rho * dot(y, &direction);
            direction.iter_mut().zip(s).for_each(|(d, s)| *d += b * s);
        }
        let slope = dot(&direction, &gradient);
        let mut step = 1.0;
        let next = loop {
            let candidate: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            match f(&candidate) {
                Some((v, g)) if v <= value + 1e-4 * step * slope => break Some((candidate, v, g)),
                // Rounding hides any further descent.
                _ if step < 1e-6 => break None,
                _ => step /= 2.0,
            }
        };
        let Some((candidate, v, g)) = next else {
            // The memory may mislead: once more along the gradient, then the end.
            if memory.is_empty() {
                break;
            }
            memory.clear();
            continue;
        };
        let s: Vec<f64> = candidate.iter().zip(&x).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = g.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let product = dot(&s, &y);
        if product > 1e-12 * dot(&y, &y) {
            if memory.len() == MEMORY {
                memory.pop_front();
            }
            memory.push_back((s, y, 1.0 / product));
        }
        (x, value, gradient) = (candidate, v, g);
    }
    x
}
