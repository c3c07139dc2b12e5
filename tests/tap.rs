//! Taps: the tensor that comes out, the graph it hangs on, and what is left behind.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Module, ModuleT, Shape, Tensor};
use candle_nn::{Init, Linear, VarBuilder, VarMap, batch_norm, func_t, linear};
use ser_reg::tap::{self, Tapped, TappedT, record};
use ser_reg::{Error, grad};

fn scalar(x: f32) -> Tensor {
    Tensor::new(x, &Device::Cpu).unwrap()
}

/// Records 1, 2, … under the names given.
fn forward(names: &[&str]) -> Result<&'static str, Error> {
    for (i, name) in names.iter().enumerate() {
        record(name, &scalar(i as f32 + 1.));
    }
    Ok("output")
}

fn value(x: &Tensor) -> f32 {
    x.to_scalar().unwrap()
}

/// Three linear blocks with a tap after each, the model a user owns.
struct Mlp(Vec<Linear>);

impl Mlp {
    fn new(vb: VarBuilder) -> Self {
        Self((0..3).map(|i| linear(4, 4, vb.pp(i)).unwrap()).collect())
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.0.iter().enumerate() {
            x = layer.forward(&x)?.gelu()?;
            record(&format!("block{i}"), &x);
        }
        Ok(x)
    }
}

#[test]
fn the_gradient_reaches_the_blocks_before_the_tap_and_none_after() {
    let vars = VarMap::new();
    let net = Mlp::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu));
    let x = Tensor::arange(0f32, 8., &Device::Cpu).unwrap();
    let x = x.reshape((2, 4)).unwrap();
    let (y, map) = tap::capture("block1", || net.forward(&x)).unwrap();
    assert_eq!(y.dims(), [2, 4]);

    let loss = map.sqr().unwrap().mean_all().unwrap();
    for block in ["0", "1"] {
        grad::assert_reaches(&loss, grad::named(&vars, block)).unwrap();
    }
    let late = grad::unreached(&loss, grad::named(&vars, "")).unwrap();
    assert_eq!(late, ["2.bias", "2.weight"]);
}

#[test]
fn several_layers_of_one_forward_come_in_the_order_asked_for() {
    let (out, maps) = tap::capture_all(&["c", "a"], || forward(&["a", "b", "c"])).unwrap();
    assert_eq!(out, "output");
    assert_eq!(maps.iter().map(value).collect::<Vec<_>>(), [3., 1.]);
}

#[test]
fn a_layer_that_is_never_reached_is_an_error_that_lists_those_that_were() {
    let error = tap::capture("blok1", || forward(&["block0", "block1", "block1"])).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Tap(_)));
    assert!(
        text.contains("`blok1`") && text.ends_with("`block0`, `block1`"),
        "{text}"
    );

    let none = tap::capture("block0", || forward(&[]))
        .unwrap_err()
        .to_string();
    assert!(
        none.contains("`block0`") && none.contains("no tap was"),
        "{none}"
    );

    // Of several, the one that is missing is named.
    let error = tap::capture_all(&["a", "b"], || forward(&["a"])).unwrap_err();
    assert!(error.to_string().contains("layer `b`"), "{error}");
}

#[test]
fn a_layer_recorded_twice_is_ambiguous() {
    let error = tap::capture("a", || forward(&["a", "b", "a"])).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("`a`") && text.contains("more than once"),
        "{text}"
    );
    // A third record does not make it unique again.
    tap::capture("a", || forward(&["a", "a", "a"])).unwrap_err();
    // A layer nobody asked for may repeat.
    tap::capture("b", || forward(&["a", "b", "a"])).unwrap();
}

#[test]
fn a_record_goes_to_the_innermost_capture_that_asks_for_it() {
    let ((inner, student), a) = tap::capture("a", || -> Result<_, Error> {
        record("a", &scalar(1.));
        // Both captures ask for `a`; only the inner one asks for `b`.
        let ((_, maps), outer_b) = tap::capture("b", || {
            let nested = tap::capture_all(&["a"], || {
                record("a", &scalar(2.));
                record("b", &scalar(3.));
                Ok::<_, Error>(())
            })?;
            Ok::<_, Error>(nested)
        })?;
        Ok((maps, outer_b))
    })
    .unwrap();
    assert_eq!((value(&a), value(&inner[0]), value(&student)), (1., 2., 3.));
}

#[test]
fn what_only_a_nested_capture_saw_is_missing_outside_and_the_message_says_so() {
    let error = tap::capture("a", || tap::capture("a", || forward(&["a"]))).unwrap_err();
    assert!(error.to_string().contains("nested"), "{error}");
}

#[test]
fn an_error_of_the_closure_passes_through_and_stops_the_capture() {
    let candle = tap::capture("a", || scalar(1.).matmul(&scalar(2.))).unwrap_err();
    assert!(!candle.to_string().contains("layer"), "{candle}");
    let any = tap::capture("a", || -> anyhow::Result<()> { anyhow::bail!("mine") }).unwrap_err();
    assert_eq!(any.to_string(), "mine");
    assert_eq!(tensors_kept_by_a_record(), 0);
}

#[test]
fn a_tap_error_comes_in_the_error_type_of_the_closure() {
    let candle: candle_core::Error = tap::capture("a", || Ok(())).unwrap_err();
    let any: anyhow::Error = tap::capture("a", || Ok(())).unwrap_err();
    assert!(candle.to_string().contains("layer `a`"), "{candle}");
    assert!(matches!(any.downcast_ref(), Some(Error::Tap(_))));
}

#[test]
fn a_panic_in_the_closure_stops_the_capture() {
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        tap::capture("a", || -> Result<(), Error> { panic!("in the model") })
    }));
    assert!(panicked.is_err());
    assert_eq!(tensors_kept_by_a_record(), 0);
    // An outer capture goes on listening after the inner one has gone.
    let (_, a) = tap::capture("a", || {
        let _ = catch_unwind(|| tap::capture("a", || -> Result<(), Error> { panic!() }));
        forward(&["a"])
    })
    .unwrap();
    assert_eq!(value(&a), 1.);
}

#[test]
fn nothing_is_kept_alive_when_nobody_listens_or_the_capture_is_over() {
    assert_eq!(tensors_kept_by_a_record(), 0);
    let (dropped, op) = Canary::new();
    let (x, held) = tap::capture("a", || {
        record("other", &op.tensor());
        assert_eq!(
            dropped.load(Ordering::SeqCst),
            1,
            "a name nobody asked for was kept"
        );
        let x = op.tensor();
        record("a", &x);
        Ok::<_, Error>(x)
    })
    .unwrap();
    drop(x);
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        1,
        "the captured tensor is the caller's"
    );
    drop(held);
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        2,
        "the recorder kept the tensor"
    );
}

#[test]
fn another_thread_is_not_seen() {
    let error = tap::capture("a", || {
        std::thread::scope(|s| s.spawn(|| forward(&["a"])).join().unwrap())
    })
    .unwrap_err();
    assert!(error.to_string().contains("same thread"), "{error}");
    // And it captures for itself.
    let captured = std::thread::spawn(|| value(&tap::capture("a", || forward(&["a"])).unwrap().1));
    assert_eq!(captured.join().unwrap(), 1.);
}

#[test]
fn a_tapped_module_returns_and_records_what_it_wraps() {
    let plain = |x: &Tensor| x.sqr();
    let (y, map) = tap::capture("layer", || {
        let y = Tapped::new("layer", plain).forward(&scalar(3.))?;
        y.affine(2., 0.)
    })
    .unwrap();
    assert_eq!((value(&y), value(&map)), (18., 9.));

    // The train flag arrives.
    let flagged = || func_t(|x, train| x.affine(if train { 1. } else { -1. }, 0.));
    for (train, expected) in [(true, 3.), (false, -3.)] {
        let layer = TappedT::new("layer", flagged());
        let (y, map) = tap::capture("layer", || layer.forward_t(&scalar(3.), train)).unwrap();
        assert_eq!((value(&y), value(&map)), (expected, expected));
    }
    // A layer of candle-nn that is no `Module`.
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let norm = TappedT::new("norm", batch_norm(2, 1e-5, vb).unwrap());
    let x = Init::Const(1.)
        .var((2, 2, 1, 1), DType::F32, &Device::Cpu)
        .unwrap();
    tap::capture("norm", || norm.forward_t(&x, true)).unwrap();
}

/// How many tensors stay alive through a `record` without a capture.
fn tensors_kept_by_a_record() -> usize {
    let (dropped, op) = Canary::new();
    record("a", &op.tensor());
    1 - dropped.load(Ordering::SeqCst)
}

/// An operation whose tensors count, when they go, that they went.
struct Canary(Arc<AtomicUsize>);

impl Canary {
    fn new() -> (Arc<AtomicUsize>, Self) {
        let dropped = Arc::new(AtomicUsize::new(0));
        (dropped.clone(), Self(dropped))
    }

    fn tensor(&self) -> Tensor {
        // The graph of a variable's function holds the operation, and with it this.
        let x = candle_core::Var::new(1f32, &Device::Cpu).unwrap();
        x.apply_op1(Held(self.0.clone())).unwrap()
    }
}

struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl CustomOp1 for Held {
    fn name(&self) -> &'static str {
        "held"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }
}
