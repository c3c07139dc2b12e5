//! SEIS and CKA of the maps of two layers: 512 images, 7×7 tokens, 128 channels, `f32`, random values.
//!
//! `cargo bench --bench metric --features metrics`

// The macros of criterion write public functions.
#![allow(missing_docs)]

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::metric::{Hsic, Seis, cka};

fn metric(c: &mut Criterion) {
    let mut group = c.benchmark_group("metric 512x49x128");
    group.sample_size(10);
    let tokens = || Tensor::randn(0f32, 1f32, (512, 49, 128), &Device::Cpu).unwrap();
    let (x, y) = (tokens(), tokens());
    group.bench_function("SEIS with its null", |bench| {
        let rng = &mut StdRng::seed_from_u64(0);
        bench.iter(|| Seis::default().measure(&x, &y, rng).unwrap())
    });
    for (name, hsic) in [("CKA", Hsic::Biased), ("CKA, debiased", Hsic::Debiased)] {
        group.bench_function(name, |bench| bench.iter(|| cka(&x, &y, hsic).unwrap()));
    }
    group.finish();
}

criterion_group!(benches, metric);
criterion_main!(benches);
