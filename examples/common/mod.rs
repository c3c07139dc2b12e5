//! What the trainers share: data, augmentation, a small vision transformer and its evaluation.
//!
//! Written to be read and copied, not to be a library.

// Each trainer, and each test, uses a part of it.
#![allow(dead_code)]

pub mod augment;
pub mod data;
pub mod environment;
pub mod nn;
pub mod vit;
pub mod weights;
pub mod knn;
pub mod moco;
pub mod optimizer;
