//! The input of the loss: two maps, what relates them, and optional parts.

use candle_core::Tensor;

use crate::group::{Element, FieldType};
use crate::projector::Projector;
use crate::view::Relative;

use super::Weights;

/// The token maps of two views, with the relative elements that align them.
///
/// Maps are (B, prefix + N, C), (B, C, H, W) or (B, H, W, C), as [`SerConfig::layout`](super::SerConfig::layout) says. The
/// first map has the grid [`Relative::from_grid`], the second [`Relative::to_grid`]. All other parts are optional.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ser_reg::{MapPair, SerConfig, SerLoss, TokenGrid, group::D4, ser::Objective, view::Relative};
/// let ser = SerLoss::new(SerConfig { objective: Objective::Mse, ..Default::default() })?;
/// let grid = TokenGrid::square(2)?;
/// let map1 = Tensor::new(&[[[1f32], [2.], [3.], [4.]]], &Device::Cpu)?;
/// let map2 = Tensor::new(&[[[2f32], [1.], [4.], [3.]]], &Device::Cpu)?; // columns reversed
/// let relative = Relative::new(vec![D4::HFLIP], grid, grid)?;
/// let out = ser.forward(&MapPair::new([&map1, &map2], &relative))?;
/// assert_eq!(out.loss.to_scalar::<f32>()?, 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MapPair<'a, G = Element> {
    pub(super) maps: [&'a Tensor; 2],
    pub(super) relative: &'a Relative<G>,
    pub(super) head: Option<&'a Projector>,
    pub(super) keys: Option<Keys<'a>>,
    pub(super) field: Option<&'a FieldType>,
    pub(super) weights: Weights<'a>,
    pub(super) seed: u64,
}

/// The maps of a second encoder, with its head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys<'a> {
    pub maps: [&'a Tensor; 2],
    pub head: Option<&'a Projector>,
}

impl<'a, G> MapPair<'a, G> {
    /// Two maps of one encoder, compared without a head. `relative` carries the first view into the second's frame.
    pub fn new(maps: [&'a Tensor; 2], relative: &'a Relative<G>) -> Self {
        Self {
            maps,
            relative,
            head: None,
            keys: None,
            field: None,
            weights: Weights::default(),
            seed: 0,
        }
    }

    /// Compares the tokens behind `head`. `None`: the tokens themselves.
    pub fn head(mut self, head: impl Into<Option<&'a Projector>>) -> Self {
        self.head = head.into();
        self
    }

    /// Takes the keys from a second encoder, as with MoCo-v3 and DINO: its `maps` of views 1 and 2, behind its own `head`.
    ///
    /// The anchors of one view then meet the keys of the other view. No gradient reaches the keys.
    pub fn keys(mut self, maps: [&'a Tensor; 2], head: impl Into<Option<&'a Projector>>) -> Self {
        let head = head.into();
        self.keys = Some(Keys { maps, head });
        self
    }

    /// How the channels of the maps transform, where no head is given. A head has a field of its own.
    pub fn field(mut self, field: &'a FieldType) -> Self {
        self.field = Some(field);
        self
    }

    /// Weights of samples or tokens.
    pub fn weights(mut self, weights: &Weights<'a>) -> Self {
        self.weights = *weights;
        self
    }

    /// The seed for the draw of [`SerConfig::max_tokens`](super::SerConfig::max_tokens): give each step another one.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}
