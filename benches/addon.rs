//! Forward and backward pass of each add-on, compared with plain candle operations on the same
//! weights. f32, batch 64, the final embedding of a ViT-S (384 channels), the authors' widths; STL
//! with 64 channels.
//!
//! `cargo bench --features contrib --bench addon`

// The macros of criterion write public functions.
#![allow(missing_docs)]

#[path = "../tests/addon_common/mod.rs"]
mod plain;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use criterion::{Criterion, criterion_group, criterion_main};
use plain::drawn;
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::contrib::{
    AddonInput, AugSelf, AugSelfConfig, Care, CareConfig, ESsl, ESslConfig, EquiMod, EquiModConfig,
    Stl, StlConfig,
};

const BATCH: usize = 64;
const WIDTHS: [f64; 4] = [0.8, 0.8, 0.8, 0.2];

fn step(loss: &Tensor) -> Result<f32> {
    loss.backward()?;
    loss.to_scalar()
}

/// Times both implementations, after a check that their losses agree.
fn pair(
    c: &mut Criterion,
    name: &str,
    ours: &dyn Fn() -> ser_reg::Result<Tensor>,
    theirs: &dyn Fn() -> Result<Tensor>,
) {
    let (a, b) = (step(&ours().unwrap()).unwrap(), step(&theirs().unwrap()).unwrap());
    assert!((a - b).abs() < 1e-3 * (1.0 + b.abs()), "{name}: {a}, plain {b}");
    let mut group = c.benchmark_group(format!("{name} forward + backward"));
    group.sample_size(10);
    group.bench_function("ser-reg", |bench| bench.iter(|| step(&ours().unwrap()).unwrap()));
    group.bench_function("plain candle", |bench| bench.iter(|| step(&theirs().unwrap()).unwrap()));
    group.finish();
}

/// STL in whole batches. (The plain form of the tests loops over images.)
fn stl(w: &plain::Weights, [h1, h2]: [&Tensor; 2]) -> Result<Tensor> {
    let (b, d) = h1.dims2()?;
    let transformation =
        |from, to| plain::mlp(w, "transformation", 2, &Tensor::cat(&[from, to], 1)?);
    let (there, back) = (transformation(h1, h2)?, transformation(h2, h1)?);
    let partners = Tensor::from_iter((0..b as u32).map(|i| i ^ 1), h1.device())?;
    let hyper = w["hypernetwork.weight"].t()?;
    let transform = |t: &Tensor, h: &Tensor| -> Result<Tensor> {
        let maps = t.index_select(&partners, 0)?.matmul(&hyper)?;
        maps.reshape((b, d, d))?.matmul(&h.unsqueeze(2)?)?.squeeze(2)
    };
    let all = Tensor::cat(&[&there, &back], 0)?;
    let half = |first: u32| -> Result<Tensor> {
        let rows = Tensor::from_iter((first..2 * b as u32).step_by(2), h1.device())?;
        plain::mlp(w, "projected", 2, &all.index_select(&rows, 0)?)
    };
    let both = |name: &str, a: &Tensor, b: &Tensor| -> Result<[Tensor; 2]> {
        Ok([plain::mlp(w, name, 2, a)?, plain::mlp(w, name, 2, b)?])
    };
    let seen = Tensor::cat(&both("equivariant", h1, h2)?, 0)?;
    let moved = [transform(&back, h2)?, transform(&there, h1)?];
    let predicted = Tensor::cat(&both("equivariant", &moved[0], &moved[1])?, 0)?;
    let [z1, z2] = both("invariant", h1, h2)?;
    let tau = 0.2;
    let loss = (plain::nt_xent(&z1, &z2, tau)? + plain::nt_xent(&seen, &predicted, tau)?)?;
    loss + (plain::nt_xent(&half(0)?, &half(1)?, tau)? * 0.1)?
}

/// CARE with all chunks in one product.
fn care(views: [&Tensor; 2]) -> Result<Tensor> {
    let [a, b] = views.map(|h| -> Result<Tensor> {
        let z = plain::unit(h)?.reshape((8, BATCH / 8, ()))?;
        z.matmul(&z.t()?)
    });
    let others = (1.0 - Tensor::eye(BATCH / 8, DType::F32, &Device::Cpu)?)?;
    let difference = (a? - b?)?.broadcast_mul(&others)?;
    difference.sqr()?.sum_all()? * (2.0 / BATCH as f64)
}

fn addons(c: &mut Criterion) {
    let rng = &mut StdRng::seed_from_u64(0);
    let mut input = |rows, width| {
        let x = plain::features(rng, &[rows, width], DType::F32).unwrap();
        Var::from_tensor(&x).unwrap()
    };
    let [x0, x1, x2] = [0; 3].map(|_| input(BATCH, 384));
    let [n1, n2] = [0; 2].map(|_| input(BATCH, 64));
    let crops = input(4 * BATCH, 384);
    let turns: Vec<u32> = (0..4 * BATCH as u32).map(|i| i / BATCH as u32).collect();
    let rng = &mut StdRng::seed_from_u64(1);
    let views = [0; 2].map(|_| (0..BATCH).map(|_| drawn(rng)).collect::<Vec<_>>());
    let views = [&views[0][..], &views[1][..]];
    let map = VarMap::new;
    let vb = |vars: &VarMap| VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);

    let vars = map();
    let addon =
        EquiMod::new(EquiModConfig::default(), AddonInput::Embedding, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let numbers: Vec<Vec<f64>> = views.concat().iter().map(|p| p.vector(false).unwrap()).collect();
    let ours = || Ok(addon.forward(&x0, [&x1, &x2], views)?.unweighted);
    let theirs = || plain::equi_mod(&w, [&x0, &x1, &x2], &numbers, 0.2);
    pair(c, "EquiMod", &ours, &theirs);

    let vars = map();
    let addon =
        AugSelf::new(AugSelfConfig::default(), AddonInput::Embedding, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward([&x1, &x2], views)?.unweighted);
    let weigh = [0.5, 0.5, 0.0, 0.0, 0.0, 0.0];
    let theirs = || plain::aug_self(&w, [&x1, &x2], views, WIDTHS, weigh);
    pair(c, "AugSelf", &ours, &theirs);

    let vars = map();
    let addon = ESsl::new(ESslConfig::default(), AddonInput::Embedding, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward(&crops, &turns)?.unweighted);
    let theirs = || plain::essl(&w, &crops, &turns);
    pair(c, "E-SSL", &ours, &theirs);

    let vars = map();
    let addon = Stl::new(StlConfig::default(), AddonInput::Embedding, 64, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward([&n1, &n2])?.unweighted);
    let theirs = || stl(&w, [&n1, &n2]);
    pair(c, "STL", &ours, &theirs);

    let addon = Care::new(CareConfig::default(), AddonInput::Embedding, 384, vb(&map())).unwrap();
    let ours = || Ok(addon.forward([&x1, &x2])?.unweighted);
    let theirs = || care([&x1, &x2]);
    pair(c, "CARE", &ours, &theirs);
}

criterion_group!(benches, addons);
criterion_main!(benches);
