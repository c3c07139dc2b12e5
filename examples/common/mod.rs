//! What the trainers share: data, augmentation, a small vision transformer and its evaluation.
//!
//! Written to be read and copied, not to be a library.

// Each trainer, and each test, uses a part of it.
#![allow(dead_code)]

pub mod augment;
pub mod cli;
pub mod data;
pub mod encoder;
pub mod environment;
pub mod eval;
pub mod knn;
pub mod moco;
pub mod nn;
pub mod optimizer;
pub mod progress;
pub mod records;
pub mod report;
pub mod vit;
pub mod weights;
