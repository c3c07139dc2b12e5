//! Each add-on, forward and backward, heads and loss, beside the same in plain candle operations with the same weights.
//! f32, batch 64, the final embedding of a ViT-S (384) and the authors' widths; STL at 64 channels.
//!
//! `cargo bench --bench addon`

// The macros of criterion write public functions.
#![allow(missing_docs)]

#[path = "../tests/addon_common/mod.rs"]
mod plain;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use criterion::{Criterion, criterion_group, criterion_main};
use plain::drawn;
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::addon::{
    AugSelf, AugSelfConfig, Care, CareConfig, ESsl, ESslConfig, EquiMod, EquiModConfig, Reads, Stl,
    StlConfig,
};

const BATCH: usize = 64;
const WIDTHS: [f64; 4] = [0.8, 0.8, 0.8, 0.2];

fn step(loss: &Tensor) -> Result<f32> {
    loss.backward()?;
    loss.to_scalar()
}

/// Both ways, after a look at whether they compute one loss.
fn pair(
    c: &mut Criterion,
    name: &str,
    ours: &dyn Fn() -> ser_reg::Result<Tensor>,
    theirs: &dyn Fn() -> Result<Tensor>,
) {
    let (a, b) = (
        step(&ours().unwrap()).unwrap(),
        step(&theirs().unwrap()).unwrap(),
    );
    assert!(
        (a - b).abs() < 1e-3 * (1.0 + b.abs()),
        "{name}: {a}, plain {b}"
    );
    let mut group = c.benchmark_group(format!("{name} forward + backward"));
    group.sample_size(10);
    group.bench_function("ser-reg", |bench| {
        bench.iter(|| step(&ours().unwrap()).unwrap())
    });
    group.bench_function("plain candle", |bench| {
        bench.iter(|| step(&theirs().unwrap()).unwrap())
    });
    group.finish();
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
    let addon = EquiMod::new(EquiModConfig::default(), Reads::Final, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let numbers: Vec<Vec<f64>> = views
        .concat()
        .iter()
        .map(|p| p.vector(false).unwrap())
        .collect();
    let ours = || Ok(addon.forward(&x0, [&x1, &x2], views)?.unweighted);
    let theirs = || plain::equi_mod(&w, [&x0, &x1, &x2], &numbers, 0.2);
    pair(c, "EquiMod", &ours, &theirs);

    let vars = map();
    let addon = AugSelf::new(AugSelfConfig::default(), Reads::Final, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward([&x1, &x2], views)?.unweighted);
    let weigh = [0.5, 0.5, 0.0, 0.0, 0.0, 0.0];
    let theirs = || plain::aug_self(&w, [&x1, &x2], views, WIDTHS, weigh);
    pair(c, "AugSelf", &ours, &theirs);

    let vars = map();
    let addon = ESsl::new(ESslConfig::default(), Reads::Final, 384, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward(&crops, &turns)?.unweighted);
    let theirs = || plain::essl(&w, &crops, &turns);
    pair(c, "E-SSL", &ours, &theirs);

    let vars = map();
    let addon = Stl::new(StlConfig::default(), Reads::Final, 64, vb(&vars)).unwrap();
    let w = plain::weights(&vars);
    let ours = || Ok(addon.forward([&n1, &n2])?.unweighted);
    let theirs = || {
        let [inv, equi, trans] = plain::stl(&w, [&n1, &n2], 0.2)?;
        (inv + equi)? + (trans * 0.1)?
    };
    pair(c, "STL", &ours, &theirs);

    let addon = Care::new(CareConfig::default(), Reads::Final, 384, vb(&map())).unwrap();
    let ours = || Ok(addon.forward([&x1, &x2])?.unweighted);
    let theirs = || plain::care(&x1, &x2, BATCH / 8)? * (2.0 / BATCH as f64);
    pair(c, "CARE", &ours, &theirs);
}

criterion_group!(benches, addons);
criterion_main!(benches);
