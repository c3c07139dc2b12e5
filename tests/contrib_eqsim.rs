//! EqSim: loops over pairs, the identity of the closed form, and the clamp.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{cases, random};
use loss_common::{assert_close, assert_finite, assert_says, differences, flat, scalar};
use proptest::prelude::*;
use ser_reg::contrib::{EqSim, Margin};

const CPU: &Device = &Device::Cpu;

/// Both sides of every pair of rows, `(a − b)²` and `(a + b)²`, from their four scores.
fn sides(n: usize, s: &[f64]) -> [Vec<f64>; 2] {
    let s = |i: usize, j: usize| s[i * n + j];
    let pairs = || (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
    [
        pairs().map(|(i, j)| ((s(i, i) - s(i, j)) - (s(j, j) - s(j, i))).powi(2)).collect(),
        pairs().map(|(i, j)| ((s(i, i) - s(j, i)) - (s(j, j) - s(i, j))).powi(2)).collect(),
    ]
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn by_loops(config: EqSim, n: usize, s: &[f64]) -> f64 {
    let by_mean = |m: f64| sides(n, s).iter().map(|x| (mean(x) - m).max(0.)).sum();
    let by_pair = |m: f64| {
        let over = |x: &Vec<f64>| mean(&x.iter().map(|x| (x - m).max(0.)).collect::<Vec<_>>());
        sides(n, s).iter().map(over).sum()
    };
    match config.margin {
        Margin::Mean(m) => by_mean(m),
        Margin::Pair(m) => by_pair(m),
        Margin::None => {
            let off: Vec<f64> = (0..n * n)
                .filter(|k| k / n != k % n)
                .map(|k| (s[k] - s[k % n * n + k / n]).powi(2))
                .collect();
            let diagonal: Vec<f64> = (0..n).map(|i| s[i * n + i]).collect();
            let center = mean(&diagonal);
            let variance =
                diagonal.iter().map(|d| (d - center).powi(2)).sum::<f64>() / (n - 1) as f64;
            mean(&off) + config.diagonal * variance
        }
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn values_and_gradients_match_loops(n in 2usize..6, seed: u64, margin in 0f64..1., diagonal in 0f64..3.) {
        let s = Var::from_tensor(&random(&[n, n], seed)).unwrap();
        // Central differences must not cross the clamp.
        let sides = sides(n, &flat(&s));
        let terms = sides.concat().into_iter().chain(sides.iter().map(|x| mean(x)));
        prop_assume!(terms.into_iter().all(|x| (x - margin).abs() > 1e-5));
        for margin in [Margin::None, Margin::Mean(margin), Margin::Pair(margin)] {
            let config = EqSim { diagonal, margin };
            let out = config.forward(&s).unwrap();
            let value = |s: &[f64]| by_loops(config, n, s);
            assert_close(&[scalar(&out.loss)], &[value(&flat(&s))], 1e-13);
            let grads = out.loss.backward().unwrap();
            assert_close(&flat(grads.get(&s).unwrap()), &differences(&flat(&s), 1e-7, value), 1e-6);
        }
    }

    /// Both sides vanish exactly if `s_ij = s_ji` and `s_ii = s_jj`.
    #[test]
    fn both_sides_are_twice_the_closed_form(n in 2usize..7, seed: u64) {
        let s = random(&[n, n], seed);
        let loss = |diagonal, margin| scalar(&EqSim { diagonal, margin }.forward(&s).unwrap().loss);
        let closed = 2. * loss(2., Margin::None);
        assert_close(&[loss(0., Margin::Mean(0.)), loss(0., Margin::Pair(0.))], &[closed; 2], 1e-13);
        let out = EqSim::default().forward(&s).unwrap();
        assert_close(&[scalar(&out.loss)], &[scalar(&out.asymmetry) + scalar(&out.variance)], 1e-14);
    }

    #[test]
    fn the_clamp_rate_counts_terms_without_a_gradient(n in 2usize..6, seed: u64, m in 0f64..2.) {
        let s = random(&[n, n], seed);
        let clamped = |margin| scalar(&EqSim { margin, ..Default::default() }.forward(&s).unwrap().clamped);
        let sides = sides(n, &flat(&s));
        let share = |x: Vec<f64>| x.iter().filter(|x| **x <= m).count() as f64 / x.len() as f64;
        assert_close(&[clamped(Margin::Mean(m))], &[share(sides.iter().map(|s| mean(s)).collect())], 1e-14);
        assert_close(&[clamped(Margin::Pair(m))], &[share(sides.concat())], 1e-14);
        prop_assert_eq!(clamped(Margin::None), 0.);
    }
}

#[test]
fn a_symmetric_matrix_of_equal_matches_is_at_rest() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let x = random(&[4, 4], 1);
        let s = (&x + x.t()?)?;
        let off = (1.0 - Tensor::eye(4, DType::F64, CPU)?)?;
        let s = ((s * off)? + Tensor::eye(4, DType::F64, CPU)?)?.to_dtype(dtype)?;
        for s in [s, Tensor::zeros((4, 4), dtype, CPU)?] {
            let s = Var::from_tensor(&s)?;
            for margin in [Margin::None, Margin::Mean(0.1), Margin::Pair(0.1)] {
                let out = EqSim { margin, ..Default::default() }.forward(&s)?;
                assert_eq!(scalar(&out.loss), 0., "{margin:?}");
                let grads = out.loss.backward()?;
                let grad = grads.get(&s).expect("a gradient");
                assert_eq!(grad.dtype(), dtype);
                assert!(flat(grad).iter().all(|g| *g == 0.));
            }
        }
        // 200² overflows f16.
        let far = Tensor::new(&[[0f32, 200.], [-200., 0.]], CPU)?.to_dtype(dtype)?;
        let out = EqSim::default().forward(&far)?;
        assert_finite(&out.loss);
        assert_eq!(scalar(&out.loss), 160_000.);
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let say = |s: &Tensor, parts: &[&str]| {
        assert_says(EqSim::default().forward(s), &[&["EqSim"], parts].concat())
    };
    say(&random(&[3, 4], 1), &["square matrix (B, B)", "[3, 4]"]);
    say(&random(&[1, 1], 1), &["at least two matched pairs", "[1, 1]"]);
    say(&random(&[2, 2, 2], 1), &["square matrix", "[2, 2, 2]"]);
    say(&random(&[2, 2], 1).to_dtype(DType::I64)?, &["f16, bf16, f32 or f64", "i64"]);
    let s = random(&[2, 2], 1);
    for bad in [-0.1, f64::NAN, f64::INFINITY] {
        for (margin, field) in
            [(Margin::Mean(bad), "Margin::Mean"), (Margin::Pair(bad), "Margin::Pair")]
        {
            let config = EqSim { margin, ..Default::default() };
            assert_says(config.forward(&s), &[field, "at least 0", &bad.to_string()]);
        }
        let config = EqSim { diagonal: bad, ..Default::default() };
        assert_says(config.forward(&s), &["EqSim::diagonal", "at least 0", &bad.to_string()]);
    }
    Ok(())
}
