//! The law suite: what every [`GroupAction`] must satisfy, as functions that a user's own action is tested by.
//!
//! Behind the feature `testing`. A broken law comes back as a [`Violation`] that names the law and the elements.
//!
//! ```
//! use rand::{SeedableRng, rngs::StdRng};
//! use ser_reg::{Resample, TokenGrid, group::D4, testing};
//!
//! let mut rng = StdRng::seed_from_u64(0);
//! testing::check_group_laws(&D4::ALL, testing::POINTS)?;
//! testing::check_closure(&D4::GENERATORS, &D4::ALL, testing::POINTS)?;
//! testing::check_action_laws(&D4::ALL, TokenGrid::new(3, 5)?, &Resample::default(), testing::EXACT, &mut rng)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;

use crate::{Error, GridOperator, Resample, TokenGrid, group::GroupAction};

/// Tolerance of the algebra on points of the unit square: rounding of a few `f64` operations.
pub const POINTS: f64 = 1e-9;

/// Tolerance of the action of permutations: none.
pub const EXACT: f64 = 0.0;

/// Tolerance of the adjoint and of gradients, which are exact up to rounding for every operator, in `f64`.
pub const ADJOINT: f64 = 1e-10;

/// Absolute plus relative tolerance suited to values computed in `dtype`.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-10,
        DType::F32 => 1e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
        _ => 0.0,
    }
}

/// A law of groups or of their actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Law {
    /// `e∘g = g = g∘e`
    Identity,
    /// `g⁻¹∘g = e = g∘g⁻¹`
    Inverse,
    /// `(a∘b)∘c = a∘(b∘c)`
    Associativity,
    /// `relative(a, b)∘a = b`
    Relative,
    /// Points compose: `(a∘b)⁻¹p = b⁻¹(a⁻¹p)`
    Source,
    /// The affine map, where there is one, moves points as the element does
    Affine,
    /// The products of the generators are the elements
    Closure,
    /// `act(e, x) = x`
    ActIdentity,
    /// `act(a, act(b, x)) = act(a∘b, x)` where both are valid
    LeftAction,
    /// `act(g⁻¹, act(g, x)) = x` where both are valid
    ActInverse,
    /// `⟨A·x, y⟩ = ⟨x, Aᵀ·y⟩`
    Adjoint,
    /// The gradient of `⟨A·x, y⟩` is `Aᵀ·y`
    Gradient,
    /// A batch of elements acts as each element on its own sample
    PerSample,
    /// Tokens and maps are acted on alike
    Map,
    /// A cell is valid if and only if its center comes from within the image
    Mask,
    /// Constant maps stay constant where valid
    Constant,
    /// The fused operator agrees with the one made of plain candle ops
    Portable,
}

/// A law that does not hold, or a check that could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The law does not hold for these elements.
    #[error("{law:?} does not hold: {detail}")]
    Law {
        /// Which law.
        law: Law,
        /// The elements and values that break it.
        detail: String,
    },
    /// The check itself failed.
    #[error(transparent)]
    Error(#[from] Error),
}

impl Violation {
    /// The law that does not hold, if it is one.
    pub fn law(&self) -> Option<Law> {
        match self {
            Self::Law { law, .. } => Some(*law),
            Self::Error(_) => None,
        }
    }
}

impl From<candle_core::Error> for Violation {
    fn from(e: candle_core::Error) -> Self {
        Self::Error(e.into())
    }
}

type Checked = Result<(), Violation>;

fn require(holds: bool, law: Law, detail: impl FnOnce() -> String) -> Checked {
    if holds {
        return Ok(());
    }
    Err(Violation::Law {
        law,
        detail: detail(),
    })
}

/// Points on which elements are compared: no symmetry of the square maps one to another.
const PROBES: [[f64; 2]; 4] = [[0.13, 0.29], [0.71, 0.07], [0.46, 0.83], [0.97, 0.61]];

/// The largest distance between the sources of two elements over the probe points, relative to their size.
fn distance<G: GroupAction>(a: &G, b: &G) -> f64 {
    let gap = |p| {
        let ([y, x], [v, u]) = (a.source(p), b.source(p));
        (y - v).abs().max((x - u).abs()) / (1.0 + y.abs().max(x.abs()))
    };
    PROBES
        .into_iter()
        .map(gap)
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// Checks identity, inverse, associativity, `relative` and the composition of points on all pairs and triples of
/// `elements`, to `tolerance` in units of the image's side.
///
/// # Errors
/// The first law that does not hold.
pub fn check_group_laws<G: GroupAction>(elements: &[G], tolerance: f64) -> Checked {
    let same = |a: &G, b: &G| distance(a, b) <= tolerance;
    let near = |p: [f64; 2], q: [f64; 2]| {
        let size = 1.0 + p[0].abs().max(p[1].abs());
        (p[0] - q[0]).abs().max((p[1] - q[1]).abs()) <= tolerance * size
    };
    let e = G::identity();
    for g in elements {
        let neutral = same(&e.compose(g), g) && same(&g.compose(&e), g);
        require(neutral, Law::Identity, || format!("g = {g:?}"))?;
        let inverse = g.inverse();
        let undone = same(&inverse.compose(g), &e) && same(&g.compose(&inverse), &e);
        require(undone, Law::Inverse, || {
            format!("g = {g:?}, inverse = {inverse:?}")
        })?;
        if let Some(map) = g.affine() {
            let agrees = PROBES.into_iter().all(|p| near(g.source(p), map.source(p)));
            require(agrees, Law::Affine, || {
                format!("g = {g:?}, affine = {map:?}")
            })?;
        }
    }
    for a in elements {
        for b in elements {
            for c in elements {
                let associative = same(&a.compose(b).compose(c), &a.compose(&b.compose(c)));
                require(associative, Law::Associativity, || {
                    format!("a = {a:?}, b = {b:?}, c = {c:?}")
                })?;
            }
        }
    }
    for a in elements {
        for b in elements {
            let product = a.compose(b);
            for p in PROBES {
                let (once, twice) = (product.source(p), b.source(a.source(p)));
                require(near(once, twice), Law::Source, || {
                    format!("a = {a:?}, b = {b:?}, p = {p:?}: {once:?}, {twice:?}")
                })?;
            }
            let carried = same(&G::relative(a, b).compose(a), b);
            require(carried, Law::Relative, || format!("a = {a:?}, b = {b:?}"))?;
        }
    }
    Ok(())
}

/// Checks that the products of `generators` are exactly `elements`: a finite group.
///
/// # Errors
/// If a product is missing, or an element is never reached.
pub fn check_closure<G: GroupAction>(generators: &[G], elements: &[G], tolerance: f64) -> Checked {
    let find = |list: &[G], g: &G| list.iter().any(|h| distance(g, h) <= tolerance);
    let mut reached = vec![G::identity()];
    let mut next = 0;
    while next < reached.len() {
        for g in generators {
            let product = g.compose(&reached[next]);
            require(find(elements, &product), Law::Closure, || {
                format!("{product:?} is no element")
            })?;
            if !find(&reached, &product) {
                reached.push(product);
            }
        }
        next += 1;
    }
    for g in elements {
        require(find(&reached, g), Law::Closure, || {
            format!("{g:?} is no product")
        })?;
    }
    Ok(())
}

/// Checks the action of `elements` on the tokens and maps of `grid`.
///
/// Identity, left action and inverse are checked on a smooth map with values in `[−1, 1]`, to `tolerance` in absolute
/// value, on the cells that both sides find valid; an [`EXACT`] action is checked on random values as well. Adjoint,
/// gradient, per-sample batches, maps, masks and the portable twin hold to [`ADJOINT`] for every action.
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
    let mut fields = vec![smooth(grid, rng)?];
    if tolerance == EXACT {
        fields.push(random(&[1, grid.len(), 3], rng)?);
    }
    for x in &fields {
        let identity = alone(&G::identity(), grid, resample)?;
        let gap = max_gap(x, &identity.apply(x)?, |_| true)?;
        require(gap <= tolerance, Law::ActIdentity, || {
            format!("error {gap:e}")
        })?;
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

/// The operator of `g` by itself.
fn alone<G: GroupAction>(
    g: &G,
    from: TokenGrid,
    resample: &Resample,
) -> crate::Result<GridOperator> {
    GridOperator::new(std::slice::from_ref(g), from, resample)
}

/// The largest errors of an action on one map, in absolute value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActionErrors {
    /// `act(e, x) = x`
    pub identity: f64,
    /// `act(g⁻¹, act(g, x)) = x`
    pub inverse: f64,
    /// `act(a, act(b, x)) = act(a∘b, x)`
    pub left_action: f64,
    /// The fewest cells on which two sides were compared, those that both find valid; with 0 an error says nothing.
    pub cells: usize,
}

impl ActionErrors {
    /// The largest of the three errors.
    pub fn worst(&self) -> f64 {
        self.identity.max(self.inverse).max(self.left_action)
    }
}

/// Measures what [`check_action_laws`] bounds, over all `elements` and all pairs of them, on a map `x` of one's own:
/// `(1, N, C)` on `grid`, `f64`.
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

/// `a` after `b` in three ways: as one element, as two operators one after the other, and as the product of these.
struct Product {
    element: GridOperator,
    first: GridOperator,
    second: GridOperator,
    chained: GridOperator,
}

impl Product {
    fn of<G: GroupAction>(
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

    fn twice(&self, x: &Tensor) -> Result<Tensor, Violation> {
        Ok(self.second.apply(&self.first.apply(x)?)?)
    }

    /// The largest difference of one element from two, and the number of cells that both find valid.
    fn gap(&self, x: &Tensor) -> Result<(f64, usize), Violation> {
        let both = |i: usize| is_valid(&self.element, i) && is_valid(&self.chained, i);
        let gap = max_gap(&self.element.apply(x)?, &self.twice(x)?, both)?;
        let cells = 0..self.element.out_grid().len();
        Ok((gap, cells.filter(|&i| both(i)).count()))
    }
}

/// The largest difference of `x` from there and back, and the number of valid cells.
fn inverse_gap<G: GroupAction>(
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
    require(gap <= ADJOINT, Law::Portable, || {
        format!("g = {g:?}: error {gap:e}")
    })?;

    let out = operator.out_grid();
    let map = x
        .transpose(1, 2)?
        .reshape((2, 3, grid.rows(), grid.cols()))?;
    let acted = operator.apply(&map)?.flatten_from(2)?.transpose(1, 2)?;
    let gap = max_gap(&operator.apply(&x)?, &acted, |_| true)?;
    require(gap <= ADJOINT, Law::Map, || {
        format!("g = {g:?}: error {gap:e}")
    })?;

    let ones = operator.apply(&x.ones_like()?)?;
    let gap = max_gap(&ones, &ones.ones_like()?, |i| is_valid(&operator, i))?;
    let interior = resample.padding != crate::Padding::Zeros;
    require(!interior || gap <= ADJOINT, Law::Constant, || {
        format!("g = {g:?}: error {gap:e}")
    })?;
    for i in 0..m {
        let source = g.source(out.center(i / out.cols(), i % out.cols()));
        // Within rounding of the border either answer is right.
        let depth = source
            .iter()
            .map(|&s| s.min(1.0 - s))
            .fold(f64::INFINITY, f64::min);
        let holds = depth.abs() < 1e-6 || (depth > 0.0) == is_valid(&operator, i);
        require(holds, Law::Mask, || {
            format!("g = {g:?}: cell {i} comes from {source:?}")
        })?;
    }
    Ok(())
}

/// Checks that `adjoint` is the adjoint of the linear map `apply` from tensors of `in_shape` to tensors of `out_shape`,
/// and that the gradient of `⟨apply(x), y⟩` with respect to `x` is `adjoint(y)`; in `f64`, to [`ADJOINT`].
///
/// # Errors
/// [`Law::Adjoint`] or [`Law::Gradient`] if one does not hold; errors of the two maps.
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
    require(
        (left - right).abs() <= ADJOINT * (1.0 + left.abs()),
        Law::Adjoint,
        || format!("{left} and {right}"),
    )?;
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
    for (how, acted) in [
        ("fused", batch.apply(&x)?),
        ("portable", batch.apply_portable(&x)?),
    ] {
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

fn is_valid(operator: &GridOperator, cell: usize) -> bool {
    operator.valid(0).is_none_or(|v| v[cell])
}

/// The largest absolute difference over the cells that count; NaN counts as infinite.
fn max_gap(a: &Tensor, b: &Tensor, counts: impl Fn(usize) -> bool) -> Result<f64, Violation> {
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

fn dot(a: &Tensor, b: &Tensor) -> Result<f64, Violation> {
    Ok((a * b)?.sum_all()?.to_scalar::<f64>()?)
}

fn random(shape: &[usize], rng: &mut impl Rng) -> Result<Tensor, Violation> {
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A periodic map `(1, N, 2)` of random waves with at most `band` whole periods along rows and columns, `[vertical,
/// horizontal]`, sampled at the centers of the cells; values within `[−1, 1]`, `f64`.
///
/// [`Filter::Fourier`](crate::Filter::Fourier) represents scales and cyclic shifts of it exactly wherever an axis has more
/// than `2·band` cells.
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

/// A map `(1, N, 2)` of one slow wave per channel, at most half a period across the image and not periodic; values within
/// `[−1, 1]`, `f64`. What [`check_action_laws`] measures on.
///
/// # Errors
/// Those of candle.
pub fn smooth(grid: TokenGrid, rng: &mut impl Rng) -> Result<Tensor, Violation> {
    let waves: [[f64; 3]; 2] = std::array::from_fn(|_| {
        [
            rng.random_range(-3.0..3.0),
            rng.random_range(-3.0..3.0),
            rng.random_range(0.0..6.0),
        ]
    });
    let mut values = Vec::with_capacity(2 * grid.len());
    for i in 0..grid.rows() {
        for j in 0..grid.cols() {
            let (y, x) = (
                (i as f64 + 0.5) / grid.rows() as f64,
                (j as f64 + 0.5) / grid.cols() as f64,
            );
            values.extend(waves.map(|[a, b, phase]| (a * y + b * x + phase).sin()));
        }
    }
    Ok(Tensor::from_vec(values, (1, grid.len(), 2), &Device::Cpu)?)
}
