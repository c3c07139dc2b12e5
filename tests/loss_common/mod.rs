//! The numbers of `tests/common` for tests without strategies.
#![allow(unused_imports)]

#[path = "../common/numbers.rs"]
mod numbers;

pub use numbers::{values as flat, *};
