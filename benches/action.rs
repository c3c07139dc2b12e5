//! The action on tokens and images, compared with the same maths in plain candle ops. The time of
//! `ours` includes building the operator.
//!
//! `cargo bench --bench action`
#![allow(missing_docs)] // of what criterion's macro makes

mod workload;

use std::hint::black_box;

use candle_core::Var;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ser_reg::Filter;
use workload::{action, random, resize};

fn d4(c: &mut Criterion) {
    let x = random(&[action::BATCH, 196, 384], 0);
    let (operator, indices) = (action::operator(14), action::indices(14));
    let adjoint = operator.adjoint();
    let mut group = c.benchmark_group("per-sample D4 on (64, 14x14, 384)");
    group.throughput(Throughput::Bytes(2 * 4 * x.elem_count() as u64));
    group.bench_function("ours", |b| b.iter(|| action::operator(14).apply(black_box(&x)).unwrap()));
    group.bench_function("candle: one index_select", |b| {
        b.iter(|| action::gather(black_box(&x), &indices).unwrap())
    });
    group.bench_function("candle: flip and transpose per sample", |b| {
        b.iter(|| action::plain(black_box(&x), 14).unwrap())
    });
    group.bench_function("copy", |b| b.iter(|| black_box(&x).copy().unwrap()));
    // The work of the backward pass without the bookkeeping of the graph.
    group.bench_function("ours, backward", |b| b.iter(|| adjoint.apply(black_box(&x)).unwrap()));
    group.bench_function("candle: one index_select, backward", |b| {
        b.iter(|| action::scatter(black_box(&x), &indices).unwrap())
    });
    group.finish();

    let images = random(&[action::BATCH, 3, 224, 224], 0);
    let mut group = c.benchmark_group("per-sample D4 on images (64, 3, 224, 224)");
    group.sample_size(20);
    group.bench_function("ours", |b| {
        b.iter(|| action::operator(224).apply(black_box(&images)).unwrap())
    });
    group.bench_function("copy", |b| b.iter(|| black_box(&images).copy().unwrap()));
    group.finish();
}

fn resample(c: &mut Criterion) {
    let x = Var::from_tensor(&random(&resize::SHAPE, 0)).unwrap();
    let mut group = c.benchmark_group("resample (64, 14x14, 384) to 12x16");
    group.sample_size(30);
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        let ours = resize::operator(filter);
        let plain = resize::Plain::new(filter);
        group.bench_function(format!("ours, {name}"), |b| {
            b.iter(|| ours.apply(black_box(&x)).unwrap())
        });
        group.bench_function(format!("candle: two products, {name}"), |b| {
            b.iter(|| plain.apply(black_box(&x)).unwrap())
        });
        group.bench_function(format!("ours, {name}, forward + backward"), |b| {
            b.iter(|| resize::forward_backward(&x, |x| Ok(ours.apply(x)?)))
        });
        group.bench_function(format!("candle: two products, {name}, forward + backward"), |b| {
            b.iter(|| resize::forward_backward(&x, |x| plain.apply(x)))
        });
    }
    group.finish();
}

criterion_group!(benches, d4, resample);
criterion_main!(benches);
