//! How equivariant is a model? Scores of any closure from images to token maps or vectors.
//!
//! A metric needs a closure of a model and nothing else. The closure returns
//! `candle_core::Result`; a layer inside the model is reached through
//! [`tap::capture_until`](crate::tap), several layers through
//! [`tap::capture_all`](crate::tap::capture_all).
//!
//! [`EqScore`] and [`stride_aligned`] are always there, the others with the feature `metrics`.
//!
//! | question | metric | equivariant or invariant | trap |
//! |---|---|---|---|
//! | Does the map move with the image? | [`EqScore`] | 1 (error: 0); chance: its nulls | the plain cosine of a ViT is high: read the centered one and the nulls |
//! | The same, in decibels (EQ-T, EQ-R) | [`Scores::psnr`] | ∞ dB | depends on the stated range |
//! | Can a layer commute with flips at all? | [`stride_aligned`] | true | a ceiling that no training removes |
//! | Do the maps agree up to a linear re-encoding of channels? | `cka` of `MatchedMaps::matched` | 1; chance: 0 debiased | few rows and many features: debiased only |
//! | Is the content kept, unmoved or in another order, whatever the action? | `Seis` | 1 and 1 invariant, 1 and low equivariant; chance: its null | calls shuffled channels destroyed; needs far more observations than positions |
//! | Does the map move with motions of less than a token? | `LieDerivative`, layer-wise on truncated models | 0 | per unit of `t`; coarse maps cannot be carried exactly |
//! | Does the final vector stay as it is? | `Orbit`, `LieDerivative::of_vectors` | variance 0, consistency 1; chance: variance about 1, consistency 1 / classes | a collapsed model is perfectly invariant |
//! | Can the orientation still be read? | `PoseProbe` | above chance (1 / orientations): not invariant | images without an upright orientation |
//! | Can the parameters of the motion be read? | `parameter_r2` | R² near 0: invariant | train and test must not share images |
//!
//! No single number is enough: a constant map is perfectly equivariant and invariant. Report an
//! equivariance score with its nulls, one score of invariance, and the accuracy of the task.
//!
//! Everything is computed in `f64` on the host. It depends neither on the number of threads nor on
//! the chunk, unless the closure does. A shape that does not fit, too few rows and values that are
//! not finite are an [`Error`](crate::Error); [`EqScore`] alone passes values that are not finite
//! on as NaN. What is well formed but undefined (the score of a constant map) is NaN, so that a
//! collapsed model does not end a run.

mod alignment;
mod harness;
mod layer;
mod matched;
mod score;
mod scores;
mod unit;

#[cfg(feature = "metrics")]
mod cka;
#[cfg(feature = "metrics")]
mod generator;
#[cfg(feature = "metrics")]
mod lie;
#[cfg(feature = "metrics")]
mod linalg;
#[cfg(feature = "metrics")]
mod orbit;
#[cfg(feature = "metrics")]
mod pose;
#[cfg(feature = "metrics")]
mod ridge;
#[cfg(feature = "metrics")]
mod seis;

pub use alignment::stride_aligned;
pub use layer::Layer;
pub use score::{EqScore, Report};
pub use scores::{Comparison, Scores};

#[cfg(feature = "metrics")]
pub use {
    cka::{Hsic, cka},
    generator::Generator,
    lie::{LieDerivative, LieReport},
    matched::MatchedMaps,
    orbit::{Orbit, OrbitReport},
    pose::{PoseProbe, PoseReport},
    ridge::{ParameterR2, Ridge, parameter_r2},
    seis::{Seis, SeisReport, SeisScore},
};
