//! NT-Xent in the paper's form, forward and backward, against the same in plain candle operations and against the three
//! matrix products that no exact method avoids. f32, random tokens.
//!
//! `cargo bench --bench loss`

// The macros of criterion write public functions.
#![allow(missing_docs)]

use candle_core::{D, DType, Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ser_reg::loss::{NtXent, nt_xent};

const TEMPERATURE: f64 = 0.3;

/// As one would write it: the whole matrix, masked, through a log-sum-exp.
fn plain(z: &Tensor, zp: &Tensor) -> Result<Tensor> {
    let (b, n, d) = z.dims3()?;
    let unit = |x: &Tensor| {
        let x = x.reshape((b * n, d))?;
        let norm = (x.sqr()?.sum_keepdim(1)? + 1e-6)?.sqrt()?;
        x.broadcast_div(&norm)
    };
    let (z, zp) = (unit(z)?, unit(zp)?);
    let positive = ((&z * &zp)?.sum_keepdim(1)? / TEMPERATURE)?;
    let s = (z.matmul(&Tensor::cat(&[&z, &zp], 0)?.t()?)? / TEMPERATURE)?;
    let image: Vec<u32> = (0..(b * n) as u32).map(|i| i / n as u32).collect();
    let rows = Tensor::from_slice(&image, (b * n, 1), z.device())?;
    let cols = Tensor::from_slice(
        &[&image[..], &image[..]].concat(),
        (1, 2 * b * n),
        z.device(),
    )?;
    let hidden = Tensor::full(f32::NEG_INFINITY, s.shape(), z.device())?;
    let s = rows.broadcast_ne(&cols)?.where_cond(&s, &hidden)?;
    let logits = Tensor::cat(&[&positive, &s], 1)?;
    (logits.log_sum_exp(D::Minus1)?.unsqueeze(1)? - positive)?.mean_all()
}

fn products(z: &Tensor, keys: &Tensor) -> Result<()> {
    let s = z.matmul(&keys.t()?)?;
    s.matmul(keys)?;
    s.t()?.matmul(z)?;
    Ok(())
}

fn step(loss: Tensor) -> Result<f32> {
    loss.backward()?;
    loss.to_scalar()
}

fn loss(c: &mut Criterion) {
    let mut group = c.benchmark_group("nt_xent forward + backward");
    group.sample_size(10);
    for shape @ (b, n, d) in [(16, 196, 512), (64, 49, 128)] {
        let var = || Var::randn(0f32, 1f32, shape, &Device::Cpu).unwrap();
        let (z, zp) = (var(), var());
        let id = |name| BenchmarkId::new(name, format!("{b}x{n}x{d}"));
        let config = NtXent {
            symmetric: false,
            temperature: TEMPERATURE,
            ..Default::default()
        };
        let ours = || step(nt_xent(&z, &zp, &config).unwrap().loss).unwrap();
        let both = NtXent {
            symmetric: true,
            ..config
        };
        let symmetric = || step(nt_xent(&z, &zp, &both).unwrap().loss).unwrap();
        group.bench_function(id("ser-reg, symmetric"), |bench| bench.iter(symmetric));
        let theirs = || step(plain(&z, &zp).unwrap()).unwrap();
        assert!((ours() - theirs()).abs() < 1e-4, "the two compute one loss");

        group.bench_function(id("ser-reg"), |bench| bench.iter(ours));
        group.bench_function(id("plain candle"), |bench| bench.iter(theirs));
        let (anchors, keys) = (
            z.reshape((b * n, d)).unwrap().detach(),
            Tensor::randn(0f32, 1f32, (2 * b * n, d), &Device::Cpu).unwrap(),
        );
        assert_eq!(keys.dtype(), DType::F32);
        group.bench_function(id("three products"), |bench| {
            bench.iter(|| products(&anchors, &keys).unwrap())
        });
    }
    group.finish();
}

criterion_group!(benches, loss);
criterion_main!(benches);
