//! The part of a batch that takes part in the equivariance loss.

use std::ops::Range;

use candle_core::Tensor;

use crate::{Error, Result};

/// A batch in two parts, for the paper's form of SER.
///
/// The first images keep the usual views of the base method. The last `max(2, round(ratio·batch))` images get two
/// geometric views of one crop. The base loss sees both parts as one batch; SER sees the second part only.
///
/// The authors use a ratio of 0.01 of 256 images. The cost of NT-Xent is quadratic in the size of the second part. It has
/// at least two images, because the negatives of one image are the tokens of the others.
///
/// ```
/// use ser_reg::Partition;
/// let part = Partition::new(64, 1.0 / 8.0)?;
/// assert_eq!((part.plain(), part.regularized()), (0..56, 56..64));
/// assert_eq!(Partition::new(64, 0.01)?.regularized().len(), 2);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    batch: usize,
    regularized: usize,
}

impl Partition {
    /// Assigns the last `max(2, round(ratio·batch))` of `batch` images to SER.
    ///
    /// # Errors
    /// If `ratio` is not within `[0, 1]`, or the batch has fewer than two images or more than 2^32.
    pub fn new(batch: usize, ratio: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::config("ratio", "a fraction within [0, 1]", ratio));
        }
        if !(2..=u32::MAX as usize).contains(&batch) {
            return Err(Error::config("batch", "2 to 2^32 - 1 images", batch));
        }
        let regularized = (ratio * batch as f64).round() as usize;
        Ok(Self { batch, regularized: regularized.clamp(2, batch) })
    }

    /// The images with the usual views of the base method; may be empty.
    pub fn plain(&self) -> Range<usize> {
        0..self.batch - self.regularized
    }

    /// The images with two geometric views, for the base method and SER.
    pub fn regularized(&self) -> Range<usize> {
        self.batch - self.regularized..self.batch
    }

    /// The two parts of a tensor along its first axis, [`plain`](Self::plain) first.
    ///
    /// # Errors
    /// If the first axis differs from the batch, as in a short last batch: make a new partition for it, or drop it.
    pub fn split(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        if x.dims().first() != Some(&self.batch) {
            let expected = format!(
                "a first axis of {} images (make a Partition for a short last batch, or drop it)",
                self.batch
            );
            return Err(Error::input("Partition::split", expected, format!("{:?}", x.dims())));
        }
        let first = self.batch - self.regularized;
        Ok((x.narrow(0, 0, first)?, x.narrow(0, first, self.regularized)?))
    }
}
