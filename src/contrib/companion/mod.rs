//! Small regularizers beside SER: on weights without data, on vectors, on predictions; and the balance of two losses.
//!
//! | item | asks that | reads |
//! |---|---|---|
//! | [`ReynoldsPenalty`] | a weight be what its average over a group makes of it | kernels, positional tables |
//! | [`RegularRep`] | an embedding's channels permute as the group elements do | vectors of two views, `g` per sample |
//! | [`PredictionConsistency`], [`mean_pairwise_symmetric_kl`] | predictions agree over views | logits of K views |
//! | [`OrbitPool`], [`InvariantIntegration`] | nothing: they make exactly invariant features | token maps, images |
//! | [`EqSim`] | scores change alike when either side of a pair is swapped | a matrix of scores |
//! | [`GradientBalance`], [`LambdaBalancer`] | nothing: how do two losses pull, and which `λ` balances them? | gradients by name |
//!
//! All groups are subgroups of D4, so that every action here is an exact permutation. Half-precision input is worked on
//! in f32: losses come back in f32, what has the shape of the input in the input's type. Losses are plain means, and
//! none reduces over processes. When to use which is in `docs/companions.md` of the repository.

mod consistency;
mod eqsim;
mod integration;
mod orbit_pool;
mod regular;
mod reynolds;

pub use consistency::{Divergence, PredictionConsistency, mean_pairwise_symmetric_kl};
pub use eqsim::{EqSim, EqSimOutput, Margin};
pub use integration::{InvariantIntegration, Monomial};
pub use orbit_pool::{OrbitPool, Pool};
pub use regular::{Distance, RegularRep};
pub use reynolds::{Fibre, ReynoldsPenalty, WeightSpace};

use candle_core::Tensor;

use crate::{
    Error, GridOperator, Resample, Result, TokenGrid,
    group::{D4, Subgroup},
    loss::{check_eps, check_pair, work_dtype},
};

/// That these are tokens `(B, N, C)` on `grid`.
fn check_tokens(op: &'static str, tokens: &Tensor, grid: TokenGrid) -> Result<()> {
    match *tokens.dims() {
        [b, n, c] if b > 0 && c > 0 && n == grid.len() => Ok(()),
        _ => {
            let expected = format!(
                "tokens (B, {}, C) of a {grid} grid without prefix tokens, none of them empty",
                grid.len()
            );
            Err(Error::input(op, expected, format!("{:?}", tokens.dims())))
        }
    }
}

/// That every element of `group` keeps `grid`.
fn check_grid(op: &'static str, group: Subgroup, grid: TokenGrid) -> Result<()> {
    if grid.is_square() || !group.elements().iter().any(|g| g.swaps_axes()) {
        return Ok(());
    }
    let expected = format!(
        "a square grid for {group:?}, some of whose elements exchange rows and columns (C2, HFlip, VFlip and Flips keep \
         every grid)"
    );
    Err(Error::input(op, expected, grid))
}

/// `ρ(g)x` for tokens `(B, N, C)` or a map `(B, C, H, W)` on `grid`, which `g` keeps: a permutation of cells.
fn turn(g: D4, x: &Tensor, grid: TokenGrid) -> Result<Tensor> {
    if g == D4::IDENTITY {
        return Ok(x.clone());
    }
    GridOperator::new(&[g], grid, &Resample::default())?.apply(x)
}

/// The sum of tensors of one shape: an orbit or views, one at least. No stack is made.
fn sum(op: &'static str, terms: &[Tensor]) -> Result<Tensor> {
    let [first, others @ ..] = terms else {
        return Err(Error::input(op, "at least one term", 0));
    };
    let mut sum = first.clone();
    for term in others {
        sum = (sum + term)?;
    }
    Ok(sum)
}
