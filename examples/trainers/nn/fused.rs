//! The operations of [`super`] in one pass each, on all threads, with hand-written gradients.
//!
//! Work is cut into pieces of a fixed size and summed in order: results do not depend on the number of threads.

mod attention;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};
use rayon::prelude::*;

use super::kernels;
pub use attention::attention;

/// Rows of one piece of work.
const ROWS: usize = 128;

/// Whether these operations may run: other devices and types need the plain ones.
pub fn applies(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op3(scale, shift, LayerNorm { eps })
}

pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

pub fn affine(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(weight, bias, Affine)
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = floats(x, x_layout)?;
        let (scale, shift) = (floats(scale, scale_layout)?, floats(shift, shift_layout)?);
        let width = row_width(x_layout, scale.len())?;
        let mut out = vec![0f32; x.len()];
        let pieces = x.par_chunks(ROWS * width);
        pieces.zip(out.par_chunks_mut(ROWS * width)).for_each(|(x, out)| {
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                kernels::standardize(x, self.eps, out);
                for ((out, scale), shift) in out.iter_mut().zip(scale).zip(shift) {
                    *out = *out * scale + shift;
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        _shift: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = scale.elem_count();
        let (dx, sums) = with_floats([x, scale, grad], |[x, scale, grad]| {
            let mut dx = vec![0f32; x.len()];
            let piece = |((x, grad), dx): ((&[f32], &[f32]), &mut [f32])| {
                // The gradients of the scale and of the shift, one after the other.
                let mut sums = vec![0f32; 2 * width];
                let (d_scale, d_shift) = sums.split_at_mut(width);
                let (mut standard, mut scaled) = (vec![0f32; width], vec![0f32; width]);
                let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
                for ((x, grad), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                    let factor = kernels::standardize(x, self.eps, &mut standard);
                    for i in 0..width {
                        d_scale[i] += grad[i] * standard[i];
                        scaled[i] = grad[i] * scale[i];
                    }
                    kernels::accumulate(d_shift, grad);
                    let mean = kernels::sum(&scaled) / width as f32;
                    let slope = kernels::dot(&scaled, &standard) / width as f32;
                    for i in 0..width {
                        dx[i] = factor * (scaled[i] - mean - slope * standard[i]);
                    }
                }
                sums
            };
            let pieces = x
                .par_chunks(ROWS * width)
                .zip(grad.par_chunks(ROWS * width))
                .zip(dx.par_chunks_mut(ROWS * width));
            let sums = total(pieces.map(piece).collect(), 2 * width);
            Ok((dx, sums))
        })?;
        let [d_scale, d_shift] = [&sums[..width], &sums[width..]]
            .map(|sums| Tensor::from_slice(sums, width, x.device()));
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(d_scale?), Some(d_shift?)))
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(x, layout)?;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(ROWS * 64).zip(x.par_chunks(ROWS * 64)).for_each(|(out, x)| {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = kernels::gelu(x);
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_floats([x, grad], |[x, grad]| {
            let mut dx = vec![0f32; x.len()];
            dx.par_chunks_mut(ROWS * 64)
                .zip(x.par_chunks(ROWS * 64))
                .zip(grad.par_chunks(ROWS * 64))
                .for_each(|((dx, x), grad)| {
                    for ((dx, &x), grad) in dx.iter_mut().zip(x).zip(grad) {
                        *dx = grad * kernels::gelu_slope(x);
                    }
                });
            Ok(dx)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Affine;

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let &[rows, inputs] = x_layout.dims() else {
            bail!("expected rows (M, C), got {:?}", x_layout.dims());
        };
        let bias = floats(bias, bias_layout)?;
        let width = row_width(weight_layout, bias.len())?;
        let mut out = x.matmul(weight, (1, rows, width, inputs), x_layout, weight_layout)?;
        if let CpuStorage::F32(out) = &mut out {
            out.par_chunks_mut(ROWS * width).for_each(|out| {
                out.chunks_exact_mut(width).for_each(|row| kernels::accumulate(row, bias));
            });
        }
        Ok((out, (rows, width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = bias.elem_count();
        let sums = with_floats([grad], |[grad]| {
            let piece = |grad: &[f32]| {
                let mut sums = vec![0f32; width];
                grad.chunks_exact(width).for_each(|row| kernels::accumulate(&mut sums, row));
                sums
            };
            Ok(total(grad.par_chunks(ROWS * width).map(piece).collect(), width))
        })?;
        let (x, weight) = (x.detach(), weight.detach());
        Ok((
            Some(grad.matmul(&weight.t()?)?),
            Some(x.t()?.matmul(grad)?),
            Some(Tensor::from_vec(sums, width, grad.device())?),
        ))
    }
}

/// The values behind a contiguous layout.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected a contiguous tensor, got {layout:?}"),
    }
}

/// Runs `f` on the values of CPU tensors.
fn with_floats<const K: usize, R>(
    tensors: [&Tensor; K],
    f: impl FnOnce([&[f32]; K]) -> Result<R>,
) -> Result<R> {
    let held: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = held.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[] as &[f32]; K];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slice = match &**storage {
            Storage::Cpu(storage) => floats(storage, layout)?,
            _ => bail!("expected a tensor on the CPU"),
        };
    }
    f(slices)
}

fn row_width(layout: &Layout, parameters: usize) -> Result<usize> {
    match layout.dims().last() {
        Some(&width) if width == parameters && width > 0 => Ok(width),
        _ => bail!("expected rows of {parameters} values, got {:?}", layout.dims()),
    }
}

/// The sum of the parts, in order.
fn total(parts: Vec<Vec<f32>>, width: usize) -> Vec<f32> {
    let mut total = vec![0f32; width];
    parts.iter().for_each(|part| kernels::accumulate(&mut total, part));
    total
}
