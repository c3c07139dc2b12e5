//! Does the gradient of a loss arrive? Ask on step 0.
//!
//! candle-nn's `LayerNorm` (on contiguous input), `RmsNorm` and `softmax_last_dim` have no backward pass, and candle does
//! not say so: `backward()` succeeds, the variables before them stay as they are, the loss may even fall. SER's own
//! public code trained with a detached loss unnoticed. [`assert_reaches`] names every parameter a loss does not reach:
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

mod balance;

use std::{borrow::Borrow, sync::PoisonError};

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::VarMap;

use crate::{Error, Result};

pub use balance::{GradientBalance, GradientPair, LambdaBalancer, LambdaConfig};

/// The variables of `map` under `prefix`, sorted by name.
///
/// `prefix` is a path as in `VarBuilder::pp`: `"blocks.1"` covers `blocks.1.norm.weight` and not `blocks.10.norm.weight`.
/// An empty one covers the whole map.
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
    // A panic elsewhere while the map was locked cannot have broken a map of reference-counted variables.
    let data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut vars: Vec<_> = data
        .iter()
        .filter(|(name, _)| covers(prefix, name))
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    vars.sort_by(|(a, _), (b, _)| a.cmp(b));
    vars
}

/// Whether the path `prefix` leads to `name`, as [`named`] says.
pub(crate) fn covers(prefix: &str, name: &str) -> bool {
    let prefix = prefix.trim_end_matches('.');
    let rest = name.strip_prefix(prefix);
    rest.is_some_and(|r| prefix.is_empty() || r.is_empty() || r.starts_with('.'))
}

/// What the gradient of a loss does to one variable.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Reach {
    /// The variable's name.
    pub name: String,
    /// `‖∂loss/∂θ‖₂`, accumulated in f64; `None` if the loss does not depend on θ as far as candle knows.
    pub norm: Option<f64>,
}

impl Reach {
    /// Whether a gradient arrived: finite and not identically zero.
    pub fn arrived(&self) -> bool {
        self.norm.is_some_and(|n| n.is_finite() && n > 0.)
    }
}

/// Runs `loss.backward()` and measures what arrives at each of `vars`, in their order.
///
/// `vars` yields pairs of a name and a `Var`, such as [`named`] returns. (`Var::from_tensor` gives back the variable that
/// a tensor of a `VarBuilder` is.)
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad;
///
/// let (a, b) = (Var::new(&[3f32, 4.], &Device::Cpu)?, Var::new(&[1f32], &Device::Cpu)?);
/// let loss = (a.sqr()?.sum_all()? / 2.)?;
/// let reach = grad::reach(&loss, [("a", &a), ("b", &b)])?;
/// assert_eq!((reach[0].norm, reach[1].norm), (Some(5.), None));
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If `loss` is not a single floating-point number, if `vars` is empty, or if the backward pass of an operation fails.
pub fn reach<S: Into<String>, V: Borrow<Var>>(
    loss: &Tensor,
    vars: impl IntoIterator<Item = (S, V)>,
) -> Result<Vec<Reach>> {
    check_scalar("grad::reach", loss)?;
    let grads = loss.backward()?;
    let mut reached = Vec::new();
    for (name, var) in vars {
        let norm = grads.get(var.borrow()).map(norm).transpose()?;
        reached.push(Reach {
            name: name.into(),
            norm,
        });
    }
    // A check of nothing passes always: most likely a prefix that matches no name.
    if reached.is_empty() {
        return Err(Error::input("grad::reach", "at least one variable", "none"));
    }
    Ok(reached)
}

/// The names of those `vars` that the gradient of `loss` does not reach: absent, identically zero, or not finite.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad;
///
/// let (student, teacher) = (Var::new(1f32, &Device::Cpu)?, Var::new(2f32, &Device::Cpu)?);
/// let loss = (student.as_tensor() - teacher.detach())?.sqr()?;
/// assert_eq!(grad::unreached(&loss, [("student", &student), ("teacher", &teacher)])?, ["teacher"]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`reach`].
pub fn unreached<S: Into<String>, V: Borrow<Var>>(
    loss: &Tensor,
    vars: impl IntoIterator<Item = (S, V)>,
) -> Result<Vec<String>> {
    let reach = reach(loss, vars)?.into_iter();
    Ok(reach.filter(|r| !r.arrived()).map(|r| r.name).collect())
}

/// Fails, naming them, if the gradient of `loss` does not reach all of `vars`.
///
/// Hand in the regularization term alone, before it is weighted and added: in a sum, the gradient of the other terms
/// hides what is missing, and at `λ = 0` none arrives. A gradient that is zero by design (a layer behind a
/// zero-initialized one, an image without a valid token) counts as missing, so check on a batch and at a state where it is
/// not.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad;
///
/// let w = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let loss = w.sqr()?.mean_all()?;
/// grad::assert_reaches(&loss, [("w", &w)])?;
/// let error = grad::assert_reaches(&loss.detach(), [("w", &w)]).unwrap_err();
/// assert!(error.to_string().contains("no gradient at: w"));
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// [`Error::Unreached`] with the names, and otherwise as [`reach`].
pub fn assert_reaches<S: Into<String>, V: Borrow<Var>>(
    loss: &Tensor,
    vars: impl IntoIterator<Item = (S, V)>,
) -> Result<()> {
    let reach = reach(loss, vars)?;
    let total = reach.len();
    let (mut absent, mut zero, mut not_finite) = (Vec::new(), Vec::new(), Vec::new());
    for Reach { name, norm } in reach {
        match norm {
            None => absent.push(name),
            Some(0.) => zero.push(name),
            Some(n) if n.is_finite() => {}
            Some(_) => not_finite.push(name),
        }
    }
    if absent.is_empty() && zero.is_empty() && not_finite.is_empty() {
        return Ok(());
    }
    Err(Error::Unreached {
        absent,
        zero,
        not_finite,
        total,
    })
}

/// That a backward pass can start from this.
pub(crate) fn check_scalar(op: &'static str, loss: &Tensor) -> Result<()> {
    if loss.elem_count() == 1 && loss.dtype().is_float() {
        return Ok(());
    }
    Err(Error::input(
        op,
        "a scalar floating-point loss (take its mean_all or sum_all)",
        format!("{:?} of {:?}", loss.dims(), loss.dtype()),
    ))
}

/// In f64, so that neither a large f32 gradient overflows nor a small one vanishes when squared.
fn norm(grad: &Tensor) -> Result<f64> {
    let grad = grad.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(grad.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// One set of gradients out of several losses, each of which trains the variables named beside it and no others.
///
/// `Σ_i ∂loss_i/∂θ` over those losses that list `θ`. So a loss at one of several tapped layers can be kept from the blocks
/// before the tapped layer before it, whatever the model: its gradient is found as always, and what belongs to other
/// blocks is dropped. That is what a stop-gradient at that tap would give (a variable that a block shares with others gets
/// all that its users send), while the base loss, listed with all of its variables, still trains every block. The price
/// is one backward pass per loss.
///
/// The result goes to an optimizer's `step`. A loss listed with no variable costs nothing.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad;
/// let (a, b) = (Var::new(3f32, &Device::Cpu)?, Var::new(5f32, &Device::Cpu)?);
/// let base = (a.as_tensor() * b.as_tensor())?;
/// let late = base.sqr()?; // reaches both, may train b only
/// let grads = grad::routed(&[(&base, &[&a, &b]), (&late, &[&b])])?;
/// let at = |v: &Var| grads.get(v).map(|g| g.to_scalar::<f32>()).transpose();
/// assert_eq!(at(&a)?, Some(5.)); // b
/// assert_eq!(at(&b)?, Some(3. + 2. * 15. * 3.)); // a + 2ab·a
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If there is no loss, one is not a single floating-point number, none has a variable, or the backward pass of an
/// operation fails.
pub fn routed<V: Borrow<Var>>(losses: &[(&Tensor, &[V])]) -> Result<GradStore> {
    let mut sum = GradStore::default();
    let mut any = false;
    for (loss, vars) in losses {
        check_scalar("grad::routed", loss)?;
        if vars.is_empty() {
            continue;
        }
        any = true;
        let mut grads = loss.backward()?;
        for var in vars.iter().map(Borrow::borrow) {
            // A variable that is listed twice is found once.
            let Some(grad) = grads.remove(var) else {
                continue;
            };
            // Kept for the step, and some gradients of candle hold the graph they came from.
            let grad = match sum.get(var) {
                Some(before) => (before + grad)?.detach(),
                None => grad.detach(),
            };
            sum.insert(var, grad);
        }
    }
    if any {
        return Ok(sum);
    }
    Err(Error::input(
        "grad::routed",
        "at least one loss with a variable that it may train",
        format!("{} losses, none with a variable", losses.len()),
    ))
}
