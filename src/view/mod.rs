//! Pairs of geometric views of one batch, and the relative element that aligns their token maps.
//!
//! A [`ViewSampler`] draws what a [`ViewConfig`] allows: a [`ViewPair`] of two [`View`]s. Each view
//! is applied to the images; [`ViewPair::relative`] says how the map of the first view becomes
//! comparable with the map of the second.

mod config;
mod pair;
mod relative;
mod sampler;

pub use config::{AffineRange, CropRange, Pairing, ViewConfig};
pub use pair::{View, ViewPair};
pub use relative::Relative;
pub use sampler::ViewSampler;
