//! The regular representation on vectors: laws, an explicit matrix, and the loss.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{cases, max_gap, random};
use loss_common::{assert_close, assert_finite, assert_says, differences, flat, scalar};
use proptest::prelude::*;
use ser_reg::{
    contrib::{Distance, RegularRep},
    group::{D4, GroupAction, Subgroup},
};

const CPU: &Device = &Device::Cpu;
const COSINE: Distance = Distance::Cosine { eps: 1e-6 };

/// `Π[gh, h] = 1`: column h of the matrix of `ρ(g)`.
fn matrix(group: Subgroup, g: D4) -> Vec<Vec<f64>> {
    let elements = group.elements();
    let row = |to: &D4| {
        let entry = |h: &D4| if g.compose(h) == *to { 1. } else { 0. };
        elements.iter().map(entry).collect()
    };
    elements.iter().map(row).collect()
}

fn by_matrix(group: Subgroup, g: D4, z: &[f64]) -> Vec<f64> {
    let rho = matrix(group, g);
    let block = |block: &[f64]| -> Vec<f64> {
        let row = |row: &Vec<f64>| row.iter().zip(block).map(|(a, b)| a * b).sum();
        rho.iter().map(row).collect()
    };
    z.chunks(group.order()).flat_map(block).collect()
}

/// A group, and two elements for each of five samples.
fn case() -> impl Strategy<Value = (Subgroup, Vec<D4>, Vec<D4>)> {
    let picks = || prop::collection::vec(0usize..8, 5);
    (0usize..10, picks(), picks()).prop_map(|(group, a, b)| {
        let group = Subgroup::ALL[group];
        let element = |i: usize| group.elements()[i % group.order()];
        let elements = |picks: Vec<usize>| picks.into_iter().map(element).collect();
        (group, elements(a), elements(b))
    })
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn it_is_an_orthogonal_representation((group, a, b) in case(), seed: u64) {
        let rep = RegularRep::new(group);
        let shape = [5, 3 * group.order()];
        let (z, y) = (random(&shape, seed), random(&shape, seed ^ 1));
        let ab: Vec<D4> = a.iter().zip(&b).map(|(a, b)| a.compose(b)).collect();
        let inverse: Vec<D4> = a.iter().map(D4::inverse).collect();
        let stepwise = rep.apply(&a, &rep.apply(&b, &z).unwrap()).unwrap();
        prop_assert_eq!(max_gap(&stepwise, &rep.apply(&ab, &z).unwrap()), 0.);
        prop_assert_eq!(max_gap(&rep.apply(&inverse, &rep.apply(&a, &z).unwrap()).unwrap(), &z), 0.);
        let inner = |x: &Tensor, y: &Tensor| scalar(&(x * y).unwrap().sum_all().unwrap());
        let (left, right) = (inner(&rep.apply(&a, &z).unwrap(), &y), inner(&z, &rep.apply(&inverse, &y).unwrap()));
        prop_assert!((left - right).abs() < 1e-12);
        prop_assert_eq!(max_gap(&rep.apply(&[D4::IDENTITY], &z).unwrap(), &z), 0.);
        // An element on z1 equals its inverse on z2.
        for distance in [Distance::Mse, COSINE] {
            let there = scalar(&rep.loss(&a, &z, &y, distance).unwrap());
            let back = scalar(&rep.loss(&inverse, &y, &z, distance).unwrap());
            prop_assert!((there - back).abs() < 1e-14);
        }
    }

    #[test]
    fn it_matches_the_matrix_sample_by_sample((group, a, _) in case(), seed: u64) {
        let z = random(&[5, 2 * group.order()], seed);
        let rep = RegularRep::new(group);
        let rows: Vec<f64> = flat(&z).chunks(2 * group.order()).zip(&a).flat_map(|(z, &g)| by_matrix(group, g, z)).collect();
        prop_assert_eq!(flat(&rep.apply(&a, &z).unwrap()), rows);
        // One element acts on all samples.
        let (one, each) = (rep.apply(&a[..1], &z).unwrap(), rep.apply(&[a[0]; 5], &z).unwrap());
        prop_assert_eq!(max_gap(&one, &each), 0.);
    }
}

#[test]
fn losses_and_gradients_match_the_textbook() -> Result<()> {
    let group = Subgroup::D4;
    let elements = [D4::ROT90, D4::TRANSPOSE, D4::IDENTITY];
    let (z1, z2) =
        (Var::from_tensor(&random(&[3, 16], 1))?, Var::from_tensor(&random(&[3, 16], 2))?);
    for distance in [Distance::Mse, COSINE] {
        let value = |x: &[f64]| {
            let (a, b) = x.split_at(48);
            let each = a.chunks(16).zip(b.chunks(16)).zip(elements).map(|((a, b), g)| {
                let a = by_matrix(group, g, a);
                let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
                match distance {
                    Distance::Mse => {
                        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 16.
                    }
                    Distance::Cosine { eps } => {
                        1. - dot(&a, b) / ((dot(&a, &a) + eps) * (dot(b, b) + eps)).sqrt()
                    }
                }
            });
            each.sum::<f64>() / 3.
        };
        let both = [flat(&z1), flat(&z2)].concat();
        let loss = RegularRep::new(group).loss(&elements, &z1, &z2, distance)?;
        assert_close(&[scalar(&loss)], &[value(&both)], 1e-14);
        let grads = loss.backward()?;
        let grad = [&z1, &z2].map(|v| flat(grads.get(v).expect("a gradient"))).concat();
        assert_close(&grad, &differences(&both, 1e-5, value), 1e-9);
    }
    Ok(())
}

#[test]
fn a_regular_embedding_has_no_loss_and_a_mixed_one_has() -> Result<()> {
    // z[h] = ⟨h·template, x⟩ is a lifting layer, whose output has the regular representation.
    let group = Subgroup::D4;
    let rep = RegularRep::new(group);
    let turn = |g: D4, x: &Tensor| -> Result<Tensor> {
        let grid = ser_reg::TokenGrid::square(4)?;
        Ok(ser_reg::GridOperator::new(&[g], grid, &Default::default())?.apply(x)?)
    };
    let (template, x) = (random(&[1, 1, 4, 4], 1), random(&[6, 1, 4, 4], 2));
    let embed = |x: &Tensor| -> Result<Tensor> {
        let column = |h: &D4| turn(*h, &template)?.broadcast_mul(x)?.sum((1, 2, 3));
        Tensor::stack(&group.elements().iter().map(column).collect::<Result<Vec<_>>>()?, 1)
    };
    for g in D4::ALL {
        let (z1, z2) = (embed(&x)?, embed(&turn(g, &x)?)?);
        let loss = scalar(&rep.loss(&[g], &z1, &z2, Distance::Mse)?);
        assert!(loss < 1e-28, "{g:?}: {loss}");
        if g != D4::IDENTITY {
            let wrong = scalar(&rep.loss(&[D4::IDENTITY], &z1, &z2, Distance::Mse)?);
            assert!(wrong > 0.1, "{g:?}: {wrong}");
        }
    }
    // Invariant blocks have zero loss, as documented.
    let invariant = Tensor::ones((6, 8), DType::F64, CPU)?;
    assert_eq!(scalar(&rep.loss(&[D4::ROT90], &invariant, &invariant, Distance::Mse)?), 0.);
    Ok(())
}

#[test]
fn zero_vectors_and_half_precision() -> Result<()> {
    let rep = RegularRep::new(Subgroup::C4);
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let (zero, z) = (
            Var::zeros((2, 8), dtype, CPU)?,
            Var::from_tensor(&(random(&[2, 8], 1) * 300.)?.to_dtype(dtype)?)?,
        );
        assert_eq!(rep.apply(&[D4::ROT90], &z)?.dtype(), dtype);
        for distance in [Distance::Mse, COSINE] {
            for (a, b) in [(&zero, &zero), (&zero, &z), (&z, &zero)] {
                let loss = rep.loss(&[D4::ROT90], a, b, distance)?;
                assert_eq!(loss.dtype() == DType::F64, dtype == DType::F64);
                assert_finite(&loss);
                let grads = loss.backward()?;
                for v in [a, b] {
                    let grad = grads.get(v).expect("a gradient");
                    assert_eq!(grad.dtype(), dtype);
                    assert_finite(grad);
                }
            }
        }
        let exact = rep.loss(
            &[D4::ROT90],
            &z.to_dtype(DType::F64)?,
            &zero.to_dtype(DType::F64)?,
            Distance::Mse,
        )?;
        assert_close(
            &[scalar(&rep.loss(&[D4::ROT90], &z, &zero, Distance::Mse)?)],
            &[scalar(&exact)],
            1e-6,
        );
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let rep = RegularRep::new(Subgroup::C4);
    let z = random(&[3, 8], 1);
    let g = [D4::ROT90];
    let act = |rep: RegularRep, g: &[D4], z: &Tensor, parts: &[&str]| {
        assert_says(rep.apply(g, z), &[&["RegularRep"], parts].concat());
        assert_says(rep.loss(g, z, z, Distance::Mse), &[&["RegularRep"], parts].concat());
    };
    act(rep, &g, &random(&[3, 6], 1), &["multiple of 4", "C4", "[3, 6]"]);
    act(rep, &g, &random(&[3, 2, 4], 1), &["(B, D)", "[3, 2, 4]"]);
    act(rep, &[D4::HFLIP], &z, &["elements of C4", "D4"]);
    act(rep, &[], &z, &["one for each of 3", "got 0"]);
    act(rep, &[D4::ROT90; 2], &z, &["one for each of 3", "got 2"]);
    act(rep, &g, &z.to_dtype(DType::U32)?, &["f16, bf16, f32 or f64", "u32"]);
    let loss = |b: &Tensor, parts: &[&str]| assert_says(rep.loss(&g, &z, b, Distance::Mse), parts);
    loss(&random(&[3, 4], 1), &["RegularRep::loss", "[3, 8]", "[3, 4]"]);
    loss(&z.to_dtype(DType::F32)?, &["of one type", "f64", "f32"]);
    let empty = z.narrow(0, 0, 0)?;
    assert_says(rep.loss(&g, &empty, &empty, Distance::Mse), &["at least one", "[0, 8]"]);
    for eps in [-1e-3, f64::INFINITY] {
        let bad = rep.loss(&g, &z, &z, Distance::Cosine { eps });
        assert_says(bad, &["Distance::Cosine::eps", "at least 0", &eps.to_string()]);
    }
    Ok(())
}
