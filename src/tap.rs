//! Taps: reach an intermediate map of any candle model.
//!
//! There are three ways, in order of preference.
//!
//! 1. *A model that you own* has one more line, [`record`], where the map exists. The model needs no state and no argument:
//!
//! ```
//! use candle_core::{Device, Result, Tensor};
//! use ser_reg::tap;
//!
//! struct Net;
//! impl Net {
//!     fn forward(&self, x: &Tensor) -> Result<Tensor> {
//!         let map = x.sqr()?;
//!         tap::record("block3", &map)?; // the one line
//!         map.mean_all()
//!     }
//! }
//!
//! let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
//! let map = tap::capture_until("block3", || Net.forward(&x))?; // mean_all does not run
//! assert_eq!(map.to_vec2::<f32>()?, [[1., 4.], [9., 16.]]);
//! let (y, _map) = tap::capture("block3", || Net.forward(&x))?; // the whole forward
//! assert_eq!(y.to_scalar::<f32>()?, 7.5);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! 2. *A layer that you can wrap*: [`Tapped`] around any `Module`, or [`TappedT`] around any `ModuleT`, records its output:
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use candle_nn::{Activation, seq};
//! use ser_reg::tap::{self, Tapped};
//!
//! let net = seq().add(Tapped::new("relu", Activation::Relu)).add(Activation::Silu);
//! let x = Tensor::new(&[-1f32, 2.], &Device::Cpu)?;
//! let map = tap::capture_until("relu", || net.forward(&x))?;
//! assert_eq!(map.to_vec1::<f32>()?, [0., 2.]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! 3. *A map that a model already returns* (`get_intermediate_layers` and the like) needs no tap. Hand it to
//!    [`MapPair`](crate::MapPair) with the [`Layout`](crate::Layout) that says where its tokens are.
//!
//! A captured tensor is the tensor of the model, with its graph: a loss on it reaches the layers before the tap.
//!
//! # Threads
//!
//! A record goes to the innermost capture of its own thread, and to no other. A thread of a work-stealing pool can run
//! another forward pass while a capture waits (inside `rayon::join`, for example). Run such a forward pass in a capture of
//! its own or in a [`shield`]; then its records never reach the waiting capture.
//!
//! A capture whose closure records the layer never returns the tensor of another forward pass. It returns its own tensor or
//! an error: a layer that is recorded twice in one capture is an error, and so is a layer that the pool recorded on another
//! thread, outside of captures and shields, while a capture ran on one of its threads. One condition remains: two captures
//! that run at once must call their forward passes directly, not in a part that the pool can move to the other's thread.
//!
//! A NaN or an infinity in a map is captured as it is.
//!
//! All functions return candle's `Result`, so that they nest in models and closures. A model with errors of another type
//! needs `map_err(candle_core::Error::wrap)`.

use std::{
    cell::RefCell,
    fmt::Display,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::{Module, ModuleT, Result, Tensor};

use stray::Watch;

mod stray;

thread_local! {
    /// The captures and shields that run on this thread, innermost last.
    static RUNNING: RefCell<Vec<Option<Rc<RefCell<Capture>>>>> = const { RefCell::new(Vec::new()) };
}

/// The layers of one capture.
struct Capture {
    slots: Vec<(String, Slot)>,
    /// Every name that was recorded, for the message when an expected one is missing.
    recorded: Vec<String>,
    /// The text of the error that ends the forward pass at the first slot; `None`: the forward pass runs to its end.
    stop: Option<String>,
    watch: Option<Watch>,
}

enum Slot {
    Empty,
    Once(Tensor),
    Again,
}

impl Capture {
    /// Keeps `x`; an error if the forward pass ends here.
    fn see(&mut self, name: String, x: &Tensor) -> Result<()> {
        let slot = self.slots.iter_mut().find(|(n, _)| *n == name);
        if !self.recorded.contains(&name) {
            self.recorded.push(name);
        }
        let Some((_, slot)) = slot else {
            return Ok(());
        };
        *slot = match slot {
            Slot::Empty => Slot::Once(x.clone()),
            _ => Slot::Again,
        };
        match &self.stop {
            Some(text) => Err(candle_core::Error::msg(text)),
            None => Ok(()),
        }
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        let strayed = self.watch.as_ref().is_some_and(|watch| watch.strayed(name));
        let message = match self.slots.iter().find(|(n, _)| n == name) {
            Some((_, Slot::Once(x))) if !strayed => return Ok(x.clone()),
            Some((_, Slot::Once(_) | Slot::Empty)) if strayed => format!(
                "layer `{name}` was recorded on another thread of the pool while the capture ran, so its own record cannot \
                 be told from another's (call the model's forward pass directly in the closure, not in a part that \
                 `rayon` can move; run other forward passes in `tap::shield`)"
            ),
            Some((_, Slot::Again)) => format!(
                "layer `{name}` was recorded more than once in one capture (capture one forward pass at a time, and give \
                 each layer a name of its own)"
            ),
            _ if self.recorded.is_empty() => format!(
                "expected layer `{name}` to be recorded, got no record (run the model's forward pass inside the closure, \
                 on the same thread)"
            ),
            _ => format!(
                "expected layer `{name}` to be recorded, got `{}`",
                self.recorded.join("`, `")
            ),
        };
        Err(candle_core::Error::msg(message))
    }
}

/// A capture or a shield on the stack. Leaving the scope, also by a panic, removes it.
struct Guard;

impl Guard {
    fn push(capture: Option<Rc<RefCell<Capture>>>) -> Self {
        RUNNING.with_borrow_mut(|running| running.push(capture));
        Self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Captures nest, so the last one is this one.
        RUNNING.with_borrow_mut(Vec::pop);
    }
}

/// Runs `forward` in a capture of `names`.
fn run<T>(
    names: &[impl AsRef<str>],
    stop: Option<String>,
    forward: impl FnOnce() -> Result<T>,
) -> (Result<T>, Rc<RefCell<Capture>>) {
    let slots = names.iter().map(|n| (n.as_ref().to_string(), Slot::Empty));
    let capture = Rc::new(RefCell::new(Capture {
        slots: slots.collect(),
        recorded: Vec::new(),
        stop,
        watch: Watch::open(names),
    }));
    let guard = Guard::push(Some(capture.clone()));
    let output = forward();
    drop(guard);
    (output, capture)
}

/// Marks `x` as the map called `name`, for a capture that asks for it.
///
/// Outside a capture this is one thread-local look-up and one atomic load: nothing is cloned or kept, and nothing is
/// formatted unless captures run on other threads of a pool. Pass a computed name as
/// `format_args!("block{i}")`, which allocates only inside a capture.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(1f32, &Device::Cpu)?;
/// tap::record("block3", &x)?; // no capture is running: nothing happens
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Only inside [`capture_until`], at the layer where the forward pass ends. Return it from the model with `?`. A model that
/// ignores it runs to its end, and the captured map is the same.
pub fn record(name: impl Display, x: &Tensor) -> Result<()> {
    // `try_with`: a forward pass that runs while its thread ends must not panic for a tap.
    match RUNNING.try_with(|running| running.borrow().last().cloned()) {
        Ok(Some(Some(capture))) => capture.borrow_mut().see(name.to_string(), x),
        // A shield.
        Ok(Some(None)) => Ok(()),
        Ok(None) | Err(_) => {
            stray::record(name);
            Ok(())
        }
    }
}

/// Runs `forward` and returns its output together with the map that it recorded as `name`.
///
/// Captures nest: a record goes to the innermost one, so a teacher can be captured inside the capture of a student.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let (y, map) = tap::capture("block3", || {
///     tap::record("block3", &x)?;
///     x.sqr()
/// })?;
/// assert_eq!((y.to_scalar::<f32>()?, map.to_scalar::<f32>()?), (9., 3.));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// The error of `forward`. An error that lists the recorded names, if `name` was not recorded exactly once.
pub fn capture<T>(name: &str, forward: impl FnOnce() -> Result<T>) -> Result<(T, Tensor)> {
    let (output, capture) = run(&[name], None, forward);
    let output = output?;
    let map = capture.borrow().get(name)?;
    Ok((output, map))
}

/// Runs `forward` up to the layer `name` and returns the map that was recorded there.
///
/// The layers behind the tap do not run, if the model returns the result of [`record`] with `?`. [`Tapped`] does.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let map = tap::capture_until("block3", || {
///     tap::record("block3", &x)?;
///     x.matmul(&x) // does not run: it would fail
/// })?;
/// assert_eq!(map.to_scalar::<f32>()?, 3.);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`capture`], but a name that is recorded twice counts at the first record, where the pass ends. An error of the
/// model itself, before or after the tap, is returned as it is.
pub fn capture_until<T>(name: &str, forward: impl FnOnce() -> Result<T>) -> Result<Tensor> {
    // The number tells this stop from the stop of another capture.
    static STOPS: AtomicU64 = AtomicU64::new(0);
    let number = STOPS.fetch_add(1, Ordering::Relaxed);
    let text = format!(
        "the forward pass ends at layer `{name}` (stop {number} of ser_reg::tap::capture_until; return it with `?`)"
    );
    let (output, capture) = run(&[name], Some(text.clone()), forward);
    match output {
        // Models may add context to the error, so the text can be a part of it.
        Err(e) if !e.to_string().contains(&text) => Err(e),
        _ => capture.borrow().get(name),
    }
}

/// [`capture`] for several layers of one forward pass; the maps come in the order of `names`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let (_y, maps) = tap::capture_all(&["block1", "block3"], || {
///     tap::record("block1", &x)?;
///     let x = x.sqr()?;
///     tap::record("block3", &x)?;
///     x.sqr()
/// })?;
/// assert_eq!(maps[1].to_scalar::<f32>()?, 9.);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`capture`], for the first of `names` that was not recorded exactly once.
pub fn capture_all<T>(
    names: &[impl AsRef<str>],
    forward: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Tensor>)> {
    let (output, capture) = run(names, None, forward);
    let output = output?;
    let capture = capture.borrow();
    let maps: Result<_> = names.iter().map(|n| capture.get(n.as_ref())).collect();
    Ok((output, maps?))
}

/// Runs `forward` so that nothing it records reaches a capture.
///
/// Use it for a forward pass that captures nothing and may run on a thread of a work-stealing pool.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let map = tap::capture_until("block3", || {
///     tap::shield(|| tap::record("block3", &x.sqr()?))?; // another forward pass
///     tap::record("block3", &x)
/// })?;
/// assert_eq!(map.to_scalar::<f32>()?, 3.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn shield<T>(forward: impl FnOnce() -> T) -> T {
    let _guard = Guard::push(None);
    forward()
}

/// A `Module` whose output is [`record`]ed under a name.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use ser_reg::tap::{self, Tapped};
///
/// let layer = Tapped::new("layer", |x: &Tensor| x.sqr());
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let map = tap::capture_until("layer", || layer.forward(&x)?.sqr())?;
/// assert_eq!(map.to_scalar::<f32>()?, 9.);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tapped<M> {
    name: String,
    inner: M,
}

/// [`Tapped`] for a `ModuleT`, a module with a train flag.
///
/// Two types, because every `Module` is already a `ModuleT` and one wrapper cannot be both.
///
/// ```
/// use candle_core::{Device, ModuleT, Tensor};
/// use candle_nn::func_t;
/// use ser_reg::tap::{self, TappedT};
///
/// let layer = TappedT::new("layer", func_t(|x, train| if train { x.sqr() } else { x.sqrt() }));
/// let x = Tensor::new(9f32, &Device::Cpu)?;
/// let map = tap::capture_until("layer", || layer.forward_t(&x, true))?;
/// assert_eq!(map.to_scalar::<f32>()?, 81.);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TappedT<M> {
    name: String,
    inner: M,
}

impl<M: Module> Tapped<M> {
    /// Wraps `inner`, whose output will be known as `name`.
    pub fn new(name: impl Into<String>, inner: M) -> Self {
        Self { name: name.into(), inner }
    }
}

impl<M: ModuleT> TappedT<M> {
    /// Wraps `inner`, whose output will be known as `name`.
    pub fn new(name: impl Into<String>, inner: M) -> Self {
        Self { name: name.into(), inner }
    }
}

impl<M: Module> Module for Tapped<M> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.inner.forward(x)?;
        record(&self.name, &y)?;
        Ok(y)
    }
}

impl<M: ModuleT> ModuleT for TappedT<M> {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let y = self.inner.forward_t(x, train)?;
        record(&self.name, &y)?;
        Ok(y)
    }
}
