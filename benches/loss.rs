//! NT-Xent in the paper's form, forward and backward, against the same in plain candle operations and against the three
//! matrix products that no exact method avoids. f32, random tokens.
//!
//! `cargo bench --bench loss`
#![allow(missing_docs)] // of what criterion's macro makes

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use workload::contrast::Pair;

fn loss(c: &mut Criterion) {
    let mut group = c.benchmark_group("nt_xent forward + backward");
    group.sample_size(10);
    for shape @ (b, n, d) in [(16, 196, 512), (64, 49, 128)] {
        let id = |name| BenchmarkId::new(name, format!("{b}x{n}x{d}"));
        let pair = Pair::new(shape);
        group.bench_function(id("ser-reg"), |bench| bench.iter(|| pair.ours(false)));
        group
            .bench_function(id("ser-reg, both directions"), |bench| bench.iter(|| pair.ours(true)));
        group.bench_function(id("plain candle"), |bench| bench.iter(|| pair.plain()));
        group.bench_function(id("three products"), |bench| bench.iter(|| pair.products()));
    }
    group.finish();
}

criterion_group!(benches, loss);
criterion_main!(benches);
