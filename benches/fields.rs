//! The regular representation of D4 on channels with one element per sample, compared with plain
//! candle: one `gather` with an index per value, and a loop of `index_select`s over samples. f32,
//! forward and backward.
//!
//! `cargo bench --bench fields`

// The macros of criterion define public functions.
#![allow(missing_docs)]

use candle_core::{Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    fibre::FibreOperator,
    group::{D4, FieldType, Subgroup},
};

fn random(shape: (usize, usize, usize), rng: &mut StdRng) -> Tensor {
    let (b, n, c) = shape;
    let values: Vec<f32> = (0..b * n * c).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn gather(x: &Tensor, sources: &[Vec<u32>]) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    let index = Tensor::from_vec(sources.concat(), (b, 1, c), x.device())?;
    x.gather(&index.broadcast_as(x.shape())?.contiguous()?, 2)
}

fn looped(x: &Tensor, sources: &[Vec<u32>]) -> Result<Tensor> {
    let samples = sources.iter().enumerate().map(|(b, source)| {
        let source = Tensor::from_slice(source, source.len(), x.device())?;
        x.get(b)?.index_select(&source, 1)
    });
    Tensor::stack(&samples.collect::<Result<Vec<_>>>()?, 0)
}

fn step(turned: Result<Tensor>, weights: &Tensor) -> f32 {
    let loss = (turned.unwrap() * weights).unwrap().sum_all().unwrap();
    loss.backward().unwrap();
    loss.to_scalar().unwrap()
}

fn fields(c: &mut Criterion) {
    let mut group = c.benchmark_group("regular D4 on channels, per sample, forward + backward");
    group.sample_size(20);
    for shape @ (b, n, channels) in [(64, 196, 384), (16, 49, 64)] {
        let mut rng = StdRng::seed_from_u64(1);
        let x = Var::from_tensor(&random(shape, &mut rng)).unwrap();
        let weights = random(shape, &mut rng);
        let elements: Vec<D4> =
            (0..b).map(|_| D4::from_index(rng.random_range(0..8)).unwrap()).collect();
        let field = FieldType::regular(Subgroup::D4, channels).unwrap();
        let sources: Vec<Vec<u32>> =
            elements.iter().map(|g| field.source_indices(*g).unwrap()).collect();

        let ours = || {
            let operator = FibreOperator::new(&field, &elements).unwrap();
            step(operator.apply(&x).map_err(Into::into), &weights)
        };
        let gathered = || step(gather(&x, &sources), &weights);
        let in_loop = || step(looped(&x, &sources), &weights);
        assert_eq!(ours(), gathered(), "the two results are equal");
        assert_eq!(ours(), in_loop(), "the two results are equal");

        group.throughput(Throughput::Bytes((b * n * channels * 4) as u64));
        let id = |name| BenchmarkId::new(name, format!("{b}x{n}x{channels}"));
        group.bench_function(id("ser-reg"), |bench| bench.iter(ours));
        group.bench_function(id("candle gather"), |bench| bench.iter(gathered));
        group.bench_function(id("candle loop"), |bench| bench.iter(in_loop));
    }
    group.finish();
}

criterion_group!(benches, fields);
criterion_main!(benches);
