//! Laws of operators: the action on tokens and maps.

use candle_core::{Tensor, Var};
use rand::Rng;

use super::{
    ADJOINT, Checked, EXACT, Law, Violation,
    maps::{Product, alone, inverse_gap, is_valid, max_gap, random, smooth},
    require, some,
};
use crate::{GridOperator, Resample, TokenGrid, group::GroupAction};

/// Checks the action of `elements` on the tokens and maps of `grid`.
///
/// Identity, left action and inverse are checked on a smooth map with values in `[−1, 1]`, to
/// `tolerance` in absolute value, on the cells that are valid on both sides. An [`EXACT`] action is
/// checked on random values as well. Adjoint, gradient, per-sample batches, maps, masks and the
/// portable operator are checked to [`ADJOINT`] for every action.
///
/// The smooth map is not periodic. For a cyclic action by fractions of a cell, assert
/// [`action_errors`](super::action_errors) on a [`band_limited`](super::band_limited) map instead.
///
/// # Errors
/// The first law that does not hold.
pub fn check_action_laws<G: GroupAction>(
    elements: &[G],
    grid: TokenGrid,
    resample: &Resample,
    tolerance: f64,
    rng: &mut impl Rng,
) -> Checked {
    some("check_action_laws", elements)?;
    let mut fields = vec![smooth(grid, rng)?];
    if tolerance == EXACT {
        fields.push(random(&[1, grid.len(), 3], rng)?);
    }
    for x in &fields {
        let identity = alone(&G::identity(), grid, resample)?;
        let gap = max_gap(x, &identity.apply(x)?, |_| true)?;
        require(gap <= tolerance, Law::ActIdentity, || format!("error {gap:e}"))?;
        for a in elements {
            for b in elements {
                check_left_action(a, b, x, grid, resample, tolerance)?;
            }
        }
        for g in elements {
            check_inverse(g, x, grid, resample, tolerance)?;
        }
    }
    for g in elements {
        check_operator(g, grid, resample, rng)?;
    }
    check_per_sample(elements, grid, resample, rng)
}

fn check_left_action<G: GroupAction>(
    a: &G,
    b: &G,
    x: &Tensor,
    grid: TokenGrid,
    resample: &Resample,
    tolerance: f64,
) -> Checked {
    let product = Product::of(a, b, grid, resample)?;
    if tolerance == EXACT {
        let (once, twice) = (a.compose(b).out_grid(grid)?, product.second.out_grid());
        require(once == twice, Law::LeftAction, || {
            format!("a = {a:?}, b = {b:?}: onto {once} and {twice}")
        })?;
    }
    let (gap, _) = product.gap(x)?;
    require(gap <= tolerance, Law::LeftAction, || {
        format!("a = {a:?}, b = {b:?}: error {gap:e} above {tolerance:e}")
    })?;
    let gap = max_gap(&product.chained.apply(x)?, &product.twice(x)?, |_| true)?;
    require(gap <= ADJOINT, Law::LeftAction, || {
        format!("a = {a:?}, b = {b:?}: composed operators differ by {gap:e}")
    })
}

fn check_inverse<G: GroupAction>(
    g: &G,
    x: &Tensor,
    grid: TokenGrid,
    resample: &Resample,
    tolerance: f64,
) -> Checked {
    let (gap, _) = inverse_gap(g, x, grid, resample)?;
    require(gap <= tolerance, Law::ActInverse, || {
        format!("g = {g:?}: error {gap:e} above {tolerance:e}")
    })
}

fn check_operator<G: GroupAction>(
    g: &G,
    grid: TokenGrid,
    resample: &Resample,
    rng: &mut impl Rng,
) -> Checked {
    let operator = alone(g, grid, resample)?;
    let (n, m) = (grid.len(), operator.out_grid().len());
    check_adjoint(
        |x| operator.apply(x),
        |y| operator.adjoint().apply(y),
        &[2, n, 3],
        &[2, m, 3],
        rng,
    )?;

    let x = random(&[2, n, 3], rng)?;
    let portable = operator.apply_portable(&x)?;
    let gap = max_gap(&operator.apply(&x)?, &portable, |_| true)?;
    require(gap <= ADJOINT, Law::Portable, || format!("g = {g:?}: error {gap:e}"))?;

    let out = operator.out_grid();
    let map = x.transpose(1, 2)?.reshape((2, 3, grid.rows(), grid.cols()))?;
    let acted = operator.apply(&map)?.flatten_from(2)?.transpose(1, 2)?;
    let gap = max_gap(&operator.apply(&x)?, &acted, |_| true)?;
    require(gap <= ADJOINT, Law::Map, || format!("g = {g:?}: error {gap:e}"))?;

    let ones = operator.apply(&x.ones_like()?)?;
    let gap = max_gap(&ones, &ones.ones_like()?, |i| is_valid(&operator, i))?;
    let interior = resample.padding != crate::Padding::Zeros;
    require(!interior || gap <= ADJOINT, Law::Constant, || format!("g = {g:?}: error {gap:e}"))?;
    for i in 0..m {
        let source = g.source(out.center(i / out.cols(), i % out.cols()));
        // Within rounding of the border both answers are right.
        let depth = source.iter().map(|&s| s.min(1.0 - s)).fold(f64::INFINITY, f64::min);
        let holds = depth.abs() < 1e-6 || (depth > 0.0) == is_valid(&operator, i);
        require(holds, Law::Mask, || format!("g = {g:?}: cell {i} comes from {source:?}"))?;
    }
    Ok(())
}

/// Checks that `adjoint` is the adjoint of the linear map `apply` from tensors of `in_shape` to
/// tensors of `out_shape`, and that the gradient of `⟨apply(x), y⟩` by `x` is `adjoint(y)`; in
/// `f64`, to [`ADJOINT`].
///
/// # Errors
/// [`Law::Adjoint`] or [`Law::Gradient`] if one does not hold, and the errors of the two maps.
pub fn check_adjoint(
    apply: impl Fn(&Tensor) -> crate::Result<Tensor>,
    adjoint: impl Fn(&Tensor) -> crate::Result<Tensor>,
    in_shape: &[usize],
    out_shape: &[usize],
    rng: &mut impl Rng,
) -> Checked {
    let x = Var::from_tensor(&random(in_shape, rng)?)?;
    let y = random(out_shape, rng)?;
    let (ax, aty) = (apply(&x)?, adjoint(&y)?);
    let (left, right) = (dot(&ax, &y)?, dot(&x, &aty)?);
    require((left - right).abs() <= ADJOINT * (1.0 + left.abs()), Law::Adjoint, || {
        format!("{left} and {right}")
    })?;
    let grads = (ax * &y)?.sum_all()?.backward()?;
    let gap = match grads.get(&x) {
        Some(grad) => max_gap(grad, &aty, |_| true)?,
        None => f64::INFINITY,
    };
    require(gap <= ADJOINT, Law::Gradient, || format!("error {gap:e}"))
}

fn check_per_sample<G: GroupAction>(
    elements: &[G],
    grid: TokenGrid,
    resample: &Resample,
    rng: &mut impl Rng,
) -> Checked {
    let Some(first) = elements.first() else {
        return Ok(());
    };
    let to = first.out_grid(grid)?;
    let mut same = Vec::new();
    for g in elements {
        if g.out_grid(grid)? == to {
            same.push(g.clone());
        }
    }
    let x = random(&[same.len(), grid.len(), 2], rng)?;
    let batch = GridOperator::new(&same, grid, resample)?;
    for (how, acted) in [("fused", batch.apply(&x)?), ("portable", batch.apply_portable(&x)?)] {
        for (b, g) in same.iter().enumerate() {
            let alone = alone(g, grid, resample)?.apply(&x.narrow(0, b, 1)?)?;
            let gap = max_gap(&alone, &acted.narrow(0, b, 1)?, |_| true)?;
            require(gap <= ADJOINT, Law::PerSample, || {
                format!("sample {b}, g = {g:?}: {how} error {gap:e}")
            })?;
        }
    }
    Ok(())
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f64, Violation> {
    Ok((a * b)?.sum_all()?.to_scalar::<f64>()?)
}
