//! Consistency of predictions over the views of one input (arXiv 2203.03304).

use candle_core::{D, DType, Device, Tensor};

use super::{autograd::with_gradient_of, check, orbit::sum};
use crate::{Error, Result};

/// The divergence of the predictions `p_1 … p_K` of one sample; `l_k = log p_k`, and bars are means
/// over views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Divergence {
    /// The mean over pairs of `½ KL(p_k‖p_l) + ½ KL(p_l‖p_k)`, unbounded:
    /// `1/(K−1) Σ_k Σ_c (p_k − p̄)(l_k − l̄)`.
    #[default]
    SymmetricKl,
    /// Jensen-Shannon, the mean of `KL(p_k‖p̄)`: between 0 and `log K`.
    JensenShannon,
    /// The mean over pairs and classes of `(p_k − p_l)²`: `2/(K−1) Σ_k mean_c (p_k − p̄)²`.
    Mse,
}

/// A consistency penalty on the predictions of several views of one input, for supervised training.
///
/// `p_k = softmax(z_k/τ)`. The loss is the divergence of the K predictions of a sample, averaged
/// over samples. No pair is formed: each kind costs O(K·B·C). All views get a gradient; for a fixed
/// target, detach the logits of its view.
///
/// Logits of ±10⁴ have finite losses and gradients in f32 and f16. A class that all views mask
/// (logit −∞) adds nothing and gets no gradient. A class that some views mask has an infinite
/// symmetric KL divergence; it counts with `log p = −10³⁰`. NaN and other infinite logits give NaN.
///
/// Source: arXiv 2203.03304. It adds a divergence between the predictions of different
/// augmentations to the mean of their cross-entropies. The paper does not state the direction of
/// its KL divergence.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::contrib::{Divergence, PredictionConsistency};
/// let logits = Tensor::new(&[[[2f32, 0.]], [[0., 2.]]], &Device::Cpu)?; // K = 2 views, one sample, two classes
/// let value = |kind| PredictionConsistency { kind, ..Default::default() }.forward(&logits)?.to_scalar::<f32>();
/// // p = (σ(2), σ(−2)), and reversed
/// let p = 1. / (1. + (-2f32).exp());
/// assert!((value(Divergence::SymmetricKl)? - 2. * (2. * p - 1.)).abs() < 1e-6);
/// assert!((value(Divergence::Mse)? - (2. * p - 1.).powi(2)).abs() < 1e-6);
/// assert!(value(Divergence::JensenShannon)? < 2f32.ln());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PredictionConsistency {
    /// The divergence.
    pub kind: Divergence,
    /// Temperature `τ`, finite and above 0. The loss is not rescaled by `τ²`.
    pub temperature: f64,
}

impl Default for PredictionConsistency {
    /// Symmetric KL at temperature 1.
    fn default() -> Self {
        Self { kind: Divergence::default(), temperature: 1.0 }
    }
}

const OP: &str = "PredictionConsistency";

/// Replaces the logits and log-probabilities of masked classes: it is finite, and its exponential
/// is 0 in every type.
const FLOOR: f64 = -1e30;

impl PredictionConsistency {
    /// The mean divergence of logits `(K, B, C)`: K ≥ 2 views of B samples, C ≥ 2 classes.
    ///
    /// # Errors
    /// If the shape differs, the type is not a floating-point type, or the temperature is not
    /// finite and above 0.
    pub fn forward(&self, logits: &Tensor) -> Result<Tensor> {
        let (tau, dtype) = (self.temperature, check::work_dtype(OP, logits)?);
        check::positive("PredictionConsistency::temperature", tau)?;
        let views = match *logits.dims() {
            [k, b, c] if k >= 2 && b > 0 && c >= 2 => k as f64,
            _ => {
                let expected = "logits (K, B, C) of at least two views and two classes (for a single logit z take the pair (z, 0))";
                return Err(Error::input(OP, expected, format!("{:?}", logits.dims())));
            }
        };
        // The maximum passes no gradient where it is the floor.
        let z = logits.to_dtype(dtype)?.maximum(FLOOR)?;
        let (value, gradient) = self.evaluate(&z.detach(), views)?;
        // Zero, with the gradient; a product with z itself could overflow.
        let carrier = ((&z - z.detach())? * gradient)?.sum_all()?;
        Ok(with_gradient_of(&value, &carrier)?)
    }

    /// The value and its derivative with respect to the logits. This takes fewer passes than
    /// autograd.
    ///
    /// With `G_k = ∂L/∂l_k`, where `p_k = exp l_k`, the derivative is `(G_k − p_k Σ_c G_k)/τ`.
    fn evaluate(&self, z: &Tensor, views: f64) -> Result<(Tensor, Tensor)> {
        let (_, batch, classes) = z.dims3()?;
        let l = log_softmax(z, self.temperature)?;
        let p = l.exp()?;
        // View by view, because candle broadcasts slowly over the first axis.
        let split = |x: &Tensor| -> Result<Vec<Tensor>> { Ok(x.chunk(x.dim(0)?, 0)?) };
        let mean = |x: &[Tensor]| -> Result<Tensor> { Ok((sum(x)? / views)?) };
        let (ls, ps) = (split(&l)?, split(&p)?);
        let p_mean = mean(&ps)?;
        let mut values = Vec::with_capacity(ps.len());
        let mut slopes = Vec::with_capacity(ps.len());
        match self.kind {
            // (p_k − p_l)(l_k − l_l), summed over pairs, is K times the covariance.
            Divergence::SymmetricKl => {
                let l_mean = mean(&ls)?;
                for (p, l) in ps.iter().zip(&ls) {
                    let (dp, dl) = ((p - &p_mean)?, (l - &l_mean)?);
                    values.push((&dp * &dl)?.sum_all()?);
                    slopes.push(((p * dl)? + dp)?);
                }
            }
            Divergence::JensenShannon => {
                let mut top = l.narrow(0, 0, 1)?;
                for l in &ls {
                    top = top.maximum(l)?;
                }
                let shifted = ls.iter().map(|l| Ok((l - &top)?.exp()?));
                let mixture = (mean(&shifted.collect::<Result<Vec<_>>>()?)?.log()? + top)?;
                for (p, l) in ps.iter().zip(&ls) {
                    let term = (p * (l - &mixture)?)?;
                    values.push(term.sum_all()?);
                    slopes.push(term);
                }
            }
            Divergence::Mse => {
                for p in &ps {
                    let dp = (p - &p_mean)?;
                    values.push(dp.sqr()?.sum_all()?);
                    slopes.push((p * dp)?);
                }
            }
        }
        let (value, slope) = match self.kind {
            Divergence::SymmetricKl => (1.0 / (views - 1.0), 1.0 / (views - 1.0)),
            Divergence::JensenShannon => (1.0 / views, 1.0 / views),
            Divergence::Mse => {
                let each = classes as f64 * (views - 1.0);
                (2.0 / each, 4.0 / each)
            }
        };
        let mut gradients = Vec::with_capacity(ps.len());
        for (p, slope) in ps.iter().zip(&slopes) {
            gradients.push((slope - p.broadcast_mul(&slope.sum_keepdim(D::Minus1)?)?)?);
        }
        let gradient = Tensor::cat(&gradients, 0)?;
        let batch = batch as f64;
        Ok(((sum(&values)? * (value / batch))?, (gradient * (slope / (batch * self.temperature)))?))
    }

    /// [`forward`](Self::forward) for one tensor `(B, C)` per view.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if the views differ in shape, type or device.
    pub fn forward_views(&self, views: &[Tensor]) -> Result<Tensor> {
        let (first, others) = match views {
            [first, others @ ..] if !others.is_empty() => (first, others),
            _ => return Err(Error::input(OP, "at least two views", views.len())),
        };
        for other in others {
            check::pair(OP, first, other)?;
        }
        self.forward(&Tensor::stack(views, 0)?)
    }
}

/// `log softmax(z/τ)` over the last axis. `candle_nn::ops::log_softmax` of `z/τ` rounds large
/// logits before it subtracts their maximum.
fn log_softmax(z: &Tensor, tau: f64) -> Result<Tensor> {
    let top = z.max_keepdim(D::Minus1)?;
    let z = (z.broadcast_sub(&top)? / tau)?;
    let log_sum = z.exp()?.sum_keepdim(D::Minus1)?.log()?;
    // The division by a low temperature may lead below the floor.
    Ok(z.broadcast_sub(&log_sum)?.maximum(FLOOR)?)
}

/// An invariance score of predictions: the mean symmetric KL divergence over samples and pairs of
/// views.
///
/// `½ KL(p_k‖p_l) + ½ KL(p_l‖p_k)` for logits `(K, B, C)`, computed in f64 on the host. It is 0 if
/// all views have the same prediction. A model with one prediction for all images also has 0, so
/// report the score with the accuracy.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let one = Tensor::new(&[[[2f32, 0.]], [[2., 0.]]], &Device::Cpu)?;
/// assert_eq!(ser_reg::contrib::mean_pairwise_symmetric_kl(&one)?, 0.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`PredictionConsistency::forward`], and if a logit is not finite. A class may be −∞ in all
/// views.
pub fn mean_pairwise_symmetric_kl(logits: &Tensor) -> Result<f64> {
    check::work_dtype("mean_pairwise_symmetric_kl", logits)?;
    let logits = logits.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let value = PredictionConsistency::default().forward(&logits)?;
    let masked = logits.eq(f64::NEG_INFINITY)?.to_dtype(DType::F64)?.mean(0)?;
    let masked = masked.flatten_all()?.to_vec1::<f64>()?;
    let value = match masked.iter().any(|m| *m > 0.0 && *m < 1.0) {
        true => f64::INFINITY,
        false => value.to_scalar::<f64>()?,
    };
    if value.is_finite() {
        return Ok(value);
    }
    let op = "mean_pairwise_symmetric_kl";
    Err(Error::input(
        op,
        "finite logits (a class may be -inf in all views)",
        format!("a divergence of {value:?}"),
    ))
}
