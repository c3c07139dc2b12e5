//! The three matrix products of a contrast, over a block of weights that lies in panels.
//!
//! A block of `len` anchors against `n` tokens is stored as ⌈n / [`PANEL`]⌉ tiles of (len, [`PANEL`]), the last one
//! narrower, one after the other: tiles are made, read and add_transposed_product by one thread each. How the work is cut does not depend
//! on the number of threads, so neither does the result.

use candle_core::{Error, Result};
use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};
use rayon::prelude::*;

use super::real::Real;

/// Tokens to a tile.
pub(super) const PANEL: usize = 256;

/// Rows to a task where the rows of the result are divided.
const ROWS: usize = 128;

/// Rows of `width` values each.
fn rows<T>(data: &[T], width: usize) -> Result<ArrayView2<'_, T>> {
    ArrayView2::from_shape((data.len() / width, width), data).map_err(Error::wrap)
}

/// `out ← beta·out + a·b`, `out` row by row.
fn multiply<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, beta: T, out: &mut [T]) -> Result<()> {
    let shape = (a.nrows(), b.ncols());
    let mut out = ArrayViewMut2::from_shape(shape, out).map_err(Error::wrap)?;
    general_mat_mul(T::one(), &a, &b, beta, &mut out);
    Ok(())
}

/// `block ← a·bᵀ`, and `then(first token, tile)` on each tile while it is in the cache, in the order of the tokens.
pub(super) fn gram<T: Real, R: Send>(
    a: &[T],
    b: &[T],
    width: usize,
    block: &mut [T],
    then: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Result<Vec<R>> {
    let a = rows(a, width)?;
    block
        .par_chunks_mut(a.nrows() * PANEL)
        .zip(b.par_chunks(PANEL * width))
        .enumerate()
        .map(|(panel, (tile, b))| {
            multiply(a, rows(b, width)?.reversed_axes(), T::zero(), tile)?;
            Ok(then(panel * PANEL, tile))
        })
        .collect()
}

/// `then(first token, tile)` on each tile of a block of `len` rows.
pub(super) fn panels<T: Real>(block: &mut [T], len: usize, then: impl Fn(usize, &mut [T]) + Sync) {
    block
        .par_chunks_mut(len * PANEL)
        .enumerate()
        .for_each(|(panel, tile)| then(panel * PANEL, tile));
}

/// `out ← out + block·b`.
pub(super) fn add_product<T: Real>(
    block: &[T],
    b: &[T],
    width: usize,
    out: &mut [T],
) -> Result<()> {
    let len = out.len() / width;
    out.par_chunks_mut(ROWS * width).enumerate().try_for_each(|(i, out)| {
        let count = out.len() / width;
        for (tile, b) in block.chunks(len * PANEL).zip(b.chunks(PANEL * width)) {
            let cols = b.len() / width;
            let tile = &tile[i * ROWS * cols..][..count * cols];
            multiply(rows(tile, cols)?, rows(b, width)?, T::one(), out)?;
        }
        Ok(())
    })
}

/// `out ← out + blockᵀ·a`.
pub(super) fn add_transposed_product<T: Real>(
    block: &[T],
    a: &[T],
    width: usize,
    out: &mut [T],
) -> Result<()> {
    let a = rows(a, width)?;
    out.par_chunks_mut(PANEL * width).zip(block.par_chunks(a.nrows() * PANEL)).try_for_each(
        |(out, tile)| {
            let tile = rows(tile, out.len() / width)?;
            multiply(tile.reversed_axes(), a, T::one(), out)
        },
    )
}
