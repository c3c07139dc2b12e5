//! Published methods beside SER. This module is **exempt from the semver promise**: it may change
//! in any release.
//!
//! Add-ons train features with one more loss on a layer. Each returns an [`AddonOutput`].
//!
//! | add-on | source | task | extra views |
//! |---|---|---|---|
//! | [`EquiMod`] | [2211.01244](https://arxiv.org/abs/2211.01244) | predict the embedding of a view from the image and the augmentation | the unaugmented image |
//! | [`AugSelf`] | [2111.09613](https://arxiv.org/abs/2111.09613) | predict how the augmentations of two views differ | none |
//! | [`ESsl`] | [2111.00899](https://arxiv.org/abs/2111.00899) | classify the rotation of a crop | a small crop in [four rotations](four_rotations) |
//! | [`Stl`] | [2501.08712](https://arxiv.org/abs/2501.08712) | apply a transformation that was seen on another image | pairs of images with one augmentation |
//! | [`Care`] | [2306.13924](https://arxiv.org/abs/2306.13924) | keep inner products between images | chunks of images with one augmentation |
//!
//! Companions regularize or pool tensors of any model.
//!
//! | item | source | reads |
//! |---|---|---|
//! | [`ReynoldsPenalty`] | [2601.05028](https://arxiv.org/abs/2601.05028) | kernels and positional tables |
//! | [`RegularRep`] | [2506.08244](https://arxiv.org/abs/2506.08244) | vectors of two views |
//! | [`PredictionConsistency`] | [2203.03304](https://arxiv.org/abs/2203.03304) | logits of K views |
//! | [`OrbitPool`], [`InvariantIntegration`] | [2202.03967](https://arxiv.org/abs/2202.03967) | token maps, images |
//! | [`EqSim`] | [2303.14465](https://arxiv.org/abs/2303.14465) | a matrix of scores |
//! | [`SoftWeight`] | [2211.04625](https://arxiv.org/abs/2211.04625) | the overlap of two views; it returns token weights for SER |
//!
//! The authors of the add-ons use the final embedding. The SER paper
//! ([2603.06693](https://arxiv.org/abs/2603.06693)) moves their losses to an intermediate layer:
//! [`AddonInput::Tokens`] instead of [`AddonInput::Embedding`]. Its code is not published. The
//! pooled input `h = mean over tokens of LayerNorm(T)` is the reading of this crate.
//!
//! The heads of the add-ons are needed in training only. They normalize with the statistics of the
//! current batch. Linear weights start uniform within `1/√inputs`. Weights are f32 or f64; features
//! in half precision are computed in f32.
//!
//! The groups of the companions are subgroups of D4, so each action is an exact permutation. Input
//! in half precision is computed in f32: a loss is f32, and a result with the shape of the input
//! has the type of the input.
//!
//! All losses are means over the local batch. Nothing is reduced over processes.
//!
//! This module imports public paths of the crate only, so it shows what can be built on them. The
//! guides `docs/addons.md` and `docs/companions.md` of the repository say when to use which method.

mod addon;
mod aug_self;
mod autograd;
mod care;
mod check;
mod consistency;
mod e_ssl;
mod eq_sim;
mod equi_mod;
mod integration;
mod nn;
mod orbit;
mod orbit_pool;
mod parameters;
mod regular;
mod reynolds;
mod soft_weight;
mod stl;

pub use addon::{AddonInput, AddonOutput};
pub use aug_self::{AugSelf, AugSelfConfig};
pub use care::{Care, CareConfig, GramMean};
pub use consistency::{Divergence, PredictionConsistency, mean_pairwise_symmetric_kl};
pub use e_ssl::{ESsl, ESslConfig, four_rotations};
pub use eq_sim::{EqSim, EqSimOutput, Margin};
pub use equi_mod::{EquiMod, EquiModConfig};
pub use integration::{InvariantIntegration, Monomial};
pub use orbit_pool::{OrbitPool, Pool};
pub use parameters::{
    AugmentationParameters, CropParameters, JitterParameters, ParameterStatistics,
};
pub use regular::{Distance, RegularRep};
pub use reynolds::{ReynoldsPenalty, WeightSpace};
pub use soft_weight::{SoftWeight, WeightScope};
pub use stl::{Stl, StlConfig};
