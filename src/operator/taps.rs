//! A sparse matrix in rows: the weights by which each output cell reads input cells.

use num_traits::Float;
use pulp::{Arch, Simd, WithSimd};

/// In a list of source indices: this output cell has no source and is zero.
pub(super) const NONE: u32 = u32::MAX;

/// A type in which cells are mixed.
pub(super) trait Real: Float + Default + Send + Sync {
    /// A weight in this type.
    fn of(weight: f64) -> Self;
}

impl Real for f32 {
    fn of(weight: f64) -> Self {
        weight as f32
    }
}

impl Real for f64 {
    fn of(weight: f64) -> Self {
        weight
    }
}

/// Compressed rows; duplicate indices within a row are merged, rows are sorted by index.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Taps {
    n_in: usize,
    /// Row `i` is `entries[ends[i]..ends[i + 1]]`.
    ends: Vec<usize>,
    entries: Vec<(u32, f64)>,
}

impl Taps {
    pub fn with_capacity(n_in: usize, rows: usize) -> Self {
        let mut ends = Vec::with_capacity(rows + 1);
        ends.push(0);
        Self { n_in, ends, entries: Vec::with_capacity(4 * rows) }
    }

    /// Adds a tap to the row under construction.
    pub fn push(&mut self, index: usize, weight: f64) {
        self.entries.push((index as u32, weight));
    }

    /// Closes the row under construction.
    pub fn end_row(&mut self) {
        let start = self.ends[self.n_out()];
        self.entries[start..].sort_unstable_by_key(|e| e.0);
        let mut kept = start;
        for i in start..self.entries.len() {
            if kept > start && self.entries[kept - 1].0 == self.entries[i].0 {
                self.entries[kept - 1].1 += self.entries[i].1;
            } else {
                self.entries[kept] = self.entries[i];
                kept += 1;
            }
        }
        self.entries.truncate(kept);
        self.ends.push(kept);
    }

    pub fn n_in(&self) -> usize {
        self.n_in
    }

    pub fn n_out(&self) -> usize {
        self.ends.len() - 1
    }

    /// The taps `(index, weight)` of output cell `i`.
    pub fn row(&self, i: usize) -> &[(u32, f64)] {
        &self.entries[self.ends[i]..self.ends[i + 1]]
    }

    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[(u32, f64)]> {
        (0..self.n_out()).map(|i| self.row(i))
    }

    /// The adjoint.
    pub fn transpose(&self) -> Self {
        // A counting sort by column. Rows are read in order, so each column is sorted.
        let mut ends = vec![0; self.n_in + 1];
        for &(j, _) in &self.entries {
            ends[j as usize + 1] += 1;
        }
        for j in 0..self.n_in {
            ends[j + 1] += ends[j];
        }
        let mut next = ends.clone();
        let mut entries = vec![(0, 0.0); self.entries.len()];
        for (i, row) in self.rows().enumerate() {
            for &(j, w) in row {
                let at = &mut next[j as usize];
                entries[*at] = (i as u32, w);
                *at += 1;
            }
        }
        Self { n_in: self.n_out(), ends, entries }
    }

    /// Whether this is the identity.
    pub fn is_identity(&self) -> bool {
        self.n_in == self.n_out()
            && self.rows().enumerate().all(|(i, row)| row == [(i as u32, 1.0)])
    }

    /// The source of each output cell, if the matrix moves cells without mixing them: at most one
    /// tap a row, of weight one, and no input cell read twice.
    pub fn as_moves(&self) -> Option<Vec<u32>> {
        let mut seen = vec![false; self.n_in];
        self.rows()
            .map(|row| match row {
                [] => Some(NONE),
                [(j, 1.0)] if !std::mem::replace(&mut seen[*j as usize], true) => Some(*j),
                _ => None,
            })
            .collect()
    }

    /// `out[i, :] = Σ_j w_ij · x[j, :]` for `x` of `n_in` and `out` of `n_out` contiguous rows of
    /// `width` values.
    ///
    /// The vector width is chosen at run time for the machine.
    pub fn apply<T: Real>(&self, x: &[T], out: &mut [T], width: usize) {
        debug_assert_eq!((x.len(), out.len()), (self.n_in * width, self.n_out() * width));
        Arch::new().dispatch(Apply { taps: self, x, out, width });
    }

    /// Row `i` of [`apply`](Self::apply), whose rows have the length of `out`.
    pub fn apply_row<T: Real>(&self, i: usize, x: &[T], out: &mut [T]) {
        debug_assert_eq!(x.len(), self.n_in * out.len());
        Arch::new().dispatch(ApplyRow { row: self.row(i), x, out });
    }
}

/// The body of [`Taps::apply`], compiled for each instruction set.
struct Apply<'a, T> {
    taps: &'a Taps,
    x: &'a [T],
    out: &'a mut [T],
    width: usize,
}

impl<T: Real> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { taps, x, out, width } = self;
        if width == 1 {
            for (row, out) in taps.rows().zip(out) {
                *out = row.iter().fold(T::zero(), |sum, &(j, w)| sum + T::of(w) * x[j as usize]);
            }
            return;
        }
        for (row, out) in taps.rows().zip(out.chunks_exact_mut(width)) {
            weighted_sum(row, x, out);
        }
    }
}

/// The body of [`Taps::apply_row`].
struct ApplyRow<'a, T> {
    row: &'a [(u32, f64)],
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> WithSimd for ApplyRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        weighted_sum(self.row, self.x, self.out);
    }
}

/// `out ← Σ_j w_j · x_j` over the taps of a row; the rows `x_j` have the length of `out`.
#[inline(always)]
fn weighted_sum<T: Real>(row: &[(u32, f64)], x: &[T], out: &mut [T]) {
    let width = out.len();
    let tap = |&(j, w): &(u32, f64)| (T::of(w), &x[j as usize * width..][..width]);
    // Up to four taps in one pass over the output.
    let mut rest = match row {
        [] => return out.fill(T::zero()),
        [a] => {
            let (u, a) = tap(a);
            return out.iter_mut().zip(a).for_each(|(o, &a)| *o = u * a);
        }
        [a, b] => {
            let ((u, a), (v, b)) = (tap(a), tap(b));
            for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *o = u * a + v * b;
            }
            return;
        }
        [a, b, c] => {
            let ((u, a), (v, b), (w, c)) = (tap(a), tap(b), tap(c));
            for (((o, &a), &b), &c) in out.iter_mut().zip(a).zip(b).zip(c) {
                *o = u * a + v * b + w * c;
            }
            return;
        }
        [a, b, c, d, rest @ ..] => {
            let ((u, a), (v, b), (w, c), (z, d)) = (tap(a), tap(b), tap(c), tap(d));
            for ((((o, &a), &b), &c), &d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *o = u * a + v * b + w * c + z * d;
            }
            rest
        }
    };
    while let [a, b, c, d, more @ ..] = rest {
        let ((u, a), (v, b), (w, c), (z, d)) = (tap(a), tap(b), tap(c), tap(d));
        for ((((o, &a), &b), &c), &d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *o = *o + u * a + v * b + w * c + z * d;
        }
        rest = more;
    }
    for a in rest {
        let (u, a) = tap(a);
        out.iter_mut().zip(a).for_each(|(o, &a)| *o = *o + u * a);
    }
}
