//! `assert_reaches` on the layers of candle-nn 0.11.1 without a backward pass, on their
//! differentiable forms, and on buffers.

use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Init, LayerNorm, RmsNorm, VarBuilder, VarMap, linear, ops, rotary_emb};
use ser_reg::{Error, grad};

const CPU: &Device = &Device::Cpu;

/// A linear layer, then `tail`, then a loss on its output; and the variables before the tail.
fn loss(tail: impl Fn(&Tensor) -> Result<Tensor>) -> (Tensor, VarMap) {
    let vars = VarMap::new();
    let layer = linear(4, 4, VarBuilder::from_varmap(&vars, DType::F32, CPU).pp("fc")).unwrap();
    let x = Tensor::new(&[[1f32, -2., 3., 5.], [0., 1., 4., -1.]], CPU).unwrap();
    let y = tail(&layer.forward(&x).unwrap()).unwrap();
    // Cubed: a sum of squares is constant behind a norm, so that its gradient would be near zero.
    (y.powf(3.).unwrap().mean_all().unwrap(), vars)
}

fn unreached(tail: impl Fn(&Tensor) -> Result<Tensor>) -> Vec<String> {
    let (loss, vars) = loss(tail);
    grad::unreached(&loss, grad::named(&vars, "")).unwrap()
}

fn layer_norm() -> LayerNorm {
    let (weight, bias) = (Tensor::ones(4, DType::F32, CPU), Tensor::zeros(4, DType::F32, CPU));
    LayerNorm::new(weight.unwrap(), bias.unwrap(), 1e-5)
}

#[test]
fn layers_of_candle_nn_that_cut_the_graph_are_caught() {
    let rms = RmsNorm::new(Tensor::ones(4, DType::F32, CPU).unwrap(), 1e-5);
    let cut = ["fc.bias", "fc.weight"];
    assert_eq!(unreached(|x| layer_norm().forward(x)), cut);
    assert_eq!(unreached(|x| rms.forward(x)), cut);
    assert_eq!(unreached(ops::softmax_last_dim), cut);
}

#[test]
fn their_differentiable_forms_pass() {
    let (one, zero) = (layer_norm().weight().clone(), layer_norm().bias().unwrap().clone());
    assert!(unreached(|x| ops::layer_norm_slow(x, &one, &zero, 1e-5)).is_empty());
    assert!(unreached(|x| ops::rms_norm_slow(x, &one, 1e-5)).is_empty());
    assert!(unreached(|x| ops::softmax(x, D::Minus1)).is_empty());
}

#[test]
fn layer_norm_cuts_contiguous_input_only() {
    // So a channels-first model may train where the same model with channels last does not.
    let permuted = |x: &Tensor| layer_norm().forward(&x.t()?.contiguous()?.t()?);
    assert!(unreached(permuted).is_empty());
}

/// The table of docs/integrate-your-model.md. Check it with each release of candle.
#[test]
fn the_table_of_the_guide_holds_for_candle() {
    let rope = |slow: bool| {
        let (cos, sin) =
            (Tensor::ones((2, 1), DType::F32, CPU)?, Tensor::ones((2, 1), DType::F32, CPU)?);
        let rope = if slow { rotary_emb::rope_slow } else { rotary_emb::rope };
        let x = Var::ones((1, 1, 2, 2), DType::F32, CPU)?;
        let loss = rope(&x, &cos, &sin)?.sqr()?.sum_all()?;
        Result::Ok(grad::unreached(&loss, [("x", x)])?.is_empty())
    };
    assert_eq!((rope(false).unwrap(), rope(true).unwrap()), (false, true));
    let rms = RmsNorm::new(Tensor::ones(4, DType::F32, CPU).unwrap(), 1e-5);
    assert!(unreached(|x| rms.forward_diff(x)).is_empty());
    let no_bias = LayerNorm::new_no_bias(layer_norm().weight().clone(), 1e-5);
    assert!(unreached(|x| no_bias.forward(x)).is_empty());

    let backward = |op: fn(&Tensor) -> Result<Tensor>| {
        let x = Var::ones((1, 1, 6, 6), DType::F32, CPU).unwrap();
        op(&x).unwrap().sum_all().unwrap().backward().map(|_| ())
    };
    backward(|x| x.upsample_bilinear2d(12, 12, false)).unwrap_err();
    backward(|x| x.upsample_nearest2d(9, 9)).unwrap_err();
    backward(|x| x.avg_pool2d_with_stride(2, 1)).unwrap_err();
    backward(|x| x.max_pool2d_with_stride(2, 1)).unwrap_err();
    backward(|x| x.upsample_nearest2d(12, 12)).unwrap();
    backward(|x| x.avg_pool2d(2)).unwrap();
}

#[test]
fn a_cut_norm_still_passes_what_goes_around_it() {
    // With a skip connection only the scale and shift of the norm are missed, but the gradient is
    // biased.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
    let fc = linear(4, 4, vb.pp("fc")).unwrap();
    let norm = candle_nn::layer_norm(4, 1e-5, vb.pp("norm")).unwrap();
    let x = fc.forward(&Tensor::ones((2, 4), DType::F32, CPU).unwrap()).unwrap();
    let y = (&x + norm.forward(&x).unwrap()).unwrap();
    let loss = y.sqr().unwrap().mean_all().unwrap();
    let missed = grad::unreached(&loss, grad::named(&vars, "")).unwrap();
    assert_eq!(missed, ["norm.bias", "norm.weight"]);
}

#[test]
fn a_detached_branch_is_reported() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
    let x = Tensor::ones((2, 4), DType::F32, CPU).unwrap();
    let q = linear(4, 4, vb.pp("query")).unwrap().forward(&x).unwrap();
    let k = linear(4, 4, vb.pp("key")).unwrap().forward(&x).unwrap();
    let loss = (q - k.detach()).unwrap().sqr().unwrap().mean_all().unwrap();
    grad::assert_reaches(&loss, grad::named(&vars, "query")).unwrap();
    let error = grad::assert_reaches(&loss, grad::named(&vars, "")).unwrap_err();
    let Error::Unreached { absent, zero, not_finite, total } = &error else {
        panic!("{error}");
    };
    assert_eq!(absent, &["key.bias", "key.weight"]);
    assert!(zero.is_empty() && not_finite.is_empty());
    assert_eq!(*total, 4);
    let text = error.to_string();
    assert!(
        text.contains("2 of 4") && text.contains("no gradient at: key.bias, key.weight"),
        "{text}"
    );
}

#[test]
fn absent_zero_and_not_finite_are_distinguished() {
    let var = |x: f32| Var::new(&[x, 1.], CPU).unwrap();
    let (fine, absent, zero, nan, inf) = (var(1.), var(1.), var(1.), var(-1.), var(0.));
    let term = |x: Result<Tensor>| x.unwrap().sum_all().unwrap();
    let loss = [
        term(fine.sqr()),
        term(zero.mul(&zero.zeros_like().unwrap())),
        term(nan.sqrt()),
        term(inf.sqrt()),
    ];
    let loss = Tensor::stack(&loss, 0).unwrap().sum_all().unwrap();
    let vars =
        [("fine", &fine), ("absent", &absent), ("zero", &zero), ("nan", &nan), ("inf", &inf)];
    let error = grad::assert_reaches(&loss, vars).unwrap_err();
    let Error::Unreached { absent, zero, not_finite, total: 5 } = &error else {
        panic!("{error}");
    };
    assert_eq!(absent, &["absent"]);
    assert_eq!(zero, &["zero"]);
    assert_eq!(not_finite, &["nan", "inf"]);
    let text = error.to_string();
    for part in ["4 of 5", "no gradient at: absent", "all zero at: zero", "not finite at: nan, inf"]
    {
        assert!(text.contains(part), "{text}");
    }
    let names = grad::unreached(&loss, vars).unwrap();
    assert_eq!(names, ["absent", "zero", "nan", "inf"]);
}

#[test]
fn a_weight_of_zero_reaches_nothing() {
    let (loss, vars) = loss(|x| Ok(x.clone()));
    grad::assert_reaches(&loss, grad::named(&vars, "")).unwrap();
    // candle ends the graph at a factor of zero. Through a zero tensor it passes a zero gradient.
    let number = (&loss * 0.).unwrap();
    let error = grad::assert_reaches(&number, grad::named(&vars, "")).unwrap_err();
    assert!(error.to_string().contains("no gradient at: fc.bias, fc.weight"), "{error}");
    let tensor = (&loss * loss.zeros_like().unwrap()).unwrap();
    let error = grad::assert_reaches(&tensor, grad::named(&vars, "")).unwrap_err();
    assert!(error.to_string().contains("all zero at: fc.bias, fc.weight"), "{error}");
}

#[test]
fn norms_neither_overflow_nor_vanish() {
    // The square in f32 is infinite for the first scale and zero for the second.
    for scale in [3e30f32, 3e-30] {
        let w = Var::new(&[1f32, 1.], CPU).unwrap();
        let loss = (w.as_tensor() * Tensor::new(&[3f32, 4.], CPU).unwrap()).unwrap();
        let loss = (loss.sum_all().unwrap() * scale as f64).unwrap();
        let norm = grad::reach(&loss, [("w", &w)]).unwrap()[0].norm.unwrap();
        approx::assert_relative_eq!(norm, 5. * scale as f64, max_relative = 1e-6);
    }
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let w = Var::from_tensor(&Tensor::ones(4, dtype, CPU).unwrap()).unwrap();
        let loss = w.sum_all().unwrap();
        assert_eq!(grad::reach(&loss, [("w", &w)]).unwrap()[0].norm, Some(2.));
    }
}

#[test]
fn a_check_of_nothing_is_an_error() {
    let w = Var::ones((2, 2), DType::F32, CPU).unwrap();
    let rank2 = grad::assert_reaches(&w.sqr().unwrap(), [("w", &w)]).unwrap_err();
    assert!(
        rank2.to_string().contains("scalar") && rank2.to_string().contains("[2, 2]"),
        "{rank2}"
    );
    let count = Tensor::new(1u32, CPU).unwrap();
    let integer = grad::assert_reaches(&count, [("w", &w)]).unwrap_err();
    assert!(
        integer.to_string().contains("floating-point") && integer.to_string().contains("U32"),
        "{integer}"
    );

    let loss = w.sqr().unwrap().mean_all().unwrap();
    let vars = VarMap::new();
    vars.get(1, "encoder.w", Init::Const(0.), DType::F32, CPU).unwrap();
    let none = grad::assert_reaches(&loss, grad::named(&vars, "decoder")).unwrap_err();
    assert!(none.to_string().contains("at least one variable"), "{none}");
}

#[test]
fn a_prefix_is_a_path() {
    let vars = VarMap::new();
    for name in ["b.1.w", "b.1.norm.w", "b.10.w", "b.1x", "cb.1.w"] {
        vars.get(1, name, Init::Const(0.), DType::F32, CPU).unwrap();
    }
    let names = |p| grad::named(&vars, p).into_iter().map(|v| v.0).collect::<Vec<_>>();
    assert_eq!(names("b.1"), ["b.1.norm.w", "b.1.w"]);
    assert_eq!(names("b.1."), names("b.1"));
    assert_eq!(names("b.1.w"), ["b.1.w"]);
    assert_eq!(names(""), ["b.1.norm.w", "b.1.w", "b.10.w", "b.1x", "cb.1.w"]);
}

#[test]
fn buffers_of_batch_norm_are_no_parameters() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
    let fc = candle_nn::linear_no_bias(4, 3, vb.pp("fc")).unwrap();
    let norm = candle_nn::batch_norm(3, 1e-5, vb.pp("norm")).unwrap();
    let all = vars.data().lock().unwrap().len();
    assert_eq!(all, 5, "candle registers both buffers as variables");
    let x = Tensor::new(&[[1f32, -2., 3., 5.], [0., 1., 4., -1.], [2., 2., -3., 0.]], CPU).unwrap();
    let y = norm.forward_train(&fc.forward(&x).unwrap()).unwrap();
    let loss = y.powf(3.).unwrap().mean_all().unwrap();
    let named = grad::named(&vars, "");
    let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["fc.weight", "norm.bias", "norm.weight"]);
    grad::assert_reaches(&loss, named).unwrap();
    assert!(grad::named(&vars, "norm.running_mean").is_empty());

    // Only the last part of a name counts.
    let vars = VarMap::new();
    for name in ["running_mean", "running_var.w", "my_running_var", "a.running_var"] {
        vars.get(1, name, Init::Const(0.), DType::F32, CPU).unwrap();
    }
    let names: Vec<String> = grad::named(&vars, "").into_iter().map(|v| v.0).collect();
    assert_eq!(names, ["my_running_var", "running_var.w"]);
}

/// A fused layer in front of a cut softmax: its values have a gradient, its queries and keys have none.
#[test]
fn a_fused_weight_with_a_dead_third_is_named() {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let qkv = candle_nn::linear_no_bias(8, 24, vb.pp("qkv")).unwrap();
    let x = Tensor::arange(0f32, 48., &device).unwrap().sin().unwrap().reshape((1, 6, 8)).unwrap();
    let loss = |softmax: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
        let qkv = qkv.forward(&x).unwrap().chunk(3, D::Minus1).unwrap();
        let scores = qkv[0].matmul(&qkv[1].t().unwrap()).unwrap();
        let values = qkv[2].contiguous().unwrap();
        softmax(&scores).unwrap().matmul(&values).unwrap().sqr().unwrap().mean_all().unwrap()
    };
    let whole = loss(&|x| candle_nn::ops::softmax(x, D::Minus1));
    grad::assert_reaches(&whole, grad::named(&vars, "")).unwrap();

    let cut = loss(&candle_nn::ops::softmax_last_dim);
    let reach = grad::reach(&cut, grad::named(&vars, "")).unwrap();
    assert_eq!(reach[0].zero_thirds, [0, 1]);
    assert_eq!(grad::unreached(&cut, grad::named(&vars, "")).unwrap(), ["qkv.weight"]);
    let error = grad::assert_reaches(&cut, grad::named(&vars, "")).unwrap_err().to_string();
    assert!(error.contains("qkv.weight (first and second third of its rows)"), "{error}");
}
