//! What a frozen encoder is worth: nearest neighbours upright and in other poses, and the equivariance of a layer.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{GridOperator, Layout, Resample, TokenGrid, group::D4, metric::EqScore, tap};

use super::{
    augment::Augment,
    data::{Data, Images},
    knn::Bank,
    vit::Vit,
};

/// The poses of the table, the upright one first.
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

/// Pictures that go through the encoder at a time.
const CHUNK: usize = 250;
/// Test pictures of the equivariance score.
const SCORED: usize = 200;

pub struct Evaluation<'a> {
    pub data: &'a Data,
    pub augment: &'a Augment,
    pub device: &'a Device,
}

impl Evaluation<'_> {
    /// Accuracy in percent of weighted 20-nearest neighbours for each of [`POSES`]: the bank is upright, the queries are
    /// turned.
    pub fn poses(&self, encode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[f64; 8]> {
        let bank = Bank::new(
            &self.features(&self.data.bank, D4::IDENTITY, &encode)?,
            &self.data.bank.labels,
        )?;
        let mut accuracies = [0.0; 8];
        for (accuracy, (_, pose)) in accuracies.iter_mut().zip(POSES) {
            let queries = self.features(&self.data.test, pose, &encode)?;
            *accuracy = bank.accuracy(&queries, &self.data.test.labels)?;
        }
        Ok(accuracies)
    }

    /// Features `(n, d)` of test pictures.
    pub fn test_features(&self, encode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.features(&self.data.test, D4::IDENTITY, &encode)
    }

    /// Centred equivariance score of block `layer`, mean over the seven other poses; 1 is exact equivariance.
    pub fn equivariance(&self, vit: &Vit, layer: usize) -> Result<f64> {
        let count = SCORED.min(self.data.test.len());
        let images = self.augment.plain(&self.data.test, 0..count, self.device)?;
        let score = EqScore {
            layout: Layout {
                prefix: vit.config().prefix(layer),
                ..Default::default()
            },
            ..EqScore::new(TokenGrid::square(vit.config().grid())?)
        };
        // Only the nulls are drawn, which are not shown: the same draw for every epoch and run.
        let rng = &mut StdRng::seed_from_u64(0);
        let others = POSES[1..].iter().map(|(_, g)| *g).collect::<Vec<_>>();
        let report = score.measure(&images, &others, rng, |x| {
            let (_, map) = tap::capture(&format!("block{layer}"), || vit.forward(x))?;
            Ok::<_, anyhow::Error>(map)
        })?;
        Ok(report.mean.score.centred)
    }

    fn features(
        &self,
        images: &Images,
        pose: D4,
        encode: &impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let turn = GridOperator::new(
            &[pose],
            TokenGrid::square(images.side)?,
            &Resample::default(),
        )?;
        let mut chunks = Vec::new();
        for start in (0..images.len()).step_by(CHUNK) {
            let end = images.len().min(start + CHUNK);
            let x = self.augment.plain(images, start..end, self.device)?;
            chunks.push(encode(&turn.apply(&x)?)?.detach());
        }
        Ok(Tensor::cat(&chunks, 0)?)
    }
}

/// The features to beat: the pixels themselves.
pub fn raw_pixels(images: &Tensor) -> Result<Tensor> {
    Ok(images.flatten_from(1)?)
}

/// Prints accuracies, a line for each kind of features, with the mean over the seven poses that are not upright.
pub fn print_table(note: &str, rows: &[(&str, [f64; 8])]) {
    println!("\nWeighted 20-nearest-neighbour accuracy in %, test pictures in eight poses");
    println!("({note})\n");
    print!("{:<18}", "features");
    for (name, _) in POSES {
        print!("{name:>8}");
    }
    println!("{:>10}", "7 poses");
    for (name, accuracies) in rows {
        print!("{name:<18}");
        for accuracy in accuracies {
            print!("{accuracy:>8.1}");
        }
        println!("{:>10.1}", pose_mean(accuracies));
    }
}

/// Mean over the poses that are not upright.
pub fn pose_mean(accuracies: &[f64; 8]) -> f64 {
    accuracies[1..].iter().sum::<f64>() / 7.0
}
