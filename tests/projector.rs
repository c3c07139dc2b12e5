//! The head: its values, its start, and what it refuses.

mod common;
mod ser_common;

use candle_core::{DType, Device, Module, Result};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_says, flat, rng, tokens};
use ser_common::*;
use ser_reg::group::{FieldType, Subgroup};
use ser_reg::{Projector, ProjectorConfig, Resample};

type Done = ser_reg::Result<()>;

#[test]
fn the_projector_is_its_formula() -> Result<()> {
    for norm in [true, false] {
        let config = ProjectorConfig { norm, ..small_head() };
        let (head, vars) = seeded_head(FieldType::trivial(CHANNELS), config, DType::F64, 3);
        let x = tokens(&mut rng(15), (2, 6, CHANNELS), DType::F64)?;
        let got = head.forward(&x)?;
        let weight = |name: &str| vars.data().lock().unwrap().get(name).map(|v| flat(v));
        let (w1, w2) = (weight("hidden.weight").unwrap(), weight("out.weight").unwrap());
        assert_eq!(vars.all_vars().len(), if norm { 4 } else { 2 });
        let mut expected = Vec::new();
        for token in flat(&x).chunks(CHANNELS) {
            let mut token = token.to_vec();
            if norm {
                let n = CHANNELS as f64;
                let mean = token.iter().sum::<f64>() / n;
                let var = token.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
                let (scale, shift) = (weight("norm.weight").unwrap(), weight("norm.bias").unwrap());
                token = (0..CHANNELS)
                    .map(|c| (token[c] - mean) / (var + 1e-6).sqrt() * scale[c] + shift[c])
                    .collect();
            }
            let row = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            // Φ by its integral: an independent erf.
            let phi = |x: f64| {
                0.5 + (0..20_000)
                    .map(|i| {
                        let t = x * (f64::from(i) + 0.5) / 20_000.0;
                        (-0.5 * t * t).exp() * x / 20_000.0
                    })
                    .sum::<f64>()
                    / (2.0 * std::f64::consts::PI).sqrt()
            };
            let hidden: Vec<f64> =
                w1.chunks(CHANNELS).map(|w| row(w, &token)).map(|x| x * phi(x)).collect();
            expected.extend(w2.chunks(6).map(|w| row(w, &hidden)));
        }
        assert_close(&flat(&got), &expected, 1e-8);
    }
    Ok(())
}

#[test]
fn the_projector_starts_xavier_uniform() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    Projector::new(384, ProjectorConfig::default(), vb)?;
    let vars = vars.data().lock().unwrap();
    for (name, inputs) in [("hidden.weight", 384), ("out.weight", 512)] {
        let w = flat(&vars[name]);
        let bound = (6.0 / (inputs + 512) as f64).sqrt();
        // Half a unit in the last place of f32 above the bound is rounding.
        assert!(w.iter().all(|v| v.abs() <= bound * (1.0 + 1e-6)));
        let variance = w.iter().map(|v| v * v).sum::<f64>() / w.len() as f64;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.02, "{name}: {variance}");
    }
    assert!(flat(&vars["norm.weight"]).iter().all(|v| *v == 1.0));
    assert!(flat(&vars["norm.bias"]).iter().all(|v| *v == 0.0));
    Ok(())
}

#[test]
fn the_projector_commutes_with_permutations() -> Done {
    let relative = turns();
    let (map, _) = maps(16, 3, &relative);
    let (head, _) = seeded_head(FieldType::trivial(CHANNELS), small_head(), DType::F64, 4);
    let turn = relative.to_second(&Resample::default())?;
    let before = head.forward(&turn.apply(&map)?)?;
    let after = turn.apply(&head.forward(&map)?)?;
    assert_close(&flat(&before), &flat(&after), 1e-13);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Done {
    let zeros = || VarBuilder::zeros(DType::F64, &Device::Cpu);
    let shape = |hidden, out| ProjectorConfig { hidden, out, norm: true };
    let mixed = FieldType::trivial(2).and(FieldType::regular(Subgroup::C4, 8)?);
    let single = FieldType::regular(Subgroup::C4, 4)?;
    let trivial = FieldType::trivial;
    let huge = u32::MAX as usize + 1;
    for (field, config, parts) in [
        (trivial(5), shape(0, 4), &["ProjectorConfig::hidden", "size from 1", "got 0"][..]),
        (trivial(5), shape(4, 0), &["ProjectorConfig::out", "size from 1", "got 0"]),
        (trivial(5), shape(huge, 4), &["ProjectorConfig::hidden", "2^24", "4294967296"]),
        (trivial(5), shape(1 << 20, 1 << 20), &["ProjectorConfig::out", "at most 2^31 numbers"]),
        (trivial(0), shape(4, 4), &["channels", "size from 1", "got 0"]),
        (mixed, shape(4, 4), &["Projector::on_field", "mixed field"]),
        (single.clone(), shape(4, 4), &["ProjectorConfig::norm", "one channel"]),
    ] {
        assert_says(Projector::on_field(field, config, zeros()), parts);
    }
    let no_norm = ProjectorConfig { norm: false, ..shape(4, 4) };
    Projector::on_field(single, no_norm, zeros())?;

    let head = Projector::new(7, small_head(), zeros())?;
    let map = tokens(&mut rng(1), (3, 9, 7), DType::F64)?;
    head.forward(&map)?;
    for (x, parts) in [
        (map.narrow(2, 0, 5)?, &["Projector", "(…, 7)", "[3, 9, 5]"]),
        (map.to_dtype(DType::F32)?, &["Projector", "f64", "f32"]),
        (map.flatten_all()?, &["Projector", "(…, 7)", "[189]"]),
    ] {
        assert_says(head.forward(&x).map_err(Into::into), parts);
    }
    Ok(())
}
