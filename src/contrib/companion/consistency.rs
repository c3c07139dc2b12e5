//! Do predictions agree over views of one input?

use candle_core::{D, DType, Device, Tensor};

use super::{check_pair, sum, work_dtype};
use crate::{Error, Result};

/// How far apart the predictions `p_1 … p_K` of one sample are; `l_k = log p_k`, bars are means over views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// A penalty on predictions that differ over the views of one input, for supervised training.
///
/// `p_k = softmax(z_k/τ)`; the divergence of each sample's K predictions, averaged over samples. No pair is formed: all
/// three kinds cost O(K·B·C). The gradient reaches all views; hand in `detach`ed logits for a view that is a fixed target.
/// It is finite for logits as far apart as ±10⁴ in f32 and f16 (the maximum is taken out; zero probabilities have finite
/// logarithms). A class that all views mask (logits of −∞) adds nothing and gets no gradient. One that only some of them
/// mask is infinitely far off under symmetric KL: it counts with `log p = −10³⁰`. Other infinite logits, and NaN, give NaN.
///
/// Source: arXiv 2203.03304, which adds a divergence between predictions of different augmentations to the mean of
/// their cross-entropies (the direction of its KL is not known to us).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::contrib::companion::{Divergence, PredictionConsistency};
/// let logits = Tensor::new(&[[[2f32, 0.]], [[0., 2.]]], &Device::Cpu)?; // K = 2 views, one sample, two classes
/// let value = |kind| PredictionConsistency { kind, ..Default::default() }.forward(&logits)?.to_scalar::<f32>();
/// // p = (σ(2), σ(−2)) and its reverse
/// let p = 1. / (1. + (-2f32).exp());
/// assert!((value(Divergence::SymmetricKl)? - 2. * (2. * p - 1.)).abs() < 1e-6);
/// assert!((value(Divergence::Mse)? - (2. * p - 1.).powi(2)).abs() < 1e-6);
/// assert!(value(Divergence::JensenShannon)? < 2f32.ln());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictionConsistency {
    /// The divergence.
    pub kind: Divergence,
    /// `τ > 0`; larger ones compare softer predictions. The loss is not rescaled by `τ²`.
    pub temperature: f64,
}

impl Default for PredictionConsistency {
    /// Symmetric KL at temperature 1.
    fn default() -> Self {
        Self {
            kind: Divergence::default(),
            temperature: 1.0,
        }
    }
}

const OP: &str = "PredictionConsistency";

/// In place of the logits and logarithms of what is masked: finite, and its exponential is 0 in every type.
const FLOOR: f64 = -1e30;

impl PredictionConsistency {
    /// The mean divergence of logits `(K, B, C)`: K ≥ 2 views of B samples, C ≥ 2 classes.
    ///
    /// # Errors
    /// If the shape is another, the type no floating point type, or the temperature not finite and above 0.
    pub fn forward(&self, logits: &Tensor) -> Result<Tensor> {
        let (tau, dtype) = (self.temperature, work_dtype(OP, logits)?);
        if !(tau.is_finite() && tau > 0.0) {
            let field = "PredictionConsistency::temperature";
            return Err(Error::config(field, "a finite value above 0", tau));
        }
        let views = match *logits.dims() {
            [k, b, c] if k >= 2 && b > 0 && c >= 2 => k as f64,
            _ => {
                let expected = "logits (K, B, C) of at least two views and two classes (a single logit z is the pair (z, 0))";
                return Err(Error::input(OP, expected, format!("{:?}", logits.dims())));
            }
        };
        // Where it is the floor that counts, no gradient passes.
        let z = logits.to_dtype(dtype)?.maximum(FLOOR)?;
        let (value, gradient) = self.evaluate(&z.detach(), views)?;
        // A term of value 0 carries the gradient.
        Ok((value + ((&z - z.detach())? * gradient)?.sum_all()?)?)
    }

    /// The value and its derivative with respect to the logits: fewer passes than a graph of them would take.
    ///
    /// With `G_k = ∂L/∂l_k`, where `p_k = exp l_k`, the derivative is `(G_k − p_k Σ_c G_k)/τ`.
    fn evaluate(&self, z: &Tensor, views: f64) -> Result<(Tensor, Tensor)> {
        let (_, batch, classes) = z.dims3()?;
        let l = log_softmax(z, self.temperature)?;
        let p = l.exp()?;
        // View by view: candle is slow where it has to broadcast over the first axis.
        let split = |x: &Tensor| -> Result<Vec<Tensor>> { Ok(x.chunk(x.dim(0)?, 0)?) };
        let mean = |x: &[Tensor]| -> Result<Tensor> { Ok((sum(OP, x)? / views)?) };
        let (ls, ps) = (split(&l)?, split(&p)?);
        let p_mean = mean(&ps)?;
        let mut values = Vec::with_capacity(ps.len());
        let mut slopes = Vec::with_capacity(ps.len());
        match self.kind {
            // The pairs' (p_k − p_l)(l_k − l_l) sum to K times the covariance.
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
        Ok((
            (sum(OP, &values)? * (value / batch))?,
            (gradient * (slope / (batch * self.temperature)))?,
        ))
    }

    /// The same for one tensor `(B, C)` per view.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); if the views differ in shape, type or device.
    pub fn forward_views(&self, views: &[Tensor]) -> Result<Tensor> {
        let (first, others) = match views {
            [first, others @ ..] if !others.is_empty() => (first, others),
            _ => return Err(Error::input(OP, "at least two views", views.len())),
        };
        for other in others {
            check_pair(OP, first, other)?;
        }
        self.forward(&Tensor::stack(views, 0)?)
    }
}

/// `log softmax(z/τ)` over the last axis.
fn log_softmax(z: &Tensor, tau: f64) -> Result<Tensor> {
    let top = z.max_keepdim(D::Minus1)?;
    let z = (z.broadcast_sub(&top)? / tau)?;
    let log_sum = z.exp()?.sum_keepdim(D::Minus1)?.log()?;
    // Once more: a low temperature may have led below it.
    Ok(z.broadcast_sub(&log_sum)?.maximum(FLOOR)?)
}

/// How invariant are predictions? The mean over samples and pairs of views of the symmetric KL divergence
/// `½ KL(p_k‖p_l) + ½ KL(p_l‖p_k)`, for logits `(K, B, C)`; in f64 on the host.
///
/// 0 if all views give one prediction. A model that gives one prediction for all images has 0 as well: report it beside
/// accuracy.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let one = Tensor::new(&[[[2f32, 0.]], [[2., 0.]]], &Device::Cpu)?;
/// assert_eq!(ser_reg::contrib::companion::mean_pairwise_symmetric_kl(&one)?, 0.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`PredictionConsistency::forward`]; if a logit is not finite, unless all views mask a class by −∞.
pub fn mean_pairwise_symmetric_kl(logits: &Tensor) -> Result<f64> {
    work_dtype("mean_pairwise_symmetric_kl", logits)?;
    let logits = logits
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?;
    let value = PredictionConsistency::default().forward(&logits)?;
    let masked = logits
        .eq(f64::NEG_INFINITY)?
        .to_dtype(DType::F64)?
        .mean(0)?;
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
        format!("a divergence of {value}"),
    ))
}
