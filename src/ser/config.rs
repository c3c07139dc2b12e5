//! What can be chosen about the loss.

use crate::loss::{InfoNce, Negatives, SameImage};
use crate::projector::ProjectorConfig;
use crate::{Error, Layout, Resample, Result};

use super::SoftWeight;

/// What is asked of corresponding tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// To be nearer to each other than to the tokens of the batch: [`loss::nt_xent`](crate::loss::nt_xent).
    NtXent {
        /// Which views the negatives come from.
        form: Negatives,
        /// Whether tokens of the same image are negatives.
        same_image: SameImage,
    },
    /// To be equal: [`loss::mse`](crate::loss::mse).
    Mse,
    /// To be equal once normalized: [`loss::normalized_mse`](crate::loss::normalized_mse).
    NormalizedMse,
    /// To point the same way: [`loss::cosine`](crate::loss::cosine).
    Cosine,
    /// To be equal: [`loss::l1`](crate::loss::l1).
    L1,
    /// To be equal: [`loss::smooth_l1`](crate::loss::smooth_l1).
    SmoothL1 {
        /// Where the parabola ends and the line begins; above 0.
        beta: f64,
    },
}

impl Default for Objective {
    /// NT-Xent in the paper's form, against other images only.
    fn default() -> Self {
        Self::NtXent {
            form: Negatives::default(),
            same_image: SameImage::default(),
        }
    }
}

/// Which side of a comparison gets no gradient.
///
/// In each direction the *anchors* are the tokens of one view where they stand, and the *keys* are those of the other
/// view, carried into the anchors' frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopGradient {
    /// Both sides learn.
    #[default]
    None,
    /// The keys are targets, as with a momentum encoder.
    Keys,
    /// The anchors are targets: the gradient passes through the group action only.
    Anchors,
}

/// What becomes of tokens without a counterpart: those that crops or rotations leave in one view only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validity {
    /// They weigh nothing: dropped as anchors, positives and negatives, and without gradient.
    #[default]
    Mask,
    /// They count in full, compared with what the padding shows: a control for the mask.
    Ignore,
}

/// The settings of a [`SerLoss`](super::SerLoss).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SerConfig {
    /// What is asked of corresponding tokens.
    pub objective: Objective,
    /// Temperature τ of NT-Xent; finite and above 0. The paper has 0.3 for MoCo-v3 and Barlow Twins and 0.5 for DINO,
    /// the authors' scripts 0.5 and 0.4.
    pub temperature: f64,
    /// The factor λ on the loss; finite and at least 0. With 0 nothing is computed.
    pub lambda: f64,
    /// The mean of both directions, or only the first view carried into the second's frame.
    pub symmetric: bool,
    /// Which side gets no gradient.
    pub stop_gradient: StopGradient,
    /// What becomes of tokens without a counterpart.
    pub validity: Validity,
    /// How the maps lay out their tokens.
    pub layout: Layout,
    /// At most so many anchors in each direction, spread evenly over the images; the cost of NT-Xent is quadratic in them,
    /// and it needs two. Which ones follows from the seed of the [`Relative`](crate::view::Relative) elements: give each
    /// step another.
    pub max_tokens: Option<usize>,
    /// The head between map and loss; `None` compares the tokens themselves. Where channels turn with the grid it works on
    /// each element of the group alike: see [`SerLoss::with_field`](super::SerLoss::with_field).
    pub projector: Option<ProjectorConfig>,
    /// Weights that fall with the visibility of a pair or a token; `None`: all tokens that count weigh the same.
    pub soft: Option<SoftWeight>,
    /// How tokens are resampled where the relative element is no permutation.
    pub resample: Resample,
    /// Added to the squared norm inside the root of cosines; finite and at least 0. With 0 a zero token gives NaN.
    pub eps: f64,
    /// Bytes of similarities that NT-Xent holds at a time.
    pub block_bytes: usize,
}

impl Default for SerConfig {
    /// The paper's NT-Xent with τ = 0.3 and λ = 1, both directions, gradient to both sides, the 512-wide head.
    fn default() -> Self {
        let InfoNce {
            temperature,
            eps,
            block_bytes,
        } = InfoNce::default();
        Self {
            objective: Objective::default(),
            temperature,
            lambda: 1.0,
            symmetric: true,
            stop_gradient: StopGradient::default(),
            validity: Validity::default(),
            layout: Layout::default(),
            max_tokens: None,
            projector: Some(ProjectorConfig::default()),
            soft: None,
            resample: Resample::default(),
            eps,
            block_bytes,
        }
    }
}

impl SerConfig {
    pub(crate) fn check(&self) -> Result<()> {
        check_lambda(self.lambda)?;
        self.info_nce().check()?;
        self.resample.check()?;
        if let Some(soft) = &self.soft {
            soft.check()?;
        }
        match self.objective {
            Objective::SmoothL1 { beta } if !(beta.is_finite() && beta > 0.0) => {
                Err(Error::config("beta", "a finite value above 0", beta))
            }
            Objective::NtXent { .. } if self.max_tokens == Some(1) => Err(Error::config(
                "max_tokens",
                "at least 2 (one token has no negatives), or None for all tokens",
                1,
            )),
            _ if self.max_tokens == Some(0) => Err(Error::config(
                "max_tokens",
                "at least 1, or None for all tokens",
                0,
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn info_nce(&self) -> InfoNce {
        InfoNce {
            temperature: self.temperature,
            eps: self.eps,
            block_bytes: self.block_bytes,
        }
    }
}

pub(super) fn check_lambda(lambda: f64) -> Result<()> {
    if lambda.is_finite() && lambda >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        "lambda",
        "a finite value of at least 0",
        lambda,
    ))
}
