//! The balance of the gradients of two losses.

use std::{borrow::Borrow, collections::HashSet, fmt};

use candle_core::{DType, Device, Tensor, TensorId, Var, backprop::GradStore};

use super::{
    check_scalar, covers,
    moments::{GradientPair, Moments},
};
use crate::{Error, Result};

/// The balance of the base loss `L_inv` and a regularizer `L_equiv`: norm ratio and cosine of their
/// gradients.
///
/// Pass `out.unweighted` of [`SerOutput`](crate::SerOutput) or of an add-on as `L_equiv`. A
/// measurement costs two backward passes and copies every gradient to the host, so measure on the
/// first step and about every hundred steps. `Display` prints a table.
///
/// A gradient with a NaN or an infinity makes the norms of its rows NaN or infinite. Then
/// [`suggested_lambda`](Self::suggested_lambda) is `None`, and a
/// [`LambdaBalancer`](super::LambdaBalancer) keeps its `λ`.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad::GradientBalance;
/// let (w, head) = (Var::new(&[3f32, 4.], &Device::Cpu)?, Var::new(2f32, &Device::Cpu)?);
/// let inv = (w.sqr()?.sum_all()? * 0.5)?.mul(&head)?; // ∇_w = (6, 8)
/// let equiv = w.sum_all()?; // ∇_w = (1, 1), nothing at the head
/// let vars = [("trunk.w", &w), ("head", &head)];
/// let balance = GradientBalance::of_losses(&inv, &equiv, vars, &["trunk", "head"])?;
/// let trunk = &balance.groups[0];
/// assert_eq!(trunk.norm_inv, 10.);
/// assert!((trunk.cosine - 14. / (10. * 2f64.sqrt())).abs() < 1e-12);
/// assert_eq!(balance.groups[1].ratio(), 0.);
/// // λ‖∇L_equiv‖ is a tenth of ‖∇L_inv‖ on the shared parameters
/// let lambda = balance.suggested_lambda(0.1)?.unwrap_or(1.);
/// assert!((lambda * 2f64.sqrt() - 1.).abs() < 1e-12);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientBalance {
    /// One pair for each prefix, in the order of the prefixes.
    pub groups: Vec<GradientPair>,
    /// The parameters that both losses reach, usually those before the tapped layer.
    pub shared: GradientPair,
    /// All parameters.
    pub overall: GradientPair,
}

const OP: &str = "GradientBalance";

impl GradientBalance {
    /// Runs both backward passes and compares the gradients on `vars`, by `prefixes`.
    ///
    /// `vars` are pairs of a name and a variable, as [`named`](super::named) returns them. A prefix
    /// is a path as there: `"blocks.1"` covers `blocks.1.norm.weight`, but not
    /// `blocks.10.norm.weight`. A variable under no prefix counts in `shared` and `overall` only. A
    /// variable under several names (tied weights) counts once in each row.
    ///
    /// # Errors
    /// If a loss is not a single floating-point number, a backward pass fails, `vars` is empty, or
    /// a prefix covers no variable.
    pub fn of_losses<S: AsRef<str>, V: Borrow<Var>>(
        inv: &Tensor,
        equiv: &Tensor,
        vars: impl IntoIterator<Item = (S, V)>,
        prefixes: &[&str],
    ) -> Result<Self> {
        for loss in [inv, equiv] {
            check_scalar(OP, loss)?;
        }
        Self::of_grads(&inv.backward()?, &equiv.backward()?, vars, prefixes)
    }

    /// Compares the gradients of two earlier backward passes, as [`of_losses`](Self::of_losses)
    /// does.
    ///
    /// # Errors
    /// If `vars` is empty, or a prefix covers no variable.
    pub fn of_grads<S: AsRef<str>, V: Borrow<Var>>(
        inv: &GradStore,
        equiv: &GradStore,
        vars: impl IntoIterator<Item = (S, V)>,
        prefixes: &[&str],
    ) -> Result<Self> {
        let mut groups: Vec<Option<Moments>> = vec![None; prefixes.len()];
        let mut counted: Vec<HashSet<TensorId>> = vec![HashSet::new(); prefixes.len()];
        let mut seen = HashSet::new();
        let (mut shared, mut overall) = (Moments::default(), None);
        for (name, var) in vars {
            let var: &Var = var.borrow();
            let id = var.as_tensor().id();
            let values = |grads: &GradStore| grads.get(var).map(values).transpose();
            let moments = Moments::of(values(inv)?.as_deref(), values(equiv)?.as_deref());
            for ((group, counted), prefix) in groups.iter_mut().zip(&mut counted).zip(prefixes) {
                if covers(prefix, name.as_ref()) && counted.insert(id) {
                    *group = Some(group.unwrap_or_default().and(moments));
                }
            }
            if !seen.insert(id) {
                continue;
            }
            if moments.shared() {
                shared = shared.and(moments);
            }
            overall = Some(overall.unwrap_or_else(Moments::default).and(moments));
        }
        let Some(overall) = overall else {
            return Err(Error::input(OP, "at least one variable", "none"));
        };
        let mut named = Vec::with_capacity(prefixes.len());
        for (group, prefix) in groups.into_iter().zip(prefixes) {
            match group {
                Some(moments) => named.push(moments.pair(prefix)),
                None => {
                    let expected = "prefixes that cover at least one variable each";
                    return Err(Error::input(
                        OP,
                        expected,
                        format!("{prefix:?}, which covers none"),
                    ));
                }
            }
        }
        Ok(Self { groups: named, shared: shared.pair("shared"), overall: overall.pair("overall") })
    }

    /// The `λ` with `‖λ∇L_equiv‖ = target_ratio · ‖∇L_inv‖` on the shared parameters.
    ///
    /// `None` if their ratio is not finite and positive: no parameter is shared, or a gradient is
    /// not finite.
    ///
    /// # Errors
    /// If the target is not finite and above 0.
    pub fn suggested_lambda(&self, target_ratio: f64) -> Result<Option<f64>> {
        check_positive("target_ratio", target_ratio)?;
        let lambda = target_ratio / self.shared.ratio();
        Ok((lambda.is_finite() && lambda > 0.0).then_some(lambda))
    }
}

impl fmt::Display for GradientBalance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = || self.groups.iter().chain([&self.shared, &self.overall]);
        let width = all().map(|p| p.name.chars().count()).max().unwrap_or(0);
        write!(
            f,
            "{:width$}  {:>10}  {:>10}  {:>10}  {:>7}",
            "", "|∇L_inv|", "|∇L_equiv|", "ratio", "cosine"
        )?;
        for p in all() {
            write!(
                f,
                "\n{:width$}  {:>10.3e}  {:>10.3e}  {:>10.3e}  {:>7.3}",
                p.name,
                p.norm_inv,
                p.norm_equiv,
                p.ratio(),
                p.cosine
            )?;
        }
        Ok(())
    }
}

pub(super) fn check_positive(field: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(field, "a finite value above 0", value))
}

/// The gradient on the host.
fn values(grad: &Tensor) -> Result<Vec<f64>> {
    let grad = grad.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(grad.flatten_all()?.to_vec1()?)
}
