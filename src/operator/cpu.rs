//! The operator as one fused candle op on the CPU; its backward is the adjoint operator.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use num_traits::Float;
use rayon::prelude::*;

use super::{GridOperator, step::Memory};

pub(super) struct Apply {
    pub operator: GridOperator,
    pub memory: Memory,
}

impl Apply {
    fn per_cell(&self) -> usize {
        match self.memory {
            Memory::Tokens(c) | Memory::Planes(c) => c,
        }
    }

    /// Values of a sample that go in and come out.
    fn lengths(&self) -> (usize, usize) {
        let grids = [self.operator.in_grid, self.operator.out_grid];
        let [n_in, n_out] = grids.map(|grid| grid.len() * self.per_cell());
        (n_in, n_out)
    }

    fn out_shape(&self, batch: usize) -> Shape {
        let grid = self.operator.out_grid;
        match self.memory {
            Memory::Tokens(c) => (batch, grid.len(), c).into(),
            Memory::Planes(c) => (batch, c, grid.rows(), grid.cols()).into(),
        }
    }

    /// Calls `sample(index, input, output)` for every sample, in parallel; each output is written by one thread.
    fn each<T: Copy + Default + Send + Sync>(
        &self,
        x: &[T],
        sample: impl Fn(usize, &[T], &mut [T]) + Sync,
    ) -> Vec<T> {
        let (n_in, n_out) = self.lengths();
        let mut out = zeros(x.len() / n_in * n_out);
        out.par_chunks_exact_mut(n_out)
            .zip(x.par_chunks_exact(n_in))
            .enumerate()
            .for_each(|(b, (out, x))| sample(b, x, out));
        out
    }

    fn floats<T: Float + Default + Send + Sync>(&self, x: &[T]) -> Vec<T> {
        self.each(x, |b, x, out| {
            self.operator
                .chain(b)
                .run(x, out, self.per_cell(), |step, x, out| {
                    step.apply(x, out, self.memory)
                });
        })
    }

    /// Whole cells, of any type; [`GridOperator::apply`] sends mixing operators elsewhere.
    fn cells<T: Copy + Default + Send + Sync>(&self, x: &[T]) -> Vec<T> {
        self.each(x, |b, x, out| match self.operator.chain(b).permutation() {
            Some(permutation) => permutation.apply(x, out, self.memory),
            None => out.copy_from_slice(x),
        })
    }
}

/// `vec![T::default(); len]`, written by all threads: what is overwritten at once costs half as much as a copy that way.
fn zeros<T: Copy + Default + Send + Sync>(len: usize) -> Vec<T> {
    const PIECE: usize = 64;
    let pieces = rayon::iter::repeat_n([T::default(); PIECE], len.div_ceil(PIECE));
    let mut zeros = pieces.collect::<Vec<_>>().into_flattened();
    zeros.truncate(len);
    zeros
}

/// Whether [`Apply`] can move cells of this type.
pub(super) fn moves(dtype: DType) -> bool {
    use DType::*;
    matches!(dtype, U8 | U32 | I16 | I32 | I64 | BF16 | F16 | F32 | F64)
}

impl CustomOp1 for Apply {
    fn name(&self) -> &'static str {
        "grid-operator"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("grid-operator: expected a contiguous tensor, got {layout:?}");
        };
        use CpuStorage as S;
        let exact = self.operator.is_exact();
        let out = match storage {
            S::F32(x) if !exact => S::F32(self.floats(&x[start..end])),
            S::F64(x) if !exact => S::F64(self.floats(&x[start..end])),
            S::U8(x) if exact => S::U8(self.cells(&x[start..end])),
            S::U32(x) if exact => S::U32(self.cells(&x[start..end])),
            S::I16(x) if exact => S::I16(self.cells(&x[start..end])),
            S::I32(x) if exact => S::I32(self.cells(&x[start..end])),
            S::I64(x) if exact => S::I64(self.cells(&x[start..end])),
            S::BF16(x) if exact => S::BF16(self.cells(&x[start..end])),
            S::F16(x) if exact => S::F16(self.cells(&x[start..end])),
            S::F32(x) => S::F32(self.cells(&x[start..end])),
            S::F64(x) => S::F64(self.cells(&x[start..end])),
            _ => bail!("grid-operator: expected f32 or f64 where cells are mixed"),
        };
        Ok((out, self.out_shape(layout.dims()[0])))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.operator.adjoint().apply(grad)?))
    }
}
