//! The base methods: heads and losses of embeddings, one file per method.
//!
//! A trainer brings encoder, data and schedule; what is here takes `(B, C)` features or embeddings and knows nothing of
//! the encoder. MoCo-v3, DINO and Barlow Twins have trainers; [`objectives`] has further losses to swap in.

pub mod barlow;
pub mod dino;
pub mod head;
pub mod moco;
pub mod objectives;

pub use head::{Head, HeadConfig};
