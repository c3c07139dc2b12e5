//! The action on tokens and images, beside the same maths in plain candle operations.
#![allow(missing_docs)] // of what criterion's macro makes

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    Filter, GridOperator, Resample, TokenGrid,
    group::{D4, Scale},
};

const BATCH: usize = 64;
const CHANNELS: usize = 384;

fn random(shape: &[usize]) -> Tensor {
    let mut rng = StdRng::seed_from_u64(0);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// One element per sample the way one writes it in candle: a flip and a transpose per sample, then a stack.
fn plain_d4(x: &Tensor, elements: &[D4], side: usize) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    let map = x.reshape((batch, side, side, channels))?;
    let turned = elements.iter().enumerate().map(|(b, g)| {
        let mut x = map.get(b)?;
        if g.flip() {
            x = x.flip(&[1])?;
        }
        match g.turns() {
            0 => Ok(x),
            1 => x.transpose(0, 1)?.contiguous()?.flip(&[0]),
            2 => x.flip(&[0, 1]),
            _ => x.transpose(0, 1)?.contiguous()?.flip(&[1]),
        }
    });
    Tensor::stack(&turned.collect::<Result<Vec<_>>>()?, 0)?.reshape((batch, side * side, channels))
}

/// One gather over the flattened batch: the best that plain candle offers.
fn gather_d4(x: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (batch, n, channels) = x.dims3()?;
    x.reshape((batch * n, channels))?
        .index_select(indices, 0)?
        .reshape((batch, n, channels))
}

fn forward_backward(x: &Var, f: impl Fn(&Tensor) -> Result<Tensor>, cotangent: &Tensor) -> Tensor {
    let y = (f(x.as_tensor()).unwrap() * cotangent)
        .unwrap()
        .sum_all()
        .unwrap();
    y.backward().unwrap().remove(x).unwrap()
}

fn d4(c: &mut Criterion) {
    let grid = TokenGrid::square(14).unwrap();
    let x = random(&[BATCH, grid.len(), CHANNELS]);
    let elements: Vec<D4> = (0..BATCH).map(|b| D4::ALL[b % 8]).collect();
    let build = || GridOperator::new(&elements, grid, &Resample::default()).unwrap();
    let operator = build();
    let indices: Vec<u32> = elements
        .iter()
        .enumerate()
        .flat_map(|(b, g)| {
            g.source_indices(grid)
                .into_iter()
                .map(move |i| (b * 196) as u32 + i)
        })
        .collect();
    let indices = Tensor::from_vec(indices, BATCH * 196, &Device::Cpu).unwrap();
    let want = plain_d4(&x, &elements, 14).unwrap();
    let same = |y: &Tensor| {
        (y - &want)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    assert_eq!(same(&operator.apply(&x).unwrap()), 0.0);
    assert_eq!(same(&gather_d4(&x, &indices).unwrap()), 0.0);

    let mut group = c.benchmark_group("per-sample D4 on (64, 14x14, 384)");
    group.throughput(Throughput::Bytes(2 * 4 * x.elem_count() as u64));
    group.bench_function("ours, operator built each time", |b| {
        b.iter(|| build().apply(black_box(&x)).unwrap())
    });
    group.bench_function("ours", |b| {
        b.iter(|| operator.apply(black_box(&x)).unwrap())
    });
    group.bench_function("candle: one index_select", |b| {
        b.iter(|| gather_d4(black_box(&x), &indices).unwrap())
    });
    group.bench_function("candle: flip and transpose per sample", |b| {
        b.iter(|| plain_d4(black_box(&x), &elements, 14).unwrap())
    });
    group.bench_function("copy", |b| b.iter(|| black_box(&x).copy().unwrap()));
    // What the backward pass adds to the graph's bookkeeping, which is the same on both sides.
    let cotangent = random(x.dims());
    let zeros = x.zeros_like().unwrap();
    group.bench_function("ours, backward", |b| {
        b.iter(|| operator.adjoint().apply(black_box(&cotangent)).unwrap())
    });
    group.bench_function("candle: one index_select, backward", |b| {
        b.iter(|| {
            let flat = black_box(&cotangent)
                .reshape((BATCH * 196, CHANNELS))
                .unwrap();
            let zeros = zeros.reshape((BATCH * 196, CHANNELS)).unwrap();
            zeros.index_add(&indices, &flat, 0).unwrap()
        })
    });
    group.finish();

    let pixels = TokenGrid::square(224).unwrap();
    let images = random(&[BATCH, 3, 224, 224]);
    let mut group = c.benchmark_group("per-sample D4 on images (64, 3, 224, 224)");
    group.sample_size(20);
    group.bench_function("ours", |b| {
        b.iter(|| {
            GridOperator::new(&elements, pixels, &Resample::default())
                .unwrap()
                .apply(black_box(&images))
                .unwrap()
        })
    });
    group.bench_function("copy", |b| b.iter(|| black_box(&images).copy().unwrap()));
    group.finish();
}

/// Two dense products, `R·X·Cᵀ`: how one resizes tokens in candle, which has no differentiable resizing.
fn plain_resize(x: &Tensor, rows: &Tensor, cols: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    let (h, h_in) = rows.dims2()?;
    let (w, w_in) = cols.dims2()?;
    let tall = rows.broadcast_matmul(&x.reshape((batch, h_in, w_in * channels))?)?;
    cols.broadcast_matmul(&tall.reshape((batch * h, w_in, channels))?)?
        .reshape((batch, h * w, channels))
}

fn resample(c: &mut Criterion) {
    let (from, to) = (
        TokenGrid::square(14).unwrap(),
        TokenGrid::new(12, 16).unwrap(),
    );
    let x = random(&[BATCH, from.len(), CHANNELS]);
    let cotangent = random(&[BATCH, to.len(), CHANNELS]);
    let var = Var::from_tensor(&x).unwrap();
    let mut group = c.benchmark_group("resample (64, 14x14, 384) to 12x16");
    group.sample_size(30);
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        let operator = |from, to| {
            GridOperator::new(&[Scale::to_grid(from, to)], from, &filter.into()).unwrap()
        };
        let dense = |n_in, n_out| {
            let (from, to) = (
                TokenGrid::new(n_in, 1).unwrap(),
                TokenGrid::new(n_out, 1).unwrap(),
            );
            let eye = Tensor::eye(n_in, DType::F32, &Device::Cpu)
                .unwrap()
                .reshape((1, n_in, n_in))
                .unwrap();
            operator(from, to).apply(&eye).unwrap().squeeze(0).unwrap()
        };
        let (rows, cols) = (dense(14, 12), dense(14, 16));
        let ours = operator(from, to);
        let gap = (ours.apply(&x).unwrap() - plain_resize(&x, &rows, &cols).unwrap())
            .unwrap()
            .abs()
            .unwrap();
        assert!(gap.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
        group.bench_function(format!("ours, {name}"), |b| {
            b.iter(|| ours.apply(black_box(&x)).unwrap())
        });
        group.bench_function(format!("candle: two products, {name}"), |b| {
            b.iter(|| plain_resize(black_box(&x), &rows, &cols).unwrap())
        });
        group.bench_function(format!("ours, {name}, forward + backward"), |b| {
            b.iter(|| forward_backward(&var, |x| Ok(ours.apply(x)?), &cotangent))
        });
        group.bench_function(
            format!("candle: two products, {name}, forward + backward"),
            |b| b.iter(|| forward_backward(&var, |x| plain_resize(x, &rows, &cols), &cotangent)),
        );
    }
    group.bench_function("build the operator, bicubic", |b| {
        b.iter(|| {
            GridOperator::new(&[Scale::to_grid(from, to)], from, &Filter::Bicubic.into()).unwrap()
        })
    });
    group.finish();
}

criterion_group!(benches, d4, resample);
criterion_main!(benches);
