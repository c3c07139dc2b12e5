//! One linear step from a grid to a grid: a permutation, a separable or a sparse matrix.

use super::{
    memory::Memory,
    permutation::Permutation,
    taps::{NONE, Real, Taps},
};

/// The flags of the input cells that one output cell reads.
type Flags<'a> = &'a mut dyn Iterator<Item = bool>;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Cells move.
    Permute(Permutation),
    /// `R · X · Cᵀ`.
    Separable { rows: Taps, cols: Taps },
    /// Any sparse matrix.
    Sparse(Taps),
}

impl Step {
    /// The simplest form of a sparse matrix.
    pub fn sparse(taps: Taps) -> Self {
        match taps.as_moves() {
            Some(source) => Self::Permute(Permutation::new(source, taps.n_in())),
            None => Self::Sparse(taps),
        }
    }

    /// The simplest form of `R ⊗ C`; `None` if it is the identity.
    pub fn separable(rows: Taps, cols: Taps) -> Option<Self> {
        if rows.is_identity() && cols.is_identity() {
            return None;
        }
        let moves = rows.as_moves().zip(cols.as_moves());
        Some(match moves {
            Some((r, c)) => {
                let width = cols.n_in() as u32;
                let source = r
                    .iter()
                    .flat_map(|&i| {
                        let cell = move |&j: &u32| {
                            if i == NONE || j == NONE { NONE } else { i * width + j }
                        };
                        c.iter().map(cell)
                    })
                    .collect();
                Self::Permute(Permutation::new(source, rows.n_in() * cols.n_in()))
            }
            None => Self::Separable { rows, cols },
        })
    }

    pub fn n_in(&self) -> usize {
        match self {
            Self::Permute(permutation) => permutation.n_in(),
            Self::Separable { rows, cols } => rows.n_in() * cols.n_in(),
            Self::Sparse(taps) => taps.n_in(),
        }
    }

    pub fn n_out(&self) -> usize {
        match self {
            Self::Permute(permutation) => permutation.n_out(),
            Self::Separable { rows, cols } => rows.n_out() * cols.n_out(),
            Self::Sparse(taps) => taps.n_out(),
        }
    }

    pub fn adjoint(&self) -> Self {
        match self {
            Self::Permute(permutation) => Self::Permute(permutation.inverse()),
            Self::Separable { rows, cols } => {
                Self::Separable { rows: rows.transpose(), cols: cols.transpose() }
            }
            Self::Sparse(taps) => Self::Sparse(taps.transpose()),
        }
    }

    /// Which output cells read valid input cells only, and at least one.
    pub fn valid(&self, input: &[bool]) -> Vec<bool> {
        self.flags(input, |reads| {
            let (mut count, mut valid) = (0, 0);
            for read in reads {
                count += 1;
                valid += usize::from(read);
            }
            count > 0 && valid == count
        })
    }

    /// Which output cells read at least one of the `input` cells that are set.
    pub fn touches(&self, input: &[bool]) -> Vec<bool> {
        self.flags(input, |reads| {
            let mut touched = false;
            for read in reads {
                touched |= read;
            }
            touched
        })
    }

    /// `join` over the input cells that each output cell reads; along columns first where the step is separable.
    fn flags(&self, input: &[bool], join: impl Fn(Flags) -> bool) -> Vec<bool> {
        let of_row = |row: &[(u32, f64)], input: &[bool]| {
            join(&mut row.iter().map(|&(j, _)| input[j as usize]))
        };
        match self {
            Self::Permute(permutation) => {
                permutation.source().iter().map(|&j| j != NONE && input[j as usize]).collect()
            }
            Self::Sparse(taps) => taps.rows().map(|row| of_row(row, input)).collect(),
            Self::Separable { rows, cols } => {
                let width = cols.n_in();
                let mut out = Vec::with_capacity(self.n_out());
                for row in rows.rows() {
                    let column =
                        |j| join(&mut row.iter().map(|&(i, _)| input[i as usize * width + j]));
                    let line: Vec<bool> = (0..width).map(column).collect();
                    out.extend(cols.rows().map(|col| of_row(col, &line)));
                }
                out
            }
        }
    }

    /// The step as a sparse matrix.
    pub fn matrix(&self) -> Taps {
        let mut taps = Taps::with_capacity(self.n_in(), self.n_out());
        match self {
            Self::Sparse(taps) => return taps.clone(),
            Self::Permute(permutation) => {
                for &j in permutation.source() {
                    if j != NONE {
                        taps.push(j as usize, 1.0);
                    }
                    taps.end_row();
                }
            }
            Self::Separable { rows, cols } => {
                for row in rows.rows() {
                    for col in cols.rows() {
                        for &(i, u) in row {
                            for &(j, v) in col {
                                taps.push(i as usize * cols.n_in() + j as usize, u * v);
                            }
                        }
                        taps.end_row();
                    }
                }
            }
        }
        taps
    }

    /// Applies the step to one sample.
    pub fn apply<T: Real>(&self, x: &[T], out: &mut [T], memory: Memory) {
        match (self, memory) {
            (Self::Permute(permutation), _) => permutation.apply(x, out, memory),
            (Self::Separable { rows, cols }, Memory::Tokens(width)) => {
                separable(rows, cols, x, out, width);
            }
            (Self::Separable { rows, cols }, Memory::Planes(_)) => {
                let planes = x.chunks_exact(self.n_in());
                for (x, out) in planes.zip(out.chunks_exact_mut(self.n_out())) {
                    separable(rows, cols, x, out, 1);
                }
            }
            (Self::Sparse(taps), Memory::Tokens(width)) => taps.apply(x, out, width),
            (Self::Sparse(taps), Memory::Planes(_)) => {
                let planes = x.chunks_exact(taps.n_in());
                for (x, out) in planes.zip(out.chunks_exact_mut(taps.n_out())) {
                    taps.apply(x, out, 1);
                }
            }
        }
    }
}

/// `R · X · Cᵀ` in one pass: each row of the output is made of one line of cells, which stays in the cache.
fn separable<T: Real>(rows: &Taps, cols: &Taps, x: &[T], out: &mut [T], width: usize) {
    let mut line = vec![T::zero(); cols.n_in() * width];
    for (i, out) in out.chunks_exact_mut(cols.n_out() * width).enumerate() {
        rows.apply_row(i, x, &mut line);
        cols.apply(&line, out, width);
    }
}
