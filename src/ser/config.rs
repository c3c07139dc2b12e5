//! The settings of the loss.

use crate::loss::Contrastive;
use crate::{Error, Layout, Resample, Result, check};

/// The loss between corresponding tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Objective {
    /// NT-Xent: [`loss::nt_xent`](crate::loss::nt_xent), in both directions if [`SerConfig::symmetric`] is set.
    NtXent(Contrastive),
    /// Mean squared error: [`loss::mse`](crate::loss::mse).
    Mse,
    /// Mean squared error of normalized tokens: [`loss::normalized_mse`](crate::loss::normalized_mse).
    NormalizedMse {
        /// Added to the squared norm inside the root; at least 0.
        eps: f64,
    },
    /// One minus the cosine: [`loss::cosine`](crate::loss::cosine).
    Cosine {
        /// Added to the squared norm inside the root; at least 0.
        eps: f64,
    },
    /// Mean absolute error: [`loss::l1`](crate::loss::l1).
    L1,
    /// Huber's loss over β: [`loss::smooth_l1`](crate::loss::smooth_l1).
    SmoothL1 {
        /// Where the parabola ends and the line begins; above 0.
        beta: f64,
    },
}

impl Default for Objective {
    /// NT-Xent with the paper's settings.
    fn default() -> Self {
        Self::NtXent(Contrastive::default())
    }
}

/// The side of a comparison that gets no gradient.
///
/// In each direction the *anchors* are the tokens of one view in their own frame. The *keys* are the tokens of the other
/// view, aligned with the anchors' frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum StopGradient {
    /// Both sides learn.
    #[default]
    None,
    /// The keys are fixed targets, as with a momentum encoder.
    Keys,
}

/// The settings of a [`SerLoss`](super::SerLoss).
///
/// ```
/// use ser_reg::{SerConfig, loss::Contrastive, ser::Objective};
/// let contrastive = Contrastive { temperature: 0.5, ..Default::default() };
/// let dino = SerConfig { lambda: 0.3, objective: Objective::NtXent(contrastive), ..Default::default() };
/// assert!(dino.symmetric);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct SerConfig {
    /// The factor λ on the loss; at least 0.
    pub lambda: f64,
    /// The loss between corresponding tokens.
    pub objective: Objective,
    /// Whether the loss is the mean over both directions. Otherwise only the second view's tokens are anchors.
    pub symmetric: bool,
    /// The side that gets no gradient.
    pub stop_gradient: StopGradient,
    /// How the maps arrange their tokens.
    pub layout: Layout,
    /// The largest number of anchors in each direction, spread evenly over the images. `None`: all. The cost of NT-Xent is
    /// quadratic in it. [`MapPair::seed`](super::MapPair::seed) decides which tokens are drawn.
    pub max_tokens: Option<usize>,
    /// How keys are resampled where the relative element is not a permutation of tokens.
    pub resample: Resample,
}

impl Default for SerConfig {
    /// λ = 1 and the paper's NT-Xent, in both directions, with a gradient to both sides.
    fn default() -> Self {
        Self {
            lambda: 1.0,
            objective: Objective::default(),
            symmetric: true,
            stop_gradient: StopGradient::default(),
            layout: Layout::default(),
            max_tokens: None,
            resample: Resample::default(),
        }
    }
}

impl SerConfig {
    pub(super) fn check(&self) -> Result<()> {
        check::not_negative("lambda", self.lambda)?;
        self.resample.check()?;
        match self.objective {
            Objective::NtXent(contrastive) => contrastive.check()?,
            Objective::NormalizedMse { eps } | Objective::Cosine { eps } => {
                check::not_negative("eps", eps)?;
            }
            Objective::SmoothL1 { beta } => check::positive("beta", beta)?,
            Objective::Mse | Objective::L1 => {}
        }
        let least = match self.objective {
            Objective::NtXent(_) => 2,
            _ => 1,
        };
        match self.max_tokens {
            Some(most) if most < least => Err(Error::config(
                "max_tokens",
                format!("at least {least} for this objective, or None for all tokens"),
                most,
            )),
            _ => Ok(()),
        }
    }
}
