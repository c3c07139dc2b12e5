//! What the trainers share: data, augmentation, a small vision transformer and its evaluation.
//!
//! Written to be read and copied, not to be a library.

pub mod addon;
pub mod augment;
pub mod balance;
pub mod cli;
pub mod clip;
pub mod cost;
pub mod data;
pub mod encoder;
pub mod environment;
pub mod eval;
pub mod knn;
pub mod loader;
pub mod method;
pub mod nn;
pub mod optimizer;
pub mod overhead;
pub mod progress;
pub mod random;
pub mod records;
pub mod report;
pub mod run;
pub mod settings;
pub mod study;
pub mod views;
pub mod vit;
pub mod weights;
