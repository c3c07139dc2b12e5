//! Sparse operators with four taps, a rotation per sample, compared with plain candle: a gather and a
//! product per tap.
//!
//! `benches/pytorch/sparse.py` does the same work with PyTorch's `grid_sample`.
#![allow(missing_docs)] // of what criterion's macro makes

use std::hint::black_box;

use candle_core::{Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{Filter, GridOperator, GroupAction, TokenGrid, group::Affine};

const BATCH: usize = 64;
const SIDE: usize = 14;
const CHANNELS: usize = 384;

fn random(shape: &[usize]) -> Tensor {
    let mut rng = StdRng::seed_from_u64(0);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The four taps of bilinear sampling with a repeated border: for each, rows of the flattened batch and their weights.
fn taps(turns: &[Affine], grid: TokenGrid) -> Vec<(Tensor, Tensor)> {
    let (n, cells) = (grid.rows(), grid.len());
    let split = |s: f64| {
        let s = s * n as f64 - 0.5;
        let clamp = |i: f64| i.clamp(0.0, n as f64 - 1.0) as usize;
        (clamp(s.floor()), clamp(s.floor() + 1.0), s - s.floor())
    };
    let mut taps = vec![(Vec::new(), Vec::new()); 4];
    for (b, turn) in turns.iter().enumerate() {
        for i in 0..cells {
            let [y, x] = turn.source(grid.center(i / n, i % n));
            let ((top, bottom, v), (left, right, u)) = (split(y), split(x));
            let four = [
                (top, left, (1.0 - v) * (1.0 - u)),
                (top, right, (1.0 - v) * u),
                (bottom, left, v * (1.0 - u)),
                (bottom, right, v * u),
            ];
            for ((index, weight), (row, col, w)) in taps.iter_mut().zip(four) {
                index.push((b * cells + row * n + col) as u32);
                weight.push(w as f32);
            }
        }
    }
    let tensors = taps.into_iter().map(|(index, weight)| {
        let rows = index.len();
        (
            Tensor::from_vec(index, rows, &Device::Cpu).unwrap(),
            Tensor::from_vec(weight, (rows, 1), &Device::Cpu).unwrap(),
        )
    });
    tensors.collect()
}

/// One `index_select` and one product for each tap.
fn plain(x: &Tensor, taps: &[(Tensor, Tensor)]) -> Result<Tensor> {
    let flat = x.flatten(0, 1)?;
    let mut sum: Option<Tensor> = None;
    for (index, weight) in taps {
        let term = flat.index_select(index, 0)?.broadcast_mul(weight)?;
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    sum.expect("four taps").reshape(x.dims())
}

/// The backward pass of [`plain`], as candle's autograd runs it.
fn plain_backward(cotangent: &Tensor, taps: &[(Tensor, Tensor)], zeros: &Tensor) -> Result<Tensor> {
    let flat = cotangent.flatten(0, 1)?;
    let mut sum = zeros.flatten(0, 1)?;
    for (index, weight) in taps {
        sum = sum.index_add(index, &flat.broadcast_mul(weight)?, 0)?;
    }
    sum.reshape(cotangent.dims())
}

fn rotations(c: &mut Criterion) {
    let grid = TokenGrid::square(SIDE).unwrap();
    let angle = |b: usize| -170.0 + 340.0 * b as f64 / (BATCH - 1) as f64;
    let turns: Vec<Affine> = (0..BATCH).map(|b| Affine::rotation(angle(b)).unwrap()).collect();
    let build = |filter: Filter| GridOperator::new(&turns, grid, &filter.into()).unwrap();
    let (x, cotangent) =
        (random(&[BATCH, grid.len(), CHANNELS]), random(&[BATCH, grid.len(), CHANNELS]));
    let zeros = x.zeros_like().unwrap();
    let (bilinear, four) = (build(Filter::Bilinear), taps(&turns, grid));
    let gap = |a: Tensor, b: Tensor| {
        let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        gap.to_scalar::<f32>().unwrap()
    };
    assert!(gap(bilinear.apply(&x).unwrap(), plain(&x, &four).unwrap()) < 1e-5);
    // The adjoint equals candle's gradient of the plain form.
    let var = Var::from_tensor(&x).unwrap();
    let loss = (plain(&var, &four).unwrap() * &cotangent).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    let back = bilinear.adjoint().apply(&cotangent).unwrap();
    assert!(gap(back.clone(), grads.get(&var).unwrap().clone()) < 1e-4);
    assert!(gap(back, plain_backward(&cotangent, &four, &zeros).unwrap()) < 1e-4);

    let mut group = c.benchmark_group("a rotation per sample on (64, 14x14, 384)");
    group.sample_size(30);
    group.throughput(Throughput::Bytes(2 * 4 * x.elem_count() as u64));
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        let operator = build(filter);
        group.bench_function(format!("ours, {name}"), |b| {
            b.iter(|| operator.apply(black_box(&x)).unwrap())
        });
        group.bench_function(
            format!("ours, {name}, forward + backward, operator built each time"),
            |b| {
                b.iter(|| {
                    let operator = build(filter);
                    let y = operator.apply(black_box(&x)).unwrap();
                    let back = operator.adjoint().apply(black_box(&cotangent)).unwrap();
                    (y, back)
                })
            },
        );
        group.bench_function(format!("build the operator, {name}"), |b| b.iter(|| build(filter)));
    }
    group.bench_function("candle: index_select per tap, bilinear", |b| {
        b.iter(|| plain(black_box(&x), &four).unwrap())
    });
    group.bench_function("candle: index_select per tap, bilinear, forward + backward", |b| {
        b.iter(|| {
            let y = plain(black_box(&x), &four).unwrap();
            let back = plain_backward(black_box(&cotangent), &four, &zeros).unwrap();
            (y, back)
        })
    });
    group.bench_function("copy", |b| b.iter(|| black_box(&x).copy().unwrap()));
    group.finish();
}

criterion_group!(benches, rotations);
criterion_main!(benches);
