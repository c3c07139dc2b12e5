//! The examples' layers: fused operations against plain ones, and gradients against central differences.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg_trainers::nn::{self, BatchNorm, fused, plain};

fn random(shape: &[usize], seed: u64) -> Var {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

/// Values and gradients of two ways to compute the same.
#[track_caller]
fn assert_same(
    vars: &[&Var],
    tolerance: f32,
    a: impl Fn() -> Result<Tensor>,
    b: impl Fn() -> Result<Tensor>,
) {
    let (a, b) = (a().unwrap(), b().unwrap());
    assert!(distance(&a, &b) < tolerance, "values: {}", distance(&a, &b));
    // Weights that differ from place to place, so that no two errors cancel.
    let weights = random(a.dims(), 99);
    let grads =
        |y: &Tensor| (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (da, db) = (grads(&a), grads(&b));
    for (i, var) in vars.iter().enumerate() {
        let (da, db) = (da.get(var).unwrap(), db.get(var).unwrap());
        let scale = da.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap().max(1.0);
        let error = distance(da, db) / scale;
        assert!(error < tolerance, "gradient of argument {i}: {error}");
    }
}

#[test]
fn layer_norm_is_the_plain_one() {
    // 300 rows: more than one piece of work, and a last one that is not full.
    let (x, scale, shift) = (random(&[3, 100, 20], 0), random(&[20], 1), random(&[20], 2));
    assert_same(
        &[&x, &scale, &shift],
        1e-5,
        || fused::layer_norm(&x, &scale, &shift, 1e-6),
        || plain::layer_norm(&x, &scale, &shift, 1e-6),
    );
}

#[test]
fn gelu_is_the_plain_one() {
    let x = Var::from_tensor(&(random(&[200, 97], 0).as_tensor() * 6.0).unwrap()).unwrap();
    assert_same(&[&x], 1e-5, || fused::gelu(&x), || plain::gelu(&x));
}

#[test]
fn affine_map_is_the_plain_one() {
    let (x, weight, bias) = (random(&[300, 20], 0), random(&[20, 30], 1), random(&[30], 2));
    assert_same(
        &[&x, &weight, &bias],
        1e-5,
        || fused::affine(&x, &weight, &bias),
        || plain::affine(&x, &weight, &bias),
    );
}

#[test]
fn attention_is_the_plain_one() {
    for (heads, channels) in [(1, 5), (2, 16), (3, 12)] {
        let qkv = random(&[4, 11, 3 * channels], 0);
        assert_same(
            &[&qkv],
            1e-5,
            || fused::attention(&qkv, heads),
            || plain::attention(&qkv, heads),
        );
    }
}

#[test]
fn fused_operations_read_strided_inputs() {
    let x = random(&[20, 6], 0);
    let flipped = || x.t();
    let (scale, shift) = (random(&[20], 1), random(&[20], 2));
    assert_same(
        &[&x],
        1e-5,
        || fused::layer_norm(&flipped()?, &scale, &shift, 1e-6),
        || plain::layer_norm(&flipped()?, &scale, &shift, 1e-6),
    );
    assert_same(&[&x], 1e-5, || fused::gelu(&flipped()?), || plain::gelu(&flipped()?));
}

#[test]
fn extreme_inputs_stay_finite() {
    let values = [0f32, -1e4, 1e4, -88.0, 88.0, 1e-30];
    let x = Var::new(&[values], &Device::Cpu).unwrap();
    let (one, zero) = (random(&[6], 1), random(&[6], 2));
    let constant = Var::new(&[[3f32; 6]], &Device::Cpu).unwrap();
    for y in [
        fused::gelu(&x).unwrap(),
        fused::layer_norm(&constant, &one, &zero, 1e-6).unwrap(),
        fused::attention(&x.reshape((1, 2, 3)).unwrap(), 1).unwrap(),
        nn::normalize(&x.zeros_like().unwrap()).unwrap(),
    ] {
        assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
    let zero = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let grads = nn::normalize(&zero).unwrap().sum_all().unwrap().backward().unwrap();
    let slope = grads.get(&zero).unwrap().abs().unwrap().max_all().unwrap();
    assert!(slope.to_scalar::<f32>().unwrap().is_finite());
}

#[test]
fn wrong_shapes_are_refused() {
    let (x, three) = (random(&[2, 4], 0), random(&[3], 1));
    let error = fused::layer_norm(&x, &three, &three, 1e-6).unwrap_err().to_string();
    assert!(error.contains("rows of 3") && error.contains("[2, 4]"), "{error}");
    let error = fused::attention(&random(&[1, 2, 10], 0), 2).unwrap_err().to_string();
    assert!(error.contains("2 heads") && error.contains("[1, 2, 10]"), "{error}");
}

/// Gradients in `f64`, where the plain operations run, against central differences.
#[track_caller]
fn assert_differentiable(shape: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) {
    let x = random(shape, 3).to_dtype(DType::F64).unwrap();
    let var = Var::from_tensor(&x).unwrap();
    let value = |x: &Tensor| -> Result<Tensor> {
        let y = f(x)?;
        let weights = random(y.dims(), 4).to_dtype(DType::F64)?;
        (y * weights)?.sum_all()
    };
    let grads = value(&var).unwrap().backward().unwrap();
    let gradient = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let base = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for (i, gradient) in gradient.iter().enumerate() {
        let at = |step: f64| -> f64 {
            let mut moved = base.clone();
            moved[i] += step;
            let moved = Tensor::from_vec(moved, shape, &Device::Cpu).unwrap();
            value(&moved).unwrap().to_scalar().unwrap()
        };
        let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((gradient - difference).abs() < 1e-6, "place {i}: {gradient} against {difference}");
    }
}

#[test]
fn gradients_match_central_differences() {
    let vector = |n, seed| random(&[n], seed).to_dtype(DType::F64).unwrap();
    let (scale, shift) = (vector(5, 1), vector(5, 2));
    assert_differentiable(&[3, 5], |x| nn::layer_norm(x, &scale, &shift, 1e-6));
    assert_differentiable(&[3, 5], nn::gelu);
    assert_differentiable(&[2, 3, 12], |x| nn::attention(x, 2));
    assert_differentiable(&[3, 5], nn::normalize);
    assert_differentiable(&[4, 3], |x| BatchNorm::without_affine().forward(x));
}

#[test]
fn batch_norm_standardises_each_channel() {
    let x = random(&[50, 3], 0);
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let y = BatchNorm::without_affine().forward(&x).unwrap();
    let mean = y.mean(0).unwrap().to_vec1::<f32>().unwrap();
    let square = y.sqr().unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap();
    for (mean, square) in mean.iter().zip(square) {
        assert!(mean.abs() < 1e-5 && (square - 1.0).abs() < 1e-3);
    }
    // With scale and shift zero nothing is left of it.
    let y = BatchNorm::new(3, vb).unwrap().forward(&x).unwrap();
    assert_eq!(y.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
}
