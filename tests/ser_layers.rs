//! SER at several layers: weights over depth, the sum, where gradients go when blocks are kept apart, and what is refused.

mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{assert_close, assert_says, flat, rng, scalar, tokens};
use ser_reg::grad::{self, named};
use ser_reg::group::{D4, Element, FieldType, Subgroup};
use ser_reg::projector::ProjectorConfig;
use ser_reg::ser::{Depth, Objective, SerConfig, SerLayers, SerLoss};
use ser_reg::view::Relative;
use ser_reg::{TokenGrid, tap};

type Done = ser_reg::Result<()>;

const WIDTH: usize = 4;
const LAYERS: [(&str, usize); 3] = [("block0", WIDTH), ("block1", WIDTH), ("block2", WIDTH)];

fn config() -> SerConfig {
    SerConfig {
        projector: Some(ProjectorConfig {
            hidden: 5,
            out: 3,
            norm: true,
        }),
        temperature: 0.5,
        lambda: 0.7,
        ..Default::default()
    }
}

fn seed(vars: &VarMap, seed: u64) -> Result<()> {
    let rng = &mut rng(seed);
    for (_, var) in named(vars, "") {
        var.set(tokens(rng, var.shape().clone(), DType::F64)?.as_tensor())?;
    }
    Ok(())
}

fn build(depth: Depth) -> ser_reg::Result<(SerLayers, VarMap)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let ser = SerLayers::new(config(), &LAYERS, depth, vb.pp("ser"))?;
    seed(&vars, 1)?;
    Ok((ser, vars))
}

fn relative() -> Relative<Element> {
    let grid = TokenGrid::square(3).unwrap();
    let elements = [D4::ROT90, D4::HFLIP, D4::ROT180].map(Element::from);
    Relative::new(elements.to_vec(), grid, grid).unwrap()
}

fn maps(seed: u64) -> Result<Vec<Tensor>> {
    let rng = &mut rng(seed);
    let map = |_| Ok(tokens(rng, (3, 9, WIDTH), DType::F64)?.as_tensor().clone());
    (0..3).map(map).collect()
}

/// Three blocks, each tapped, and a linear readout.
struct Net(VarMap);

impl Net {
    fn new() -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        for name in ["block0", "block1", "block2", "head"] {
            vb.get((WIDTH, WIDTH), &format!("{name}.w"))?;
        }
        seed(&vars, 2)?;
        Ok(Self(vars))
    }

    fn var(&self, name: &str) -> Var {
        self.0.data().lock().unwrap()[name].clone()
    }

    /// With `cut` each block starts from a copy of the tapped map without its graph: the twin that `routed` must match.
    fn forward(&self, x: &Tensor, cut: bool) -> Result<Tensor> {
        let mut x = x.clone();
        for i in 0..3 {
            let block = format!("block{i}");
            x = (x
                .broadcast_matmul(&self.var(&format!("{block}.w")))?
                .tanh()?
                + &x)?;
            tap::record(&block, &x);
            if cut {
                x = x.detach();
            }
        }
        x.broadcast_matmul(&self.var("head.w"))?.sqr()?.mean_all()
    }

    fn capture(&self, x: &Tensor, cut: bool) -> Result<(Tensor, Vec<Tensor>)> {
        tap::capture_all(&LAYERS.map(|l| l.0), || self.forward(x, cut))
    }
}

#[test]
fn depth_weighs_layers_as_its_formula_says() -> Done {
    let weights = |depth: Depth, n| depth.weights(n).unwrap();
    assert_eq!(weights(Depth::Constant, 3), [1.0; 3]);
    assert_eq!(
        weights(
            Depth::Linear {
                from: 0.25,
                to: 1.0
            },
            3
        ),
        [0.25, 0.625, 1.0]
    );
    let cosine = weights(Depth::Cosine { from: 1.0, to: 0.0 }, 5);
    let expected: Vec<f64> = (0..5)
        .map(|i| (std::f64::consts::PI * f64::from(i) / 8.0).cos().powi(2))
        .collect();
    assert_close(&cosine, &expected, 1e-15);
    assert_eq!(cosine[4], 0.0);
    assert_eq!(
        weights(Depth::Geometric { ratio: 2.0 }, 4),
        [1.0, 2.0, 4.0, 8.0]
    );
    // one layer is the first
    assert_eq!(weights(Depth::Linear { from: 0.2, to: 1.0 }, 1), [0.2]);
    assert_eq!(weights(Depth::Cosine { from: 0.2, to: 1.0 }, 1), [0.2]);
    assert_eq!(weights(Depth::Constant, 0), [0.0; 0]);

    assert_says(
        Depth::Linear {
            from: -0.1,
            to: 1.0,
        }
        .weights(2),
        &["at least 0", "-0.1"],
    );
    assert_says(
        Depth::Cosine {
            from: 1.0,
            to: f64::NAN,
        }
        .weights(2),
        &["finite", "NaN"],
    );
    for ratio in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_says(Depth::Geometric { ratio }.weights(2), &["expected"]);
    }
    assert_says(
        Depth::Geometric { ratio: 1e200 }.weights(9),
        &["finite", "inf"],
    );
    Ok(())
}

#[test]
fn the_loss_is_the_weighted_sum_of_the_layers() -> Done {
    let (ser, vars) = build(Depth::Geometric { ratio: 0.5 })?;
    let (maps1, maps2) = (maps(3)?, maps(4)?);
    let out = ser.forward(&maps1, &maps2, &[relative()])?;
    let mut sum = 0.0;
    for (i, (layer, (name, _))) in out.layers.iter().zip(LAYERS).enumerate() {
        // the same variables under a loss of its own
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let alone = SerLoss::new(config(), WIDTH, vb.pp("ser").pp(name))?;
        let alone = alone.forward(&maps1[i], &maps2[i], &relative())?;
        let weight = 0.5f64.powi(i as i32);
        assert_eq!((layer.name.as_str(), layer.weight), (name, weight));
        assert_eq!(scalar(&layer.output.loss), scalar(&alone.loss));
        assert_close(
            &[scalar(&layer.loss)],
            &[weight * scalar(&alone.loss)],
            1e-15,
        );
        assert_eq!(layer.output.tokens, 2 * 27);
        sum += weight * scalar(&alone.loss);
    }
    assert_close(&[scalar(&out.loss)], &[sum], 1e-14);
    // three projectors, not one
    assert_eq!(vars.all_vars().len(), 3 * 4);
    let values: Vec<f64> = out.layers.iter().map(|l| scalar(&l.output.loss)).collect();
    assert!(values[0] != values[1] && values[1] != values[2]);
    assert_eq!(ser.get("block1").map(|l| l.config().lambda), Some(0.7));
    assert!(ser.get("block9").is_none());

    // against keys
    let (keys1, keys2) = (maps(5)?, maps(6)?);
    let keyed = ser.forward_with_keys([&maps1, &maps2], [&keys1, &keys2], &ser, &[relative()])?;
    for (i, layer) in keyed.layers.iter().enumerate() {
        let own = ser.get(&layer.name).expect("a layer");
        let alone = own.forward_with_keys(
            [&maps1[i], &maps2[i]],
            [&keys1[i], &keys2[i]],
            own,
            &relative(),
        )?;
        assert_eq!(scalar(&layer.output.loss), scalar(&alone.loss));
    }
    Ok(())
}

#[test]
fn a_layer_of_weight_zero_is_not_computed() -> Done {
    let (ser, vars) = build(Depth::Linear { from: 1.0, to: 0.0 })?;
    assert_eq!(ser.weights(), [1.0, 0.5, 0.0]);
    let out = ser.forward(&maps(3)?, &maps(4)?, &[relative()])?;
    let last = &out.layers[2];
    assert_eq!((scalar(&last.loss), last.output.tokens), (0.0, 0));
    let grads = out.loss.backward()?;
    for (name, var) in named(&vars, "") {
        assert_eq!(
            grads.get(&var).is_some(),
            !name.contains("block2"),
            "{name}"
        );
    }
    // λ = 0 switches all off
    let (mut ser, _) = build(Depth::Constant)?;
    ser.set_lambda(0.0)?;
    let out = ser.forward(&maps(3)?, &maps(4)?, &[relative()])?;
    assert_eq!(scalar(&out.loss), 0.0);
    assert_says(ser.set_lambda(-1.0), &["lambda"]);
    Ok(())
}

#[test]
fn layers_may_differ_in_grid_field_and_settings() -> Done {
    let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let bare = SerConfig {
        projector: None,
        objective: Objective::Mse,
        ..Default::default()
    };
    let regular = FieldType::regular(Subgroup::D4, 8)?;
    let layers = SerLayers::from_losses([
        ("early", 2.0, SerLoss::new(bare, 3, vb.clone())?),
        ("late", 1.0, SerLoss::with_field(bare, regular, vb)?),
    ])?;
    assert_eq!(layers.names(), ["early", "late"]);
    let early = relative();
    let grid = TokenGrid::square(2)?;
    let late = early.on(grid, grid);
    assert_eq!(
        (late.seed(), late.elements()),
        (early.seed(), early.elements())
    );
    let rng = &mut rng(7);
    let mut map = |shape: (usize, usize, usize, usize)| {
        Ok::<_, candle_core::Error>(tokens(rng, shape, DType::F64)?.as_tensor().clone())
    };
    let maps1 = [map((3, 3, 3, 3))?, map((3, 8, 2, 2))?];
    let maps2 = [map((3, 3, 3, 3))?, map((3, 8, 2, 2))?];
    let out = layers.forward(&maps1, &maps2, &[early.clone(), late.clone()])?;
    for (i, relative) in [early, late].iter().enumerate() {
        let own = layers.get(layers.names()[i]).expect("a layer");
        let alone = own.forward(&maps1[i], &maps2[i], relative)?;
        assert_eq!(scalar(&out.layers[i].output.loss), scalar(&alone.loss));
    }
    Ok(())
}

/// The gradients at the net's and the projectors' variables, by name.
fn by_name(grads: &GradStore, vars: &[(String, Var)]) -> Vec<(String, Option<Vec<f64>>)> {
    vars.iter()
        .map(|(name, var)| (name.clone(), grads.get(var).map(flat)))
        .collect()
}

#[test]
fn routed_gradients_are_those_of_a_model_cut_at_its_taps() -> Done {
    let net = Net::new()?;
    let (ser, ser_vars) = build(Depth::Linear { from: 1.0, to: 0.5 })?;
    let mut all = named(&net.0, "");
    all.extend(named(&ser_vars, ""));
    let x1 = tokens(&mut rng(8), (3, 9, WIDTH), DType::F64)?;
    let x2 = tokens(&mut rng(9), (3, 9, WIDTH), DType::F64)?;

    let (base, maps1) = net.capture(&x1, false)?;
    let (_, maps2) = net.capture(&x2, false)?;
    let out = ser.forward(&maps1, &maps2, &[relative()])?;
    let own = |name: &str| -> Vec<Var> {
        let vars = [
            named(&net.0, name),
            named(&ser_vars, &format!("ser.{name}")),
        ];
        vars.concat().into_iter().map(|(_, var)| var).collect()
    };
    let parts: Vec<(&Tensor, Vec<Var>)> = out
        .layers
        .iter()
        .map(|layer| (&layer.loss, own(&layer.name)))
        .collect();

    // The equivariance losses alone: as if every block had started from a map without a graph.
    let losses: Vec<_> = parts.iter().map(|(l, v)| (*l, v.as_slice())).collect();
    let routed = grad::routed(&losses)?;
    let (_, cut1) = net.capture(&x1, true)?;
    let (_, cut2) = net.capture(&x2, true)?;
    let cut = ser.forward(&cut1, &cut2, &[relative()])?.loss.backward()?;
    for ((name, routed), (_, cut)) in by_name(&routed, &all).iter().zip(by_name(&cut, &all)) {
        match (routed, cut) {
            (Some(routed), Some(cut)) => {
                assert_close(routed, &cut, 1e-14);
                assert!(routed.iter().any(|g| g.abs() > 1e-6), "{name}");
            }
            (routed, cut) => {
                assert!(routed.is_none() && cut.is_none(), "{name}");
                assert_eq!(name, "head.w");
            }
        }
    }
    // It is another gradient than that of the plain sum, at every block but the last.
    let plain = out.loss.backward()?;
    for (name, differs) in [("block0.w", true), ("block1.w", true), ("block2.w", false)] {
        let var = net.var(name);
        let [a, b] = [&plain, &routed].map(|g| flat(g.get(&var).expect("a gradient")));
        let gap = a
            .iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert_eq!(gap > 1e-4, differs, "{name}: {gap}");
    }

    // With the base loss, which still trains every block of the net and nothing of the projectors.
    let net_vars = net.0.all_vars();
    let mut losses = losses;
    losses.push((&base, &net_vars));
    let both = grad::routed(&losses)?;
    let alone = base.backward()?;
    for (name, var) in &all {
        let at = |g: &GradStore| g.get(var).map(flat).unwrap_or(vec![0.0; var.elem_count()]);
        let sum: Vec<f64> = at(&routed)
            .iter()
            .zip(at(&alone))
            .map(|(a, b)| a + b)
            .collect();
        assert_close(&at(&both), &sum, 1e-14);
        assert!(both.get(var).is_some(), "{name}");
    }
    Ok(())
}

#[test]
fn routed_keeps_nothing_it_was_not_asked_for() -> Done {
    let var = |v: f64| Var::new(v, &Device::Cpu).unwrap();
    let (a, b) = (var(3.0), var(5.0));
    let loss = (a.as_tensor() * b.as_tensor())?;
    // a name listed twice counts once
    let grads = grad::routed(&[(&loss, &[&a, &a][..])])?;
    assert_eq!(grads.get(&a).map(scalar), Some(5.0));
    assert!(grads.get(&b).is_none() && grads.get(&loss).is_none());
    assert_eq!(grads.get_ids().count(), 1);
    // a loss without variables is left out
    let grads = grad::routed(&[(&loss, &[][..]), (&loss, &[&b][..])])?;
    assert_eq!(grads.get(&b).map(scalar), Some(3.0));
    // nothing kept hangs on a graph
    assert!(!grads.get(&b).expect("a gradient").track_op());

    let none: [(&Tensor, &[&Var]); 0] = [];
    assert_says(grad::routed(&none), &["at least one loss", "0 losses"]);
    assert_says(grad::routed::<&Var>(&[(&loss, &[])]), &["1 losses, none"]);
    let wide = a.broadcast_as(3)?;
    assert_says(grad::routed(&[(&wide, &[&a])]), &["grad::routed", "scalar"]);
    Ok(())
}

#[test]
fn what_makes_no_sense_is_refused() -> Done {
    let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let new = |layers: &[(&str, usize)], depth| SerLayers::new(config(), layers, depth, vb.clone());
    assert_says(new(&[], Depth::Constant), &["at least one layer"]);
    assert_says(
        new(&[("a", 4), ("b", 4), ("a", 4)], Depth::Constant),
        &["`a` twice"],
    );
    assert_says(
        new(&[("a", 4), ("b", 4)], Depth::Linear { from: 0.0, to: 0.0 }),
        &["above 0", "2 layers"],
    );
    assert_says(new(&[("a", 0)], Depth::Constant), &["width of at least 1"]);
    let loss = SerLoss::new(config(), 4, vb.clone())?;
    for weight in [-1.0, f64::NAN, f64::INFINITY] {
        let layers = [("a", weight, loss.clone())];
        assert_says(
            SerLayers::from_losses(layers),
            &["weight of a layer", "at least 0"],
        );
    }

    let (ser, _) = build(Depth::Constant)?;
    let (all, two) = (maps(3)?, maps(3)?[..2].to_vec());
    assert_says(
        ser.forward(&all, &two, &[relative()]),
        &["3 maps of each view", "3 and 2 maps"],
    );
    let relatives = [relative(), relative()];
    assert_says(
        ser.forward(&all, &all, &relatives),
        &["1 or 3 pairs", "2 relatives"],
    );
    assert_says(ser.forward::<D4>(&all, &all, &[]), &["0 relatives"]);
    let keys = [&all[..], &all[..]];
    assert_says(
        ser.forward_with_keys([&all, &all], [&all, &two], &ser, &[relative()]),
        &["3 and 2 maps"],
    );
    let other = new(&[("x", 4), ("y", 4), ("z", 4)], Depth::Constant)?;
    assert_says(
        ser.forward_with_keys(keys, keys, &other, &[relative()]),
        &["same layers", "\"x\""],
    );
    Ok(())
}
