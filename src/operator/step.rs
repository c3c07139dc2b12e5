//! One linear step from a grid to a grid: a permutation, a separable or a sparse matrix.

use std::sync::{Arc, OnceLock};

use num_traits::Float;

use super::{
    permutation::Permutation,
    taps::{NONE, Taps},
};
use crate::TokenGrid;

/// How values lie in memory around the grid axes of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// `(N, C)`: each cell holds `C` contiguous values.
    Tokens(usize),
    /// `(C, H, W)`: each of `C` planes holds the grid.
    Planes(usize),
}

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
                            if i == NONE || j == NONE {
                                NONE
                            } else {
                                i * width + j
                            }
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
            Self::Separable { rows, cols } => Self::Separable {
                rows: rows.transpose(),
                cols: cols.transpose(),
            },
            Self::Sparse(taps) => Self::Sparse(taps.transpose()),
        }
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Permute(permutation) => permutation.bytes(),
            Self::Separable { rows, cols } => rows.bytes() + cols.bytes(),
            Self::Sparse(taps) => taps.bytes(),
        }
    }

    /// Which output cells read valid input cells only, and at least one.
    pub fn valid(&self, input: &[bool]) -> Vec<bool> {
        let row_valid = |row: &[(u32, f64)], input: &[bool]| {
            !row.is_empty() && row.iter().all(|&(j, _)| input[j as usize])
        };
        match self {
            Self::Permute(permutation) => permutation
                .source()
                .iter()
                .map(|&j| j != NONE && input[j as usize])
                .collect(),
            Self::Sparse(taps) => taps.rows().map(|row| row_valid(row, input)).collect(),
            Self::Separable { rows, cols } => {
                let width = cols.n_in();
                let mut out = Vec::with_capacity(self.n_out());
                for row in rows.rows() {
                    let line: Vec<bool> = (0..width)
                        .map(|j| {
                            !row.is_empty()
                                && row.iter().all(|&(i, _)| input[i as usize * width + j])
                        })
                        .collect();
                    out.extend(cols.rows().map(|col| row_valid(col, &line)));
                }
                out
            }
        }
    }

    /// Applies the step to one sample.
    pub fn apply<T: Float + Default>(&self, x: &[T], out: &mut [T], memory: Memory) {
        match (self, memory) {
            (Self::Permute(permutation), _) => permutation.apply(x, out, memory),
            (Self::Separable { rows, cols }, Memory::Tokens(width)) => {
                let line = cols.n_in() * width;
                let mut tall = vec![T::zero(); rows.n_out() * line];
                rows.apply(x, &mut tall, line);
                let out_line = cols.n_out() * width;
                for (x, out) in tall.chunks_exact(line).zip(out.chunks_exact_mut(out_line)) {
                    cols.apply(x, out, width);
                }
            }
            (Self::Separable { rows, cols }, Memory::Planes(_)) => {
                let line = cols.n_in();
                let mut tall = vec![T::zero(); rows.n_out() * line];
                let planes = x.chunks_exact(self.n_in());
                for (x, out) in planes.zip(out.chunks_exact_mut(self.n_out())) {
                    rows.apply(x, &mut tall, line);
                    for (x, out) in tall
                        .chunks_exact(line)
                        .zip(out.chunks_exact_mut(cols.n_out()))
                    {
                        cols.apply(x, out, 1);
                    }
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

/// The steps by which an element acts on one sample, first to last; none is the identity.
#[derive(Debug)]
pub(super) struct Chain {
    pub in_grid: TokenGrid,
    pub out_grid: TokenGrid,
    pub steps: Vec<Step>,
    /// Found when it is first asked for: every backward pass asks.
    adjoint: OnceLock<Arc<Chain>>,
}

impl Chain {
    /// Neighboring permutations become one.
    pub fn new(
        in_grid: TokenGrid,
        out_grid: TokenGrid,
        all: impl IntoIterator<Item = Step>,
    ) -> Self {
        let mut steps: Vec<Step> = Vec::new();
        for step in all {
            match (steps.last_mut(), step) {
                (Some(Step::Permute(first)), Step::Permute(next)) => *first = next.after(first),
                (_, step) => steps.push(step),
            }
        }
        Self {
            in_grid,
            out_grid,
            steps,
            adjoint: OnceLock::new(),
        }
    }

    pub fn adjoint(&self) -> Arc<Self> {
        let adjoint = || {
            let steps = self.steps.iter().rev().map(Step::adjoint);
            Arc::new(Self::new(self.out_grid, self.in_grid, steps))
        };
        self.adjoint.get_or_init(adjoint).clone()
    }

    /// Memory that the steps hold.
    pub fn bytes(&self) -> usize {
        self.steps.iter().map(Step::bytes).sum()
    }

    /// `self ∘ first`.
    pub fn after(&self, first: &Self) -> Self {
        let steps = first.steps.iter().chain(&self.steps).cloned();
        Self::new(first.in_grid, self.out_grid, steps)
    }

    pub fn valid(&self, mut cells: Vec<bool>) -> Vec<bool> {
        for step in &self.steps {
            cells = step.valid(&cells);
        }
        cells
    }

    /// The one permutation that the chain consists of, if it is neither the identity nor mixes cells.
    pub fn permutation(&self) -> Option<&Permutation> {
        match self.steps.as_slice() {
            [Step::Permute(permutation)] => Some(permutation),
            _ => None,
        }
    }

    pub fn is_permutation(&self) -> bool {
        self.steps.iter().all(|s| matches!(s, Step::Permute(_)))
    }

    /// Runs `step(k, x, out)` for every step, through scratch memory of `per_cell` values a cell.
    pub fn run<T: Copy + Default>(
        &self,
        x: &[T],
        out: &mut [T],
        per_cell: usize,
        step: impl Fn(&Step, &[T], &mut [T]),
    ) {
        let Some((last, init)) = self.steps.split_last() else {
            return out.copy_from_slice(x);
        };
        let mut scratch: Option<Vec<T>> = None;
        for s in init {
            let mut next = vec![T::default(); s.n_out() * per_cell];
            step(s, scratch.as_deref().unwrap_or(x), &mut next);
            scratch = Some(next);
        }
        step(last, scratch.as_deref().unwrap_or(x), out);
    }
}
