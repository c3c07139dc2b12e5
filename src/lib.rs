//! Soft equivariance regularization (SER) for any candle model.

#![forbid(unsafe_code)]

mod error;
mod grid;

pub mod grad;
pub mod group;
pub mod loss;
pub mod metric;
pub mod operator;
pub mod partition;
pub mod projector;
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
