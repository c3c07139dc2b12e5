//! Invariant integration: monomials of neighboring tokens, averaged over a group and over positions.

use candle_core::Tensor;

use super::{check_grid, check_tokens, turn, work_dtype};
use crate::{Error, Result, TokenGrid, group::Subgroup};

/// `Π_i F(t + d_i)^{b_i}`: a product of powers of the tokens at offsets `d_i = (rows, cols)` from a position `t`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monomial {
    /// Offset and exponent of each factor.
    pub factors: Vec<([i32; 2], u32)>,
}

impl Monomial {
    /// `F(t)^exponent`.
    pub fn power(exponent: u32) -> Self {
        Self {
            factors: vec![([0, 0], exponent)],
        }
    }

    /// `F(t)·F(t + offset)`.
    pub fn product(offset: [i32; 2]) -> Self {
        Self {
            factors: vec![([0, 0], 1), (offset, 1)],
        }
    }
}

/// Invariants of a token map: each channel's monomials, averaged over a group and over the positions where they fit.
///
/// ```text
/// A[φ](F) = 1/|G| Σ_g mean_t φ_t(ρ(g)F),   φ_t(F) = Π_i F(t + d_i)^{b_i}      A[φ](ρ(h)F) = A[φ](F) for every h in G
/// ```
///
/// The power 1 is the mean over tokens, a product of neighbors a symmetrized correlation: what is left of the layout of
/// a map once its pose is taken away. The result is differentiable; exponents are whole, so that negative features and
/// zeros are no exception. (The source learns real exponents for features above 0, and later replaces the monomials by
/// weighted sums, networks and attention; for learned weights see [`Pool::Attention`](super::Pool::Attention), or put a
/// linear layer on these invariants.)
///
/// Source: Rath and Condurache, arXiv 2202.03967.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, contrib::companion::{InvariantIntegration, Monomial}, group::Subgroup};
/// let monomials = vec![Monomial::power(1), Monomial::power(2), Monomial::product([0, 1])];
/// let integration = InvariantIntegration::new(Subgroup::C4, monomials)?;
/// let map = Tensor::new(&[[[1f32], [2.], [3.], [4.]]], &Device::Cpu)?; // 1 2 / 3 4
/// let invariants = integration.forward(&map, TokenGrid::square(2)?)?; // (B, M, C)
/// // neighbors, all directions: (1·2 + 3·4 + 1·3 + 2·4)/4
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
    /// Integrates these monomials over `group`.
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
                return Err(Error::config(
                    field,
                    expected,
                    format!("{:?}", monomial.factors),
                ));
            }
        }
        Ok(Self { group, monomials })
    }

    /// The invariants `(B, M, C)` of tokens `(B, N, C)` on `grid`, for `M` monomials.
    ///
    /// # Errors
    /// If the tokens do not fit the grid, are empty or not of a floating point type, the grid is not square where the
    /// group exchanges rows and columns, or a monomial spans more rows or columns than there are.
    pub fn forward(&self, tokens: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        check_tokens(OP, tokens, grid)?;
        check_grid(OP, self.group, grid)?;
        let dtype = work_dtype(OP, tokens)?;
        let windows = self.monomials.iter().map(|m| m.windows(grid));
        let windows = windows.collect::<Result<Vec<_>>>()?;
        let (b, _, c) = tokens.dims3()?;
        let map = tokens.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?;
        let map = map.reshape((b, c, grid.rows(), grid.cols()))?;
        let mut sums: Vec<Option<Tensor>> = vec![None; windows.len()];
        for &g in self.group.elements() {
            let turned = turn(g, &map, grid)?;
            for (sum, window) in sums.iter_mut().zip(&windows) {
                let value = window.evaluate(&turned)?;
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + value)?,
                    None => value,
                });
            }
        }
        let sums: Vec<Tensor> = sums.into_iter().flatten().collect();
        let mean = (Tensor::stack(&sums, 1)? / self.group.order() as f64)?;
        Ok(mean.to_dtype(tokens.dtype())?)
    }
}

/// A monomial on a grid: for each factor the first row and column, and its exponent; the size of all windows.
struct Windows {
    factors: Vec<(usize, usize, u32)>,
    size: (usize, usize),
}

impl Monomial {
    fn windows(&self, grid: TokenGrid) -> Result<Windows> {
        // In i64, so that no two offsets are too far apart to be subtracted.
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
    fn evaluate(&self, map: &Tensor) -> Result<Tensor> {
        let mut product: Option<Tensor> = None;
        for &(y, x, exponent) in &self.factors {
            let factor = map.narrow(2, y, self.size.0)?.narrow(3, x, self.size.1)?;
            let factor = power(&factor, exponent)?;
            product = Some(match product {
                Some(product) => (product * factor)?,
                None => factor,
            });
        }
        match product {
            Some(product) => Ok(product.mean((2, 3))?),
            None => Err(Error::input(OP, "at least one factor", "none")),
        }
    }
}

/// `xⁿ` by repeated squaring, `n ≥ 1`: the derivative is right at 0 and below.
fn power(x: &Tensor, n: u32) -> candle_core::Result<Tensor> {
    match n {
        0 => x.ones_like(),
        1 => Ok(x.clone()),
        n if n.is_multiple_of(2) => power(&x.sqr()?, n / 2),
        n => power(&x.sqr()?, n / 2)? * x,
    }
}
