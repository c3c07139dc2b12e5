//! What the benches compare: the crate's work and the same written in plain candle operations, on seeded values.
#![allow(dead_code)] // each bench uses a part

pub mod action;
pub mod contrast;
pub mod resize;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Seeded values in [-1, 1), f32 on the CPU.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The largest difference between two tensors.
pub fn gap(a: &Tensor, b: &Tensor) -> f32 {
    let gap = (a - b).unwrap().abs().unwrap();
    gap.max_all().unwrap().to_scalar().unwrap()
}
