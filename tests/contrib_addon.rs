//! The add-ons: closed forms, plain twins, derivatives by central differences, what layer they read, bad input.

mod addon_common;
mod loss_common;

use addon_common::{self as plain, Weights, drawn};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{assert_close, assert_says, differences, flat, rng, scalar, tokens};
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
const CLS: AddonInput = AddonInput::Tokens(Layout {
    prefix: 1,
    channels: Channels::First,
});

/// The add-ons at hand, small.
enum Case {
    EquiMod(EquiMod),
    AugSelf(AugSelf),
    ESsl(ESsl),
    Stl(Stl),
    Care(Care),
}

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
    ESslConfig {
        hidden: 5,
        out: 4,
        ..ESslConfig::default()
    }
}

fn stl_config() -> StlConfig {
    StlConfig {
        lambda: 0.7,
        hidden: 5,
        out: 4,
        transformation_width: 3,
        ..StlConfig::default()
    }
}

fn care_config() -> CareConfig {
    CareConfig {
        chunks: 2,
        ..CareConfig::default()
    }
}

/// The descriptions of views in units of what `equi_config` has seen, by the textbook.
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

impl Case {
    /// In f64 with seeded variables.
    fn new(name: &str, reads: AddonInput, seed: u64) -> (Self, VarMap) {
        Self::of(name, reads, seed, DType::F64)
    }

    fn of(name: &str, reads: AddonInput, seed: u64, dtype: DType) -> (Self, VarMap) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let case = match name {
            "equimod" => Self::EquiMod(EquiMod::new(equi_config(), reads, CHANNELS, vb).unwrap()),
            "augself" => Self::AugSelf(AugSelf::new(aug_config(), reads, CHANNELS, vb).unwrap()),
            "essl" => Self::ESsl(ESsl::new(essl_config(), reads, CHANNELS, vb).unwrap()),
            "stl" => Self::Stl(Stl::new(stl_config(), reads, CHANNELS, vb).unwrap()),
            _ => Self::Care(Care::new(care_config(), reads, CHANNELS, vb).unwrap()),
        };
        let rng = &mut rng(seed);
        for (_, var) in grad::named(&vars, "") {
            let values = tokens(rng, var.shape().clone(), dtype).unwrap();
            var.set(&values).unwrap();
        }
        (case, vars)
    }

    /// Features that it takes, in f64: of the picture itself and two views, of crops, of two views.
    fn inputs(&self, reads: AddonInput, seed: u64) -> Vec<Var> {
        let count = match self {
            Self::EquiMod(_) => 3,
            Self::ESsl(_) => 1,
            _ => 2,
        };
        let rng = &mut rng(seed);
        let mut input = || match reads {
            AddonInput::Embedding => tokens(rng, (BATCH, CHANNELS), DType::F64).unwrap(),
            AddonInput::Tokens(layout) => {
                tokens(rng, (BATCH, TOKENS + layout.prefix, CHANNELS), DType::F64).unwrap()
            }
        };
        (0..count).map(|_| input()).collect()
    }

    fn forward(&self, x: &[Tensor]) -> AddonOutput {
        let drawn = parameters(91);
        let drawn = [&drawn[0][..], &drawn[1][..]];
        match self {
            Self::EquiMod(addon) => addon.forward(&x[0], [&x[1], &x[2]], drawn),
            Self::AugSelf(addon) => addon.forward([&x[0], &x[1]], drawn),
            Self::ESsl(addon) => addon.forward(&x[0], &[0, 3, 1, 2]),
            Self::Stl(addon) => addon.forward([&x[0], &x[1]]),
            Self::Care(addon) => addon.forward([&x[0], &x[1]]),
        }
        .unwrap()
    }

    /// The unweighted loss by its plain twin, of features (B, D).
    fn twin(&self, w: &Weights, h: &[Tensor]) -> Result<Tensor> {
        let drawn = parameters(91);
        match self {
            Self::EquiMod(_) => {
                let numbers = z_scores(&drawn.concat());
                plain::equi_mod(w, [&h[0], &h[1], &h[2]], &numbers, 0.2)
            }
            Self::AugSelf(_) => {
                let weigh = [0.5, 0.25, 0.2, 0.4, 0.3, 0.6];
                let drawn = [&drawn[0][..], &drawn[1][..]];
                plain::aug_self(w, [&h[0], &h[1]], drawn, WIDTHS, weigh)
            }
            Self::ESsl(_) => plain::essl(w, &h[0], &[0, 3, 1, 2]),
            Self::Stl(_) => {
                let [inv, equi, trans] = plain::stl(w, [&h[0], &h[1]], 0.2)?;
                (inv + equi)? + (trans * 0.1)?
            }
            Self::Care(_) => plain::care(&h[0], &h[1], 2)? * (2.0 / BATCH as f64),
        }
    }
}

fn plain_tensors(vars: &[Var]) -> Vec<Tensor> {
    vars.iter().map(|v| v.as_tensor().clone()).collect()
}

#[test]
fn gradients_match_central_differences() {
    for name in NAMES {
        for reads in [AddonInput::Embedding, CLS] {
            let (case, vars) = Case::new(name, reads, 5);
            let inputs = case.inputs(reads, 6);
            let loss = || case.forward(&plain_tensors(&inputs)).unweighted;
            let grads = loss().backward().unwrap();
            let named = grad::named(&vars, "");
            let labelled = inputs.iter().enumerate();
            let all = labelled
                .map(|(i, var)| (format!("input {i}"), var.clone()))
                .chain(named);
            for (label, var) in all {
                let values = flat(&var);
                // The error falls with the square of the step, a hundredfold a decade, down to this one (STL: 6.5e-6 at 1e-5,
                // 6.6e-8 here): curvature, no kink.
                let numeric = differences(&values, 1e-6, |v| {
                    let v = Tensor::from_slice(v, var.shape(), &Device::Cpu).unwrap();
                    var.set(&v).unwrap();
                    scalar(&loss())
                });
                let back = Tensor::from_slice(&values, var.shape(), &Device::Cpu).unwrap();
                var.set(&back).unwrap();
                let found = grads.get(&var).unwrap_or_else(|| panic!("{name}: {label}"));
                println!("{name} {reads:?} {label}");
                assert_close(&flat(found), &numeric, 1e-6);
            }
        }
    }
}

#[test]
fn losses_match_their_plain_twins() {
    for name in NAMES {
        for (reads, prefix) in [(AddonInput::Embedding, None), (CLS, Some(1))] {
            for seed in 0..4 {
                let (case, vars) = Case::new(name, reads, seed);
                let inputs = case.inputs(reads, 10 + seed);
                let w = plain::weights(&vars);
                let h = inputs.iter().map(|x| match prefix {
                    None => Ok(x.as_tensor().clone()),
                    Some(prefix) => plain::pooled(&w, x, prefix),
                });
                let h: Vec<Tensor> = h.collect::<Result<_>>().unwrap();
                let twin = case.twin(&w, &h).unwrap();
                let out = case.forward(&plain_tensors(&inputs));
                assert_close(&flat(&out.unweighted), &flat(&twin), 1e-9);
            }
        }
    }
}

/// Features that are all alike are all nothing after a batch normalization: every similarity is 0.
#[test]
fn equal_features_give_the_logarithm_of_the_choices() {
    let (case, _) = Case::new("equimod", AddonInput::Embedding, 1);
    let Case::EquiMod(equi) = &case else {
        unreachable!()
    };
    let same = Tensor::ones((3, CHANNELS), DType::F64, &Device::Cpu).unwrap();
    let drawn = [parameters(1)[0][0]; 3];
    let out = equi
        .forward(&same, [&same, &same], [&drawn, &drawn])
        .unwrap();
    assert_close(&flat(&out.unweighted), &[11f64.ln()], 1e-12);

    let (case, _) = Case::new("stl", AddonInput::Embedding, 1);
    let Case::Stl(stl) = &case else {
        unreachable!()
    };
    let same = Tensor::ones((4, CHANNELS), DType::F64, &Device::Cpu).unwrap();
    let out = stl.forward([&same, &same]).unwrap();
    let terms: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
    // Their hidden layers are alike, not nothing: after the shift of the normalization all rows are one vector, and each of
    // the others is as good as the partner.
    assert_close(&terms, &[7f64.ln(), 15f64.ln(), 7f64.ln()], 1e-9);
}

/// With outputs of zero the losses are those of a guess.
#[test]
fn silent_heads_guess() {
    let silence = |vars: &VarMap, layer: &str| {
        for (name, var) in grad::named(vars, "") {
            if name.contains(layer) {
                var.set(&var.zeros_like().unwrap()).unwrap();
            }
        }
    };
    let (case, vars) = Case::new("essl", AddonInput::Embedding, 2);
    silence(&vars, "layer4");
    let inputs = plain_tensors(&case.inputs(AddonInput::Embedding, 3));
    assert_close(
        &flat(&case.forward(&inputs).unweighted),
        &[4f64.ln()],
        1e-12,
    );
    assert_close(
        &flat(&case.forward(&inputs).loss),
        &[0.4 * 4f64.ln()],
        1e-12,
    );

    let (case, vars) = Case::new("augself", AddonInput::Embedding, 2);
    silence(&vars, "layer3");
    let Case::AugSelf(aug) = &case else {
        unreachable!()
    };
    let crop = |top, left, height, width| {
        Some(CropParameters {
            top,
            left,
            height,
            width,
        })
    };
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
    let x = plain_tensors(&case.inputs(AddonInput::Embedding, 3));
    let out = aug
        .forward([&x[0], &x[1]], [&[one; BATCH], &[two; BATCH]])
        .unwrap();
    let figure = |name: &str| scalar(&out.metrics.iter().find(|(n, _)| *n == name).unwrap().1);
    // Centers (1/4, 1/4) and (3/8, 3/4), sides (1/2, 1/2) and (1/4, 1/2): a mirror turns the sign of one difference, no square.
    let crop = ((1.0 / 8.0f64).powi(2) + 0.25 + 1.0 / 16.0) / 4.0;
    assert_close(&[figure("crop")], &[crop], 1e-7);
    let color = ((0.25f64 / 0.8).powi(2) + (0.125f64 / 0.2).powi(2)) / 4.0;
    assert_close(&[figure("color")], &[color], 1e-7);
    assert_close(&[figure("blur"), figure("solarize")], &[0.25, 0.0], 1e-12);
    assert_close(&[figure("flip")], &[2f64.ln()], 1e-12);
    assert_close(&[figure("rotation")], &[4f64.ln()], 1e-12);
}

/// A bias that says `x` of the horizontal difference is right for the mirrored order and wrong for the other.
#[test]
fn centers_are_mirrored_with_the_first_view() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let config = AugSelfConfig {
        hidden: 5,
        crop: 1.0,
        color: 0.0,
        ..AugSelfConfig::default()
    };
    let aug = AugSelf::new(config, AddonInput::Embedding, CHANNELS, vb).unwrap();
    for (name, var) in grad::named(&vars, "crop.layer3") {
        let value = match name.ends_with("bias") {
            true => Tensor::new(&[0f64, 0.5f64.atanh(), 0.0, 0.0], &Device::Cpu).unwrap(),
            false => var.zeros_like().unwrap(),
        };
        var.set(&value).unwrap();
    }
    let at = |left, flip| AugmentationParameters {
        crop: Some(CropParameters {
            top: 0.25,
            left,
            height: 0.5,
            width: 0.5,
        }),
        flip: Some(flip),
        ..AugmentationParameters::untouched()
    };
    let x = tokens(&mut rng(4), (2, CHANNELS), DType::F64).unwrap();
    let loss = |flip1, flip2| {
        let (one, two) = ([at(0.0, flip1); 2], [at(0.5, flip2); 2]);
        scalar(&aug.forward([&x, &x], [&one, &two]).unwrap().unweighted)
    };
    // Unmirrored: −1/2 there, +1/2 back. Mirrored there: +1/2 both ways. Mirrored back: −1/2 both ways.
    assert_close(&[loss(false, false)], &[0.125], 1e-9);
    assert_close(&[loss(true, false)], &[0.0], 1e-9);
    assert_close(&[loss(false, true)], &[0.25], 1e-9);
    assert_close(&[loss(true, true)], &[0.125], 1e-9);
}

#[test]
fn inner_products_are_kept_by_orthogonal_maps_only() {
    let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let care = |mean| {
        let config = CareConfig {
            chunks: 1,
            mean,
            lambda: 0.5,
        };
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
    let (case, _) = Case::new("care", AddonInput::Embedding, 0);
    let inputs = plain_tensors(&case.inputs(AddonInput::Embedding, 8));
    let base = scalar(&case.forward(&inputs).unweighted);
    // The second chunk turned as a whole: its own inner products stay.
    let flip = |x: &Tensor| {
        let second = x.narrow(0, 2, 2).unwrap().neg().unwrap();
        Tensor::cat(&[&x.narrow(0, 0, 2).unwrap(), &second], 0).unwrap()
    };
    let moved = [inputs[0].clone(), flip(&inputs[1])];
    assert_close(&flat(&case.forward(&moved).unweighted), &[base], 1e-12);
    let ranges = |chunks, batch| {
        CareConfig {
            chunks,
            ..CareConfig::default()
        }
        .ranges(batch)
    };
    assert_eq!(ranges(8, 56).unwrap().len(), 8);
    assert!(ranges(8, 56).unwrap().iter().all(|r| r.len() == 7));
    assert_eq!(ranges(3, 8).unwrap(), [0..2, 2..5, 5..8]);
}

#[test]
fn the_order_of_views_does_not_matter() {
    for name in ["augself", "stl", "care"] {
        let (case, _) = Case::new(name, CLS, 7);
        let x = plain_tensors(&case.inputs(CLS, 8));
        let [a, b] = parameters(3);
        let loss = |x: [&Tensor; 2], drawn: [&[AugmentationParameters]; 2]| match &case {
            Case::AugSelf(addon) => scalar(&addon.forward(x, drawn).unwrap().loss),
            Case::Stl(addon) => scalar(&addon.forward(x).unwrap().loss),
            Case::Care(addon) => scalar(&addon.forward(x).unwrap().loss),
            _ => unreachable!(),
        };
        let there = loss([&x[0], &x[1]], [&a, &b]);
        assert_close(&[loss([&x[1], &x[0]], [&b, &a])], &[there], 1e-12);
    }
}

#[test]
fn prefix_tokens_are_not_read() {
    for name in NAMES {
        let (case, _) = Case::new(name, CLS, 11);
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

/// Tokens in any order, as a map with channels first or last: one loss.
#[test]
fn a_map_is_a_set_of_tokens() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let of = |channels| {
        let reads = AddonInput::Tokens(Layout {
            prefix: 0,
            channels,
        });
        Care::new(care_config(), reads, CHANNELS, vb.clone()).unwrap()
    };
    let (first, last) = (of(Channels::First), of(Channels::Last));
    let rng = &mut rng(13);
    let mut map = || tokens(rng, (BATCH, 2, 3, CHANNELS), DType::F64).unwrap();
    let (a, b) = (map(), map());
    let want = flat(&last.forward([&a, &b]).unwrap().loss);
    let seen = |x: &Tensor| x.permute((0, 3, 1, 2)).unwrap();
    assert_close(
        &flat(&first.forward([&seen(&a), &seen(&b)]).unwrap().loss),
        &want,
        1e-12,
    );
    let seen = |x: &Tensor| x.flatten(1, 2).unwrap().flip(&[1]).unwrap();
    assert_close(
        &flat(&first.forward([&seen(&a), &seen(&b)]).unwrap().loss),
        &want,
        1e-12,
    );
}

#[test]
fn lambda_weighs_the_loss() {
    for name in NAMES {
        let (case, _) = Case::new(name, AddonInput::Embedding, 14);
        let out = case.forward(&plain_tensors(&case.inputs(AddonInput::Embedding, 15)));
        let lambda = match name {
            "essl" => 0.4,
            "care" => 0.01,
            _ => 0.7,
        };
        let want = lambda * scalar(&out.unweighted);
        assert_close(&flat(&out.loss), &[want], 1e-12);
        for (figure, value) in &out.metrics {
            assert!(scalar(value).is_finite(), "{name}: {figure}");
            assert!(!value.track_op(), "{name}: {figure} is detached");
        }
    }
}

/// A term without weight has no head, so that every variable of the add-on learns, and costs nothing.
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
        (
            off(0.0, 1.0, 0.1),
            vec!["equivariant", "hypernetwork", "projected", "transformation"],
            2,
        ),
        (off(1.0, 0.0, 0.0), vec!["invariant"], 1),
        (off(0.0, 0.0, 1.0), vec!["projected", "transformation"], 1),
        (
            off(0.0, 1.0, 0.0),
            vec!["equivariant", "hypernetwork", "transformation"],
            1,
        ),
    ] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let stl = Stl::new(config, AddonInput::Embedding, CHANNELS, vb).unwrap();
        let out = stl.forward([&h(1), &h(2)]).unwrap();
        assert_eq!(out.metrics.len(), terms);
        let named = grad::named(&vars, "");
        let mut found: Vec<_> = named
            .iter()
            .map(|(n, _)| n.split('.').next().unwrap())
            .collect();
        found.dedup();
        assert_eq!(found, heads);
        grad::assert_reaches(&out.unweighted, named.clone()).unwrap();
    }
}

/// What the diagnostics of EquiMod are for: they tell a prediction that ignores the augmentation.
#[test]
fn a_blind_prediction_has_no_relative_equivariance() {
    let (case, vars) = Case::new("equimod", AddonInput::Embedding, 16);
    let Case::EquiMod(equi) = &case else {
        unreachable!()
    };
    // u = [identity, 0]: ŷ is y₀, normalized once more.
    let weight = grad::named(&vars, "predict")[0].1.clone();
    let identity: Vec<f64> = (0..4 * 8).map(|at| f64::from(at % 8 == at / 8)).collect();
    weight
        .set(&Tensor::from_vec(identity, (4, 8), &Device::Cpu).unwrap())
        .unwrap();
    let x = plain_tensors(&case.inputs(AddonInput::Embedding, 17));
    let [a, b] = parameters(2);
    let out = equi.forward(&x[0], [&x[0], &x[0]], [&a, &b]).unwrap();
    let figures: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
    let names: Vec<&str> = out.metrics.iter().map(|(n, _)| *n).collect();
    assert_eq!(names, ["absolute", "invariance", "relative", "matched"]);
    // Three equal thirds: y has the statistics of y₀, so that the normalization changes a few parts in 1e-5 only.
    assert_close(&figures[..3], &[1.0, 1.0, 0.0], 1e-4);
}

/// Cosines of views with predictions and with the pictures, and which prediction is the nearest, worked out row by row.
#[test]
fn the_diagnostics_of_equi_mod() {
    let mut matched = Vec::new();
    for seed in 20..28 {
        let (case, vars) = Case::new("equimod", AddonInput::Embedding, seed);
        let Case::EquiMod(equi) = &case else {
            unreachable!()
        };
        let x = plain_tensors(&case.inputs(AddonInput::Embedding, seed + 1));
        let drawn = parameters(2);
        let out = equi
            .forward(&x[0], [&x[1], &x[2]], [&drawn[0], &drawn[1]])
            .unwrap();
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
        // Of all rows but itself, is the partner the nearest?
        let (all, n) = ([seen, predicted].concat(), 2 * BATCH);
        let hits = (0..2 * n).filter(|&i| {
            let partner = (i + n) % (2 * n);
            let mut others = (0..2 * n).filter(|&j| j != i && j != partner);
            others.all(|j| cosine(&all[i], &all[j]) < cosine(&all[i], &all[partner]))
        });
        matched.push(hits.count() as f64 / (2 * n) as f64);
        let figures: Vec<f64> = out.metrics.iter().map(|(_, t)| scalar(t)).collect();
        let expected = [
            absolute,
            invariance,
            absolute - invariance,
            matched[matched.len() - 1],
        ];
        // The add-on has 1e-6 inside its roots: 1e-5 tells that from an error.
        assert_close(&figures, &expected, 1e-5);
    }
    assert!(matched.iter().any(|m| *m > 0.0) && matched.iter().all(|m| *m < 1.0));
}

/// Chunks of several sizes, pair by pair; the figure is the root of the mean over pairs.
#[test]
fn ragged_chunks_are_compared_each_by_itself() {
    for (batch, chunks) in [(7, 3), (5, 2), (8, 3), (11, 4), (9, 3), (4, 1)] {
        for mean in [GramMean::Code, GramMean::Paper] {
            let config = CareConfig {
                chunks,
                mean,
                ..CareConfig::default()
            };
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
                for (i, j) in chunk
                    .clone()
                    .flat_map(|i| chunk.clone().map(move |j| (i, j)))
                {
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

/// A head that always says "twice".
#[test]
fn the_accuracy_of_essl_is_the_share_that_it_gets_right() {
    let (case, vars) = Case::new("essl", AddonInput::Embedding, 31);
    for (name, var) in grad::named(&vars, "head.layer4") {
        let values = match name.ends_with("bias") {
            true => Tensor::new(&[0f64, 0.0, 3.0, 0.0], &Device::Cpu).unwrap(),
            false => var.zeros_like().unwrap(),
        };
        var.set(&values).unwrap();
    }
    let Case::ESsl(essl) = &case else {
        unreachable!()
    };
    let x = plain_tensors(&case.inputs(AddonInput::Embedding, 32));
    for (turns, accuracy) in [([2, 2, 2, 1], 0.75), ([0, 1, 3, 0], 0.0), ([2; 4], 1.0)] {
        let out = essl.forward(&x[0], &turns).unwrap();
        assert_close(&flat(&out.metrics[0].1), &[accuracy], 1e-12);
        let loss = (3f64.exp() + 3.0).ln() - 3.0 * accuracy;
        assert_close(&flat(&out.unweighted), &[loss], 1e-12);
    }
}

/// The same as if it had been widened before: to the bit, and so is the gradient, but for its rounding on the way back.
#[test]
fn half_precision_is_read_in_f32() {
    for name in NAMES {
        for reads in [AddonInput::Embedding, CLS] {
            let (case, _) = Case::of(name, reads, 0, DType::F32);
            let inputs = case.inputs(reads, 18);
            for dtype in [DType::BF16, DType::F16] {
                let run = |wide: bool| {
                    let x = inputs.iter().map(|x| {
                        let x = x.to_dtype(dtype).unwrap();
                        let x = if wide {
                            x.to_dtype(DType::F32).unwrap()
                        } else {
                            x
                        };
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
                assert_eq!(flat(&half), flat(&single), "{name} {reads:?} {dtype:?}");
                for (half, single) in half_grads.iter().zip(&grads) {
                    assert_eq!(half.dtype(), dtype, "{name}");
                    let rounded = single.to_dtype(dtype).unwrap();
                    assert_eq!(flat(half), flat(&rounded), "{name} {reads:?} {dtype:?}");
                }
            }
        }
    }
}

#[test]
fn zero_features_have_finite_gradients() {
    for name in NAMES {
        let (case, vars) = Case::new(name, CLS, 19);
        let inputs = case.inputs(CLS, 20);
        for x in &inputs {
            x.set(&x.zeros_like().unwrap()).unwrap();
        }
        let out = case.forward(&plain_tensors(&inputs));
        assert!(scalar(&out.loss).is_finite(), "{name}");
        let grads = out.unweighted.backward().unwrap();
        for var in inputs
            .iter()
            .cloned()
            .chain(grad::named(&vars, "").into_iter().map(|n| n.1))
        {
            if let Some(g) = grads.get(&var) {
                loss_common::assert_finite(g);
            }
        }
    }
}

#[test]
fn turns_are_those_of_the_group() {
    let x = tokens(&mut rng(21), (2, 3, 4, 4), DType::F32).unwrap();
    let (turned, turns) = four_rotations(&x).unwrap();
    assert_eq!(turns, [0, 0, 1, 1, 2, 2, 3, 3]);
    let grid = TokenGrid::square(4).unwrap();
    for (k, g) in [
        D4::from_index(0).unwrap(),
        D4::ROT90,
        D4::ROT180,
        D4::from_index(3).unwrap(),
    ]
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
fn descriptions_are_scaled_by_what_was_seen() {
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
        [
            0., 0., 1., 1., 0., 1., 2., 0., 3., 1., 1.5, 0.5, 1.25, -0.125, 1., 1., 0.75, 1.
        ]
    );
}

#[test]
fn bad_input_is_refused() {
    let vb = || VarBuilder::zeros(DType::F64, &Device::Cpu);
    let x = |shape: &[usize]| Tensor::ones(shape, DType::F64, &Device::Cpu).unwrap();
    let h = x(&[BATCH, CHANNELS]);
    let [a, b] = parameters(23);
    let none = AugmentationParameters::default();

    // Parameters that were not written down.
    let equi = EquiMod::new(equi_config(), AddonInput::Embedding, CHANNELS, vb()).unwrap();
    let lacks = |change: fn(&mut AugmentationParameters)| {
        let mut b = b.clone();
        change(&mut b[3]);
        b
    };
    type Change = fn(&mut AugmentationParameters);
    let changes: [(&str, Change); 6] = [
        ("crop", |p| p.crop = None),
        ("flip", |p| p.flip = None),
        ("jitter", |p| p.jitter = None),
        ("grayscale", |p| p.grayscale = None),
        ("blur", |p| p.blur = None),
        ("solarize", |p| p.solarize = None),
    ];
    for (name, change) in changes {
        let field = format!("AugmentationParameters::{name}");
        let drawn = lacks(change);
        assert_says(
            equi.forward(&h, [&h, &h], [&a, &drawn]),
            &["EquiMod", &field, "untouched"],
        );
    }
    let aug = AugSelf::new(aug_config(), AddonInput::Embedding, CHANNELS, vb()).unwrap();
    for (name, change) in changes.into_iter().filter(|(name, _)| *name != "grayscale") {
        let field = format!("AugmentationParameters::{name}");
        assert_says(
            aug.forward([&h, &h], [&a, &lacks(change)]),
            &["AugSelf", &field],
        );
    }
    assert_says(
        aug.forward([&h, &h], [&a, &lacks(|p| p.rotation = None)]),
        &["AugSelf", "AugmentationParameters::rotation"],
    );
    // What no task asks for may be missing.
    let crop_only = AugSelfConfig {
        color: 0.0,
        ..AugSelfConfig::default()
    };
    let crop_only = AugSelf::new(crop_only, AddonInput::Embedding, CHANNELS, vb()).unwrap();
    assert!(
        crop_only
            .forward([&h, &h], [&a, &lacks(|p| p.jitter = None)])
            .is_ok()
    );
    let wild = lacks(|p| p.blur = Some(f32::NAN));
    assert_says(equi.forward(&h, [&h, &h], [&a, &wild]), &["finite", "NaN"]);
    assert_says(
        equi.forward(&h, [&h, &h], [&a[1..], &b]),
        &["4 samples", "3 and 4"],
    );
    assert_says(
        aug.forward([&h, &h], [&a, &b[..0]]),
        &["4 samples", "4 and 0"],
    );
    assert_says(ParameterStatistics::of(&[none], false), &["crop"]);
    assert_says(ParameterStatistics::of(&[], false), &["at least one view"]);

    // Batches.
    let stl = Stl::new(stl_config(), AddonInput::Embedding, CHANNELS, vb()).unwrap();
    let odd = x(&[3, CHANNELS]);
    assert_says(stl.forward([&odd, &odd]), &["even batch", "got 3"]);
    assert_says(stl.forward([&h, &odd]), &["one batch", "got 3"]);
    let one = x(&[1, CHANNELS]);
    let (p, q) = (&a[..1], &b[..1]);
    assert_says(
        equi.forward(&one, [&one, &one], [p, q]),
        &["at least 2 samples"],
    );
    assert_says(aug.forward([&one, &one], [p, q]), &["at least 2 samples"]);
    let care = Care::new(CareConfig::default(), AddonInput::Embedding, CHANNELS, vb()).unwrap();
    assert_says(
        care.forward([&h, &h]),
        &["at least 2 samples in each of 8", "batch of 4"],
    );
    let essl = ESsl::new(essl_config(), AddonInput::Embedding, CHANNELS, vb()).unwrap();
    assert_says(
        essl.forward(&h, &[0, 1, 2]),
        &["quarter turns", "4", "got 3"],
    );
    assert_says(essl.forward(&h, &[0, 1, 2, 4]), &["0 to 3", "got 4"]);
    assert_says(
        four_rotations(&x(&[2, 3, 4, 5])),
        &["square", "[2, 3, 4, 5]"],
    );
    assert_says(four_rotations(&x(&[3, 4, 4])), &["(B, C, S, S)"]);

    // Layers.
    let tapped = Stl::new(stl_config(), CLS, CHANNELS, vb()).unwrap();
    let nobody = x(&[0, CHANNELS]);
    assert_says(
        stl.forward([&nobody, &nobody]),
        &["at least one sample", "[0, 6]"],
    );
    let nobody = x(&[0, TOKENS, CHANNELS]);
    assert_says(
        tapped.forward([&nobody, &nobody]),
        &["and sample", "[0, 3, 6]"],
    );
    assert_says(
        tapped.forward([&h, &h]),
        &["(B, 1 + N, 6)", "AddonInput::Embedding"],
    );
    let map = x(&[BATCH, 1, CHANNELS]);
    assert_says(tapped.forward([&map, &map]), &["at least one token"]);
    let map = x(&[BATCH, TOKENS, CHANNELS + 1]);
    assert_says(tapped.forward([&map, &map]), &["6", "[4, 3, 7]"]);
    assert_says(stl.forward([&map, &map]), &["(B, 6)", "AddonInput::Tokens"]);
    let single = h.to_dtype(DType::F32).unwrap();
    assert_says(stl.forward([&single, &single]), &["type f64", "f32"]);

    // Settings.
    let half = VarBuilder::zeros(DType::BF16, &Device::Cpu);
    assert_says(
        Stl::new(stl_config(), CLS, CHANNELS, half),
        &["f32 or f64", "bf16"],
    );
    let aug = |config| AugSelf::new(config, CLS, CHANNELS, vb());
    let zero = AugSelfConfig {
        crop: 0.0,
        color: 0.0,
        ..AugSelfConfig::default()
    };
    assert_says(aug(zero), &["at least one weight above 0", "all 0"]);
    let negative = AugSelfConfig {
        blur: -1.0,
        ..AugSelfConfig::default()
    };
    assert_says(aug(negative), &["AugSelfConfig::blur", "-1"]);
    let stl = |config| Stl::new(config, CLS, CHANNELS, vb());
    let zero = StlConfig {
        invariance: 0.0,
        equivariance: 0.0,
        transformation: 0.0,
        ..stl_config()
    };
    assert_says(stl(zero), &["above 0", "all 0"]);
    assert_says(
        stl(StlConfig {
            temperature: 0.0,
            ..stl_config()
        }),
        &["temperature", "0"],
    );
    assert_says(
        stl(StlConfig {
            lambda: f64::NAN,
            ..stl_config()
        }),
        &["lambda", "NaN"],
    );
    assert_says(
        stl(StlConfig {
            out: 0,
            ..stl_config()
        }),
        &["StlConfig::out", "at least 1"],
    );
    assert_says(
        Stl::new(stl_config(), CLS, usize::MAX / 2, vb()),
        &["channels", "hypernetwork"],
    );
    assert_says(
        Stl::new(stl_config(), CLS, 0, vb()),
        &["channels", "at least 1"],
    );
    let care = CareConfig {
        chunks: 0,
        ..CareConfig::default()
    };
    assert_says(Care::new(care, CLS, CHANNELS, vb()), &["chunks", "got 0"]);
    let equi = |config| EquiMod::new(config, CLS, CHANNELS, vb());
    assert_says(
        equi(EquiModConfig {
            solarize: false,
            ..equi_config()
        }),
        &["17", "18 and 18"],
    );
    assert_says(
        equi(EquiModConfig {
            temperature: -1.0,
            ..equi_config()
        }),
        &["temperature", "-1"],
    );
    let mut bad = equi_config();
    bad.statistics.as_mut().unwrap().std[2] = -1.0;
    assert_says(equi(bad), &["statistics", "-1"]);
    let essl = ESslConfig {
        hidden: 0,
        ..ESslConfig::default()
    };
    assert_says(
        ESsl::new(essl, CLS, CHANNELS, vb()),
        &["ESslConfig::hidden"],
    );
}
