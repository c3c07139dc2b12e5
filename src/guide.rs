//! The guides: step by step, with code that compiles.

#[doc = include_str!("../docs/integrate-your-model.md")]
pub mod integrate {}

#[cfg(any(not(doctest), feature = "testing"))]
#[doc = include_str!("../docs/symmetries.md")]
pub mod symmetries {}

#[doc = include_str!("../docs/fields.md")]
pub mod fields {}

#[cfg(feature = "contrib")]
#[doc = include_str!("../docs/companions.md")]
pub mod companions {}

#[cfg(feature = "contrib")]
#[doc = include_str!("../docs/addons.md")]
pub mod addons {}

#[doc = include_str!("../docs/notation.md")]
pub mod notation {}
