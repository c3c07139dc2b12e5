//! The add-ons: closed forms, plain candle operations, central differences, inputs, and errors.

mod addon_common;
mod common;

use addon_common::{self as plain, Weights, drawn};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_says, differences, flat, rng, scalar, tokens};
use ser_reg::{
    Channels, GridOperator, Layout, Resample, TokenGrid,
    contrib::{
        AddonInput, AddonOutput, AugSelf, AugSelfConfig, AugmentationParameters, Care, CareConfig,
        CropParameters, ESsl, ESslConfig, EquiMod, EquiModConfig, GramMean, JitterParameters,
        ParameterStatistics, Stl, StlConfig, four_rotations,
    },
    grad,
    group::D4,
};

const CHANNELS: usize = 6;
const BATCH: usize = 4;
const TOKENS: usize = 3;
const CLS: AddonInput = AddonInput::Tokens(Layout { prefix: 1, channels: Channels::First });

const NAMES: [&str; 5] = ["equimod", "augself", "essl", "stl", "care"];
const WIDTHS: [f64; 4] = [0.8, 0.8, 0.8, 0.2];

fn parameters(seed: u64) -> [Vec<AugmentationParameters>; 2] {
    let rng = &mut rng(seed);
    [0, 1].map(|_| (0..BATCH).map(|_| drawn(rng)).collect())
}

fn equi_config() -> EquiModConfig {
    let seen = parameters(90).concat();
    EquiModConfig {
        hidden: 5,
        out: 4,
        lambda: 0.7,
        solarize: true,
        statistics: Some(ParameterStatistics::of(&seen, true).unwrap()),
        ..EquiModConfig::default()
    }
}

fn aug_config() -> AugSelfConfig {
    AugSelfConfig {
        hidden: 5,
        crop: 0.5,
        color: 0.25,
        flip: 0.3,
        blur: 0.2,
        solarize: 0.4,
        rotation: 0.6,
        color_widths: WIDTHS,
        lambda: 0.7,
    }
}

fn essl_config() -> ESslConfig {
    ESslConfig { hidden: 5, out: 4, ..ESslConfig::default() }
}

fn stl_config() -> StlConfig {
    StlConfig { lambda: 0.7, hidden: 5, out: 4, transformation_width: 3, ..StlConfig::default() }
}

fn care_config() -> CareConfig {
    CareConfig { chunks: 2, ..CareConfig::default() }
}

/// The parameter vectors, standardized by the draws of `equi_config`.
fn z_scores(drawn: &[AugmentationParameters]) -> Vec<Vec<f64>> {
    let vectors = |of: &[AugmentationParameters]| -> Vec<Vec<f64>> {
        of.iter().map(|p| p.vector(true).unwrap()).collect()
    };
    let seen = vectors(&parameters(90).concat());
    let n = seen.len() as f64;
    let score = |k: usize, v: f64| {
        let mean = seen.iter().map(|s| s[k]).sum::<f64>() / n;
        let variance = seen.iter().map(|s| (s[k] - mean).powi(2)).sum::<f64>() / n;
        match variance > 0.0 {
            true => (v - mean) / variance.sqrt(),
            false => 0.0,
        }
    };
    let scores = |v: Vec<f64>| v.iter().enumerate().map(|(k, v)| score(k, *v)).collect();
    vectors(drawn).into_iter().map(scores).collect()
}

type Forward = Box<dyn Fn(&[Tensor]) -> ser_reg::Result<AddonOutput>>;
type Plain = fn(&Weights, &[Tensor]) -> Result<Tensor>;

/// A small add-on with seeded variables.
struct Case {
    vars: VarMap,
    /// The number of features that it takes: EquiMod also takes those of the unaugmented images.
    inputs: usize,
    forward: Forward,
    /// The unweighted loss of features (B, D) in plain operations.
    plain: Plain,
}

impl Case {
    fn new(name: &str, input: AddonInput, seed: u64) -> Self {
        Self::of(name, input, seed, DType::F64)
    }

    fn of(name: &str, input: AddonInput, seed: u64, dtype: DType) -> Self {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let (inputs, forward, plain): (_, Forward, Plain) = match name {
            "equimod" => {
                let addon = EquiMod::new(equi_config(), input, CHANNELS, vb).unwrap();
                let forward = move |x: &[Tensor]| {
                    let [a, b] = parameters(91);
                    addon.forward(&x[0], [&x[1], &x[2]], [&a, &b])
                };
                (3, Box::new(forward), |w, h| {
                    let numbers = z_scores(&parameters(91).concat());
                    plain::equi_mod(w, [&h[0], &h[1], &h[2]], &numbers, 0.2)
                })
            }
            "augself" => {
                let addon = AugSelf::new(aug_config(), input, CHANNELS, vb).unwrap();
                let forward = move |x: &[Tensor]| {
                    let [a, b] = parameters(91);
                    addon.forward([&x[0], &x[1]], [&a, &b])
                };
                (2, Box::new(forward), |w, h| {
                    let [a, b] = parameters(91);
                    let weigh = [0.5, 0.25, 0.2, 0.4, 0.3, 0.6];
                    plain::aug_self(w, [&h[0], &h[1]], [&a, &b], WIDTHS, weigh)
                })
            }
            "essl" => {
                let addon = ESsl::new(essl_config(), input, CHANNELS, vb).unwrap();
                let forward = move |x: &[Tensor]| addon.forward(&x[0], &[0, 3, 1, 2]);
                (1, Box::new(forward), |w, h| plain::essl(w, &h[0], &[0, 3, 1, 2]))
            }
            "stl" => {
                let addon = Stl::new(stl_config(), input, CHANNELS, vb).unwrap();
                let forward = move |x: &[Tensor]| addon.forward([&x[0], &x[1]]);
                (2, Box::new(forward), |w, h| {
                    let [inv, equi, trans] = plain::stl(w, [&h[0], &h[1]], 0.2)?;
                    (inv + equi)? + (trans * 0.1)?
                })
            }
            "care" => {
                let addon = Care::new(care_config(), input, CHANNELS, vb).unwrap();
                let forward = move |x: &[Tensor]| addon.forward([&x[0], &x[1]]);
                (2, Box::new(forward), |_, h| plain::care(&h[0], &h[1], 2)? * (2.0 / BATCH as f64))
            }
            other => panic!("no add-on {other}"),
        };
        seed_variables(&vars, seed, dtype);
        Self { vars, inputs, forward, plain }
    }

    /// Random features, in f64.
    fn inputs(&self, input: AddonInput, seed: u64) -> Vec<Var> {
        let shape = match input {
            AddonInput::Embedding => vec![BATCH, CHANNELS],
            AddonInput::Tokens(layout) => vec![BATCH, TOKENS + layout.prefix, CHANNELS],
        };
        let rng = &mut rng(seed);
        let draw = |_| tokens(rng, shape.clone(), DType::F64).unwrap();
        (0..self.inputs).map(draw).collect()
    }

    fn forward(&self, x: &[Tensor]) -> AddonOutput {
        (self.forward)(x).unwrap()
    }
}

fn seed_variables(vars: &VarMap, seed: u64, dtype: DType) {
    let rng = &mut rng(seed);
    for (_, var) in grad::named(vars, "") {
        let values = tokens(rng, var.shape().clone(), dtype).unwrap();
        var.set(&values).unwrap();
    }
}

/// An add-on in f64 with its seeded variables.
fn seeded<A>(seed: u64, build: impl Fn(VarBuilder) -> ser_reg::Result<A>) -> (A, VarMap) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let addon = build(vb).unwrap();
    seed_variables(&vars, seed, DType::F64);
    (addon, vars)
}

fn equi_mod(seed: u64) -> (EquiMod, VarMap) {
    seeded(seed, |vb| EquiMod::new(equi_config(), AddonInput::Embedding, CHANNELS, vb))
}

/// Random features (4, CHANNELS), in f64.
fn embeddings<const N: usize>(seed: u64) -> [Tensor; N] {
    let rng = &mut rng(seed);
    [(); N].map(|()| tokens(rng, (BATCH, CHANNELS), DType::F64).unwrap().as_tensor().clone())
}

fn plain_tensors(vars: &[Var]) -> Vec<Tensor> {
    vars.iter().map(|v| v.as_tensor().clone()).collect()
}

#[test]
fn gradients_match_central_differences() {
    for name in NAMES {
        for input in [AddonInput::Embedding, CLS] {
            let case = Case::new(name, input, 5);
            let inputs = case.inputs(input, 6);
            let loss = || case.forward(&plain_tensors(&inputs)).unweighted;
            let grads = loss().backward().unwrap();
            let named = grad::named(&case.vars, "");
            let labelled = inputs.iter().enumerate();
            let all = labelled.map(|(i, var)| (format!("input {i}"), var.clone())).chain(named);
            for (label, var) in all {
                let values = flat(&var);
                // The error falls with the square of the step: 6.5e-6 at 1e-5 and 6.6e-8 here for
                // STL. So it comes from the curvature.
                let numeric = differences(&values, 1e-6, |v| {
                    let v = Tensor::from_slice(v, var.shape(), &Device::Cpu).unwrap();
                    var.set(&v).unwrap();
                    scalar(&loss())
                });
                let back = Tensor::from_slice(&values, var.shape(), &Device::Cpu).unwrap();
                var.set(&back).unwrap();
                let found = grads.get(&var).unwrap_or_else(|| panic!("{name}: {label}"));
                println!("{name} {input:?} {label}");
                assert_close(&flat(found), &numeric, 1e-6);
            }
        }
    }
}

#[test]
fn losses_match_plain_operations() {
    for name in NAMES {
        for (input, prefix) in [(AddonInput::Embedding, None), (CLS, Some(1))] {
            for seed in 0..4 {
                let case = Case::new(name, input, seed);
                let inputs = case.inputs(input, 10 + seed);
                let w = plain::weights(&case.vars);
                let h = inputs.iter().map(|x| match prefix {
                    None => Ok(x.as_tensor().clone()),
                    Some(prefix) => plain::pooled(&w, x, prefix),
                });
                let h: Vec<Tensor> = h.collect::<Result<_>>().unwrap();
                let plain = (case.plain)(&w, &h).unwrap();
                let out = case.forward(&plain_tensors(&inputs));
                assert_close(&flat(&out.unweighted), &flat(&plain), 1e-9);
            }
        }
    }
}

/// Batch normalization maps equal features to zero, so every similarity is 0.
#[test]
fn equal_features_give_the_logarithm_of_the_candidates() {
    let (equi, _) = equi_mod(1);
    let same = Tensor::ones((3, CHANNELS), DType::F64, &Device::Cpu).unwrap();
    let drawn = [parameters(1)[0][0]; 3];
    let out = equi.forward(&same, [&same, &same], [&drawn, &drawn]).unwrap();
    assert_close(&flat(&out.unweighted), &[11f64.ln()], 1e-12);

    let (stl, _) = seeded(1, |vb| Stl::new(stl_config(), AddonInput::Embedding, CHANNELS, vb));
    let same = Tensor::ones((4, CHANNELS), DType::F64, &Device::Cpu).unwrap();
    let out = stl.forward([&same, &same]).unwrap();
    let terms: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
    // The shift of the hidden normalization makes all rows one nonzero vector. All similarities are
    // 1.
    assert_close(&terms, &[7f64.ln(), 15f64.ln(), 7f64.ln()], 1e-9);
}

/// Zero logits have the loss of a uniform guess.
#[test]
fn zero_logits_have_the_loss_of_a_guess() {
    let set_to_zero = |vars: &VarMap, layer: &str| {
        for (name, var) in grad::named(vars, "") {
            if name.contains(layer) {
                var.set(&var.zeros_like().unwrap()).unwrap();
            }
        }
    };
    let case = Case::new("essl", AddonInput::Embedding, 2);
    set_to_zero(&case.vars, "layer4");
    let inputs = plain_tensors(&case.inputs(AddonInput::Embedding, 3));
    assert_close(&flat(&case.forward(&inputs).unweighted), &[4f64.ln()], 1e-12);
    assert_close(&flat(&case.forward(&inputs).loss), &[0.4 * 4f64.ln()], 1e-12);

    let (aug, vars) =
        seeded(2, |vb| AugSelf::new(aug_config(), AddonInput::Embedding, CHANNELS, vb));
    set_to_zero(&vars, "layer3");
    let crop = |top, left, height, width| Some(CropParameters { top, left, height, width });
    let one = AugmentationParameters {
        crop: crop(0.0, 0.0, 0.5, 0.5),
        flip: Some(true),
        blur: Some(0.5),
        rotation: Some(1),
        jitter: Some(JitterParameters {
            applied: true,
            brightness: 1.25,
            hue: 0.125,
            ..JitterParameters::NONE
        }),
        ..AugmentationParameters::untouched()
    };
    let two = AugmentationParameters {
        crop: crop(0.25, 0.5, 0.25, 0.5),
        ..AugmentationParameters::untouched()
    };
    let x: [Tensor; 2] = embeddings(3);
    let out = aug.forward([&x[0], &x[1]], [&[one; BATCH], &[two; BATCH]]).unwrap();
    let metric = |name: &str| scalar(&out.metrics.iter().find(|(n, _)| *n == name).unwrap().1);
    // Centers (1/4, 1/4) and (3/8, 3/4), sides (1/2, 1/2) and (1/4, 1/2). The mirror changes the
    // sign of one difference, but no square.
    let crop = ((1.0 / 8.0f64).powi(2) + 0.25 + 1.0 / 16.0) / 4.0;
    assert_close(&[metric("crop")], &[crop], 1e-7);
    let color = ((0.25f64 / 0.8).powi(2) + (0.125f64 / 0.2).powi(2)) / 4.0;
    assert_close(&[metric("color")], &[color], 1e-7);
    assert_close(&[metric("blur"), metric("solarize")], &[0.25, 0.0], 1e-12);
    assert_close(&[metric("flip")], &[2f64.ln()], 1e-12);
    assert_close(&[metric("rotation")], &[4f64.ln()], 1e-12);
}

/// A constant prediction of the horizontal difference is right for one order and wrong for the
/// other, unless a mirror changes the sign.
#[test]
fn centers_are_mirrored_with_the_first_view() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let config = AugSelfConfig { hidden: 5, crop: 1.0, color: 0.0, ..AugSelfConfig::default() };
    let aug = AugSelf::new(config, AddonInput::Embedding, CHANNELS, vb).unwrap();
    for (name, var) in grad::named(&vars, "crop.layer3") {
        let value = match name.ends_with("bias") {
            true => Tensor::new(&[0f64, 0.5f64.atanh(), 0.0, 0.0], &Device::Cpu).unwrap(),
            false => var.zeros_like().unwrap(),
        };
        var.set(&value).unwrap();
    }
    let at = |left, flip| AugmentationParameters {
        crop: Some(CropParameters { top: 0.25, left, height: 0.5, width: 0.5 }),
        flip: Some(flip),
        ..AugmentationParameters::untouched()
    };
    let x = tokens(&mut rng(4), (2, CHANNELS), DType::F64).unwrap();
    let loss = |flip1, flip2| {
        let (one, two) = ([at(0.0, flip1); 2], [at(0.5, flip2); 2]);
        scalar(&aug.forward([&x, &x], [&one, &two]).unwrap().unweighted)
    };
    // The differences of both orders are −1/2 and +1/2 without a flip, +1/2 twice if view 1 is
    // flipped, and −1/2 twice if view 2 is flipped.
    assert_close(&[loss(false, false)], &[0.125], 1e-9);
    assert_close(&[loss(true, false)], &[0.0], 1e-9);
    assert_close(&[loss(false, true)], &[0.25], 1e-9);
    assert_close(&[loss(true, true)], &[0.125], 1e-9);
}

#[test]
fn inner_products_are_kept_by_orthogonal_maps_only() {
    let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let care = |mean| {
        let config = CareConfig { chunks: 1, mean, lambda: 0.5 };
        Care::new(config, AddonInput::Embedding, 2, vb.clone()).unwrap()
    };
    let new = |rows: &[[f64; 2]]| {
        Tensor::from_slice(rows.as_flattened(), (rows.len(), 2), &Device::Cpu).unwrap()
    };
    let x = new(&[[1.0, 0.5], [-0.3, 2.0], [0.7, -0.2]]);
    let (s, c) = 0.7f64.sin_cos();
    let turned = x.matmul(&new(&[[c, s], [-s, c]])).unwrap();
    for mean in [GramMean::Code, GramMean::Paper] {
        let out = care(mean).forward([&x, &turned]).unwrap();
        assert_close(&flat(&out.unweighted), &[0.0], 1e-20);
    }
    let apart = new(&[[1e3, 0.0], [0.0, 1e3]]);
    let alike = new(&[[1e3, 0.0], [1e3, 0.0]]);
    let loss = |mean| flat(&care(mean).forward([&apart, &alike]).unwrap().loss);
    assert_close(&loss(GramMean::Code), &[0.5 * 2.0], 1e-9);
    assert_close(&loss(GramMean::Paper), &[0.5], 1e-9);
}

#[test]
fn pairs_of_different_chunks_do_not_count() {
    let case = Case::new("care", AddonInput::Embedding, 0);
    let inputs = plain_tensors(&case.inputs(AddonInput::Embedding, 8));
    let base = scalar(&case.forward(&inputs).unweighted);
    // The sign of the whole second chunk changes, so its own inner products stay.
    let flip = |x: &Tensor| {
        let second = x.narrow(0, 2, 2).unwrap().neg().unwrap();
        Tensor::cat(&[&x.narrow(0, 0, 2).unwrap(), &second], 0).unwrap()
    };
    let moved = [inputs[0].clone(), flip(&inputs[1])];
    assert_close(&flat(&case.forward(&moved).unweighted), &[base], 1e-12);
    let ranges = |chunks, batch| CareConfig { chunks, ..CareConfig::default() }.ranges(batch);
    assert_eq!(ranges(8, 56).unwrap().len(), 8);
    assert!(ranges(8, 56).unwrap().iter().all(|r| r.len() == 7));
    assert_eq!(ranges(3, 8).unwrap(), [0..2, 2..5, 5..8]);
}

#[test]
fn the_order_of_views_does_not_matter() {
    let build = |name| Case::new(name, CLS, 7);
    for case in ["stl", "care"].map(build) {
        let x = plain_tensors(&case.inputs(CLS, 8));
        let there = scalar(&case.forward(&x).loss);
        let back = case.forward(&[x[1].clone(), x[0].clone()]);
        assert_close(&flat(&back.loss), &[there], 1e-12);
    }
    let (aug, _) = seeded(7, |vb| AugSelf::new(aug_config(), CLS, CHANNELS, vb));
    let x = plain_tensors(&build("augself").inputs(CLS, 8));
    let [a, b] = parameters(3);
    let there = aug.forward([&x[0], &x[1]], [&a, &b]).unwrap().loss;
    let back = aug.forward([&x[1], &x[0]], [&b, &a]).unwrap().loss;
    assert_close(&flat(&back), &flat(&there), 1e-12);
}

#[test]
fn prefix_tokens_are_not_read() {
    for name in NAMES {
        let case = Case::new(name, CLS, 11);
        let inputs = case.inputs(CLS, 12);
        let out = case.forward(&plain_tensors(&inputs));
        let grads = out.unweighted.backward().unwrap();
        for x in &inputs {
            let grad = grads.get(x).unwrap();
            let size = |start, count| {
                let part = grad.narrow(1, start, count).unwrap();
                scalar(&part.abs().unwrap().sum_all().unwrap())
            };
            assert_eq!(size(0, 1), 0.0, "{name}: the CLS token");
            assert!(size(1, TOKENS) > 1e-6, "{name}: the grid");
        }
    }
}

/// The loss does not depend on the order of tokens and channels.
#[test]
fn a_map_is_a_set_of_tokens() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let of = |channels| {
        let input = AddonInput::Tokens(Layout { prefix: 0, channels });
        Care::new(care_config(), input, CHANNELS, vb.clone()).unwrap()
    };
    let (first, last) = (of(Channels::First), of(Channels::Last));
    let rng = &mut rng(13);
    let mut map = || tokens(rng, (BATCH, 2, 3, CHANNELS), DType::F64).unwrap();
    let (a, b) = (map(), map());
    let want = flat(&last.forward([&a, &b]).unwrap().loss);
    let seen = |x: &Tensor| x.permute((0, 3, 1, 2)).unwrap();
    assert_close(&flat(&first.forward([&seen(&a), &seen(&b)]).unwrap().loss), &want, 1e-12);
    let seen = |x: &Tensor| x.flatten(1, 2).unwrap().flip(&[1]).unwrap();
    assert_close(&flat(&first.forward([&seen(&a), &seen(&b)]).unwrap().loss), &want, 1e-12);
}

#[test]
fn lambda_weighs_the_loss() {
    for name in NAMES {
        let case = Case::new(name, AddonInput::Embedding, 14);
        let out = case.forward(&plain_tensors(&case.inputs(AddonInput::Embedding, 15)));
        let lambda = match name {
            "essl" => 0.4,
            "care" => 0.01,
            _ => 0.7,
        };
        let want = lambda * scalar(&out.unweighted);
        assert_close(&flat(&out.loss), &[want], 1e-12);
        for (metric, value) in &out.metrics {
            assert!(scalar(value).is_finite(), "{name}: {metric}");
            assert!(!value.track_op(), "{name}: {metric} is detached");
        }
    }
}

/// A term of weight 0 has no head, so every variable of the add-on gets a gradient.
#[test]
fn a_term_without_weight_has_no_head() {
    let h = |seed| tokens(&mut rng(seed), (4, CHANNELS), DType::F64).unwrap();
    let off = |invariance, equivariance, transformation| StlConfig {
        invariance,
        equivariance,
        transformation,
        ..stl_config()
    };
    for (config, heads, terms) in [
        (off(0.0, 1.0, 0.1), vec!["equivariant", "hypernetwork", "projected", "transformation"], 2),
        (off(1.0, 0.0, 0.0), vec!["invariant"], 1),
        (off(0.0, 0.0, 1.0), vec!["projected", "transformation"], 1),
        (off(0.0, 1.0, 0.0), vec!["equivariant", "hypernetwork", "transformation"], 1),
    ] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let stl = Stl::new(config, AddonInput::Embedding, CHANNELS, vb).unwrap();
        let out = stl.forward([&h(1), &h(2)]).unwrap();
        assert_eq!(out.metrics.len(), terms);
        let named = grad::named(&vars, "");
        let mut found: Vec<_> = named.iter().map(|(n, _)| n.split('.').next().unwrap()).collect();
        found.dedup();
        assert_eq!(found, heads);
        grad::assert_reaches(&out.unweighted, named.clone()).unwrap();
    }
}

/// The metrics of EquiMod show a prediction that ignores the augmentation.
#[test]
fn a_prediction_without_parameters_has_no_relative_equivariance() {
    let (equi, vars) = equi_mod(16);
    // u = [identity, 0], so ŷ is the normalized y₀.
    let weight = grad::named(&vars, "predict")[0].1.clone();
    let identity: Vec<f64> = (0..4 * 8).map(|at| f64::from(at % 8 == at / 8)).collect();
    weight.set(&Tensor::from_vec(identity, (4, 8), &Device::Cpu).unwrap()).unwrap();
    let x: [Tensor; 1] = embeddings(17);
    let [a, b] = parameters(2);
    let out = equi.forward(&x[0], [&x[0], &x[0]], [&a, &b]).unwrap();
    let metrics: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
    let names: Vec<&str> = out.metrics.iter().map(|(n, _)| *n).collect();
    assert_eq!(names, ["absolute", "invariance", "relative", "matched"]);
    // All three views are equal, so y has the statistics of y₀. The second normalization changes it
    // by a few parts in 1e-5.
    assert_close(&metrics[..3], &[1.0, 1.0, 0.0], 1e-4);
}

/// The metrics of EquiMod, computed row by row.
#[test]
fn the_metrics_of_equi_mod() {
    let mut matched = Vec::new();
    for seed in 20..28 {
        let (equi, vars) = equi_mod(seed);
        let x: [Tensor; 3] = embeddings(seed + 1);
        let drawn = parameters(2);
        let out = equi.forward(&x[0], [&x[1], &x[2]], [&drawn[0], &drawn[1]]).unwrap();
        let w = plain::weights(&vars);
        let numbers = z_scores(&drawn.concat());
        let embeddings = plain::equi_mod_embeddings(&w, [&x[0], &x[1], &x[2]], &numbers);
        let [origin, seen, predicted] = embeddings.unwrap().map(|t| t.to_vec2::<f64>().unwrap());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        let mean = |a: &[Vec<f64>], b: &[Vec<f64>]| {
            a.iter().zip(b).map(|(a, b)| cosine(a, b)).sum::<f64>() / a.len() as f64
        };
        let (absolute, invariance) = (mean(&seen, &predicted), mean(&seen, &origin));
        assert!(absolute.abs() > 1e-3 && (absolute - invariance).abs() > 1e-3);
        // A hit: the partner is the nearest of all other rows.
        let (all, n) = ([seen, predicted].concat(), 2 * BATCH);
        let hits = (0..2 * n).filter(|&i| {
            let partner = (i + n) % (2 * n);
            let mut others = (0..2 * n).filter(|&j| j != i && j != partner);
            others.all(|j| cosine(&all[i], &all[j]) < cosine(&all[i], &all[partner]))
        });
        matched.push(hits.count() as f64 / (2 * n) as f64);
        let metrics: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
        let expected = [absolute, invariance, absolute - invariance, matched[matched.len() - 1]];
        // The add-on adds 1e-6 inside its roots, so the tolerance is 1e-5.
        assert_close(&metrics, &expected, 1e-5);
    }
    assert!(matched.iter().any(|m| *m > 0.0) && matched.iter().all(|m| *m < 1.0));
}

/// Chunks of several sizes, computed pair by pair. The metric is the root of the mean over pairs.
#[test]
fn chunks_of_several_sizes_match_a_loop() {
    for (batch, chunks) in [(7, 3), (5, 2), (8, 3), (11, 4), (9, 3), (4, 1)] {
        for mean in [GramMean::Code, GramMean::Paper] {
            let config = CareConfig { chunks, mean, ..CareConfig::default() };
            let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
            let care = Care::new(config, AddonInput::Embedding, CHANNELS, vb).unwrap();
            let rng = &mut rng(30 + batch as u64);
            let [h1, h2] = [0; 2].map(|_| tokens(rng, (batch, CHANNELS), DType::F64).unwrap());
            let out = care.forward([&h1, &h2]).unwrap();
            let [z1, z2] = [&h1, &h2].map(|h| plain::unit(h).unwrap().to_vec2::<f64>().unwrap());
            let dot = |z: &[Vec<f64>], i: usize, j: usize| -> f64 {
                z[i].iter().zip(&z[j]).map(|(a, b)| a * b).sum()
            };
            let (mut sum, mut pairs) = (0.0, 0.0);
            for chunk in config.ranges(batch).unwrap() {
                for (i, j) in chunk.clone().flat_map(|i| chunk.clone().map(move |j| (i, j))) {
                    if i != j {
                        sum += (dot(&z1, i, j) - dot(&z2, i, j)).powi(2);
                        pairs += 1.0;
                    }
                }
            }
            let loss = match mean {
                GramMean::Code => 2.0 * sum / batch as f64,
                GramMean::Paper => sum / pairs,
            };
            assert_close(&flat(&out.unweighted), &[loss], 1e-9);
            assert_close(&flat(&out.metrics[0].1), &[(sum / pairs).sqrt()], 1e-9);
        }
    }
}

/// A head that always predicts two quarter turns.
#[test]
fn the_accuracy_of_essl_is_the_fraction_of_hits() {
    let (essl, vars) =
        seeded(31, |vb| ESsl::new(essl_config(), AddonInput::Embedding, CHANNELS, vb));
    for (name, var) in grad::named(&vars, "head.layer4") {
        let values = match name.ends_with("bias") {
            true => Tensor::new(&[0f64, 0.0, 3.0, 0.0], &Device::Cpu).unwrap(),
            false => var.zeros_like().unwrap(),
        };
        var.set(&values).unwrap();
    }
    let x: [Tensor; 1] = embeddings(32);
    for (turns, accuracy) in [([2, 2, 2, 1], 0.75), ([0, 1, 3, 0], 0.0), ([2; 4], 1.0)] {
        let out = essl.forward(&x[0], &turns).unwrap();
        assert_close(&flat(&out.metrics[0].1), &[accuracy], 1e-12);
        let loss = (3f64.exp() + 3.0).ln() - 3.0 * accuracy;
        assert_close(&flat(&out.unweighted), &[loss], 1e-12);
    }
}

/// Half precision has the loss of the widened input to the bit. The gradient is rounded once.
#[test]
fn half_precision_is_read_in_f32() {
    for name in NAMES {
        for input in [AddonInput::Embedding, CLS] {
            let case = Case::of(name, input, 0, DType::F32);
            let inputs = case.inputs(input, 18);
            for dtype in [DType::BF16, DType::F16] {
                let run = |wide: bool| {
                    let x = inputs.iter().map(|x| {
                        let x = x.to_dtype(dtype).unwrap();
                        let x = if wide { x.to_dtype(DType::F32).unwrap() } else { x };
                        Var::from_tensor(&x.detach()).unwrap()
                    });
                    let x: Vec<Var> = x.collect();
                    let loss = case.forward(&plain_tensors(&x)).unweighted;
                    let grads = loss.backward().unwrap();
                    let grads = x.iter().map(|x| grads.get(x).unwrap().clone());
                    (loss, grads.collect::<Vec<_>>())
                };
                let ((half, half_grads), (single, grads)) = (run(false), run(true));
                assert_eq!(half.dtype(), DType::F32);
                assert_eq!(flat(&half), flat(&single), "{name} {input:?} {dtype:?}");
                for (half, single) in half_grads.iter().zip(&grads) {
                    assert_eq!(half.dtype(), dtype, "{name}");
                    let rounded = single.to_dtype(dtype).unwrap();
                    assert_eq!(flat(half), flat(&rounded), "{name} {input:?} {dtype:?}");
                }
            }
        }
    }
}

#[test]
fn zero_features_have_finite_gradients() {
    for name in NAMES {
        let case = Case::new(name, CLS, 19);
        let inputs = case.inputs(CLS, 20);
        for x in &inputs {
            x.set(&x.zeros_like().unwrap()).unwrap();
        }
        let out = case.forward(&plain_tensors(&inputs));
        assert!(scalar(&out.loss).is_finite(), "{name}");
        let grads = out.unweighted.backward().unwrap();
        let inputs = inputs.into_iter().enumerate();
        let inputs = inputs.map(|(i, var)| (format!("input {i}"), var));
        for (label, var) in inputs.chain(grad::named(&case.vars, "")) {
            let grad = grads.get(&var);
            let grad = grad.unwrap_or_else(|| panic!("{name}: no gradient at {label}"));
            common::assert_finite(grad);
        }
    }
}

#[test]
fn four_rotations_are_the_powers_of_a_quarter_turn() {
    let x = tokens(&mut rng(21), (2, 3, 4, 4), DType::F32).unwrap();
    let (turned, turns) = four_rotations(&x).unwrap();
    assert_eq!(turns, [0, 0, 1, 1, 2, 2, 3, 3]);
    let grid = TokenGrid::square(4).unwrap();
    for (k, g) in [D4::from_index(0).unwrap(), D4::ROT90, D4::ROT180, D4::from_index(3).unwrap()]
        .into_iter()
        .enumerate()
    {
        let operator = GridOperator::new(&[g], grid, &Resample::default()).unwrap();
        let want = operator.apply_in(Layout::default(), &x).unwrap();
        let got = turned.narrow(0, 2 * k, 2).unwrap();
        assert_eq!(flat(&got), flat(&want), "{k} quarter turns");
    }
    let strided = x.transpose(2, 3).unwrap();
    let copied = strided.contiguous().unwrap();
    let turned = |x: &Tensor| flat(&four_rotations(x).unwrap().0);
    assert_eq!(turned(&strided), turned(&copied));
}

#[test]
fn statistics_are_means_and_deviations_of_the_draws() {
    let seen = parameters(22).concat();
    for solarize in [false, true] {
        let statistics = ParameterStatistics::of(&seen, solarize).unwrap();
        assert_eq!(statistics.mean.len(), 17 + usize::from(solarize));
        for k in 0..statistics.mean.len() {
            let value = |p: &AugmentationParameters| p.vector(solarize).unwrap()[k];
            let mean = seen.iter().map(value).sum::<f64>() / seen.len() as f64;
            assert!((statistics.mean[k] - mean).abs() < 1e-12);
        }
    }
    let jitter = JitterParameters {
        applied: true,
        order: [2, 0, 3, 1],
        brightness: 1.5,
        contrast: 0.5,
        saturation: 1.25,
        hue: -0.125,
    };
    let view = AugmentationParameters {
        jitter: Some(jitter),
        grayscale: Some(true),
        blur: Some(0.75),
        solarize: Some(0.5),
        ..AugmentationParameters::untouched()
    };
    assert_eq!(
        view.vector(true).unwrap(),
        [0., 0., 1., 1., 0., 1., 2., 0., 3., 1., 1.5, 0.5, 1.25, -0.125, 1., 1., 0.75, 1.]
    );
}

/// Each row is a refused call and what its message says.
#[track_caller]
fn assert_refused<T>(rows: impl IntoIterator<Item = (ser_reg::Result<T>, Vec<&'static str>)>) {
    for (result, parts) in rows {
        assert_says(result, &parts);
    }
}

fn zeros() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F64, &Device::Cpu)
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F64, &Device::Cpu).unwrap()
}

#[test]
fn missing_parameters_are_named() {
    let input = AddonInput::Embedding;
    let h = ones(&[BATCH, CHANNELS]);
    let [a, b] = parameters(23);
    let equi = EquiMod::new(equi_config(), input, CHANNELS, zeros()).unwrap();
    let aug = AugSelf::new(aug_config(), input, CHANNELS, zeros()).unwrap();
    let with = |change: fn(&mut AugmentationParameters)| {
        let mut b = b.clone();
        change(&mut b[3]);
        b
    };
    type Change = fn(&mut AugmentationParameters);
    let missing: [(&str, Change, &[&str]); 7] = [
        ("crop", |p| p.crop = None, &["EquiMod", "AugSelf"]),
        ("flip", |p| p.flip = None, &["EquiMod", "AugSelf"]),
        ("jitter", |p| p.jitter = None, &["EquiMod", "AugSelf"]),
        ("grayscale", |p| p.grayscale = None, &["EquiMod"]),
        ("blur", |p| p.blur = None, &["EquiMod", "AugSelf"]),
        ("solarize", |p| p.solarize = None, &["EquiMod", "AugSelf"]),
        ("rotation", |p| p.rotation = None, &["AugSelf"]),
    ];
    for (name, change, readers) in missing {
        let field = format!("AugmentationParameters::{name}");
        let b = with(change);
        for (reader, out) in [
            ("EquiMod", equi.forward(&h, [&h, &h], [&a, &b])),
            ("AugSelf", aug.forward([&h, &h], [&a, &b])),
        ] {
            match readers.contains(&reader) {
                true => assert_says(out, &[reader, &field, "untouched"]),
                false => drop(out.unwrap()),
            }
        }
    }
    // A task without weight needs no parameters.
    let crop_only = AugSelfConfig { color: 0.0, ..AugSelfConfig::default() };
    let crop_only = AugSelf::new(crop_only, input, CHANNELS, zeros()).unwrap();
    let no_jitter = with(|p| p.jitter = None);
    crop_only.forward([&h, &h], [&a, &no_jitter]).unwrap();

    let nan = with(|p| p.blur = Some(f32::NAN));
    assert_refused([
        (equi.forward(&h, [&h, &h], [&a, &nan]), vec!["finite", "NaN"]),
        (equi.forward(&h, [&h, &h], [&a[1..], &b]), vec!["4 samples", "3 and 4"]),
        (aug.forward([&h, &h], [&a, &b[..0]]), vec!["4 samples", "4 and 0"]),
    ]);
    let unknown = [AugmentationParameters::default()];
    assert_refused([
        (ParameterStatistics::of(&unknown, false), vec!["crop"]),
        (ParameterStatistics::of(&[], false), vec!["at least one view"]),
    ]);
}

#[test]
fn features_of_another_shape_are_refused() {
    let input = AddonInput::Embedding;
    let [a, b] = parameters(23);
    let equi = EquiMod::new(equi_config(), input, CHANNELS, zeros()).unwrap();
    let aug = AugSelf::new(aug_config(), input, CHANNELS, zeros()).unwrap();
    let stl = Stl::new(stl_config(), input, CHANNELS, zeros()).unwrap();
    let care = Care::new(CareConfig::default(), input, CHANNELS, zeros()).unwrap();
    let essl = ESsl::new(essl_config(), input, CHANNELS, zeros()).unwrap();
    let tapped = Stl::new(stl_config(), CLS, CHANNELS, zeros()).unwrap();

    let h = ones(&[BATCH, CHANNELS]);
    let (one, odd, none) = (ones(&[1, CHANNELS]), ones(&[3, CHANNELS]), ones(&[0, CHANNELS]));
    let map = |batch, tokens, channels| ones(&[batch, tokens, channels]);
    let (empty, cls, wide) =
        (map(0, TOKENS, CHANNELS), map(BATCH, 1, CHANNELS), map(BATCH, TOKENS, CHANNELS + 1));
    let (single, integers) = (h.to_dtype(DType::F32).unwrap(), h.to_dtype(DType::U32).unwrap());
    let (p, q) = (&a[..1], &b[..1]);
    let pair = |x: &Tensor| stl.forward([x, x]);
    let tokens = |x: &Tensor| tapped.forward([x, x]);
    assert_refused([
        (pair(&odd), vec!["even batch", "got 3"]),
        (stl.forward([&h, &odd]), vec!["one batch", "got 3"]),
        (equi.forward(&odd, [&h, &h], [&a, &b]), vec!["one batch", "got 4"]),
        (equi.forward(&one, [&one, &one], [p, q]), vec!["at least 2 samples"]),
        (aug.forward([&one, &one], [p, q]), vec!["at least 2 samples"]),
        (care.forward([&h, &h]), vec!["at least 2 samples in each of 8", "batch of 4"]),
        (essl.forward(&h, &[0, 1, 2]), vec!["quarter turns", "4", "got 3"]),
        (essl.forward(&h, &[0, 1, 2, 4]), vec!["0 to 3", "got 4"]),
        (pair(&none), vec!["at least one sample", "[0, 6]"]),
        (pair(&wide), vec!["(B, 6)", "AddonInput::Tokens"]),
        (pair(&single), vec!["type f64", "f32"]),
        (pair(&integers), vec!["f16, bf16, f32 or f64", "u32"]),
        (tokens(&empty), vec!["and sample", "[0, 3, 6]"]),
        (tokens(&h), vec!["(B, 1 + N, 6)", "AddonInput::Embedding"]),
        (tokens(&cls), vec!["at least one token"]),
        (tokens(&wide), vec!["6", "[4, 3, 7]"]),
    ]);
    assert_refused([
        (four_rotations(&ones(&[2, 3, 4, 5])), vec!["square", "[2, 3, 4, 5]"]),
        (four_rotations(&ones(&[3, 4, 4])), vec!["(B, C, S, S)"]),
        (four_rotations(&ones(&[0, 3, 4, 4])), vec!["at least one", "[0, 3, 4, 4]"]),
    ]);
}

#[test]
fn settings_out_of_range_are_refused() {
    let aug = |set: fn(&mut AugSelfConfig)| {
        let mut config = AugSelfConfig::default();
        set(&mut config);
        AugSelf::new(config, CLS, CHANNELS, zeros()).map(drop)
    };
    let equi = |set: fn(&mut EquiModConfig)| {
        let mut config = equi_config();
        set(&mut config);
        EquiMod::new(config, CLS, CHANNELS, zeros()).map(drop)
    };
    let stl = |set: fn(&mut StlConfig)| {
        let mut config = stl_config();
        set(&mut config);
        Stl::new(config, CLS, CHANNELS, zeros()).map(drop)
    };
    let essl = |set: fn(&mut ESslConfig)| {
        let mut config = ESslConfig::default();
        set(&mut config);
        ESsl::new(config, CLS, CHANNELS, zeros()).map(drop)
    };
    let care = |set: fn(&mut CareConfig)| {
        let mut config = CareConfig::default();
        set(&mut config);
        Care::new(config, CLS, CHANNELS, zeros()).map(drop)
    };
    let wide = |channels| Stl::new(stl_config(), CLS, channels, zeros()).map(drop);
    let half = VarBuilder::zeros(DType::BF16, &Device::Cpu);
    let half = Stl::new(stl_config(), CLS, CHANNELS, half).map(drop);
    assert_refused([
        (aug(|c| (c.crop, c.color) = (0.0, 0.0)), vec!["at least one weight above 0", "all 0"]),
        (aug(|c| c.blur = -1.0), vec!["AugSelfConfig::blur", "-1"]),
        (aug(|c| c.hidden = 0), vec!["AugSelfConfig::hidden", "at least 1"]),
        (aug(|c| c.color_widths[3] = f64::NAN), vec!["AugSelfConfig::color_widths", "NaN"]),
        (aug(|c| c.lambda = -1.0), vec!["AugSelfConfig::lambda", "-1"]),
        (equi(|c| c.solarize = false), vec!["17", "18 and 18"]),
        (equi(|c| c.temperature = -1.0), vec!["EquiModConfig::temperature", "-1"]),
        (equi(|c| c.out = 0), vec!["EquiModConfig::out", "at least 1"]),
        (equi(|c| c.lambda = f64::INFINITY), vec!["EquiModConfig::lambda", "inf"]),
        (
            equi(|c| c.statistics.as_mut().unwrap().std[2] = -1.0),
            vec!["EquiModConfig::statistics", "-1"],
        ),
        (
            stl(|c| (c.invariance, c.equivariance, c.transformation) = (0.0, 0.0, 0.0)),
            vec!["above 0", "all 0"],
        ),
        (stl(|c| c.temperature = 0.0), vec!["StlConfig::temperature", "0"]),
        (stl(|c| c.temperature = 1e-39), vec!["StlConfig::temperature", "in f32", "1e-39"]),
        (stl(|c| c.lambda = 1e-46), vec!["StlConfig::lambda", "in f32", "1e-46"]),
        (stl(|c| c.out = usize::MAX), vec!["StlConfig::out", "at most 2^24"]),
        (essl(|c| c.hidden = usize::MAX / 2), vec!["ESslConfig::hidden", "at most 2^24"]),
        (stl(|c| c.lambda = f64::NAN), vec!["StlConfig::lambda", "NaN"]),
        (stl(|c| c.out = 0), vec!["StlConfig::out", "at least 1"]),
        (wide(usize::MAX / 2), vec!["channels", "hypernetwork"]),
        (wide(0), vec!["channels", "at least 1"]),
        (half, vec!["f32 or f64", "bf16"]),
        (essl(|c| c.hidden = 0), vec!["ESslConfig::hidden"]),
        (essl(|c| c.lambda = -0.1), vec!["ESslConfig::lambda", "-0.1"]),
        (care(|c| c.chunks = 0), vec!["CareConfig::chunks", "got 0"]),
        (care(|c| c.lambda = f64::NAN), vec!["CareConfig::lambda", "NaN"]),
    ]);
}

#[cfg(feature = "serde")]
#[test]
fn settings_survive_json() {
    fn assert_same<T>(settings: &T)
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        let text = serde_json::to_string(settings).unwrap();
        assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), settings, "{text}");
    }
    assert_same(&equi_config());
    assert_same(&aug_config());
    assert_same(&essl_config());
    assert_same(&stl_config());
    assert_same(&care_config());
    assert_same(&parameters(1).concat());
}
