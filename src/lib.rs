//! Soft equivariance regularization (SER, [arXiv 2603.06693](https://arxiv.org/abs/2603.06693)) for any candle model.
//!
//! Self-supervised losses train the final embedding to ignore rotations and flips. As a side effect, position and
//! orientation are lost. SER keeps the base loss as it is. It asks, softly, that an *intermediate* token map `F` moves with
//! the image: `F(g·x) ≈ ρ(g)F(x)`, with the known action `ρ(g)` of a rotation, flip, scale or crop `g` on the token grid.
//!
//! # One term in any training loop
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
//! use rand::{SeedableRng, rngs::StdRng};
//! use ser_reg::{Regularizer, SerConfig, TokenGrid, grad, tap::Tapped};
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let patches = Conv2dConfig { stride: 4, ..Default::default() };
//! let model = Tapped::new("stem", candle_nn::conv2d(3, 16, 4, patches, vb.pp("stem"))?);
//! // once
//! let ser = Regularizer::new("stem", TokenGrid::square(6)?, 16, SerConfig::default(), vb.pp("ser"))?;
//!
//! let mut rng = StdRng::seed_from_u64(0);
//! let images = Tensor::randn(0f32, 1., (4, 3, 24, 24), &Device::Cpu)?;
//! let base_loss = model.forward(&images)?.sqr()?.mean_all()?;
//! // each step
//! let out = ser.forward(&images, &mut rng, |view| model.forward(view))?;
//! let loss = (base_loss + &out.loss)?;
//! // on the first step: does the gradient reach the layers before the tap, and the head?
//! for part in ["stem", "ser"] {
//!     grad::assert_reaches(&out.unweighted, grad::named(&vars, part))?;
//! }
//! # let _ = loss;
//! # Ok::<(), ser_reg::Error>(())
//! ```
//!
//! The [`guide`] continues from here: momentum encoders, batch norm, taps in models of others, and more.
//!
//! # How it works
//!
//! Two views `x₁ = g₁·x` and `x₂ = g₂·x` of an image are related by the element `g₂ ∘ g₁⁻¹`. It carries the map of the
//! first view into the frame of the second, where a token objective compares the two:
//!
//! ```text
//! element (pure algebra)  ->  grid operator (permutation | separable | sparse) + mask  ->  tensor op
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`regularizer`] | [`Regularizer`]: views, tap, head and loss in one object |
//! | [`ser`] | [`SerLoss`] of a [`MapPair`]: aligns two maps and compares them |
//! | [`tap`] | reaches an intermediate layer of any model |
//! | [`view`], [`partition`] | draw pairs of views; split a batch |
//! | [`loss`], [`projector`] | token objectives; the head |
//! | [`grad`] | does the gradient arrive, and how do two losses balance? |
//! | [`metric`] | how equivariant is a model? |
//! | [`group`], [`operator`], [`fibre`] | elements without tensors; their action on tokens and images; on channels |
//! | [`schedule`], [`ema`] | values over steps; the momentum encoder |
//! | `testing` (feature) | the law suite for your own actions |
//! | `contrib` (feature) | research methods beside SER, exempt from the semver promise |
//!
//! Optional features: `metrics` (SEIS, CKA, ridge, pose probe, Lie derivative, orbits), `testing`, `contrib`, `serde`
//! (settings implement `Serialize` and `Deserialize`), and candle's `cuda`, `cudnn`, `metal`, `mkl`, `accelerate`.

#![forbid(unsafe_code)]

mod check;
mod error;
mod grid;
mod storage;

#[cfg(feature = "contrib")]
pub mod contrib;
pub mod ema;
pub mod fibre;
pub mod grad;
pub mod group;
pub mod guide;
pub mod loss;
pub mod metric;
pub mod operator;
pub mod partition;
pub mod projector;
pub mod regularizer;
pub mod schedule;
pub mod ser;
pub mod tap;
#[cfg(feature = "testing")]
pub mod testing;
pub mod view;

pub use error::{Error, Result};
pub use grid::{Channels, Layout, TokenGrid};
pub use group::GroupAction;
pub use operator::{Filter, GridOperator, Padding, Resample};
pub use partition::Partition;
pub use projector::{Projector, ProjectorConfig};
pub use regularizer::{Regularizer, RegularizerOutput};
pub use schedule::Schedule;
pub use ser::{MapPair, SerConfig, SerLoss, SerOutput};
pub use view::{ViewConfig, ViewSampler};

// The code blocks of the README compile and run as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
