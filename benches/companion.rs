//! Forward and backward pass of each companion, compared with plain candle operations. f32, random
//! input.
//!
//! `cargo bench --features contrib --bench companion`

// The macros of criterion write public functions.
#![allow(missing_docs)]

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::ops::log_softmax;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ser_reg::{
    GroupAction, TokenGrid,
    contrib::{
        Distance, Divergence, EqSim, InvariantIntegration, Monomial, OrbitPool, Pool,
        PredictionConsistency, RegularRep, ReynoldsPenalty, WeightSpace,
    },
    grad::GradientBalance,
    group::{D4, Subgroup},
};

fn var(shape: &[usize]) -> Var {
    Var::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()
}

fn step(loss: Tensor) -> Result<f32> {
    loss.backward()?;
    loss.to_scalar()
}

/// Times both implementations, after a check that their losses agree.
fn race(
    c: &mut Criterion,
    id: &str,
    ours: &dyn Fn() -> Result<Tensor>,
    plain: &dyn Fn() -> Result<Tensor>,
) {
    let gap = |a: f32, b: f32| (a - b).abs() / b.abs().max(1e-6);
    let (a, b) = (step(ours().unwrap()).unwrap(), step(plain().unwrap()).unwrap());
    assert!(gap(a, b) < 1e-3, "{id}: the two compute one loss, {a} and {b}");
    let mut group = c.benchmark_group("companion forward + backward");
    group.sample_size(20);
    let mut run = |name, f: &dyn Fn() -> Result<Tensor>| {
        group.bench_function(BenchmarkId::new(name, id), |bench| {
            bench.iter(|| step(f().unwrap()).unwrap())
        });
    };
    run("ser-reg", ours);
    run("plain candle", plain);
    group.finish();
}

/// The orbit of `(B, C, H, W)` under D4, by transposes and flips.
fn copies(x: &Tensor) -> Result<Vec<Tensor>> {
    let flip = |x: &Tensor, dim: usize| -> Result<Tensor> {
        let n = x.dim(dim)? as u32;
        let index = Tensor::from_vec((0..n).rev().collect::<Vec<_>>(), n as usize, x.device())?;
        x.contiguous()?.index_select(&index, dim)
    };
    let mut all = Vec::with_capacity(8);
    for x in [x.clone(), x.transpose(2, 3)?.contiguous()?] {
        let (h, v) = (flip(&x, 3)?, flip(&x, 2)?);
        all.extend([flip(&h, 2)?, x, h, v]);
    }
    Ok(all)
}

fn mean(all: &[Tensor]) -> Result<Tensor> {
    Tensor::stack(all, 0)?.mean(0)
}

fn companions(c: &mut Criterion) {
    let w = var(&[384, 3, 16, 16]);
    let penalty = ReynoldsPenalty::default();
    let ours = || Ok(penalty.forward(&w)?);
    let plain = || {
        let rest = (w.as_tensor() - mean(&copies(&w)?)?)?;
        rest.sqr()?.sum_all()? / w.sqr()?.sum_all()?
    };
    race(c, "Reynolds, kernel 384x3x16x16", &ours, &plain);

    let grid = TokenGrid::square(14).unwrap();
    let table = var(&[1, 196, 384]);
    let space = WeightSpace::Table { grid, prefix: 0 };
    let penalty = ReynoldsPenalty { space, ..penalty };
    let ours = || Ok(penalty.forward(&table)?);
    let plain = || {
        let map = table.transpose(1, 2)?.contiguous()?.reshape((1, 384, 14, 14))?;
        let rest = (&map - mean(&copies(&map)?)?)?;
        rest.sqr()?.sum_all()? / map.sqr()?.sum_all()?
    };
    race(c, "Reynolds, table 196x384", &ours, &plain);

    let (z1, z2) = (var(&[256, 512]), var(&[256, 512]));
    let elements: Vec<D4> = (0..256).map(|i| D4::ALL[i * 5 % 8]).collect();
    let rep = RegularRep::new(Subgroup::D4);
    let ours = || Ok(rep.loss(&elements, &z1, &z2, Distance::Mse)?);
    // One permutation matrix per sample.
    let matrices: Vec<f32> = elements
        .iter()
        .flat_map(|g| D4::ALL.into_iter().flat_map(move |h| D4::ALL.map(move |to| (h, to, *g))))
        .map(|(h, to, g)| (g.compose(&h) == to) as u8 as f32)
        .collect();
    let matrices = Tensor::from_vec(matrices, (256, 8, 8), &Device::Cpu).unwrap();
    let plain = || {
        let moved = z1.reshape((256, 64, 8))?.matmul(&matrices)?;
        (moved.reshape((256, 512))? - z2.as_tensor())?.sqr()?.mean_all()
    };
    race(c, "regular representation 256x512", &ours, &plain);

    let logits = var(&[4, 256, 1000]);
    for (name, kind) in [
        ("symmetric KL", Divergence::SymmetricKl),
        ("Jensen-Shannon", Divergence::JensenShannon),
        ("MSE", Divergence::Mse),
    ] {
        let consistency = PredictionConsistency { kind, temperature: 1. };
        let ours = || Ok(consistency.forward(&logits)?);
        // Loops over pairs, or over views.
        let plain = || {
            let l = log_softmax(&logits, D::Minus1)?;
            let p = l.exp()?;
            let views: Vec<(Tensor, Tensor)> =
                (0..4).map(|k| Ok((p.get(k)?, l.get(k)?))).collect::<Result<_>>()?;
            let mut terms = Vec::new();
            match kind {
                Divergence::JensenShannon => {
                    let mixture = p.mean(0)?.log()?;
                    for (p, l) in &views {
                        terms.push((p * (l - &mixture)?)?.sum(1)?.mean_all()?);
                    }
                }
                _ => {
                    for (i, (p, l)) in views.iter().enumerate() {
                        for (q, m) in &views[..i] {
                            terms.push(match kind {
                                Divergence::Mse => (p - q)?.sqr()?.mean_all()?,
                                _ => (((p - q)? * (l - m)?)?.sum(1)?.mean_all()? * 0.5)?,
                            });
                        }
                    }
                }
            }
            Tensor::stack(&terms, 0)?.mean_all()
        };
        race(c, &format!("{name}, 4x256x1000"), &ours, &plain);
    }

    let map = var(&[64, 196, 64]);
    let planes = || map.transpose(1, 2)?.contiguous()?.reshape((64, 64, 14, 14));
    for (name, pool) in [("mean", Pool::Mean), ("max", Pool::Max)] {
        let orbit = OrbitPool::new(Subgroup::D4, pool.clone());
        let ours = || orbit.tokens(&map, grid)?.sqr()?.mean_all();
        let plain = || {
            let all = Tensor::stack(&copies(&planes()?)?, 0)?;
            let pooled = match pool {
                Pool::Max => all.max(0)?,
                _ => all.mean(0)?,
            };
            pooled.sqr()?.mean_all()
        };
        race(c, &format!("orbit {name}, 64x196x64"), &ours, &plain);
    }
    let monomials = vec![Monomial::power(2), Monomial::product([0, 1])];
    let integration = InvariantIntegration::new(Subgroup::D4, monomials).unwrap();
    let ours = || integration.forward(&map, grid)?.sqr()?.mean_all();
    let plain = || {
        let mut means = Vec::new();
        for x in copies(&planes()?)? {
            let neighbors = (x.narrow(3, 0, 13)? * x.narrow(3, 1, 13)?)?;
            means.push(Tensor::stack(&[x.sqr()?.mean((2, 3))?, neighbors.mean((2, 3))?], 1)?);
        }
        mean(&means)?.sqr()?.mean_all()
    };
    race(c, "integration, 64x196x64", &ours, &plain);

    let scores = var(&[256, 256]);
    let ours = || Ok(EqSim::default().forward(&scores)?.loss);
    let plain = || {
        let diagonal =
            (scores.as_tensor() * Tensor::eye(256, scores.dtype(), &Device::Cpu)?)?.sum(1)?;
        let asymmetry = ((scores.as_tensor() - scores.t()?)?.sqr()?.sum_all()? / (256. * 255.))?;
        asymmetry + diagonal.broadcast_sub(&diagonal.mean_keepdim(0)?)?.sqr()?.sum_all()? / 255.
    };
    race(c, "EqSim 256x256", &ours, &plain);

    // The baseline is the two backward passes.
    let layers: Vec<Var> = (0..4).map(|_| var(&[384, 384])).collect();
    let x = var(&[256, 384]);
    let losses = || -> Result<(Tensor, Tensor)> {
        let mut y = x.as_tensor().clone();
        for w in &layers {
            y = (y.matmul(w)? / 20.)?;
        }
        Ok((y.sqr()?.mean_all()?, y.tanh()?.mean_all()?))
    };
    let names: Vec<String> = (0..4).map(|i| format!("layer.{i}")).collect();
    let mut group = c.benchmark_group("gradient balance, 4 layers of 384x384");
    group.sample_size(20);
    group.bench_function("ser-reg", |bench| {
        bench.iter(|| {
            let (inv, equiv) = losses().unwrap();
            let vars = names.iter().zip(&layers);
            GradientBalance::of_losses(&inv, &equiv, vars, &["layer.0", "layer"]).unwrap()
        })
    });
    group.bench_function("two backward passes", |bench| {
        bench.iter(|| {
            let (inv, equiv) = losses().unwrap();
            (inv.backward().unwrap(), equiv.backward().unwrap())
        })
    });
    group.finish();
}

criterion_group!(benches, companions);
criterion_main!(benches);
