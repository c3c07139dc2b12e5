//! The three matrix products of a contrast, over a block of weights that lies in panels.
//!
//! A block of `len` anchors against `n` tokens is stored as ⌈n / [`PANEL`]⌉ tiles of (len, [`PANEL`]), the last one
//! narrower, one after the other: tiles are made, read and multiplied by one thread each. How the work is cut does not depend
//! on the number of threads, so neither does the result.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::real::Real;

/// Tokens to a tile.
pub(super) const PANEL: usize = 256;

/// Rows to a task where the rows of the result are divided.
const ROWS: usize = 128;

/// Rows of `width` values each.
fn rows<T>(data: &[T], width: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(data, data.len() / width, width)
}

/// `out ← a·b`, or `out + a·b`; `out` row by row, on this thread.
fn multiply<T: Real>(a: MatRef<T>, b: MatRef<T>, how: Accum, out: &mut [T]) {
    let out = MatMut::from_row_major_slice_mut(out, a.nrows(), b.ncols());
    matmul(out, how, a, b, <T as num_traits::One>::one(), Par::Seq);
}

/// `block ← a·bᵀ`, and `then(first token, tile)` on each tile while it is in the cache, in the order of the tokens.
pub(super) fn gram<T: Real, R: Send>(
    a: &[T],
    b: &[T],
    width: usize,
    block: &mut [T],
    then: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    let a = rows(a, width);
    block
        .par_chunks_mut(a.nrows() * PANEL)
        .zip(b.par_chunks(PANEL * width))
        .enumerate()
        .map(|(panel, (tile, b))| {
            multiply(a, rows(b, width).transpose(), Accum::Replace, tile);
            then(panel * PANEL, tile)
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
pub(super) fn add_product<T: Real>(block: &[T], b: &[T], width: usize, out: &mut [T]) {
    let len = out.len() / width;
    out.par_chunks_mut(ROWS * width).enumerate().for_each(|(i, out)| {
        let count = out.len() / width;
        for (tile, b) in block.chunks(len * PANEL).zip(b.chunks(PANEL * width)) {
            let cols = b.len() / width;
            let tile = &tile[i * ROWS * cols..][..count * cols];
            multiply(rows(tile, cols), rows(b, width), Accum::Add, out);
        }
    })
}

/// `out ← out + blockᵀ·a`.
pub(super) fn add_transposed_product<T: Real>(block: &[T], a: &[T], width: usize, out: &mut [T]) {
    let a = rows(a, width);
    out.par_chunks_mut(PANEL * width).zip(block.par_chunks(a.nrows() * PANEL)).for_each(
        |(out, tile)| {
            let tile = rows(tile, out.len() / width);
            multiply(tile.transpose(), a, Accum::Add, out)
        },
    )
}
