//! Grid operators against their definition, central differences, every dtype, and bad input.

mod common;

use std::rc::Rc;

use candle_core::{DType, Device, Tensor, Var};
use common::{
    LOCAL, PADDINGS, affine, assert_gradient, assert_says, cases, element, grid, max_gap, random,
    rng, values,
};
use proptest::prelude::*;
use ser_reg::{
    Channels, Filter, GridOperator, GroupAction, Layout, Padding, Resample, TokenGrid,
    group::{Affine, D4, Element, Scale, Window},
    operator::OperatorKind,
    testing,
};

/// The definition, cell by cell: `y(p) = Σ_ij k(v − i)·k(u − j)·x[i, j]` with `(v, u) = g⁻¹p` in
/// cells and the grid continued beyond its border.
fn by_definition(
    g: &impl GroupAction,
    x: &[f64],
    from: TokenGrid,
    to: TokenGrid,
    resample: &Resample,
) -> Vec<f64> {
    let kernel = |d: f64| match resample.filter {
        Filter::Bilinear => (1.0 - d.abs()).max(0.0),
        Filter::Bicubic => {
            let (a, d) = (-0.75, d.abs());
            if d < 1.0 {
                (a + 2.0) * d.powi(3) - (a + 3.0) * d.powi(2) + 1.0
            } else if d < 2.0 {
                a * d.powi(3) - 5.0 * a * d.powi(2) + 8.0 * a * d - 4.0 * a
            } else {
                0.0
            }
        }
        _ => unreachable!("only interpolating kernels"),
    };
    let continued = |i: i64, n: usize| -> Option<usize> {
        let n = n as i64;
        let mirror = |i: i64| {
            let mut i = i;
            while !(0..n).contains(&i) {
                i = if i < 0 { -1 - i } else { 2 * n - 1 - i };
            }
            i
        };
        match resample.padding {
            Padding::Zeros => (0..n).contains(&i).then_some(i as usize),
            Padding::Border => Some(i.max(0).min(n - 1) as usize),
            Padding::Reflection => Some(mirror(i) as usize),
            Padding::Periodic => Some(i.rem_euclid(n) as usize),
        }
    };
    let mut out = Vec::new();
    for i in 0..to.rows() {
        for j in 0..to.cols() {
            let [y, x_] = g.source(to.center(i, j));
            let (v, u) = (y * from.rows() as f64 - 0.5, x_ * from.cols() as f64 - 0.5);
            let mut sum = 0.0;
            for a in v.floor() as i64 - 3..=v.floor() as i64 + 3 {
                for b in u.floor() as i64 - 3..=u.floor() as i64 + 3 {
                    if let (Some(a_in), Some(b_in)) =
                        (continued(a, from.rows()), continued(b, from.cols()))
                    {
                        sum += kernel(v - a as f64)
                            * kernel(u - b as f64)
                            * x[a_in * from.cols() + b_in];
                    }
                }
            }
            out.push(sum);
        }
    }
    out
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn apply_matches_the_definition(g in element(), from in grid(), to in grid(), cubic: bool, pad in 0usize..4, seed: u64) {
        let resample = Resample {
            filter: if cubic { Filter::Bicubic } else { Filter::Bilinear },
            padding: PADDINGS[pad],
        };
        let x = random(&[1, from.len(), 1], seed);
        let operator = GridOperator::between(&[g], from, to, &resample).unwrap();
        let want = by_definition(&g, &values(&x), from, to, &resample);
        for (i, (w, y)) in want.iter().zip(values(&operator.apply(&x).unwrap())).enumerate() {
            prop_assert!((w - y).abs() < 1e-7, "cell {i}: {y}, not {w}");
        }
    }

    #[test]
    fn fused_equals_portable_for_mixed_batches(
        g in prop::collection::vec(element(), 1..=5), from in grid(), to in grid(), f in 0usize..6, seed: u64,
    ) {
        let filter = LOCAL[f];
        let operator = GridOperator::between(&g, from, to, &filter.into()).unwrap();
        let x = random(&[g.len(), from.len(), 3], seed);
        prop_assert!(max_gap(&operator.apply(&x).unwrap(), &operator.apply_portable(&x).unwrap()) < testing::ADJOINT);
    }

    #[test]
    fn single_precision_stays_near_double(g in affine(), from in grid(), to in grid(), seed: u64) {
        let operator = GridOperator::between(&[g], from, to, &Resample::default()).unwrap();
        let x = random(&[2, from.len(), 3], seed);
        let want = operator.apply(&x).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let got = operator.apply(&x.to_dtype(dtype).unwrap()).unwrap();
            prop_assert_eq!(got.dtype(), dtype);
            // input rounding and the sum of absolute cubic weights, at most 1.6 squared, add up to
            // a few units
            prop_assert!(max_gap(&want, &got) < 8.0 * testing::tolerance(dtype), "{:?}", dtype);
        }
    }
}

#[test]
fn every_filter_has_the_gradient_of_central_differences() {
    let (from, to) = (TokenGrid::new(4, 5).unwrap(), TokenGrid::new(3, 6).unwrap());
    let elements = [
        Element::from(Scale::to_grid(from, to)),
        Element::from(Window::new(0.1, 0.2, 0.6, 0.7).unwrap()).then(D4::ROT90),
        Element::from(Affine::rotation(25.0).unwrap()),
    ];
    for filter in LOCAL {
        for padding in PADDINGS {
            let operator =
                GridOperator::between(&elements, from, to, &Resample { filter, padding }).unwrap();
            let weights = random(&[3, to.len(), 2], 1);
            // a non-linear function of the result, so that the gradient depends on it
            let loss = |x: &Tensor| {
                (operator.apply(x).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap()
            };
            assert_gradient(&random(&[3, from.len(), 2], 2), 1e-7, loss);
        }
    }
}

#[test]
fn permutations_keep_every_type_to_the_bit() {
    let grid = TokenGrid::new(3, 4).unwrap();
    let operator = GridOperator::new(&D4::ALL[..1], grid, &Resample::default()).unwrap();
    assert_eq!(operator.kind(), OperatorKind::Permutation);
    let square = TokenGrid::square(3).unwrap();
    let turns = GridOperator::new(&D4::ALL, square, &Resample::default()).unwrap();
    let labels: Vec<i64> = (0..8 * 9).collect();
    let x = Tensor::from_vec(labels, (8, 9, 1), &Device::Cpu).unwrap();
    let back = |y: &Tensor| turns.adjoint().apply(y).unwrap();
    for dtype in
        [DType::U8, DType::U32, DType::I64, DType::F16, DType::BF16, DType::F32, DType::F64]
    {
        let x = x.to_dtype(dtype).unwrap();
        let y = turns.apply(&x).unwrap();
        assert_eq!(y.dtype(), dtype);
        assert_eq!(values(&back(&y)), values(&x), "{dtype:?}");
        assert_eq!(values(&turns.apply_portable(&x).unwrap()), values(&y), "{dtype:?}");
    }
    let odd = Tensor::new(&[[[f32::NAN], [f32::INFINITY], [-0.0]]], &Device::Cpu).unwrap();
    let line = TokenGrid::new(1, 3).unwrap();
    let flip = GridOperator::new(&[D4::HFLIP], line, &Resample::default()).unwrap();
    let y = flip.apply(&odd).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(y[0].to_bits() == (-0.0f32).to_bits() && y[1] == f32::INFINITY && y[2].is_nan());
}

#[test]
fn non_contiguous_input_and_gradient_are_fine() {
    let grid = TokenGrid::new(3, 4).unwrap();
    let operator = GridOperator::new(&[D4::ROT90], grid, &Resample::default()).unwrap();
    let x = Var::from_tensor(&random(&[2, 5, 12], 3)).unwrap();
    let tokens = x.transpose(1, 2).unwrap(); // (2, 12, 5), strided
    let y = operator.apply(&tokens).unwrap();
    assert_eq!(max_gap(&y, &operator.apply(&tokens.contiguous().unwrap()).unwrap()), 0.0);
    let w = random(&[5, 12, 2], 4);
    let loss = (y.permute((2, 1, 0)).unwrap() * &w).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let want =
        operator.adjoint().apply(&w.permute((2, 1, 0)).unwrap()).unwrap().transpose(1, 2).unwrap();
    assert!(max_gap(grads.get(&x).unwrap(), &want) < 1e-12);
}

#[test]
fn a_crop_has_a_mask_and_its_complement_no_gradient() {
    let grid = TokenGrid::new(2, 4).unwrap();
    // the right half of the view lies beyond the source
    let beyond = Window::new(0.0, 0.5, 1.0, 1.0).unwrap();
    let operator = GridOperator::new(&[beyond], grid, &Resample::default()).unwrap();
    assert_eq!(
        operator.valid(0).unwrap().unwrap(),
        [true, true, false, false, true, true, false, false]
    );
    let mask = operator.mask(DType::F64, &Device::Cpu).unwrap().unwrap();
    assert_eq!(mask.to_vec2::<f64>().unwrap(), [[1., 1., 0., 0., 1., 1., 0., 0.]]);
    let inside = GridOperator::new(&[D4::ROT90], grid, &Resample::default()).unwrap();
    assert!(inside.mask(DType::F32, &Device::Cpu).unwrap().is_none());
    // composed with a turn the mask turns too
    let turned = GridOperator::new(&[D4::ROT180], grid, &Resample::default())
        .unwrap()
        .compose(&operator)
        .unwrap();
    assert_eq!(
        turned.valid(0).unwrap().unwrap(),
        [false, false, true, true, false, false, true, true]
    );
}

#[test]
fn layouts_keep_prefix_tokens_and_channel_order() {
    let grid = TokenGrid::new(2, 3).unwrap();
    let operator = GridOperator::new(&[D4::ROT90], grid, &Resample::default()).unwrap();
    let tokens = random(&[2, 6, 4], 9);
    let want = operator.apply(&tokens).unwrap();
    let cls = random(&[2, 2, 4], 10);
    let vit = Tensor::cat(&[&cls, &tokens], 1).unwrap();
    let registers = Layout { prefix: 2, ..Layout::default() };
    let got = operator.apply_in(registers, &vit).unwrap();
    assert_eq!(max_gap(&got.narrow(1, 0, 2).unwrap(), &cls), 0.0);
    assert_eq!(max_gap(&got.narrow(1, 2, 6).unwrap(), &want), 0.0);
    let first = tokens.transpose(1, 2).unwrap().reshape((2, 4, 2, 3)).unwrap();
    let got = operator.apply_in(registers, &first).unwrap();
    assert_eq!(max_gap(&got, &operator.apply(&first).unwrap()), 0.0);
    let last = Layout { channels: Channels::Last, ..Layout::default() };
    let got = operator.apply_in(last, &tokens.reshape((2, 2, 3, 4)).unwrap()).unwrap();
    assert_eq!(got.dims(), [2, 3, 2, 4]);
    assert_eq!(max_gap(&got.flatten(1, 2).unwrap(), &want), 0.0);

    let table: [(Layout, &Tensor, &[&str]); 3] = [
        (Layout::default(), &vit, &["0 prefix tokens + 2x3", "[2, 8, 4]"]),
        (last, &first, &["(B, 2, 3, C)", "[2, 4, 2, 3]"]),
        (last, &random(&[6, 4], 1), &["rank 3 or a map of rank 4", "[6, 4]"]),
    ];
    for (layout, x, parts) in table {
        assert_says(operator.apply_in(layout, x), parts);
    }
}

#[test]
fn threads_do_not_change_the_result() {
    let grid = TokenGrid::new(5, 6).unwrap();
    let elements: Vec<Affine> =
        (0..7).map(|i| Affine::rotation(13.0 * i as f64).unwrap()).collect();
    let operator = GridOperator::new(&elements, grid, &Resample::default()).unwrap();
    let x = random(&[7, grid.len(), 3], 6).to_dtype(DType::F32).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| values(&operator.apply(&x).unwrap()))
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn bad_tensors_are_refused() {
    let grid = TokenGrid::new(3, 4).unwrap();
    let new = |elements: &[Element]| GridOperator::new(elements, grid, &Resample::default());
    let flip = new(&[D4::HFLIP.into()]).unwrap();
    let two = new(&[D4::HFLIP.into(), D4::VFLIP.into()]).unwrap();
    let scale = new(&[Scale::new(2.0, 2.0).unwrap().into()]).unwrap();
    let table: [(&GridOperator, &[usize], DType, &[&str]); 8] = [
        (&flip, &[12, 8], DType::F32, &["tokens (B, 12, C)", "[12, 8]"]),
        (&flip, &[2, 13, 8], DType::F32, &["without prefix", "3x4", "[2, 13, 8]"]),
        (&flip, &[2, 8, 4, 3], DType::F32, &["(B, C, 3, 4)", "[2, 8, 4, 3]"]),
        (&flip, &[0, 12, 8], DType::F32, &["at least one sample", "[0, 12, 8]"]),
        (&flip, &[2, 12, 0], DType::F32, &["one channel", "[2, 12, 0]"]),
        (&two, &[3, 12, 8], DType::F32, &["a batch of 2", "[3, 12, 8]"]),
        (&scale, &[1, 12, 1], DType::U32, &["floats", "only permutations", "U32"]),
        (&scale, &[1, 12, 1], DType::U8, &["floats", "only permutations", "U8"]),
    ];
    for (operator, dims, dtype, parts) in table {
        let x = Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
        assert_says(operator.apply(&x), parts);
        assert_says(operator.apply_portable(&x), parts);
    }
}

#[test]
fn bad_operators_are_refused() {
    let grid = TokenGrid::new(3, 4).unwrap();
    let new = |elements: &[Element]| GridOperator::new(elements, grid, &Resample::default());
    let flip = new(&[D4::HFLIP.into()]).unwrap();
    let two = new(&[D4::HFLIP.into(), D4::VFLIP.into()]).unwrap();
    let three = new(&[D4::HFLIP.into(); 3]).unwrap();
    let turn = new(&[D4::ROT90.into()]).unwrap();
    let tiny = Scale::new(0.01, 1.0).unwrap();
    let none = GridOperator::between::<D4>(&[], grid, grid, &Resample::default());
    let table: [(ser_reg::Result<GridOperator>, &[&str]); 6] = [
        (new(&[D4::IDENTITY.into(), D4::ROT90.into()]), &["odd quarter turn", "4x3 for sample 1"]),
        (new(&[]), &["one element", "none"]),
        (none, &["one element", "none"]),
        (new(&[tiny.into()]), &["at least one row", "3x4"]),
        (flip.compose(&turn), &["onto the 3x4 grid", "4x3"]),
        (two.compose(&three), &["1 or 2 samples", "one for 3"]),
    ];
    for (result, parts) in table {
        assert_says(result, parts);
    }
}

#[test]
fn bad_grids_and_elements_are_refused() {
    let nan = f64::NAN;
    let affine = |a, b| Affine::new(a, b).map(drop);
    let mut table: Vec<(ser_reg::Result<()>, &[&str])> = vec![
        (TokenGrid::new(0, 3).map(drop), &["at least one row", "0x3"]),
        (TokenGrid::new(3, 0).map(drop), &["at least one row", "3x0"]),
        (TokenGrid::new(usize::MAX, 2).map(drop), &["fewer than 2^32 cells"]),
        (TokenGrid::new(1 << 20, 1 << 20).map(drop), &["1048576x1048576"]),
        (Window::new(nan, 0.0, 1.0, 1.0).map(drop), &["finite corner", "NaN"]),
        (affine([[1.0, 2.0], [2.0, 4.0]], [0.0; 2]), &["invertible", "det A = 0"]),
        (affine([[nan, 0.0], [0.0, 1.0]], [0.0; 2]), &["finite"]),
        (affine([[1.0, 0.0], [0.0, 1.0]], [nan, 0.0]), &["finite"]),
        (Affine::shear(1.0, 1.0).map(drop), &["invertible"]),
        (Affine::rotation(f64::INFINITY).map(drop), &["finite"]),
        (Affine::rotation(nan).map(drop), &["finite"]),
        (D4::from_index(8).map(drop), &["0..=7", "8"]),
    ];
    for bad in [0.0, -1.0, nan, f64::INFINITY, 1e-320] {
        let parts: [&[&str]; 2] = [&["finite factors above zero"], &["finite sides above zero"]];
        table.push((Scale::new(1.0, bad).map(drop), parts[0]));
        table.push((Window::new(0.0, 0.0, bad, 1.0).map(drop), parts[1]));
    }
    for (result, parts) in table {
        assert_says(result, parts);
    }
}

/// A NaN or an infinity reaches the cells that read it and no other, fused and portable alike,
/// forward and backward.
#[test]
fn values_that_are_not_finite_reach_only_cells_that_read_them() {
    let (from, to) = (TokenGrid::new(3, 4).unwrap(), TokenGrid::new(4, 3).unwrap());
    let batches: [&[Element]; 4] = [
        &[Window::new(0.5, 0.5, 0.45, 0.4).unwrap().into()],
        &[Affine::rotation(25.0).unwrap().into()],
        &[Affine::rotation(-50.0).unwrap().into(), Affine::translation(0.4, 0.3).unwrap().into()],
        &[
            Affine::rotation(40.0).unwrap().into(),
            Element::from(Window::new(0.2, -0.3, 0.6, 0.7).unwrap()).then(D4::ROT90),
        ],
    ];
    let alike = |a: &Tensor, b: &Tensor| {
        let same =
            |(a, b): (f64, f64)| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-12;
        values(a).into_iter().zip(values(b)).all(same)
    };
    let mut spared = 0;
    for elements in batches {
        for filter in [Filter::Nearest, Filter::Bilinear, Filter::BicubicAntialias] {
            for padding in [Padding::Zeros, Padding::Border] {
                let resample = Resample { filter, padding };
                let operator = GridOperator::between(elements, from, to, &resample).unwrap();
                let batch = elements.len();
                for (at, bad) in [(0, f64::NAN), (5, f64::INFINITY), (11, f64::NAN)] {
                    let token = |grid: TokenGrid, value: f64| {
                        let mut x = values(&random(&[batch, grid.len(), 1], 1));
                        x.iter_mut().skip(at).step_by(grid.len()).for_each(|v| *v = value);
                        Tensor::from_vec(x, (batch, grid.len(), 1), &Device::Cpu).unwrap()
                    };
                    // What reads the token: where a change of it changes the result.
                    let reads = |operator: &GridOperator| {
                        let apply = |v| operator.apply(&token(operator.in_grid(), v)).unwrap();
                        let pairs = values(&apply(0.0)).into_iter().zip(values(&apply(1e300)));
                        pairs.map(|(a, b)| a != b).collect::<Vec<_>>()
                    };
                    let x = token(from, bad);
                    let fused = operator.apply(&x).unwrap();
                    let portable = operator.apply_portable(&x).unwrap();
                    assert!(alike(&fused, &portable), "{elements:?} {resample:?}");
                    for (value, reads) in values(&fused).into_iter().zip(reads(&operator)) {
                        assert!(value.is_finite() || reads, "{elements:?} {resample:?}");
                        spared += usize::from(!reads);
                    }
                    let cotangent = token(to, bad);
                    let x = Var::from_tensor(&token(from, 0.5)).unwrap();
                    let gradient = |y: Tensor| {
                        let loss = (y * &cotangent).unwrap().sum_all().unwrap();
                        loss.backward().unwrap().get(&x).unwrap().clone()
                    };
                    let fused = gradient(operator.apply(&x).unwrap());
                    let portable = gradient(operator.apply_portable(&x).unwrap());
                    assert!(alike(&fused, &portable), "{elements:?} {resample:?}");
                    let reads = reads(&operator.adjoint());
                    for (value, reads) in values(&fused).into_iter().zip(reads) {
                        assert!(value.is_finite() || reads, "{elements:?} {resample:?}");
                    }
                }
            }
        }
    }
    assert!(spared > 100, "{spared}");
}

/// The case of a window that does not see token 0: none of its cells is NaN.
#[test]
fn a_window_is_free_of_a_nan_outside() {
    let grid = TokenGrid::square(4).unwrap();
    let window = Element::from(Window::new(0.3, 0.3, 0.9, 0.9).unwrap());
    let resample = Resample { filter: Filter::Bilinear, padding: Padding::Zeros };
    let operator = GridOperator::between(&[window], grid, grid, &resample).unwrap();
    let mut x = vec![1.0; 16];
    x[0] = f64::NAN;
    let x = Tensor::from_vec(x, (1, 16, 1), &Device::Cpu).unwrap();
    for y in [operator.apply(&x), operator.apply_portable(&x)] {
        assert!(values(&y.unwrap()).iter().all(|v| v.is_finite()));
    }
}

/// Cells without a source are zero in any type, fused and portable.
#[test]
fn moves_beyond_the_border_are_zero_in_every_type() {
    let grid = TokenGrid::new(2, 3).unwrap();
    let beyond = Window::from_cells(0, 1, 2, 3, grid).unwrap();
    let resample = Resample { filter: Filter::Nearest, padding: Padding::Zeros };
    let operator = GridOperator::new(&[beyond], grid, &resample).unwrap();
    assert!(operator.is_exact());
    use DType::*;
    for dtype in [U8, U32, I64, BF16, F16, F32, F64] {
        let x = Tensor::arange(1u32, 7, &Device::Cpu).unwrap();
        let x = x.reshape((1, 6, 1)).unwrap().to_dtype(dtype).unwrap();
        for y in [operator.apply(&x), operator.apply_portable(&x)] {
            assert_eq!(values(&y.unwrap()), [2., 3., 0., 5., 6., 0.], "{dtype:?}");
        }
    }
}

/// Elements may hold anything, and their equality may use the library.
#[test]
fn elements_need_be_neither_send_nor_free_of_operators() {
    #[derive(Clone, Debug)]
    struct Shared(Rc<D4>);
    impl PartialEq for Shared {
        fn eq(&self, other: &Self) -> bool {
            let grid = TokenGrid::square(3).unwrap();
            let act = |g: &Self| {
                let operator = GridOperator::new(&[*g.0], grid, &Resample::default()).unwrap();
                values(&operator.apply(&random(&[1, 9, 1], 1)).unwrap())
            };
            act(self) == act(other)
        }
    }
    impl GroupAction for Shared {
        fn identity() -> Self {
            Self(Rc::new(D4::IDENTITY))
        }
        fn compose(&self, first: &Self) -> Self {
            Self(Rc::new(self.0.compose(&first.0)))
        }
        fn inverse(&self) -> Self {
            Self(Rc::new(self.0.inverse()))
        }
        fn source(&self, p: [f64; 2]) -> [f64; 2] {
            self.0.source(p)
        }
    }
    let grid = TokenGrid::square(4).unwrap();
    let elements: Vec<Shared> = D4::ALL.map(|g| Shared(Rc::new(g))).into();
    testing::check_action_laws(&elements, grid, &Resample::default(), 0.0, &mut rng(1)).unwrap();
}

#[test]
fn a_hostile_action_cannot_panic() {
    /// Sends points nowhere.
    #[derive(Clone, Debug, PartialEq)]
    struct Nowhere(f64);
    impl GroupAction for Nowhere {
        fn identity() -> Self {
            Nowhere(0.0)
        }
        fn compose(&self, _: &Self) -> Self {
            self.clone()
        }
        fn inverse(&self) -> Self {
            self.clone()
        }
        fn source(&self, _: [f64; 2]) -> [f64; 2] {
            [self.0, self.0]
        }
    }
    let grid = TokenGrid::new(3, 4).unwrap();
    for at in [f64::NAN, f64::INFINITY, -f64::INFINITY, 1e300, -1e300] {
        for filter in LOCAL {
            for padding in PADDINGS {
                let operator =
                    GridOperator::new(&[Nowhere(at)], grid, &Resample { filter, padding }).unwrap();
                assert!(operator.valid(0).unwrap().unwrap().iter().all(|v| !v));
                operator.apply(&random(&[1, 12, 2], 1)).unwrap();
            }
        }
    }
}

#[test]
fn a_seeded_pair_of_crops_overlaps_where_both_look() {
    use ser_reg::view::{CropRange, ViewConfig, ViewSampler};
    let config = ViewConfig { crop: Some(CropRange::default()), ..ViewConfig::default() };
    let sampler = ViewSampler::new(TokenGrid::square(12).unwrap(), config).unwrap();
    let views = sampler.sample_pair(&mut rng(7), 4).unwrap();
    // a smooth image: both views of it agree where they overlap
    let image = Tensor::from_vec(
        (0..4 * 48 * 48)
            .map(|i| ((i % 48) as f64 * 0.05).sin() + ((i / 48 % 48) as f64 * 0.04).cos())
            .collect::<Vec<f64>>(),
        (4, 1, 48, 48),
        &Device::Cpu,
    )
    .unwrap();
    let (a, b) = (views.first.apply(&image).unwrap(), views.second.apply(&image).unwrap());
    let pixels = |x: &Tensor| TokenGrid::new(x.dims()[2], x.dims()[3]).unwrap();
    let relative = views.relative();
    let align =
        GridOperator::between(relative.elements(), pixels(&a), pixels(&b), &Resample::default())
            .unwrap();
    let aligned = align.apply(&a).unwrap();
    let (got, want) = (values(&aligned), values(&b));
    let n = align.out_grid().len();
    let mut seen = 0;
    for sample in 0..4 {
        let counts = |i: &usize| align.valid(sample).unwrap().is_none_or(|v| v[*i]);
        for i in (0..n).filter(counts) {
            let k = sample * n + i;
            assert!(
                (got[k] - want[k]).abs() < 0.06,
                "sample {sample} cell {i}: {} {}",
                got[k],
                want[k]
            );
            seen += 1;
        }
    }
    assert!((n / 2..4 * n).contains(&seen), "{seen} of {} cells overlap", 4 * n);
}
