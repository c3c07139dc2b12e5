//! Soft equivariance regularization (SER, [arXiv 2603.06693](https://arxiv.org/abs/2603.06693)) for any candle model.
//!
//! Self-supervised losses make the last embedding invariant. SER keeps them as they are and adds a soft demand on an
//! *intermediate* token map `F`: if the image is moved by `g`, the map should change by the known action `ρ(g)` on the
//! token grid, `F(g·x) ≈ ρ(g)F(x)`.
//!
//! **A view is a chart on the source image; aligning two views is a change of charts.** With `x₁ = g₁·x` and `x₂ = g₂·x`
//! the element `g₂ ∘ g₁⁻¹` carries the map of the first view into the frame of the second, and a token objective compares
//! the two:
//!
//! ```text
//! element (pure algebra)  ->  grid operator (permutation | separable | sparse) + mask  ->  tensor op
//! ```
//!
//! | module | what it is for |
//! |---|---|
//! | [`group`] | quarter turns, flips, scales, crops, affine maps; no tensors |
//! | [`operator`] | how an element acts on tokens, maps and images; forward and adjoint |
//! | [`fibre`] | channels that turn with the grid |
//! | [`view`], [`partition`], [`schedule`] | sampling pairs of views, cutting the batch, values over time |
//! | [`tap`] | reaching an intermediate layer of any model |
//! | [`loss`], [`projector`], [`ser`] | token objectives; the head; [`SerLoss`], which puts them together |
//! | [`grad`] | does the gradient arrive? |
//! | [`metric`] | how equivariant is a model? |
//! | `testing` | the law suite for your own actions (feature `testing`) |
//!
//! # A training step
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use rand::{SeedableRng, rngs::StdRng};
//! use ser_reg::{SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler, grad, tap};
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let patch = candle_nn::Conv2dConfig { stride: 4, ..Default::default() };
//! let stem = tap::Tapped::new("stem", candle_nn::conv2d(3, 16, 4, patch, vb.pp("stem"))?);
//! let ser = SerLoss::new(SerConfig::default(), 16, vb.pp("ser"))?;
//! let sampler = ViewSampler::new(TokenGrid::square(6)?, ViewConfig::default())?;
//!
//! let images = Tensor::randn(0f32, 1., (4, 3, 24, 24), &Device::Cpu)?;
//! let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 4)?;
//! let (_, map1) = tap::capture("stem", || stem.forward(&views.first.apply(&images)?))?;
//! let (_, map2) = tap::capture("stem", || stem.forward(&views.second.apply(&images)?))?;
//! let out = ser.forward(&map1, &map2, &views.relative())?;
//! grad::assert_reaches(&out.loss, grad::named(&vars, ""))?;
//! # Ok::<(), ser_reg::Error>(())
//! ```
//!
//! Symbols are in `docs/notation.md`, the architecture in `docs/design.md` of the repository.

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

// The code blocks of the documents compile and run as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/integrate-your-model.md")]
struct IntegrateYourModel;

#[cfg(doctest)]
#[doc = include_str!("../docs/symmetries.md")]
struct Symmetries;

#[cfg(doctest)]
#[doc = include_str!("../docs/fields.md")]
struct Fields;

#[cfg(all(doctest, feature = "contrib"))]
#[doc = include_str!("../docs/companions.md")]
struct Companions;

#[cfg(all(doctest, feature = "contrib"))]
#[doc = include_str!("../docs/addons.md")]
struct Addons;
