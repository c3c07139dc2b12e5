//! NT-Xent of both directions in one pass, against two directed passes.

mod common;
mod ser_common;

use candle_core::{DType, Device, Module, Tensor, Var};
use common::{assert_close, flat, scalar};
use ser_common::*;
use ser_reg::fibre::FibreOperator;
use ser_reg::group::{D4, Element, FieldType, Subgroup};
use ser_reg::loss::{Contrastive, Negatives, SameImage, nt_xent_ragged};
use ser_reg::ser::{Objective, StopGradient, Weights};
use ser_reg::view::Relative;
use ser_reg::{GridOperator, GroupAction, MapPair, Projector, Resample, SerConfig};

type Done = ser_reg::Result<()>;

const CONTRASTS: [(Negatives, SameImage); 4] = [
    (Negatives::BothViews, SameImage::Exclude),
    (Negatives::BothViews, SameImage::Keep),
    (Negatives::OtherView, SameImage::Exclude),
    (Negatives::OtherView, SameImage::Keep),
];

/// One direction: the rows of `z` that count, with their keys in the frame of `z`.
fn directed(
    z: &Tensor,
    keys: &Tensor,
    operator: &GridOperator,
    fibre: Option<&FibreOperator>,
    weight: impl Fn(usize, usize) -> f32,
    contrastive: &Contrastive,
) -> ser_reg::Result<(Tensor, Tensor)> {
    let (images, n, _) = z.dims3()?;
    let mut keys = operator.apply(keys)?;
    if let Some(fibre) = fibre {
        keys = fibre.apply(&keys)?;
    }
    let (mut rows, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for image in 0..images {
        for cell in 0..n {
            let seen = operator.valid(image).unwrap().is_none_or(|v| v[cell]);
            let weight = weight(image, image * n + cell);
            if seen && weight > 0.0 {
                rows.push((image * n + cell) as u32);
                ids.push(image as u32);
                weights.push(weight);
            }
        }
    }
    let rows = Tensor::new(rows, &Device::Cpu)?;
    let pick = |x: &Tensor| x.flatten(0, 1)?.contiguous()?.index_select(&rows, 0);
    let out = nt_xent_ragged(&pick(z)?, &pick(&keys)?, &ids, Some(&weights), contrastive)?;
    Ok((out.loss, out.accuracy))
}

/// The loss and the accuracy of `pair` as the mean of two directed passes.
fn oracle(
    maps: [&Tensor; 2],
    keys: Option<[&Tensor; 2]>,
    head: Option<&Projector>,
    field: &FieldType,
    relative: &Relative<Element>,
    weights: &Weights,
    contrastive: &Contrastive,
) -> ser_reg::Result<(Tensor, Tensor)> {
    let project = |x: &Tensor| match head {
        Some(head) => head.forward(x),
        None => Ok(x.clone()),
    };
    let z = [project(maps[0])?, project(maps[1])?];
    let k = match keys {
        Some(keys) => [project(keys[0])?.detach(), project(keys[1])?.detach()],
        None => z.clone(),
    };
    let fibre = match field.is_trivial() {
        true => None,
        false => Some(FibreOperator::new(field, relative.elements())?),
    };
    let back = fibre.as_ref().map(FibreOperator::inverse);
    let resample = Resample::default();
    let weight = |view: usize| {
        move |image: usize, token: usize| {
            weights.samples.map_or(1.0, |w| w[image])
                * weights.tokens[view].map_or(1.0, |w| w[token])
        }
    };
    let there = relative.to_second(&resample)?;
    let second = directed(&z[1], &k[0], &there, fibre.as_ref(), weight(1), contrastive)?;
    let there = relative.to_first(&resample)?;
    let first = directed(&z[0], &k[1], &there, back.as_ref(), weight(0), contrastive)?;
    let mean = |a: Tensor, b: Tensor| (a + b)? / 2.0;
    Ok((mean(first.0, second.0)?, mean(first.1, second.1)?))
}

/// Compares loss, accuracy and gradients at `vars`; gradients relative to the largest one.
#[track_caller]
fn assert_same(
    (loss, accuracy): (&Tensor, &Tensor),
    expected: &(Tensor, Tensor),
    vars: &[Var],
    tol: f64,
) {
    assert_close(
        &[scalar(loss), scalar(accuracy)],
        &[scalar(&expected.0), scalar(&expected.1)],
        tol,
    );
    let (grads, slow) = (loss.backward().unwrap(), expected.0.backward().unwrap());
    for var in vars {
        let grad = flat(grads.get(var).expect("every variable is reached"));
        let slow = flat(slow.get(var).expect("every variable is reached"));
        let largest = slow.iter().fold(0f64, |a, b| a.max(b.abs()));
        assert!(largest > 0.0);
        for (i, (a, b)) in grad.iter().zip(&slow).enumerate() {
            assert!(
                (a - b).abs() <= tol * largest,
                "element {i}: {a}, expected {b}, largest {largest}"
            );
        }
    }
}

fn relative(elements: &[D4], from: (usize, usize)) -> Relative<Element> {
    let from = grid(from.0, from.1);
    let to = elements[0].out_grid(from).unwrap();
    let elements = elements.iter().map(|&g| Element::from(g)).collect();
    Relative::new(elements, from, to).unwrap()
}

/// Turns and flips: one element for all, one per image, square and oblong grids.
fn permutations() -> Vec<Relative<Element>> {
    vec![
        relative(&[D4::ROT90], (4, 4)),
        relative(&[D4::ROT90, D4::HFLIP, D4::IDENTITY, D4::TRANSPOSE], (3, 3)),
        relative(&[D4::HFLIP, D4::ROT180, D4::VFLIP, D4::IDENTITY], (2, 5)),
        relative(&[D4::ROT90, D4::ROT270, D4::TRANSPOSE, D4::ANTI_TRANSPOSE], (2, 5)),
    ]
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-12 } else { 1e-6 }
}

fn unweighted() -> Weights<'static> {
    Weights::default()
}

#[test]
fn one_pass_over_both_directions_is_the_mean_of_two_directed_passes() -> Done {
    // The largest weight is 1 and all are powers of two, so that their scale does not round.
    let samples = [0.5f32, 1.0, 0.0, 0.25];
    let weighted = Weights { samples: Some(&samples), ..Default::default() };
    for relative in permutations() {
        for (negatives, same_image) in CONTRASTS {
            for dtype in [DType::F64, DType::F32] {
                for weights in [unweighted(), weighted] {
                    let contrastive = Contrastive {
                        temperature: 0.2,
                        negatives,
                        same_image,
                        ..Default::default()
                    };
                    let (map1, map2) = maps_of(31, 4, &relative, CHANNELS, dtype);
                    let field = FieldType::trivial(CHANNELS);
                    let (head, vars) = seeded_head(field.clone(), small_head(), dtype, 2);
                    let maps = [map1.as_tensor(), map2.as_tensor()];
                    let expected = oracle(
                        maps,
                        None,
                        Some(&head),
                        head.output_field(),
                        &relative,
                        &weights,
                        &contrastive,
                    )?;
                    let ser = build(with_objective(Objective::NtXent(contrastive)));
                    let pair = MapPair::new(maps, &relative).head(&head).weights(&weights);
                    let out = ser.forward(&pair)?;
                    let images = weights.samples.map_or(4, |_| 3);
                    assert_eq!(out.anchors, 2 * images * relative.from_grid().len());
                    let mut all = vars.all_vars();
                    all.extend([map1.clone(), map2.clone()]);
                    let got = (&out.loss, &out.accuracy.expect("NT-Xent"));
                    assert_same(got, &expected, &all, tolerance(dtype));
                }
            }
        }
    }
    Ok(())
}

/// Each image permutes its channels by its own element, so the cosines of two images differ between
/// the frames. One pass would not be the mean of both directions.
#[test]
fn channels_of_a_field_turn_in_both_directions() -> Done {
    let regular = FieldType::regular(Subgroup::D4, 16)?;
    let mixed = FieldType::trivial(2).and(FieldType::regular(Subgroup::D4, 8)?);
    let contrastive = Contrastive { temperature: 0.2, ..Default::default() };
    let ser = build(with_objective(Objective::NtXent(contrastive)));
    for relative in permutations() {
        for dtype in [DType::F64, DType::F32] {
            let (map1, map2) = maps_of(32, 4, &relative, 16, dtype);
            let maps = [map1.as_tensor(), map2.as_tensor()];
            let (head, vars) = seeded_head(regular.clone(), small_head(), dtype, 2);
            let out = ser.forward(&MapPair::new(maps, &relative).head(&head))?;
            let field = head.output_field();
            let none = unweighted();
            let expected = oracle(maps, None, Some(&head), field, &relative, &none, &contrastive)?;
            let mut all = vars.all_vars();
            all.extend([map1.clone(), map2.clone()]);
            let got = (&out.loss, &out.accuracy.expect("NT-Xent"));
            // The norm over two channels has a steep derivative, which rounding of f32 shows.
            let tol = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
            assert_same(got, &expected, &all, tol);

            let (map1, map2) = maps_of(33, 4, &relative, 10, dtype);
            let maps = [map1.as_tensor(), map2.as_tensor()];
            let out = ser.forward(&MapPair::new(maps, &relative).field(&mixed))?;
            let expected = oracle(maps, None, None, &mixed, &relative, &none, &contrastive)?;
            let got = (&out.loss, &out.accuracy.expect("NT-Xent"));
            assert_same(got, &expected, &[map1, map2], tolerance(dtype));
        }
    }
    Ok(())
}

/// Where the two frames hold different pairs of tokens, each direction is a pass of its own.
#[test]
fn other_pairs_take_two_directed_passes() -> Done {
    let contrastive = Contrastive { temperature: 0.2, ..Default::default() };
    let ser = build(with_objective(Objective::NtXent(contrastive)));
    let field = FieldType::trivial(CHANNELS);
    let tokens: Vec<f32> = (0..81).map(|i| [1.0, 0.5, 0.0, 0.25][i % 4]).collect();
    for relative in [turns(), scales(), crops()] {
        let (map1, map2) = maps(34, 3, &relative);
        let (key1, key2) = maps(35, 3, &relative);
        let pair = [map1.as_tensor(), map2.as_tensor()];
        let keys = [key1.as_tensor(), key2.as_tensor()];
        let cells = [relative.from_grid().len(), relative.to_grid().len()];
        let both = Weights {
            samples: Some(&[0.5, 1.0, 1.0]),
            tokens: cells.map(|n| Some(&tokens[..3 * n])),
        };
        let first = Weights { tokens: [Some(&tokens[..3 * cells[0]]), None], ..Default::default() };
        for (keys, weights) in [
            (None, unweighted()),
            (None, both),
            (None, first),
            (Some(keys), unweighted()),
            (Some(keys), both),
        ] {
            let expected = oracle(pair, keys, None, &field, &relative, &weights, &contrastive)?;
            let mut input = MapPair::new(pair, &relative).weights(&weights);
            if let Some(keys) = keys {
                input = input.keys(keys, None);
            }
            let out = ser.forward(&input)?;
            let got = (&out.loss, &out.accuracy.expect("NT-Xent"));
            assert_same(got, &expected, &[map1.clone(), map2.clone()], 1e-12);
        }
    }
    // With fixed keys the gradient is that of the anchors alone.
    let relative = turns();
    let (map1, map2) = maps(36, 3, &relative);
    let pair = [map1.as_tensor(), map2.as_tensor()];
    let stopped = build(SerConfig { stop_gradient: StopGradient::Keys, ..*ser.config() });
    let out = stopped.forward(&MapPair::new(pair, &relative))?;
    let none = unweighted();
    let expected = oracle(pair, Some(pair), None, &field, &relative, &none, &contrastive)?;
    let got = (&out.loss, &out.accuracy.expect("NT-Xent"));
    assert_same(got, &expected, &[map1.clone(), map2.clone()], 1e-12);

    // A cap draws the anchors of each direction apart; without effect it changes nothing.
    let capped = |max_tokens| build(SerConfig { max_tokens, ..*ser.config() });
    let loose = capped(Some(27)).forward(&MapPair::new(pair, &relative))?;
    let whole = ser.forward(&MapPair::new(pair, &relative))?;
    assert_close(&[scalar(&loose.loss)], &[scalar(&whole.loss)], 1e-12);
    assert_eq!(loose.anchors, whole.anchors);
    let tight = capped(Some(9)).forward(&MapPair::new(pair, &relative))?;
    assert_eq!(tight.anchors, 2 * 9);
    Ok(())
}

#[test]
fn half_precision_maps_take_the_same_pass() -> Done {
    let contrastive = Contrastive::default();
    let ser = build(with_objective(Objective::NtXent(contrastive)));
    let field = FieldType::trivial(CHANNELS);
    for relative in permutations() {
        for dtype in [DType::F16, DType::BF16] {
            let (map1, map2) = maps_of(37, 4, &relative, CHANNELS, dtype);
            let maps = [map1.as_tensor(), map2.as_tensor()];
            let out = ser.forward(&MapPair::new(maps, &relative))?;
            let none = unweighted();
            let expected = oracle(maps, None, None, &field, &relative, &none, &contrastive)?;
            assert_eq!((out.loss.dtype(), expected.0.dtype()), (DType::F32, DType::F32));
            assert_close(&[scalar(&out.loss)], &[scalar(&expected.0)], 1e-6);
            let accuracy = out.accuracy.expect("NT-Xent");
            assert_close(&[scalar(&accuracy)], &[scalar(&expected.1)], 1e-6);
            let grads = out.loss.backward()?;
            let slow = expected.0.backward()?;
            // Two directed passes round twice to the type of the maps.
            let tol = if dtype == DType::F16 { 4e-3 } else { 3e-2 };
            for map in [&map1, &map2] {
                let (got, want) = (grads.get(map).unwrap(), slow.get(map).unwrap());
                assert_eq!(got.dtype(), dtype);
                let largest = flat(want).iter().fold(0f64, |a, b| a.max(b.abs()));
                for (a, b) in flat(got).iter().zip(flat(want)) {
                    assert!((a - b).abs() <= tol * largest, "{a}, expected {b}");
                }
            }
        }
    }
    Ok(())
}
