//! How the gradients of two losses compare, and the weight that balances them.

use std::{borrow::Borrow, collections::HashSet, fmt};

use candle_core::{DType, Device, Tensor, TensorId, Var, backprop::GradStore};

use crate::{
    Error, Result,
    grad::{check_scalar, covers},
};

/// The gradients of two losses on some parameters. Computed in f64 from scaled values: squares of large gradients do not
/// overflow, and those of small ones do not vanish.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientPair {
    /// The prefix of the parameters' names.
    pub name: String,
    /// `‖∇L_inv‖`; 0 if the loss reaches none of them, NaN or infinite if a value is.
    pub norm_inv: f64,
    /// `‖∇L_equiv‖`.
    pub norm_equiv: f64,
    /// The cosine between the two: above 0 they agree, below 0 they pull apart. NaN if a norm is zero or not finite.
    pub cosine: f64,
}

impl GradientPair {
    /// `‖∇L_equiv‖ / ‖∇L_inv‖`: infinite if the latter is zero, NaN if both are.
    pub fn ratio(&self) -> f64 {
        self.norm_equiv / self.norm_inv
    }
}

/// Norm ratio and cosine of `∇L_inv` and `∇L_equiv`, by layer and as a whole.
///
/// `L_equiv` is the loss before it is weighted. Measure on step 0 and every hundred steps or so: two backward passes, and every
/// gradient comes to the host. `Display` prints a table.
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
/// // λ‖∇L_equiv‖ is a tenth of ‖∇L_inv‖ where both arrive
/// let lambda = balance.suggested_lambda(0.1)?.unwrap_or(1.);
/// assert!((lambda * 2f64.sqrt() - 1.).abs() < 1e-12);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientBalance {
    /// One for each prefix, in their order.
    pub groups: Vec<GradientPair>,
    /// Over the parameters that both losses reach: those before the tapped layer, as a rule.
    pub shared: GradientPair,
    /// Over all parameters.
    pub overall: GradientPair,
}

const OP: &str = "GradientBalance";

impl GradientBalance {
    /// Runs both backward passes and compares them on `vars`, by `prefixes`.
    ///
    /// `vars` are pairs of a name and a variable, as [`grad::named`](crate::grad::named) returns them. A prefix is a path
    /// as there: `"blocks.1"` covers `blocks.1.norm.weight` and not `blocks.10.norm.weight`. What no prefix covers counts
    /// in `shared` and `overall` only. A variable that is listed under several names (tied weights) counts once in each.
    ///
    /// # Errors
    /// If a loss is not a single floating point number, a backward pass fails, there is no variable, or a prefix covers none.
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

    /// Compares the gradients of two backward passes that were run already.
    ///
    /// # Errors
    /// If there is no variable, or a prefix covers none.
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
            if moments.scale.iter().all(|s| *s != 0.0) {
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
        Ok(Self {
            groups: named,
            shared: shared.pair("shared"),
            overall: overall.pair("overall"),
        })
    }

    /// The `λ` at which `‖λ∇L_equiv‖ = target_ratio · ‖∇L_inv‖` on the shared parameters; `None` if they have no finite
    /// positive ratio (no parameter is reached by both losses, or a gradient is not finite).
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

/// How a [`LambdaBalancer`] follows the balance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambdaConfig {
    /// `‖λ∇L_equiv‖ / ‖∇L_inv‖` to aim at, above 0.
    pub target_ratio: f64,
    /// The weight of the old value, in `[0, 1)`.
    pub momentum: f64,
    /// `λ` until the first measurement that suggests one; the nearer bound, if it is outside of them.
    pub initial: f64,
    /// The smallest `λ`, above 0.
    pub min: f64,
    /// The largest `λ`: a vanishing equivariance gradient must not be blown up without bound.
    pub max: f64,
}

impl Default for LambdaConfig {
    /// A fifth of the invariance gradient, momentum 0.9, from 1, between 1e-3 and 1e3.
    fn default() -> Self {
        Self {
            target_ratio: 0.2,
            momentum: 0.9,
            initial: 1.0,
            min: 1e-3,
            max: 1e3,
        }
    }
}

/// `λ` over training: a moving average of what each [`GradientBalance`] suggests.
///
/// ```text
/// log λ ← m·log λ + (1 − m)·log(target / ratio), clamped to [min, max]
/// ```
///
/// The average is one of logarithms, as ratios ask for: twice too large and twice too small cancel. The first suggestion
/// is taken as it is; a measurement that suggests nothing changes nothing.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::grad::{GradientBalance, LambdaBalancer, LambdaConfig};
/// let mut balancer = LambdaBalancer::new(LambdaConfig { target_ratio: 0.1, momentum: 0.5, ..Default::default() })?;
/// let w = Var::new(1f32, &Device::Cpu)?;
/// for (scale, lambda) in [(1., 0.1), (4., 0.05)] {
///     let equiv = (w.as_tensor() * scale)?;
///     let balance = GradientBalance::of_losses(&w, &equiv, [("w", &w)], &[])?;
///     assert!((balancer.update(&balance) - lambda).abs() < 1e-12);
/// }
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambdaBalancer {
    config: LambdaConfig,
    lambda: Option<f64>,
}

impl LambdaBalancer {
    /// A balancer that has seen nothing.
    ///
    /// # Errors
    /// If the target, a bound or the initial value is not finite and above 0, the bounds cross, or the momentum is not in
    /// `[0, 1)`.
    pub fn new(config: LambdaConfig) -> Result<Self> {
        check_positive("LambdaConfig::target_ratio", config.target_ratio)?;
        check_positive("LambdaConfig::initial", config.initial)?;
        check_positive("LambdaConfig::min", config.min)?;
        check_positive("LambdaConfig::max", config.max)?;
        if config.min > config.max {
            let expected = format!("at least min, {}", config.min);
            return Err(Error::config("LambdaConfig::max", expected, config.max));
        }
        if !(0.0..1.0).contains(&config.momentum) {
            return Err(Error::config(
                "LambdaConfig::momentum",
                "the weight of the old value, in [0, 1)",
                config.momentum,
            ));
        }
        Ok(Self {
            config,
            lambda: None,
        })
    }

    /// A balancer whose average stands at `lambda`, to go on from a checkpoint; at the nearer bound, if it is outside of
    /// them.
    ///
    /// # Errors
    /// As [`new`](Self::new); if `lambda` is not finite and above 0.
    pub fn resume(config: LambdaConfig, lambda: f64) -> Result<Self> {
        check_positive("lambda", lambda)?;
        let new = Self::new(config)?;
        Ok(Self {
            lambda: Some(lambda.clamp(config.min, config.max)),
            ..new
        })
    }

    /// The current `λ`, within its bounds.
    pub fn lambda(&self) -> f64 {
        let LambdaConfig {
            initial, min, max, ..
        } = self.config;
        self.lambda.unwrap_or(initial).clamp(min, max)
    }

    /// Takes one measurement in, and returns `λ`.
    pub fn update(&mut self, balance: &GradientBalance) -> f64 {
        // The target was checked when this was made: what is not suggested is undefined.
        if let Ok(Some(suggested)) = balance.suggested_lambda(self.config.target_ratio) {
            let m = self.config.momentum;
            let next = match self.lambda {
                Some(old) => (m * old.ln() + (1.0 - m) * suggested.ln()).exp(),
                None => suggested,
            };
            self.lambda = Some(next.clamp(self.config.min, self.config.max));
        }
        self.lambda()
    }
}

fn check_positive(field: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(field, "a finite value above 0", value))
}

fn values(grad: &Tensor) -> Result<Vec<f64>> {
    let grad = grad
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?;
    Ok(grad.flatten_all()?.to_vec1()?)
}

/// Second moments of two vectors `x`, `y`, each in units of its largest entry.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    /// The largest magnitudes.
    scale: [f64; 2],
    /// `Σ (x/scale)²`, the same of `y`.
    squares: [f64; 2],
    /// `Σ (x/scale)(y/scale)`.
    product: f64,
}

impl Moments {
    /// Of two gradients of one variable; a missing one is zero.
    fn of(x: Option<&[f64]>, y: Option<&[f64]>) -> Self {
        let scale =
            [x, y].map(|v| v.map_or(0.0, |v| v.iter().fold(0.0, |m, v| larger(m, v.abs()))));
        let by = scale.map(|s| if s == 0.0 { 1.0 } else { s });
        let squares = |v: Option<&[f64]>, s: f64| {
            v.map_or(0.0, |v| v.iter().map(|v| (v / s) * (v / s)).sum())
        };
        let product = match (x, y) {
            (Some(x), Some(y)) => x
                .iter()
                .zip(y)
                .map(|(x, y)| (x / by[0]) * (y / by[1]))
                .sum(),
            _ => 0.0,
        };
        Self {
            scale,
            squares: [squares(x, by[0]), squares(y, by[1])],
            product,
        }
    }

    /// Of the concatenated vectors.
    fn and(self, other: Self) -> Self {
        let side = |i: usize| {
            let top = larger(self.scale[i], other.scale[i]);
            let by = if top == 0.0 { 1.0 } else { top };
            (top, self.scale[i] / by, other.scale[i] / by)
        };
        let ([x, y], [i, j]) = ([side(0), side(1)], [0, 1]);
        Self {
            scale: [x.0, y.0],
            squares: [
                self.squares[i] * x.1 * x.1 + other.squares[i] * x.2 * x.2,
                self.squares[j] * y.1 * y.1 + other.squares[j] * y.2 * y.2,
            ],
            product: self.product * x.1 * y.1 + other.product * x.2 * y.2,
        }
    }

    fn pair(self, name: &str) -> GradientPair {
        let [x, y] = self.squares.map(f64::sqrt);
        // 0/0 is NaN, as it should be; rounding may leave [−1, 1], and clamp keeps a NaN.
        let cosine = (self.product / (x * y)).clamp(-1.0, 1.0);
        GradientPair {
            name: name.to_string(),
            norm_inv: self.scale[0] * x,
            norm_equiv: self.scale[1] * y,
            cosine,
        }
    }
}

/// The larger of two, or NaN if one is.
fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}
