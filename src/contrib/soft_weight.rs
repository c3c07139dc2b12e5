//! Soft Augmentation (arXiv 2211.04625): tokens weigh less if the other view sees less of them.

use super::check;
use crate::{Error, GroupAction, Result, view::Relative};

/// The unit whose visibility [`SoftWeight`] takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum WeightScope {
    /// The pair: all its tokens have the weight of the visible fraction of the view.
    #[default]
    Pairs,
    /// The token: it has the weight of the fraction of its area that the other view sees.
    Tokens,
    /// The product of the weights of the pair and of the token.
    Both,
}

/// Soft Augmentation as token weights: what an augmentation hides in part counts less.
///
/// ```text
/// p(v) = 1 − (1 − p_min)(1 − v)^k
/// ```
///
/// `v` is the visibility of a pair or of a token, 0 to 1. Quarter turns and flips have `v = 1`, and so
/// weights of 1. The loss of SER divides by the sum of the weights, so only their ratios matter.
///
/// Source: arXiv 2211.04625. The paper scales the loss of a sample by `p`.
///
/// ```
/// use ser_reg::{TokenGrid, contrib::{SoftWeight, WeightScope}, group::Affine, ser::Weights, view::Relative};
/// let soft = SoftWeight { p_min: 0.1, k: 2.0, scope: WeightScope::Tokens };
/// assert_eq!((soft.weight(0.0), soft.weight(1.0)), (0.1, 1.0));
/// assert!((soft.weight(0.5) - (1.0 - 0.9 * 0.25)).abs() < 1e-15);
///
/// let grid = TokenGrid::new(1, 4)?;
/// let shift = Affine::translation(0.0, 0.125)?; // half a token to the right
/// let [first, second] = soft.weights(&Relative::new(vec![shift], grid, grid)?, 1)?;
/// assert_eq!((&first[..], second[0]), (&[1.0, 1.0, 1.0, 0.775][..], 0.775));
/// let weights = Weights { tokens: [Some(&first), Some(&second)], ..Default::default() };
/// # let _ = weights;
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SoftWeight {
    /// The weight at visibility 0; within `[0, 1]`. The paper takes the chance level, 1 over the
    /// number of classes.
    pub p_min: f64,
    /// The exponent; finite and above 0. With a larger `k` a partial view costs less. The paper
    /// takes 2 to 4.
    pub k: f64,
    /// The unit whose visibility counts.
    pub scope: WeightScope,
}

impl Default for SoftWeight {
    /// `p_min = 0`, because SER has no classes and so no chance level; `k = 2`; pairs.
    fn default() -> Self {
        Self { p_min: 0.0, k: 2.0, scope: WeightScope::default() }
    }
}

impl SoftWeight {
    /// `p(v)`. A visibility outside `[0, 1]` is clamped.
    pub fn weight(&self, visibility: f64) -> f64 {
        let v = visibility.clamp(0.0, 1.0);
        // The formula, in a form that is exact at both ends.
        let lost = (1.0 - v).powf(self.k);
        self.p_min * lost + (1.0 - lost)
    }

    /// The token weights of both views for a batch of `images`, `B·N` each, sample after sample.
    ///
    /// Pass them to SER as `ser::Weights { tokens: [Some(&first), Some(&second)], .. }`. A relative
    /// element for the whole batch has the same weights for each image.
    ///
    /// # Errors
    /// If a setting is out of range, or `relative` has neither one element nor one per image. Also
    /// the errors of [`Relative::visibility`].
    pub fn weights<G: GroupAction>(
        &self,
        relative: &Relative<G>,
        images: usize,
    ) -> Result<[Vec<f32>; 2]> {
        if !(0.0..=1.0).contains(&self.p_min) {
            let expected = "a weight of 0 to 1";
            return Err(Error::config("SoftWeight::p_min", expected, self.p_min));
        }
        check::positive("SoftWeight::k", self.k)?;
        let elements = relative.len();
        if images == 0 || (elements != 1 && elements != images) {
            let expected = format!("a batch of {elements} images, as many as relative elements");
            return Err(Error::input("SoftWeight::weights", expected, images));
        }
        let cells = [relative.from_grid().len(), relative.to_grid().len()];
        let pairs = match self.scope {
            WeightScope::Tokens => None,
            WeightScope::Pairs | WeightScope::Both => Some(relative.pair_visibility()?),
        };
        let tokens = match self.scope {
            WeightScope::Pairs => None,
            WeightScope::Tokens | WeightScope::Both => Some(relative.visibility()?),
        };
        let weights = |view: usize| {
            let n = cells[view];
            let weight = |i: usize| {
                let pair = pairs.as_ref().map_or(1.0, |v| self.weight(v[view][i / n]));
                let token = tokens.as_ref().map_or(1.0, |v| self.weight(v[view][i]));
                (pair * token) as f32
            };
            let drawn: Vec<f32> = (0..elements * n).map(weight).collect();
            drawn.repeat(images / elements)
        };
        Ok([weights(0), weights(1)])
    }
}
