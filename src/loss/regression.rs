//! Distances between corresponding tokens: the objectives without negatives.

use candle_core::{D, Device, Tensor};

use super::{check_pair, shares, work_dtype};
use crate::{Error, Result, check};

/// Mean of `per_token` over `a` and `b`, (…, D) each, with one weight per token.
fn over_tokens(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    weights: Option<&[f32]>,
    per_token: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if a.rank() == 0 {
        return Err(Error::input(op, "tokens (…, D)", "a scalar"));
    }
    check_pair(op, a, b)?;
    let dtype = work_dtype(op, a)?;
    let width = a.dims()[a.rank() - 1];
    let shares = shares(op, weights, a.elem_count() / width)?;
    // A token of weight 0 is left out and not multiplied by 0, which a NaN survives.
    let kept: Vec<u32> = (0..shares.len() as u32).filter(|&t| shares[t as usize] > 0.0).collect();
    let counted = |x: &Tensor| -> Result<Tensor> {
        let x = x.reshape(((), width))?.to_dtype(dtype)?;
        match kept.len() == shares.len() {
            true => Ok(x),
            false => Ok(x.index_select(&Tensor::new(kept.as_slice(), x.device())?, 0)?),
        }
    };
    let each = per_token(&counted(a)?, &counted(b)?)?;
    // Cast on the host: not every device knows f64.
    let shares: Vec<f64> = kept.iter().map(|&t| shares[t as usize]).collect();
    let shares = Tensor::from_vec(shares, each.shape(), &Device::Cpu)?;
    let shares = shares.to_dtype(dtype)?.to_device(a.device())?;
    Ok((each * shares)?.sum_all()?)
}

/// `x / √(|x|² + eps)` along the channels; differentiable, also at 0.
fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(x.broadcast_div(&norm)?)
}

/// Mean squared error over all elements of `a` and `b`, (…, D) each.
///
/// ```text
/// L = Σ_t w_t · (1/D) Σ_c (a_tc − b_tc)² / Σ_t w_t
/// ```
///
/// `weights` are one per token (the product of the leading dimensions), `None` for the plain mean. Differentiable with
/// respect to both.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let a = Tensor::new(&[[0f32, 2.], [1., 1.]], &Device::Cpu)?;
/// let b = Tensor::new(&[[0f32, 0.], [1., 1.]], &Device::Cpu)?;
/// assert_eq!(ser_reg::loss::mse(&a, &b, None)?.to_scalar::<f32>()?, 1.0);
/// assert_eq!(ser_reg::loss::mse(&a, &b, Some(&[0., 1.]))?.to_scalar::<f32>()?, 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If shapes, types or devices differ, a tensor is empty or not of a floating point type, or the weights do not fit.
pub fn mse(a: &Tensor, b: &Tensor, weights: Option<&[f32]>) -> Result<Tensor> {
    over_tokens("mse", a, b, weights, |a, b| Ok((a - b)?.sqr()?.mean(D::Minus1)?))
}

/// Mean over tokens of `|â − b̂|² = 2 − 2cos(a, b)`, with `x̂ = x/√(|x|² + eps)`.
///
/// Shapes, weights and errors as [`mse`]; also an error if `eps` is negative or not finite. Finite at zero tokens for
/// `eps > 0`.
///
/// # Errors
/// See above.
pub fn normalized_mse(a: &Tensor, b: &Tensor, eps: f64, weights: Option<&[f32]>) -> Result<Tensor> {
    check::not_negative("eps", eps)?;
    over_tokens("normalized_mse", a, b, weights, |a, b| {
        Ok((unit(a, eps)? - unit(b, eps)?)?.sqr()?.sum(D::Minus1)?)
    })
}

/// Mean over tokens of `1 − cos(a, b)`, with `cos(a, b) = ⟨a, b⟩ / (√(|a|² + eps) √(|b|² + eps))`.
///
/// Shapes, weights and errors as [`mse`]; also an error if `eps` is negative or not finite. Finite at zero tokens for
/// `eps > 0`: a zero token counts as orthogonal to everything.
///
/// # Errors
/// See above.
pub fn cosine(a: &Tensor, b: &Tensor, eps: f64, weights: Option<&[f32]>) -> Result<Tensor> {
    check::not_negative("eps", eps)?;
    over_tokens("cosine", a, b, weights, |a, b| {
        let cos = (unit(a, eps)? * unit(b, eps)?)?.sum(D::Minus1)?;
        Ok((1.0 - cos)?)
    })
}

/// `|d|` with the derivative 0 at 0 (candle's `abs` has 1 there, which would push equal tokens apart).
fn abs(d: &Tensor) -> Result<Tensor> {
    Ok((d * d.sign()?.detach())?)
}

/// Mean absolute error over all elements; the derivative at equal elements is 0.
///
/// Shapes, weights and errors as [`mse`].
///
/// # Errors
/// See above.
pub fn l1(a: &Tensor, b: &Tensor, weights: Option<&[f32]>) -> Result<Tensor> {
    over_tokens("l1", a, b, weights, |a, b| Ok(abs(&(a - b)?)?.mean(D::Minus1)?))
}

/// Mean over all elements of `d²/(2β)` where `|d| < β`, else `|d| − β/2`, with `d = a − b` (Huber's loss over β).
///
/// Shapes, weights and errors as [`mse`]; also an error if `beta` is not finite and above 0.
///
/// # Errors
/// See above.
pub fn smooth_l1(a: &Tensor, b: &Tensor, beta: f64, weights: Option<&[f32]>) -> Result<Tensor> {
    check::positive("beta", beta)?;
    over_tokens("smooth_l1", a, b, weights, |a, b| {
        let d = abs(&(a - b)?)?;
        // q is the part of |d| inside the parabola: q²/(2β) + (|d| − q) is either branch.
        let q = d.minimum(beta)?;
        let each = ((q.sqr()? / (2.0 * beta))? + (d - q)?)?;
        Ok(each.mean(D::Minus1)?)
    })
}
