//! The operator as one fused candle op on the CPU. Its backward pass is the adjoint operator.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{chain::Chains, memory::Memory, taps::Real};
use crate::storage::{self, Moves};

const OP: &str = "grid-operator";

/// Applies `chains` to a CPU tensor; differentiable.
pub(super) fn apply(chains: &Chains, memory: Memory, x: &Tensor) -> Result<Tensor> {
    let chains = chains.clone();
    x.contiguous()?.apply_op1(Apply { chains, memory })
}

struct Apply {
    chains: Chains,
    memory: Memory,
}

impl Apply {
    /// Number of values of one input sample and of one output sample.
    fn lengths(&self) -> (usize, usize) {
        let grids = [self.chains.in_grid, self.chains.out_grid];
        let [n_in, n_out] = grids.map(|grid| grid.len() * self.memory.channels());
        (n_in, n_out)
    }

    fn out_shape(&self, batch: usize) -> Shape {
        let grid = self.chains.out_grid;
        match self.memory {
            Memory::Tokens(c) => (batch, grid.len(), c).into(),
            Memory::Planes(c) => (batch, c, grid.rows(), grid.cols()).into(),
        }
    }

    /// Calls `sample(index, input, output)` for every sample in parallel. One thread writes each
    /// output.
    fn each<T: Copy + Default + Send + Sync>(
        &self,
        x: &[T],
        sample: impl Fn(usize, &[T], &mut [T]) + Sync,
    ) -> Vec<T> {
        let (n_in, n_out) = self.lengths();
        debug_assert_eq!(x.len() % n_in, 0);
        let mut out = zeros(x.len() / n_in * n_out);
        out.par_chunks_exact_mut(n_out)
            .zip(x.par_chunks_exact(n_in))
            .enumerate()
            .for_each(|(b, (out, x))| sample(b, x, out));
        out
    }

    /// Steps that mix cells.
    fn mixed<T: Real>(&self, x: &[T]) -> Vec<T> {
        let channels = self.memory.channels();
        self.each(x, |b, x, out| {
            let chain = self.chains.get(b);
            chain.run(x, out, channels, |step, x, out| {
                step.apply(x, out, self.memory);
            });
        })
    }
}

impl Moves for Apply {
    fn moved<T: Copy + Default + Send + Sync>(&self, x: &[T]) -> Vec<T> {
        self.each(x, |b, x, out| match self.chains.get(b).permutation() {
            Some(permutation) => permutation.apply(x, out, self.memory),
            None => out.copy_from_slice(x),
        })
    }
}

/// A zeroed buffer, filled in parallel so that page faults are spread over threads.
fn zeros<T: Copy + Default + Send + Sync>(len: usize) -> Vec<T> {
    const PIECE: usize = 64;
    let pieces = rayon::iter::repeat_n([T::default(); PIECE], len.div_ceil(PIECE));
    let mut zeros = pieces.collect::<Vec<_>>().into_flattened();
    zeros.truncate(len);
    zeros
}

impl CustomOp1 for Apply {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use CpuStorage as S;
        let out = if self.chains.is_permutation() {
            storage::map(OP, storage, layout, self)?
        } else {
            let (start, end) = storage::contiguous(OP, layout)?;
            match storage {
                S::F32(x) => S::F32(self.mixed(&x[start..end])),
                S::F64(x) => S::F64(self.mixed(&x[start..end])),
                _ => bail!("{OP}: expected f32 or f64 where cells are mixed"),
            }
        };
        Ok((out, self.out_shape(layout.dims()[0])))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        apply(&self.chains.adjoint(), self.memory, grad).map(Some)
    }
}
