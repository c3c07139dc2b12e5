//! The Reynolds penalty: the laws of a projection, loops, and convolutions that commute with the
//! group.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{cases, max_gap, random};
use loss_common::{assert_close, assert_finite, assert_says, differences, flat, scalar};
use proptest::prelude::*;
use ser_reg::{
    GridOperator, Resample, TokenGrid,
    contrib::{RegularRep, ReynoldsPenalty, WeightSpace},
    group::{
        D4, GroupAction,
        Representation::{self, Regular, Trivial},
        Subgroup,
    },
};

const CPU: &Device = &Device::Cpu;

fn kernel(output: Representation, input: Representation) -> WeightSpace {
    WeightSpace::Kernel { output, input }
}

fn reynolds(group: Subgroup, space: WeightSpace) -> ReynoldsPenalty {
    ReynoldsPenalty { group, space, relative: false, ..Default::default() }
}

fn inner(a: &Tensor, b: &Tensor) -> f64 {
    flat(a).iter().zip(flat(b)).map(|(a, b)| a * b).sum()
}

/// A group, a space on which it acts, and the shape of a weight.
fn case() -> impl Strategy<Value = (ReynoldsPenalty, Vec<usize>)> {
    let sides = (0usize..10, 1usize..=5, 1usize..=5);
    let kind = (any::<bool>(), any::<bool>(), any::<bool>(), 0usize..3);
    (sides, kind).prop_map(|((group, rows, cols), (output, input, table, prefix))| {
        let group = Subgroup::ALL[group];
        let swaps = group.elements().iter().any(|g| g.swaps_axes());
        let cols = if swaps { rows } else { cols };
        let side = |regular| if regular { Regular(group) } else { Trivial };
        let (output, input) = (side(output), side(input));
        if table {
            let grid = TokenGrid::new(rows, cols).unwrap();
            let space = WeightSpace::Table { grid, prefix };
            (reynolds(group, space), vec![1, prefix + rows * cols, 3])
        } else {
            let shape = vec![2 * output.size(), input.size(), rows, cols];
            (reynolds(group, kernel(output, input)), shape)
        }
    })
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn the_average_is_an_orthogonal_projection((penalty, shape) in case(), seed: u64) {
        let (w, v) = (random(&shape, seed), random(&shape, seed ^ 1));
        // Entries are means of at most eight numbers below 1. The rounding of a sum of n ≤ 3200
        // products is at most n·ε of the squared norms.
        let (entry, total) = (1e-14, 2e-12 * (inner(&w, &w) + inner(&v, &v)));
        let (pw, pv) = (penalty.project(&w).unwrap(), penalty.project(&v).unwrap());
        prop_assert!(max_gap(&penalty.project(&pw).unwrap(), &pw) < entry, "idempotent");
        prop_assert!((inner(&pw, &v) - inner(&w, &pv)).abs() < total, "self-adjoint");
        let sum = (penalty.project(&(&w + &v).unwrap()).unwrap() - (pw.clone() + pv).unwrap()).unwrap();
        prop_assert!(inner(&sum, &sum) < entry * entry * w.elem_count() as f64, "linear");
        let loss = scalar(&penalty.forward(&w).unwrap());
        prop_assert!((inner(&w, &w) - inner(&pw, &pw) - loss).abs() < total, "Pythagoras");
        prop_assert!(scalar(&penalty.forward(&pw).unwrap()) < entry * entry * w.elem_count() as f64);
        if matches!(penalty.space, WeightSpace::Kernel { .. }) {
            let relative = ReynoldsPenalty { relative: true, eps: 0., ..penalty };
            let share = scalar(&relative.forward(&w).unwrap());
            prop_assert!((share - loss / inner(&w, &w)).abs() < 1e-12 && (0.0..=1.0 + 1e-12).contains(&share));
            let scaled = scalar(&relative.forward(&(&w * 1e3).unwrap()).unwrap());
            prop_assert!((scaled - share).abs() < 1e-12, "the size of the weight does not matter");
        }
    }

    #[test]
    fn the_average_matches_a_loop((penalty, shape) in case(), seed: u64) {
        let w = random(&shape, seed);
        let ours = flat(&penalty.project(&w).unwrap());
        let loops = average(&penalty, &shape, &flat(&w));
        for (i, (a, b)) in ours.iter().zip(&loops).enumerate() {
            prop_assert!((a - b).abs() < 1e-14, "element {}: {} and {}", i, a, b);
        }
    }

    #[test]
    fn the_gradient_is_twice_the_rest((penalty, shape) in case(), seed: u64) {
        let w = Var::from_tensor(&random(&shape, seed)).unwrap();
        let grads = penalty.forward(&w).unwrap().backward().unwrap();
        let rest = ((w.as_tensor() - penalty.project(&w).unwrap()).unwrap() * 2.).unwrap();
        prop_assert!(max_gap(grads.get(&w).unwrap(), &rest) < 1e-14);
    }
}

/// `1/|G| Σ_g g·W` by loops over elements, channels and cells.
fn average(penalty: &ReynoldsPenalty, shape: &[usize], w: &[f64]) -> Vec<f64> {
    let elements = penalty.group.elements();
    let order = elements.len();
    // ρ(g) takes channel h of a block to channel g∘h.
    let channel = |representation: Representation, g: D4, c: usize| match representation {
        Trivial => c,
        Regular(group) => {
            let (elements, order) = (group.elements(), group.order());
            let to = g.compose(&elements[c % order]);
            c - c % order + elements.iter().position(|e| *e == to).unwrap()
        }
    };
    let cell = |g: D4, rows: usize, cols: usize, i: usize, j: usize| {
        // The value at a cell comes from the source of its center.
        let center = [(i as f64 + 0.5) / rows as f64, (j as f64 + 0.5) / cols as f64];
        let [y, x] = g.source(center);
        ((y * rows as f64).floor() as usize, (x * cols as f64).floor() as usize)
    };
    let mut out = vec![0.; w.len()];
    match penalty.space {
        WeightSpace::Kernel { output, input } => {
            let [o, n, rows, cols] = *shape else { panic!("a kernel") };
            let at = |a, b, i, j| ((a * n + b) * rows + i) * cols + j;
            for &g in elements {
                for (a, b) in (0..o).flat_map(|a| (0..n).map(move |b| (a, b))) {
                    for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                        let (y, x) = cell(g, rows, cols, i, j);
                        let to = at(channel(output, g, a), channel(input, g, b), i, j);
                        out[to] += w[at(a, b, y, x)] / order as f64;
                    }
                }
            }
        }
        WeightSpace::Table { grid, prefix } => {
            let c = shape[2];
            out[..prefix * c].copy_from_slice(&w[..prefix * c]);
            for &g in elements {
                for n in 0..grid.len() {
                    let (y, x) =
                        cell(g, grid.rows(), grid.cols(), n / grid.cols(), n % grid.cols());
                    for k in 0..c {
                        let from = (prefix + y * grid.cols() + x) * c + k;
                        out[(prefix + n) * c + k] += w[from] / order as f64;
                    }
                }
            }
        }
    }
    out
}

#[test]
fn gradients_match_differences() -> Result<()> {
    let grid = TokenGrid::square(3).unwrap();
    let spaces = [
        (kernel(Regular(Subgroup::C4), Trivial), vec![4, 1, 3, 3]),
        (WeightSpace::Table { grid, prefix: 1 }, vec![1, 10, 2]),
    ];
    for (space, shape) in spaces {
        for relative in [false, true] {
            let penalty = ReynoldsPenalty { relative, ..reynolds(Subgroup::C4, space) };
            let w = Var::from_tensor(&random(&shape, 3))?;
            let value = |x: &[f64]| {
                let x = Tensor::from_slice(x, shape.clone(), CPU).unwrap();
                scalar(&penalty.forward(&x).unwrap())
            };
            let grads = penalty.forward(&w)?.backward()?;
            let grad = flat(grads.get(&w).expect("a gradient"));
            assert_close(&grad, &differences(&flat(&w), 1e-5, value), 1e-8);
        }
    }
    Ok(())
}

/// The action on a map: `g` on the grid, then `ρ(g)` on the channels.
fn act(g: D4, representation: Representation, x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let grid = TokenGrid::new(h, w)?;
    let x = GridOperator::new(&[g], grid, &Resample::default())?.apply(x)?;
    let Regular(group) = representation else {
        return Ok(x);
    };
    let (h, w) = (x.dim(2)?, x.dim(3)?);
    let rows = x.permute((0, 2, 3, 1))?.reshape((b * h * w, c))?;
    let rows = RegularRep::new(group).apply(&[g], &rows)?;
    rows.reshape((b, h, w, c))?.permute((0, 3, 1, 2))
}

/// A projected convolution commutes with the group. The same weights before the projection do not,
/// and neither do the projected weights with another representation on the output.
#[test]
fn a_projected_convolution_commutes_with_the_group() -> Result<()> {
    for group in Subgroup::ALL {
        let m = group.order();
        let (own, whole) = (Regular(group), Regular(Subgroup::D4));
        for (output, input, o, i) in [
            (Trivial, Trivial, 3, 2),
            (own, Trivial, 2 * m, 2),
            (own, own, 2 * m, m),
            (Trivial, own, 3, m),
            // The regular representation of a larger group.
            (whole, Trivial, 8, 2),
        ] {
            // A 3×3 convolution, and a patch embedding with the stride of its kernel.
            for (side, padding, stride) in [(3, 1, 1), (4, 0, 4)] {
                let penalty = reynolds(group, kernel(output, input));
                let w = random(&[o, i, side, side], 5);
                let projected = penalty.project(&w)?;
                let x = random(&[2, i, 8, 8], 6);
                let broken = |w: &Tensor, output: Representation| -> Result<f64> {
                    let f = |x: &Tensor| x.contiguous()?.conv2d(w, padding, stride, 1, 1);
                    let mut gap = 0f64;
                    for &g in group.elements() {
                        let (turned, map) = (f(&act(g, input, &x)?)?, act(g, output, &f(&x)?)?);
                        gap = gap.max(max_gap(&turned, &map));
                    }
                    Ok(gap)
                };
                let what = format!("{group:?}, {output:?} of {input:?}, {side}x{side}");
                let gap = broken(&projected, output)?;
                assert!(gap < 1e-12, "{what}: {gap}");
                if group != Subgroup::Trivial {
                    let gap = broken(&w, output)?;
                    assert!(gap > 1e-2, "{what}: unprojected {gap}");
                    if output != Trivial {
                        let gap = broken(&projected, Trivial)?;
                        assert!(gap > 1e-2, "{what}: another representation {gap}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn closed_forms() -> Result<()> {
    // An odd weight has no symmetric part.
    let penalty = ReynoldsPenalty { group: Subgroup::HFlip, ..Default::default() };
    let odd = Tensor::new(&[[[[-1f64, 0., 1.]]]], CPU)?;
    assert_close(&[scalar(&penalty.forward(&odd)?)], &[1.], 1e-11);
    // White noise on n cells keeps |orbits|/n of its squared norm. D4 has three orbits on 3×3
    // cells.
    let cells = Tensor::eye(9, DType::F64, CPU)?.reshape((9, 1, 3, 3))?;
    let kept = 9. - scalar(&reynolds(Subgroup::D4, WeightSpace::default()).forward(&cells)?);
    assert_close(&[kept], &[3.], 1e-13);
    // The trivial group has no penalty.
    let w = random(&[2, 3, 2, 5], 1);
    let nothing = reynolds(Subgroup::Trivial, WeightSpace::default());
    assert_eq!(scalar(&nothing.forward(&w)?), 0.);
    Ok(())
}

#[test]
fn prefix_rows_are_left_alone() -> Result<()> {
    let grid = TokenGrid::new(2, 3).unwrap();
    let penalty = |prefix| reynolds(Subgroup::Flips, WeightSpace::Table { grid, prefix });
    let table = random(&[1, 8, 4], 2);
    let projected = penalty(2).project(&table)?;
    assert_eq!(max_gap(&projected.narrow(1, 0, 2)?, &table.narrow(1, 0, 2)?), 0.);
    let cells = table.narrow(1, 2, 6)?;
    assert_eq!(scalar(&penalty(2).forward(&table)?), scalar(&penalty(0).forward(&cells)?));
    // A table may have no leading axis, several tables, or strides.
    assert_eq!(
        projected.squeeze(0)?.to_vec2::<f64>()?,
        penalty(2).project(&table.squeeze(0)?)?.to_vec2::<f64>()?
    );
    let transposed = table.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    assert_eq!(max_gap(&penalty(2).project(&transposed)?, &projected), 0.);
    Ok(())
}

#[test]
fn zero_weights_and_half_precision() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let penalty =
            ReynoldsPenalty { space: kernel(Regular(Subgroup::D4), Trivial), ..Default::default() };
        let zero = Var::zeros((8, 2, 3, 3), dtype, CPU)?;
        let loss = penalty.forward(&zero)?;
        assert_eq!((scalar(&loss), loss.dtype()), (0., wide));
        let grads = loss.backward()?;
        let grad = grads.get(&zero).expect("a gradient");
        assert_eq!(grad.dtype(), dtype);
        assert_finite(grad);

        // The square of 200 overflows f16.
        let w = (random(&[8, 2, 3, 3], 4) * 200.)?.to_dtype(dtype)?;
        assert_eq!(penalty.project(&w)?.dtype(), dtype);
        let exact = penalty.forward(&w.to_dtype(DType::F64)?)?;
        assert_close(&[scalar(&penalty.forward(&w)?)], &[scalar(&exact)], 1e-6);
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let w = random(&[6, 2, 3, 4], 1);
    let say = |penalty: ReynoldsPenalty, w: &Tensor, parts: &[&str]| {
        assert_says(penalty.forward(w), &[&["Reynolds"], parts].concat());
        assert_says(penalty.project(w), &[&["Reynolds"], parts].concat());
    };
    let plain = kernel(Trivial, Trivial);
    say(reynolds(Subgroup::C4, plain), &w, &["square grid for C4", "Flips", "3x4"]);
    say(reynolds(Subgroup::Transpose, plain), &w, &["square grid", "3x4"]);
    say(reynolds(Subgroup::C2, plain), &w.flatten_from(2)?, &["(O, I, kh, kw)", "[6, 2, 12]"]);
    say(
        reynolds(Subgroup::C2, plain),
        &w.narrow(1, 0, 0)?,
        &["at least one element", "[6, 0, 3, 4]"],
    );
    say(
        reynolds(Subgroup::Flips, kernel(Regular(Subgroup::Flips), Trivial)),
        &w,
        &["multiple of 4 output channels", "Flips", "got 6"],
    );
    say(
        reynolds(Subgroup::Flips, kernel(Trivial, Regular(Subgroup::Flips))),
        &w,
        &["multiple of 4 input channels", "got 2"],
    );
    say(
        reynolds(Subgroup::Flips, kernel(Regular(Subgroup::C2), Trivial)),
        &w,
        &["output channels", "contains Flips", "got C2"],
    );
    say(reynolds(Subgroup::C2, plain), &w.to_dtype(DType::I64)?, &["f16, bf16, f32 or f64", "i64"]);
    let grid = TokenGrid::new(3, 4).unwrap();
    let table = |prefix| WeightSpace::Table { grid, prefix };
    let pos = random(&[1, 13, 4], 1);
    say(reynolds(Subgroup::C2, table(0)), &pos, &["(…, 12, C)", "prefix", "[1, 13, 4]"]);
    say(reynolds(Subgroup::C2, table(usize::MAX)), &pos, &["prefix rows", "[1, 13, 4]"]);
    say(reynolds(Subgroup::D4, table(1)), &pos, &["square grid for D4", "3x4"]);
    say(reynolds(Subgroup::C2, table(1)), &Tensor::new(1f32, CPU)?, &["(…, 13, C)", "[]"]);
    for eps in [-1., f64::NAN] {
        let penalty = ReynoldsPenalty { eps, ..Default::default() };
        assert_says(penalty.forward(&w), &["ReynoldsPenalty::eps", "at least 0", &eps.to_string()]);
    }
    Ok(())
}
