//! `SerLoss` on maps whose channels turn with the grid: a group convolution made by hand, gradients, and what is refused.

mod loss_common;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{assert_close, assert_says, differences, flat, rng, scalar, tokens};
use ser_reg::fibre::FibreOperator;
use ser_reg::group::{Affine, D4, Element, FieldType, Scale, Subgroup, Window};
use ser_reg::loss::{Negatives, NtXent, SameImage, nt_xent_ragged};
use ser_reg::projector::{Projector, ProjectorConfig};
use ser_reg::ser::{Objective, SerConfig, SerLoss};
use ser_reg::view::{Pairing, Relative, ViewConfig, ViewSampler};
use ser_reg::{GridOperator, GroupAction, Resample, TokenGrid};

type Done = ser_reg::Result<()>;

const GROUPS: [Subgroup; 3] = [Subgroup::C2, Subgroup::C4, Subgroup::D4];

fn config(objective: Objective) -> SerConfig {
    SerConfig {
        objective,
        projector: None,
        ..Default::default()
    }
}

/// A loss in f64 with seeded variables.
fn build(config: SerConfig, field: FieldType, seed: u64) -> ser_reg::Result<(SerLoss, VarMap)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let ser = SerLoss::with_field(config, field, vb)?;
    let rng = &mut rng(seed);
    for (_, var) in ser_reg::grad::named(&vars, "") {
        var.set(tokens(rng, var.shape().clone(), DType::F64)?.as_tensor())?;
    }
    Ok((ser, vars))
}

/// A lifting convolution: `blocks` kernels, each seen in every pose of the group; `(B, C, S, S)` to
/// `(B, blocks·order, S, S)`, the poses varying fastest.
struct Lifting {
    kernel: Tensor,
}

impl Lifting {
    fn new(group: Subgroup, blocks: usize, channels: usize, seed: u64) -> ser_reg::Result<Self> {
        let kernel = tokens(&mut rng(seed), (blocks, channels, 3, 3), DType::F64)?;
        let side = TokenGrid::square(3)?;
        let poses = group
            .elements()
            .iter()
            .map(|h| GridOperator::new(&[*h], side, &Resample::default())?.apply(&kernel));
        let poses: ser_reg::Result<Vec<Tensor>> = poses.collect();
        let kernel = Tensor::stack(&poses?, 1)?.flatten(0, 1)?;
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
    let config = ViewConfig {
        pairing: Pairing::Independent(group),
        area: (1.0, 1.0),
        aspect: (1.0, 1.0),
        ..Default::default()
    };
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
        for objective in [Objective::Mse, Objective::L1, Objective::Cosine] {
            let eps = SerConfig {
                eps: 0.0,
                ..config(objective)
            };
            let (regular, _) = build(eps, FieldType::regular(group, channels)?, 1)?;
            let (trivial, _) = build(eps, FieldType::trivial(channels), 1)?;
            let regular = scalar(&regular.forward(&map1, &map2, &relative)?.loss);
            let trivial = scalar(&trivial.forward(&map1, &map2, &relative)?.loss);
            println!("{group:?} {objective:?}: regular {regular:e}, trivial {trivial}");
            assert!(
                regular.abs() < 1e-13,
                "{group:?} {objective:?}: {regular:e}"
            );
            assert!(trivial > 0.05, "{group:?} {objective:?}: {trivial}");
        }
        // NT-Xent finds every partner
        let sharp = SerConfig {
            temperature: 0.05,
            ..config(Objective::default())
        };
        let (ser, _) = build(sharp, FieldType::regular(group, channels)?, 1)?;
        let out = ser.forward(&map1, &map2, &relative)?;
        assert_close(&[scalar(&out.accuracy.expect("NT-Xent"))], &[1.0], 1e-12);

        // trivial channels stand beside it: the mean over the group is one of them
        let invariant = |map: &Tensor| {
            let mean = map.reshape((8, 3, group.order(), 6, 6))?.mean(2)?;
            Tensor::cat(&[&mean, map], 1)
        };
        let field = FieldType::trivial(3).and(FieldType::regular(group, channels)?);
        let (mixed, _) = build(config(Objective::Mse), field, 1)?;
        let out = mixed.forward(&invariant(&map1)?, &invariant(&map2)?, &relative)?;
        assert!(scalar(&out.loss) < 1e-26);
    }
    Ok(())
}

#[test]
fn a_layer_without_the_symmetry_has_a_loss_under_both() -> Done {
    let (x1, x2, relative) = views(Subgroup::D4, &images(8, 6, 2)?, 3)?;
    let kernel = tokens(&mut rng(4), (8, 2, 3, 3), DType::F64)?;
    let layer = Lifting {
        kernel: kernel.as_tensor().clone(),
    };
    for field in [FieldType::trivial(8), FieldType::regular(Subgroup::D4, 8)?] {
        let (ser, _) = build(config(Objective::Mse), field, 1)?;
        let out = ser.forward(&layer.forward(&x1)?, &layer.forward(&x2)?, &relative)?;
        assert!(scalar(&out.loss) > 0.05);
    }
    Ok(())
}

#[test]
fn a_head_on_each_group_element_keeps_the_field() -> Done {
    let head = ProjectorConfig {
        hidden: 5,
        out: 4,
        norm: true,
    };
    for group in GROUPS {
        let layer = Lifting::new(group, 3, 2, 1)?;
        let (x1, x2, relative) = views(group, &images(6, 6, 2)?, 3)?;
        let (map1, map2) = (layer.forward(&x1)?, layer.forward(&x2)?);
        let config = SerConfig {
            projector: Some(head),
            ..config(Objective::Mse)
        };
        let channels = 3 * group.order();
        let (ser, vars) = build(config, FieldType::regular(group, channels)?, 5)?;
        assert_eq!(vars.data().lock().unwrap()["hidden.weight"].dims(), [5, 3]);
        let out = ser.forward(&map1, &map2, &relative)?;
        assert!(scalar(&out.loss) < 1e-24, "{group:?}: {}", out.loss);
        let projected = ser.project(&map1, relative.from_grid())?;
        assert_eq!(projected.dims(), [6, 36, 4 * group.order()]);
        // and the head does not make everything equal
        let (trivial, _) = build(config, FieldType::trivial(channels), 5)?;
        assert!(scalar(&trivial.forward(&map1, &map2, &relative)?.loss) > 0.01);
    }
    Ok(())
}

#[test]
fn both_directions_undo_each_other_on_scales_and_crops() -> Done {
    // scale and crop on top of a turn keep its D4 part: a map moved by hand has no loss in the frame it came into
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
    let one_way = SerConfig {
        symmetric: false,
        ..config(Objective::Mse)
    };
    let (ser, _) = build(one_way, field.clone(), 1)?;
    assert_eq!(scalar(&ser.forward(&map, &moved, &relative)?.loss), 0.0);
    let back = Relative::new(elements.map(|g| g.inverse()).to_vec(), grid, grid)?;
    assert_eq!(scalar(&ser.forward(&moved, &map, &back)?.loss), {
        let returned = back.forward(&Resample::default())?.apply(&moved)?;
        let fibre = FibreOperator::new(&field, &[D4::ROT270, D4::ANTI_TRANSPOSE])?;
        let returned = fibre.apply(&returned)?;
        // only what the crop kept is compared
        let operator = back.forward(&Resample::default())?;
        let weights: Vec<f32> = (0..2)
            .flat_map(|b| (0..16).map(move |i| (b, i)))
            .map(|(b, i)| operator.valid(b).map_or(1.0, |v| f32::from(u8::from(v[i]))))
            .collect();
        scalar(&ser_reg::loss::mse(&map, &returned, Some(&weights))?)
    });
    Ok(())
}

#[test]
fn gradients_match_differences() -> Done {
    let grid = TokenGrid::square(2)?;
    let window = |y, x| Element::from(Window::new(y, x, 0.75, 0.75).unwrap());
    let crop = Element::relative(&window(0.0, 0.0), &window(0.25, 0.0).then(D4::HFLIP));
    let elements = vec![D4::ROT90.into(), crop, D4::TRANSPOSE.into()];
    let relative = Relative::new(elements, grid, grid)?;
    let head = ProjectorConfig {
        hidden: 3,
        out: 2,
        norm: true,
    };
    let cross = Objective::NtXent {
        form: Negatives::OtherView,
        same_image: SameImage::Exclude,
    };
    for (objective, projector, field) in [
        (
            Objective::Mse,
            None,
            FieldType::trivial(2).and(FieldType::regular(Subgroup::D4, 8)?),
        ),
        (
            Objective::default(),
            None,
            FieldType::trivial(2).and(FieldType::regular(Subgroup::D4, 8)?),
        ),
        (cross, Some(head), FieldType::regular(Subgroup::D4, 24)?),
        (
            Objective::Cosine,
            Some(head),
            FieldType::regular(Subgroup::D4, 24)?,
        ),
    ] {
        let shape = (3, 4, field.channels());
        let (ser, vars) = build(
            SerConfig {
                projector,
                ..config(objective)
            },
            field,
            7,
        )?;
        let rng = &mut rng(8);
        let map1 = tokens(rng, shape, DType::F64)?;
        let map2 = tokens(rng, shape, DType::F64)?;
        let grads = ser.forward(&map1, &map2, &relative)?.loss.backward()?;
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
    Ok(())
}

#[test]
fn a_trivial_field_is_what_it_always_was() -> Done {
    let (x1, x2, relative) = views(Subgroup::D4, &images(4, 6, 2)?, 3)?;
    for projector in [
        None,
        Some(ProjectorConfig {
            hidden: 6,
            out: 4,
            norm: true,
        }),
    ] {
        let config = SerConfig {
            projector,
            ..Default::default()
        };
        let (ser, vars) = build(config, FieldType::trivial(2), 1)?;
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let head = projector
            .map(|head| Projector::new(2, head, vb))
            .transpose()?;
        let project = |x: &Tensor| -> ser_reg::Result<Tensor> {
            let tokens = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
            Ok(match &head {
                Some(head) => head.forward(&tokens)?,
                None => tokens,
            })
        };
        let (z1, z2) = (project(&x1)?, project(&x2)?);
        let Objective::NtXent { form, same_image } = config.objective else {
            panic!("NT-Xent is the default")
        };
        let contrast = NtXent {
            form,
            same_image,
            symmetric: false,
            temperature: config.temperature,
            eps: config.eps,
            block_bytes: config.block_bytes,
        };
        let ids: Vec<u32> = (0..4).flat_map(|image| [image; 36]).collect();
        let grid = TokenGrid::square(6)?;
        let value = |anchors: &Tensor, keys: &Tensor, elements: &[Element]| {
            let keys = GridOperator::new(elements, grid, &Resample::default())?.apply(keys)?;
            let (a, b) = (anchors.flatten(0, 1)?, keys.flatten(0, 1)?);
            Ok::<_, ser_reg::Error>(scalar(&nt_xent_ragged(&a, &b, &ids, None, &contrast)?.loss))
        };
        let back: Vec<Element> = relative.elements().iter().map(|g| g.inverse()).collect();
        let by_hand = (value(&z2, &z1, relative.elements())? + value(&z1, &z2, &back)?) / 2.0;
        let ours = scalar(&ser.forward(&x1, &x2, &relative)?.loss);
        assert_close(&[ours], &[by_hand * config.lambda], 1e-12);
    }
    Ok(())
}

#[test]
fn keys_of_a_momentum_encoder_turn_too() -> Done {
    let group = Subgroup::D4;
    let layer = Lifting::new(group, 2, 2, 1)?;
    let (x1, x2, relative) = views(group, &images(5, 4, 2)?, 3)?;
    let (map1, map2) = (layer.forward(&x1)?, layer.forward(&x2)?);
    let (ser, _) = build(config(Objective::Mse), FieldType::regular(group, 16)?, 1)?;
    let out = ser.forward_with_keys([&map1, &map2], [&map1, &map2], &ser, &relative)?;
    assert!(scalar(&out.loss) < 1e-26);
    let (other, _) = build(config(Objective::Mse), FieldType::trivial(16), 1)?;
    assert_says(
        ser.forward_with_keys([&map1, &map2], [&map1, &map2], &other, &relative),
        &["key side on the same field", "Regular(D4)", "Trivial"],
    );
    // the fields of the maps are one, those of the projected tokens are not
    let [(ser, _), (other, _)] = [4, 5].map(|out| {
        let head = ProjectorConfig {
            hidden: 3,
            out,
            norm: true,
        };
        let config = SerConfig {
            projector: Some(head),
            ..config(Objective::Mse)
        };
        build(config, FieldType::regular(group, 16).unwrap(), 1).unwrap()
    });
    assert_says(
        ser.forward_with_keys([&map1, &map2], [&map1, &map2], &other, &relative),
        &[
            "what is compared",
            "(Regular(D4), 4)",
            "got",
            "(Regular(D4), 5)",
        ],
    );
    Ok(())
}

#[test]
fn what_makes_no_sense_is_refused() -> Done {
    let head = |norm| {
        Some(ProjectorConfig {
            hidden: 4,
            out: 4,
            norm,
        })
    };
    let mixed = FieldType::trivial(2).and(FieldType::regular(Subgroup::C4, 8)?);
    assert_says(
        build(
            SerConfig {
                projector: head(true),
                ..Default::default()
            },
            mixed.clone(),
            1,
        ),
        &["SerConfig::projector", "None for a mixed field"],
    );
    let single = FieldType::regular(Subgroup::C4, 4)?;
    assert_says(
        build(
            SerConfig {
                projector: head(true),
                ..Default::default()
            },
            single.clone(),
            1,
        ),
        &["ProjectorConfig::norm", "one channel"],
    );
    build(
        SerConfig {
            projector: head(false),
            ..Default::default()
        },
        single,
        1,
    )?;

    let (ser, _) = build(config(Objective::Mse), mixed, 1)?;
    assert_eq!(ser.field().channels(), 10);
    let grid = TokenGrid::square(2)?;
    let map = tokens(&mut rng(1), (2, 4, 10), DType::F64)?;
    let run =
        |elements: Vec<Element>| ser.forward(&map, &map, &Relative::new(elements, grid, grid)?);
    assert_says(
        run(vec![D4::ROT90.into(), D4::HFLIP.into()]),
        &["an element of C4"],
    );
    let turn = Element::from(Affine::rotation(30.0)?);
    assert_says(
        run(vec![D4::ROT90.into(), turn]),
        &["quarter turn or a flip", "sample 1"],
    );
    let narrow = tokens(&mut rng(1), (2, 4, 9), DType::F64)?;
    let relative = Relative::new(vec![D4::ROT90], grid, grid)?;
    assert_says(
        ser.forward(&narrow, &narrow, &relative),
        &["maps of 10 channels", "9 in"],
    );
    // as many elements as samples
    let three = Relative::new(vec![D4::ROT90; 3], grid, grid)?;
    assert_says(
        ser.forward(&map, &map, &three),
        &["a batch of 3 samples, one per element", "got [2, 4, 10]"],
    );
    for projector in [None, head(true)] {
        let none = SerConfig {
            projector,
            ..Default::default()
        };
        assert_says(
            build(none, FieldType::trivial(0), 1),
            &["channels", "width of at least 1", "0"],
        );
    }
    Ok(())
}
