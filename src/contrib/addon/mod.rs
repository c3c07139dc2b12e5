//! Add-ons to an invariance loss that make features equivariant, or aware of augmentations, each with the layer it reads.
//!
//! | add-on | asks of the features | views of its own |
//! |---|---|---|
//! | [`EquiMod`] | to be predictable from those of the picture itself and the augmentation | the picture itself |
//! | [`AugSelf`] | to tell how two augmentations differ | – |
//! | [`ESsl`] | to tell which way up a picture is | a small crop in [four turns](four_rotations) |
//! | [`Stl`] | to move by a transformation seen on another picture | two pictures transformed alike |
//! | [`Care`] | to keep inner products between pictures augmented alike | chunks augmented alike |
//!
//! All were made for the final embedding. The paper of SER (arXiv 2603.06693) moves them to an intermediate layer, where they no
//! longer pull against the invariance loss: [`Reads::Tokens`] in the place of [`Reads::Final`]. The code of that is not published;
//! the pooled input `h = mean over tokens of LayerNorm(T)` is this crate's reading of it.
//!
//! Heads train with the encoder and are thrown away afterwards; batch normalization in them knows the batch at hand only. Weights
//! start uniform within `1/√inputs`, and come from the caller's `VarBuilder`, f32 or f64; features in half precision are read in
//! f32. Nothing here reduces over processes.
//!
//! `docs/addons.md` of the repository has formulas, defaults and commands.

mod aug_self;
mod care;
mod equi_mod;
mod essl;
mod nn;
mod parameters;
mod reads;
mod stl;

pub use aug_self::{AugSelf, AugSelfConfig};
pub use care::{Care, CareConfig, GramMean};
pub use equi_mod::{EquiMod, EquiModConfig};
pub use essl::{ESsl, ESslConfig, four_rotations};
pub use parameters::{
    AugmentationParameters, CropParameters, JitterParameters, ParameterStatistics,
};
pub use reads::Reads;
pub use stl::{Stl, StlConfig};

use candle_core::Tensor;

use crate::{Error, Result};

/// What an add-on returns.
#[derive(Clone, Debug)]
pub struct AddonOutput {
    /// `λ · unweighted`, to be added to the base loss; a scalar, differentiable.
    pub loss: Tensor,
    /// The loss before λ: what `grad::assert_reaches` should see.
    pub unweighted: Tensor,
    /// Figures worth logging, by name; detached scalars.
    pub figures: Vec<(&'static str, Tensor)>,
}

impl AddonOutput {
    fn weighted(
        unweighted: Tensor,
        lambda: f64,
        figures: Vec<(&'static str, Tensor)>,
    ) -> Result<Self> {
        Ok(Self {
            loss: (&unweighted * lambda)?,
            unweighted,
            figures,
        })
    }
}

fn check_temperature(field: &'static str, temperature: f64) -> Result<()> {
    if temperature.is_finite() && temperature > 0.0 {
        return Ok(());
    }
    Err(Error::config(field, "a finite value above 0", temperature))
}
