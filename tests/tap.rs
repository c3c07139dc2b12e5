//! Taps: the tensor that is captured, its graph, where a forward pass ends, and what stays
//! afterwards.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
    mpsc,
};

use candle_core::{
    Context, CpuStorage, CustomOp1, DType, Device, Error, Layout, Module, ModuleT, Result, Shape,
    Tensor,
};
use candle_nn::{Activation, Init, Linear, VarBuilder, VarMap, batch_norm, func_t, linear, seq};
use ser_reg::grad;
use ser_reg::tap::{self, Tapped, TappedT, record};

fn scalar(x: f32) -> Tensor {
    Tensor::new(x, &Device::Cpu).unwrap()
}

/// Records 1, 2, … under the names given.
fn forward(names: &[&str]) -> Result<&'static str> {
    for (i, name) in names.iter().enumerate() {
        record(name, &scalar(i as f32 + 1.))?;
    }
    Ok("output")
}

fn value(x: &Tensor) -> f32 {
    x.to_scalar().unwrap()
}

#[track_caller]
fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let text = result.err().expect("an error").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

/// Three linear blocks with a tap after each, and a count of the blocks that ran.
struct Mlp {
    blocks: Vec<Linear>,
    ran: Cell<usize>,
}

impl Mlp {
    fn new(vb: VarBuilder) -> Self {
        let block = |i| linear(4, 4, vb.pp(i)).unwrap();
        Self { blocks: (0..3).map(block).collect(), ran: Cell::new(0) }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, block) in self.blocks.iter().enumerate() {
            self.ran.set(self.ran.get() + 1);
            x = block.forward(&x)?.gelu()?;
            record(format_args!("block{i}"), &x)?;
        }
        Ok(x)
    }
}

fn mlp() -> (Mlp, VarMap, Tensor) {
    let vars = VarMap::new();
    let net = Mlp::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu));
    let x = Tensor::arange(0f32, 8., &Device::Cpu).unwrap();
    (net, vars, x.reshape((2, 4)).unwrap())
}

#[test]
fn the_gradient_reaches_the_blocks_before_the_tap_and_none_after() {
    let (net, vars, x) = mlp();
    let (y, map) = tap::capture("block1", || net.forward(&x)).unwrap();
    assert_eq!((y.dims(), net.ran.get()), (&[2, 4][..], 3));
    let until = tap::capture_until("block1", || net.forward(&x)).unwrap();
    assert_eq!(net.ran.get(), 3 + 2, "the block behind the tap did not run");
    assert_eq!(until.to_vec2::<f32>().unwrap(), map.to_vec2::<f32>().unwrap());
    for map in [map, until] {
        let loss = map.sqr().unwrap().mean_all().unwrap();
        for block in ["0", "1"] {
            grad::assert_reaches(&loss, grad::named(&vars, block)).unwrap();
        }
        let late = grad::unreached(&loss, grad::named(&vars, "")).unwrap();
        assert_eq!(late, ["2.bias", "2.weight"]);
    }
}

#[test]
fn a_model_that_ignores_the_end_runs_on_and_gives_the_same_map() {
    let ran = Cell::new(0);
    let map = tap::capture_until("a", || {
        let _ = record("a", &scalar(1.));
        ran.set(ran.get() + 1);
        let _ = record("b", &scalar(2.));
        Ok("output")
    });
    assert_eq!((value(&map.unwrap()), ran.get()), (1., 1));
    // The same layer twice stays ambiguous.
    let twice = tap::capture_until("a", || {
        let _ = record("a", &scalar(1.));
        let _ = record("a", &scalar(2.));
        Ok(())
    });
    assert_says(twice, &["`a`", "more than once"]);
}

#[test]
fn an_error_of_the_model_is_never_taken_for_the_end() {
    let before = tap::capture_until("a", || -> Result<()> { Err(Error::msg("mine")) });
    assert_says(before, &["mine"]);
    // After the tap, whose result the model ignores.
    let after = tap::capture_until("a", || -> Result<()> {
        let _ = record("a", &scalar(1.));
        Err(Error::msg("mine"))
    });
    assert_says(after, &["mine"]);
    let after = tap::capture_until("a", || {
        let _ = record("a", &scalar(1.));
        scalar(1.).matmul(&scalar(2.))
    });
    assert!(!after.unwrap_err().to_string().contains("layer `a`"));
    // The end of another capture, kept and returned by the model.
    let stale = Cell::new(None);
    let first = tap::capture_until("a", || -> Result<()> {
        stale.set(record("a", &scalar(1.)).err());
        Ok(())
    });
    assert_eq!(value(&first.unwrap()), 1.);
    let second = tap::capture_until("a", || -> Result<()> {
        let _ = record("a", &scalar(2.));
        Err(stale.take().expect("the first end"))
    });
    assert_says(second, &["the forward pass ends at layer `a`"]);
}

#[test]
fn context_around_the_end_leaves_it_the_end() {
    let map = tap::capture_until("a", || {
        record("a", &scalar(1.)).context("in block 3")?;
        Ok(())
    });
    assert_eq!(value(&map.unwrap()), 1.);
    let map = tap::capture_until("a", || -> Result<()> {
        record("a", &scalar(1.)).map_err(|e| e.context("in block 3").context("in the encoder"))
    });
    assert_eq!(value(&map.unwrap()), 1.);
    // An error type of the model, printed or wrapped.
    let map = tap::capture_until("a", || -> Result<()> {
        record("a", &scalar(1.)).map_err(|e| Error::msg(format!("in block 3: {e}")))
    });
    assert_eq!(value(&map.unwrap()), 1.);
    let model = || -> anyhow::Result<()> {
        anyhow::Context::context(record("a", &scalar(1.)), "in block 3")?;
        Ok(())
    };
    let map = tap::capture_until("a", || model().map_err(|e| Error::msg(format!("{e:#}"))));
    assert_eq!(value(&map.unwrap()), 1.);
}

#[test]
fn several_layers_of_one_forward_come_in_the_order_of_their_names() {
    let (out, maps) = tap::capture_all(&["c", "a"], || forward(&["a", "b", "c"])).unwrap();
    assert_eq!(out, "output");
    assert_eq!(maps.iter().map(value).collect::<Vec<_>>(), [3., 1.]);
    let none: [&str; 0] = [];
    assert!(tap::capture_all(&none, || forward(&["a"])).unwrap().1.is_empty());
}

#[test]
fn a_layer_that_is_not_recorded_is_an_error_that_lists_those_that_are() {
    let names = ["block0", "block1", "block1"];
    let listed = ["`blok1`", "got `block0`, `block1`"];
    assert_says(tap::capture("blok1", || forward(&names)), &listed);
    assert_says(tap::capture_until("blok1", || forward(&names)), &listed);
    let none = ["`block0`", "got no record", "same thread"];
    assert_says(tap::capture("block0", || forward(&[])), &none);
    assert_says(tap::capture_until("block0", || forward(&[])), &none);
    // Of several, the message names the missing one.
    let missing = tap::capture_all(&["a", "b"], || forward(&["a"]));
    assert_says(missing, &["layer `b`"]);
}

#[test]
fn a_layer_recorded_twice_is_ambiguous() {
    let twice = ["`a`", "more than once"];
    assert_says(tap::capture("a", || forward(&["a", "b", "a"])), &twice);
    // A third record does not make it unique again.
    assert_says(tap::capture("a", || forward(&["a", "a", "a"])), &twice);
    // Another layer may repeat.
    tap::capture("b", || forward(&["a", "b", "a"])).unwrap();
    // The forward pass ends at the first record.
    let map = tap::capture_until("a", || forward(&["a", "b", "a"])).unwrap();
    assert_eq!(value(&map), 1.);
}

#[test]
fn a_record_goes_to_the_innermost_capture_alone() {
    // A teacher inside a student, both with the same layer.
    let (inner, outer) = tap::capture("a", || {
        let (_, teacher) = tap::capture("a", || forward(&["a", "b"]))?;
        record("a", &scalar(9.))?;
        Ok(teacher)
    })
    .unwrap();
    assert_eq!((value(&inner), value(&outer)), (1., 9.));

    // The end of the inner forward pass is not the end of the outer one.
    let behind = Cell::new(0);
    let outer = tap::capture_until("a", || {
        let teacher = tap::capture_until("a", || {
            record("a", &scalar(2.))?;
            behind.set(behind.get() + 1);
            Ok(())
        })?;
        record("a", &(teacher + 1.)?)?;
        behind.set(behind.get() + 10);
        Ok(())
    })
    .unwrap();
    assert_eq!((value(&outer), behind.get()), (3., 0));

    // What only a nested capture received is missing outside.
    let nested = tap::capture("a", || tap::capture("a", || forward(&["a"])));
    assert_says(nested, &["`a`", "got no record"]);
    // The outer layer inside the inner forward pass does not end the outer one.
    let lost = tap::capture_until("b", || tap::capture("a", || forward(&["a", "b"])));
    assert_says(lost, &["`b`", "got no record"]);
}

#[test]
fn nothing_behind_a_shield_is_captured() {
    let (inner, map) = tap::capture("a", || {
        let inner = tap::shield(|| forward(&["a", "a", "a"]))?;
        record("a", &scalar(5.))?;
        Ok(inner)
    })
    .unwrap();
    assert_eq!((inner, value(&map)), ("output", 5.));
    // A forward pass in a shield is not ended, and can capture for itself.
    let map = tap::capture_until("a", || {
        let own = tap::shield(|| tap::capture_until("a", || forward(&["a"])))?;
        tap::shield(|| forward(&["a"]))?;
        record("a", &(own + 6.)?)
    });
    assert_eq!(value(&map.unwrap()), 7.);
    // Outside a capture it does nothing.
    assert_eq!(tap::shield(|| forward(&["a"])).unwrap(), "output");
}

#[test]
fn an_error_of_the_closure_passes_through_and_ends_the_capture() {
    let candle = tap::capture("a", || scalar(1.).matmul(&scalar(2.))).unwrap_err();
    assert!(!candle.to_string().contains("layer"), "{candle}");
    // A model with other errors wraps them.
    let model = || -> anyhow::Result<()> { anyhow::bail!("mine") };
    let wrapped = tap::capture("a", || model().map_err(Error::wrap));
    assert_says(wrapped, &["mine"]);
    assert_eq!(tensors_kept_by_a_record(), 0);
}

#[test]
fn a_panic_in_the_closure_leaves_the_stack_clean() {
    let panics = || -> Result<()> { panic!("in the model") };
    for run in [
        || drop(tap::capture("a", || -> Result<()> { panic!("in the model") })),
        || drop(tap::capture_until("a", || -> Result<()> { panic!("in the model") })),
        || drop(tap::shield(|| -> Result<()> { panic!("in the model") })),
    ] {
        assert!(catch_unwind(run).is_err());
        assert_eq!(tensors_kept_by_a_record(), 0);
        record("a", &scalar(1.)).unwrap();
    }
    // An outer capture goes on after the inner one has gone, with its shield.
    let (_, a) = tap::capture("a", || {
        let inner = || tap::shield(|| tap::capture("a", panics));
        assert!(catch_unwind(AssertUnwindSafe(inner)).is_err());
        forward(&["a"])
    })
    .unwrap();
    assert_eq!(value(&a), 1.);
}

#[test]
fn nothing_is_kept_alive_without_a_capture_or_after_it() {
    assert_eq!(tensors_kept_by_a_record(), 0);
    let (dropped, op) = Canary::new();
    let (x, held) = tap::capture("a", || {
        record("other", &op.tensor())?;
        assert_eq!(dropped.load(Ordering::SeqCst), 1, "a tensor of another name was kept");
        let x = op.tensor();
        record("a", &x)?;
        Ok(x)
    })
    .unwrap();
    drop(x);
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "the captured tensor belongs to the caller");
    drop(held);
    assert_eq!(dropped.load(Ordering::SeqCst), 2, "the capture kept the tensor");
}

#[test]
fn records_of_another_thread_are_not_captured() {
    let run = || {
        let other = || std::thread::spawn(|| forward(&["a"])).join().unwrap();
        tap::capture("a", other)
    };
    assert_says(run(), &["same thread"]);
    // A thread captures for itself.
    let captured = std::thread::spawn(|| value(&tap::capture("a", || forward(&["a"])).unwrap().1));
    assert_eq!(captured.join().unwrap(), 1.);
}

/// Runs `other` on the thread of a capture of `a` while that capture waits in `rayon::join`.
fn captured_while(other: fn() -> Result<()>) -> Result<Tensor> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    let (started, start) = mpsc::channel();
    let (finished, finish) = mpsc::channel();
    let run = move || {
        let own = std::thread::current().id();
        let (_, map) = tap::capture("a", || {
            rayon::join(
                // The other thread holds the second half, so this thread takes the spawned work
                // while it waits.
                move || {
                    start.recv().unwrap();
                    rayon::spawn(move || {
                        assert_eq!(std::thread::current().id(), own);
                        finished.send(other()).unwrap();
                    });
                },
                move || {
                    started.send(()).unwrap();
                    finish.recv().unwrap().unwrap();
                },
            );
            record("a", &scalar(1.))
        })?;
        Ok(map)
    };
    pool.unwrap().install(run)
}

#[test]
fn a_forward_pass_that_runs_while_a_capture_waits_keeps_its_records() {
    let shielded = captured_while(|| tap::shield(|| record("a", &scalar(9.))));
    assert_eq!(value(&shielded.unwrap()), 1.);
    let captured = captured_while(|| {
        let map = tap::capture_until("a", || record("a", &scalar(9.)))?;
        assert_eq!(value(&map), 9.);
        Ok(())
    });
    assert_eq!(value(&captured.unwrap()), 1.);
    // Without either it is an error, and no choice between two tensors.
    let bare = captured_while(|| record("a", &scalar(9.)));
    assert_says(bare, &["`a`", "more than once"]);
}

/// A capture on a pool (of a name that no other test uses: a record on any pool counts) whose own forward pass runs on the other thread, while its thread runs `other`.
fn moved_while(other: fn() -> Result<()>) -> Result<Tensor> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    let (started, start) = mpsc::channel();
    let (finished, finish) = mpsc::channel();
    let run = move || {
        let own = std::thread::current().id();
        let capture = || {
            rayon::join(
                move || {
                    start.recv().unwrap();
                    rayon::spawn(move || {
                        assert_eq!(std::thread::current().id(), own);
                        finished.send(other()).unwrap();
                    });
                },
                move || {
                    started.send(()).unwrap();
                    assert_ne!(std::thread::current().id(), own);
                    record("moved", &scalar(1.)).unwrap();
                    finish.recv().unwrap().unwrap();
                },
            );
            Ok(())
        };
        Ok(tap::capture("moved", capture)?.1)
    };
    pool.unwrap().install(run)
}

#[test]
fn a_forward_pass_that_the_pool_moves_is_an_error_and_not_the_tensor_of_another() {
    for other in [
        || record("moved", &scalar(9.)),
        || tap::shield(|| record("moved", &scalar(9.))),
        || tap::capture_until("moved", || record("moved", &scalar(9.))).map(drop),
    ] {
        assert_says(moved_while(other), &["`moved`", "another thread of the pool", "tap::shield"]);
    }
    // The next capture of the same thread starts anew, and other names do not count.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let map = pool.install(|| {
        let own = || {
            rayon::broadcast(|_| tap::shield(|| record("moved", &scalar(9.)))); // shielded
            rayon::join(|| record("moved", &scalar(1.)), || record("other", &scalar(2.))).0
        };
        tap::capture("moved", own)
    });
    assert_eq!(value(&map.unwrap().1), 1.);
}

#[test]
fn a_tapped_module_returns_and_records_the_output_of_its_module() {
    let (y, map) = tap::capture("layer", || {
        let y = Tapped::new("layer", |x: &Tensor| x.sqr()).forward(&scalar(3.))?;
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
    let x = Init::Const(1.).var((2, 2, 1, 1), DType::F32, &Device::Cpu).unwrap();
    tap::capture("norm", || norm.forward_t(&x, true)).unwrap();
}

#[test]
fn a_sequential_ends_at_its_tapped_layer() {
    let ran = Arc::new(AtomicUsize::new(0));
    let counter = ran.clone();
    let net = seq().add(Activation::Relu).add(Tapped::new("square", |x: &Tensor| x.sqr())).add_fn(
        move |x| {
            counter.fetch_add(1, Ordering::SeqCst);
            x.affine(2., 0.)
        },
    );
    let x = scalar(3.);
    let map = tap::capture_until("square", || net.forward(&x)).unwrap();
    assert_eq!((value(&map), ran.load(Ordering::SeqCst)), (9., 0));
    let (y, map) = tap::capture("square", || net.forward(&x)).unwrap();
    assert_eq!((value(&y), value(&map)), (18., 9.));
    assert_eq!(ran.load(Ordering::SeqCst), 1);
    assert_eq!(value(&net.forward(&x).unwrap()), 18.);
}

/// A name that counts how often it is formatted.
struct Name<'a>(&'a Cell<usize>);

impl std::fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.0.set(self.0.get() + 1);
        write!(f, "block{}", 3)
    }
}

#[test]
fn a_computed_name_is_formatted_inside_a_capture_only() {
    let formatted = Cell::new(0);
    record(Name(&formatted), &scalar(1.)).unwrap();
    tap::shield(|| record(Name(&formatted), &scalar(1.))).unwrap();
    assert_eq!(formatted.get(), 0);
    let map = tap::capture_until("block3", || record(Name(&formatted), &scalar(1.)));
    assert_eq!((value(&map.unwrap()), formatted.get()), (1., 1));
    let i = 3;
    let map = tap::capture_until("block3", || record(format_args!("block{i}"), &scalar(2.)));
    assert_eq!(value(&map.unwrap()), 2.);
}

/// How many tensors stay alive through a `record` without a capture.
fn tensors_kept_by_a_record() -> usize {
    let (dropped, op) = Canary::new();
    record("a", &op.tensor()).unwrap();
    1 - dropped.load(Ordering::SeqCst)
}

/// An operation whose tensors are counted when they are dropped.
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

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }
}
