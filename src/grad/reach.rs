//! The parameters that the gradient of a loss reaches.

use std::borrow::Borrow;

use candle_core::{DType, Device, Tensor, Var};

use super::check_scalar;
use crate::{Error, Result};

/// The gradient of a loss at one parameter.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Reach {
    /// The name of the parameter.
    pub name: String,
    /// `‖∂loss/∂θ‖₂`, accumulated in f64. `None` if the graph of the loss does not contain θ.
    pub norm: Option<f64>,
    /// The thirds of the rows of a weight, 0 to 2, whose gradient is exactly zero while another third has one. A fused
    /// `qkv` layer in front of a cut softmax looks so: queries and keys get nothing.
    pub zero_thirds: Vec<usize>,
}

impl Reach {
    /// Whether the gradient is finite and not identically zero, in all thirds of a fused weight.
    pub fn arrived(&self) -> bool {
        self.norm.is_some_and(|n| n.is_finite() && n > 0.) && self.zero_thirds.is_empty()
    }
}

/// Runs `loss.backward()` and measures the gradient at each of `vars`, in their order.
///
/// `vars` yields pairs of a name and a `Var`, as [`named`](super::named) returns them.
/// `Var::from_tensor` turns a tensor of a `VarBuilder` back into its variable.
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
/// If `loss` is not a single floating-point number, `vars` is empty, or a backward pass fails.
pub fn reach<S: Into<String>, V: Borrow<Var>>(
    loss: &Tensor,
    vars: impl IntoIterator<Item = (S, V)>,
) -> Result<Vec<Reach>> {
    check_scalar("grad::reach", loss)?;
    let grads = loss.backward()?;
    let mut reached = Vec::new();
    for (name, var) in vars {
        let grad = grads.get(var.borrow());
        let norm = grad.map(norm).transpose()?;
        let zero_thirds = grad.map(zero_thirds).transpose()?.unwrap_or_default();
        reached.push(Reach { name: name.into(), norm, zero_thirds });
    }
    // A check of no variable always passes. The likely cause is a prefix that matches no name.
    if reached.is_empty() {
        let expected =
            "at least one variable (grad::named takes whole parts of a path, as VarBuilder::pp)";
        return Err(Error::input("grad::reach", expected, "none"));
    }
    Ok(reached)
}

/// The names of those `vars` whose gradient is absent, identically zero, or not finite.
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

/// Fails with the names of the parameters that the gradient of `loss` does not reach.
///
/// Pass `out.unweighted` of [`SerOutput`](crate::SerOutput) or of an add-on. In the sum with the
/// base loss, the gradient of the base loss hides the missing one. `out.loss` has no gradient at `λ
/// = 0`.
///
/// A gradient that is zero by design counts as missing, for example before a layer whose weights
/// start at zero. So check with weights and a batch where the gradient is not zero.
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
    for Reach { name, norm, zero_thirds } in reach {
        match norm {
            None => absent.push(name),
            Some(0.) => zero.push(name),
            Some(n) if n.is_finite() && !zero_thirds.is_empty() => {
                let thirds = zero_thirds.iter().map(|t| ["first", "second", "last"][*t]);
                let thirds: Vec<_> = thirds.collect();
                zero.push(format!("{name} ({} third of its rows)", thirds.join(" and ")));
            }
            Some(n) if n.is_finite() => {}
            Some(_) => not_finite.push(name),
        }
    }
    if absent.is_empty() && zero.is_empty() && not_finite.is_empty() {
        return Ok(());
    }
    Err(Error::Unreached { absent, zero, not_finite, total })
}

/// The thirds of the rows of a weight whose gradient is exactly zero, if another third has a gradient.
fn zero_thirds(grad: &Tensor) -> Result<Vec<usize>> {
    // A third of fewer rows could be zero by chance, behind a ReLU for example.
    const ROWS: usize = 4;
    let rows = grad.dims().first().copied().unwrap_or(0);
    if grad.rank() < 2 || !rows.is_multiple_of(3) || rows < 3 * ROWS {
        return Ok(Vec::new());
    }
    let mut zero = Vec::new();
    for third in 0..3 {
        if norm(&grad.narrow(0, third * rows / 3, rows / 3)?)? == 0.0 {
            zero.push(third);
        }
    }
    Ok(if zero.len() == 3 { Vec::new() } else { zero })
}

/// In f64, where the square of an f32 gradient neither overflows nor underflows.
fn norm(grad: &Tensor) -> Result<f64> {
    let grad = grad.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(grad.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}
