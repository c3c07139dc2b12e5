//! The examples' optimizer, clipping, heads and losses: against candle's own, central differences and closed forms.

#[path = "../examples/common/mod.rs"]
mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{Optimizer, ParamsAdamW};
use common::optimizer::AdamW;
use rand::{Rng, SeedableRng, rngs::StdRng};

const CPU: Device = Device::Cpu;
const BETAS: (f64, f64) = (0.9, 0.999);

fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-2.0..2.0))
        .collect();
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
        assert!(
            (a - b).abs() <= tolerance * (1.0 + a.abs()),
            "value {i}: {a}, {b}"
        );
    }
}

/// A matrix of more than one piece of work, a vector, and a token embedding.
fn parameters(dtype: DType) -> Vec<(String, Var)> {
    [
        ("matrix", vec![300, 70]),
        ("vector", vec![9]),
        ("token", vec![1, 1, 5]),
    ]
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
        let x = if var.rank() == 2 {
            var.t().unwrap()
        } else {
            var.as_tensor().clone()
        };
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
        let params = |weight_decay| ParamsAdamW {
            weight_decay,
            ..Default::default()
        };
        let part =
            |range: std::ops::Range<usize>| theirs[range].iter().map(|p| p.1.clone()).collect();
        let mut matrices = candle_nn::AdamW::new(part(0..1), params(0.0)).unwrap();
        let mut vectors = candle_nn::AdamW::new(part(1..3), params(0.0)).unwrap();
        for step in 0..5 {
            let (rate, decay) = (1e-2 / (step + 1) as f64, 0.05 * step as f64);
            adamw
                .step(&gradients(&ours, step, ""), rate, decay)
                .unwrap();
            let grads = gradients(&theirs, step, "");
            matrices.set_params(ParamsAdamW {
                lr: rate,
                ..params(decay)
            });
            vectors.set_params(ParamsAdamW {
                lr: rate,
                ..params(0.0)
            });
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
            adamw
                .step(&gradients(&named, step, skip), 1e-2, 0.1)
                .unwrap();
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
        adamw
            .step(&gradients(&named, step, "vector"), 1e-2, 0.1)
            .unwrap();
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
    state.insert(
        "vector.first".into(),
        Tensor::zeros(8, DType::F32, &CPU).unwrap(),
    );
    let error = adamw.restore(&state).unwrap_err().to_string();
    assert!(
        error.contains("vector.first: expected [9] of F32, got [8]"),
        "{error}"
    );
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
