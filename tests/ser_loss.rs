//! `SerLoss` and its projector: values, where gradients go and where they must not, and what is refused.

mod loss_common;

use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{assert_close, assert_says, differences, flat, rng, scalar, tokens};
use rand::Rng;
use ser_reg::group::{D4, Element, Scale, Window};
use ser_reg::loss::{Negatives, NtXent, SameImage, nt_xent, nt_xent_ragged};
use ser_reg::projector::{Projector, ProjectorConfig};
use ser_reg::ser::{Objective, SerConfig, SerLoss, StopGradient, Validity};
use ser_reg::view::Relative;
use ser_reg::{Channels, GroupAction, Layout, Resample, TokenGrid};

type Done = ser_reg::Result<()>;

const CHANNELS: usize = 5;

/// The tokens themselves, without a head.
fn bare() -> SerConfig {
    SerConfig {
        projector: None,
        ..Default::default()
    }
}

fn small_head() -> ProjectorConfig {
    ProjectorConfig {
        hidden: 6,
        out: 4,
        norm: true,
    }
}

/// A loss in f64 with seeded variables.
fn build(config: SerConfig, seed: u64) -> (SerLoss, VarMap) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let ser = SerLoss::new(config, CHANNELS, vb).expect("a valid configuration");
    let mut names: Vec<_> = vars
        .data()
        .lock()
        .unwrap()
        .iter()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    let rng = &mut rng(seed);
    for (_, var) in names {
        var.set(&tokens(rng, var.shape().clone(), DType::F64).unwrap())
            .unwrap();
    }
    (ser, vars)
}

fn maps(seed: u64, batch: usize, relative: &Relative<Element>) -> (Var, Var) {
    let rng = &mut rng(seed);
    let mut map = |grid: TokenGrid| tokens(rng, (batch, grid.len(), CHANNELS), DType::F64).unwrap();
    (map(relative.from_grid()), map(relative.to_grid()))
}

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

/// One D4 element per sample.
fn turns() -> Relative<Element> {
    let g = [D4::ROT90, D4::HFLIP, D4::ROT180]
        .map(Element::from)
        .to_vec();
    Relative::new(g, grid(3, 3), grid(3, 3)).unwrap()
}

/// Two crops per sample that overlap in part, the second pair not at all, each on a grid of its own.
fn crops() -> Relative<Element> {
    let window = |y, x| Element::from(Window::new(y, x, 0.5, 0.5).unwrap());
    let pairs = [
        (window(0.0, 0.0), window(0.25, 0.1).then(D4::HFLIP)),
        (window(0.0, 0.0), window(0.5, 0.5)),
        (window(0.2, 0.2), window(0.0, 0.1).then(D4::ROT90)),
    ];
    let relative = pairs.map(|(a, b)| Element::relative(&a, &b)).to_vec();
    Relative::new(relative, grid(4, 3), grid(3, 4))
        .unwrap()
        .with_seed(9)
}

/// Every token of both views counts, but none stays where it is.
fn scales() -> Relative<Element> {
    let g = Element::from(D4::ROT90).then(Scale::to_grid(grid(3, 2), grid(4, 3)));
    Relative::new(vec![g], grid(2, 3), grid(4, 3)).unwrap()
}

fn no_overlap() -> Relative<Element> {
    let window = |y| Element::from(Window::new(y, 0.0, 0.25, 0.25).unwrap());
    Relative::new(
        vec![Element::relative(&window(0.0), &window(0.5))],
        grid(3, 3),
        grid(3, 3),
    )
    .unwrap()
}

const OBJECTIVES: [Objective; 7] = [
    Objective::NtXent {
        form: Negatives::BothViews,
        same_image: SameImage::Exclude,
    },
    Objective::NtXent {
        form: Negatives::OtherView,
        same_image: SameImage::Keep,
    },
    Objective::Mse,
    Objective::NormalizedMse,
    Objective::Cosine,
    Objective::L1,
    Objective::SmoothL1 { beta: 0.4 },
];

#[test]
fn an_equivariant_map_costs_nothing_and_matches_everywhere() -> Done {
    let relative = turns();
    let (map, _) = maps(1, 3, &relative);
    let moved = relative.to_second(&Resample::default())?.apply(&map)?;
    for objective in OBJECTIVES {
        let (ser, _) = build(
            SerConfig {
                objective,
                eps: 0.0,
                temperature: 0.01,
                ..bare()
            },
            1,
        );
        let out = ser.forward(&map, &moved, &relative)?;
        assert_eq!(out.tokens, 2 * 3 * 9);
        match out.accuracy {
            Some(accuracy) => assert_close(&[scalar(&accuracy)], &[1.0], 1e-12),
            None => assert_close(&[scalar(&out.equivariance)], &[0.0], 1e-12),
        }
        let other = ser.forward(&map, &map, &relative)?;
        assert!(
            scalar(&other.equivariance) > scalar(&out.equivariance) + 0.05,
            "{objective:?}"
        );
    }
    Ok(())
}

#[test]
fn the_loss_is_the_mean_over_both_frames() -> Done {
    let (q, k) = (maps(2, 3, &scales()), maps(3, 3, &scales()));
    let relative = scales();
    let config = SerConfig {
        temperature: 0.2,
        lambda: 0.3,
        ..bare()
    };
    let (ser, _) = build(config, 1);
    let out = ser.forward_with_keys([&q.0, &q.1], [&k.0, &k.1], &ser, &relative)?;

    let (there, back) = (
        relative.to_second(&config.resample)?,
        relative.to_first(&config.resample)?,
    );
    let one_way = NtXent {
        temperature: 0.2,
        symmetric: false,
        ..Default::default()
    };
    let second = nt_xent(&q.1, &there.apply(&k.0)?, &one_way)?.loss;
    let first = nt_xent(&q.0, &back.apply(&k.1)?, &one_way)?.loss;
    let mean = (scalar(&first) + scalar(&second)) / 2.0;
    assert_close(
        &[scalar(&out.equivariance), scalar(&out.loss)],
        &[mean, 0.3 * mean],
        1e-14,
    );
    assert_eq!(out.tokens, 3 * (12 + 6));

    let (ser, _) = build(
        SerConfig {
            symmetric: false,
            ..config
        },
        1,
    );
    let out = ser.forward_with_keys([&q.0, &q.1], [&k.0, &k.1], &ser, &relative)?;
    assert_close(&[scalar(&out.equivariance)], &[scalar(&second)], 1e-14);
    assert_eq!(out.tokens, 3 * 12);
    Ok(())
}

#[test]
fn gradients_match_differences_for_every_objective() -> Done {
    for (relative, objectives) in [(turns(), 1), (scales(), 1), (crops(), OBJECTIVES.len())] {
        let (map1, map2) = maps(4, 3, &relative);
        for objective in OBJECTIVES.into_iter().take(objectives) {
            let (ser, vars) = build(
                SerConfig {
                    objective,
                    projector: Some(small_head()),
                    ..bare()
                },
                5,
            );
            let out = ser.forward(&map1, &map2, &relative)?;
            let grads = out.loss.backward()?;
            let mut all = vars.all_vars();
            all.extend([map1.clone(), map2.clone()]);
            for var in all {
                let at = |v: &[f64]| {
                    let kept = var.as_tensor().copy().unwrap();
                    var.set(&Tensor::from_slice(v, var.shape(), &Device::Cpu).unwrap())
                        .unwrap();
                    let value = scalar(&ser.forward(&map1, &map2, &relative).unwrap().loss);
                    var.set(&kept).unwrap();
                    value
                };
                let grad = flat(grads.get(&var).expect("every variable and map is reached"));
                assert_close(&grad, &differences(&flat(&var), 1e-5, at), 2e-6);
            }
        }
    }
    Ok(())
}

#[test]
fn masked_tokens_get_no_gradient_and_count_nothing() -> Done {
    let relative = crops();
    let (map1, map2) = maps(6, 3, &relative);
    let config = SerConfig {
        symmetric: false,
        stop_gradient: StopGradient::Keys,
        ..bare()
    };
    for objective in OBJECTIVES {
        let (ser, _) = build(
            SerConfig {
                objective,
                ..config
            },
            1,
        );
        let out = ser.forward(&map1, &map2, &relative)?;
        let grads = out.loss.backward()?;
        let grad = grads.get(&map2).expect("a gradient");
        let operator = relative.to_second(&config.resample)?;
        let mut counted = 0;
        for b in 0..3 {
            let valid = operator.valid(b).expect("crops have masks");
            for (cell, &valid) in valid.iter().enumerate() {
                let norm: f64 = flat(&grad.i((b, cell))?).iter().map(|g| g * g).sum();
                assert_eq!(norm > 0.0, valid, "sample {b}, cell {cell}, {objective:?}");
                counted += usize::from(valid);
            }
        }
        assert_eq!(out.tokens, counted);
        assert!((1..3 * 12).contains(&counted));

        // the control counts what the padding shows as well
        let unmasked = SerConfig {
            objective,
            validity: Validity::Ignore,
            ..config
        };
        let all = build(unmasked, 1).0.forward(&map1, &map2, &relative)?;
        assert_eq!(all.tokens, 3 * 12);
        assert_ne!(flat(&all.loss), flat(&out.loss), "{objective:?}");
    }
    Ok(())
}

#[test]
fn a_sample_without_overlap_counts_nothing() -> Done {
    let all = crops();
    let (map1, map2) = maps(7, 3, &all);
    let kept = Tensor::new(&[0u32, 2], &Device::Cpu)?;
    let elements = vec![all.elements()[0], all.elements()[2]];
    let two = Relative::new(elements, all.from_grid(), all.to_grid())?;
    for objective in OBJECTIVES {
        let (ser, _) = build(
            SerConfig {
                objective,
                ..bare()
            },
            1,
        );
        let with = ser.forward(&map1, &map2, &all)?;
        let without = ser.forward(
            &map1.index_select(&kept, 0)?,
            &map2.index_select(&kept, 0)?,
            &two,
        )?;
        assert_eq!(with.tokens, without.tokens);
        assert_close(&[scalar(&with.loss)], &[scalar(&without.loss)], 1e-14);
        let grads = with.loss.backward()?;
        let grad = grads.get(&map1).expect("a gradient").i(1)?;
        assert!(flat(&grad).iter().all(|g| *g == 0.0));

        let (map1, map2) = maps(7, 2, &no_overlap());
        assert_says(
            ser.forward(&map1, &map2, &no_overlap()),
            &["at least one token", "no overlap in any of 2 samples"],
        );
    }
    Ok(())
}

#[test]
fn the_key_side_gets_no_gradient() -> Done {
    let relative = scales();
    let (q, k) = (maps(8, 2, &relative), maps(9, 2, &relative));
    let config = SerConfig {
        projector: Some(small_head()),
        ..bare()
    };
    let ((ser, vars), (key_side, key_vars)) = (build(config, 1), build(config, 2));
    let out = ser.forward_with_keys([&q.0, &q.1], [&k.0, &k.1], &key_side, &relative)?;
    let grads = out.loss.backward()?;
    for var in key_vars.all_vars().iter().chain([&k.0, &k.1]) {
        assert!(grads.get(var).is_none());
    }
    for var in vars.all_vars().iter().chain([&q.0, &q.1]) {
        let grad = grads.get(var).expect("the query side learns");
        assert!(flat(grad).iter().any(|g| g.abs() > 1e-9));
    }
    // The other side's weights are used, not its own.
    let own = ser.forward_with_keys([&q.0, &q.1], [&k.0, &k.1], &ser, &relative)?;
    assert!((scalar(&own.loss) - scalar(&out.loss)).abs() > 1e-6);

    // Maps that serve as queries and keys: the same as stopping the keys.
    let stopped = build(
        SerConfig {
            stop_gradient: StopGradient::Keys,
            ..config
        },
        1,
    )
    .0;
    let a = ser
        .forward_with_keys([&q.0, &q.1], [&q.0, &q.1], &ser, &relative)?
        .loss;
    let b = stopped.forward(&q.0, &q.1, &relative)?.loss;
    assert_eq!(scalar(&a), scalar(&b));
    let (a, b) = (a.backward()?, b.backward()?);
    assert_close(
        &flat(a.get(&q.0).unwrap()),
        &flat(b.get(&q.0).unwrap()),
        1e-15,
    );
    Ok(())
}

#[test]
fn each_side_can_be_stopped() -> Done {
    let relative = scales();
    let (map1, map2) = maps(10, 2, &relative);
    let reached = |stop_gradient| {
        let (ser, _) = build(
            SerConfig {
                stop_gradient,
                symmetric: false,
                ..bare()
            },
            1,
        );
        let grads = ser
            .forward(&map1, &map2, &relative)
            .unwrap()
            .loss
            .backward()
            .unwrap();
        // Keys come from the first view, anchors stand in the second.
        (grads.get(&map1).is_some(), grads.get(&map2).is_some())
    };
    assert_eq!(reached(StopGradient::None), (true, true));
    assert_eq!(reached(StopGradient::Keys), (false, true));
    assert_eq!(reached(StopGradient::Anchors), (true, false));

    // Keys of a second encoder have none, so nothing would be left to train.
    let config = SerConfig {
        stop_gradient: StopGradient::Anchors,
        ..bare()
    };
    let (ser, _) = build(config, 1);
    let maps = [map1.as_tensor(), map2.as_tensor()];
    let refused = ser.forward_with_keys(maps, maps, &ser, &relative);
    assert_says(refused, &["stop_gradient", "None or Keys", "Anchors"]);
    Ok(())
}

#[test]
fn lambda_scales_the_loss_and_zero_skips_it() -> Done {
    let relative = turns();
    let (map1, map2) = maps(11, 3, &relative);
    let (mut ser, _) = build(
        SerConfig {
            lambda: 2.0,
            ..bare()
        },
        1,
    );
    let out = ser.forward(&map1, &map2, &relative)?;
    assert_eq!(scalar(&out.loss), 2.0 * scalar(&out.equivariance));
    assert!(out.loss.track_op() && !out.equivariance.track_op());

    ser.set_lambda(0.0)?;
    for out in [
        ser.forward(&map1, &map2, &relative)?,
        ser.forward_with_keys([&map1, &map2], [&map1, &map2], &ser, &relative)?,
        // Nothing is looked at, so nothing can be wrong.
        ser.forward(&map1, &map1.i(0)?, &no_overlap())?,
    ] {
        assert_eq!(
            (scalar(&out.loss), scalar(&out.equivariance), out.tokens),
            (0.0, 0.0, 0)
        );
        assert!(out.accuracy.is_none() && !out.loss.track_op());
    }
    assert_says(ser.set_lambda(-1.0), &["lambda", "at least 0", "-1"]);
    assert_says(ser.set_lambda(f64::NAN), &["lambda", "NaN"]);
    Ok(())
}

#[test]
fn the_cap_on_tokens_is_spread_evenly_and_drawn_from_the_seed() -> Done {
    let (map1, map2) = maps(12, 3, &turns());
    let touched = |cap: usize, seed: u64| {
        let config = SerConfig {
            max_tokens: Some(cap),
            symmetric: false,
            stop_gradient: StopGradient::Keys,
            ..bare()
        };
        let relative = turns().with_seed(seed);
        let out = build(config, 1).0.forward(&map1, &map2, &relative).unwrap();
        let grads = out.loss.backward().unwrap();
        let grad = flat(grads.get(&map2).unwrap());
        let rows: Vec<bool> = grad
            .chunks(CHANNELS)
            .map(|g| g.iter().any(|v| *v != 0.0))
            .collect();
        (out.tokens, rows)
    };
    for (cap, per_image) in [
        (27, [9, 9, 9]),
        (100, [9, 9, 9]),
        (12, [4, 4, 4]),
        (14, [4, 5, 5]),
        (3, [1, 1, 1]),
    ] {
        let (counted, rows) = touched(cap, 5);
        let mut each: Vec<usize> = rows
            .chunks(9)
            .map(|r| r.iter().filter(|t| **t).count())
            .collect();
        each.sort_unstable();
        assert_eq!((counted, each), (cap.min(27), per_image.to_vec()));
        assert_eq!(rows, touched(cap, 5).1, "same seed, same draw");
    }
    assert!(
        (6..10).any(|seed| touched(12, seed).1 != touched(12, 5).1),
        "the seed matters"
    );
    // Every token is drawn by some seed: none is out of reach.
    let seen = (0..60)
        .map(|seed| touched(6, seed).1)
        .fold(vec![false; 27], |seen, rows| {
            seen.into_iter().zip(rows).map(|(a, b)| a || b).collect()
        });
    assert!(seen.iter().all(|s| *s));

    // What an image without so many valid tokens leaves goes to the others, whichever is drawn first.
    let (map1, map2) = maps(12, 3, &crops());
    let counted = |max_tokens, seed| {
        let (ser, _) = build(
            SerConfig {
                symmetric: false,
                max_tokens,
                ..bare()
            },
            1,
        );
        let relative = crops().with_seed(seed);
        ser.forward(&map1, &map2, &relative).unwrap().tokens
    };
    let valid = counted(None, 0);
    for seed in 0..8 {
        assert_eq!(counted(Some(valid - 1), seed), valid - 1);
    }
    Ok(())
}

#[test]
fn layouts_give_the_same_loss_and_leave_prefix_tokens_alone() -> Done {
    let relative = scales();
    let (map1, map2) = maps(13, 2, &relative);
    let (ser, _) = build(bare(), 1);
    let expected = scalar(&ser.forward(&map1, &map2, &relative)?.loss);

    let prefix = tokens(&mut rng(1), (2, 2, CHANNELS), DType::F64)?;
    let (long1, long2) = (
        Tensor::cat(&[prefix.as_tensor(), map1.as_tensor()], 1)?,
        Tensor::cat(&[prefix.as_tensor(), map2.as_tensor()], 1)?,
    );
    let (ser, _) = build(
        SerConfig {
            layout: Layout {
                prefix: 2,
                ..Default::default()
            },
            ..bare()
        },
        1,
    );
    let loss = ser.forward(&long1, &long2, &relative)?.loss;
    assert_close(&[scalar(&loss)], &[expected], 1e-14);
    assert!(
        loss.backward()?
            .get(&prefix)
            .is_none_or(|g| flat(g).iter().all(|g| *g == 0.0))
    );

    let as_map = |x: &Var, g: TokenGrid| x.reshape((2, g.rows(), g.cols(), CHANNELS));
    let (last1, last2) = (as_map(&map1, grid(2, 3))?, as_map(&map2, grid(4, 3))?);
    for (channels, move_channels) in [(Channels::Last, false), (Channels::First, true)] {
        let layout = Layout {
            channels,
            ..Default::default()
        };
        let (ser, _) = build(SerConfig { layout, ..bare() }, 1);
        let place = |x: &Tensor| match move_channels {
            true => x.permute((0, 3, 1, 2))?.contiguous(),
            false => Ok(x.clone()),
        };
        let loss = ser
            .forward(&place(&last1)?, &place(&last2)?, &relative)?
            .loss;
        assert_close(&[scalar(&loss)], &[expected], 1e-14);
    }
    Ok(())
}

#[test]
fn half_precision_maps_give_an_f32_loss() -> Done {
    let relative = crops();
    let (map1, map2) = maps(14, 3, &relative);
    let (ser, _) = build(bare(), 1);
    let exact = scalar(&ser.forward(&map1, &map2, &relative)?.loss);
    for dtype in [DType::F16, DType::BF16] {
        let (a, b) = (
            Var::from_tensor(&map1.to_dtype(dtype)?)?,
            Var::from_tensor(&map2.to_dtype(dtype)?)?,
        );
        let loss = ser.forward(&a, &b, &relative)?.loss;
        assert_eq!(loss.dtype(), DType::F32);
        assert_close(&[scalar(&loss)], &[exact], 1e-2);
        assert_eq!(loss.backward()?.get(&a).expect("a gradient").dtype(), dtype);
    }
    Ok(())
}

#[test]
fn the_projector_is_what_it_says() -> Result<()> {
    for norm in [true, false] {
        let config = SerConfig {
            projector: Some(ProjectorConfig {
                norm,
                ..small_head()
            }),
            ..bare()
        };
        let (ser, vars) = build(config, 3);
        let x = tokens(&mut rng(15), (2, 6, CHANNELS), DType::F64)?;
        let got = ser.project(&x, grid(2, 3))?;
        let weight = |name: &str| vars.data().lock().unwrap().get(name).map(|v| flat(v));
        let (w1, w2) = (
            weight("hidden.weight").unwrap(),
            weight("out.weight").unwrap(),
        );
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
            let hidden: Vec<f64> = w1
                .chunks(CHANNELS)
                .map(|w| row(w, &token))
                .map(|x| x * phi(x))
                .collect();
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
        assert!(
            (variance / (bound * bound / 3.0) - 1.0).abs() < 0.02,
            "{name}: {variance}"
        );
    }
    assert!(flat(&vars["norm.weight"]).iter().all(|v| *v == 1.0));
    assert!(flat(&vars["norm.bias"]).iter().all(|v| *v == 0.0));
    Ok(())
}

#[test]
fn the_projector_commutes_with_permutations() -> Done {
    let relative = turns();
    let (map, _) = maps(16, 3, &relative);
    let (ser, _) = build(
        SerConfig {
            projector: Some(small_head()),
            ..bare()
        },
        4,
    );
    let turn = relative.to_second(&Resample::default())?;
    let before = ser.project(&turn.apply(&map)?, grid(3, 3))?;
    let after = turn.apply(&ser.project(&map, grid(3, 3))?)?;
    assert_close(&flat(&before), &flat(&after), 1e-13);
    Ok(())
}

#[test]
fn one_valid_image_is_no_error_and_costs_nothing() -> Done {
    let all = crops();
    let two = Relative::new(
        vec![all.elements()[0], all.elements()[1]],
        all.from_grid(),
        all.to_grid(),
    )?;
    let (map1, map2) = maps(17, 2, &two);
    let out = build(bare(), 1).0.forward(&map1, &map2, &two)?;
    assert!(out.tokens > 0);
    assert_eq!(scalar(&out.loss), 0.0);
    Ok(())
}

#[test]
fn dropped_tokens_leave_a_ragged_batch() -> Done {
    let relative = crops();
    let (map1, map2) = maps(18, 3, &relative);
    let (ser, _) = build(
        SerConfig {
            symmetric: false,
            temperature: 0.2,
            ..bare()
        },
        1,
    );
    let out = ser.forward(&map1, &map2, &relative)?;
    let operator = relative.to_second(&Resample::default())?;
    let (mut rows, mut ids) = (Vec::new(), Vec::new());
    for b in 0..3u32 {
        for cell in 0..12u32 {
            if operator.valid(b as usize).unwrap()[cell as usize] {
                rows.push(12 * b + cell);
                ids.push(b);
            }
        }
    }
    let rows = Tensor::new(&rows[..], &Device::Cpu)?;
    let pick = |x: &Tensor| x.flatten(0, 1)?.index_select(&rows, 0);
    let one_way = NtXent {
        temperature: 0.2,
        symmetric: false,
        ..Default::default()
    };
    let expected = nt_xent_ragged(
        &pick(&map2)?,
        &pick(&operator.apply(&map1)?)?,
        &ids,
        None,
        &one_way,
    )?;
    assert_close(&[scalar(&out.loss)], &[scalar(&expected.loss)], 1e-14);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Done {
    let refuse = |config: SerConfig, parts: &[&str]| {
        let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
        assert_says(SerLoss::new(config, CHANNELS, vb), parts);
    };
    for temperature in [0.0, f64::NAN] {
        refuse(
            SerConfig {
                temperature,
                ..bare()
            },
            &["temperature", "above 0", &temperature.to_string()],
        );
    }
    refuse(
        SerConfig {
            lambda: -0.5,
            ..bare()
        },
        &["lambda", "at least 0", "-0.5"],
    );
    refuse(
        SerConfig {
            eps: f64::INFINITY,
            ..bare()
        },
        &["eps", "finite", "inf"],
    );
    refuse(
        SerConfig {
            max_tokens: Some(0),
            ..bare()
        },
        &["max_tokens", "at least 1", "0"],
    );
    refuse(
        SerConfig {
            max_tokens: Some(1),
            ..bare()
        },
        &["max_tokens", "at least 2", "negatives"],
    );
    let one = SerConfig {
        max_tokens: Some(1),
        objective: Objective::Mse,
        ..bare()
    };
    assert!(SerLoss::new(one, CHANNELS, VarBuilder::zeros(DType::F64, &Device::Cpu)).is_ok());
    refuse(
        SerConfig {
            block_bytes: 0,
            ..bare()
        },
        &["block_bytes", "at least 1"],
    );
    refuse(
        SerConfig {
            objective: Objective::SmoothL1 { beta: 0.0 },
            ..bare()
        },
        &["beta", "above 0", "got 0"],
    );
    let head = |hidden, out| {
        Some(ProjectorConfig {
            hidden,
            out,
            norm: false,
        })
    };
    refuse(
        SerConfig {
            projector: head(0, 4),
            ..bare()
        },
        &["ProjectorConfig::hidden", "at least 1"],
    );
    refuse(
        SerConfig {
            projector: head(4, 0),
            ..bare()
        },
        &["ProjectorConfig::out", "at least 1"],
    );

    let relative = turns();
    let (map1, map2) = maps(19, 3, &relative);
    let (ser, _) = build(bare(), 1);
    let says =
        |a: &Tensor, b: &Tensor, parts: &[&str]| assert_says(ser.forward(a, b, &relative), parts);
    says(&map1, &map2.narrow(1, 0, 8)?, &["(B, 9, C)", "[3, 8, 5]"]);
    says(
        &map1,
        &map2.narrow(2, 0, 4)?,
        &["5 channels", "4 in [3, 9, 4]"],
    );
    says(
        &map1,
        &map2.narrow(0, 0, 2)?,
        &["one batch", "3 samples", "got 2"],
    );
    says(
        &map1.narrow(0, 0, 2)?,
        &map2.narrow(0, 0, 2)?,
        &["batch of 3", "[2, 9, 5]"],
    );
    says(
        &map1,
        &map2.to_dtype(DType::F32)?,
        &["one type", "f32", "f64"],
    );
    says(&map1.i(0)?, &map2, &["rank 3 or a map of rank 4", "[9, 5]"]);
    says(
        &map1.to_dtype(DType::U32)?,
        &map2.to_dtype(DType::U32)?,
        &["f16, bf16, f32 or f64", "u32"],
    );
    let one = Relative::new(vec![Element::from(D4::HFLIP)], grid(3, 3), grid(3, 3))?;
    let (a, b) = (map1.narrow(0, 0, 1)?, map2.narrow(0, 0, 1)?);
    assert_says(
        ser.forward(&a, &b, &one),
        &["at least two images", "SameImage::Exclude", "got 1"],
    );
    let keep = Objective::NtXent {
        form: Negatives::BothViews,
        same_image: SameImage::Keep,
    };
    for objective in [keep, Objective::Mse] {
        assert!(
            build(
                SerConfig {
                    objective,
                    ..bare()
                },
                1
            )
            .0
            .forward(&a, &b, &one)
            .is_ok()
        );
    }
    let (head, _) = build(
        SerConfig {
            projector: Some(small_head()),
            ..bare()
        },
        1,
    );
    let single = |x: &Tensor| x.to_dtype(DType::F32);
    assert_says(
        head.forward(&single(&map1)?, &single(&map2)?, &relative),
        &["Projector", "f64", "f32"],
    );
    let projector = Projector::new(7, small_head(), VarBuilder::zeros(DType::F64, &Device::Cpu))?;
    assert_says(
        projector.forward(&map1).map_err(Into::into),
        &["Projector", "(…, 7)", "[3, 9, 5]"],
    );
    Ok(())
}

#[test]
fn same_seed_same_loss() -> Done {
    let seed = rng(20).random();
    let relative = crops().with_seed(seed);
    let (map1, map2) = maps(20, 3, &relative);
    let (ser, _) = build(
        SerConfig {
            max_tokens: Some(7),
            ..bare()
        },
        1,
    );
    let run = || scalar(&ser.forward(&map1, &map2, &relative).unwrap().loss);
    assert_eq!(run(), run());
    Ok(())
}
