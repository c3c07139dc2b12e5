//! The evaluation between epochs: nearest neighbors, upright and under D4, and the equivariance of each block.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{
    GridOperator, Layout, Resample, TokenGrid,
    group::D4,
    metric::{EqScore, Layer},
    tap,
};

use super::features;
use crate::{
    data::{Data, Images},
    finite,
    knn::Bank,
    vit::Vit,
};

/// The elements of D4 in the order of the table; the identity is first.
pub const POSES: [(&str, D4); 8] = [
    ("upright", D4::IDENTITY),
    ("hflip", D4::HFLIP),
    ("vflip", D4::VFLIP),
    ("rot180", D4::ROT180),
    ("rot90", D4::ROT90),
    ("rot270", D4::ROT270),
    ("transp", D4::TRANSPOSE),
    ("antitr", D4::ANTI_TRANSPOSE),
];

/// Test images of the equivariance score, drawn by class.
const SCORED: usize = 200;

pub struct Evaluation<'a> {
    /// Upright training images.
    pub bank: &'a Images,
    pub test: &'a Images,
    /// Mean and standard deviation of each channel.
    pub statistics: &'a [(f32, f32)],
    pub device: &'a Device,
}

impl<'a> Evaluation<'a> {
    /// On all images of `data`.
    pub fn of(data: &'a Data, statistics: &'a [(f32, f32)], device: &'a Device) -> Self {
        Self { bank: &data.bank, test: &data.test, statistics, device }
    }

    /// Accuracy in percent of weighted 20-nearest neighbors for each of [`POSES`]: the bank is upright, the queries are
    /// transformed.
    pub fn poses(&self, encode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[f64; 8]> {
        let bank = Bank::new(&self.features(self.bank, D4::IDENTITY, &encode)?, &self.bank.labels)?;
        let mut accuracies = [0.0; 8];
        for (accuracy, (_, pose)) in accuracies.iter_mut().zip(POSES) {
            let queries = self.features(self.test, pose, &encode)?;
            *accuracy = bank.accuracy(&queries, &self.test.labels)?;
        }
        Ok(accuracies)
    }

    /// The same where the images have labels; empty where they have none.
    pub fn accuracies(&self, encode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<f64>> {
        match self.bank.are_labelled() {
            true => Ok(self.poses(encode)?.to_vec()),
            false => Ok(Vec::new()),
        }
    }

    /// Features `(n, d)` of test images.
    pub fn test_features(&self, encode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.features(self.test, D4::IDENTITY, &encode)
    }

    /// Centered equivariance score of each block, mean over the seven other elements of D4; 1 is exact equivariance.
    ///
    /// # Errors
    /// If a token is not finite.
    pub fn equivariance(&self, vit: &Vit) -> Result<Vec<f64>> {
        let indices = self.test.drawn(SCORED);
        let images = self.test.gather(&indices, self.statistics, self.device)?;
        let vit = vit.with_last_map();
        let config = vit.config();
        let grid = TokenGrid::square(config.grid())?;
        let layers: Vec<Layer> = (1..=config.depth)
            .map(|block| Layer {
                layout: Layout { prefix: config.prefix(block), ..Default::default() },
                ..Layer::from(grid)
            })
            .collect();
        let names: Vec<String> = (1..=config.depth).map(|i| format!("block{i}")).collect();
        // Only the nulls are drawn, which are not shown: the same draw for every epoch and run.
        let rng = &mut StdRng::seed_from_u64(0);
        let others = POSES[1..].iter().map(|(_, g)| *g).collect::<Vec<_>>();
        let score = EqScore { layers, ..EqScore::new(grid) };
        let reports = score.measure_layers(&images, &others, rng, |x| {
            let maps = tap::capture_all(&names, || vit.forward(x))?.1;
            for (name, map) in names.iter().zip(&maps) {
                let checked = finite::ensure(&format!("the tokens of {name}"), map);
                checked.map_err(candle_core::Error::msg)?;
            }
            Ok(maps)
        })?;
        Ok(reports.iter().map(|r| r.mean.score.centered).collect())
    }

    fn features(
        &self,
        images: &Images,
        pose: D4,
        encode: &impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let grid = TokenGrid::square(images.side)?;
        let turn = GridOperator::new(&[pose], grid, &Resample::default())?;
        features::of(images, self.statistics, self.device, Some(&turn), encode)
    }
}

/// Mean over the elements that are not the identity; `None` without accuracies.
pub fn pose_mean(accuracies: &[f64]) -> Option<f64> {
    let moved = accuracies.get(1..).filter(|moved| !moved.is_empty())?;
    Some(moved.iter().sum::<f64>() / moved.len() as f64)
}
