//! The part of a batch that takes part in the equivariance loss.

use std::ops::Range;

use candle_core::Tensor;

use crate::{Error, Result};

/// A batch cut in two: the first images keep the base method's usual views, the last `round(ratio·batch)` get two
/// geometric views of one crop. Both parts go through the base loss; only the second through SER.
///
/// The authors use a ratio of 0.01 of 256 images; the equivariance loss is quadratic in the size of that part. At least
/// two images are needed, since the negatives of one image are the tokens of the others.
///
/// ```
/// use ser_reg::partition::Partition;
/// let part = Partition::new(64, 1.0 / 8.0)?;
/// assert_eq!((part.invariant(), part.equivariant()), (0..56, 56..64));
/// assert!(Partition::new(64, 0.01).is_err()); // one image has no negatives
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    batch: usize,
    equivariant: usize,
}

impl Partition {
    /// Cuts off the last `round(ratio·batch)` of `batch` images.
    ///
    /// # Errors
    /// If `ratio` is not within `[0, 1]`, or leaves fewer than two images.
    pub fn new(batch: usize, ratio: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::config(
                "Partition::ratio",
                "a fraction within [0, 1]",
                ratio,
            ));
        }
        let equivariant = (ratio * batch as f64).round() as usize;
        if batch < 2 {
            return Err(Error::config(
                "Partition::batch",
                "at least 2 images",
                batch,
            ));
        }
        if equivariant < 2 {
            return Err(Error::config(
                "Partition::ratio",
                format!(
                    "a fraction that leaves at least 2 of {batch} images ({:.4} does)",
                    2.0 / batch as f64
                ),
                format!("{ratio}, which leaves {equivariant}"),
            ));
        }
        Ok(Self { batch, equivariant })
    }

    /// The samples with the base method's usual views.
    pub fn invariant(&self) -> Range<usize> {
        0..self.batch - self.equivariant
    }

    /// The samples with two geometric views.
    pub fn equivariant(&self) -> Range<usize> {
        self.batch - self.equivariant..self.batch
    }

    /// The two parts of a tensor along its first axis; the first may be empty.
    ///
    /// # Errors
    /// If the first axis has another length than the batch.
    pub fn split(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        if x.dims().first() != Some(&self.batch) {
            return Err(Error::input(
                "Partition::split",
                format!("a first axis of {} samples", self.batch),
                format!("{:?}", x.dims()),
            ));
        }
        let first = self.batch - self.equivariant;
        Ok((
            x.narrow(0, 0, first)?,
            x.narrow(0, first, self.equivariant)?,
        ))
    }
}
