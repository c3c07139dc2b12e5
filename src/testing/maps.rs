//! Maps to measure actions on, and the errors measured.

use candle_core::{Device, Tensor};
use rand::Rng;

use super::Violation;
use crate::{GridOperator, Resample, TokenGrid, group::GroupAction};

/// The largest errors of an action on one map, in absolute value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActionErrors {
    /// `act(e, x) = x`
    pub identity: f64,
    /// `act(g⁻¹, act(g, x)) = x`
    pub inverse: f64,
    /// `act(a, act(b, x)) = act(a∘b, x)`
    pub left_action: f64,
    /// The smallest number of cells, valid on both sides, on which two sides were compared. With 0
    /// cells the errors carry no information.
    pub cells: usize,
}

impl ActionErrors {
    /// The largest of the three errors.
    pub fn worst(&self) -> f64 {
        self.identity.max(self.inverse).max(self.left_action)
    }
}

/// Measures the errors that [`check_action_laws`](super::check_action_laws) bounds, over all
/// `elements` and all pairs of them, on the map `x`: `(1, N, C)` on `grid`, `f64`.
///
/// ```
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{Filter, TokenGrid, group::Scale, testing};
/// let grid = TokenGrid::square(8)?;
/// let x = testing::band_limited(grid, [2, 2], &mut StdRng::seed_from_u64(0))?;
/// let scales = [Scale::new(0.75, 1.0)?, Scale::new(2.0, 1.25)?];
/// let errors = testing::action_errors(&scales, &x, grid, &Filter::Fourier.into())?;
/// assert!(errors.worst() < 1e-10 && errors.cells > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If an operator cannot be built, or `x` does not fit.
pub fn action_errors<G: GroupAction>(
    elements: &[G],
    x: &Tensor,
    grid: TokenGrid,
    resample: &Resample,
) -> Result<ActionErrors, Violation> {
    let identity = alone(&G::identity(), grid, resample)?;
    let mut errors = ActionErrors {
        identity: max_gap(x, &identity.apply(x)?, |_| true)?,
        inverse: 0.0,
        left_action: 0.0,
        cells: grid.len(),
    };
    for a in elements {
        let (gap, cells) = inverse_gap(a, x, grid, resample)?;
        errors.inverse = errors.inverse.max(gap);
        errors.cells = errors.cells.min(cells);
        for b in elements {
            let (gap, cells) = Product::of(a, b, grid, resample)?.gap(x)?;
            errors.left_action = errors.left_action.max(gap);
            errors.cells = errors.cells.min(cells);
        }
    }
    Ok(errors)
}

/// `a` after `b` in three ways: as one element, as two operators one after the other, and as the
/// product of the two operators.
pub(super) struct Product {
    element: GridOperator,
    first: GridOperator,
    pub second: GridOperator,
    pub chained: GridOperator,
}

impl Product {
    pub fn of<G: GroupAction>(
        a: &G,
        b: &G,
        grid: TokenGrid,
        resample: &Resample,
    ) -> Result<Self, Violation> {
        let first = alone(b, grid, resample)?;
        let second = alone(a, first.out_grid(), resample)?;
        Ok(Self {
            element: GridOperator::between(&[a.compose(b)], grid, second.out_grid(), resample)?,
            chained: second.compose(&first)?,
            first,
            second,
        })
    }

    pub fn twice(&self, x: &Tensor) -> Result<Tensor, Violation> {
        Ok(self.second.apply(&self.first.apply(x)?)?)
    }

    /// The largest difference of one element from two, and the number of cells that both find
    /// valid.
    pub fn gap(&self, x: &Tensor) -> Result<(f64, usize), Violation> {
        let both = |i: usize| is_valid(&self.element, i) && is_valid(&self.chained, i);
        let gap = max_gap(&self.element.apply(x)?, &self.twice(x)?, both)?;
        let cells = 0..self.element.out_grid().len();
        Ok((gap, cells.filter(|&i| both(i)).count()))
    }
}

/// The largest difference of `x` from there and back, and the number of valid cells.
pub(super) fn inverse_gap<G: GroupAction>(
    g: &G,
    x: &Tensor,
    grid: TokenGrid,
    resample: &Resample,
) -> Result<(f64, usize), Violation> {
    let there = alone(g, grid, resample)?;
    let back = GridOperator::between(&[g.inverse()], there.out_grid(), grid, resample)?;
    let round = back.compose(&there)?;
    let gap = max_gap(x, &round.apply(x)?, |i| is_valid(&round, i))?;
    let cells = (0..grid.len()).filter(|&i| is_valid(&round, i)).count();
    Ok((gap, cells))
}

/// The operator of `g` by itself.
pub(super) fn alone<G: GroupAction>(
    g: &G,
    from: TokenGrid,
    resample: &Resample,
) -> crate::Result<GridOperator> {
    GridOperator::new(std::slice::from_ref(g), from, resample)
}

pub(super) fn is_valid(operator: &GridOperator, cell: usize) -> bool {
    operator.cells(0).is_none_or(|v| v[cell])
}

/// The largest absolute difference over the cells that count; NaN counts as infinite.
pub(super) fn max_gap(
    a: &Tensor,
    b: &Tensor,
    counts: impl Fn(usize) -> bool,
) -> Result<f64, Violation> {
    let (_, _, channels) = a.dims3()?;
    let gaps = (a - b)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
    let n = a.dims()[1];
    let gap = |(i, &gap): (usize, &f64)| {
        if !counts((i / channels) % n) {
            0.0
        } else if gap.is_nan() {
            f64::INFINITY
        } else {
            gap
        }
    };
    Ok(gaps.iter().enumerate().map(gap).fold(0.0, f64::max))
}

pub(super) fn random(shape: &[usize], rng: &mut impl Rng) -> Result<Tensor, Violation> {
    let values: Vec<f64> =
        (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A periodic map `(1, N, 2)` of random waves, sampled at the centers of the cells; `f64` values
/// within `[−1, 1]`. `band` is the largest number of periods `[vertical, horizontal]`.
///
/// [`Filter::Fourier`](crate::Filter::Fourier) represents scales and cyclic shifts of it exactly if
/// each axis has more than `2·band` cells.
///
/// # Errors
/// Those of candle.
pub fn band_limited(
    grid: TokenGrid,
    band: [usize; 2],
    rng: &mut impl Rng,
) -> Result<Tensor, Violation> {
    const WAVES: usize = 8;
    let mut frequency = |most: usize| rng.random_range(-(most as f64)..=most as f64).round();
    let mut waves = Vec::with_capacity(2 * WAVES);
    for _ in 0..2 * WAVES {
        let (v, u) = (frequency(band[0]), frequency(band[1]));
        waves.push([v, u, frequency(1000) / 1000.0]);
    }
    let mut values = Vec::with_capacity(2 * grid.len());
    for i in 0..grid.len() {
        let [y, x] = grid.center(i / grid.cols(), i % grid.cols());
        for waves in waves.chunks_exact(WAVES) {
            let wave =
                |[v, u, phase]: &[f64; 3]| (std::f64::consts::TAU * (v * y + u * x + phase)).sin();
            values.push(waves.iter().map(wave).sum::<f64>() / WAVES as f64);
        }
    }
    Ok(Tensor::from_vec(values, (1, grid.len(), 2), &Device::Cpu)?)
}

/// A map `(1, N, 2)` of one slow wave per channel, at most half a period across the image and not
/// periodic; `f64` values within `[−1, 1]`. [`check_action_laws`](super::check_action_laws) uses
/// it.
///
/// # Errors
/// Those of candle.
pub fn smooth(grid: TokenGrid, rng: &mut impl Rng) -> Result<Tensor, Violation> {
    let waves: [[f64; 3]; 2] = std::array::from_fn(|_| {
        [rng.random_range(-3.0..3.0), rng.random_range(-3.0..3.0), rng.random_range(0.0..6.0)]
    });
    let mut values = Vec::with_capacity(2 * grid.len());
    for i in 0..grid.len() {
        let [y, x] = grid.center(i / grid.cols(), i % grid.cols());
        values.extend(waves.map(|[a, b, phase]| (a * y + b * x + phase).sin()));
    }
    Ok(Tensor::from_vec(values, (1, grid.len(), 2), &Device::Cpu)?)
}
