//! Which tokens count in one frame, and how much.

use rand::{rngs::StdRng, seq::SliceRandom};

use crate::{Error, GridOperator, Result};

use super::{SerConfig, Validity};

/// Weights of one's own: of samples, of tokens, or both; `None` is one each.
///
/// A token weighs the product of what is given. It weighs as an anchor, in the frame of its own view; each direction's
/// weights are taken as shares of their sum. A token of weight 0 is dropped as a masked one is: it takes no part as anchor,
/// positive or negative.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use ser_reg::{TokenGrid, group::D4, ser::{Objective, SerConfig, SerLoss, Weights}, view::Relative};
/// let config = SerConfig { objective: Objective::Mse, projector: None, ..Default::default() };
/// let ser = SerLoss::new(config, 1, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// let grid = TokenGrid::new(1, 2)?;
/// let relative = Relative::new(vec![D4::IDENTITY], grid, grid)?;
/// let map1 = Tensor::new(&[[[0f32], [0.]], [[0.], [0.]]], &Device::Cpu)?;
/// let map2 = Tensor::new(&[[[1f32], [1.]], [[3.], [3.]]], &Device::Cpu)?;
/// let weights = Weights { samples: Some(&[3., 1.]), ..Default::default() };
/// let out = ser.forward_weighted(&map1, &map2, &relative, &weights)?;
/// assert_eq!(out.loss.to_scalar::<f32>()?, (3. * 1. + 1. * 9.) / 4.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weights<'a> {
    /// One per sample, `B`.
    pub samples: Option<&'a [f32]>,
    /// One per token of the first and of the second view, `B·N` each, sample after sample.
    pub tokens: [Option<&'a [f32]>; 2],
}

impl Weights<'_> {
    /// That they fit `images` samples of `cells` tokens in either view.
    pub(super) fn check(&self, images: usize, cells: [usize; 2]) -> Result<()> {
        let given = [
            (self.samples, images, "sample"),
            (self.tokens[0], images * cells[0], "token of the first view"),
            (
                self.tokens[1],
                images * cells[1],
                "token of the second view",
            ),
        ];
        for (weights, count, of) in given {
            let Some(weights) = weights else { continue };
            if weights.len() != count {
                return Err(Error::input(
                    "SerLoss",
                    format!("one weight per {of}, {count}"),
                    weights.len(),
                ));
            }
            if let Some(w) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
                return Err(Error::input(
                    "SerLoss",
                    format!("finite weights of at least 0, one per {of}"),
                    w,
                ));
            }
        }
        Ok(())
    }
}

/// The weights of the tokens of one frame, sample after sample.
pub(super) struct TokenWeights {
    /// As handed in; `None`: one each.
    own: Option<Vec<f64>>,
    /// By visibility, one row per sample, or one for all; `None`: one each.
    soft: Option<Vec<f64>>,
    cells: usize,
}

impl TokenWeights {
    /// Of view `view`, 0 or 1; [`Weights::check`] has passed.
    pub fn new(
        weights: &Weights,
        view: usize,
        soft: Option<Vec<f64>>,
        images: usize,
        cells: usize,
    ) -> Self {
        let tokens = weights.tokens.get(view).copied().flatten();
        let at = |w: Option<&[f32]>, i: usize| w.and_then(|w| w.get(i)).map_or(1.0, |&w| w.into());
        let own = (tokens.is_some() || weights.samples.is_some()).then(|| {
            let each = 0..images * cells;
            each.map(|i| at(weights.samples, i / cells) * at(tokens, i))
                .collect()
        });
        Self { own, soft, cells }
    }

    /// Whether all tokens weigh the same, for want of weights.
    pub fn is_plain(&self) -> bool {
        self.own.is_none() && self.soft.is_none()
    }

    fn own(&self, image: usize, cell: u32) -> f64 {
        let own = self.own.as_ref();
        own.and_then(|w| w.get(image * self.cells + cell as usize))
            .map_or(1.0, |&w| w)
    }

    fn of(&self, image: usize, cell: u32) -> f64 {
        let soft = self.soft.as_ref().and_then(|w| {
            let row = if w.len() == self.cells { 0 } else { image };
            w.get(row * self.cells + cell as usize)
        });
        self.own(image, cell) * soft.map_or(1.0, |&w| w)
    }

    /// The weights of the chosen cells, the largest 1; `None`: one each.
    pub fn chosen(&self, cells: &[Vec<u32>]) -> Option<Vec<f32>> {
        if self.is_plain() {
            return None;
        }
        let all: Vec<f64> = each(cells)
            .map(|(image, cell)| self.of(image, cell))
            .collect();
        let top = all.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        Some(all.iter().map(|w| (w / top) as f32).collect())
    }

    /// The share of the own weight of these cells that visibility left. Of all valid ones, those that it left nothing of
    /// among them: they count in `Σ 1`.
    pub fn kept(&self, valid: &[Vec<u32>]) -> f64 {
        let all: f64 = each(valid).map(|(image, cell)| self.of(image, cell)).sum();
        let own: f64 = each(valid).map(|(image, cell)| self.own(image, cell)).sum();
        all / own
    }
}

/// The image and the cell of each of `cells`.
fn each(cells: &[Vec<u32>]) -> impl Iterator<Item = (usize, u32)> + '_ {
    let image = |(image, cells): (usize, &'_ Vec<u32>)| {
        cells.clone().into_iter().map(move |cell| (image, cell))
    };
    cells.iter().enumerate().flat_map(image)
}

/// The cells of each image that may count, whatever they weigh.
pub(super) fn valid(operator: &GridOperator, images: usize, config: &SerConfig) -> Vec<Vec<u32>> {
    let n = operator.out_grid().len() as u32;
    (0..images)
        .map(|image| match operator.valid(image) {
            Some(valid) if config.validity == Validity::Mask => {
                (0..n).filter(|&cell| valid[cell as usize]).collect()
            }
            _ => (0..n).collect(),
        })
        .collect()
}

/// The `valid` cells of each image that count: those of a weight above 0, at most `max_tokens` over all images.
///
/// Images share that cap evenly; what one cannot use goes to the others. Cells are drawn without replacement and kept in
/// order.
pub(super) fn choose(
    valid: &[Vec<u32>],
    weights: &TokenWeights,
    config: &SerConfig,
    rng: &mut StdRng,
) -> Vec<Vec<u32>> {
    let (mut cells, images) = (valid.to_vec(), valid.len());
    if !weights.is_plain() {
        for (image, own) in cells.iter_mut().enumerate() {
            own.retain(|&cell| weights.of(image, cell) > 0.0);
        }
    }
    let Some(mut left) = config.max_tokens else {
        return cells;
    };

    let mut order: Vec<usize> = (0..images).collect();
    order.shuffle(rng);
    order.sort_by_key(|&image| cells[image].len());
    for (done, &image) in order.iter().enumerate() {
        let own = &mut cells[image];
        let share = own.len().min(left / (images - done));
        let (drawn, _) = own.partial_shuffle(rng, share);
        drawn.sort_unstable();
        *own = drawn.to_vec();
        left -= share;
    }
    cells
}
