//! A training step of ViT-S/16 at 224 pixels, batch 32: with SER on two images, with λ = 0, and without the partition.
//!
//! `cargo bench --bench step` (minutes)
#![allow(missing_docs)] // of what criterion's macro makes

#[path = "workload/training.rs"]
mod training;
mod workload;

use criterion::{Criterion, criterion_group, criterion_main};
use training::{Training, Variant};

fn step(c: &mut Criterion) {
    let training = Training::new().unwrap();
    let mut group = c.benchmark_group("step of ViT-S/16, 32 images, 2 of them in SER");
    group.sample_size(10);
    for (name, variant) in
        [("SER", Variant::Ser), ("λ = 0", Variant::Control), ("no partition", Variant::Plain)]
    {
        group.bench_function(name, |b| b.iter(|| training.step(variant).unwrap()));
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
