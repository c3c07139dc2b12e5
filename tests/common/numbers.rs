//! Seeded values, comparison, and derivatives by central differences.
#![allow(dead_code)]

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Values in `[−1, 1)`, `f64`.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = rng(seed);
    let values: Vec<f64> =
        (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Values of either sign, 0.2 to 1 in magnitude: differences can follow the direction of every
/// token.
pub fn tokens(rng: &mut StdRng, shape: impl Into<Shape>, dtype: DType) -> Result<Var> {
    let shape = shape.into();
    let mut value = || rng.random_range(0.2..1.0) * if rng.random() { 1.0 } else { -1.0 };
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| value()).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

/// All values of a tensor, in order.
pub fn values(x: &Tensor) -> Vec<f64> {
    let flat = || x.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
    flat().expect("a tensor of numbers")
}

pub fn scalar(x: &Tensor) -> f64 {
    assert_eq!(x.rank(), 0, "a scalar");
    values(x)[0]
}

/// The largest absolute difference; NaN if there is one.
pub fn max_gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let gaps = values(a).into_iter().zip(values(b)).map(|(a, b)| (a - b).abs());
    gaps.fold(0.0, |m, g| if g > m || g.is_nan() { g } else { m })
}

/// Asserts `|a − b| ≤ tol·(1 + |b|)` for all values; a NaN fails.
#[track_caller]
pub fn assert_close(a: &[f64], b: &[f64], tol: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() <= tol * (1.0 + b.abs()),
            "element {i}: {a}, expected {b} within {tol}"
        );
    }
}

#[track_caller]
pub fn assert_finite(x: &Tensor) {
    assert!(values(x).iter().all(|v| v.is_finite()), "{x}");
}

/// The derivative of `f` at `x` by central differences, one coordinate after the other.
pub fn differences(x: &[f64], step: f64, mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let center = x[i];
            let mut at = |v: f64| {
                x[i] = v;
                f(&x)
            };
            let slope = (at(center + step) - at(center - step)) / (2.0 * step);
            x[i] = center;
            slope
        })
        .collect()
}

/// Asserts that the gradient of the scalar `loss` at `x` is the derivative by central differences.
#[track_caller]
pub fn assert_gradient(x: &Tensor, tol: f64, loss: impl Fn(&Tensor) -> Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let got = values(loss(&x).backward().unwrap().get(&x).expect("a gradient"));
    let at = |v: &[f64]| scalar(&loss(&Tensor::from_slice(v, x.shape(), &Device::Cpu).unwrap()));
    assert_close(&got, &differences(&values(&x), 1e-4, at), tol);
}

/// Asserts that the error message of `result` contains every one of `parts`.
#[track_caller]
pub fn assert_says<T>(result: ser_reg::Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("expected an error with {parts:?}"),
        Err(e) => e.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}
