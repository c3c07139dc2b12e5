//! The views of a batch, and their features.
//!
//! The base method has two crops of each image. With `--ser-images batch` the last images of a batch have one crop, of which
//! the regularizer draws two views that serve both losses. With `--ser-images own` it draws its views for itself.

use std::cell::Cell;

use candle_core::{Result, Tensor};
use ser_reg::Partition;

/// The images that the regularizer draws its views from, `(n, C, H, W)`, normalized.
pub enum Images {
    /// For the regularizer alone.
    Own(Tensor),
    /// For both losses. The channels hold the crop in the colors of the first view, then in those of the second:
    /// `(n, 2C, H, W)`. One spatial transformation moves both.
    Shared(Tensor),
}

/// The part of `crops` that only the base method has, and the images that both losses share.
pub fn shared(
    part: &Partition,
    [first, second]: &[Tensor; 2],
) -> ser_reg::Result<([Tensor; 2], Option<Images>)> {
    let (plain1, shared1) = part.split(first)?;
    let (plain2, shared2) = part.split(second)?;
    let both = Tensor::cat(&[shared1, shared2], 1)?;
    Ok(([plain1, plain2], Some(Images::Shared(both))))
}

/// `model` on views of [`Images::Shared`]: the first call has the colors of the first view, the second call those of the second.
pub fn colored(model: impl Fn(&Tensor) -> Result<Tensor>) -> impl Fn(&Tensor) -> Result<Tensor> {
    let calls = Cell::new(0);
    move |view| {
        let channels = view.dim(1)? / 2;
        let call = calls.replace(calls.get() + 1);
        model(&view.narrow(1, channels * (call % 2), channels)?.contiguous()?)
    }
}

/// Features `(B, D)` of two crops of the same images, in one pass; `None` without images.
pub fn encode(
    [first, second]: &[Tensor; 2],
    model: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Option<[Tensor; 2]>> {
    let count = first.dim(0)?;
    if count == 0 {
        return Ok(None);
    }
    let features = model(&Tensor::cat(&[first, second], 0)?)?;
    Ok(Some([features.narrow(0, 0, count)?, features.narrow(0, count, count)?]))
}

/// The features of a whole batch: those of the base method's crops, then those of the views that serve both losses.
pub fn join(crops: Option<[Tensor; 2]>, shared: Option<[Tensor; 2]>) -> Result<[Tensor; 2]> {
    match (crops, shared) {
        (Some([x1, x2]), Some([y1, y2])) => {
            Ok([Tensor::cat(&[x1, y1], 0)?, Tensor::cat(&[x2, y2], 0)?])
        }
        (Some(one), None) | (None, Some(one)) => Ok(one),
        (None, None) => candle_core::bail!("expected a batch with images, got none"),
    }
}
