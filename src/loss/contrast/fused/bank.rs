//! Token sets on the unit sphere, with the gradient that collects on them.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::real::Real;
use crate::loss::contrast::task::Sets;

/// One gradient: what collects with respect to the unit tokens, or nothing if none is wanted.
pub(super) type Gradient<T> = Option<Vec<T>>;

pub(super) struct Bank<T> {
    sources: Vec<Tensor>,
    /// Unit tokens `û = x / √(|x|² + eps)`, row after row.
    pub(super) rows: Vec<Vec<T>>,
    /// `1 / √(|x|² + eps)`.
    inverse_norms: Vec<Vec<T>>,
    pub(super) grads: Vec<Gradient<T>>,
    pub(super) width: usize,
}

/// Sum of squares, or of products, in a fixed order.
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    const LANES: usize = 16;
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = [T::zero(); LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_tail).zip(b_tail) {
        *lane += a * b;
    }
    lanes.into_iter().fold(T::zero(), |sum, lane| sum + lane)
}

/// Rows to a task: large enough that a task is worth handing over.
const ROWS: usize = 64;

impl<T: Real> Bank<T> {
    pub(super) fn new(sets: Sets, eps: f64) -> Result<Self> {
        let sources = sets.0;
        let width = sources.first().and_then(|x| x.dims().last().copied()).unwrap_or(1);
        let mut bank = Self {
            rows: Vec::with_capacity(sources.len()),
            inverse_norms: Vec::with_capacity(sources.len()),
            grads: Vec::with_capacity(sources.len()),
            sources,
            width,
        };
        for source in &bank.sources {
            let values = source.detach().to_dtype(T::DTYPE)?.contiguous()?;
            let (storage, layout) = values.storage_and_layout();
            let (Storage::Cpu(storage), Some((start, end))) =
                (&*storage, layout.contiguous_offsets())
            else {
                bail!("tokens are contiguous on the CPU here")
            };
            let values = &storage.as_slice::<T>()?[start..end];
            let mut rows = values.to_vec();
            let inverse: Vec<T> = rows
                .par_chunks_exact_mut(width)
                .with_min_len(ROWS)
                .map(|row| {
                    let square = dot(row, row) + T::from_f64(eps);
                    // A norm that overflows is no number, so that its token does not pass for zero.
                    let inverse = match square.is_infinite() {
                        true => T::nan(),
                        false => square.sqrt().recip(),
                    };
                    row.iter_mut().for_each(|v| *v *= inverse);
                    inverse
                })
                .collect();
            bank.grads.push(source.track_op().then(|| vec![T::zero(); rows.len()]));
            bank.rows.push(rows);
            bank.inverse_norms.push(inverse);
        }
        Ok(bank)
    }

    pub(super) fn is_live(&self, set: usize) -> bool {
        self.grads[set].is_some()
    }

    /// `value` as a node of the graph whose gradient with respect to each source is the one collected here.
    pub(super) fn inject(self, value: f64) -> Result<Tensor> {
        let mut value = Tensor::new(T::from_f64(value), &candle_core::Device::Cpu)?;
        let sets = self.sources.into_iter().zip(self.rows).zip(self.inverse_norms);
        for (((source, rows), inverse), grad) in sets.zip(self.grads) {
            let Some(mut grad) = grad else { continue };
            // dû/dx = (I − û ûᵀ) / √(|x|² + eps)
            grad.par_chunks_exact_mut(self.width)
                .with_min_len(ROWS)
                .zip(rows.par_chunks_exact(self.width))
                .zip(inverse)
                .for_each(|((grad, unit), inverse)| {
                    let radial = dot(grad, unit);
                    for (g, &u) in grad.iter_mut().zip(unit) {
                        *g = (*g - radial * u) * inverse;
                    }
                });
            let grad = Tensor::from_vec(grad, source.shape(), source.device())?;
            value = (value + source.apply_op1(Carry(grad))?)?;
        }
        Ok(value)
    }
}

/// A node of value 0 whose gradient is known.
struct Carry(Tensor);

impl CustomOp1 for Carry {
    fn name(&self) -> &'static str {
        "known-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let zero = match self.0.dtype() {
            DType::F64 => CpuStorage::F64(vec![0.0]),
            _ => CpuStorage::F32(vec![0.0]),
        };
        Ok((zero, ().into()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let scale = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        // A loss that is differentiated as it stands needs no scaled copy.
        let scaled = match scale {
            1.0 => self.0.clone(),
            _ => (&self.0 * scale)?,
        };
        Ok(Some(scaled.to_dtype(arg.dtype())?))
    }
}
