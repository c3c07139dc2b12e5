//! Token objectives: pure functions from aligned tokens to a scalar loss.
//!
//! | function | value | reads |
//! |---|---|---|
//! | [`nt_xent`], [`nt_xent_ragged`] | contrast of each token with the tokens of a batch | cosines |
//! | [`info_nce`] | the same for any anchors, positives and candidates | cosines |
//! | [`cosine`], [`normalized_mse`] | mean of `1 − cos`, of `2 − 2cos` | cosines |
//! | [`mse`], [`l1`], [`smooth_l1`] | mean over all elements | values |
//!
//! Rows of `a` and `b` correspond: whoever calls has carried both into one frame. Half-precision tokens are worked on in
//! f32 and give an f32 loss, f64 stays f64; gradients come back in the type of the tokens. A zero token has a finite loss
//! and a finite gradient. A NaN or an infinity makes the loss NaN or infinite, and the gradients too: it is never replaced
//! by another value. A token of weight 0 takes no part, whatever it holds. No function reduces over processes: tokens gathered elsewhere go in as plain tensors.

mod contrast;
mod contrastive;
mod info_nce;
mod nt_xent;
mod regression;

pub use contrastive::{Contrastive, ContrastiveOutput, Negatives, SameImage};
pub use info_nce::{TokenSet, info_nce};
#[doc(hidden)]
pub use nt_xent::nt_xent_portable;
pub(crate) use nt_xent::pairs;
pub use nt_xent::{nt_xent, nt_xent_ragged, nt_xent_symmetric};
pub use regression::{cosine, l1, mse, normalized_mse, smooth_l1};

use candle_core::{DType, Tensor};

use crate::{Error, Result, check};

/// The type a loss is computed in: f64 for f64, f32 for the other floating point types.
pub(crate) fn work_dtype(op: &'static str, x: &Tensor) -> Result<DType> {
    match x.dtype() {
        DType::F16 | DType::BF16 | DType::F32 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        other => Err(Error::input(op, "tokens of type f16, bf16, f32 or f64", other.as_str())),
    }
}

/// That `b` can be compared with `a`: same type, same device.
fn check_peer(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dtype() != b.dtype() {
        let (a, b) = (a.dtype().as_str(), b.dtype().as_str());
        return Err(Error::input(op, format!("tokens of one type, {a} here"), b));
    }
    if !a.device().same_device(b.device()) {
        let (a, b) = (a.device().location(), b.device().location());
        return Err(Error::input(
            op,
            format!("tokens on one device, {a:?} here"),
            format!("{b:?}"),
        ));
    }
    Ok(())
}

/// That `a` and `b` are rows of tokens that correspond: same shape, type and device, at least one element.
pub(crate) fn check_pair(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dims() != b.dims() {
        return Err(Error::input(
            op,
            format!("two token sets of one shape, {:?} here", a.dims()),
            format!("{:?}", b.dims()),
        ));
    }
    if a.elem_count() == 0 {
        return Err(Error::input(
            op,
            "at least one token of at least one channel",
            format!("{:?}", a.dims()),
        ));
    }
    check_peer(op, a, b)
}

/// Weights as shares of one: finite, none negative, one positive at least; `None` is one each.
fn shares(op: &'static str, weights: Option<&[f32]>, tokens: usize) -> Result<Vec<f64>> {
    let Some(weights) = weights else {
        return Ok(vec![1.0 / tokens as f64; tokens]);
    };
    check::weights(op, weights, tokens, "token")?;
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    if total == 0.0 {
        return Err(Error::input(op, "at least one weight above 0", "all 0"));
    }
    Ok(weights.iter().map(|&w| f64::from(w) / total).collect())
}
