//! The trainers' package: what the three trainers, evaluate, study and finetune share; never published.
//!
//! It has the data sets and their augmentation, a small vision transformer, the base methods, runs with checkpoints, the
//! evaluation and the reports. The programs are in the folder above: `moco_v3`, `dino`, `barlow_twins`, `finetune`,
//! `evaluate`, `study`.

// First: the modules below have its macros in place of the standard ones.
#[macro_use]
pub mod terminal;

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
pub mod finite;
pub mod knn;
pub mod loader;
pub mod method;
pub mod nn;
pub mod optimizer;
pub mod overhead;
pub mod progress;
pub mod random;
pub mod reach;
pub mod records;
pub mod report;
pub mod run;
pub mod settings;
pub mod study;
pub mod views;
pub mod vit;
pub mod weights;
