//! The tokens that count in one frame, and their weights.

use rand::{rngs::StdRng, seq::SliceRandom};

use crate::{GridOperator, Result, check};

/// Weights of samples, of tokens, or both. `None` is one each.
///
/// The weight of a token is the product of both. It applies to the token as an anchor, in the frame
/// of its own view. Each direction divides by the sum of its weights. An anchor of weight 0 is
/// dropped together with its key, as if it were masked. In the other direction the token is still a
/// key, unless the anchors that read it have weight 0 too.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{MapPair, SerConfig, SerLoss, TokenGrid, group::D4, ser::{Objective, Weights}, view::Relative};
/// let ser = SerLoss::new(SerConfig { objective: Objective::Mse, ..Default::default() })?;
/// let grid = TokenGrid::new(1, 2)?;
/// let relative = Relative::new(vec![D4::IDENTITY], grid, grid)?;
/// let map1 = Tensor::new(&[[[0f32], [0.]], [[0.], [0.]]], &Device::Cpu)?;
/// let map2 = Tensor::new(&[[[1f32], [1.]], [[3.], [3.]]], &Device::Cpu)?;
/// let weights = Weights { samples: Some(&[3., 1.]), ..Default::default() };
/// let out = ser.forward(&MapPair::new([&map1, &map2], &relative).weights(&weights))?;
/// assert_eq!(out.loss.to_scalar::<f32>()?, (3. * 1. + 1. * 9.) / 4.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weights<'a> {
    /// One weight per sample, `B`.
    pub samples: Option<&'a [f32]>,
    /// One weight per token of the first and of the second view, `B·N` each, sample after sample.
    pub tokens: [Option<&'a [f32]>; 2],
}

impl Weights<'_> {
    /// Checks that the weights fit `images` samples of `cells` tokens in either view.
    pub(super) fn check(&self, images: usize, cells: [usize; 2]) -> Result<()> {
        let given = [
            (self.samples, images, "sample"),
            (self.tokens[0], images * cells[0], "token of the first view"),
            (self.tokens[1], images * cells[1], "token of the second view"),
        ];
        for (weights, count, of) in given {
            if let Some(weights) = weights {
                check::weights("SerLoss", weights, count, of)?;
            }
        }
        Ok(())
    }

    /// The weight of every token of `view`, 0 or 1, sample after sample. `None`: one each.
    pub(super) fn of_view(&self, view: usize, images: usize, cells: usize) -> Option<Vec<f64>> {
        let tokens = self.tokens[view];
        if tokens.is_none() && self.samples.is_none() {
            return None;
        }
        let at = |weights: Option<&[f32]>, i: usize| weights.map_or(1.0, |w| f64::from(w[i]));
        let weight = |i: usize| at(self.samples, i / cells) * at(tokens, i);
        Some((0..images * cells).map(weight).collect())
    }
}

/// The tokens of one frame that count as anchors.
pub(super) struct Anchors {
    /// The cells of each image, in order.
    pub cells: Vec<Vec<u32>>,
    /// One weight per cell, the largest 1. `None`: one each.
    pub weights: Option<Vec<f32>>,
}

impl Anchors {
    /// The valid cells of a weight above 0, at most `most` over all images.
    ///
    /// Images share the cap evenly. What one image cannot use goes to the others. Cells are drawn without replacement.
    pub fn choose(
        operator: &GridOperator,
        images: usize,
        weights: Option<Vec<f64>>,
        most: Option<usize>,
        rng: &mut StdRng,
    ) -> Self {
        let n = operator.out_grid().len();
        let weight = |image: usize, cell: u32| match &weights {
            Some(weights) => weights[image * n + cell as usize],
            None => 1.0,
        };
        let counts = |image: usize, cell: u32| {
            let valid = operator.cells(image);
            valid.is_none_or(|v| v[cell as usize]) && weight(image, cell) > 0.0
        };
        let of_image = |image| (0..n as u32).filter(|&cell| counts(image, cell)).collect();
        let mut cells: Vec<Vec<u32>> = (0..images).map(of_image).collect();
        if let Some(most) = most {
            draw(&mut cells, most, rng);
        }
        let weights = weights.is_some().then(|| {
            let all = each(&cells).map(|(image, cell)| weight(image, cell));
            let largest = all.clone().fold(f64::MIN_POSITIVE, f64::max);
            all.map(|w| (w / largest) as f32).collect()
        });
        Self { cells, weights }
    }

    /// The number of anchors.
    pub fn len(&self) -> usize {
        self.cells.iter().map(Vec::len).sum()
    }

    /// The image of each anchor.
    pub fn image_ids(&self) -> Vec<u32> {
        each(&self.cells).map(|(image, _)| image as u32).collect()
    }

    /// The row of each anchor among `n` tokens per image.
    pub fn rows(&self, n: usize) -> Vec<u32> {
        each(&self.cells).map(|(image, cell)| (image * n) as u32 + cell).collect()
    }
}

/// The image and the index of each cell.
fn each(cells: &[Vec<u32>]) -> impl Iterator<Item = (usize, u32)> + Clone + '_ {
    let of_image = |(image, cells): (usize, &'_ Vec<u32>)| {
        cells.clone().into_iter().map(move |cell| (image, cell))
    };
    cells.iter().enumerate().flat_map(of_image)
}

/// Keeps at most `most` cells.
fn draw(cells: &mut [Vec<u32>], most: usize, rng: &mut StdRng) {
    let images = cells.len();
    let mut left = most;
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
}
