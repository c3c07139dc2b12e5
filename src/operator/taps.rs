//! A sparse matrix in rows: the weights with which each output cell reads input cells.

use num_traits::Float;

/// In a list of source indices: this output cell has no source and is zero.
pub(super) const NONE: u32 = u32::MAX;

/// Compressed rows; duplicate indices within a row are merged, rows are sorted by index.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Taps {
    n_in: usize,
    /// Row `i` is `entries[ends[i]..ends[i + 1]]`.
    ends: Vec<u32>,
    entries: Vec<(u32, f64)>,
}

impl Taps {
    pub fn with_capacity(n_in: usize, rows: usize) -> Self {
        let mut ends = Vec::with_capacity(rows + 1);
        ends.push(0);
        Self {
            n_in,
            ends,
            entries: Vec::with_capacity(4 * rows),
        }
    }

    /// Adds a tap to the row under construction.
    pub fn push(&mut self, index: usize, weight: f64) {
        self.entries.push((index as u32, weight));
    }

    /// Closes the row under construction.
    pub fn end_row(&mut self) {
        let start = self.ends.last().map_or(0, |&e| e as usize);
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
        self.ends.push(kept as u32);
    }

    pub fn n_in(&self) -> usize {
        self.n_in
    }

    pub fn n_out(&self) -> usize {
        self.ends.len() - 1
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.ends) + size_of_val(&*self.entries)
    }

    /// The taps `(index, weight)` of output cell `i`.
    pub fn row(&self, i: usize) -> &[(u32, f64)] {
        &self.entries[self.ends[i] as usize..self.ends[i + 1] as usize]
    }

    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[(u32, f64)]> {
        (0..self.n_out()).map(|i| self.row(i))
    }

    /// The adjoint.
    pub fn transpose(&self) -> Self {
        let mut columns = vec![Vec::new(); self.n_in];
        for (i, row) in self.rows().enumerate() {
            for &(j, w) in row {
                columns[j as usize].push((i, w));
            }
        }
        let mut taps = Self::with_capacity(self.n_out(), self.n_in);
        for column in columns {
            for (i, w) in column {
                taps.push(i, w);
            }
            taps.end_row();
        }
        taps
    }

    /// The product `self · first`.
    pub fn after(&self, first: &Self) -> Self {
        let mut taps = Self::with_capacity(first.n_in, self.n_out());
        for row in self.rows() {
            for &(j, w) in row {
                for &(i, v) in first.row(j as usize) {
                    taps.push(i as usize, w * v);
                }
            }
            taps.end_row();
        }
        taps
    }

    /// Whether this is the identity.
    pub fn is_identity(&self) -> bool {
        self.n_in == self.n_out()
            && self
                .rows()
                .enumerate()
                .all(|(i, row)| row == [(i as u32, 1.0)])
    }

    /// The source of each output cell if this moves cells without mixing them: at most one tap a row, of weight one,
    /// and no input cell read twice.
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

    /// `out[i, :] = Σ_j w_ij · x[j, :]` for `x` of `n_in` and `out` of `n_out` contiguous rows of `width` values.
    pub fn apply<T: Float>(&self, x: &[T], out: &mut [T], width: usize) {
        for (row, out) in self.rows().zip(out.chunks_exact_mut(width)) {
            match row {
                [] => out.fill(T::zero()),
                [(j, w), rest @ ..] => {
                    let source = |j: &u32| &x[*j as usize * width..][..width];
                    let w = cast::<T>(*w);
                    for (o, &v) in out.iter_mut().zip(source(j)) {
                        *o = w * v;
                    }
                    for (j, w) in rest {
                        let w = cast::<T>(*w);
                        for (o, &v) in out.iter_mut().zip(source(j)) {
                            *o = *o + w * v;
                        }
                    }
                }
            }
        }
    }
}

/// `f64` to `T`; total for the two float types it is used with.
fn cast<T: Float>(w: f64) -> T {
    T::from(w).unwrap_or_else(T::nan)
}
