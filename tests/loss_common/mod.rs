//! The numbers of `tests/common` for tests without strategies.
#![allow(unused_imports)]

#[path = "../common/cases.rs"]
mod cases;
#[path = "../common/numbers.rs"]
mod numbers;

pub use cases::cases;
pub use numbers::{values as flat, *};
