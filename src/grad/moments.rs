//! Norms and cosine of two gradients, accumulated without overflow.

/// The norms and the cosine of the gradients of two losses on some parameters.
///
/// They are computed in f64 from scaled values, so the squares of gradients neither overflow nor
/// underflow.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientPair {
    /// The prefix of the parameter names.
    pub name: String,
    /// `‖∇L_inv‖`; 0 if the loss reaches none of the parameters, NaN or infinite if a gradient is
    /// not finite.
    pub norm_inv: f64,
    /// `‖∇L_equiv‖`, as `norm_inv`.
    pub norm_equiv: f64,
    /// The cosine between the gradients; negative if they conflict. NaN if a norm is zero or not
    /// finite.
    pub cosine: f64,
}

impl GradientPair {
    /// `‖∇L_equiv‖ / ‖∇L_inv‖`: infinite if only the denominator is zero, NaN if both norms are.
    pub fn ratio(&self) -> f64 {
        self.norm_equiv / self.norm_inv
    }
}

/// Second moments of two vectors `x`, `y`, each in units of its largest magnitude.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moments {
    /// The largest magnitudes.
    scale: [f64; 2],
    /// `Σ (x/scale)²`, the same of `y`.
    squares: [f64; 2],
    /// `Σ (x/scale)(y/scale)`.
    product: f64,
}

impl Moments {
    /// The moments of two gradients of one variable; a missing gradient is zero.
    pub(super) fn of(x: Option<&[f64]>, y: Option<&[f64]>) -> Self {
        let scale =
            [x, y].map(|v| v.map_or(0.0, |v| v.iter().fold(0.0, |m, v| larger(m, v.abs()))));
        let by = scale.map(|s| if s == 0.0 { 1.0 } else { s });
        let squares = |v: Option<&[f64]>, s: f64| {
            v.map_or(0.0, |v| v.iter().map(|v| (v / s) * (v / s)).sum())
        };
        let product = match (x, y) {
            (Some(x), Some(y)) => x.iter().zip(y).map(|(x, y)| (x / by[0]) * (y / by[1])).sum(),
            _ => 0.0,
        };
        Self { scale, squares: [squares(x, by[0]), squares(y, by[1])], product }
    }

    /// Whether both gradients are nonzero.
    pub(super) fn shared(&self) -> bool {
        self.scale.iter().all(|s| *s != 0.0)
    }

    /// The moments of the concatenated vectors.
    pub(super) fn and(self, other: Self) -> Self {
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

    pub(super) fn pair(self, name: &str) -> GradientPair {
        let [x, y] = self.squares.map(f64::sqrt);
        // 0/0 is NaN on purpose. Rounding may leave [−1, 1]; clamp keeps a NaN.
        let cosine = (self.product / (x * y)).clamp(-1.0, 1.0);
        GradientPair {
            name: name.to_string(),
            norm_inv: self.scale[0] * x,
            norm_equiv: self.scale[1] * y,
            cosine,
        }
    }
}

/// The larger value, or NaN if one is NaN.
fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}
