//! `SerLoss` on maps whose channels turn with the grid: a group convolution made by hand, and
//! gradients.

mod common;
mod ser_common;

use candle_core::{DType, Module, Tensor};
use common::{assert_close, rng, scalar, tokens};
use ser_common::*;
use ser_reg::fibre::FibreOperator;
use ser_reg::group::{D4, Element, FieldType, Scale, Subgroup, Window};
use ser_reg::loss::{Contrastive, Negatives, nt_xent_ragged};
use ser_reg::ser::Objective;
use ser_reg::view::{Pairing, Relative, ViewConfig, ViewSampler};
use ser_reg::{
    GridOperator, GroupAction, MapPair, ProjectorConfig, Resample, SerConfig, SerLoss, SerOutput,
    TokenGrid,
};

type Done = ser_reg::Result<()>;

const GROUPS: [Subgroup; 3] = [Subgroup::C2, Subgroup::C4, Subgroup::D4];

/// The loss of two maps whose channels transform as `field`, without a head.
fn on_field(
    ser: &SerLoss,
    maps: [&Tensor; 2],
    field: &FieldType,
    relative: &Relative<Element>,
) -> ser_reg::Result<SerOutput> {
    ser.forward(&MapPair::new(maps, relative).field(field))
}

/// A lifting convolution: `blocks` kernels, each acted on by every element of the group; `(B, C, S,
/// S)` to `(B, blocks·order, S, S)`, the elements varying fastest.
struct Lifting {
    kernel: Tensor,
}

impl Lifting {
    fn new(group: Subgroup, blocks: usize, channels: usize, seed: u64) -> ser_reg::Result<Self> {
        let kernel = tokens(&mut rng(seed), (blocks, channels, 3, 3), DType::F64)?;
        let side = TokenGrid::square(3)?;
        let acted = group
            .elements()
            .iter()
            .map(|h| GridOperator::new(&[*h], side, &Resample::default())?.apply(&kernel));
        let acted: ser_reg::Result<Vec<Tensor>> = acted.collect();
        let kernel = Tensor::stack(&acted?, 1)?.flatten(0, 1)?;
        Ok(Self { kernel })
    }

    fn forward(&self, x: &Tensor) -> ser_reg::Result<Tensor> {
        Ok(x.conv2d(&self.kernel, 1, 1, 1, 1)?.tanh()?)
    }
}

fn images(batch: usize, side: usize, seed: u64) -> ser_reg::Result<Tensor> {
    let x = tokens(&mut rng(seed), (batch, 2, side, side), DType::F64)?;
    Ok(x.as_tensor().detach())
}

/// Both views of the images, and what relates them.
fn views(
    group: Subgroup,
    x: &Tensor,
    seed: u64,
) -> ser_reg::Result<(Tensor, Tensor, Relative<Element>)> {
    let config = ViewConfig { pairing: Pairing::Independent(group), ..Default::default() };
    let sampler = ViewSampler::new(TokenGrid::square(x.dims()[2])?, config)?;
    let pair = sampler.sample_pair(&mut rng(seed), x.dims()[0])?;
    Ok((pair.first.apply(x)?, pair.second.apply(x)?, pair.relative()))
}

#[test]
fn a_group_convolution_has_no_loss_under_its_regular_representation() -> Done {
    for group in GROUPS {
        let layer = Lifting::new(group, 3, 2, 1)?;
        let (x1, x2, relative) = views(group, &images(8, 6, 2)?, 3)?;
        let (map1, map2) = (layer.forward(&x1)?, layer.forward(&x2)?);
        let channels = 3 * group.order();
        let regular = FieldType::regular(group, channels)?;
        for objective in [Objective::Mse, Objective::L1, Objective::Cosine { eps: 0.0 }] {
            let ser = build(with_objective(objective));
            let loss = |field: &FieldType| -> ser_reg::Result<f64> {
                Ok(scalar(&on_field(&ser, [&map1, &map2], field, &relative)?.loss))
            };
            let trivial = loss(&FieldType::trivial(channels))?;
            let regular = loss(&regular)?;
            println!("{group:?} {objective:?}: regular {regular:e}, trivial {trivial}");
            assert!(regular.abs() < 1e-13, "{group:?} {objective:?}: {regular:e}");
            assert!(trivial > 0.05, "{group:?} {objective:?}: {trivial}");
        }
        // NT-Xent finds every partner.
        let ser = build(with_objective(nt_xent_at(0.05)));
        let out = on_field(&ser, [&map1, &map2], &regular, &relative)?;
        assert_close(&[scalar(&out.accuracy.expect("NT-Xent"))], &[1.0], 1e-12);

        // The mean over the group is a trivial channel beside it.
        let invariant = |map: &Tensor| {
            let mean = map.reshape((8, 3, group.order(), 6, 6))?.mean(2)?;
            Tensor::cat(&[&mean, map], 1)
        };
        let field = FieldType::trivial(3).and(regular);
        let maps = [&invariant(&map1)?, &invariant(&map2)?];
        let ser = build(with_objective(Objective::Mse));
        assert!(scalar(&on_field(&ser, maps, &field, &relative)?.loss) < 1e-26);
    }
    Ok(())
}

#[test]
fn a_layer_without_the_symmetry_has_a_loss_under_both() -> Done {
    let (x1, x2, relative) = views(Subgroup::D4, &images(8, 6, 2)?, 3)?;
    let kernel = tokens(&mut rng(4), (8, 2, 3, 3), DType::F64)?;
    let layer = Lifting { kernel: kernel.as_tensor().clone() };
    for field in [FieldType::trivial(8), FieldType::regular(Subgroup::D4, 8)?] {
        let ser = build(with_objective(Objective::Mse));
        let maps = [&layer.forward(&x1)?, &layer.forward(&x2)?];
        assert!(scalar(&on_field(&ser, maps, &field, &relative)?.loss) > 0.05);
    }
    Ok(())
}

#[test]
fn a_head_on_each_group_element_keeps_the_field() -> Done {
    let shape = ProjectorConfig { hidden: 5, out: 4, norm: true };
    let ser = build(with_objective(Objective::Mse));
    for group in GROUPS {
        let layer = Lifting::new(group, 3, 2, 1)?;
        let (x1, x2, relative) = views(group, &images(6, 6, 2)?, 3)?;
        let (map1, map2) = (layer.forward(&x1)?, layer.forward(&x2)?);
        let channels = 3 * group.order();
        let pair = MapPair::new([&map1, &map2], &relative);
        let regular = FieldType::regular(group, channels)?;
        let (head, vars) = seeded_head(regular, shape, DType::F64, 5);
        assert_eq!(vars.data().lock().unwrap()["hidden.weight"].dims(), [5, 3]);
        assert_eq!(head.output_field(), &FieldType::regular(group, 4 * group.order())?);
        let out = ser.forward(&pair.head(&head))?;
        assert!(scalar(&out.loss) < 1e-24, "{group:?}: {}", out.loss);
        let projected = head.forward(&map1.flatten_from(2)?.transpose(1, 2)?.contiguous()?)?;
        assert_eq!(projected.dims(), [6, 36, 4 * group.order()]);
        // The head does not make everything equal.
        let (head, _) = seeded_head(FieldType::trivial(channels), shape, DType::F64, 5);
        assert!(scalar(&ser.forward(&pair.head(&head))?.loss) > 0.01);
    }
    Ok(())
}

#[test]
fn both_directions_undo_each_other_on_scales_and_crops() -> Done {
    // Scale and crop keep the D4 part of a turn: a map moved by hand has no loss in the frame of
    // its copy.
    let window = Element::from(Window::new(0.0, 0.25, 1.0, 0.5)?);
    let grid = TokenGrid::new(4, 4)?;
    let elements = [
        window.then(D4::ROT90).then(Scale::new(2.0, 1.0)?),
        window.then(D4::ANTI_TRANSPOSE).then(Scale::new(2.0, 1.0)?),
    ];
    assert_eq!(elements[0].out_grid(grid)?, grid);
    let field = FieldType::trivial(1).and(FieldType::regular(Subgroup::D4, 8)?);
    let relative = Relative::new(elements.to_vec(), grid, grid)?;
    let map = tokens(&mut rng(6), (2, 16, 9), DType::F64)?;
    let moved = relative.to_second(&Resample::default())?.apply(&map)?;
    let moved = FibreOperator::new(&field, &[D4::ROT90, D4::ANTI_TRANSPOSE])?.apply(&moved)?;
    let ser = build(SerConfig { symmetric: false, ..with_objective(Objective::Mse) });
    let map = map.as_tensor();
    assert_eq!(scalar(&on_field(&ser, [map, &moved], &field, &relative)?.loss), 0.0);
    let back = Relative::new(elements.map(|g| g.inverse()).to_vec(), grid, grid)?;
    let operator = back.to_second(&Resample::default())?;
    let fibre = FibreOperator::new(&field, &[D4::ROT270, D4::ANTI_TRANSPOSE])?;
    let returned = fibre.apply(&operator.apply(&moved)?)?;
    // The loss compares what the crop kept.
    let weights: Vec<f32> = (0..2)
        .flat_map(|b| (0..16).map(move |i| (b, i)))
        .map(|(b, i)| operator.valid(b).unwrap().map_or(1.0, |v| f32::from(u8::from(v[i]))))
        .collect();
    assert_eq!(
        scalar(&on_field(&ser, [&moved, map], &field, &back)?.loss),
        scalar(&ser_reg::loss::mse(map, &returned, Some(&weights))?)
    );
    Ok(())
}

#[test]
fn gradients_match_differences() -> Done {
    let grid = TokenGrid::square(2)?;
    let window = |y, x| Element::from(Window::new(y, x, 0.75, 0.75).unwrap());
    let crop = Element::relative(&window(0.0, 0.0), &window(0.25, 0.0).then(D4::HFLIP));
    let turned = vec![D4::ROT90.into(), D4::HFLIP.into(), D4::TRANSPOSE.into()];
    let cropped = vec![D4::ROT90.into(), crop, D4::TRANSPOSE.into()];
    let shape = ProjectorConfig { hidden: 3, out: 2, norm: true };
    let other_view =
        Objective::NtXent(Contrastive { negatives: Negatives::OtherView, ..Default::default() });
    let mixed = FieldType::trivial(2).and(FieldType::regular(Subgroup::D4, 8)?);
    let regular = FieldType::regular(Subgroup::D4, 24)?;
    for (elements, objective, head, field) in [
        (&cropped, Objective::Mse, false, &mixed),
        (&cropped, Objective::default(), false, &mixed),
        (&turned, Objective::default(), false, &mixed),
        (&cropped, other_view, true, &regular),
        (&turned, other_view, true, &regular),
        (&cropped, Objective::Cosine { eps: 1e-6 }, true, &regular),
    ] {
        let relative = Relative::new(elements.clone(), grid, grid)?;
        let ser = build(with_objective(objective));
        let (map1, map2) = maps_of(8, 3, &relative, field.channels(), DType::F64);
        let head = head.then(|| seeded_head(field.clone(), shape, DType::F64, 7));
        let mut all = vec![map1.clone(), map2.clone()];
        let pair = MapPair::new([&map1, &map2], &relative);
        let pair = match &head {
            Some((head, vars)) => {
                all.extend(vars.all_vars());
                pair.head(head)
            }
            None => pair.field(field),
        };
        assert_gradients(&all, || ser.forward(&pair).unwrap().loss);
    }
    Ok(())
}

#[test]
fn a_trivial_field_is_no_field() -> Done {
    let (x1, x2, relative) = views(Subgroup::D4, &images(4, 6, 2)?, 3)?;
    let trivial = FieldType::trivial(2);
    let ser = build(SerConfig::default());
    for with_head in [false, true] {
        let (head, _) = seeded_head(trivial.clone(), small_head(), DType::F64, 1);
        let project = |x: &Tensor| -> ser_reg::Result<Tensor> {
            let tokens = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
            Ok(match with_head {
                true => head.forward(&tokens)?,
                false => tokens,
            })
        };
        let (z1, z2) = (project(&x1)?, project(&x2)?);
        let contrastive = Contrastive::default();
        let ids: Vec<u32> = (0..4).flat_map(|image| [image; 36]).collect();
        let grid = TokenGrid::square(6)?;
        let value = |anchors: &Tensor, keys: &Tensor, elements: &[Element]| {
            let keys = GridOperator::new(elements, grid, &Resample::default())?.apply(keys)?;
            let (a, b) = (anchors.flatten(0, 1)?, keys.flatten(0, 1)?);
            let out = nt_xent_ragged(&a, &b, &ids, None, &contrastive)?;
            Ok::<_, ser_reg::Error>(scalar(&out.loss))
        };
        let back: Vec<Element> = relative.elements().iter().map(|g| g.inverse()).collect();
        let by_hand = (value(&z2, &z1, relative.elements())? + value(&z1, &z2, &back)?) / 2.0;
        let pair = MapPair::new([&x1, &x2], &relative);
        let pairs = match with_head {
            true => vec![pair.head(&head)],
            false => vec![pair, pair.field(&trivial)],
        };
        for pair in pairs {
            assert_close(&[scalar(&ser.forward(&pair)?.loss)], &[by_hand], 1e-12);
        }
    }
    Ok(())
}

#[test]
fn keys_of_a_momentum_encoder_turn_too() -> Done {
    let group = Subgroup::D4;
    let layer = Lifting::new(group, 2, 2, 1)?;
    let (x1, x2, relative) = views(group, &images(5, 4, 2)?, 3)?;
    let maps = [&layer.forward(&x1)?, &layer.forward(&x2)?];
    let ser = build(with_objective(Objective::Mse));
    let regular = FieldType::regular(group, 16)?;
    let pair = MapPair::new(maps, &relative).keys(maps, None);
    assert!(scalar(&ser.forward(&pair.field(&regular))?.loss) < 1e-26);
    assert!(scalar(&ser.forward(&pair)?.loss) > 0.05);
    let (head, _) = seeded_head(regular, small_head(), DType::F64, 3);
    let pair = MapPair::new(maps, &relative).head(&head);
    let out = ser.forward(&pair.keys(maps, &head))?;
    assert!(scalar(&out.loss) < 1e-24, "{}", out.loss);
    Ok(())
}
