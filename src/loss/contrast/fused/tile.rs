//! What a tile of cosines goes through, row by row: some anchors against some tokens.
//!
//! Each row sums in a fixed order, so results do not depend on the processor's vector width or on the number of threads.

use super::real::Real;

/// Independent accumulators per row: enough for the widest registers, and a fixed order of summation.
const LANES: usize = 16;

/// Terms that a column adds up before the sum is put aside.
const CHAIN: usize = 32;

/// The labels of a tile's rows and columns. A row sees the columns with another label only.
#[derive(Clone, Copy)]
pub(super) struct Labels<'a> {
    pub(super) rows: &'a [u32],
    pub(super) cols: &'a [u32],
}

/// Runs `work` with the widest vector instructions that this processor has.
fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// The larger one; NaN if `a` is.
#[inline(always)]
pub(super) fn larger<T: Real>(a: T, b: T) -> T {
    if b > a { b } else { a }
}

/// `value` where the row may look, else `hidden`.
#[inline(always)]
fn seen<T: Real>(value: T, hidden: T, own: u32, col: u32) -> T {
    if col == own { hidden } else { value }
}

/// Folds `f(value, column)` over a row in [`LANES`] lanes, then over the lanes and the rest.
#[inline(always)]
fn fold_row<T: Real>(
    row: &[T],
    cols: &[u32],
    start: T,
    f: impl Fn(T, u32) -> T,
    join: impl Fn(T, T) -> T,
) -> T {
    let (chunks, tail) = row.as_chunks::<LANES>();
    let (col_chunks, col_tail) = cols.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for (chunk, cols) in chunks.iter().zip(col_chunks) {
        for i in 0..LANES {
            lanes[i] = join(lanes[i], f(chunk[i], cols[i]));
        }
    }
    for ((lane, &v), &col) in lanes.iter_mut().zip(tail).zip(col_tail) {
        *lane = join(*lane, f(v, col));
    }
    lanes.into_iter().fold(start, join)
}

/// The largest visible entry of each row; −∞ where a row sees nothing.
pub(super) fn max<T: Real>(tile: &[T], labels: Labels) -> Vec<T> {
    vectorized(
        #[inline(always)]
        || {
            let hidden = T::neg_infinity();
            tile.chunks_exact(labels.cols.len())
                .zip(labels.rows)
                .map(|(row, &own)| {
                    fold_row(row, labels.cols, hidden, |v, col| seen(v, hidden, own, col), larger)
                })
                .collect()
        },
    )
}

/// `e = exp((s − top)·rate)` in place of `s`, 0 where a row may not look, and the sum of each row.
///
/// `top` is at least the largest visible entry of its row.
pub(super) fn exp<T: Real>(tile: &mut [T], top: &[T], rate: T, labels: Labels) -> Vec<T> {
    vectorized(
        #[inline(always)]
        || {
            tile.chunks_exact_mut(labels.cols.len())
                .zip(labels.rows)
                .zip(top)
                .map(|((row, &own), &top)| {
                    for (v, &col) in row.iter_mut().zip(labels.cols) {
                        let e = ((*v - top) * rate).exp_nonpositive();
                        *v = seen(e, T::zero(), own, col);
                    }
                    fold_row(row, labels.cols, T::zero(), |e, _| e, |a, b| a + b)
                })
                .collect()
        },
    )
}

/// Sums of `exp((s − 1)·rate)` and largest `s` over what is visible.
pub(super) struct Margins<T> {
    pub(super) by_row: Vec<(T, T)>,
    pub(super) by_col: Vec<(T, T)>,
}

pub(super) fn margins<T: Real>(tile: &[T], rate: T, labels: Labels) -> Margins<T> {
    let width = labels.cols.len();
    let mut by_row = Vec::with_capacity(labels.rows.len());
    let mut by_col = vec![(T::zero(), T::neg_infinity()); width];
    let mut line = vec![T::zero(); width];
    let mut sums = vec![T::zero(); width];
    let mut tops = vec![T::neg_infinity(); width];
    vectorized(
        #[inline(always)]
        || {
            let hidden = T::neg_infinity();
            // Columns add up a few rows at a time: rounding grows with the number of terms in one chain.
            let parts = tile.chunks(CHAIN * width).zip(labels.rows.chunks(CHAIN));
            for (part, owners) in parts {
                sums.fill(T::zero());
                for (row, &own) in part.chunks_exact(width).zip(owners) {
                    let cols = labels.cols.iter().zip(&mut sums).zip(&mut tops);
                    for ((&s, e), ((&col, sum), top)) in row.iter().zip(&mut line).zip(cols) {
                        let weight = ((s - T::one()) * rate).exp_nonpositive();
                        *e = seen(weight, T::zero(), own, col);
                        *sum += *e;
                        *top = larger(*top, seen(s, hidden, own, col));
                    }
                    let sum = fold_row(&line, labels.cols, T::zero(), |e, _| e, |a, b| a + b);
                    let look = |s, col| seen(s, hidden, own, col);
                    let top = fold_row(row, labels.cols, hidden, look, larger);
                    by_row.push((sum, top));
                }
                by_col.iter_mut().zip(&sums).for_each(|(total, &sum)| total.0 += sum);
            }
            by_col.iter_mut().zip(&tops).for_each(|(total, &top)| total.1 = top);
        },
    );
    Margins { by_row, by_col }
}

/// `(r_i + c_j)·exp((s_ij − 1)·rate)` in place of `s`, 0 where a row may not look.
pub(super) fn weigh<T: Real>(tile: &mut [T], rate: T, labels: Labels, by_row: &[T], by_col: &[T]) {
    vectorized(
        #[inline(always)]
        || {
            let rows = tile.chunks_exact_mut(labels.cols.len()).zip(labels.rows);
            for ((row, &own), &r) in rows.zip(by_row) {
                for ((s, &col), &c) in row.iter_mut().zip(labels.cols).zip(by_col) {
                    let e = ((*s - T::one()) * rate).exp_nonpositive();
                    *s = seen((r + c) * e, T::zero(), own, col);
                }
            }
        },
    );
}
