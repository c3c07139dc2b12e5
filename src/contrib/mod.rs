//! Research methods on top of the core, **exempt from the semver promise**: they may change in any release.
//!
//! | module | content |
//! |---|---|
//! | [`addon`] | EquiMod, AugSelf, E-SSL, STL and CARE: five published losses, each with the layer that it reads |
//! | [`companion`] | penalties on weights, vectors, predictions and scores; orbit pooling |
//!
//! Everything here uses the public paths of the core only, so it also serves as an example of what can be built on them.

pub mod addon;
pub mod companion;
