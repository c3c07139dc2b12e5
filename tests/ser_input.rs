//! What `SerLoss` and `MapPair` refuse, and what the message says.

mod common;
mod ser_common;

use candle_core::{DType, IndexOp, Tensor};
use common::{assert_says, tokens};
use ser_common::*;
use ser_reg::group::{Affine, D4, Element, FieldType, Subgroup};
use ser_reg::loss::{Contrastive, SameImage};
use ser_reg::ser::{Objective, Weights};
use ser_reg::view::Relative;
use ser_reg::{Error, MapPair, ProjectorConfig, SerConfig, SerLoss};

type Done = ser_reg::Result<()>;

#[test]
fn settings_out_of_range_are_named() {
    let contrastive = |set: fn(&mut Contrastive)| {
        let mut c = Contrastive::default();
        set(&mut c);
        with_objective(Objective::NtXent(c))
    };
    let lambda = |lambda| SerConfig { lambda, ..Default::default() };
    let most = |most, objective| SerConfig { max_tokens: Some(most), ..with_objective(objective) };
    let cosine = |eps| with_objective(Objective::Cosine { eps });
    let normalized = |eps| with_objective(Objective::NormalizedMse { eps });
    let huber = |beta| with_objective(Objective::SmoothL1 { beta });
    for (config, parts) in [
        (contrastive(|c| c.temperature = 0.0), ["temperature", "above 0", "got 0"]),
        (contrastive(|c| c.temperature = -0.1), ["temperature", "above 0", "-1e-1"]),
        (contrastive(|c| c.temperature = f64::NAN), ["temperature", "above 0", "NaN"]),
        (contrastive(|c| c.temperature = f64::INFINITY), ["temperature", "finite", "inf"]),
        (contrastive(|c| c.eps = -1.0), ["eps", "above 0", "-1"]),
        (contrastive(|c| c.eps = f64::INFINITY), ["eps", "finite", "inf"]),
        (contrastive(|c| c.block_bytes = 0), ["block_bytes", "at least 1", "got 0"]),
        (lambda(-0.5), ["lambda", "0, or a finite value", "-5e-1"]),
        (lambda(f64::NAN), ["lambda", "finite", "NaN"]),
        (lambda(1e300), ["lambda", "3.4e38", "1e300"]),
        (cosine(-1.0), ["eps", "0, or a finite value", "-1"]),
        (normalized(f64::NAN), ["eps", "finite", "NaN"]),
        (huber(0.0), ["beta", "above 0", "got 0"]),
        (huber(1e-46), ["beta", "1.2e-38", "1e-46"]),
        (most(0, Objective::Mse), ["max_tokens", "at least 1", "got 0"]),
        (most(1, Objective::default()), ["max_tokens", "at least 2", "got 1"]),
    ] {
        let built = SerLoss::new(config);
        assert!(matches!(built, Err(Error::Config { .. })));
        assert_says(built, &parts);
    }
    for good in [most(1, Objective::Mse), most(2, Objective::default()), lambda(0.0), cosine(0.0)] {
        assert!(SerLoss::new(good).is_ok(), "{good:?}");
    }
}

#[test]
fn maps_that_do_not_fit_are_named() -> Done {
    let relative = turns();
    let (map1, map2) = maps(19, 3, &relative);
    let (wide, _) = maps_of(19, 3, &relative, CHANNELS + 1, DType::F64);
    let (two1, two2) = (map1.narrow(0, 0, 2)?, map2.narrow(0, 0, 2)?);
    let ser = build(SerConfig::default());
    let as_ints = |x: &Tensor| x.to_dtype(DType::U32);
    for (a, b, parts) in [
        (map1.as_tensor().clone(), map2.narrow(1, 0, 8)?, &["(B, 9, C)", "[3, 8, 5]"][..]),
        (map1.as_tensor().clone(), wide.as_tensor().clone(), &["one shape", "5]", "6]"]),
        (map1.as_tensor().clone(), two2.clone(), &["one batch", "3 images", "got 2"]),
        (two1, two2, &["relative element", "2 images", "got 3"]),
        (map1.as_tensor().clone(), map2.to_dtype(DType::F32)?, &["one type", "f64", "f32"]),
        (map1.i(0)?, map2.as_tensor().clone(), &["rank 3 or a map of rank 4", "[9, 5]"]),
        (as_ints(&map1)?, as_ints(&map2)?, &["f16, bf16, f32 or f64", "u32"]),
        (map1.narrow(0, 0, 0)?, map2.narrow(0, 0, 0)?, &["at least one sample", "[0, 9, 5]"]),
    ] {
        assert_says(forward(&ser, &a, &b, &relative), parts);
    }

    let one = Relative::new(vec![Element::from(D4::HFLIP)], grid(3, 3), grid(3, 3))?;
    let (a, b) = (map1.narrow(0, 0, 1)?, map2.narrow(0, 0, 1)?);
    assert_says(forward(&ser, &a, &b, &one), &["at least two images", "short last batch", "got 1"]);
    let keep = Objective::NtXent(Contrastive { same_image: SameImage::Keep, ..Default::default() });
    for objective in [keep, Objective::Mse] {
        let ser = build(with_objective(objective));
        assert!(forward(&ser, &a, &b, &one).is_ok());
    }
    Ok(())
}

#[test]
fn parts_that_do_not_fit_are_named() -> Done {
    let relative = turns();
    let (map1, map2) = maps(21, 3, &relative);
    let maps_ = [map1.as_tensor(), map2.as_tensor()];
    let pair = MapPair::new(maps_, &relative);
    let wider = ProjectorConfig { out: 5, ..small_head() };
    let trivial = FieldType::trivial;
    let (head, _) = seeded_head(trivial(CHANNELS), small_head(), DType::F64, 1);
    let (other, _) = seeded_head(trivial(CHANNELS), wider, DType::F64, 1);
    let (narrow, _) = seeded_head(trivial(4), small_head(), DType::F64, 1);
    let (single, _) = seeded_head(trivial(CHANNELS), small_head(), DType::F32, 1);
    let (field, wrong) = (trivial(CHANNELS), trivial(4));
    let double = [map1.to_dtype(DType::F32)?, map2.to_dtype(DType::F32)?];
    let few = [map1.narrow(0, 0, 2)?, map2.narrow(0, 0, 2)?];
    let small = [map1.narrow(1, 0, 8)?, map2.narrow(1, 0, 8)?];
    let thin = [map1.narrow(2, 0, 4)?, map2.narrow(2, 0, 4)?];
    for (what, pair, parts) in [
        (
            "a head for the keys only",
            pair.keys(maps_, &head),
            &["SerLoss", "both encoders", "for the keys only"][..],
        ),
        (
            "no head for the keys",
            pair.head(&head).keys(maps_, None),
            &["SerLoss", "both encoders", "none for the keys"],
        ),
        (
            "a key head of another width",
            pair.head(&head).keys(maps_, &other),
            &["key head", "4 output channels", "(Trivial, 5)"],
        ),
        (
            "a key head of other channels",
            pair.head(&head).keys(maps_, &narrow),
            &["Projector", "(…, 4)", "[3, 9, 5]"],
        ),
        (
            "a field beside a head",
            pair.head(&head).field(&field),
            &["field only where there is no head", "got both"],
        ),
        (
            "a head of other channels",
            pair.head(&narrow),
            &["maps of 4 channels, as the head", "got 5"],
        ),
        (
            "a field of other channels",
            pair.field(&wrong),
            &["maps of 4 channels, as the field", "got 5"],
        ),
        ("a head of another type", pair.head(&single), &["Projector", "f32", "f64"]),
        ("keys of another type", pair.keys(double.each_ref(), None), &["one type", "f64", "f32"]),
        (
            "keys of another batch",
            pair.keys(few.each_ref(), None),
            &["one batch", "3 images", "got 2"],
        ),
        ("keys of another grid", pair.keys(small.each_ref(), None), &["(B, 9, C)", "[3, 8, 5]"]),
        (
            "keys of other channels",
            pair.keys(thin.each_ref(), None),
            &["one shape", "[27, 5]", "[27, 4]"],
        ),
    ] {
        for objective in objectives(0.3, 1e-6) {
            let result = build(with_objective(objective)).forward(&pair);
            let Err(e) = &result else { panic!("{what} is accepted, {objective:?}") };
            // The message of a head comes in candle's error.
            assert!(matches!(e, Error::Input { .. } | Error::Candle(_)), "{what}");
            assert_says(result, parts);
        }
    }
    let [head, key_head] = [&head, &head.clone()];
    build(SerConfig::default()).forward(&pair.head(head).keys(maps_, key_head))?;
    build(SerConfig::default()).forward(&pair.field(&field))?;
    Ok(())
}

#[test]
fn elements_that_do_not_fit_are_named() -> Done {
    let mixed = FieldType::trivial(2).and(FieldType::regular(Subgroup::C4, 8)?);
    let ser = build(with_objective(Objective::Mse));
    let side = grid(2, 2);
    let map = tokens(&mut common::rng(1), (2, 4, 10), DType::F64)?;
    let turn = Element::from(Affine::rotation(30.0)?);
    let quarter = Element::from(D4::ROT90);
    for (elements, parts) in [
        (vec![quarter, D4::HFLIP.into()], &["an element of C4"][..]),
        (vec![quarter, turn], &["quarter turn or a flip", "sample 1"]),
        (vec![quarter; 3], &["one for each of 2 images", "got 3"]),
        (vec![quarter; 4], &["one for each of 2 images", "got 4"]),
    ] {
        let relative = Relative::new(elements, side, side)?;
        let pair = MapPair::new([&map, &map], &relative).field(&mixed);
        assert_says(ser.forward(&pair), parts);
    }
    for good in [vec![quarter], vec![quarter; 2]] {
        let relative = Relative::new(good, side, side)?;
        ser.forward(&MapPair::new([&map, &map], &relative).field(&mixed))?;
    }
    Ok(())
}

#[test]
fn weights_that_do_not_fit_are_named() -> Done {
    let relative = crops();
    let (map1, map2) = maps(12, 3, &relative);
    let pair = MapPair::new([&map1, &map2], &relative);
    let samples = |w| Weights { samples: Some(w), ..Default::default() };
    let on = |view: usize, w| {
        let mut tokens = [None; 2];
        tokens[view] = Some(w);
        Weights { tokens, ..Default::default() }
    };
    let short = [1f32; 35];
    let mut negative = [1f32; 36];
    negative[7] = -2.0;
    for (weights, parts) in [
        (samples(&[1.0, 1.0]), &["one weight per sample, 3", "got 2"][..]),
        (samples(&[1.0, -1.0, 1.0]), &["at least 0", "-1"]),
        (samples(&[1.0, f32::NAN, 1.0]), &["finite", "NaN"]),
        (samples(&[1.0, f32::INFINITY, 1.0]), &["finite", "inf"]),
        (on(0, &short[..]), &["token of the first view, 36", "got 35"]),
        (on(1, &short[..]), &["token of the second view, 36", "got 35"]),
        (on(1, &negative[..]), &["at least 0", "-2"]),
    ] {
        for objective in [Objective::Mse, Objective::default()] {
            let ser = build(with_objective(objective));
            assert_says(ser.forward(&pair.weights(&weights)), parts);
        }
    }
    Ok(())
}

#[test]
fn a_batch_in_which_no_token_counts_is_an_error_of_its_own() -> Done {
    let zeros = [0f32; 36];
    let samples = Weights { samples: Some(&zeros[..3]), ..Default::default() };
    let both = Weights { tokens: [Some(&zeros), Some(&zeros)], ..Default::default() };
    let second = Weights { tokens: [None, Some(&zeros)], ..Default::default() };
    let relative = crops();
    let (map1, map2) = maps(12, 3, &relative);
    let apart = no_overlap();
    let (far1, far2) = maps(12, 3, &apart);
    for objective in objectives(0.3, 1e-6) {
        for (symmetric, pair) in [
            (true, MapPair::new([&far1, &far2], &apart)),
            (true, MapPair::new([&map1, &map2], &relative).weights(&samples)),
            (true, MapPair::new([&map1, &map2], &relative).weights(&both)),
            (false, MapPair::new([&map1, &map2], &relative).weights(&second)),
        ] {
            let ser = build(SerConfig { symmetric, ..with_objective(objective) });
            let result = ser.forward(&pair);
            assert!(matches!(result, Err(Error::NoOverlap { images: 3 })));
            assert_says(result, &["no overlap in any of 3", "min_overlap"]);
        }
    }
    Ok(())
}
