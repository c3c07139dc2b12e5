//! Taps: reach an intermediate map of any candle model.
//!
//! There are three ways, in order of preference.
//!
//! 1. *A model you own*: one line, [`record`], where the map exists. The model keeps no state and no new argument:
//!
//! ```
//! use candle_core::{Device, Result, Tensor};
//! use ser_reg::tap;
//!
//! struct Net;
//! impl Net {
//!     fn forward(&self, x: &Tensor) -> Result<Tensor> {
//!         let map = x.sqr()?;
//!         tap::record("block3", &map); // the one line
//!         map.mean_all()
//!     }
//! }
//!
//! let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
//! let (y, map) = tap::capture("block3", || Net.forward(&x))?;
//! assert_eq!(y.to_scalar::<f32>()?, 7.5);
//! assert_eq!(map.to_vec2::<f32>()?, [[1., 4.], [9., 16.]]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! 2. *A layer you can wrap*: [`Tapped`] around any `Module`, [`TappedT`] around any `ModuleT`, records what it returns:
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use candle_nn::{Activation, seq};
//! use ser_reg::tap::{self, Tapped};
//!
//! let net = seq().add(Tapped::new("relu", Activation::Relu)).add(Activation::Silu);
//! let x = Tensor::new(&[-1f32, 2.], &Device::Cpu)?;
//! let (_y, map) = tap::capture("relu", || net.forward(&x))?;
//! assert_eq!(map.to_vec1::<f32>()?, [0., 2.]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! 3. *A map that a foreign model already returns* (`get_intermediate_layers` and the like) needs no tap: hand it on with
//!    the [`Layout`](crate::Layout) that says where its tokens are:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use ser_reg::{Layout, TokenGrid};
//! # fn hidden_states(_: &Tensor) -> Result<Tensor> { Tensor::zeros((2, 1 + 49, 16), DType::F32, &Device::Cpu) }
//!
//! let x = Tensor::zeros((2, 3, 28, 28), DType::F32, &Device::Cpu)?;
//! let states = hidden_states(&x)?; // (B, CLS + 7·7, C)
//! let layout = Layout { prefix: 1, ..Default::default() };
//! assert_eq!(layout.tokens(&states, TokenGrid::square(7)?)?.dims(), [2, 49, 16]);
//! # Ok::<(), ser_reg::Error>(())
//! ```
//!
//! A captured tensor is the one the model computed, graph and all: a loss on it reaches the layers before the tap and
//! none after it. Whether it reaches *all* of those is another matter; ask [`assert_reaches`](crate::grad::assert_reaches).

use std::{cell::RefCell, rc::Rc};

use candle_core::{Module, ModuleT, Tensor};

use crate::{Error, Result};

thread_local! {
    /// The captures now running on this thread, innermost last.
    static RUNNING: RefCell<Vec<Rc<RefCell<Capture>>>> = const { RefCell::new(Vec::new()) };
}

/// What one capture has seen so far.
struct Capture {
    slots: Vec<(String, Seen)>,
    /// Every name recorded while it runs, for the message when an expected one is missing.
    reached: Vec<String>,
}

enum Seen {
    Never,
    Once(Tensor),
    Again,
}

impl Capture {
    fn see(&mut self, name: &str, x: &Tensor) -> bool {
        let slot = self.slots.iter_mut().find(|(n, _)| n == name);
        if let Some((_, seen)) = slot {
            *seen = match seen {
                Seen::Never => Seen::Once(x.clone()),
                _ => Seen::Again,
            };
            return true;
        }
        false
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        match self.slots.iter().find(|(n, _)| n == name) {
            Some((_, Seen::Once(x))) => Ok(x.clone()),
            Some((_, Seen::Again)) => Err(Error::Tap(format!(
                "layer `{name}` was recorded more than once in one capture: capture one forward at a time, and give \
                 each layer a name of its own"
            ))),
            _ => Err(Error::Tap(self.missing(name))),
        }
    }

    fn missing(&self, name: &str) -> String {
        let cure = if self.reached.is_empty() {
            "no tap was: run the model's forward inside the closure, on the same thread".to_string()
        } else if self.reached.iter().any(|n| n == name) {
            "only a capture nested in this one saw it".to_string()
        } else {
            format!("these were: `{}`", self.reached.join("`, `"))
        };
        format!("expected layer `{name}` to be recorded during the capture, but it was not; {cure}")
    }
}

/// A capture on the stack; leaving the scope, by whatever way, takes it off.
struct Guard(Rc<RefCell<Capture>>);

impl Guard {
    fn start<S: AsRef<str>>(names: &[S]) -> Self {
        let slots = names
            .iter()
            .map(|n| (n.as_ref().to_string(), Seen::Never))
            .collect();
        let capture = Rc::new(RefCell::new(Capture {
            slots,
            reached: Vec::new(),
        }));
        RUNNING.with_borrow_mut(|running| running.push(capture.clone()));
        Self(capture)
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        self.0.borrow().get(name)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Captures nest, so the last one is this one.
        RUNNING.with_borrow_mut(Vec::pop);
    }
}

/// Marks `x` as the map called `name`, for a [`capture`] that asks for it.
///
/// Outside a capture this is one thread-local look-up: nothing is cloned, nothing kept alive.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(1f32, &Device::Cpu)?;
/// tap::record("block3", &x); // nobody listens, nothing happens
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn record(name: &str, x: &Tensor) {
    // `try_with`: a forward that runs while its thread ends must not panic for a tap.
    let _ = RUNNING.try_with(|running| {
        let mut unclaimed = true;
        for capture in running.borrow().iter().rev() {
            let mut capture = capture.borrow_mut();
            if !capture.reached.iter().any(|n| n == name) {
                capture.reached.push(name.to_string());
            }
            unclaimed = unclaimed && !capture.see(name, x);
        }
    });
}

/// Runs `forward` and returns its output together with the tensor it recorded as `name`.
///
/// The error type is the closure's, so `candle_core::Result`, `anyhow::Result` and [`ser_reg::Result`](Result) all work.
///
/// Captures are per thread: what a model records on another thread is not seen. Captures nest: a record goes to the
/// innermost one that asks for its name, so a teacher can be captured inside the capture of a student.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let (y, tapped) = tap::capture("block3", || {
///     tap::record("block3", &x);
///     x.sqr()
/// })?;
/// assert_eq!((y.to_scalar::<f32>()?, tapped.to_scalar::<f32>()?), (9., 3.));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// The closure's error, if it fails. [`Error::Tap`] if `name` was not recorded exactly once; the message lists the names
/// that were.
pub fn capture<T, E: From<Error>>(
    name: &str,
    forward: impl FnOnce() -> Result<T, E>,
) -> Result<(T, Tensor), E> {
    let guard = Guard::start(&[name]);
    let output = forward()?;
    Ok((output, guard.get(name)?))
}

/// [`capture`] for several layers of one forward; the tensors come in the order of `names`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::tap;
///
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let (_y, maps) = tap::capture_all(&["block1", "block3"], || {
///     tap::record("block1", &x);
///     let x = x.sqr()?;
///     tap::record("block3", &x);
///     x.sqr()
/// })?;
/// assert_eq!(maps[1].to_scalar::<f32>()?, 9.);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`capture`], for the first of `names` that was not recorded exactly once.
pub fn capture_all<T, E: From<Error>>(
    names: &[impl AsRef<str>],
    forward: impl FnOnce() -> Result<T, E>,
) -> Result<(T, Vec<Tensor>), E> {
    let guard = Guard::start(names);
    let output = forward()?;
    let tensors: Result<_> = names.iter().map(|n| guard.get(n.as_ref())).collect();
    Ok((output, tensors?))
}

/// A `Module` whose output is [`record`]ed under a name; otherwise it is the module it wraps.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use ser_reg::tap::{self, Tapped};
///
/// let layer = Tapped::new("layer", |x: &Tensor| x.sqr());
/// let x = Tensor::new(3f32, &Device::Cpu)?;
/// let (_y, map) = tap::capture("layer", || layer.forward(&x)?.sqr())?;
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
/// let (_y, map) = tap::capture("layer", || layer.forward_t(&x, true))?;
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
        Self {
            name: name.into(),
            inner,
        }
    }
}

impl<M: ModuleT> TappedT<M> {
    /// Wraps `inner`, whose output will be known as `name`.
    pub fn new(name: impl Into<String>, inner: M) -> Self {
        Self {
            name: name.into(),
            inner,
        }
    }
}

impl<M: Module> Module for Tapped<M> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.inner.forward(x)?;
        record(&self.name, &y);
        Ok(y)
    }
}

impl<M: ModuleT> ModuleT for TappedT<M> {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let y = self.inner.forward_t(x, train)?;
        record(&self.name, &y);
        Ok(y)
    }
}
