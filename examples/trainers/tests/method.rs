//! The examples' optimizer, clipping, heads and losses: against candle's own, central differences and closed forms.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg_trainers::{
    clip::{clip, clip_each, freeze},
    method::{
        Head, HeadConfig, barlow,
        dino::{self, DinoHead, Entropies},
        moco::{self, Widths},
    },
    optimizer::AdamW,
    weights::Weights,
};

const CPU: Device = Device::Cpu;
const BETAS: (f64, f64) = (0.9, 0.999);

fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> =
        (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    let tensor = Tensor::from_vec(values, shape, &CPU).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims());
    for (i, (a, b)) in values(a).into_iter().zip(values(b)).enumerate() {
        // not `>`: a NaN must fail
        assert!((a - b).abs() <= tolerance * (1.0 + a.abs()), "value {i}: {a}, {b}");
    }
}

/// A matrix of more than one piece of work, a vector, and a token embedding.
fn parameters(dtype: DType) -> Vec<(String, Var)> {
    [("matrix", vec![300, 70]), ("vector", vec![9]), ("token", vec![1, 1, 5])]
        .into_iter()
        .zip(0..)
        .map(|((name, shape), seed)| {
            let var = Var::from_tensor(&random(&shape, dtype, seed)).unwrap();
            (name.to_string(), var)
        })
        .collect()
}

/// Gradients of a function that pulls each parameter elsewhere at each step; the matrix enters transposed, so that its
/// gradient is not contiguous.
fn gradients(named: &[(String, Var)], step: u64, skip: &str) -> GradStore {
    let mut loss = Tensor::new(0f64, &CPU).unwrap();
    for (i, (name, var)) in named.iter().enumerate() {
        if name == skip {
            continue;
        }
        let x = if var.rank() == 2 { var.t().unwrap() } else { var.as_tensor().clone() };
        let pull = random(x.dims(), x.dtype(), 100 + 10 * step + i as u64);
        // A product of the parameter with itself, so that its gradient hangs on the graph.
        let term = ((&x * pull).unwrap().sin().unwrap() * &x).unwrap();
        let term = term.sum_all().unwrap();
        loss = (loss + term.to_dtype(DType::F64).unwrap()).unwrap();
    }
    loss.backward().unwrap()
}

#[test]
fn adamw_is_that_of_candle() {
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F64, 1e-13)] {
        let (ours, theirs) = (parameters(dtype), parameters(dtype));
        let mut adamw = AdamW::new(&ours, BETAS, 1e-8).unwrap();
        // Matrices with decay, vectors without.
        let params = |weight_decay| ParamsAdamW { weight_decay, ..Default::default() };
        let part =
            |range: std::ops::Range<usize>| theirs[range].iter().map(|p| p.1.clone()).collect();
        let mut matrices = candle_nn::AdamW::new(part(0..1), params(0.0)).unwrap();
        let mut vectors = candle_nn::AdamW::new(part(1..3), params(0.0)).unwrap();
        for step in 0..5 {
            let (rate, decay) = (1e-2 / (step + 1) as f64, 0.05 * step as f64);
            adamw.step(&gradients(&ours, step, ""), rate, decay).unwrap();
            let grads = gradients(&theirs, step, "");
            matrices.set_params(ParamsAdamW { lr: rate, ..params(decay) });
            vectors.set_params(ParamsAdamW { lr: rate, ..params(0.0) });
            matrices.step(&grads).unwrap();
            vectors.step(&grads).unwrap();
        }
        for ((name, a), (_, b)) in ours.iter().zip(&theirs) {
            println!("{name}");
            assert_close(a, b, tolerance);
        }
    }
}

#[test]
fn a_restored_adamw_goes_on_bit_for_bit() {
    let run = |break_at: Option<u64>| {
        let mut saved = None;
        let named = parameters(DType::F32);
        let mut adamw = AdamW::new(&named, BETAS, 1e-8).unwrap();
        for step in 0..6 {
            if break_at == Some(step) {
                let state: HashMap<_, _> = adamw.state().unwrap().into_iter().collect();
                // The old optimizer goes on over other variables: it must not reach into what it gave away.
                adamw.step(&gradients(&named, 77, ""), 0.0, 0.0).unwrap();
                adamw = AdamW::new(&named, BETAS, 1e-8).unwrap();
                adamw.restore(&state).unwrap();
                saved = Some((values(&state["matrix.first"]), state));
            }
            // One parameter joins late, so that counters differ.
            let skip = if step < 2 { "vector" } else { "" };
            adamw.step(&gradients(&named, step, skip), 1e-2, 0.1).unwrap();
        }
        if let Some((first, state)) = saved {
            assert!(first == values(&state["matrix.first"]), "the copy changed");
        }
        let weights = named.iter().map(|(_, var)| values(var));
        let state = adamw.state().unwrap();
        let state = state.iter().map(|(_, t)| values(t));
        weights.chain(state).collect::<Vec<_>>()
    };
    let whole = run(None);
    for step in [1, 3] {
        assert!(whole == run(Some(step)), "broken at {step}");
    }
}

#[test]
fn adamw_leaves_parameters_without_gradient_alone() {
    let named = parameters(DType::F32);
    let before = values(&named[1].1);
    let mut adamw = AdamW::new(&named, BETAS, 1e-8).unwrap();
    for step in 0..3 {
        adamw.step(&gradients(&named, step, "vector"), 1e-2, 0.1).unwrap();
    }
    assert_eq!(values(&named[1].1), before);
    let state: HashMap<_, _> = adamw.state().unwrap().into_iter().collect();
    assert_eq!(values(&state["vector.second"]), [0.0; 9]);
    assert_eq!(values(&state["vector.steps"]), [0.0]);
    assert_eq!(values(&state["matrix.steps"]), [3.0]);
    // Its first step is that of a new parameter: one learning rate along the sign of the gradient.
    adamw.step(&gradients(&named, 3, ""), 1e-2, 0.1).unwrap();
    for (a, b) in values(&named[1].1).into_iter().zip(before) {
        assert!(((a - b).abs() - 1e-2).abs() < 1e-6, "{a} {b}");
    }
}

#[test]
fn a_state_of_other_parameters_is_refused() {
    let named = parameters(DType::F32);
    let mut adamw = AdamW::new(&named, BETAS, 1e-8).unwrap();
    let mut state: HashMap<_, _> = adamw.state().unwrap().into_iter().collect();
    state.insert("vector.first".into(), Tensor::zeros(8, DType::F32, &CPU).unwrap());
    let error = adamw.restore(&state).unwrap_err().to_string();
    assert!(error.contains("vector.first: expected [9] of F32, got [8]"), "{error}");
    state.remove("vector.first");
    let error = adamw.restore(&state).unwrap_err().to_string();
    assert!(error.contains("expected vector.first"), "{error}");
}

#[test]
fn the_fused_adamw_rounds_as_the_plain_one() {
    let run = |fused| {
        let named = parameters(DType::F32);
        let mut adamw = AdamW::new(&named, BETAS, 1e-8).unwrap();
        adamw.fused = fused;
        for step in 0..4 {
            adamw.step(&gradients(&named, step, ""), 1e-2, 0.1).unwrap();
        }
        // A moment with a graph would keep every step in memory.
        assert!(adamw.state().unwrap().iter().all(|(_, t)| !t.track_op()));
        let weights = named.iter().map(|(_, var)| values(var));
        weights.collect::<Vec<_>>()
    };
    assert!(run(true) == run(false));
}

/// The joint norm of all gradients, by the definition.
fn norm(named: &[(String, Var)], grads: &GradStore) -> f64 {
    let all = named.iter().filter_map(|(_, var)| grads.get(var));
    let squares = all.flat_map(values).map(|g| g * g);
    squares.sum::<f64>().sqrt()
}

#[test]
fn clipping_shrinks_all_gradients_by_one_factor() {
    for dtype in [DType::F32, DType::F64] {
        let named = parameters(dtype);
        let mut grads = gradients(&named, 0, "vector");
        let before: Vec<_> = [0, 2].map(|i| values(grads.get(&named[i].1).unwrap())).into();
        let want = norm(&named, &grads);
        // Large enough: nothing changes, to the bit.
        let got = clip(&named, &mut grads, 2.0 * want).unwrap();
        assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
        assert!(before[0] == values(grads.get(&named[0].1).unwrap()));

        assert_eq!(clip(&named, &mut grads, 0.5).unwrap(), got);
        assert!((norm(&named, &grads) - 0.5).abs() < 1e-6);
        assert!(grads.get(&named[1].1).is_none());
        for (before, i) in before.iter().zip([0, 2]) {
            let after = values(grads.get(&named[i].1).unwrap());
            for (b, a) in before.iter().zip(after) {
                assert!((b * 0.5 / want - a).abs() < 1e-7, "{b} {a}");
            }
        }
    }
}

#[test]
fn each_gradient_may_have_the_bound_for_itself() {
    let named = parameters(DType::F32);
    let mut grads = gradients(&named, 0, "");
    let joint = norm(&named, &grads);
    let own: Vec<f64> = named.iter().map(|p| norm(std::slice::from_ref(p), &grads)).collect();
    let mut sorted = own.clone();
    sorted.sort_by(f64::total_cmp);
    let bound = (sorted[0] + sorted[1]) / 2.0;
    assert!((clip_each(&named, &mut grads, bound).unwrap() - joint).abs() < 1e-6);
    for (parameter, before) in named.iter().zip(own) {
        let after = norm(std::slice::from_ref(parameter), &grads);
        assert!((after - before.min(bound)).abs() < 1e-6, "{}", parameter.0);
    }
}

#[test]
fn a_gradient_that_two_parameters_share_is_clipped_once() {
    let named = ["a", "b"].map(|n| (n.to_string(), Var::zeros(4, DType::F32, &CPU).unwrap()));
    let sum = (named[0].1.as_tensor() + named[1].1.as_tensor()).unwrap();
    let mut grads = (sum.sum_all().unwrap() * 3.0).unwrap().backward().unwrap();
    let before = clip(&named, &mut grads, 1.0).unwrap();
    assert!((before - 72f64.sqrt()).abs() < 1e-6, "{before}");
    assert!((norm(&named, &grads) - 1.0).abs() < 1e-6);
}

#[test]
fn clipping_names_gradients_that_are_not_finite() {
    let named = parameters(DType::F32);
    let mut grads = gradients(&named, 0, "");
    let bad = [1f32, f32::NAN, 0., 0., 0., 0., 0., 0., 0.];
    grads.insert(&named[1].1, Tensor::new(&bad, &CPU).unwrap());
    let before = values(grads.get(&named[0].1).unwrap());
    let error = clip(&named, &mut grads, 1e-3).unwrap_err().to_string();
    assert!(error.ends_with("others at: vector"), "{error}");
    assert!(before == values(grads.get(&named[0].1).unwrap()));
    let error = clip(&named, &mut grads, 0.0).unwrap_err().to_string();
    assert!(error.contains("expected a positive norm"), "{error}");
}

#[test]
fn frozen_parameters_get_no_gradient() {
    let named = parameters(DType::F32);
    let mut grads = gradients(&named, 0, "");
    freeze(&named, &mut grads, "vec").unwrap();
    let present = named.iter().map(|(_, var)| grads.get(var).is_some());
    assert_eq!(present.collect::<Vec<_>>(), [true, false, true]);
    let error = freeze(&named, &mut grads, "head.").unwrap_err().to_string();
    assert!(error.contains("begin with head., got none"), "{error}");
}

/// A module in `f64` and every variable. Seeded, for differences across a kink of ReLU tell nothing, and among random
/// weights some lie that near to one.
fn build<M>(make: impl Fn(VarBuilder) -> candle_core::Result<M>) -> (M, Vec<Var>) {
    let weights = Weights::seeded(50);
    let backend = Box::new(weights.clone());
    let module = make(VarBuilder::from_backend(backend, DType::F64, CPU)).unwrap();
    let vars: Vec<_> = weights.named().into_iter().map(|(_, var)| var).collect();
    // away from the initial values, where shifts are 0 and gains 1
    for (var, seed) in vars.iter().zip(50..) {
        let noise = (random(var.dims(), DType::F64, seed) * 0.3).unwrap();
        var.set(&(var.as_detached_tensor() + noise).unwrap()).unwrap();
    }
    (module, vars)
}

/// The gradient of `loss` with respect to every value of `vars`, against central differences.
#[track_caller]
fn assert_gradients(vars: &[Var], loss: impl Fn() -> candle_core::Result<Tensor>) {
    let grads = loss().unwrap().backward().unwrap();
    let number = || loss().unwrap().to_scalar::<f64>().unwrap();
    for (v, var) in vars.iter().enumerate() {
        let got = values(grads.get(var).unwrap_or_else(|| panic!("variable {v}: none")));
        let start = values(var);
        let set = |at: usize, value: f64| {
            let mut moved = start.clone();
            moved[at] = value;
            var.set(&Tensor::from_vec(moved, var.shape(), &CPU).unwrap()).unwrap();
        };
        for (i, got) in got.into_iter().enumerate() {
            let h = 1e-5;
            set(i, start[i] + h);
            let up = number();
            set(i, start[i] - h);
            let down = number();
            set(i, start[i]);
            let want = (up - down) / (2.0 * h);
            assert!(
                (got - want).abs() < 1e-6 * (1.0 + want.abs()),
                "variable {v}, value {i}: {got}, by differences {want}"
            );
        }
    }
}

/// Features of two views.
fn features(width: usize) -> [Var; 2] {
    [7, 8].map(|seed| Var::from_tensor(&random(&[6, width], DType::F64, seed)).unwrap())
}

#[test]
fn gradients_of_moco() {
    let widths = Widths { hidden: 5, out: 4 };
    let (heads, mut vars) = build(|vb| {
        let projector = moco::projector(3, widths, vb.pp("projector"))?;
        Ok((projector, moco::predictor(widths, vb.pp("predictor"))?))
    });
    let [x1, x2] = features(3);
    vars.extend([x1.clone(), x2.clone()]);
    let keys = [9, 10].map(|seed| random(&[6, 4], DType::F64, seed));
    assert_gradients(&vars, || {
        let query = |x| heads.1.forward(&heads.0.forward(x)?);
        moco::contrast(&query(&x1)?, &keys[1], 0, 0.2)?
            + moco::contrast(&query(&x2)?, &keys[0], 0, 0.2)?
    });
}

#[test]
fn gradients_of_dino() {
    for (config, learned_gain) in
        [(HeadConfig::batch_norm(&[3, 5, 4]), false), (HeadConfig::gelu(&[3, 5, 4]), true)]
    {
        let (head, mut vars) = build(|vb| DinoHead::new(&config, 7, learned_gain, vb));
        let [x1, x2] = features(3);
        vars.extend([x1.clone(), x2.clone()]);
        let teacher = random(&[12, 7], DType::F64, 9);
        let center = random(&[1, 7], DType::F64, 10);
        let targets = dino::targets(&teacher, &center, 0.3).unwrap();
        let targets = targets.chunk(2, 0).unwrap();
        assert_gradients(&vars, || {
            dino::loss(&[head.forward(&x1)?, head.forward(&x2)?], &targets, 0.2)
        });
    }
}

#[test]
fn gradients_of_barlow_twins() {
    let config = HeadConfig::batch_norm(&[3, 5, 4]);
    let (head, mut vars) = build(|vb| Head::new(&config, vb));
    let [x1, x2] = features(3);
    vars.extend([x1.clone(), x2.clone()]);
    assert_gradients(&vars, || barlow::loss(&head.forward(&x1)?, &head.forward(&x2)?, 0.05, 0.5));
}

#[test]
fn heads_hold_what_their_configuration_says() {
    let shapes = |make: &dyn Fn(VarBuilder)| -> Vec<(String, Vec<usize>)> {
        let weights = Weights::seeded(0);
        make(weights.builder(&CPU));
        let named = weights.named();
        named.into_iter().map(|(n, v)| (n, v.dims().to_vec())).collect()
    };
    let want = |list: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> {
        list.iter().map(|(n, d)| (n.to_string(), d.to_vec())).collect()
    };
    assert_eq!(
        shapes(&|vb| drop(moco::projector(64, Widths::SMALL, vb).unwrap())),
        want(&[
            ("layer1.weight", &[64, 512]),
            ("layer1.norm.scale", &[512]),
            ("layer1.norm.shift", &[512]),
            ("layer2.weight", &[512, 512]),
            ("layer2.norm.scale", &[512]),
            ("layer2.norm.shift", &[512]),
            ("layer3.weight", &[512, 64]),
        ])
    );
    let config = HeadConfig::gelu(&[6, 5, 4]);
    assert_eq!(
        shapes(&|vb| drop(DinoHead::new(&config, 9, true, vb).unwrap())),
        want(&[
            ("mlp.layer1.weight", &[6, 5]),
            ("mlp.layer1.bias", &[5]),
            ("mlp.layer2.weight", &[5, 4]),
            ("mlp.layer2.bias", &[4]),
            ("prototypes.weight", &[9, 4]),
            ("prototypes.gain", &[9]),
        ])
    );
    let error = Head::new(&HeadConfig::gelu(&[3]), Weights::seeded(0).builder(&CPU));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("at least two widths, got [3]"), "{error}");
}

#[test]
fn a_head_normalises_where_it_is_told() {
    let weights = Weights::seeded(0);
    let x = random(&[8, 3], DType::F32, 0);
    let mean = |x: &Tensor| x.mean(0).unwrap();
    let with = HeadConfig::batch_norm(&[3, 6, 4]).with_last_norm();
    let y = Head::new(&with, weights.builder(&CPU).pp("a")).unwrap().forward(&x).unwrap();
    assert_close(&mean(&y), &Tensor::zeros(4, DType::F32, &CPU).unwrap(), 1e-5);
    assert_close(&mean(&y.sqr().unwrap()), &Tensor::ones(4, DType::F32, &CPU).unwrap(), 1e-3);
    // The last map has no activation: without a norm, doubling its weights doubles the output.
    let plain = Head::new(&HeadConfig::gelu(&[3, 6, 4]), weights.builder(&CPU).pp("b")).unwrap();
    let y = plain.forward(&x).unwrap();
    assert!(values(&y).iter().any(|&v| v < 0.0));
    // And its rows do not see each other.
    let first = plain.forward(&x.narrow(0, 0, 2).unwrap()).unwrap();
    assert_close(&first, &y.narrow(0, 0, 2).unwrap(), 1e-6);
}

#[test]
fn prototypes_count_by_direction() {
    let config = HeadConfig::gelu(&[3, 5, 4]);
    let weights = Weights::seeded(0);
    let head = DinoHead::new(&config, 7, true, weights.builder(&CPU)).unwrap();
    let x = random(&[6, 3], DType::F32, 0);
    let before = head.forward(&x).unwrap();
    assert!(values(&before).iter().all(|c| c.abs() <= 1.0 + 1e-6));
    let scale = |name: &str| {
        let named = weights.named();
        let var = &named.iter().find(|(n, _)| n == name).unwrap().1;
        var.set(&(var.as_detached_tensor() * 3.0).unwrap()).unwrap();
    };
    scale("prototypes.weight");
    assert_close(&before, &head.forward(&x).unwrap(), 1e-5);
    scale("prototypes.gain");
    assert_close(&(before * 3.0).unwrap(), &head.forward(&x).unwrap(), 1e-5);
}

#[test]
fn entropies_tell_both_collapses_apart() {
    let of = |rows: &Tensor| Entropies::of(rows).unwrap();
    let is = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got}, not {want}");
    let full = 4f64.ln();
    let uniform = of(&Tensor::full(0.25f32, (6, 4), &CPU).unwrap());
    is(uniform.each, full);
    is(uniform.mean, full);
    let one = of(&Tensor::new(&[[0f32, 1., 0., 0.]; 3], &CPU).unwrap());
    is(one.each, 0.0);
    is(one.mean, 0.0);
    let healthy = of(&Tensor::eye(4, DType::F32, &CPU).unwrap());
    is(healthy.each, 0.0);
    is(healthy.mean, full);
}

#[test]
fn a_student_that_agrees_with_its_teacher_does_not_diverge() {
    let scores = [0, 1].map(|seed| random(&[5, 6], DType::F64, seed));
    let center = Tensor::zeros((1, 6), DType::F64, &CPU).unwrap();
    let targets = scores.each_ref().map(|s| dino::targets(s, &center, 0.5).unwrap());
    let entropies = Entropies::of(&Tensor::cat(&targets, 0).unwrap()).unwrap();
    let loss = |students: &[Tensor]| -> f64 {
        dino::loss(students, &targets, 0.5).unwrap().to_scalar().unwrap()
    };
    let [a, b] = scores.clone();
    // Each view of the student must give what the teacher gives for the other one.
    assert!(entropies.divergence(loss(&[b.clone(), a.clone()])).abs() < 1e-12);
    assert!(entropies.divergence(loss(&[a.clone(), b])) > 0.1);
    let error = dino::loss(&[a], &targets, 0.5).unwrap_err().to_string();
    assert!(error.contains("got 1 and 2"), "{error}");
}

#[test]
fn barlow_twins_is_zero_for_independent_features() {
    let hadamard = [[1f32, 1., 1.], [1., -1., -1.], [-1., 1., -1.], [-1., -1., 1.]];
    let z = Tensor::new(&hadamard, &CPU).unwrap();
    let loss = |z1: &Tensor, z2: &Tensor| -> f32 {
        barlow::loss(z1, z2, 0.1, 1.0).unwrap().to_scalar().unwrap()
    };
    assert!(loss(&z, &(&z * 5.0).unwrap()) < 1e-4);
    // Opposite: (1 + 1)² for each of three features.
    assert!((loss(&z, &z.neg().unwrap()) - 12.0).abs() < 1e-3);
    // All features the same: 6 pairs of correlation 1.
    let same = z.narrow(1, 0, 1).unwrap().repeat((1, 3)).unwrap();
    assert!((loss(&same, &same) - 0.6).abs() < 1e-3);
}
