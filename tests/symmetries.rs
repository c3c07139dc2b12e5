//! Symmetries that the paper does not have: the Fourier filter, cyclic shifts, continuous poses and
//! what has no overlap.

mod common;

use candle_core::{Device, Tensor};
use common::{assert_gradient, assert_says, cases, max_gap, random, rng, values};
use proptest::prelude::*;
use ser_reg::{
    Filter, GridOperator, GroupAction, MapPair, Padding, Resample, SerConfig, SerLoss, TokenGrid,
    group::{Affine, D4, Element, Point, Roll, Scale, Window},
    operator::OperatorKind,
    testing::{self, EXACT, POINTS},
    view::Relative,
};

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

fn fourier() -> Resample {
    Filter::Fourier.into()
}

fn between(from: TokenGrid, to: TokenGrid) -> GridOperator {
    GridOperator::new(&[Scale::to_grid(from, to)], from, &fourier()).unwrap()
}

/// The definition through the discrete Fourier transform, one axis: coefficients of cells at
/// half-cell centers, those beyond the band dropped, the sum of what is left at the target's
/// centers. At an even band the Nyquist coefficient is split between both signs where cells are
/// added, and both signs are kept where they are taken away.
fn slow_fourier(x: &[f64], m: usize, shift: f64) -> Vec<f64> {
    use std::f64::consts::TAU;
    let n = x.len();
    let band = n.min(m);
    let center = |i: usize, n: usize| (i as f64 + 0.5) / n as f64;
    let coefficient = |k: i64| {
        let angle = |j| -TAU * k as f64 * center(j, n);
        let sum = |f: fn(f64) -> f64| -> f64 { (0..n).map(|j| x[j] * f(angle(j))).sum() };
        (sum(f64::cos) / n as f64, sum(f64::sin) / n as f64)
    };
    let weight = |k: i64| match (2 * k.unsigned_abs() as usize).cmp(&band) {
        std::cmp::Ordering::Less => 1.0,
        std::cmp::Ordering::Equal if m >= n => 0.5,
        std::cmp::Ordering::Equal => 1.0,
        std::cmp::Ordering::Greater => 0.0,
    };
    let value = |i| {
        let terms = (-(n as i64)..=n as i64).filter(|&k| weight(k) > 0.0);
        let term = |k: i64| {
            let ((re, im), angle) = (coefficient(k), TAU * k as f64 * (center(i, m) - shift));
            weight(k) * (re * angle.cos() - im * angle.sin())
        };
        terms.map(term).sum()
    };
    (0..m).map(value).collect()
}

#[test]
fn fourier_matches_the_transform() {
    for n in 1..=9 {
        let x = random(&[1, n, 1], n as u64);
        for m in 1..=9 {
            let y = between(grid(n, 1), grid(m, 1)).apply(&x).unwrap();
            let want = slow_fourier(&values(&x), m, 0.0);
            for (got, want) in values(&y).iter().zip(&want) {
                assert!((got - want).abs() < 1e-12, "{n} to {m}: {got}, not {want}");
            }
        }
        for shift in [0.03, 0.25, 0.61] {
            let roll = Roll::new(shift, 0.0).unwrap();
            let operator = GridOperator::new(&[roll], grid(n, 1), &fourier()).unwrap();
            let want = slow_fourier(&values(&x), n, shift);
            for (got, want) in values(&operator.apply(&x).unwrap()).iter().zip(&want) {
                assert!((got - want).abs() < 1e-12, "{n} by {shift}: {got}, not {want}");
            }
        }
    }
}

/// The law of the issue: `ρ(s1)·ρ(s2) = ρ(s1·s2)` on maps band-limited below the smallest grid of
/// the chain.
#[test]
fn fourier_scales_compose_exactly_on_band_limited_maps() {
    let sides = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 17];
    let mut worst = 0.0f64;
    for from in sides {
        for middle in sides {
            for to in sides {
                // another chain along the columns, other parities
                let (from, middle, to) = (grid(from, to), grid(middle, from), grid(to, middle));
                let below = |a: usize, b: usize, c: usize| (a.min(b).min(c) - 1) / 2;
                let band = [
                    below(from.rows(), middle.rows(), to.rows()),
                    below(from.cols(), middle.cols(), to.cols()),
                ];
                let x = testing::band_limited(from, band, &mut rng(from.len() as u64)).unwrap();
                let twice = between(middle, to).apply(&between(from, middle).apply(&x).unwrap());
                let once = between(from, to).apply(&x).unwrap();
                worst = worst.max(max_gap(&once, &twice.unwrap()));
                // and both are the map itself, sampled on the other grid
                let sampled = testing::band_limited(to, band, &mut rng(from.len() as u64)).unwrap();
                worst = worst.max(max_gap(&once, &sampled));
            }
        }
    }
    assert!(worst < 1e-10, "{worst:e}");
}

/// On any map, the highest frequencies of even sides included: larger and back is the identity,
/// larger twice and smaller twice are larger and smaller once.
#[test]
fn fourier_chains_of_one_direction_are_exact_on_every_map() {
    for (a, b, c) in [(4, 6, 9), (5, 6, 8), (6, 7, 14), (2, 3, 4), (1, 2, 5)] {
        let (a, b, c) = (grid(a, 3), grid(b, 3), grid(c, 3));
        let x = random(&[1, a.len(), 2], 1);
        let up = between(a, b).apply(&x).unwrap();
        assert!(max_gap(&between(b, a).apply(&up).unwrap(), &x) < 1e-12);
        let (twice, once) = (between(b, c).apply(&up).unwrap(), between(a, c).apply(&x).unwrap());
        assert!(max_gap(&twice, &once) < 1e-12);
        let y = random(&[1, c.len(), 2], 2);
        let down = between(c, b).apply(&y).unwrap();
        let (twice, once) = (between(b, a).apply(&down).unwrap(), between(c, a).apply(&y).unwrap());
        assert!(max_gap(&twice, &once) < 1e-12);
    }
    // A smaller grid loses what lies above its band.
    let x = random(&[1, 8, 1], 3);
    let there = between(grid(8, 1), grid(4, 1)).apply(&x).unwrap();
    assert!(max_gap(&between(grid(4, 1), grid(8, 1)).apply(&there).unwrap(), &x) > 0.1);
}

#[test]
fn fourier_scales_commute_with_flips_and_turns() {
    for (from, to) in [
        (grid(5, 8), grid(7, 6)),
        (grid(4, 4), grid(9, 3)),
        (grid(6, 7), grid(4, 7)),
        (grid(8, 3), grid(5, 12)),
    ] {
        let x = random(&[1, from.len(), 2], 4);
        for g in D4::ALL {
            let turn = |at| GridOperator::new(&[g], at, &fourier()).unwrap();
            let (turned_from, turned_to) = (g.out_grid(from).unwrap(), g.out_grid(to).unwrap());
            let one = turn(to).apply(&between(from, to).apply(&x).unwrap()).unwrap();
            let two = between(turned_from, turned_to).apply(&turn(from).apply(&x).unwrap());
            assert!(max_gap(&one, &two.unwrap()) < 1e-12, "{g:?} {from} {to}");
        }
    }
}

#[test]
fn the_law_suite_holds_fourier_to_its_tolerance() {
    for (rows, cols) in [(7, 8), (12, 9), (16, 16)] {
        let grid = grid(rows, cols);
        let x = testing::band_limited(grid, [2, 2], &mut rng(5)).unwrap();
        // The smallest grid of a chain has 5 rows or columns.
        let scales = [(0.9, 1.0), (1.5, 0.8), (1.0, 2.0)].map(|(y, x)| Scale::new(y, x).unwrap());
        let shifts = [(0.1, 0.37), (0.5, -0.2)].map(|(y, x)| Roll::new(y, x).unwrap());
        let scaled = testing::action_errors(&scales, &x, grid, &fourier()).unwrap();
        let shifted = testing::action_errors(&shifts, &x, grid, &fourier()).unwrap();
        assert!(scaled.worst() < 1e-10 && scaled.cells > 0, "{scaled:?}");
        assert!(shifted.worst() < 1e-10 && shifted.cells == grid.len(), "{shifted:?}");
        testing::check_action_laws(&scales, grid, &fourier(), f64::MAX, &mut rng(6)).unwrap();
        testing::check_action_laws(&shifts, grid, &fourier(), f64::MAX, &mut rng(7)).unwrap();
        let turned = scales.map(|s| Element::from(s).then(D4::TRANSPOSE));
        testing::check_action_laws(&turned, grid, &fourier(), f64::MAX, &mut rng(8)).unwrap();
    }
}

#[test]
fn fourier_has_the_gradient_of_central_differences() {
    let (from, to) = (grid(4, 5), grid(6, 4));
    let operators = [
        GridOperator::between(&[D4::IDENTITY, D4::ROT90], from, to, &fourier()).unwrap(),
        GridOperator::new(
            &[Roll::new(0.1, 0.3).unwrap(), Roll::new(0.7, 0.25).unwrap()],
            from,
            &fourier(),
        )
        .unwrap(),
    ];
    for operator in operators {
        let weights = random(&[2, operator.out_grid().len(), 2], 1);
        let loss = |x: &Tensor| {
            let y = operator.apply(x).unwrap().sqr().unwrap();
            (y * &weights).unwrap().sum_all().unwrap()
        };
        assert_gradient(&random(&[2, from.len(), 2], 2), 1e-7, loss);
    }
}

#[test]
fn fourier_names_what_it_cannot_do() {
    let grid = grid(6, 6);
    for padding in [Padding::Zeros, Padding::Border, Padding::Reflection] {
        let resample = Resample { filter: Filter::Fourier, padding };
        let padding = format!("{padding:?}");
        assert_says(
            GridOperator::new(&[D4::ROT90], grid, &resample),
            &["Padding::Periodic", "Resample::from", &padding],
        );
    }
    let broken: [Element; 4] = [
        Window::new(0.1, 0.2, 0.5, 0.5).unwrap().into(),
        Affine::zoom(1.5, 1.0).unwrap().into(),
        Affine::rotation(30.0).unwrap().into(),
        Affine::shear(0.1, 0.0).unwrap().into(),
    ];
    for g in broken {
        assert_says(
            GridOperator::new(&[g], grid, &fourier()),
            &["Filter::Fourier", "Filter::Bicubic", &format!("{g:?}")],
        );
    }
    let squeezed = GridOperator::new(&[Squeeze], grid, &fourier());
    assert_says(squeezed, &["keep the period"]);
    // Shifts keep the period. They read the periodic map, and the mask marks cells from beyond the
    // border.
    let shift = Affine::translation(0.0, 0.5).unwrap();
    let operator = GridOperator::new(&[shift], grid, &fourier()).unwrap();
    assert_eq!(operator.valid(0).unwrap().unwrap()[..6], [false, false, false, true, true, true]);
}

/// Not affine, and of another period along the rows.
#[derive(Clone, Debug, PartialEq)]
struct Squeeze;

impl GroupAction for Squeeze {
    fn identity() -> Self {
        Self
    }
    fn compose(&self, _: &Self) -> Self {
        Self
    }
    fn inverse(&self) -> Self {
        Self
    }
    fn source(&self, [y, x]: Point) -> Point {
        [y / 2.0, x]
    }
}

#[test]
fn rolls_by_whole_cells_are_exact_and_a_finite_group() {
    let grid = grid(3, 4);
    let all: Vec<Roll> = (0..12).map(|i| Roll::from_cells(i / 4, i % 4, grid).unwrap()).collect();
    let generators = [(1, 0), (0, -1)].map(|(y, x)| Roll::from_cells(y, x, grid).unwrap());
    testing::check_closure(&generators, &all, POINTS).unwrap();
    testing::check_group_laws(&all, POINTS).unwrap();
    for filter in Filter::ALL {
        testing::check_action_laws(&all, grid, &filter.into(), EXACT, &mut rng(1)).unwrap();
        assert!(GridOperator::new(&all, grid, &filter.into()).unwrap().is_exact());
    }
    // As the definition says, in any type.
    let x = Tensor::arange(0u32, 12, &Device::Cpu).unwrap().reshape((1, 12, 1)).unwrap();
    let rolled = GridOperator::new(&[Roll::from_cells(1, 2, grid).unwrap()], grid, &fourier());
    let y = rolled.unwrap().apply(&x).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
    assert_eq!(y, [10, 11, 8, 9, 2, 3, 0, 1, 6, 7, 4, 5]);
}

#[test]
fn rolls_by_fractions_are_separable_and_wrap_around() {
    let grid = grid(5, 6);
    let roll = Roll::new(0.13, 0.4).unwrap();
    for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Fourier] {
        let resample = Resample { filter, padding: Padding::Periodic };
        let operator = GridOperator::new(&[roll], grid, &resample).unwrap();
        assert_eq!(operator.kind(), OperatorKind::Separable);
        assert!(operator.valid(0).unwrap().is_none());
        // A convolution on the torus: it commutes with shifts by whole cells, across the seam too.
        let whole = Roll::from_cells(2, 3, grid).unwrap();
        let whole = GridOperator::new(&[whole], grid, &resample).unwrap();
        let x = random(&[1, 30, 2], 9);
        let one = whole.apply(&operator.apply(&x).unwrap()).unwrap();
        let two = operator.apply(&whole.apply(&x).unwrap()).unwrap();
        assert!(max_gap(&one, &two) < 1e-12, "{filter:?}");
    }
    for bad in [f64::NAN, f64::INFINITY] {
        let message = Roll::new(bad, 0.0).unwrap_err().to_string();
        assert!(message.contains("Roll: expected a finite shift"), "{message}");
    }
}

proptest! {
    #![proptest_config(cases(32))]

    /// Any shift of a map with less than half a period per cell, odd and even sides alike.
    #[test]
    fn fourier_shifts_compose_exactly(
        rows in 3usize..=12, cols in 3usize..=12, a in common::roll(), b in common::roll(), seed: u64,
    ) {
        let grid = grid(rows, cols);
        let x = testing::band_limited(grid, [(rows - 1) / 2, (cols - 1) / 2], &mut rng(seed)).unwrap();
        let errors = testing::action_errors(&[a, b], &x, grid, &fourier()).unwrap();
        prop_assert!(errors.worst() < 1e-10, "{:?}", errors);
    }

    /// Wherever a continuous map is invalid its cell gets no gradient through the loss, and drops
    /// out of it.
    #[test]
    fn poses_mask_what_they_lose(angle in 5f64..85.0, dy in -0.3f64..0.3, dx in -0.3f64..0.3, shear in -0.4f64..0.4) {
        let grid = grid(9, 12);
        let g = Affine::translation(dy, dx).unwrap()
            .compose(&Affine::rotation_on(angle, grid, grid).unwrap())
            .compose(&Affine::shear(shear, 0.0).unwrap());
        let operator = GridOperator::new(&[g], grid, &Resample::default()).unwrap();
        for i in 0..grid.len() {
            let [y, x] = g.source(grid.center(i / 12, i % 12));
            let inside = (0.0..=1.0).contains(&y) && (0.0..=1.0).contains(&x);
            prop_assert_eq!(operator.valid(0).unwrap().is_none_or(|v| v[i]), inside);
        }
        let share = Relative::new(vec![g], grid, grid).unwrap().overlap().unwrap()[0];
        let valid = operator.valid(0).unwrap().map_or(108, |v| v.iter().filter(|&&v| v).count());
        prop_assert!(share <= valid as f64 / 108.0);
    }
}

/// Tolerances on smooth maps of 16x16 tokens, half a wave across them: the largest error of
/// identity, inverse and composition over 20 draws, and what `docs/symmetries.md` states. Turns of
/// the plane by any angle are limited by the filter alone, and bicubic is the better one.
#[test]
fn continuous_symmetries_hold_to_the_stated_tolerance() {
    let grid = grid(16, 16);
    let rotations: Vec<Affine> = [10.0, 33.0, -75.0].map(|a| Affine::rotation(a).unwrap()).into();
    let shifts: Vec<Affine> =
        [(0.1, -0.07), (0.03, 0.2)].map(|(y, x)| Affine::translation(y, x).unwrap()).into();
    let shears: Vec<Affine> =
        [(0.2, 0.0), (0.0, -0.3)].map(|(y, x)| Affine::shear(y, x).unwrap()).into();
    for (name, elements, bilinear, bicubic) in [
        ("rotations", &rotations, ROTATION[0], ROTATION[1]),
        ("shifts", &shifts, SHIFT[0], SHIFT[1]),
        ("shears", &shears, SHEAR[0], SHEAR[1]),
    ] {
        for (filter, tolerance) in [(Filter::Bilinear, bilinear), (Filter::Bicubic, bicubic)] {
            let mut worst = 0.0f64;
            for seed in 0..20 {
                let x = testing::smooth(grid, &mut rng(seed)).unwrap();
                let errors = testing::action_errors(elements, &x, grid, &filter.into()).unwrap();
                assert!(errors.cells > 50, "{name}: {} cells", errors.cells);
                worst = worst.max(errors.worst());
            }
            println!("{name} {filter:?}: {worst:.4}");
            assert!(worst <= tolerance, "{name} {filter:?}: {worst} above {tolerance}");
        }
    }
}

/// Bilinear and bicubic.
const ROTATION: [f64; 2] = [0.09, 0.06];
const SHIFT: [f64; 2] = [0.11, 0.065];
const SHEAR: [f64; 2] = [0.09, 0.075];

#[test]
fn a_pose_that_leaves_no_overlap_is_an_error() {
    let ser = SerLoss::new(SerConfig::default()).unwrap();
    let grid = grid(1, 8);
    let map = random(&[2, 8, 4], 1);
    let loss = |g: Affine| {
        let relative = Relative::new(vec![g, g], grid, grid).unwrap();
        let pair = MapPair::new([&map, &map], &relative);
        ser.forward(&pair).map(|out| out.anchors)
    };
    // An angle: of a row of tokens turned about a point far off, none stays.
    let aside = Affine::translation(2.0, 0.0).unwrap();
    let turn = Affine::rotation(40.0).unwrap();
    let about = aside.compose(&turn).compose(&aside.inverse());
    for g in
        [about, Affine::translation(0.0, 1.0).unwrap(), Affine::translation(-1.1, 0.2).unwrap()]
    {
        let message = loss(g).unwrap_err().to_string();
        for part in ["at least one token", "smaller angles and shifts", "min_overlap", "2 images"] {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
    assert_eq!(loss(Affine::translation(0.0, 0.5).unwrap()).unwrap(), 16);
}
