//! The regularizer: what it runs, what it compares, and what it leaves alone.

mod common;
mod ser_common;

use std::cell::Cell;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{
    BatchNorm, Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap, batch_norm, conv2d, conv2d_no_bias,
};
use common::{assert_close, assert_says, flat, rng, scalar, tokens};
use rand::{Rng, RngCore};
use ser_common::{nt_xent_at, reseed, small_head, with_objective};
use ser_reg::group::Subgroup;
use ser_reg::ser::Objective;
use ser_reg::view::{CropRange, Pairing};
use ser_reg::{
    Error, MapPair, Projector, Regularizer, SerConfig, SerLoss, SerOutput, TokenGrid, ViewConfig,
    ViewSampler, grad, tap,
};

type Done = ser_reg::Result<()>;

/// A patch convolution, the tap, and blocks behind it, with a count of the calls of each.
struct Net {
    stem: Conv2d,
    late: Linear,
    stems: Cell<usize>,
    lates: Cell<usize>,
}

const WIDTH: usize = 4;

impl Net {
    /// Patches of 2×2 pixels: images of 8×8 have a map of 4×4.
    fn new(vb: VarBuilder) -> Result<Self> {
        let patches = Conv2dConfig { stride: 2, ..Default::default() };
        Ok(Self {
            stem: conv2d(2, WIDTH, 2, patches, vb.pp("stem"))?,
            late: candle_nn::linear(WIDTH, 3, vb.pp("late"))?,
            stems: Cell::new(0),
            lates: Cell::new(0),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.stems.set(self.stems.get() + 1);
        let map = self.stem.forward(x)?.tanh()?;
        tap::record("map", &map)?;
        self.lates.set(self.lates.get() + 1);
        self.late.forward(&map.mean((2, 3))?)
    }

    /// The calls of the blocks before and behind the tap since the last count.
    fn calls(&self) -> (usize, usize) {
        (self.stems.take(), self.lates.take())
    }
}

/// A seeded model with a seeded head, in f64.
struct Setup {
    net: Net,
    head: Projector,
    vars: VarMap,
}

impl Setup {
    fn new(seed: u64) -> Self {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let net = Net::new(vb.pp("net")).unwrap();
        let head = Projector::new(WIDTH, small_head(), vb.pp("ser")).unwrap();
        reseed(&vars, seed);
        Self { net, head, vars }
    }

    fn regularizer(&self, views: ViewConfig, config: SerConfig) -> Regularizer {
        let sampler = ViewSampler::new(TokenGrid::square(4).unwrap(), views).unwrap();
        let loss = SerLoss::new(config).unwrap();
        Regularizer::from_parts("map", sampler, Some(self.head.clone()), loss)
    }
}

fn images(batch: usize, seed: u64) -> Tensor {
    let x = tokens(&mut rng(seed), (batch, 2, 8, 8), DType::F64).unwrap();
    x.as_tensor().detach()
}

fn cropped() -> ViewConfig {
    ViewConfig {
        crop: Some(CropRange { area: (0.4, 1.0), ..CropRange::default() }),
        min_overlap: 0.2,
        ..ViewConfig::default()
    }
}

/// The same step out of its parts; `keys` is the momentum encoder.
fn by_hand(
    setup: &Setup,
    keys: Option<&Setup>,
    ser: &Regularizer,
    x: &Tensor,
    rng: &mut impl Rng,
) -> ser_reg::Result<SerOutput> {
    let views = ser.sampler().sample_pair(rng, x.dims()[0])?;
    let seed = rng.random();
    let (x1, x2) = (views.first.apply(x)?, views.second.apply(x)?);
    let map = |net: &Net, x: &Tensor| Ok::<_, Error>(net.stem.forward(x)?.tanh()?);
    let (map1, map2) = (map(&setup.net, &x1)?, map(&setup.net, &x2)?);
    let relative = views.relative();
    let pair = MapPair::new([&map1, &map2], &relative).head(&setup.head).seed(seed);
    match keys {
        None => ser.loss().forward(&pair),
        Some(keys) => {
            let (key1, key2) = (map(&keys.net, &x1)?, map(&keys.net, &x2)?);
            ser.loss().forward(&pair.keys([&key1, &key2], &keys.head))
        }
    }
}

/// That both have the same values, and the same gradients at the variables before the tap and at
/// the head.
#[track_caller]
fn assert_same_step(vars: &VarMap, got: (&Tensor, &Tensor, usize), want: &SerOutput) {
    let (loss, unweighted, anchors) = got;
    assert_eq!(scalar(loss), scalar(&want.loss));
    assert_eq!(scalar(unweighted), scalar(&want.unweighted));
    assert_eq!(anchors, want.anchors);
    let (got, want) = (loss.backward().unwrap(), want.loss.backward().unwrap());
    for (name, var) in grad::named(vars, "") {
        let late = name.contains("late");
        assert_eq!(got.get(&var).is_none(), late, "{name}");
        if let (Some(got), Some(want)) = (got.get(&var), want.get(&var)) {
            assert_close(&flat(got), &flat(want), 1e-15);
            assert!(flat(got).iter().any(|g| g.abs() > 1e-9), "{name}");
        }
    }
}

#[test]
fn a_step_is_the_step_out_of_its_parts() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(4, 2));
    for views in [ViewConfig::default(), cropped()] {
        for config in [
            SerConfig { lambda: 0.3, ..with_objective(nt_xent_at(0.2)) },
            SerConfig { max_tokens: Some(9), ..Default::default() },
            with_objective(Objective::Mse),
        ] {
            let ser = setup.regularizer(views, config);
            let want = by_hand(&setup, None, &ser, &x, &mut rng(7))?;

            let out = ser.forward(&x, &mut rng(7), |view| net.forward(view))?;
            assert_eq!(net.calls(), (2, 0), "two views, to the tap alone");
            let step = (&out.loss, &out.unweighted, out.anchors);
            assert_same_step(&setup.vars, step, &want);
            assert_eq!(out.accuracy.is_some(), want.accuracy.is_some());

            let out = ser.forward_with_outputs(&x, &mut rng(7), |view| net.forward(view))?;
            assert_eq!(net.calls(), (2, 2), "two views, the whole model");
            let step = (&out.loss, &out.unweighted, out.anchors);
            assert_same_step(&setup.vars, step, &want);
            assert_eq!(out.key_outputs, [(), ()]);
            // The outputs serve the base loss, in the order of the views.
            let views = ser.sampler().sample_pair(&mut rng(7), 4)?;
            for (output, view) in out.outputs.iter().zip([&views.first, &views.second]) {
                let alone = net.forward(&view.apply(&x)?)?;
                assert_eq!(flat(output), flat(&alone));
            }
            let both = (out.outputs[0].sqr()? + out.outputs[1].sqr()?)?.mean_all()?;
            let total = (both + &out.loss)?;
            grad::assert_reaches(&total, grad::named(&setup.vars, ""))?;
            net.calls();
        }
    }
    Ok(())
}

#[test]
fn a_momentum_encoder_gives_keys_and_gets_no_gradient() -> Done {
    let (setup, momentum) = (Setup::new(1), Setup::new(2));
    let x = images(4, 3);
    let ser = setup.regularizer(cropped(), with_objective(nt_xent_at(0.2)));
    let want = by_hand(&setup, Some(&momentum), &ser, &x, &mut rng(8))?;
    let (net, keys) = (&setup.net, &momentum.net);

    let out = ser.forward_with_keys(
        &x,
        &mut rng(8),
        |view| net.forward(view),
        |view| keys.forward(view),
        &momentum.head,
    )?;
    assert_eq!((net.calls(), keys.calls()), ((2, 0), (2, 0)));
    let step = (&out.loss, &out.unweighted, out.anchors);
    assert_same_step(&setup.vars, step, &want);
    let grads = out.loss.backward()?;
    for (name, var) in grad::named(&momentum.vars, "") {
        assert!(grads.get(&var).is_none(), "{name}");
    }

    let out = ser.forward_with_outputs_and_keys(
        &x,
        &mut rng(8),
        |view| net.forward(view),
        |view| Ok((keys.forward(view)?, "any type")),
        &momentum.head,
    )?;
    assert_eq!((net.calls(), keys.calls()), ((2, 2), (2, 2)));
    let step = (&out.loss, &out.unweighted, out.anchors);
    assert_same_step(&setup.vars, step, &want);
    let views = ser.sampler().sample_pair(&mut rng(8), 4)?;
    for (i, view) in [&views.first, &views.second].into_iter().enumerate() {
        let view = view.apply(&x)?;
        assert_eq!(flat(&out.outputs[i]), flat(&net.forward(&view)?));
        let (output, text) = &out.key_outputs[i];
        assert_eq!(flat(output), flat(&keys.forward(&view)?));
        assert_eq!(*text, "any type");
    }
    let grads = out.loss.backward()?;
    for (name, var) in grad::named(&momentum.vars, "") {
        assert!(grads.get(&var).is_none(), "{name}");
    }

    // A head for one side alone is refused.
    let refused = ser.forward_with_keys(
        &x,
        &mut rng(8),
        |view| net.forward(view),
        |view| keys.forward(view),
        None,
    );
    assert_says(refused, &["a head for both encoders", "none for the keys"]);
    Ok(())
}

#[test]
fn without_a_head_the_tokens_themselves_are_compared() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(3, 2));
    let sampler = ViewSampler::new(TokenGrid::square(4)?, ViewConfig::default())?;
    let loss = SerLoss::new(with_objective(Objective::Mse))?;
    let ser = Regularizer::from_parts("map", sampler, None, loss);
    assert!(ser.head().is_none());
    let out = ser.forward(&x, &mut rng(5), |view| net.forward(view))?;
    let views = ser.sampler().sample_pair(&mut rng(5), 3)?;
    let map = |view: &Tensor| net.stem.forward(view)?.tanh();
    let (map1, map2) = (map(&views.first.apply(&x)?)?, map(&views.second.apply(&x)?)?);
    let relative = views.relative();
    let want = loss.forward(&MapPair::new([&map1, &map2], &relative))?;
    assert_eq!(scalar(&out.loss), scalar(&want.loss));
    assert!(scalar(&out.loss) > 0.0);
    let grads = out.loss.backward()?;
    for (name, var) in grad::named(&setup.vars, "ser") {
        assert!(grads.get(&var).is_none(), "{name}");
    }
    // Keys without heads.
    let keyed = ser.forward_with_keys(
        &x,
        &mut rng(5),
        |view| net.forward(view),
        |view| net.forward(view),
        None,
    )?;
    assert_eq!(scalar(&keyed.loss), scalar(&want.loss));
    Ok(())
}

/// That the views of `ser` are those of a sampler with `config`.
#[track_caller]
fn assert_draws(ser: &Regularizer, config: ViewConfig) -> Done {
    let sampler = ViewSampler::new(ser.sampler().grid(), config)?;
    for seed in 0..5 {
        let pair = |sampler: &ViewSampler| sampler.sample_pair(&mut rng(seed), 4);
        let (got, want) = (pair(ser.sampler())?, pair(&sampler)?);
        for (got, want) in [(&got.first, &want.first), (&got.second, &want.second)] {
            assert_eq!(got.elements(), want.elements());
            assert_eq!(got.grid(), want.grid());
        }
    }
    Ok(())
}

#[test]
fn the_usual_regularizer_has_turns_and_the_wide_head() -> Done {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = SerConfig::default();
    let ser = Regularizer::new("map", TokenGrid::square(4)?, WIDTH, config, vb.pp("ser"))?;
    assert_eq!(ser.layer(), "map");
    assert_draws(&ser, ViewConfig::default())?;
    assert_eq!(ser.loss().config(), &config);
    let shapes = grad::named(&vars, "").into_iter().map(|(name, var)| {
        let dims = var.dims().to_vec();
        (name, dims)
    });
    assert_eq!(
        shapes.collect::<Vec<_>>(),
        [
            ("ser.hidden.weight".to_string(), vec![512, WIDTH]),
            ("ser.norm.bias".to_string(), vec![WIDTH]),
            ("ser.norm.weight".to_string(), vec![WIDTH]),
            ("ser.out.weight".to_string(), vec![512, 512]),
        ]
    );
    let ser = ser.views(ViewConfig::paper())?;
    assert_draws(&ser, ViewConfig::paper())?;
    assert_eq!(ser.sampler().grid(), TokenGrid::square(4)?);

    let zeros = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    let grid = TokenGrid::square(4)?;
    let negative = SerConfig { lambda: -1.0, ..config };
    assert_says(Regularizer::new("map", grid, WIDTH, negative, zeros()), &["lambda"]);
    assert_says(Regularizer::new("map", grid, 0, config, zeros()), &["channels", "got 0"]);
    let bad = ViewConfig { area: (2.0, 1.0), ..ViewConfig::default() };
    let ser = Regularizer::new("map", grid, WIDTH, config, zeros())?;
    assert_says(ser.clone().views(bad), &["area"]);
    let mut ser = ser;
    assert_says(ser.set_lambda(f64::NAN), &["lambda"]);
    ser.set_lambda(0.25)?;
    assert_eq!(ser.loss().config().lambda, 0.25);
    Ok(())
}

#[test]
fn scaled_views_run_through_a_convolutional_model() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(3, 2));
    let ser =
        setup.regularizer(ViewConfig::default(), SerConfig::default()).views(ViewConfig::paper())?;
    let mut sides = Vec::new();
    for seed in 0..12 {
        let out = ser.forward(&x, &mut rng(seed), |view| {
            sides.push((view.dims()[2], view.dims()[3]));
            net.forward(view)
        })?;
        grad::assert_reaches(&out.loss, {
            let all = grad::named(&setup.vars, "").into_iter();
            all.filter(|(name, _)| !name.contains("late"))
        })?;
        assert!(out.anchors > 0);
    }
    sides.sort_unstable();
    sides.dedup();
    assert!(sides.len() > 3, "scales give views of several sizes: {sides:?}");
    assert!(sides.iter().all(|(h, w)| h % 2 == 0 && w % 2 == 0));
    // A grid that the model does not have is named.
    let sampler = ViewSampler::new(TokenGrid::square(2)?, ViewConfig::default())?;
    let wrong = Regularizer::from_parts("map", sampler, None, *ser.loss());
    assert_says(
        wrong.forward(&x, &mut rng(1), |view| net.forward(view)),
        &["(B, C, 2, 2)", "[3, 4, 4, 4]"],
    );
    Ok(())
}

#[test]
fn lambda_zero_runs_the_encoder_and_leaves_the_base_loss() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(3, 2));
    let mut ser = setup.regularizer(ViewConfig::default(), SerConfig::default());
    let one = ser.forward(&x, &mut rng(4), |view| net.forward(view))?;
    ser.set_lambda(0.0)?;
    net.calls();
    let out = ser.forward(&x, &mut rng(4), |view| net.forward(view))?;
    assert_eq!(net.calls(), (2, 0));
    assert_eq!(scalar(&out.loss), 0.0);
    assert!(!out.loss.track_op());
    assert_eq!(scalar(&out.unweighted), scalar(&one.unweighted));
    grad::assert_reaches(&out.unweighted, {
        let all = grad::named(&setup.vars, "").into_iter();
        all.filter(|(name, _)| !name.contains("late"))
    })?;
    Ok(())
}

/// A supervised network with batch norm before and behind the tap.
struct Supervised {
    conv: Conv2d,
    norm: BatchNorm,
    late_norm: BatchNorm,
    classes: Linear,
}

impl Supervised {
    fn new(vb: VarBuilder) -> Result<Self> {
        let config = Conv2dConfig { stride: 2, ..Default::default() };
        Ok(Self {
            // A bias would have no gradient under the norm.
            conv: conv2d_no_bias(2, WIDTH, 2, config, vb.pp("conv"))?,
            norm: batch_norm(WIDTH, 1e-5, vb.pp("norm"))?,
            late_norm: batch_norm(WIDTH, 1e-5, vb.pp("late_norm"))?,
            classes: candle_nn::linear(WIDTH, 3, vb.pp("classes"))?,
        })
    }

    /// The running means and variances, before and behind the tap.
    fn running(&self) -> [Vec<f64>; 2] {
        [&self.norm, &self.late_norm].map(|norm| {
            let mut all = flat(norm.running_mean());
            all.extend(flat(norm.running_var()));
            all
        })
    }
}

impl ModuleT for Supervised {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let map = self.norm.forward_t(&self.conv.forward(x)?, train)?.relu()?;
        tap::record("map", &map)?;
        let late = self.late_norm.forward_t(&map, train)?;
        self.classes.forward(&late.mean((2, 3))?)
    }
}

#[test]
fn batch_norm_moves_in_train_mode_alone_and_up_to_the_tap() -> Done {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let net = Supervised::new(vb.pp("net"))?;
    let head = Projector::new(WIDTH, small_head(), vb.pp("ser"))?;
    let sampler = ViewSampler::new(TokenGrid::square(4)?, ViewConfig::default())?;
    let loss = SerLoss::new(SerConfig::default())?;
    let ser = Regularizer::from_parts("map", sampler, Some(head), loss);
    let x = images(6, 2);

    let before = net.running();
    let out = ser.forward(&x, &mut rng(1), |view| net.forward_t(view, false))?;
    assert!(scalar(&out.loss).is_finite());
    assert_eq!(net.running(), before, "evaluation mode");
    let out = ser.forward(&x, &mut rng(1), |view| net.forward_t(view, true))?;
    let after = net.running();
    assert_ne!(after[0], before[0], "train mode");
    assert_eq!(after[1], before[1], "the norm behind the tap did not run");
    let reached = grad::named(&vars, "").into_iter();
    let reached =
        reached.filter(|(name, _)| !name.contains("late_norm") && !name.contains("classes"));
    grad::assert_reaches(&out.unweighted, reached)?;

    // The supervised loss of the upright images is the base loss.
    let labels = Tensor::new(&[0u32, 1, 2, 0, 1, 2], &Device::Cpu)?;
    let base = candle_nn::loss::cross_entropy(&net.forward_t(&x, true)?, &labels)?;
    let total = (base + out.loss)?;
    grad::assert_reaches(&total, grad::named(&vars, ""))?;
    Ok(())
}

#[test]
fn the_generator_decides_everything() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(4, 2));
    let capped = SerConfig { max_tokens: Some(9), ..Default::default() };
    for views in [ViewConfig::default(), cropped()] {
        let ser = setup.regularizer(views, capped);
        let run = |rng: &mut rand::rngs::StdRng| {
            scalar(&ser.forward(&x, rng, |view| net.forward(view)).unwrap().loss)
        };
        assert_eq!(run(&mut rng(3)), run(&mut rng(3)));
        assert_ne!(run(&mut rng(3)), run(&mut rng(4)));
        // A step moves the generator on.
        let rng = &mut rng(3);
        assert_ne!(run(rng), run(rng));
        // Both forms draw alike.
        let (a, b) = (&mut common::rng(5), &mut common::rng(5));
        ser.forward(&x, a, |view| net.forward(view))?;
        ser.forward_with_outputs(&x, b, |view| net.forward(view))?;
        assert_eq!(a.next_u64(), b.next_u64());
    }

    // The views are the images themselves, so that only the draw of tokens differs between two
    // calls.
    let still =
        ViewConfig { pairing: Pairing::Independent(Subgroup::Trivial), ..ViewConfig::default() };
    let noise = Cell::new(0);
    // Without noise the two maps would be equal.
    let encode = |view: &Tensor| {
        noise.set(noise.get() + 1);
        let seed = 10 + noise.get() % 2;
        net.forward(&(view + images(4, seed))?)
    };
    let losses = |config| -> ser_reg::Result<Vec<f64>> {
        let ser = setup.regularizer(still, config);
        let rng = &mut rng(6);
        let mut run = || Ok(scalar(&ser.forward(&x, rng, encode)?.loss));
        (0..3).map(|_| run()).collect()
    };
    let whole = losses(SerConfig::default())?;
    assert_eq!((whole[0], whole[1]), (whole[1], whole[2]));
    let drawn = losses(capped)?;
    assert!(drawn[0] != drawn[1] && drawn[1] != drawn[2], "{drawn:?}");
    Ok(())
}

#[test]
fn views_without_overlap_are_an_error_of_their_own() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(2, 2));
    let tiny = ViewConfig {
        crop: Some(CropRange { area: (0.01, 0.02), ..CropRange::default() }),
        ..ViewConfig::default()
    };
    let ser = setup.regularizer(tiny, with_objective(Objective::Mse));
    let mut apart = 0;
    for seed in 0..20 {
        match ser.forward(&x, &mut rng(seed), |view| net.forward(view)) {
            Ok(out) => assert!(out.anchors > 0),
            Err(Error::NoOverlap { images }) => {
                assert_eq!(images, 2);
                apart += 1;
            }
            Err(e) => return Err(e),
        }
    }
    assert!(apart > 0, "the test needs views without overlap");
    // In the paper's form too.
    let seed =
        (0..20).find(|&seed| ser.forward(&x, &mut rng(seed), |view| net.forward(view)).is_err());
    let again = ser.forward_with_outputs(&x, &mut rng(seed.unwrap()), |view| net.forward(view));
    assert!(matches!(again, Err(Error::NoOverlap { images: 2 })));
    Ok(())
}

#[test]
fn errors_are_named() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(3, 2));
    let ser = setup.regularizer(ViewConfig::default(), SerConfig::default());
    let run = |x: &Tensor| ser.forward(x, &mut rng(1), |view| net.forward(view));
    let scalar = Tensor::new(1f64, &Device::Cpu)?;
    for (x, parts) in [
        (scalar, &["Regularizer", "images (B, C, H, W)"][..]),
        (x.flatten_from(1)?, &["View::apply", "[3, 128]"]),
        (x.narrow(0, 0, 0)?, &["at least one"]),
        (x.narrow(0, 0, 1)?, &["at least two images", "got 1"]),
    ] {
        assert_says(run(&x), parts);
    }
    // An error of the model comes as it is.
    let fails =
        ser.forward(&x, &mut rng(1), |_| -> Result<()> { Err(candle_core::Error::msg("mine")) });
    assert_says(fails, &["mine"]);
    // A layer that the model does not record.
    let silent = ser.forward(&x, &mut rng(1), |view| view.sqr());
    assert_says(silent, &["layer `map`", "got no record"]);
    let loss = SerLoss::new(SerConfig::default())?;
    let other = Regularizer::from_parts("block3", *ser.sampler(), None, loss);
    let missing = other.forward_with_outputs(&x, &mut rng(1), |view| net.forward(view));
    assert_says(missing, &["layer `block3`", "got `map`"]);
    // Inside `forward_with_outputs` a layer that is recorded twice is ambiguous.
    let twice = ser.forward_with_outputs(&x, &mut rng(1), |view| {
        net.forward(view)?;
        net.forward(view)
    });
    assert_says(twice, &["`map`", "more than once"]);
    let head = Projector::new(7, small_head(), VarBuilder::zeros(DType::F64, &Device::Cpu))?;
    let wide = Regularizer::from_parts("map", *ser.sampler(), Some(head), loss);
    let refused = wide.forward(&x, &mut rng(1), |view| net.forward(view));
    assert_says(refused, &["maps of 7 channels, as the head", "got 4"]);
    Ok(())
}

/// SER inside the capture of another forward pass leaves that capture alone.
#[test]
fn a_regularizer_inside_a_capture_keeps_its_records() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(3, 2));
    let ser = setup.regularizer(ViewConfig::default(), SerConfig::default());
    let alone = tap::capture_until("map", || net.forward(&x))?;
    let (out, map) = tap::capture("map", || {
        let out = ser.forward(&x, &mut rng(1), |view| net.forward(view))?;
        net.forward(&x)?;
        Ok(out)
    })?;
    assert_eq!(flat(&map), flat(&alone));
    assert!(out.anchors > 0);
    Ok(())
}

/// A training step lowers the loss.
#[test]
fn gradient_steps_lower_the_loss() -> Done {
    let setup = Setup::new(1);
    let (net, x) = (&setup.net, images(4, 2));
    let ser = setup.regularizer(ViewConfig::default(), with_objective(nt_xent_at(0.3)));
    let run = || ser.forward(&x, &mut rng(1), |view| net.forward(view));
    let first = scalar(&run()?.loss);
    let vars: Vec<Var> = setup.vars.all_vars();
    for _ in 0..20 {
        let grads = run()?.loss.backward()?;
        for var in &vars {
            if let Some(grad) = grads.get(var) {
                var.set(&(var.as_tensor() - (grad * 0.1)?)?)?;
            }
        }
    }
    let last = scalar(&run()?.loss);
    assert!(last < 0.95 * first, "{first}, then {last}");
    Ok(())
}

/// The two commonest mistakes are named by what the user passed: the grid, and scaled views.
#[test]
fn a_wrong_grid_and_a_scaled_view_are_named() {
    let images = Tensor::ones((2, 3, 24, 24), DType::F32, &Device::Cpu).unwrap();
    let loss = SerLoss::new(SerConfig::default()).unwrap();
    let build = |side, config| {
        let sampler = ViewSampler::new(TokenGrid::square(side).unwrap(), config).unwrap();
        Regularizer::from_parts("stage1", sampler, None, loss)
    };
    let pooled = |x: &Tensor| tap::record("stage1", &x.avg_pool2d(4)?);
    let wrong = build(8, ViewConfig::default());
    let message = wrong.forward(&images, &mut rng(0), pooled).unwrap_err().to_string();
    for part in ["layer `stage1`", "the grid 8x8 of Regularizer::new", "[2, 3, 6, 6]"] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }

    let area = ViewConfig { area: (4.0, 4.0), ..ViewConfig::default() };
    let fixed = |x: &Tensor| x.reshape((2, 3, 24, 24))?.avg_pool2d(4);
    let message = build(6, area).forward(&images, &mut rng(0), fixed).unwrap_err().to_string();
    for part in ["the view has 48x48 pixels, the images 24x24", "ViewConfig scales the views"] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}
