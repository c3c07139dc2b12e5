//! One linear step from a grid to a grid: a permutation, a separable or a sparse matrix.

use num_traits::Float;

use super::taps::{NONE, Taps};
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
    /// Cells move, none is read twice: `out[i] = in[source[i]]`.
    Permute { source: Vec<u32>, n_in: usize },
    /// `R · X · Cᵀ`.
    Separable { rows: Taps, cols: Taps },
    /// Any sparse matrix.
    Sparse(Taps),
}

impl Step {
    /// The simplest form of a sparse matrix.
    pub fn sparse(taps: Taps) -> Self {
        match taps.as_moves() {
            Some(source) => Self::Permute {
                source,
                n_in: taps.n_in(),
            },
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
                Self::Permute {
                    source,
                    n_in: rows.n_in() * cols.n_in(),
                }
            }
            None => Self::Separable { rows, cols },
        })
    }

    pub fn n_in(&self) -> usize {
        match self {
            Self::Permute { n_in, .. } => *n_in,
            Self::Separable { rows, cols } => rows.n_in() * cols.n_in(),
            Self::Sparse(taps) => taps.n_in(),
        }
    }

    pub fn n_out(&self) -> usize {
        match self {
            Self::Permute { source, .. } => source.len(),
            Self::Separable { rows, cols } => rows.n_out() * cols.n_out(),
            Self::Sparse(taps) => taps.n_out(),
        }
    }

    pub fn adjoint(&self) -> Self {
        match self {
            Self::Permute { source, n_in } => {
                let mut inverse = vec![NONE; *n_in];
                for (i, &j) in source.iter().enumerate() {
                    if j != NONE {
                        inverse[j as usize] = i as u32;
                    }
                }
                Self::Permute {
                    source: inverse,
                    n_in: source.len(),
                }
            }
            Self::Separable { rows, cols } => Self::Separable {
                rows: rows.transpose(),
                cols: cols.transpose(),
            },
            Self::Sparse(taps) => Self::Sparse(taps.transpose()),
        }
    }

    /// Which output cells read valid input cells only, and at least one.
    pub fn valid(&self, input: &[bool]) -> Vec<bool> {
        let row_valid = |row: &[(u32, f64)], input: &[bool]| {
            !row.is_empty() && row.iter().all(|&(j, _)| input[j as usize])
        };
        match self {
            Self::Permute { source, .. } => source
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

    /// Moves whole cells of any type; `None` if this step mixes cells.
    pub fn permute<T: Copy + Default>(&self, x: &[T], out: &mut [T], memory: Memory) -> Option<()> {
        let Self::Permute { source, n_in } = self else {
            return None;
        };
        match memory {
            Memory::Tokens(width) => {
                for (out, &j) in out.chunks_exact_mut(width).zip(source) {
                    match x.get(j as usize * width..).and_then(|x| x.get(..width)) {
                        Some(x) if j != NONE => out.copy_from_slice(x),
                        _ => out.fill(T::default()),
                    }
                }
            }
            Memory::Planes(_) => {
                for (out, x) in out
                    .chunks_exact_mut(source.len())
                    .zip(x.chunks_exact(*n_in))
                {
                    for (out, &j) in out.iter_mut().zip(source) {
                        *out = x.get(j as usize).copied().unwrap_or_default();
                    }
                }
            }
        }
        Some(())
    }

    /// Applies the step to one sample.
    pub fn apply<T: Float + Default>(&self, x: &[T], out: &mut [T], memory: Memory) {
        match (self, memory) {
            (Self::Permute { .. }, _) => {
                self.permute(x, out, memory);
            }
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
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chain {
    pub in_grid: TokenGrid,
    pub out_grid: TokenGrid,
    pub steps: Vec<Step>,
}

impl Chain {
    pub fn adjoint(&self) -> Self {
        Self {
            in_grid: self.out_grid,
            out_grid: self.in_grid,
            steps: self.steps.iter().rev().map(Step::adjoint).collect(),
        }
    }

    /// `self ∘ first`; neighbouring permutations become one.
    pub fn after(&self, first: &Self) -> Self {
        let mut steps = first.steps.clone();
        for step in &self.steps {
            match (steps.last_mut(), step) {
                (Some(Step::Permute { source, .. }), Step::Permute { source: next, .. }) => {
                    *source = next
                        .iter()
                        .map(|&j| source.get(j as usize).copied().unwrap_or(NONE))
                        .collect();
                }
                _ => steps.push(step.clone()),
            }
        }
        Self {
            in_grid: first.in_grid,
            out_grid: self.out_grid,
            steps,
        }
    }

    pub fn valid(&self, mut cells: Vec<bool>) -> Vec<bool> {
        for step in &self.steps {
            cells = step.valid(&cells);
        }
        cells
    }

    pub fn is_permutation(&self) -> bool {
        self.steps.iter().all(|s| matches!(s, Step::Permute { .. }))
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
