//! Invariant integration (arXiv 2202.03967): monomials of tokens, averaged over a group and over
//! positions.

use candle_core::Tensor;

use super::{
    check,
    orbit::{sum, turn},
};
use crate::{Error, Result, TokenGrid, group::Subgroup};

/// `Π_i F(t + d_i)^{b_i}`: a product of powers of the tokens at offsets `d_i = (rows, cols)` from a
/// position `t`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Monomial {
    /// Offset and exponent of each factor.
    pub factors: Vec<([i32; 2], u32)>,
}

impl Monomial {
    /// `F(t)^exponent`.
    pub fn power(exponent: u32) -> Self {
        Self { factors: vec![([0, 0], exponent)] }
    }

    /// `F(t)·F(t + offset)`.
    pub fn product(offset: [i32; 2]) -> Self {
        Self { factors: vec![([0, 0], 1), (offset, 1)] }
    }
}

/// Invariants of a token map: the monomials of each channel, averaged over a group and over all
/// positions where they fit.
///
/// ```text
/// A[φ](F) = 1/|G| Σ_g mean_t φ_t(ρ(g)F),   φ_t(F) = Π_i F(t + d_i)^{b_i}      A[φ](ρ(h)F) = A[φ](F) for every h in G
/// ```
///
/// The power 1 is the mean over tokens. A product of two neighbors is a symmetrized correlation.
/// The result is differentiable. Exponents are integers, so features may be negative or zero.
///
/// The source also learns real exponents for positive features, and replaces the monomials by
/// weighted sums, networks and attention. For learned weights see
/// [`Pool::Attention`](super::Pool::Attention), or put a linear layer on the invariants.
///
/// Source: Rath and Condurache, arXiv 2202.03967.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, contrib::{InvariantIntegration, Monomial}, group::Subgroup};
/// let monomials = vec![Monomial::power(1), Monomial::power(2), Monomial::product([0, 1])];
/// let integration = InvariantIntegration::new(Subgroup::C4, monomials)?;
/// let map = Tensor::new(&[[[1f32], [2.], [3.], [4.]]], &Device::Cpu)?; // 1 2 / 3 4
/// let invariants = integration.forward(&map, TokenGrid::square(2)?)?; // (B, M, C)
/// // neighbors in all directions: (1·2 + 3·4 + 1·3 + 2·4)/4
/// assert_eq!(invariants.flatten_all()?.to_vec1::<f32>()?, [2.5, 7.5, 6.25]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvariantIntegration {
    group: Subgroup,
    monomials: Vec<Monomial>,
}

const OP: &str = "InvariantIntegration";

impl InvariantIntegration {
    /// The integration of `monomials` over `group`.
    ///
    /// # Errors
    /// If there is no monomial, one has no factor, or an exponent is 0.
    pub fn new(group: Subgroup, monomials: Vec<Monomial>) -> Result<Self> {
        let field = "InvariantIntegration::monomials";
        if monomials.is_empty() {
            return Err(Error::config(field, "at least one monomial", "none"));
        }
        for monomial in &monomials {
            if monomial.factors.is_empty() || monomial.factors.iter().any(|&(_, b)| b == 0) {
                let expected = "at least one factor each, with exponents of at least 1";
                return Err(Error::config(field, expected, format!("{:?}", monomial.factors)));
            }
        }
        Ok(Self { group, monomials })
    }

    /// The invariants `(B, M, C)` of tokens `(B, N, C)` on `grid`, for `M` monomials.
    ///
    /// # Errors
    /// If the tokens do not fit the grid, are empty, or are not of a floating-point type. If the
    /// grid is not square and the group exchanges rows and columns. If a monomial spans more rows
    /// or columns than the grid has.
    pub fn forward(&self, tokens: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        check::tokens(OP, tokens, grid)?;
        check::grid(OP, self.group, grid)?;
        let dtype = check::work_dtype(OP, tokens)?;
        let windows = self.monomials.iter().map(|m| m.windows(grid));
        let windows = windows.collect::<Result<Vec<_>>>()?;
        let (b, _, c) = tokens.dims3()?;
        let map = tokens.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?;
        let map = map.reshape((b, c, grid.rows(), grid.cols()))?;
        let mut orbit = Vec::with_capacity(self.group.order());
        for &g in self.group.elements() {
            let turned = turn(g, &map, grid)?;
            let values = windows.iter().map(|w| w.evaluate(&turned));
            let values: Vec<Tensor> = values.collect::<candle_core::Result<_>>()?;
            orbit.push(Tensor::stack(&values, 1)?);
        }
        let mean = (sum(&orbit)? / self.group.order() as f64)?;
        Ok(mean.to_dtype(tokens.dtype())?)
    }
}

/// A monomial on a grid: one window per factor, all of one size.
struct Windows {
    /// First row, first column and exponent of each factor.
    factors: Vec<(usize, usize, u32)>,
    /// Rows and columns of each window: the positions where the monomial fits.
    size: (usize, usize),
}

impl Monomial {
    fn windows(&self, grid: TokenGrid) -> Result<Windows> {
        // In i64, where the difference of two offsets cannot overflow.
        let axis = |i: usize| self.factors.iter().map(move |(d, _)| i64::from(d[i]));
        let range = |i| axis(i).min().zip(axis(i).max()).unwrap_or_default();
        let ((top, bottom), (left, right)) = (range(0), range(1));
        let rows = grid.rows() as i64 - (bottom - top);
        let cols = grid.cols() as i64 - (right - left);
        if rows < 1 || cols < 1 {
            let expected = format!("monomials that fit into a {grid} grid");
            let got = format!("one of {}x{} cells", bottom - top + 1, right - left + 1);
            return Err(Error::input(OP, expected, got));
        }
        let start = |&([y, x], b): &([i32; 2], u32)| {
            let (y, x) = (i64::from(y) - top, i64::from(x) - left);
            (y as usize, x as usize, b)
        };
        Ok(Windows {
            factors: self.factors.iter().map(start).collect(),
            size: (rows as usize, cols as usize),
        })
    }
}

impl Windows {
    /// The mean over positions of the product, `(B, C)` of a map `(B, C, H, W)`.
    fn evaluate(&self, map: &Tensor) -> candle_core::Result<Tensor> {
        let factor = |&(y, x, exponent): &(usize, usize, u32)| {
            let window = map.narrow(2, y, self.size.0)?.narrow(3, x, self.size.1)?;
            power(&window, exponent)
        };
        debug_assert!(!self.factors.is_empty(), "InvariantIntegration::new checks the factors");
        let mut product = factor(&self.factors[0])?;
        for next in &self.factors[1..] {
            product = (product * factor(next)?)?;
        }
        product.mean((2, 3))
    }
}

/// `xⁿ` by repeated squaring. Unlike `powf` it has the right derivative at 0 and below.
fn power(x: &Tensor, n: u32) -> candle_core::Result<Tensor> {
    match n {
        0 => x.ones_like(),
        1 => Ok(x.clone()),
        n if n.is_multiple_of(2) => power(&x.sqr()?, n / 2),
        n => power(&x.sqr()?, n / 2)? * x,
    }
}
