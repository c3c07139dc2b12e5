//! The steps of one sample in order, and the chains of a batch.

use std::sync::{Arc, OnceLock};

use super::{permutation::Permutation, step::Step};
use crate::TokenGrid;

/// The steps by which an element acts on one sample, first to last; no step is the identity.
#[derive(Debug)]
pub(super) struct Chain {
    pub in_grid: TokenGrid,
    pub out_grid: TokenGrid,
    pub steps: Vec<Step>,
    /// Computed at the first request, because every backward pass needs it.
    adjoint: OnceLock<Arc<Chain>>,
}

impl Chain {
    /// Merges neighboring permutations into one.
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
        Self { in_grid, out_grid, steps, adjoint: OnceLock::new() }
    }

    pub fn adjoint(&self) -> Arc<Self> {
        let adjoint = || {
            let steps = self.steps.iter().rev().map(Step::adjoint);
            Arc::new(Self::new(self.out_grid, self.in_grid, steps))
        };
        self.adjoint.get_or_init(adjoint).clone()
    }

    /// `self ∘ first`.
    pub fn after(&self, first: &Self) -> Self {
        let steps = first.steps.iter().chain(&self.steps).cloned();
        Self::new(first.in_grid, self.out_grid, steps)
    }

    /// Which input cells the set `cells` of the output read.
    pub fn reads(&self, mut cells: Vec<bool>) -> Vec<bool> {
        for step in &self.adjoint().steps {
            cells = step.touches(&cells);
        }
        cells
    }

    /// Which output cells read valid input cells only, and at least one.
    pub fn valid(&self, mut cells: Vec<bool>) -> Vec<bool> {
        for step in &self.steps {
            cells = step.valid(&cells);
        }
        cells
    }

    pub fn is_permutation(&self) -> bool {
        self.steps.iter().all(|s| matches!(s, Step::Permute(_)))
    }

    /// The single permutation of a chain that is exact; `None` if the chain is the identity.
    pub fn permutation(&self) -> Option<&Permutation> {
        debug_assert!(self.is_permutation());
        match self.steps.as_slice() {
            [Step::Permute(permutation)] => Some(permutation),
            _ => None,
        }
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

/// The chains of a batch between two grids: one for all samples, or one per sample.
#[derive(Clone, Debug)]
pub(super) struct Chains {
    pub in_grid: TokenGrid,
    pub out_grid: TokenGrid,
    each: Arc<[Arc<Chain>]>,
}

impl Chains {
    pub fn new(
        in_grid: TokenGrid,
        out_grid: TokenGrid,
        each: impl IntoIterator<Item = Arc<Chain>>,
    ) -> Self {
        Self { in_grid, out_grid, each: each.into_iter().collect() }
    }

    /// Number of chains: 1, or the number of samples.
    pub fn len(&self) -> usize {
        self.each.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Chain> {
        self.each.iter().map(Arc::as_ref)
    }

    /// The chain of sample `b`.
    pub fn get(&self, b: usize) -> &Chain {
        &self.each[if self.each.len() == 1 { 0 } else { b }]
    }

    pub fn is_identity(&self) -> bool {
        self.iter().all(|chain| chain.steps.is_empty())
    }

    pub fn is_permutation(&self) -> bool {
        self.iter().all(Chain::is_permutation)
    }

    pub fn adjoint(&self) -> Self {
        let each = self.iter().map(Chain::adjoint);
        Self::new(self.out_grid, self.in_grid, each)
    }
}
