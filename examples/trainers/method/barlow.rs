//! Barlow Twins (arXiv 2103.03230): the features of two views of a batch shall agree, each with itself and none with
//! another.

use candle_core::{Result, Tensor};

use super::HeadConfig;
use crate::nn::BatchNorm;

/// The projector of the small preset; its output is normalized in the loss.
pub fn small(dim: usize) -> HeadConfig {
    HeadConfig::batch_norm(&[dim, 256, 256, 256])
}

/// The projector of the paper.
pub fn paper(dim: usize) -> HeadConfig {
    HeadConfig::batch_norm(&[dim, 8192, 8192, 8192])
}

/// `C = ẑ₁ᵀẑ₂/B` of embeddings `(B, D)`, each feature standardised over the batch.
pub fn cross_correlation(z1: &Tensor, z2: &Tensor) -> Result<Tensor> {
    let [z1, z2] = standardised(z1, z2)?;
    z1.t()?.matmul(&z2)? / z1.dim(0)? as f64
}

/// `s·(Σᵢ (1 − Cᵢᵢ)² + λ Σ_{i≠j} Cᵢⱼ²)` with `s` as `scale`. The sum grows with the number of features; a small factor
/// keeps its gradient to the measure of other losses.
pub fn loss(z1: &Tensor, z2: &Tensor, lambda: f64, scale: f64) -> Result<Tensor> {
    let batch = z1.dim(0)? as f64;
    let [z1, z2] = standardised(z1, z2)?;
    let all = (z1.t()?.matmul(&z2)? / batch)?.sqr()?.sum_all()?;
    // The diagonal by itself, which spares a mask of all pairs.
    let own = ((z1 * z2)?.sum(0)? / batch)?;
    let others = (all - own.sqr()?.sum_all()?)?;
    let missing = own.affine(-1.0, 1.0)?.sqr()?.sum_all()?;
    (missing + (others * lambda)?)? * scale
}

fn standardised(z1: &Tensor, z2: &Tensor) -> Result<[Tensor; 2]> {
    let norm = BatchNorm::without_affine();
    Ok([norm.forward(z1)?, norm.forward(z2)?])
}
