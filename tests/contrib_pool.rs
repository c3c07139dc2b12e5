//! Orbit pooling and invariant integration: invariance, loops, and central differences.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{cases, max_gap, random};
use loss_common::{assert_close, assert_finite, assert_says, differences, flat, scalar};
use proptest::prelude::*;
use ser_reg::{
    GridOperator, Resample, TokenGrid,
    contrib::{InvariantIntegration, Monomial, OrbitPool, Pool, ReynoldsPenalty, WeightSpace},
    grad,
    group::{D4, Subgroup},
};

const CPU: &Device = &Device::Cpu;

fn act(g: D4, x: &Tensor, grid: TokenGrid) -> Tensor {
    let rho = GridOperator::new(&[g], grid, &Resample::default()).unwrap();
    rho.apply(x).unwrap()
}

fn monomials() -> Vec<Monomial> {
    let odd = Monomial { factors: vec![([0, 0], 1), ([1, 0], 2), ([0, 1], 3)] };
    vec![Monomial::power(1), Monomial::power(3), Monomial::product([0, 1]), odd]
}

/// A group and a grid that it maps to itself, with at least two rows and columns.
fn group_and_grid() -> impl Strategy<Value = (Subgroup, TokenGrid)> {
    (0usize..10, 2usize..6, 2usize..6).prop_map(|(group, rows, cols)| {
        let group = Subgroup::ALL[group];
        let swaps = group.elements().iter().any(|g| g.swaps_axes());
        (group, TokenGrid::new(rows, if swaps { rows } else { cols }).unwrap())
    })
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn pooled_maps_are_invariant((group, grid) in group_and_grid(), seed: u64) {
        let x = random(&[2, grid.len(), 3], seed);
        let template = random(&[grid.len(), 3], seed ^ 1);
        for (pool, tolerance) in [(Pool::Mean, 1e-14), (Pool::Max, 0.), (Pool::Attention(template), 1e-13)] {
            let pool = OrbitPool::new(group, pool);
            let upright = pool.tokens(&x, grid).unwrap();
            for &g in group.elements() {
                let gap = max_gap(&pool.tokens(&act(g, &x, grid), grid).unwrap(), &upright);
                prop_assert!(gap <= tolerance, "{:?} {:?}: {}", pool, g, gap);
            }
        }
    }

    #[test]
    fn pooled_images_are_invariant_for_any_function((group, grid) in group_and_grid(), seed: u64) {
        let x = random(&[2, 3, grid.rows(), grid.cols()], seed);
        let w = random(&[3 * grid.len(), 4], seed ^ 1);
        let f = |x: &Tensor| x.flatten_from(1)?.matmul(&w)?.tanh();
        let template = random(&[4], seed ^ 2);
        for (pool, tolerance) in [(Pool::Mean, 1e-14), (Pool::Max, 0.), (Pool::Attention(template), 1e-13)] {
            let pool = OrbitPool::new(group, pool);
            let upright = pool.images(&x, f).unwrap();
            prop_assert_eq!(upright.dims(), &[2, 4]);
            for &g in group.elements() {
                let gap = max_gap(&pool.images(&act(g, &x, grid), f).unwrap(), &upright);
                prop_assert!(gap <= tolerance, "{:?} {:?}: {}", pool, g, gap);
            }
        }
    }

    #[test]
    fn integrals_are_invariant_and_match_a_loop((group, grid) in group_and_grid(), seed: u64) {
        let x = random(&[2, grid.len(), 3], seed);
        let integration = InvariantIntegration::new(group, monomials()).unwrap();
        let ours = integration.forward(&x, grid).unwrap();
        prop_assert_eq!(ours.dims(), &[2, 4, 3]);
        assert_close(&flat(&ours), &integrals(group, grid, &x), 1e-12);
        for &g in group.elements() {
            let gap = max_gap(&integration.forward(&act(g, &x, grid), grid).unwrap(), &ours);
            prop_assert!(gap < 1e-14, "{:?}: {}", g, gap);
        }
    }
}

/// The integral by loops over elements, positions and factors.
fn integrals(group: Subgroup, grid: TokenGrid, x: &Tensor) -> Vec<f64> {
    let (rows, cols) = (grid.rows() as i32, grid.cols() as i32);
    let (b, _, c) = x.dims3().unwrap();
    let mut out = Vec::new();
    for i in 0..b {
        for monomial in monomials() {
            for k in 0..c {
                let mut mean = 0.;
                for &g in group.elements() {
                    let turned = act(g, x, grid).get(i).unwrap().to_vec2::<f64>().unwrap();
                    let (mut sum, mut count) = (0., 0.);
                    for (y, x) in (0..rows).flat_map(|y| (0..cols).map(move |x| (y, x))) {
                        let inside = |d: [i32; 2]| {
                            (0..rows).contains(&(y + d[0])) && (0..cols).contains(&(x + d[1]))
                        };
                        if monomial.factors.iter().all(|f| inside(f.0)) {
                            let value = |(d, n): &([i32; 2], u32)| {
                                turned[((y + d[0]) * cols + x + d[1]) as usize][k].powi(*n as i32)
                            };
                            sum += monomial.factors.iter().map(value).product::<f64>();
                            count += 1.;
                        }
                    }
                    mean += sum / count / group.order() as f64;
                }
                out.push(mean);
            }
        }
    }
    out
}

/// Some elements fix cells of a 3×3 grid, so the maximum occurs several times in an orbit.
#[test]
fn gradients_match_differences() -> Result<()> {
    let grid = TokenGrid::square(3).unwrap();
    let x = Var::from_tensor(&random(&[2, 9, 2], 1))?;
    let (weights, template) = (random(&[2, 9, 2], 2), Var::from_tensor(&random(&[9, 2], 3))?);
    for pool in [Pool::Mean, Pool::Max, Pool::Attention(template.as_tensor().clone())] {
        let pool = OrbitPool::new(Subgroup::D4, pool);
        let value =
            |x: &Tensor| -> Result<Tensor> { (pool.tokens(x, grid)? * &weights)?.sum_all() };
        let numeric = differences(&flat(&x), 1e-6, |x| {
            scalar(&value(&Tensor::from_slice(x, (2, 9, 2), CPU).unwrap()).unwrap())
        });
        let grads = value(&x)?.backward()?;
        assert_close(&flat(grads.get(&x).expect("a gradient")), &numeric, 1e-8);
    }
    let value = |template: &Tensor| -> Result<Tensor> {
        let pool = OrbitPool::new(Subgroup::D4, Pool::Attention(template.clone()));
        (pool.tokens(&x, grid)? * &weights)?.sum_all()
    };
    let numeric = differences(&flat(&template), 1e-6, |v| {
        scalar(&value(&Tensor::from_slice(v, (9, 2), CPU).unwrap()).unwrap())
    });
    let grads = value(&template)?.backward()?;
    assert_close(&flat(grads.get(&template).expect("a gradient")), &numeric, 1e-8);

    let integration = InvariantIntegration::new(Subgroup::C4, monomials()).unwrap();
    let weights = random(&[2, 4, 2], 4);
    let value =
        |x: &Tensor| -> Result<Tensor> { (integration.forward(x, grid)? * &weights)?.sum_all() };
    let numeric = differences(&flat(&x), 1e-6, |x| {
        scalar(&value(&Tensor::from_slice(x, (2, 9, 2), CPU).unwrap()).unwrap())
    });
    let grads = value(&x)?.backward()?;
    assert_close(&flat(grads.get(&x).expect("a gradient")), &numeric, 1e-8);
    Ok(())
}

#[test]
fn the_mean_is_the_reynolds_projection() -> Result<()> {
    for group in Subgroup::ALL {
        let grid = TokenGrid::square(4).unwrap();
        let x = random(&[2, 16, 3], 1);
        let reynolds = ReynoldsPenalty {
            group,
            space: WeightSpace::Table { grid, prefix: 0 },
            ..Default::default()
        };
        let mean = OrbitPool::new(group, Pool::Mean).tokens(&x, grid)?;
        assert!(max_gap(&mean, &reynolds.project(&x)?) < 1e-15);
        assert!(max_gap(&mean.mean(1)?, &x.mean(1)?) < 1e-15);
        // A zero template has equal weights.
        let attention = Pool::Attention(Tensor::zeros((16, 3), DType::F64, CPU)?);
        let pooled = OrbitPool::new(group, attention).tokens(&x, grid)?;
        assert!(max_gap(&pooled, &mean) < 1e-15);
    }
    // A large template selects the member with the largest product.
    let grid = TokenGrid::new(1, 2).unwrap();
    let x = Tensor::new(&[[[1f64], [2.]]], CPU)?;
    let right = Pool::Attention(Tensor::new(&[[0f64], [1e4]], CPU)?);
    let left = Pool::Attention(Tensor::new(&[[1e4], [0f64]], CPU)?);
    assert_eq!(flat(&OrbitPool::new(Subgroup::HFlip, right).tokens(&x, grid)?), [1., 2.]);
    assert_eq!(flat(&OrbitPool::new(Subgroup::HFlip, left).tokens(&x, grid)?), [2., 1.]);
    Ok(())
}

#[test]
fn integrals_see_what_the_mean_does_not() -> Result<()> {
    let grid = TokenGrid::square(2).unwrap();
    let (beside, across) = ([[1f64], [1.], [0.], [0.]], [[1f64], [0.], [0.], [1.]]);
    let integration = InvariantIntegration::new(
        Subgroup::D4,
        vec![Monomial::power(1), Monomial::product([0, 1])],
    )?;
    let [a, b] = [beside, across]
        .map(|m| flat(&integration.forward(&Tensor::new(&[m], CPU).unwrap(), grid).unwrap()));
    assert_eq!((a, b), (vec![0.5, 0.25], vec![0.5, 0.]));
    Ok(())
}

#[test]
fn a_model_is_trained_through_the_pool() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, CPU);
    let pool = OrbitPool::new(Subgroup::D4, Pool::attention(4, vb.pp("pool"))?);
    let w = vb.get_with_hints((16, 4), "w", candle_nn::Init::Const(0.))?;
    vars.data().lock().unwrap()["w"].set(&random(&[16, 4], 1))?;
    let x = random(&[3, 1, 4, 4], 2);
    let y = pool.images(&x, |x| x.flatten_from(1)?.matmul(&w))?;
    let loss = y.sqr()?.mean_all()?;
    grad::assert_reaches(&loss, grad::named(&vars, ""))?;
    assert_eq!(grad::named(&vars, "pool")[0].0, "pool.template");
    Ok(())
}

#[test]
fn half_precision_and_zeros() -> Result<()> {
    let grid = TokenGrid::square(3).unwrap();
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let template = random(&[9, 2], 1);
        let pools = [Pool::Mean, Pool::Max, Pool::Attention(template.to_dtype(dtype)?)];
        for pool in pools {
            let pool = OrbitPool::new(Subgroup::D4, pool);
            let zero = Var::zeros((1, 9, 2), dtype, CPU)?;
            let y = pool.tokens(&zero, grid)?;
            assert_eq!(y.dtype(), dtype);
            assert_finite(y.sum_all()?.backward()?.get(&zero).expect("a gradient"));
            // 6e4 is near the largest f16, so a sum of two overflows.
            let large = Tensor::full(6e4, (1, 9, 2), CPU)?.to_dtype(dtype)?;
            if !matches!(pool, ref p if format!("{p:?}").contains("Attention")) {
                assert_eq!(flat(&pool.tokens(&large, grid)?), flat(&large));
            }
            let images = large.reshape((1, 2, 3, 3))?;
            let vectors = |x: &Tensor| x.flatten_from(1)?.narrow(1, 0, 1);
            let y = OrbitPool::new(Subgroup::D4, Pool::Mean).images(&images, vectors)?;
            assert_eq!((y.dtype(), flat(&y)), (dtype, flat(&large)[..1].to_vec()));
        }
        let zero = Var::zeros((1, 9, 2), dtype, CPU)?;
        let y = InvariantIntegration::new(Subgroup::D4, monomials())?.forward(&zero, grid)?;
        assert_eq!(y.dtype(), dtype);
        assert_finite(y.sum_all()?.backward()?.get(&zero).expect("a gradient"));
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let grid = TokenGrid::new(2, 3).unwrap();
    let x = random(&[2, 6, 4], 1);
    let mean = |group| OrbitPool::new(group, Pool::Mean);
    let tokens = |group, x: &Tensor, parts: &[&str]| {
        assert_says(mean(group).tokens(x, grid), &[&["OrbitPool::tokens"], parts].concat());
        let integration = InvariantIntegration::new(group, vec![Monomial::power(1)]).unwrap();
        assert_says(integration.forward(x, grid), &[&["InvariantIntegration"], parts].concat());
    };
    tokens(Subgroup::C4, &x, &["square grid for C4", "2x3"]);
    tokens(
        Subgroup::C2,
        &random(&[2, 7, 4], 1),
        &["(B, 6, C)", "2x3", "without prefix", "[2, 7, 4]"],
    );
    tokens(Subgroup::C2, &x.narrow(0, 0, 0)?, &["nonempty", "[0, 6, 4]"]);
    tokens(Subgroup::C2, &x.get(0)?, &["(B, 6, C)", "[6, 4]"]);
    tokens(Subgroup::C2, &x.to_dtype(DType::U32)?, &["f16, bf16, f32 or f64", "u32"]);

    let attention = |template: Tensor| OrbitPool::new(Subgroup::C2, Pool::Attention(template));
    assert_says(attention(random(&[4], 1)).tokens(&x, grid), &["template [6, 4]", "got [4]"]);
    assert_says(
        attention(random(&[6, 4], 1).to_dtype(DType::U8)?).tokens(&x, grid),
        &["f16, bf16, f32 or f64", "u8"],
    );
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, CPU);
    assert_says(Pool::attention((6, 0), vb()), &["Pool::attention", "(N, C)", "[6, 0]"]);
    assert_says(Pool::attention((), vb()), &["Pool::attention", "[]"]);

    let images = random(&[2, 1, 2, 3], 1);
    type Closure = fn(&Tensor) -> ser_reg::Result<Tensor>;
    let say = |group, x: &Tensor, f: Closure, parts: &[&str]| {
        assert_says(mean(group).images(x, f), &[&["OrbitPool::images"], parts].concat());
    };
    let vectors: Closure = |x| Ok(x.flatten_from(1)?);
    say(Subgroup::C4, &images, vectors, &["square grid for C4", "2x3"]);
    say(Subgroup::C2, &x, vectors, &["images (B, C, H, W)", "[2, 6, 4]"]);
    say(Subgroup::C2, &images.narrow(1, 0, 0)?, vectors, &["nonempty", "[2, 0, 2, 3]"]);
    say(Subgroup::C2, &images, |x| Ok(x.sum_all()?), &["one shape (B, D)", "B = 2", "[]"]);
    say(Subgroup::C2, &images, |x| Ok(x.narrow(0, 0, 1)?), &["B = 2", "[1, 1, 2, 3]"]);
    say(Subgroup::C2, &images, |x| Ok(x.to_dtype(DType::U32)?), &["f16, bf16, f32 or f64", "u32"]);
    let mut calls = 0;
    let changing = |x: &Tensor| {
        calls += 1;
        Ok::<_, ser_reg::Error>(x.flatten_from(1)?.narrow(1, 0, calls)?)
    };
    assert_says(mean(Subgroup::C2).images(&images, changing), &["one shape", "[2, 2]"]);

    let integration = |factors: Vec<([i32; 2], u32)>| {
        InvariantIntegration::new(Subgroup::C2, vec![Monomial { factors }])
    };
    assert_says(
        InvariantIntegration::new(Subgroup::C2, vec![]),
        &["monomials", "at least one monomial", "none"],
    );
    assert_says(integration(vec![]), &["at least one factor", "[]"]);
    assert_says(integration(vec![([0, 0], 0)]), &["exponents of at least 1", "0)"]);
    let wide = integration(vec![([0, 0], 1), ([0, -3], 1)])?;
    assert_says(wide.forward(&x, grid), &["fit into a 2x3 grid", "1x4 cells"]);
    let far = integration(vec![([i32::MIN, 0], 1), ([i32::MAX, 0], 1)])?;
    assert_says(far.forward(&x, grid), &["fit into a 2x3 grid", "4294967296x1"]);
    Ok(())
}

#[test]
fn the_maximum_of_infinite_and_huge_values() -> Result<()> {
    let grid = TokenGrid::new(1, 3).unwrap();
    let pool = OrbitPool::new(Subgroup::HFlip, Pool::Max);
    let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
    // The flip fixes the middle cell, so both members are maxima.
    for (x, y, grad) in [
        ([low, 1., 2.], [2f32, 1., 2.], [0., 1., 2.]),
        ([low; 3], [low; 3], [1., 1., 1.]),
        ([3e38, 3e38, -3e38], [3e38, 3e38, 3e38], [2., 1., 0.]),
        ([3e38; 3], [3e38; 3], [1., 1., 1.]),
        ([high, low, 0.], [high, low, high], [2., 1., 0.]),
    ] {
        let x = Var::from_tensor(&Tensor::new(&x, CPU)?.reshape((1, 3, 1))?)?;
        let pooled = pool.tokens(&x, grid)?;
        assert_eq!(pooled.flatten_all()?.to_vec1::<f32>()?, y);
        let grads = pooled.sum_all()?.backward()?;
        assert_eq!(flat(grads.get(&x).expect("a gradient")), grad);
    }
    // Eight members of one value have no finite sum.
    let all = Tensor::full(3e38f32, (1, 9, 1), CPU)?;
    let square = TokenGrid::square(3).unwrap();
    let pooled = OrbitPool::new(Subgroup::D4, Pool::Max).tokens(&all, square)?;
    assert_eq!(flat(&pooled), flat(&all));
    // A NaN on either side gives NaN.
    for x in [[f32::NAN, 1., 2.], [2., 1., f32::NAN]] {
        let x = Tensor::new(&x, CPU)?.reshape((1, 3, 1))?;
        let y = flat(&pool.tokens(&x, grid)?);
        assert!(y[0].is_nan() && y[1] == 1. && y[2].is_nan(), "{y:?}");
    }
    Ok(())
}
