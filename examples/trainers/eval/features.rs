//! Features of image sets, in chunks, upright or moved.

use anyhow::Result;
use candle_core::{Device, Tensor};
use ser_reg::GridOperator;

use super::corruption::picture::{self, Picture};
use crate::{data::Images, finite};

/// Images that go through the encoder at a time.
pub const CHUNK: usize = 100;

/// Features `(n, d)` of `images`, each transformed by `pose` where there is one.
///
/// # Errors
/// If a feature is not finite.
pub fn of(
    images: &Images,
    statistics: &[(f32, f32)],
    device: &Device,
    pose: Option<&GridOperator>,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut chunks = Vec::new();
    for start in (0..images.len()).step_by(CHUNK) {
        let end = images.len().min(start + CHUNK);
        let x = images.normalized(start..end, statistics, device)?;
        let x = match pose {
            Some(pose) => pose.apply(&x)?,
            None => x,
        };
        chunks.push(encode(&x)?.detach());
    }
    whole(&chunks)
}

/// Features `(n, d)` of `pictures`.
///
/// # Errors
/// If a feature is not finite.
pub fn of_pictures(
    pictures: &[Picture],
    statistics: &[(f32, f32)],
    device: &Device,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut chunks = Vec::new();
    for chunk in pictures.chunks(CHUNK) {
        let x = picture::normalized(chunk, statistics, device)?;
        chunks.push(encode(&x)?.detach());
    }
    whole(&chunks)
}

fn whole(chunks: &[Tensor]) -> Result<Tensor> {
    let features = Tensor::cat(chunks, 0)?;
    finite::ensure("features", &features)?;
    Ok(features)
}

/// The features to beat: the pixels themselves.
pub fn raw_pixels(images: &Tensor) -> Result<Tensor> {
    Ok(images.flatten_from(1)?)
}

/// Patches of pixels `(B, N, C·P·P)`.
pub fn patches(x: &Tensor, patch: usize) -> Result<Tensor> {
    let (batch, channels, side, _) = x.dims4()?;
    let grid = side / patch;
    let x = x.reshape(&[batch, channels, grid, patch, grid, patch][..])?;
    let x = x.permute(vec![0, 2, 4, 1, 3, 5])?.contiguous()?;
    Ok(x.reshape((batch, grid * grid, channels * patch * patch))?)
}

/// What `encode` makes of images `(n, …)`, so many at a time.
pub fn chunked(
    x: &Tensor,
    size: usize,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let count = x.dim(0)?;
    let mut chunks = Vec::new();
    for start in (0..count).step_by(size) {
        chunks.push(encode(&x.narrow(0, start, size.min(count - start))?)?.detach());
    }
    Ok(Tensor::cat(&chunks, 0)?)
}
