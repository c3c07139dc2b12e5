//! DINO (arXiv 2104.14294): self-distillation. A student must assign one view of an image to the prototypes to which its
//! own moving average, the teacher, assigns another view.
//!
//! Two ways to collapse hold each other in check. Centring alone ends in the uniform assignment, sharpening alone in one
//! prototype for everything: log [`Entropies`].

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder, ops};

use super::{Head, HeadConfig};
use crate::nn::normalize;

/// A perceptron, then cosines with prototypes: each has unit length, times a gain.
#[derive(Clone, Debug)]
pub struct DinoHead {
    mlp: Head,
    /// `(K, width)`, of any length: what counts is the direction.
    prototypes: Tensor,
    /// One per prototype; `None`: fixed at 1.
    gain: Option<Tensor>,
}

impl DinoHead {
    /// The perceptron of the small preset. Batch normalization, which the paper does without: at this size and length
    /// nothing is learned otherwise.
    pub fn small(dim: usize) -> HeadConfig {
        HeadConfig::batch_norm(&[dim, 256, 256, 64])
    }

    /// The perceptron of the paper; it has 65,536 prototypes.
    pub fn paper(dim: usize) -> HeadConfig {
        HeadConfig::gelu(&[dim, 2048, 2048, 256])
    }

    /// `learned_gain`: whether the length of each prototype is trained. The paper fixes it for smaller encoders, for
    /// stability.
    pub fn new(
        mlp: &HeadConfig,
        prototypes: usize,
        learned_gain: bool,
        vb: VarBuilder,
    ) -> Result<Self> {
        let Some(&width) = mlp.widths.last() else {
            bail!("expected widths of the head, got none");
        };
        let vb_last = vb.pp("prototypes");
        let bound = 1.0 / (width as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let gain = || vb_last.get_with_hints(prototypes, "gain", Init::Const(1.0));
        Ok(Self {
            mlp: Head::new(mlp, vb.pp("mlp"))?,
            prototypes: vb_last.get_with_hints((prototypes, width), "weight", init)?,
            gain: learned_gain.then(gain).transpose()?,
        })
    }

    /// Features `(B, in)` to scores `(B, K)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = normalize(&self.mlp.forward(x)?)?;
        let scores = x.matmul(&normalize(&self.prototypes)?.t()?)?;
        match &self.gain {
            Some(gain) => scores.broadcast_mul(gain),
            None => Ok(scores),
        }
    }
}

/// `softmax((g − c)/τ)` of the teacher's scores, outside the graph. A low temperature sharpens it; the paper warms it up
/// from 0.04 to 0.07, or keeps it at 0.04.
pub fn targets(scores: &Tensor, center: &Tensor, temperature: f64) -> Result<Tensor> {
    let centered = scores.detach().broadcast_sub(&center.detach())?;
    ops::softmax(&(centered / temperature)?, D::Minus1)
}

/// Mean of `−P_tᵀ log softmax(g_s/τ)` over the pairs of a view `t` of the teacher and another view `s` of the student. The
/// teacher's views, as [`targets`], are the first of the student's.
pub fn loss(students: &[Tensor], targets: &[Tensor], temperature: f64) -> Result<Tensor> {
    if targets.is_empty() || students.len() < targets.len() || students.len() < 2 {
        bail!(
            "expected two views of the student or more, and as many of the teacher at most, got {} and {}",
            students.len(),
            targets.len()
        );
    }
    // −Σ_t P_tᵀ Σ_{s≠t} log P_s, pair by pair.
    let mut terms = Vec::new();
    for (s, scores) in students.iter().enumerate() {
        let logs = ops::log_softmax(&(scores / temperature)?, D::Minus1)?;
        for (t, target) in targets.iter().enumerate() {
            if s != t {
                terms.push((target * &logs)?.sum_all()?);
            }
        }
    }
    let pairs = terms.len() * students[0].dim(0)?;
    Tensor::stack(&terms, 0)?.sum_all()? * (-1.0 / pairs as f64)
}

/// `c ← m·c + (1 − m)·mean(g)` over all of the teacher's scores `(B, K)`. The loss of a step takes the center of the step
/// before.
pub fn updated_center(center: &Tensor, scores: &Tensor, momentum: f64) -> Result<Tensor> {
    let mean = scores.detach().mean_keepdim(0)?;
    (center * momentum)? + (mean * (1.0 - momentum))?
}

/// Entropies of the teacher's assignments, in nats; both lie between 0 and `ln K`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entropies {
    /// Mean entropy of one image's assignment: `ln K` once all are uniform.
    pub each: f64,
    /// Entropy of the mean assignment: 0 once all images share one prototype.
    pub mean: f64,
}

impl Entropies {
    pub fn of(targets: &Tensor) -> Result<Self> {
        // 0·ln 0 is 0.
        let entropy = |p: &Tensor| (p * p.clamp(1e-30, 1.0)?.log()?)?.sum(D::Minus1)?.neg();
        // On the CPU, since some devices have no f64.
        let targets = targets.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        Ok(Self {
            each: entropy(&targets)?.mean_all()?.to_scalar()?,
            mean: entropy(&targets.mean(0)?)?.to_scalar()?,
        })
    }

    /// Mean divergence of the student's assignments from the teacher's, given the [`loss`], a cross-entropy. It is zero
    /// once both give the same for every image.
    pub fn divergence(&self, loss: f64) -> f64 {
        loss - self.each
    }
}
