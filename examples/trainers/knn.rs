//! Weighted nearest neighbors: the accuracy of frozen features, without any training.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    finite,
    nn::{mean_row, normalize},
};

const NEIGHBOURS: usize = 20;
const TEMPERATURE: f32 = 0.07;
/// Queries compared with the whole bank at a time.
const CHUNK: usize = 500;

/// Labelled features to compare with.
pub struct Bank {
    mean: Tensor,
    features: Tensor,
    labels: Vec<u32>,
    classes: usize,
}

impl Bank {
    /// Features `(n, d)` are centered by their mean and brought to unit length, and so will the queries be.
    ///
    /// # Errors
    /// If there is not one label for each, or a feature is not finite.
    pub fn new(features: &Tensor, labels: &[u32]) -> Result<Self> {
        ensure!(
            features.dim(0)? == labels.len() && !labels.is_empty(),
            "expected one label for each of {} features, got {}",
            features.dim(0)?,
            labels.len()
        );
        finite::ensure("20 nearest neighbors: the features of the bank", features)?;
        let mean = mean_row(features)?;
        Ok(Self {
            features: normalize(&features.broadcast_sub(&mean)?)?,
            mean,
            labels: labels.to_vec(),
            classes: labels.iter().max().map_or(0, |&l| l as usize + 1),
        })
    }

    /// The percentage of `queries (m, d)` whose label wins the vote of the 20 nearest, each with weight
    /// `exp(cos / 0.07)`.
    pub fn accuracy(&self, queries: &Tensor, labels: &[u32]) -> Result<f64> {
        let count = queries.dim(0)?;
        ensure!(
            count == labels.len() && count > 0,
            "expected one label for each of {count} queries, got {}",
            labels.len()
        );
        let predicted = self.predict(queries)?;
        let right = predicted.iter().zip(labels).filter(|(p, l)| p == l).count();
        Ok(100.0 * right as f64 / count as f64)
    }

    /// The label that wins the vote, for each of `queries (m, d)`.
    ///
    /// # Errors
    /// If a query is not finite.
    pub fn predict(&self, queries: &Tensor) -> Result<Vec<u32>> {
        let count = queries.dim(0)?;
        finite::ensure("20 nearest neighbors: the features of the queries", queries)?;
        let (mut predicted, transposed) = (Vec::with_capacity(count), self.features.t()?);
        for start in (0..count).step_by(CHUNK) {
            let queries = queries.narrow(0, start, CHUNK.min(count - start))?;
            let queries = normalize(&queries.broadcast_sub(&self.mean)?)?;
            let cosines: Vec<f32> = queries.matmul(&transposed)?.flatten_all()?.to_vec1()?;
            let votes = cosines.par_chunks_exact(self.labels.len());
            predicted.extend(votes.map(|c| self.vote(c)).collect::<Vec<_>>());
        }
        Ok(predicted)
    }

    fn vote(&self, cosines: &[f32]) -> u32 {
        let mut order: Vec<u32> = (0..cosines.len() as u32).collect();
        let near = NEIGHBOURS.min(order.len());
        // Nearest first, and the earlier image first among equals: the same answer on every run.
        let by_cosine = |&a: &u32, &b: &u32| {
            cosines[b as usize].total_cmp(&cosines[a as usize]).then(a.cmp(&b))
        };
        if near < order.len() {
            order.select_nth_unstable_by(near, by_cosine);
        }
        order.truncate(near);
        order.sort_unstable_by(by_cosine);
        let mut votes = vec![0f32; self.classes];
        for i in order {
            votes[self.labels[i as usize] as usize] += (cosines[i as usize] / TEMPERATURE).exp();
        }
        let best = (0..self.classes).rev().max_by(|&a, &b| votes[a].total_cmp(&votes[b]));
        best.unwrap_or(0) as u32
    }
}

/// Standard deviation of unit-length features over the batch, times `√d`: 1 when they fill all directions alike, 0 when
/// they have collapsed to a point.
pub fn spread(features: &Tensor) -> Result<f32> {
    let unit = normalize(features)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let variance = unit.broadcast_sub(&unit.mean_keepdim(0)?)?.sqr()?.mean(0)?;
    let std = variance.sqrt()?.mean(D::Minus1)?.to_scalar::<f64>()?;
    Ok((std * (features.dim(1)? as f64).sqrt()) as f32)
}
