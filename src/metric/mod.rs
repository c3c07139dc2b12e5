//! How equivariant is a model? Scores of any closure from images to token maps or vectors.
//!
//! A closure is all that a metric needs of a model; a layer inside is reached through [`tap`](crate::tap), several of
//! them through [`tap::capture_all`](crate::tap::capture_all).
//!
//! | question | metric | equivariant or invariant | trap |
//! |---|---|---|---|
//! | Does the map move with the image? | [`EqScore`], at several layers [`EqScore::measure_layers`] | 1 (error: 0) | plain cosine is high for any ViT: read the centered one and the nulls |
//! | The same, in decibels (EQ-T, EQ-R) | [`EqPsnr`], [`psnr`] | ∞ dB | depends on the range that is named |
//! | The same, up to a linear re-encoding of channels? | [`cka`] of [`MapPair::matched`] | 1 | few rows and many features: debiased only |
//! | Is the content kept, unmoved or in another order, whatever the action? | [`Seis`] | 1 and 1 invariant, 1 and low equivariant | calls shuffled channels destroyed; "low" is the null; needs far more observations than positions |
//! | Does it move with motions of less than a token? | [`LieDerivative`], layer-wise on truncated models | 0 | per unit of `t`; coarse maps cannot be carried exactly |
//! | Does the final vector stay as it is? | [`Orbit`], [`LieDerivative::of_vectors`] | variance 0, consistency 1 | a collapsed model is perfectly invariant |
//! | Can the pose still be read? | [`PoseProbe`] | above chance: not invariant | images without an upright pose |
//! | Can the parameters of the motion? | [`parameter_r2`] | R² near 0: invariant | train and test must not share images |
//!
//! No single figure will do: a constant map is perfectly equivariant and invariant. Report an equivariance score with
//! its nulls, one of invariance, and the accuracy of the task.
//!
//! All is computed in `f64` on the host and depends neither on the number of threads nor on the chunk, unless the
//! closure does. What does not fit (shapes, too few rows and, but for [`EqScore`], which passes them on as NaN, values
//! that are not finite) is an [`Error`](crate::Error). What is well formed but undefined (the score of a constant map)
//! is NaN, so that a collapsed model does not end a run.

mod cka;
mod lie;
mod linalg;
mod orbit;
mod pair;
mod pose;
mod psnr;
mod ridge;
mod run;
mod score;
mod seis;

pub use cka::{Hsic, cka};
pub use lie::{Generator, LieDerivative, LieReport};
pub use orbit::{Orbit, OrbitReport};
pub use pair::{Layer, MapPair};
pub use pose::{PoseProbe, PoseReport};
pub use psnr::{EqPsnr, PsnrReport, psnr};
pub use ridge::{ParameterR2, Ridge, parameter_r2};
pub use score::{Comparison, EqScore, Report, Scores};
pub use seis::{Seis, SeisReport, SeisScore};
