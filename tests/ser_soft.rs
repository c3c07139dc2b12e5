//! Weights of samples and tokens, of one's own and by visibility: values, gradients, and what is refused.

mod loss_common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use loss_common::{assert_close, assert_says, differences, flat, rng, scalar, tokens};
use rand::Rng;
use ser_reg::group::{Affine, D4, Element, Window};
use ser_reg::loss::{Negatives, SameImage};
use ser_reg::ser::{
    Objective, Scope, SerConfig, SerLoss, SoftWeight, Validity, Weights, pair_visibility,
    token_visibility,
};
use ser_reg::view::Relative;
use ser_reg::{GroupAction, Resample, TokenGrid, loss};

type Done = ser_reg::Result<()>;

const CHANNELS: usize = 4;

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

fn build(config: SerConfig) -> ser_reg::Result<SerLoss> {
    let config = SerConfig {
        projector: None,
        ..config
    };
    SerLoss::new(
        config,
        CHANNELS,
        VarBuilder::zeros(DType::F64, &Device::Cpu),
    )
}

fn plain(objective: Objective) -> SerConfig {
    SerConfig {
        objective,
        ..Default::default()
    }
}

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

/// Crops that overlap in part, more and less, on grids of their own.
fn crops() -> Relative<Element> {
    let window = |y, x| Element::from(Window::new(y, x, 0.5, 0.5).unwrap());
    let pairs = [
        (window(0.0, 0.0), window(0.25, 0.1).then(D4::HFLIP)),
        (window(0.1, 0.3), window(0.1, 0.2)),
        (window(0.2, 0.2), window(0.0, 0.1).then(D4::ROT90)),
    ];
    let relative = pairs.map(|(a, b)| Element::relative(&a, &b)).to_vec();
    Relative::new(relative, grid(4, 3), grid(3, 4))
        .unwrap()
        .with_seed(9)
}

fn turns() -> Relative<Element> {
    let g = [D4::ROT90, D4::HFLIP, D4::ROT180]
        .map(Element::from)
        .to_vec();
    Relative::new(g, grid(3, 3), grid(3, 3)).unwrap()
}

fn maps(seed: u64, relative: &Relative<Element>) -> (Var, Var) {
    let rng = &mut rng(seed);
    let mut map = |grid: TokenGrid| tokens(rng, (3, grid.len(), CHANNELS), DType::F64).unwrap();
    (map(relative.from_grid()), map(relative.to_grid()))
}

fn drawn(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rng(seed);
    (0..n).map(|_| rng.random_range(0.1..2.0)).collect()
}

#[test]
fn the_curve_is_that_of_the_paper() -> Done {
    let soft = |p_min, k| SoftWeight {
        p_min,
        k,
        ..Default::default()
    };
    for (p_min, k) in [(0.0, 1.0), (0.1, 2.0), (0.01, 4.0), (1.0, 2.0)] {
        for v in [0.0, 0.2, 0.5, 0.9, 1.0] {
            let p = 1.0 - (1.0 - p_min) * f64::powf(1.0 - v, k);
            assert_close(&[soft(p_min, k).at(v)], &[p], 1e-15);
        }
        assert_eq!(
            (soft(p_min, k).at(-3.0), soft(p_min, k).at(7.0)),
            (p_min, 1.0)
        );
    }
    for (p_min, k, says) in [
        (-0.1, 2.0, "SoftWeight::p_min"),
        (1.1, 2.0, "SoftWeight::p_min"),
        (f64::NAN, 2.0, "SoftWeight::p_min"),
        (0.1, 0.0, "SoftWeight::k"),
        (0.1, f64::NAN, "SoftWeight::k"),
        (0.1, f64::INFINITY, "SoftWeight::k"),
    ] {
        let config = SerConfig {
            soft: Some(soft(p_min, k)),
            ..Default::default()
        };
        assert_says(build(config), &[says, "expected"]);
    }
    Ok(())
}

#[test]
fn visibility_is_the_share_that_both_views_see() -> Done {
    // the second view is the right half of the first
    let half = Element::from(Window::new(0.0, 0.5, 1.0, 0.5)?);
    let relative = Relative::new(vec![half, Element::identity()], grid(2, 4), grid(2, 2))?;
    assert_eq!(pair_visibility(&relative)?, [[0.5, 1.0], [1.0, 1.0]]);
    let [first, second] = token_visibility(&relative)?;
    assert_close(
        &first[..8],
        &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        1e-12,
    );
    assert_eq!((&first[8..], second), (&[1.0; 8][..], vec![1.0; 8]));

    // a quarter of a cell: the outermost token is three quarters inside, and still valid
    let shift = Element::from(Affine::translation(0.0, 0.25 / 4.0)?);
    let relative = Relative::new(vec![shift], grid(1, 4), grid(1, 4))?;
    assert_eq!(pair_visibility(&relative)?, [[1.0], [1.0]]);
    let [first, second] = token_visibility(&relative)?;
    assert_close(&first, &[1.0, 1.0, 1.0, 0.75], 1e-12);
    assert_close(&second, &[0.75, 1.0, 1.0, 1.0], 1e-12);

    // a square and the same turned by 45° share 2(√2 − 1) of their area
    let turn = Element::from(Affine::rotation(45.0)?);
    let relative = Relative::new(vec![turn], grid(16, 16), grid(16, 16))?;
    for (seen, pair) in token_visibility(&relative)?
        .iter()
        .zip(pair_visibility(&relative)?)
    {
        let area = 2.0 * (2f64.sqrt() - 1.0);
        let mean = seen.iter().sum::<f64>() / 256.0;
        assert!((mean - area).abs() < 0.005, "{mean}");
        assert!((pair[0] - area).abs() < 0.03, "{pair:?}");
        assert!(seen.iter().any(|v| 0.0 < *v && *v < 1.0));
    }

    // what neither sees
    let away = Element::from(Affine::translation(3.0, 0.0)?);
    let relative = Relative::new(vec![away], grid(2, 2), grid(2, 2))?;
    assert_eq!(pair_visibility(&relative)?, [[0.0], [0.0]]);
    assert_eq!(token_visibility(&relative)?, [vec![0.0; 4], vec![0.0; 4]]);
    Ok(())
}

#[test]
fn weights_weigh_the_anchors_of_their_own_view() -> Done {
    let relative = turns();
    let (map1, map2) = maps(1, &relative);
    let (w1, w2, samples) = (drawn(27, 2), drawn(27, 3), [0.5, 2.0, 1.0]);
    let weights = Weights {
        samples: Some(&samples),
        tokens: [Some(&w1), Some(&w2)],
    };
    let product = |w: &[f32]| -> Vec<f32> {
        w.iter()
            .enumerate()
            .map(|(i, w)| w * samples[i / 9])
            .collect()
    };
    let ser = build(plain(Objective::Mse))?;
    let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
    let (there, back) = (
        relative.to_second(&Resample::default())?,
        relative.to_first(&Resample::default())?,
    );
    let second = loss::mse(&map2, &there.apply(&map1)?, Some(&product(&w2)))?;
    let first = loss::mse(&map1, &back.apply(&map2)?, Some(&product(&w1)))?;
    assert_close(
        &[scalar(&out.loss)],
        &[(scalar(&first) + scalar(&second)) / 2.0],
        1e-7,
    );
    assert_eq!(out.tokens, 54);

    // the same by the queries' weights against keys
    let keyed =
        ser.forward_with_keys_weighted([&map1, &map2], [&map1, &map2], &ser, &relative, &weights)?;
    assert_eq!(scalar(&keyed.loss), scalar(&out.loss));

    // ones change nothing, to the bit; neither does their scale
    for objective in OBJECTIVES {
        for relative in [turns(), crops()] {
            let (map1, map2) = maps(1, &relative);
            let ser = build(plain(objective))?;
            let without = ser.forward(&map1, &map2, &relative)?;
            for value in [1.0, 7.0] {
                let samples = [value; 3];
                let weights = Weights {
                    samples: Some(&samples),
                    ..Default::default()
                };
                let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
                assert_eq!(scalar(&out.loss), scalar(&without.loss), "{objective:?}");
                assert_eq!(out.tokens, without.tokens);
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_of_weight_zero_is_dropped() -> Done {
    let all = crops();
    let (map1, map2) = maps(4, &all);
    let kept = Tensor::new(&[0u32, 2], &Device::Cpu)?;
    let elements = vec![all.elements()[0], all.elements()[2]];
    let two = Relative::new(elements, all.from_grid(), all.to_grid())?;
    let samples = [1.0, 0.0, 1.0];
    let weights = Weights {
        samples: Some(&samples),
        ..Default::default()
    };
    for objective in OBJECTIVES {
        let ser = build(plain(objective))?;
        let with = ser.forward_weighted(&map1, &map2, &all, &weights)?;
        let without = ser.forward(
            &map1.index_select(&kept, 0)?,
            &map2.index_select(&kept, 0)?,
            &two,
        )?;
        assert_eq!(with.tokens, without.tokens);
        assert_close(&[scalar(&with.loss)], &[scalar(&without.loss)], 1e-14);
        let grads = with.loss.backward()?;
        for map in [&map1, &map2] {
            let grad = flat(&grads.get(map).expect("a gradient").get(1)?);
            assert!(grad.iter().all(|g| *g == 0.0), "{objective:?}");
        }
        // a cap on tokens is not spent on them
        let capped = build(SerConfig {
            max_tokens: Some(4),
            symmetric: false,
            ..plain(objective)
        })?;
        let out = capped.forward_weighted(&map1, &map2, &all, &weights)?;
        assert_eq!(out.tokens, 4);
    }
    // one direction without weight: the mean is over the other
    let ser = build(plain(Objective::Mse))?;
    let nothing = [0f32; 36];
    let first = Weights {
        tokens: [None, Some(&nothing)],
        ..Default::default()
    };
    let out = ser.forward_weighted(&map1, &map2, &all, &first)?;
    let back = all.to_first(&Resample::default())?;
    let mask = back
        .mask(DType::F32, &Device::Cpu)?
        .expect("crops have masks");
    let mask = mask.flatten_all()?.to_vec1::<f32>()?;
    let expected = loss::mse(&map1, &back.apply(&map2)?, Some(&mask))?;
    assert_close(&[scalar(&out.loss)], &[scalar(&expected)], 1e-14);
    Ok(())
}

#[test]
fn soft_weights_are_weights_of_visibility() -> Done {
    let relative = crops();
    let (map1, map2) = maps(5, &relative);
    let pairs = pair_visibility(&relative)?;
    let seen = token_visibility(&relative)?;
    assert!(pairs[0].iter().any(|v| *v < 0.9) && seen[0].iter().any(|v| 0.0 < *v && *v < 1.0));
    for scope in [Scope::Pairs, Scope::Tokens, Scope::Both] {
        let soft = SoftWeight {
            p_min: 0.05,
            k: 1.5,
            scope,
            normalize: true,
        };
        let by_hand = |view: usize| -> Vec<f32> {
            let p = |i: usize| match scope {
                Scope::Pairs => soft.at(pairs[view][i / 12]),
                Scope::Tokens => soft.at(seen[view][i]),
                Scope::Both => soft.at(pairs[view][i / 12]) * soft.at(seen[view][i]),
            };
            (0..36).map(|i| p(i) as f32).collect()
        };
        let (w1, w2) = (by_hand(0), by_hand(1));
        let weights = Weights {
            tokens: [Some(&w1), Some(&w2)],
            ..Default::default()
        };
        for objective in OBJECTIVES {
            for validity in [Validity::Mask, Validity::Ignore] {
                let config = SerConfig {
                    validity,
                    ..plain(objective)
                };
                let ours = build(SerConfig {
                    soft: Some(soft),
                    ..config
                })?;
                let ours = ours.forward(&map1, &map2, &relative)?;
                let ser = build(config)?;
                let theirs = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
                // weights are f32
                assert_close(&[scalar(&ours.loss)], &[scalar(&theirs.loss)], 1e-6);
                assert_eq!(ours.tokens, theirs.tokens);
                let even = ser.forward(&map1, &map2, &relative)?;
                assert!(
                    (scalar(&ours.loss) - scalar(&even.loss)).abs() > 1e-4,
                    "{scope:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn without_normalisation_a_batch_seen_in_part_counts_less() -> Done {
    let relative = crops();
    let (map1, map2) = maps(6, &relative);
    let soft = SoftWeight {
        p_min: 0.05,
        normalize: false,
        ..Default::default()
    };
    let one_way = SerConfig {
        symmetric: false,
        ..plain(Objective::Mse)
    };
    let ser = build(SerConfig {
        soft: Some(soft),
        ..one_way
    })?;
    let samples = [1.0f32, 0.5, 2.0];
    let weights = Weights {
        samples: Some(&samples),
        ..Default::default()
    };
    let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
    // Σ w p ℓ / Σ w over the valid tokens of the second view
    let operator = relative.to_second(&Resample::default())?;
    let keys = operator.apply(&map1)?;
    let each = (map2.as_tensor() - keys)?
        .sqr()?
        .mean(2)?
        .to_vec2::<f64>()?;
    let [_, pairs] = pair_visibility(&relative)?;
    let (mut sum, mut total) = (0.0, 0.0);
    for b in 0..3 {
        let valid = operator.valid(b).expect("a mask");
        for (cell, _) in valid.iter().enumerate().filter(|(_, v)| **v) {
            let w = f64::from(samples[b]);
            sum += w * soft.at(pairs[b]) * each[b][cell];
            total += w;
        }
    }
    assert_close(&[scalar(&out.loss)], &[sum / total], 1e-7);

    // turns leave all visible: nothing changes, to the bit
    let (map1, map2) = maps(7, &turns());
    for objective in OBJECTIVES {
        let even = build(plain(objective))?.forward(&map1, &map2, &turns())?;
        for scope in [Scope::Pairs, Scope::Tokens, Scope::Both] {
            for normalize in [true, false] {
                let soft = Some(SoftWeight {
                    scope,
                    normalize,
                    ..Default::default()
                });
                let ser = build(SerConfig {
                    soft,
                    ..plain(objective)
                })?;
                let out = ser.forward(&map1, &map2, &turns())?;
                assert_eq!(
                    scalar(&out.loss),
                    scalar(&even.loss),
                    "{objective:?} {scope:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn one_element_for_all_samples_weighs_them_alike() -> Done {
    let one = Relative::new(vec![crops().elements()[0]], grid(4, 3), grid(3, 4))?;
    let three = Relative::new(vec![crops().elements()[0]; 3], grid(4, 3), grid(3, 4))?;
    let (map1, map2) = maps(8, &one);
    for scope in [Scope::Pairs, Scope::Tokens, Scope::Both] {
        let soft = Some(SoftWeight {
            scope,
            normalize: false,
            ..Default::default()
        });
        let ser = build(SerConfig {
            soft,
            ..plain(Objective::Cosine)
        })?;
        let [a, b] = [&one, &three].map(|r| ser.forward(&map1, &map2, r).unwrap());
        assert_eq!(scalar(&a.loss), scalar(&b.loss));
    }
    Ok(())
}

#[test]
fn gradients_match_differences_under_weights() -> Done {
    let relative = crops();
    let (map1, map2) = maps(9, &relative);
    let (w1, w2) = (drawn(36, 10), drawn(36, 11));
    let samples = [0.5f32, 1.0, 2.0];
    let weights = Weights {
        samples: Some(&samples),
        tokens: [Some(&w1), Some(&w2)],
    };
    let soft = SoftWeight {
        p_min: 0.1,
        k: 2.0,
        scope: Scope::Both,
        normalize: false,
    };
    for objective in OBJECTIVES {
        let ser = build(SerConfig {
            soft: Some(soft),
            ..plain(objective)
        })?;
        let value = || {
            ser.forward_weighted(&map1, &map2, &relative, &weights)
                .unwrap()
                .loss
        };
        let grads = value().backward()?;
        for map in [&map1, &map2] {
            let at = |v: &[f64]| {
                let kept = map.as_tensor().copy().unwrap();
                map.set(&Tensor::from_slice(v, map.shape(), &Device::Cpu).unwrap())
                    .unwrap();
                let value = scalar(&value());
                map.set(&kept).unwrap();
                value
            };
            let grad = flat(grads.get(map).expect("a gradient"));
            assert_close(&grad, &differences(&flat(map), 1e-5, at), 2e-6);
        }
    }
    Ok(())
}

#[test]
fn bad_weights_are_refused() -> Done {
    let relative = crops();
    let (map1, map2) = maps(12, &relative);
    let ser = build(plain(Objective::Mse))?;
    let run = |weights: Weights| ser.forward_weighted(&map1, &map2, &relative, &weights);
    let samples = |w| Weights {
        samples: Some(w),
        ..Default::default()
    };
    assert_says(
        run(samples(&[1.0, 1.0])),
        &["one weight per sample, 3", "got 2"],
    );
    assert_says(
        run(samples(&[1.0, -1.0, 1.0])),
        &["at least 0", "per sample", "-1"],
    );
    assert_says(run(samples(&[1.0, f32::NAN, 1.0])), &["finite", "NaN"]);
    assert_says(run(samples(&[1.0, f32::INFINITY, 1.0])), &["finite", "inf"]);
    assert_says(
        run(samples(&[0.0; 3])),
        &["of a weight above 0", "none in any of 3 samples"],
    );
    let short = [1f32; 35];
    let tokens = Weights {
        tokens: [Some(&short), None],
        ..Default::default()
    };
    assert_says(run(tokens), &["per token of the first view, 36", "got 35"]);
    let tokens = Weights {
        tokens: [None, Some(&short)],
        ..Default::default()
    };
    assert_says(run(tokens), &["per token of the second view, 36"]);
    // one direction only
    let one_way = build(SerConfig {
        symmetric: false,
        ..plain(Objective::Mse)
    })?;
    let nothing = [0f32; 36];
    let tokens = Weights {
        tokens: [None, Some(&nothing)],
        ..Default::default()
    };
    assert_says(
        one_way.forward_weighted(&map1, &map2, &relative, &tokens),
        &["of a weight above 0"],
    );
    Ok(())
}

#[test]
fn one_image_left_is_no_error_and_costs_nothing() -> Done {
    let exclude = |form| Objective::NtXent {
        form,
        same_image: SameImage::Exclude,
    };
    let relative = Relative::new(vec![Element::from(D4::ROT90)], grid(3, 3), grid(3, 3))?;
    let rng = &mut rng(13);
    let map1 = tokens(rng, (2, 9, CHANNELS), DType::F64)?;
    let map2 = tokens(rng, (2, 9, CHANNELS), DType::F64)?;
    let samples = [1.0, 0.0];
    let weights = Weights {
        samples: Some(&samples),
        ..Default::default()
    };
    // by weights
    for form in [Negatives::BothViews, Negatives::OtherView] {
        let ser = build(plain(exclude(form)))?;
        let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
        assert_eq!((scalar(&out.loss), out.tokens), (0.0, 18));
    }
    // by masks
    let away = Element::from(Affine::translation(3.0, 0.0)?);
    let masked = vec![Element::from(D4::ROT90), away];
    let masked = Relative::new(masked, grid(3, 3), grid(3, 3))?;
    for form in [Negatives::BothViews, Negatives::OtherView] {
        let out = build(plain(exclude(form)))?.forward(&map1, &map2, &masked)?;
        assert_eq!((scalar(&out.loss), out.tokens), (0.0, 18));
    }
    // objectives without negatives, or with those of the same image, go on
    let keep = Objective::NtXent {
        form: Negatives::BothViews,
        same_image: SameImage::Keep,
    };
    for objective in [keep, Objective::Mse] {
        let ser = build(plain(objective))?;
        assert!(
            scalar(
                &ser.forward_weighted(&map1, &map2, &relative, &weights)?
                    .loss
            ) > 0.0
        );
        assert!(scalar(&ser.forward(&map1, &map2, &masked)?.loss) > 0.0);
    }
    Ok(())
}

#[test]
fn without_normalisation_the_least_weight_may_be_zero() -> Done {
    // the second pair shares nothing, the first and the third in part; with masks ignored all tokens are valid
    let mut elements = crops().elements().to_vec();
    elements[1] = Affine::translation(3.0, 0.0)?.into();
    let relative = Relative::new(elements, grid(4, 3), grid(3, 4))?;
    let (map1, map2) = maps(14, &relative);
    let seen = token_visibility(&relative)?;
    let pairs = pair_visibility(&relative)?;
    let samples = [1.0f32, 0.5, 2.0];
    let weights = Weights {
        samples: Some(&samples),
        ..Default::default()
    };
    for scope in [Scope::Pairs, Scope::Tokens, Scope::Both] {
        let value = |p_min| {
            let soft = SoftWeight {
                p_min,
                scope,
                normalize: false,
                ..Default::default()
            };
            let ser = build(SerConfig {
                soft: Some(soft),
                validity: Validity::Ignore,
                symmetric: false,
                ..plain(Objective::Mse)
            })?;
            let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
            Ok::<_, ser_reg::Error>((scalar(&out.loss), soft))
        };
        let (zero, soft) = value(0.0)?;
        assert_close(&[zero], &[value(1e-9)?.0], 1e-7);
        // and both are the formula
        let keys = relative.to_second(&Resample::default())?.apply(&map1)?;
        let each = (map2.as_tensor() - keys)?.sqr()?.mean(2)?;
        let (mut sum, mut total) = (0.0, 0.0);
        for (i, value) in flat(&each).into_iter().enumerate() {
            let (pair, token) = (soft.at(pairs[1][i / 12]), soft.at(seen[1][i]));
            let p = match scope {
                Scope::Pairs => pair,
                Scope::Tokens => token,
                Scope::Both => pair * token,
            };
            sum += f64::from(samples[i / 12]) * p * value;
            total += f64::from(samples[i / 12]);
        }
        assert_close(&[zero], &[sum / total], 1e-7);
    }
    Ok(())
}
