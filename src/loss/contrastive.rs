//! The settings and the result that all contrastive losses share.

use candle_core::Tensor;

use crate::{Error, Result, check};

/// The tokens that an anchor is contrasted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Negatives {
    /// Tokens of both views: the formula of the paper.
    #[default]
    BothViews,
    /// Tokens of the other view only: the formula of the authors' code.
    OtherView,
}

/// Whether tokens of the anchor's own image are negatives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum SameImage {
    /// They are left out, as in SER. Neighboring tokens may look alike without being wrong.
    #[default]
    Exclude,
    /// They are negatives, all but the anchor itself and its positive.
    Keep,
}

/// The settings of every contrastive loss: [`info_nce`](super::info_nce), [`nt_xent`](super::nt_xent) and its variants,
/// and [`SerLoss`](crate::SerLoss).
///
/// ```
/// use ser_reg::loss::{Contrastive, Negatives};
/// let authors = Contrastive { temperature: 0.5, negatives: Negatives::OtherView, ..Default::default() };
/// assert_eq!(authors.eps, 1e-6);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct Contrastive {
    /// Temperature τ, which divides the cosines; above 0. The paper uses 0.3 for MoCo-v3 and Barlow Twins and 0.5 for
    /// DINO. The authors' scripts use 0.5 and 0.4.
    pub temperature: f64,
    /// The views that negatives come from. [`info_nce`](super::info_nce) does not read it: its candidates say it.
    pub negatives: Negatives,
    /// Whether tokens of the anchor's own image are negatives. [`info_nce`](super::info_nce) does not read it: its labels
    /// say it.
    pub same_image: SameImage,
    /// Added to the squared norm inside the root of the cosine; at least 0. With 0 a zero token gives NaN.
    pub eps: f64,
    /// Bytes of cosines that are held at a time. It changes memory and speed, and the result by rounding only.
    pub block_bytes: usize,
}

impl Default for Contrastive {
    /// The paper's formula: τ = 0.3, tokens of other images in both views. Also eps = 1e-6 and 12 MiB.
    fn default() -> Self {
        Self {
            temperature: 0.3,
            negatives: Negatives::default(),
            same_image: SameImage::default(),
            eps: 1e-6,
            block_bytes: 12 << 20,
        }
    }
}

impl Contrastive {
    pub(crate) fn check(&self) -> Result<()> {
        check::positive("temperature", self.temperature)?;
        check::not_negative("eps", self.eps)?;
        if self.block_bytes == 0 {
            return Err(Error::config("block_bytes", "at least 1 byte", 0));
        }
        Ok(())
    }
}

/// The result of a contrastive loss: two scalars, f32 (f64 for f64 tokens).
#[derive(Clone, Debug)]
pub struct ContrastiveOutput {
    /// The loss, differentiable once with respect to every token set.
    pub loss: Tensor,
    /// Share of anchors whose positive is more similar than every negative by more than rounding, weighted as the loss.
    /// It is detached, and 0 where all tokens are equal.
    pub accuracy: Tensor,
}
