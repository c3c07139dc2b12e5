//! The pose probe: can the orientation of an image be read from a representation?

use candle_core::{Device, Tensor};

use super::{
    harness::{Harness, values},
    ridge::Ridge,
};
use crate::{
    Error, Resample, Result, TokenGrid,
    group::{D4, Subgroup},
};

/// A linear classifier of the orientation of an image (its pose, an element of a subgroup of D4)
/// from a closure's vectors.
///
/// Every image is shown in every orientation: C4 makes the four-way rotation task of E-SSL
/// (Dangovski et al., arXiv 2111.00899), D4 an eight-way task. The classifier is [`Ridge`]
/// regression onto the one-hot orientation; the largest entry is its answer. A closed form replaces
/// the usual logistic regression, so that two runs agree.
///
/// A high accuracy says that the representation distinguishes orientations. Chance is 1 / order:
/// the representation is invariant, or collapsed; read [`Orbit`](super::Orbit) beside it. Images
/// without an upright orientation (textures, symmetric objects) are at chance for any model, so
/// compare with raw pixels. With few images and many features the accuracy on the training images
/// is 1 and says nothing.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, group::Subgroup, metric::PoseProbe};
///
/// // brighter towards the top
/// let sky = Tensor::arange(0f64, 8., &Device::Cpu)?.neg()?.reshape((1, 1, 8, 1))?;
/// let sample = |n| Tensor::randn(0f64, 0.3, (n, 1, 8, 8), &Device::Cpu)?.broadcast_add(&sky);
/// let (train, test) = (sample(400)?, sample(50)?);
/// let probe = PoseProbe::new(Subgroup::C4, TokenGrid::square(4)?);
/// let pixels = probe.measure(&train, &test, |x| x.flatten_from(1))?;
/// assert!(pixels.accuracy > 0.9, "{pixels:?}");
/// let mean = probe.measure(&train, &test, |x| x.mean((2, 3)))?;
/// assert!((mean.accuracy - mean.chance).abs() < 1e-12); // invariant
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PoseProbe {
    /// The orientations.
    pub group: Subgroup,
    /// The token grid of the images.
    pub grid: TokenGrid,
    /// The penalty of the regression, in units of a feature's variance.
    pub lambda: f64,
    /// Images per call of the closure.
    pub chunk: usize,
}

/// How well the orientation is recognized.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PoseReport {
    /// The share of the test images, over all orientations, that are recognized.
    pub accuracy: f64,
    /// The accuracy of guessing: 1 over the number of orientations.
    pub chance: f64,
    /// The accuracy on the training images.
    pub train_accuracy: f64,
    /// The accuracy among the test images of each orientation.
    pub poses: Vec<(D4, f64)>,
}

const OP: &str = "PoseProbe::measure";

impl PoseProbe {
    /// For images of this token grid: a penalty of 0.001, 64 images at a time.
    pub fn new(group: Subgroup, grid: TokenGrid) -> Self {
        Self { group, grid, lambda: 1e-3, chunk: 64 }
    }

    /// Fits the classifier on the `train` images and measures it on the `test` images, each `(B, C,
    /// H, W)`; `map` takes images to vectors `(B, D)` and runs once per image and orientation. A
    /// closure that accepts one shape only needs square images.
    ///
    /// # Errors
    /// Those of `map`. If the group has one element only, there is no image, the closure returns
    /// something other than finite vectors of one width, or [`Ridge::fit`] fails.
    pub fn measure(
        &self,
        train: &Tensor,
        test: &Tensor,
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<PoseReport> {
        let poses = self.group.elements();
        if poses.len() < 2 {
            let expected = "a group of at least two poses";
            return Err(Error::config("PoseProbe::group", expected, poses.len()));
        }
        let resample = Resample::default();
        let harness = Harness { op: OP, grid: self.grid, resample: &resample, chunk: self.chunk };
        let mut features = |images: &Tensor| -> Result<Tensor> {
            harness.check(images, poses.len())?;
            let mut all = Vec::with_capacity(poses.len());
            for g in poses {
                all.push(harness.vectors(images, Some(&harness.mover(images, g)?), &mut map)?);
            }
            if let Some(other) = all.iter().find(|x| x.dims() != all[0].dims()) {
                let expected = format!("vectors {:?} in every pose", all[0].dims());
                return Err(Error::input(OP, expected, format!("{:?}", other.dims())));
            }
            Ok(Tensor::cat(&all, 0)?)
        };
        let (x, x_test) = (features(train)?, features(test)?);
        let one_hot: Vec<f64> = (0..poses.len())
            .flat_map(|pose| {
                let row = move |_| (0..poses.len()).map(move |p| (p == pose) as u8 as f64);
                (0..train.dims()[0]).flat_map(row)
            })
            .collect();
        let shape = (one_hot.len() / poses.len(), poses.len());
        let y = Tensor::from_vec(one_hot, shape, &Device::Cpu)?;
        let ridge = Ridge::fit(&x, &y, self.lambda)?;
        let seen = recognized(&ridge, &x, poses.len())?;
        let recognized = recognized(&ridge, &x_test, poses.len())?;
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        Ok(PoseReport {
            accuracy: mean(&recognized),
            chance: 1. / poses.len() as f64,
            train_accuracy: mean(&seen),
            poses: poses.iter().copied().zip(recognized).collect(),
        })
    }
}

/// The share of each orientation's rows whose orientation the regression recognizes. Rows come
/// orientation by orientation.
fn recognized(ridge: &Ridge, x: &Tensor, poses: usize) -> Result<Vec<f64>> {
    let scores = values(&ridge.predict(x)?)?;
    let images = x.dims()[0] / poses;
    let right = |(pose, rows): (usize, &[f64])| {
        let first_largest =
            |row: &[f64]| (1..poses).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        let rows = rows.chunks_exact(poses);
        rows.filter(|row| first_largest(row) == pose).count() as f64 / images as f64
    };
    Ok(scores.chunks_exact(images * poses).enumerate().map(right).collect())
}
