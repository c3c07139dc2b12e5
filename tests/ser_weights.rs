//! Weights of samples and tokens, and tokens that do not count.

mod loss_common;
mod ser_common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use loss_common::{assert_close, assert_finite, flat, rng, scalar, tokens};
use rand::Rng;
use ser_common::*;
use ser_reg::group::{Affine, D4, Element, FieldType, Window};
use ser_reg::loss::{Contrastive, Negatives, SameImage};
use ser_reg::ser::{Objective, Weights};
use ser_reg::view::Relative;
use ser_reg::{GridOperator, GroupAction, MapPair, Projector, Resample, SerConfig, loss};

type Done = ser_reg::Result<()>;

/// Crops that overlap in part, more and less, on grids of their own.
fn partial() -> Relative<Element> {
    let window = |y, x| Element::from(Window::new(y, x, 0.5, 0.5).unwrap());
    let mut elements = crops().elements().to_vec();
    elements[1] = Element::relative(&window(0.1, 0.3), &window(0.1, 0.2));
    Relative::new(elements, grid(4, 3), grid(3, 4)).unwrap()
}

fn drawn(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rng(seed);
    (0..n).map(|_| rng.random_range(0.1..2.0)).collect()
}

fn samples(weights: &[f32]) -> Weights<'_> {
    Weights { samples: Some(weights), ..Default::default() }
}

#[test]
fn weights_weigh_the_anchors_of_their_own_view() -> Done {
    let relative = turns();
    let (map1, map2) = maps(1, 3, &relative);
    let (w1, w2, of_samples) = (drawn(27, 2), drawn(27, 3), [0.5, 2.0, 1.0]);
    let weights = Weights { samples: Some(&of_samples), tokens: [Some(&w1), Some(&w2)] };
    let product = |w: &[f32]| -> Vec<f32> {
        let all = w.iter().enumerate();
        all.map(|(i, w)| w * of_samples[i / 9]).collect()
    };
    let ser = build(with_objective(Objective::Mse));
    let pair = MapPair::new([&map1, &map2], &relative).weights(&weights);
    let out = ser.forward(&pair)?;
    let (there, back) =
        (relative.to_second(&Resample::default())?, relative.to_first(&Resample::default())?);
    let second = loss::mse(&map2, &there.apply(&map1)?, Some(&product(&w2)))?;
    let first = loss::mse(&map1, &back.apply(&map2)?, Some(&product(&w1)))?;
    assert_close(&[scalar(&out.loss)], &[(scalar(&first) + scalar(&second)) / 2.0], 1e-7);
    assert_eq!(out.anchors, 54);

    // The same against keys: the weights are those of the anchors.
    let keyed = ser.forward(&pair.keys([&map1, &map2], None))?;
    assert_eq!(scalar(&keyed.loss), scalar(&out.loss));

    // Weights of 1 change nothing, to the bit; neither does their scale.
    for objective in objectives(0.3, 1e-6) {
        for relative in [turns(), partial()] {
            let (map1, map2) = maps(1, 3, &relative);
            let ser = build(with_objective(objective));
            let without = forward(&ser, &map1, &map2, &relative)?;
            for value in [1.0, 7.0] {
                let all = [value; 3];
                let pair = MapPair::new([&map1, &map2], &relative).weights(&samples(&all));
                let out = ser.forward(&pair)?;
                assert_eq!(scalar(&out.loss), scalar(&without.loss), "{objective:?}");
                assert_eq!(out.anchors, without.anchors);
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_of_weight_zero_is_dropped() -> Done {
    let all = partial();
    let (map1, map2) = maps(4, 3, &all);
    let kept = Tensor::new(&[0u32, 2], &Device::Cpu)?;
    let elements = vec![all.elements()[0], all.elements()[2]];
    let two = Relative::new(elements, all.from_grid(), all.to_grid())?;
    let weights = samples(&[1.0, 0.0, 1.0]);
    let pair = MapPair::new([&map1, &map2], &all);
    for objective in objectives(0.3, 1e-6) {
        let ser = build(with_objective(objective));
        let with = ser.forward(&pair.weights(&weights))?;
        let (a, b) = (map1.index_select(&kept, 0)?, map2.index_select(&kept, 0)?);
        let without = forward(&ser, &a, &b, &two)?;
        assert_eq!(with.anchors, without.anchors);
        assert_close(&[scalar(&with.loss)], &[scalar(&without.loss)], 1e-14);
        let grads = with.loss.backward()?;
        for map in [&map1, &map2] {
            let grad = flat(&grads.get(map).expect("a gradient").get(1)?);
            assert!(grad.iter().all(|g| *g == 0.0), "{objective:?}");
        }
        // A cap on anchors is not spent on them.
        let capped =
            build(SerConfig { max_tokens: Some(4), symmetric: false, ..with_objective(objective) });
        assert_eq!(capped.forward(&pair.weights(&weights))?.anchors, 4);
    }
    // One direction without weight: the mean is over the other.
    let ser = build(with_objective(Objective::Mse));
    let nothing = [0f32; 36];
    let first = Weights { tokens: [None, Some(&nothing)], ..Default::default() };
    let out = ser.forward(&pair.weights(&first))?;
    let back = all.to_first(&Resample::default())?;
    let mask = back.mask(DType::F32, &Device::Cpu)?;
    let mask = mask.expect("crops have masks").flatten_all()?;
    let mask = mask.to_vec1::<f32>()?;
    let expected = loss::mse(&map1, &back.apply(&map2)?, Some(&mask))?;
    assert_close(&[scalar(&out.loss)], &[scalar(&expected)], 1e-14);
    Ok(())
}

#[test]
fn one_element_for_all_images_is_that_element_for_each() -> Done {
    let g = crops().elements()[0];
    let one = Relative::new(vec![g], grid(4, 3), grid(3, 4))?;
    let three = Relative::new(vec![g; 3], grid(4, 3), grid(3, 4))?;
    let (map1, map2) = maps(8, 3, &one);
    let (w1, w2) = (drawn(36, 10), drawn(36, 11));
    let weights = Weights { samples: Some(&[0.5, 1.0, 2.0]), tokens: [Some(&w1), Some(&w2)] };
    for objective in objectives(0.3, 1e-6) {
        let ser = build(with_objective(objective));
        let [a, b] = [&one, &three].map(|relative| {
            let pair = MapPair::new([&map1, &map2], relative).weights(&weights);
            ser.forward(&pair).unwrap()
        });
        assert_eq!(scalar(&a.loss), scalar(&b.loss));
        assert_eq!(a.anchors, b.anchors);
    }
    Ok(())
}

#[test]
fn gradients_match_differences_under_weights() -> Done {
    let relative = partial();
    let (map1, map2) = maps(9, 3, &relative);
    let (w1, w2) = (drawn(36, 10), drawn(36, 11));
    let weights = Weights { samples: Some(&[0.5, 1.0, 2.0]), tokens: [Some(&w1), Some(&w2)] };
    for objective in objectives(0.3, 1e-6) {
        let ser = build(with_objective(objective));
        let pair = MapPair::new([&map1, &map2], &relative).weights(&weights);
        assert_gradients(&[map1.clone(), map2.clone()], || ser.forward(&pair).unwrap().loss);
    }
    Ok(())
}

#[test]
fn one_image_left_is_no_error_and_costs_nothing() -> Done {
    let contrast = |negatives, same_image| {
        Objective::NtXent(Contrastive { negatives, same_image, ..Default::default() })
    };
    let quarter = Element::from(D4::ROT90);
    let relative = Relative::new(vec![quarter], grid(3, 3), grid(3, 3))?;
    let away = Element::from(Affine::translation(3.0, 0.0)?);
    let masked = Relative::new(vec![quarter, away], grid(3, 3), grid(3, 3))?;
    let (map1, map2) = maps(13, 2, &relative);
    let weights = samples(&[1.0, 0.0]);
    let by_weights = MapPair::new([&map1, &map2], &relative).weights(&weights);
    let by_masks = MapPair::new([&map1, &map2], &masked);
    for pair in [by_weights, by_masks] {
        for negatives in [Negatives::BothViews, Negatives::OtherView] {
            let ser = build(with_objective(contrast(negatives, SameImage::Exclude)));
            let out = ser.forward(&pair)?;
            assert_eq!((scalar(&out.loss), out.anchors), (0.0, 18));
        }
        // Objectives without negatives, or with those of the same image, go on.
        for objective in [contrast(Negatives::BothViews, SameImage::Keep), Objective::Mse] {
            let out = build(with_objective(objective)).forward(&pair)?;
            assert!(scalar(&out.loss) > 0.0);
        }
    }
    Ok(())
}

/// Two maps in which some tokens do not count, and the same with other values there.
struct Dropped {
    relative: Relative<Element>,
    /// The tokens (image, cell) of the first and of the second map that do not count.
    holes: [Vec<(usize, usize)>; 2],
    tokens: Option<[Vec<f32>; 2]>,
    samples: Option<Vec<f32>>,
}

impl Dropped {
    /// Token 0 of image 0 has weight 0 in both views, and so have its partners.
    fn by_token_weights(g: D4) -> Self {
        let side = grid(3, 3);
        let relative = Relative::new(vec![Element::from(g)], side, side).unwrap();
        // Where token 0 of one view comes to lie in the other.
        let lands = |operator: GridOperator| {
            let index = Tensor::arange(0f64, 9.0, &Device::Cpu).unwrap();
            let moved = operator.apply(&index.reshape((1, 9, 1)).unwrap());
            let moved = flat(&moved.unwrap());
            moved.iter().position(|&token| token == 0.0).unwrap()
        };
        let partner = lands(relative.to_second(&Resample::default()).unwrap());
        let back = lands(relative.to_first(&Resample::default()).unwrap());
        let holes = [vec![(0, 0), (0, back)], vec![(0, 0), (0, partner)]];
        let weights = holes.each_ref().map(|holes| {
            let mut weights = vec![1f32; 27];
            holes.iter().for_each(|&(b, c)| weights[9 * b + c] = 0.0);
            weights
        });
        Self { relative, holes, tokens: Some(weights), samples: None }
    }

    /// The second view is the right half of the first; one image shares nothing.
    fn by_crop() -> Self {
        let half = Element::from(Window::new(0.0, 0.5, 1.0, 0.5).unwrap());
        let away = Element::from(Affine::translation(3.0, 0.0).unwrap());
        let (from, to) = (grid(2, 4), grid(2, 2));
        let relative = Relative::new(vec![half, away, half], from, to).unwrap();
        let left = |b| [0, 1, 4, 5].map(|c| (b, c));
        let mut first: Vec<_> = [left(0), left(2)].concat();
        first.extend((0..8).map(|c| (1, c)));
        let second = (0..4).map(|c| (1, c)).collect();
        Self { relative, holes: [first, second], tokens: None, samples: None }
    }

    fn by_sample_weight() -> Self {
        let whole = (0..9).map(|c| (1, c));
        Self {
            relative: turns(),
            holes: [whole.clone().collect(), whole.collect()],
            tokens: None,
            samples: Some(vec![1.0, 0.0, 2.0]),
        }
    }

    /// Seeded maps with `value` in the tokens that do not count.
    fn maps(&self, seed: u64, value: f64) -> [Var; 2] {
        let (map1, map2) = maps(seed, 3, &self.relative);
        let fill = |map: Var, holes: &[(usize, usize)]| {
            let (_, n, channels) = map.dims3().unwrap();
            let mut values = flat(&map);
            for &(image, cell) in holes {
                let at = (image * n + cell) * channels;
                values[at..at + channels].fill(value);
            }
            let filled = Tensor::from_vec(values, map.shape(), &Device::Cpu).unwrap();
            Var::from_tensor(&filled).unwrap()
        };
        [fill(map1, &self.holes[0]), fill(map2, &self.holes[1])]
    }
}

/// The loss, and the gradients at the maps and at the variables of the head.
fn evaluate(
    case: &Dropped,
    objective: Objective,
    value: f64,
    keyed: bool,
    head: Option<&(Projector, VarMap)>,
) -> ser_reg::Result<(Tensor, Vec<Tensor>)> {
    let maps = case.maps(21, value);
    let keys = case.maps(22, value);
    let of_tokens = case.tokens.as_ref();
    let weights = Weights {
        samples: case.samples.as_deref(),
        tokens: [0, 1].map(|view| of_tokens.map(|w| &w[view][..])),
    };
    let [map1, map2] = &maps;
    let projector = head.map(|(head, _)| head);
    let pair = MapPair::new([map1, map2], &case.relative).head(projector);
    let mut pair = pair.weights(&weights);
    if keyed {
        let [key1, key2] = &keys;
        pair = pair.keys([key1, key2], projector);
    }
    let out = build(with_objective(objective)).forward(&pair)?;
    let grads = out.loss.backward()?;
    let mut vars = maps.to_vec();
    vars.extend(head.into_iter().flat_map(|(_, vars)| {
        let named = ser_reg::grad::named(vars, "");
        named.into_iter().map(|(_, var)| var)
    }));
    let grads = vars.iter().map(|v| grads.get(v).expect("reached").clone());
    Ok((out.loss, grads.collect()))
}

#[test]
fn what_does_not_count_may_be_anything() -> Done {
    let field = FieldType::trivial(CHANNELS);
    let head = seeded_head(field, small_head(), DType::F64, 5);
    let cases = [
        Dropped::by_token_weights(D4::IDENTITY),
        Dropped::by_token_weights(D4::ROT90),
        Dropped::by_token_weights(D4::HFLIP),
        Dropped::by_crop(),
        Dropped::by_sample_weight(),
    ];
    for (at, case) in cases.iter().enumerate() {
        for objective in objectives(0.3, 1e-6) {
            for keyed in [false, true] {
                for head in [None, Some(&head)] {
                    let what = format!("case {at}, {objective:?}, keys {keyed}");
                    let (loss, grads) = evaluate(case, objective, 0.7, keyed, head)?;
                    assert_finite(&loss);
                    for value in [f64::NAN, f64::INFINITY, 1e200] {
                        let (dirty, others) = evaluate(case, objective, value, keyed, head)?;
                        assert_eq!(scalar(&dirty), scalar(&loss), "{what}, {value}");
                        for (grad, other) in grads.iter().zip(&others) {
                            assert_finite(other);
                            assert_eq!(flat(other), flat(grad), "{what}, {value}");
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// A NaN that counts is never hidden.
#[test]
fn a_nan_that_counts_shows_in_the_loss() -> Done {
    let relative = turns();
    let (clean1, clean2) = maps(23, 3, &relative);
    let mut values = flat(&clean1);
    values[40] = f64::NAN;
    let dirty = Tensor::from_vec(values, clean1.shape(), &Device::Cpu)?;
    let (head, _) = seeded_head(FieldType::trivial(CHANNELS), small_head(), DType::F64, 5);
    let rng = &mut rng(1);
    let keys = tokens(rng, (3, 9, CHANNELS), DType::F64)?;
    for objective in objectives(0.3, 1e-6) {
        let ser = build(with_objective(objective));
        let pair = MapPair::new([&dirty, &clean2], &relative);
        for pair in [pair, pair.head(&head), pair.keys([&keys, &keys], None)] {
            assert!(scalar(&ser.forward(&pair)?.loss).is_nan(), "{objective:?}");
        }
        let pair = MapPair::new([&keys, &clean2], &relative);
        let keyed = ser.forward(&pair.keys([&dirty, &clean2], None))?;
        assert!(scalar(&keyed.loss).is_nan(), "{objective:?}");
    }
    Ok(())
}
