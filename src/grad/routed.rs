//! Gradients of several losses, each restricted to its own variables.

use std::borrow::Borrow;

use candle_core::{Tensor, Var, backprop::GradStore};

use super::check_scalar;
use crate::{Error, Result};

/// The sum of the gradients of several losses, where each loss trains only the variables listed
/// with it.
///
/// `Σ_i ∂loss_i/∂θ` over the losses that list `θ`. This is a stop-gradient that needs no change of
/// the model. For example, a loss at one tapped layer can train only the blocks after the previous
/// tapped layer. The base loss, listed with all variables, still trains every block. A variable
/// that several blocks share gets the gradient of all its uses.
///
/// It costs one backward pass per loss with a variable. Pass the result to the `step` of an
/// optimizer.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad;
/// let (a, b) = (Var::new(3f32, &Device::Cpu)?, Var::new(5f32, &Device::Cpu)?);
/// let base = (a.as_tensor() * b.as_tensor())?;
/// let late = base.sqr()?; // reaches both, trains b only
/// let grads = grad::routed(&[(&base, &[&a, &b]), (&late, &[&b])])?;
/// let at = |v: &Var| grads.get(v).map(|g| g.to_scalar::<f32>()).transpose();
/// assert_eq!(at(&a)?, Some(5.)); // b
/// assert_eq!(at(&b)?, Some(3. + 2. * 15. * 3.)); // a + 2ab·a
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If a loss is not a single floating-point number, no loss has a variable, or a backward pass
/// fails.
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
            // A variable that is listed twice is counted once.
            let Some(grad) = grads.remove(var) else {
                continue;
            };
            // Some gradients of candle keep their graph alive; the store lives until the optimizer
            // step.
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
