//! The members of an orbit, and their sum.

use candle_core::Tensor;

use crate::{GridOperator, Resample, Result, TokenGrid, group::D4};

/// `ρ(g)x` for tokens `(B, N, C)` or a map `(B, C, H, W)` on `grid`: a permutation of the cells.
pub(super) fn turn(g: D4, x: &Tensor, grid: TokenGrid) -> Result<Tensor> {
    if g == D4::IDENTITY {
        return Ok(x.clone());
    }
    GridOperator::new(&[g], grid, &Resample::default())?.apply(x)
}

/// The sum of at least one tensor, all of one shape; it needs no stack.
pub(super) fn sum(terms: &[Tensor]) -> candle_core::Result<Tensor> {
    debug_assert!(!terms.is_empty(), "an orbit has at least one member");
    let mut sum = terms[0].clone();
    for term in &terms[1..] {
        sum = (sum + term)?;
    }
    Ok(sum)
}
