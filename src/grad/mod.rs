//! Checks on gradients: the parameters that a loss reaches, and the balance of two losses.
//!
//! candle-nn's `LayerNorm` (on contiguous input), `RmsNorm` and `softmax_last_dim` have no backward
//! pass. candle reports no error: `backward()` succeeds, and the parameters before such a layer
//! never change. The loss may still fall. SER's published code trained with a detached loss.
//! [`assert_reaches`] on the first step names every parameter that a loss fails to reach:
//!
//! ```
//! use candle_core::{D, DType, Device, Module, Tensor};
//! use candle_nn::{VarBuilder, VarMap, linear, ops};
//! use ser_reg::grad;
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let layer = linear(4, 4, vb.pp("query"))?;
//! let y = layer.forward(&Tensor::ones((2, 4), DType::F32, &Device::Cpu)?)?;
//!
//! let cut = ops::softmax_last_dim(&y)?.sqr()?.mean_all()?;
//! assert_eq!(grad::unreached(&cut, grad::named(&vars, ""))?, ["query.bias", "query.weight"]);
//!
//! let whole = ops::softmax(&y, D::Minus1)?.sqr()?.mean_all()?;
//! grad::assert_reaches(&whole, grad::named(&vars, ""))?;
//! # Ok::<(), ser_reg::Error>(())
//! ```
//!
//! A NaN or an infinity in a map makes the loss NaN, and with it every gradient that the loss reaches: [`unreached`] and
//! [`assert_reaches`] then name these parameters as "not finite". [`GradientBalance`] reports norms that are NaN or
//! infinite, and [`LambdaBalancer`] keeps its weight at such a step. Nothing is replaced by a finite number.

mod balance;
mod lambda;
mod moments;
mod reach;
mod routed;

use std::sync::PoisonError;

use candle_core::{Tensor, Var};
use candle_nn::VarMap;

use crate::{Error, Result};

pub use balance::GradientBalance;
pub use lambda::{LambdaBalancer, LambdaConfig};
pub use moments::GradientPair;
pub use reach::{Reach, assert_reaches, reach, unreached};
pub use routed::routed;

/// The names of the buffers that `candle_nn::BatchNorm` registers as variables.
const BUFFERS: [&str; 2] = ["running_mean", "running_var"];

/// The parameters of `map` under `prefix`, sorted by name.
///
/// `prefix` is a path as in `VarBuilder::pp`: `"blocks.1"` covers `blocks.1.norm.weight`, but not
/// `blocks.10.norm.weight`. An empty prefix covers the whole map.
///
/// Variables named `running_mean` or `running_var` are left out. `candle_nn::BatchNorm` registers
/// these buffers beside its parameters, but no gradient reaches them.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
/// use ser_reg::grad;
///
/// let map = VarMap::new();
/// for name in ["b.1.w", "b.10.w", "a.w"] {
///     map.get(3, name, Init::Const(0.), DType::F32, &Device::Cpu)?;
/// }
/// let names = |prefix| grad::named(&map, prefix).into_iter().map(|(n, _)| n).collect::<Vec<_>>();
/// assert_eq!(names("b.1"), ["b.1.w"]);
/// assert_eq!(names(""), ["a.w", "b.1.w", "b.10.w"]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn named(map: &VarMap, prefix: &str) -> Vec<(String, Var)> {
    // A panic in another thread leaves a map of reference-counted variables intact.
    let data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut vars: Vec<_> = data
        .iter()
        .filter(|(name, _)| covers(prefix, name) && !is_buffer(name))
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    vars.sort_by(|(a, _), (b, _)| a.cmp(b));
    vars
}

/// Whether the last part of a name is a buffer of batch normalization.
fn is_buffer(name: &str) -> bool {
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    BUFFERS.contains(&last)
}

/// Whether `name` lies under the path `prefix`, as in [`named`].
fn covers(prefix: &str, name: &str) -> bool {
    let prefix = prefix.trim_end_matches('.');
    let rest = name.strip_prefix(prefix);
    rest.is_some_and(|r| prefix.is_empty() || r.is_empty() || r.starts_with('.'))
}

/// A backward pass can start from `loss`.
fn check_scalar(op: &'static str, loss: &Tensor) -> Result<()> {
    if loss.elem_count() == 1 && loss.dtype().is_float() {
        return Ok(());
    }
    Err(Error::input(
        op,
        "a scalar floating-point loss (call mean_all or sum_all)",
        format!("{:?} of {:?}", loss.dims(), loss.dtype()),
    ))
}
