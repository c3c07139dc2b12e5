//! What the loss tests share: seeded tokens, comparison, and derivatives by central differences.
#![allow(dead_code)]

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Values of either sign, 0.2 to 1 in magnitude: no token is so short that differences cannot follow its direction.
pub fn tokens(rng: &mut StdRng, shape: impl Into<Shape>, dtype: DType) -> Result<Var> {
    let shape = shape.into();
    let mut value = || rng.random_range(0.2..1.0) * if rng.random() { 1.0 } else { -1.0 };
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| value()).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

pub fn flat(x: &Tensor) -> Vec<f64> {
    let flat = || x.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
    flat().expect("a tensor of numbers")
}

pub fn scalar(x: &Tensor) -> f64 {
    assert_eq!(x.rank(), 0, "a scalar");
    flat(x)[0]
}

#[track_caller]
pub fn assert_close(a: &[f64], b: &[f64], tol: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        // Written so that a NaN fails.
        assert!(
            (a - b).abs() <= tol * (1.0 + b.abs()),
            "element {i}: {a}, expected {b} within {tol}"
        );
    }
}

#[track_caller]
pub fn assert_finite(x: &Tensor) {
    assert!(flat(x).iter().all(|v| v.is_finite()), "{x}");
}

/// The derivative of `f` at `x`, one coordinate after the other.
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

/// That the error message of `result` has every one of `parts`.
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
