//! Losses of further methods, to replace a trainer's base loss.
//!
//! Arguments are embeddings `(B, D)`: `z` of a projector, `p` of a predictor behind it. No gradient passes through `z` where
//! a method compares with it.

use candle_core::{D, Result, Tensor};
use ser_reg::loss::{Contrastive, nt_xent_symmetric};

use crate::nn::normalize;

/// SimCLR (arXiv 2002.05709): cross-entropy over the cosines, divided by `temperature`, of each embedding with the `2B − 1`
/// others. The positive is the embedding of the other view. It is the library's token objective for images of one token.
pub fn simclr(z1: &Tensor, z2: &Tensor, temperature: f64) -> ser_reg::Result<Tensor> {
    let config = Contrastive { temperature, eps: 1e-12, ..Contrastive::default() };
    Ok(nt_xent_symmetric(&z1.unsqueeze(1)?, &z2.unsqueeze(1)?, &config)?.loss)
}

/// BYOL (arXiv 2006.07733): `mean |p̂₁ − ẑ₂|² + mean |p̂₂ − ẑ₁|²`, with `z` of a momentum copy.
pub fn byol(p: [&Tensor; 2], z: [&Tensor; 2]) -> Result<Tensor> {
    (cosines(p, z)? * -2.0)? + 4.0
}

/// SimSiam (arXiv 2011.10566): `−½(mean cos(p₁, z₂) + mean cos(p₂, z₁))`, with `z` of the same encoder.
pub fn simsiam(p: [&Tensor; 2], z: [&Tensor; 2]) -> Result<Tensor> {
    cosines(p, z)? * -0.5
}

/// `mean cos(p₁, z₂) + mean cos(p₂, z₁)`
fn cosines([p1, p2]: [&Tensor; 2], [z1, z2]: [&Tensor; 2]) -> Result<Tensor> {
    let mean = |p: &Tensor, z: &Tensor| {
        let product = (normalize(p)? * normalize(&z.detach())?)?;
        product.sum(D::Minus1)?.mean_all()
    };
    mean(p1, z2)? + mean(p2, z1)?
}

/// VICReg (arXiv 2105.04906): weights of its three terms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VicReg {
    pub invariance: f64,
    pub variance: f64,
    pub covariance: f64,
    /// Standard deviation that each feature shall have.
    pub deviation: f64,
    /// Added to variances before the root.
    pub eps: f64,
}

impl Default for VicReg {
    fn default() -> Self {
        Self { invariance: 25.0, variance: 25.0, covariance: 1.0, deviation: 1.0, eps: 1e-4 }
    }
}

/// The weighted sum, and the terms before they are weighted.
#[derive(Clone, Debug)]
pub struct VicRegTerms {
    pub loss: Tensor,
    pub invariance: Tensor,
    pub variance: Tensor,
    pub covariance: Tensor,
}

impl VicReg {
    /// - invariance: `mean (z₁ − z₂)²` over all entries
    /// - variance: mean over features of `max(0, deviation − √(Var z + eps))`, halved and summed over both views
    /// - covariance: `Σ_{i≠j} Cov(z)ᵢⱼ² / D`, summed over both views
    ///
    /// Variances and covariances are divided by `B − 1`.
    pub fn forward(&self, z1: &Tensor, z2: &Tensor) -> Result<VicRegTerms> {
        let invariance = (z1 - z2)?.sqr()?.mean_all()?;
        let (variance1, covariance1) = self.spread(z1)?;
        let (variance2, covariance2) = self.spread(z2)?;
        let variance = ((variance1 + variance2)? * 0.5)?;
        let covariance = (covariance1 + covariance2)?;
        let loss = (((&invariance * self.invariance)? + (&variance * self.variance)?)?
            + (&covariance * self.covariance)?)?;
        Ok(VicRegTerms { loss, invariance, variance, covariance })
    }

    /// Variance and covariance term of one view.
    fn spread(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, width) = z.dims2()?;
        let centered = z.broadcast_sub(&z.mean_keepdim(0)?)?;
        let variances = (centered.sqr()?.sum(0)? / (batch - 1) as f64)?;
        let deviations = (&variances + self.eps)?.sqrt()?;
        let missing = deviations.affine(-1.0, self.deviation)?.relu()?.mean_all()?;
        let covariances = (centered.t()?.matmul(&centered)? / (batch - 1) as f64)?;
        let others = (covariances.sqr()?.sum_all()? - variances.sqr()?.sum_all()?)?;
        Ok((missing, (others / width as f64)?))
    }
}
