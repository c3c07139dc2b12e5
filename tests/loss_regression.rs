//! The objectives without negatives: values by loops, derivatives by differences, and what is
//! refused.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{assert_close, assert_finite, assert_says, differences, flat, rng, scalar, tokens};
use ser_reg::loss::{cosine, l1, mse, normalized_mse, smooth_l1};

const EPS: f64 = 1e-6;

type Loss = fn(&Tensor, &Tensor, Option<&[f32]>) -> ser_reg::Result<Tensor>;
/// The value of one token by its formula.
type Formula = fn(&[f64], &[f64]) -> f64;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn cos(a: &[f64], b: &[f64]) -> f64 {
    dot(a, b) / ((dot(a, a) + EPS) * (dot(b, b) + EPS)).sqrt()
}

fn mean_of(a: &[f64], b: &[f64], f: impl Fn(f64) -> f64) -> f64 {
    a.iter().zip(b).map(|(a, b)| f(a - b)).sum::<f64>() / a.len() as f64
}

fn huber(a: &[f64], b: &[f64], beta: f64) -> f64 {
    let each = |d: f64| {
        if d.abs() < beta { 0.5 * d * d / beta } else { d.abs() - 0.5 * beta }
    };
    mean_of(a, b, each)
}

const OBJECTIVES: [(&str, Loss, Formula); 6] = [
    ("mse", mse, |a, b| mean_of(a, b, |d| d * d)),
    (
        "normalized_mse",
        |a, b, w| normalized_mse(a, b, EPS, w),
        |a, b| {
            // |â − b̂|², which is 2 − 2cos only where eps does not count.
            let unit =
                |x: &[f64]| x.iter().map(|v| v / (dot(x, x) + EPS).sqrt()).collect::<Vec<_>>();
            unit(a).iter().zip(unit(b)).map(|(a, b)| (a - b).powi(2)).sum()
        },
    ),
    ("cosine", |a, b, w| cosine(a, b, EPS, w), |a, b| 1.0 - cos(a, b)),
    ("l1", l1, |a, b| mean_of(a, b, f64::abs)),
    ("smooth_l1 1", |a, b, w| smooth_l1(a, b, 1.0, w), |a, b| huber(a, b, 1.0)),
    ("smooth_l1 0.25", |a, b, w| smooth_l1(a, b, 0.25, w), |a, b| huber(a, b, 0.25)),
];

fn pair(seed: u64, dtype: DType) -> Result<(Var, Var)> {
    let rng = &mut rng(seed);
    Ok((tokens(rng, (2, 3, 4), dtype)?, tokens(rng, (2, 3, 4), dtype)?))
}

#[test]
fn values_and_gradients_match_the_formulas() -> Result<()> {
    let (a, b) = pair(1, DType::F64)?;
    let weights = [0.5f32, 0.0, 2.0, 1.0, 0.25, 3.0];
    for (name, loss, formula) in OBJECTIVES {
        for weights in [None, Some(&weights[..])] {
            let value = |x: &[f64]| {
                let (a, b) = x.split_at(24);
                let w = |t: usize| weights.map_or(1.0, |w| f64::from(w[t]));
                let total: f64 = (0..6).map(w).sum();
                let each = a.chunks(4).zip(b.chunks(4)).enumerate();
                each.map(|(t, (a, b))| w(t) * formula(a, b)).sum::<f64>() / total
            };
            let both = [flat(&a), flat(&b)].concat();
            let out = loss(&a, &b, weights)?;
            println!("{name}: {out}");
            assert_close(&[scalar(&out)], &[value(&both)], 1e-13);
            let grads = out.backward()?;
            let grad = [&a, &b].map(|v| flat(grads.get(v).expect("a gradient"))).concat();
            assert_close(&grad, &differences(&both, 1e-6, value), 1e-8);
            // The leading dimensions do not matter.
            let flattened = loss(&a.flatten(0, 1)?, &b.flatten(0, 1)?, weights)?;
            assert_eq!(scalar(&flattened), scalar(&out));
        }
    }
    Ok(())
}

#[test]
fn equal_tokens_have_no_gradient() -> Result<()> {
    let (a, _) = pair(2, DType::F64)?;
    let b = Var::from_tensor(&a.copy()?.detach())?;
    for (name, loss, _) in OBJECTIVES {
        let out = loss(&a, &b, None)?;
        let grads = out.backward()?;
        // eps keeps the cosine just below 1.
        assert!(scalar(&out).abs() < 1e-5, "{name}: {out}");
        let grad = flat(grads.get(&a).expect("a gradient"));
        assert!(grad.iter().all(|g| g.abs() < 1e-5), "{name}: {grad:?}");
    }
    Ok(())
}

#[test]
fn zero_tokens_are_finite_in_every_type() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let (a, _) = pair(3, dtype)?;
        let zero = Var::from_tensor(&a.zeros_like()?)?;
        for (_, loss, _) in OBJECTIVES {
            for (a, b) in [(&a, &zero), (&zero, &a), (&zero, &zero)] {
                let out = loss(a, b, None)?;
                let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                assert_eq!(out.dtype(), wide);
                let grads = out.backward()?;
                for v in [a, b] {
                    let grad = grads.get(v).expect("a gradient");
                    assert_eq!(grad.dtype(), dtype);
                    assert_finite(grad);
                }
                assert_finite(&out);
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_squares_do_not_overflow() -> Result<()> {
    let a = Tensor::full(half::f16::from_f32(300.0), (1, 4), &Device::Cpu)?;
    let b = (&a * -1.0)?;
    assert_eq!(scalar(&mse(&a, &b, None)?), 360_000.0);
    assert_close(&[scalar(&cosine(&a, &b, EPS, None)?)], &[2.0], 1e-6);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let (a, b) = pair(4, DType::F32)?;
    let (a, b) = (a.as_tensor(), b.as_tensor());
    let (short, double) = (b.narrow(1, 0, 2)?, b.to_dtype(DType::F64)?);
    let (ints, empty) = (a.to_dtype(DType::I64)?, a.narrow(1, 0, 0)?);
    let scalar = Tensor::new(1f32, &Device::Cpu)?;
    let (few, zeros, negative, nan) =
        ([1f32; 5], [0f32; 6], [1., 1., 1., 1., 1., -2.], [1., f32::NAN, 1., 1., 1., 1.]);
    for (name, loss, _) in OBJECTIVES {
        let op = name.split(' ').next().expect("a name");
        for (a, b, weights, parts) in [
            (a, &short, None, &["one shape", "[2, 3, 4]", "[2, 2, 4]"][..]),
            (a, &double, None, &["one type", "f32", "f64"]),
            (&ints, &ints, None, &["f16, bf16, f32 or f64", "i64"]),
            (&empty, &empty, None, &["at least one token", "[2, 0, 4]"]),
            (&scalar, &scalar, None, &["tokens", "scalar"]),
            (a, b, Some(&few[..]), &["one weight per token, 6", "5"]),
            (a, b, Some(&zeros[..]), &["above 0", "all 0"]),
            (a, b, Some(&negative[..]), &["at least 0", "-2"]),
            (a, b, Some(&nan[..]), &["finite weights", "NaN"]),
        ] {
            assert_says(loss(a, b, weights), &[op]);
            assert_says(loss(a, b, weights), parts);
        }
    }
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e300, 1e-46] {
        let got = format!("{bad:e}");
        for (result, field) in [
            (cosine(a, b, bad, None), "eps"),
            (normalized_mse(a, b, bad, None), "eps"),
            (smooth_l1(a, b, bad, None), "beta"),
        ] {
            assert_says(result, &[field, "finite value above 0", &got]);
        }
    }
    assert_says(smooth_l1(a, b, 0.0, None), &["beta", "above 0", "got 0"]);
    assert!(cosine(a, b, 0.0, None).is_ok());
    Ok(())
}

/// A token of weight 0 takes no part: whatever it holds, the loss is that of the others, and its gradient is 0.
#[test]
fn tokens_of_weight_zero_may_hold_anything() -> Result<()> {
    let weights = [1f32, 0.0, 2.0];
    for (name, loss, _) in OBJECTIVES {
        for bad in [f64::NAN, f64::INFINITY] {
            let values =
                |last: f64| Tensor::new(&[[1.0, -2.0], [bad, 0.5], [0.25, last]], &Device::Cpu);
            let (a, b) = (Var::from_tensor(&values(3.0)?)?, Var::from_tensor(&values(-1.0)?)?);
            let whole = loss(&a, &b, Some(&weights))?;
            let kept = |x: &Tensor| Tensor::cat(&[x.narrow(0, 0, 1)?, x.narrow(0, 2, 1)?], 0);
            let alone = loss(&kept(&a)?, &kept(&b)?, Some(&[1.0, 2.0]))?;
            assert_eq!(scalar(&whole), scalar(&alone), "{name}");
            let (grads, alone) = (whole.backward()?, alone.backward()?);
            for x in [&a, &b] {
                let gradient = grads.get(x).expect("a gradient");
                assert_eq!(flat(&gradient.narrow(0, 1, 1)?), [0.0, 0.0], "{name}");
                let expected = flat(alone.get(x).expect("a gradient"));
                assert_eq!(flat(gradient), expected, "{name}");
            }
        }
    }
    Ok(())
}
