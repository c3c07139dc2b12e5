//! Prediction consistency: loops over pairs, central differences, and extreme logits.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{cases, random};
use loss_common::{assert_close, assert_finite, assert_says, differences, flat, scalar};
use proptest::prelude::*;
use ser_reg::contrib::{Divergence, PredictionConsistency, mean_pairwise_symmetric_kl};

const CPU: &Device = &Device::Cpu;
const KINDS: [Divergence; 3] =
    [Divergence::SymmetricKl, Divergence::JensenShannon, Divergence::Mse];

fn consistency(kind: Divergence, temperature: f64) -> PredictionConsistency {
    PredictionConsistency { kind, temperature }
}

fn softmax(z: &[f64], tau: f64) -> Vec<f64> {
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = z.iter().map(|z| ((z - top) / tau).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()
}

/// The divergence by loops over pairs and samples.
fn by_loops(kind: Divergence, tau: f64, [k, b, c]: [usize; 3], z: &[f64]) -> f64 {
    let sample = |i: usize| {
        let p: Vec<Vec<f64>> = (0..k).map(|k| softmax(&z[(k * b + i) * c..][..c], tau)).collect();
        let pairs = || (0..k).flat_map(|i| (0..i).map(move |j| (i, j)));
        let over_pairs = |f: &dyn Fn(&[f64], &[f64]) -> f64| {
            pairs().map(|(i, j)| f(&p[i], &p[j])).sum::<f64>() / pairs().count() as f64
        };
        match kind {
            Divergence::SymmetricKl => over_pairs(&|p, q| 0.5 * (kl(p, q) + kl(q, p))),
            Divergence::Mse => over_pairs(&|p, q| {
                p.iter().zip(q).map(|(p, q)| (p - q).powi(2)).sum::<f64>() / c as f64
            }),
            Divergence::JensenShannon => {
                let mean: Vec<f64> =
                    (0..c).map(|c| p.iter().map(|p| p[c]).sum::<f64>() / k as f64).collect();
                p.iter().map(|p| kl(p, &mean)).sum::<f64>() / k as f64
            }
        }
    };
    (0..b).map(sample).sum::<f64>() / b as f64
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn values_and_gradients_match_loops(
        k in 2usize..5, b in 1usize..4, c in 2usize..5, tau in 0.3f64..3., seed: u64,
    ) {
        let shape = [k, b, c];
        let z = Var::from_tensor(&(random(&shape, seed) * 3.).unwrap()).unwrap();
        for kind in KINDS {
            let loss = consistency(kind, tau).forward(&z).unwrap();
            let value = |z: &[f64]| by_loops(kind, tau, shape, z);
            assert_close(&[scalar(&loss)], &[value(&flat(&z))], 1e-12);
            let grads = loss.backward().unwrap();
            assert_close(&flat(grads.get(&z).unwrap()), &differences(&flat(&z), 3e-6, value), 1e-7);
        }
        let metric = mean_pairwise_symmetric_kl(&z).unwrap();
        assert_close(&[metric], &[by_loops(Divergence::SymmetricKl, 1., shape, &flat(&z))], 1e-12);
    }

    #[test]
    fn order_of_views_and_a_shift_of_logits_do_not_matter(seed: u64, shift in -50f64..50.) {
        let z = random(&[3, 2, 4], seed);
        for kind in KINDS {
            let loss = |z: &Tensor| scalar(&consistency(kind, 0.7).forward(z).unwrap());
            let turned = Tensor::cat(&[&z.narrow(0, 1, 2).unwrap(), &z.narrow(0, 0, 1).unwrap()], 0).unwrap();
            let shifted = (&z + shift).unwrap();
            assert_close(&[loss(&turned), loss(&shifted)], &[loss(&z); 2], 1e-12);
            prop_assert!(loss(&z) > 0.);
            let tempered = scalar(&consistency(kind, 1.).forward(&(&z / 0.7).unwrap()).unwrap());
            assert_close(&[tempered], &[loss(&z)], 1e-12);
        }
    }
}

#[test]
fn equal_views_are_at_rest() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let one = random(&[1, 3, 5], 1).to_dtype(dtype)?;
        // candle's maximum passes a gradient to each of equal logits; the result must not depend on
        // it.
        let flat_view = Tensor::zeros((1, 3, 5), dtype, CPU)?;
        for one in [one, flat_view] {
            let z = Var::from_tensor(&one.repeat((3, 1, 1))?)?;
            for kind in KINDS {
                let loss = consistency(kind, 0.5).forward(&z)?;
                assert!(scalar(&loss).abs() < 1e-7, "{kind:?}: {loss}");
                let grads = loss.backward()?;
                let grad = flat(grads.get(&z).expect("a gradient"));
                assert!(grad.iter().all(|g| g.abs() < 1e-6), "{kind:?}: {grad:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn extreme_logits_have_the_limits_as_values() -> Result<()> {
    // Each view predicts another class with certainty.
    for dtype in [DType::F16, DType::F32, DType::F64] {
        for k in [2usize, 3] {
            let z = Tensor::eye(k, dtype, CPU)?.affine(2e4, -1e4)?.unsqueeze(1)?;
            let z = Var::from_tensor(&z)?;
            for (kind, limit) in [
                (Divergence::SymmetricKl, 2e4),
                (Divergence::JensenShannon, (k as f64).ln()),
                (Divergence::Mse, 2. / k as f64),
            ] {
                let loss = consistency(kind, 1.).forward(&z)?;
                assert_close(&[scalar(&loss)], &[limit], 1e-6);
                let grads = loss.backward()?;
                let grad = grads.get(&z).expect("a gradient");
                assert_eq!(grad.dtype(), dtype);
                assert_finite(grad);
            }
            assert_close(&[mean_pairwise_symmetric_kl(&z)?], &[2e4], 1e-12);
        }
    }
    // A low temperature acts like distant logits. The gradient is at most 1/τ per logit.
    let z = Var::new(&[[[1f32, -1., 0.]], [[-1., 1., 0.]]], CPU)?;
    for kind in KINDS {
        let loss = consistency(kind, 1e-4).forward(&z)?;
        assert_finite(&loss);
        assert_finite(loss.backward()?.get(&z).expect("a gradient"));
    }
    Ok(())
}

#[test]
fn views_come_as_a_slice_too_and_targets_are_detached() -> Result<()> {
    let (a, b) = (Var::from_tensor(&random(&[2, 3], 1))?, Var::from_tensor(&random(&[2, 3], 2))?);
    for kind in KINDS {
        let loss = consistency(kind, 1.).forward_views(&[a.as_tensor().clone(), b.detach()])?;
        let stacked = Tensor::stack(&[a.as_tensor(), b.as_tensor()], 0)?;
        assert_eq!(scalar(&loss), scalar(&consistency(kind, 1.).forward(&stacked)?));
        let grads = loss.backward()?;
        assert!(grads.get(&a).is_some() && grads.get(&b).is_none());
    }
    Ok(())
}

#[test]
fn half_precision_computes_in_f32() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let z = (random(&[2, 4, 10], 3) * 4.)?.to_dtype(dtype)?;
        for kind in KINDS {
            let loss = consistency(kind, 1.).forward(&z)?;
            assert_eq!(loss.dtype(), DType::F32);
            let exact = consistency(kind, 1.).forward(&z.to_dtype(DType::F64)?)?;
            assert_close(&[scalar(&loss)], &[scalar(&exact)], 1e-6);
        }
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let z = random(&[2, 3, 4], 1);
    let say = |z: &Tensor, parts: &[&str]| {
        for kind in KINDS {
            let parts = [&["PredictionConsistency"], parts].concat();
            assert_says(consistency(kind, 1.).forward(z), &parts);
        }
    };
    say(&z.narrow(0, 0, 1)?, &["at least two views", "[1, 3, 4]"]);
    say(&z.narrow(2, 0, 1)?, &["two classes", "(z, 0)", "[2, 3, 1]"]);
    say(&z.narrow(1, 0, 0)?, &["(K, B, C)", "[2, 0, 4]"]);
    say(&z.flatten_to(1)?, &["(K, B, C)", "[6, 4]"]);
    say(&z.to_dtype(DType::U8)?, &["f16, bf16, f32 or f64", "u8"]);
    for tau in [0., -1., f64::NAN, f64::INFINITY] {
        let bad = consistency(Divergence::Mse, tau).forward(&z);
        assert_says(bad, &["PredictionConsistency::temperature", "above 0", &tau.to_string()]);
    }
    let views = |views: &[Tensor], parts: &[&str]| {
        assert_says(PredictionConsistency::default().forward_views(views), parts);
    };
    views(&[], &["at least two views", "got 0"]);
    views(&[z.get(0)?], &["at least two views", "got 1"]);
    views(&[z.get(0)?, z.get(1)?.narrow(0, 0, 2)?], &["one shape", "[3, 4]", "[2, 4]"]);
    views(&[z.get(0)?, z.get(1)?.to_dtype(DType::F32)?], &["of one type", "f64", "f32"]);
    let name = "mean_pairwise_symmetric_kl";
    let nan = Tensor::new(&[[[f32::NAN, 0.]], [[0., 0.]]], CPU)?;
    assert_says(mean_pairwise_symmetric_kl(&nan), &[name, "finite logits", "NaN"]);
    assert_says(mean_pairwise_symmetric_kl(&z.to_dtype(DType::I64)?), &[name, "i64"]);
    assert_says(mean_pairwise_symmetric_kl(&z.get(0)?), &["(K, B, C)", "[3, 4]"]);
    Ok(())
}

#[test]
fn masked_classes_add_nothing() -> Result<()> {
    for dtype in [DType::F16, DType::F32, DType::F64] {
        for tau in [1., 1e-3] {
            let z = random(&[3, 2, 4], 5).to_dtype(dtype)?;
            let hidden = Tensor::full(f64::NEG_INFINITY, (3, 2, 1), CPU)?.to_dtype(dtype)?;
            let masked = Var::from_tensor(&Tensor::cat(&[&z, &hidden], 2)?)?;
            let bare = Var::from_tensor(&z)?;
            for kind in KINDS {
                let (with, without) = (
                    consistency(kind, tau).forward(&masked)?,
                    consistency(kind, tau).forward(&bare)?,
                );
                // The mean square is a mean over classes.
                let scale = if kind == Divergence::Mse { 5. / 4. } else { 1. };
                assert_close(&[scalar(&with) * scale], &[scalar(&without)], 1e-5);
                let grad = with.backward()?.get(&masked).expect("a gradient").clone();
                assert!(flat(&grad.narrow(2, 4, 1)?).iter().all(|g| *g == 0.));
                let kept = (grad.narrow(2, 0, 4)?.to_dtype(DType::F64)? * scale)?;
                let grads = without.backward()?;
                let expected = flat(grads.get(&bare).expect("a gradient"));
                assert_close(&flat(&kept), &expected, 2e-3);
            }
            let metric = mean_pairwise_symmetric_kl(&masked)?;
            assert_close(&[metric], &[mean_pairwise_symmetric_kl(&bare)?], 1e-12);
        }
    }
    // A class masked in one view, and a sample without any class, have finite gradients.
    let one = f32::NEG_INFINITY;
    let z = Var::new(&[[[1f32, one, 0.], [one; 3]], [[1., 2., 0.], [one; 3]]], CPU)?;
    for kind in KINDS {
        let loss = consistency(kind, 1.).forward(&z)?;
        assert_finite(&loss);
        assert_finite(loss.backward()?.get(&z).expect("a gradient"));
    }
    assert_says(mean_pairwise_symmetric_kl(&z), &["finite logits", "-inf in all views", "inf"]);
    Ok(())
}
