//! `SerLoss`: values, where gradients go and where they must not.

mod common;
mod ser_common;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_says, flat, rng, scalar, tokens};
use ser_common::*;
use ser_reg::group::FieldType;
use ser_reg::loss::{Contrastive, nt_xent, nt_xent_ragged};
use ser_reg::ser::StopGradient;
use ser_reg::view::Relative;
use ser_reg::{Channels, Error, Layout, MapPair, Resample, SerConfig, TokenGrid, grad};

type Done = ser_reg::Result<()>;

#[test]
fn an_equivariant_map_costs_nothing_and_matches_everywhere() -> Done {
    let relative = turns();
    let (map, _) = maps(1, 3, &relative);
    let moved = relative.to_second(&Resample::default())?.apply(&map)?;
    for objective in objectives(0.01, 0.0) {
        let ser = build(with_objective(objective));
        let out = forward(&ser, &map, &moved, &relative)?;
        assert_eq!(out.anchors, 2 * 3 * 9);
        match out.accuracy {
            Some(accuracy) => assert_close(&[scalar(&accuracy)], &[1.0], 1e-12),
            None => assert_close(&[scalar(&out.unweighted)], &[0.0], 1e-12),
        }
        let other = forward(&ser, &map, &map, &relative)?;
        assert!(scalar(&other.unweighted) > scalar(&out.unweighted) + 0.05, "{objective:?}");
    }
    Ok(())
}

#[test]
fn the_loss_is_the_mean_over_both_frames() -> Done {
    let (q, k) = (maps(2, 3, &scales()), maps(3, 3, &scales()));
    let relative = scales();
    let config = SerConfig { lambda: 0.3, ..with_objective(nt_xent_at(0.2)) };
    let pair = MapPair::new([&q.0, &q.1], &relative).keys([&k.0, &k.1], None);
    let out = build(config).forward(&pair)?;

    let (there, back) =
        (relative.to_second(&config.resample)?, relative.to_first(&config.resample)?);
    let one_way = Contrastive { temperature: 0.2, ..Default::default() };
    let second = nt_xent(&q.1, &there.apply(&k.0)?, &one_way)?.loss;
    let first = nt_xent(&q.0, &back.apply(&k.1)?, &one_way)?.loss;
    let mean = (scalar(&first) + scalar(&second)) / 2.0;
    assert_close(&[scalar(&out.unweighted), scalar(&out.loss)], &[mean, 0.3 * mean], 1e-14);
    assert_eq!(out.anchors, 3 * (12 + 6));

    let one_way = SerConfig { symmetric: false, ..config };
    let out = build(one_way).forward(&pair)?;
    assert_close(&[scalar(&out.unweighted)], &[scalar(&second)], 1e-14);
    assert_eq!(out.anchors, 3 * 12);
    Ok(())
}

#[test]
fn gradients_match_differences_for_every_objective() -> Done {
    let all = objectives(0.3, 1e-6);
    for (relative, count) in [(turns(), 1), (scales(), 1), (crops(), all.len())] {
        let (map1, map2) = maps(4, 3, &relative);
        for objective in all.into_iter().take(count) {
            let ser = build(with_objective(objective));
            let (head, vars) =
                seeded_head(FieldType::trivial(CHANNELS), small_head(), DType::F64, 5);
            let mut reached = vars.all_vars();
            reached.extend([map1.clone(), map2.clone()]);
            assert_gradients(&reached, || {
                let pair = MapPair::new([&map1, &map2], &relative).head(&head);
                ser.forward(&pair).unwrap().loss
            });
        }
    }
    Ok(())
}

#[test]
fn masked_tokens_get_no_gradient_and_count_nothing() -> Done {
    let relative = crops();
    let (map1, map2) = maps(6, 3, &relative);
    for objective in objectives(0.3, 1e-6) {
        let config = SerConfig {
            symmetric: false,
            stop_gradient: StopGradient::Keys,
            ..with_objective(objective)
        };
        let out = forward(&build(config), &map1, &map2, &relative)?;
        let grads = out.loss.backward()?;
        let grad = grads.get(&map2).expect("a gradient");
        let operator = relative.to_second(&config.resample)?;
        let mut counted = 0;
        for b in 0..3 {
            let valid = operator.valid(b).unwrap().expect("crops have masks");
            for (cell, &valid) in valid.iter().enumerate() {
                let norm: f64 = flat(&grad.i((b, cell))?).iter().map(|g| g * g).sum();
                assert_eq!(norm > 0.0, valid, "image {b}, cell {cell}, {objective:?}");
                counted += usize::from(valid);
            }
        }
        assert_eq!(out.anchors, counted);
        assert!((1..3 * 12).contains(&counted));
    }
    Ok(())
}

#[test]
fn an_image_without_overlap_counts_nothing() -> Done {
    let all = crops();
    let (map1, map2) = maps(7, 3, &all);
    let kept = Tensor::new(&[0u32, 2], &Device::Cpu)?;
    let elements = vec![all.elements()[0], all.elements()[2]];
    let two = Relative::new(elements, all.from_grid(), all.to_grid())?;
    for objective in objectives(0.3, 1e-6) {
        let ser = build(with_objective(objective));
        let with = forward(&ser, &map1, &map2, &all)?;
        let (a, b) = (map1.index_select(&kept, 0)?, map2.index_select(&kept, 0)?);
        let without = forward(&ser, &a, &b, &two)?;
        assert_eq!(with.anchors, without.anchors);
        assert_close(&[scalar(&with.loss)], &[scalar(&without.loss)], 1e-14);
        let grads = with.loss.backward()?;
        let grad = grads.get(&map1).expect("a gradient").i(1)?;
        assert!(flat(&grad).iter().all(|g| *g == 0.0));

        let (map1, map2) = maps(7, 2, &no_overlap());
        let none = forward(&ser, &map1, &map2, &no_overlap());
        assert!(matches!(none, Err(Error::NoOverlap { images: 2 })));
        assert_says(none, &["at least one token", "no overlap in any of 2"]);
    }
    Ok(())
}

#[test]
fn the_key_side_gets_no_gradient() -> Done {
    let relative = scales();
    let (q, k) = (maps(8, 2, &relative), maps(9, 2, &relative));
    let field = || FieldType::trivial(CHANNELS);
    let (head, vars) = seeded_head(field(), small_head(), DType::F64, 1);
    let (key_head, key_vars) = seeded_head(field(), small_head(), DType::F64, 2);
    let ser = build(SerConfig::default());
    let pair = MapPair::new([&q.0, &q.1], &relative).head(&head);
    let out = ser.forward(&pair.keys([&k.0, &k.1], &key_head))?;
    let grads = out.loss.backward()?;
    for var in key_vars.all_vars().iter().chain([&k.0, &k.1]) {
        assert!(grads.get(var).is_none());
    }
    for var in vars.all_vars().iter().chain([&q.0, &q.1]) {
        let grad = grads.get(var).expect("the query side learns");
        assert!(flat(grad).iter().any(|g| g.abs() > 1e-9));
    }
    // The keys pass the key head.
    let own = ser.forward(&pair.keys([&k.0, &k.1], &head))?;
    assert!((scalar(&own.loss) - scalar(&out.loss)).abs() > 1e-6);

    // Maps that serve as queries and keys: the same as stopping the keys.
    let stopped = build(SerConfig { stop_gradient: StopGradient::Keys, ..Default::default() });
    let a = ser.forward(&pair.keys([&q.0, &q.1], &head))?.loss;
    let b = stopped.forward(&pair)?.loss;
    assert_eq!(scalar(&a), scalar(&b));
    let (a, b) = (a.backward()?, b.backward()?);
    for var in vars.all_vars().iter().chain([&q.0, &q.1]) {
        assert_close(&flat(a.get(var).unwrap()), &flat(b.get(var).unwrap()), 1e-15);
    }
    Ok(())
}

#[test]
fn the_keys_can_be_stopped() -> Done {
    let relative = scales();
    let (map1, map2) = maps(10, 2, &relative);
    let reached = |stop_gradient| {
        let ser = build(SerConfig { stop_gradient, symmetric: false, ..Default::default() });
        let out = forward(&ser, &map1, &map2, &relative).unwrap();
        let grads = out.loss.backward().unwrap();
        // Keys come from the first view, anchors from the second.
        (grads.get(&map1).is_some(), grads.get(&map2).is_some())
    };
    assert_eq!(reached(StopGradient::None), (true, true));
    assert_eq!(reached(StopGradient::Keys), (false, true));
    Ok(())
}

#[test]
fn lambda_scales_the_loss_and_leaves_the_unweighted_one() -> Done {
    for relative in [turns(), crops()] {
        let (map1, map2) = maps(11, 3, &relative);
        for objective in objectives(0.3, 1e-6) {
            let mut ser = build(with_objective(objective));
            let one = forward(&ser, &map1, &map2, &relative)?;
            for lambda in [0.0, 0.3, 1.0, 2.0] {
                ser.set_lambda(lambda)?;
                let out = forward(&ser, &map1, &map2, &relative)?;
                assert_eq!(scalar(&out.loss), lambda * scalar(&out.unweighted));
                assert_eq!(scalar(&out.unweighted), scalar(&one.unweighted));
                assert_eq!(out.loss.track_op(), lambda > 0.0);
                assert_eq!(out.loss.dtype(), DType::F64);
                assert!(out.unweighted.track_op());
                assert_eq!(out.anchors, one.anchors);
                let accuracy = |x: &Option<Tensor>| x.as_ref().map(scalar);
                assert_eq!(accuracy(&out.accuracy), accuracy(&one.accuracy));
                assert!(out.accuracy.is_none_or(|a| !a.track_op()));
            }
        }
    }
    let mut ser = build(SerConfig::default());
    assert_says(ser.set_lambda(-1.0), &["lambda", "above 0", "-1"]);
    assert_says(ser.set_lambda(f64::NAN), &["lambda", "NaN"]);
    assert_eq!(ser.config().lambda, 1.0);
    // The input is checked at lambda 0 too.
    ser.set_lambda(0.0)?;
    let (map1, map2) = maps(11, 3, &turns());
    assert!(forward(&ser, &map1, &map2.i(0)?, &turns()).is_err());
    let none = forward(&ser, &map1, &map2, &no_overlap());
    assert!(matches!(none, Err(Error::NoOverlap { images: 3 })));
    Ok(())
}

#[test]
fn lambda_zero_leaves_the_base_loss_as_it_is_to_the_bit() -> Done {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let weight = vb.get((2, CHANNELS), "stem")?;
    let head = ser_reg::Projector::new(CHANNELS, small_head(), vb.pp("ser"))?;
    reseed(&vars, 3);
    let relative = turns();
    let image = |seed| tokens(&mut rng(seed), (3, 9, 2), DType::F32);
    let map = |x: &Tensor| x.broadcast_matmul(&weight)?.tanh();
    let (map1, map2) = (map(&image(1)?.detach())?, map(&image(2)?.detach())?);
    let base = (map1.sqr()?.mean_all()? + map2.sqr()?.mean_all()?)?;
    for objective in objectives(0.3, 1e-6) {
        for lambda in [0.0, 0.5] {
            let ser = build(SerConfig { lambda, ..with_objective(objective) });
            let out = ser.forward(&MapPair::new([&map1, &map2], &relative).head(&head))?;
            grad::assert_reaches(&out.unweighted, grad::named(&vars, ""))?;
            let sum = (&base + &out.loss)?;
            let (alone, both) = (base.backward()?, sum.backward()?);
            for (name, var) in grad::named(&vars, "") {
                let bits = |g: Option<&Tensor>| {
                    let values = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    g.map(|g| values(g).into_iter().map(f32::to_bits).collect::<Vec<_>>())
                };
                let same = bits(alone.get(&var)) == bits(both.get(&var));
                assert_eq!(same, lambda == 0.0, "{name}, {objective:?}");
            }
            if lambda == 0.0 {
                assert_eq!(scalar(&sum).to_bits(), scalar(&base).to_bits());
            }
        }
    }
    Ok(())
}

#[test]
fn the_cap_on_anchors_is_spread_evenly_and_drawn_from_the_seed() -> Done {
    let (map1, map2) = maps(12, 3, &turns());
    let touched = |cap: usize, seed: u64| {
        let config = SerConfig {
            max_tokens: Some(cap),
            symmetric: false,
            stop_gradient: StopGradient::Keys,
            ..Default::default()
        };
        let relative = turns();
        let pair = MapPair::new([&map1, &map2], &relative).seed(seed);
        let out = build(config).forward(&pair).unwrap();
        let grads = out.loss.backward().unwrap();
        let grad = flat(grads.get(&map2).unwrap());
        let rows: Vec<bool> = grad.chunks(CHANNELS).map(|g| g.iter().any(|v| *v != 0.0)).collect();
        (out.anchors, rows)
    };
    for (cap, per_image) in
        [(27, [9, 9, 9]), (100, [9, 9, 9]), (12, [4, 4, 4]), (14, [4, 5, 5]), (3, [1, 1, 1])]
    {
        let (counted, rows) = touched(cap, 5);
        let mut each: Vec<usize> =
            rows.chunks(9).map(|r| r.iter().filter(|t| **t).count()).collect();
        each.sort_unstable();
        assert_eq!((counted, each), (cap.min(27), per_image.to_vec()));
        assert_eq!(rows, touched(cap, 5).1, "same seed, same draw");
    }
    assert!((6..10).any(|seed| touched(12, seed).1 != touched(12, 5).1), "the seed matters");
    // Every token is drawn by some seed.
    let seen = (0..60).map(|seed| touched(6, seed).1).fold(vec![false; 27], |seen, rows| {
        seen.into_iter().zip(rows).map(|(a, b)| a || b).collect()
    });
    assert!(seen.iter().all(|s| *s));

    // What an image without so many valid tokens leaves goes to the others, whichever is drawn
    // first.
    let (map1, map2) = maps(12, 3, &crops());
    let counted = |max_tokens, seed| {
        let ser = build(SerConfig { symmetric: false, max_tokens, ..Default::default() });
        let relative = crops();
        let pair = MapPair::new([&map1, &map2], &relative).seed(seed);
        ser.forward(&pair).unwrap().anchors
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
    let expected = scalar(&forward(&build(SerConfig::default()), &map1, &map2, &relative)?.loss);

    let prefix = tokens(&mut rng(1), (2, 2, CHANNELS), DType::F64)?;
    let (long1, long2) = (
        Tensor::cat(&[prefix.as_tensor(), map1.as_tensor()], 1)?,
        Tensor::cat(&[prefix.as_tensor(), map2.as_tensor()], 1)?,
    );
    let arranged = |layout| build(SerConfig { layout, ..Default::default() });
    let ser = arranged(Layout { prefix: 2, ..Default::default() });
    let loss = forward(&ser, &long1, &long2, &relative)?.loss;
    assert_close(&[scalar(&loss)], &[expected], 1e-14);
    assert!(loss.backward()?.get(&prefix).is_none_or(|g| flat(g).iter().all(|g| *g == 0.0)));

    let as_map = |x: &Var, g: TokenGrid| x.reshape((2, g.rows(), g.cols(), CHANNELS));
    let (last1, last2) = (as_map(&map1, grid(2, 3))?, as_map(&map2, grid(4, 3))?);
    for (channels, move_channels) in [(Channels::Last, false), (Channels::First, true)] {
        let ser = arranged(Layout { channels, ..Default::default() });
        let place = |x: &Tensor| match move_channels {
            true => x.permute((0, 3, 1, 2))?.contiguous(),
            false => Ok(x.clone()),
        };
        let loss = forward(&ser, &place(&last1)?, &place(&last2)?, &relative)?.loss;
        assert_close(&[scalar(&loss)], &[expected], 1e-14);
    }
    Ok(())
}

#[test]
fn half_precision_maps_give_an_f32_loss() -> Done {
    for relative in [turns(), crops()] {
        let (map1, map2) = maps(14, 3, &relative);
        let ser = build(SerConfig::default());
        let exact = scalar(&forward(&ser, &map1, &map2, &relative)?.loss);
        for dtype in [DType::F16, DType::BF16] {
            let (a, b) = (
                Var::from_tensor(&map1.to_dtype(dtype)?)?,
                Var::from_tensor(&map2.to_dtype(dtype)?)?,
            );
            let out = forward(&ser, &a, &b, &relative)?;
            assert_eq!(out.loss.dtype(), DType::F32);
            assert_eq!(out.accuracy.expect("NT-Xent").dtype(), DType::F32);
            assert_close(&[scalar(&out.loss)], &[exact], 1e-2);
            let grads = out.loss.backward()?;
            assert_eq!(grads.get(&a).expect("a gradient").dtype(), dtype);
        }
    }
    Ok(())
}

#[test]
fn one_valid_image_is_no_error_and_costs_nothing() -> Done {
    let all = crops();
    let two =
        Relative::new(vec![all.elements()[0], all.elements()[1]], all.from_grid(), all.to_grid())?;
    let (map1, map2) = maps(17, 2, &two);
    let out = forward(&build(SerConfig::default()), &map1, &map2, &two)?;
    assert!(out.anchors > 0);
    assert_eq!(scalar(&out.loss), 0.0);
    Ok(())
}

#[test]
fn dropped_tokens_leave_a_ragged_batch() -> Done {
    let relative = crops();
    let (map1, map2) = maps(18, 3, &relative);
    let ser = build(SerConfig { symmetric: false, ..with_objective(nt_xent_at(0.2)) });
    let out = forward(&ser, &map1, &map2, &relative)?;
    let operator = relative.to_second(&Resample::default())?;
    let (mut rows, mut ids) = (Vec::new(), Vec::new());
    for b in 0..3u32 {
        for cell in 0..12u32 {
            if operator.valid(b as usize).unwrap().unwrap()[cell as usize] {
                rows.push(12 * b + cell);
                ids.push(b);
            }
        }
    }
    let rows = Tensor::new(&rows[..], &Device::Cpu)?;
    let pick = |x: &Tensor| x.flatten(0, 1)?.index_select(&rows, 0);
    let contrastive = Contrastive { temperature: 0.2, ..Default::default() };
    let keys = pick(&operator.apply(&map1)?)?;
    let expected = nt_xent_ragged(&pick(&map2)?, &keys, &ids, None, &contrastive)?;
    assert_close(&[scalar(&out.loss)], &[scalar(&expected.loss)], 1e-14);
    Ok(())
}

#[test]
fn same_seed_same_loss() -> Done {
    let relative = crops();
    let (map1, map2) = maps(20, 3, &relative);
    let ser = build(SerConfig { max_tokens: Some(7), ..Default::default() });
    let run = |seed| {
        let pair = MapPair::new([&map1, &map2], &relative).seed(seed);
        scalar(&ser.forward(&pair).unwrap().loss)
    };
    assert_eq!(run(9), run(9));
    assert!((10..14).any(|seed| run(seed) != run(9)));
    Ok(())
}
