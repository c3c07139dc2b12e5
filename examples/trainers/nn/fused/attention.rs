//! Self-attention, one head of one sample at a time: its scores stay in the cache.

use candle_core::{
    CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor, backend::BackendStorage, bail,
};
use rayon::prelude::*;

use super::{floats, kernels, with_floats};

pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(Attention { heads })
}

struct Attention {
    heads: usize,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(layout.dims())?;
        let (tokens, channels) = (sizes.tokens, sizes.channels);
        let qkv = floats(qkv, layout)?;
        let mut out = vec![0f32; qkv.len() / 3];
        qkv.par_chunks_exact(3 * tokens * channels)
            .zip(out.par_chunks_exact_mut(tokens * channels))
            .try_for_each(|(qkv, out)| sizes.forward(qkv, out))?;
        let shape = (layout.dims()[0], tokens, channels).into();
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.sizes(qkv.dims())?;
        let (tokens, channels) = (sizes.tokens, sizes.channels);
        let d_qkv = with_floats([qkv, grad], |[qkv, grad]| {
            let mut d_qkv = vec![0f32; qkv.len()];
            qkv.par_chunks_exact(3 * tokens * channels)
                .zip(grad.par_chunks_exact(tokens * channels))
                .zip(d_qkv.par_chunks_exact_mut(3 * tokens * channels))
                .try_for_each(|((qkv, grad), d_qkv)| sizes.backward(qkv, grad, d_qkv))?;
            Ok(d_qkv)
        })?;
        Ok(Some(Tensor::from_vec(d_qkv, qkv.shape(), qkv.device())?))
    }
}

impl Attention {
    fn sizes(&self, dims: &[usize]) -> Result<Sample> {
        match *dims {
            [_, tokens, width] if self.heads > 0 && width % (3 * self.heads) == 0 => {
                Ok(Sample { tokens, channels: width / 3, heads: self.heads })
            }
            _ => bail!(
                "attention: expected (B, N, 3·C) with C a multiple of {} heads, got {dims:?}",
                self.heads
            ),
        }
    }
}

/// The sizes of one sample.
#[derive(Clone, Copy)]
struct Sample {
    tokens: usize,
    channels: usize,
    heads: usize,
}

impl Sample {
    /// `softmax(q·kᵀ/√d)·v` for each head.
    fn forward(self, qkv: &[f32], out: &mut [f32]) -> Result<()> {
        for h in 0..self.heads {
            let [q, k, v] = [0, 1, 2].map(|part| self.head(qkv, 3, part, h));
            let mixed = self.weights(&q, &k)?.times(&v)?;
            self.set_head(out, 1, 0, h, &mixed)?;
        }
        Ok(())
    }

    /// Computes the weights again: that is cheaper than keeping them since the forward pass.
    fn backward(self, qkv: &[f32], grad: &[f32], d_qkv: &mut [f32]) -> Result<()> {
        for h in 0..self.heads {
            let [q, k, v] = [0, 1, 2].map(|part| self.head(qkv, 3, part, h));
            let grad = self.head(grad, 1, 0, h);
            let weights = self.weights(&q, &k)?;
            let d_v = weights.transposed_times(&grad)?;
            let mut d_scores = grad.times_transposed(&v)?;
            let scale = self.scale();
            for (d, w) in d_scores.rows_mut()?.zip(weights.rows()?) {
                let mean = kernels::dot(d, w);
                for (d, w) in d.iter_mut().zip(w) {
                    *d = w * (*d - mean) * scale;
                }
            }
            let d_q = d_scores.times(&k)?;
            let d_k = d_scores.transposed_times(&q)?;
            for (part, d) in [d_q, d_k, d_v].iter().enumerate() {
                self.set_head(d_qkv, 3, part, h, d)?;
            }
        }
        Ok(())
    }

    /// Rows of attention weights, one for each token.
    fn weights(self, q: &Matrix, k: &Matrix) -> Result<Matrix> {
        let mut scores = q.times_transposed(k)?;
        let scale = self.scale();
        for row in scores.rows_mut()? {
            row.iter_mut().for_each(|s| *s *= scale);
            kernels::softmax(row);
        }
        Ok(scores)
    }

    fn scale(self) -> f32 {
        (self.heads as f32 / self.channels as f32).sqrt()
    }

    /// The channels of head `h` in one of the `parts` that lie side by side in each row of `x`.
    fn head(self, x: &[f32], parts: usize, part: usize, h: usize) -> Matrix {
        let width = self.channels / self.heads;
        let start = part * self.channels + h * width;
        let mut values = Vec::with_capacity(self.tokens * width);
        for row in x.chunks_exact(parts * self.channels) {
            values.extend_from_slice(&row[start..start + width]);
        }
        Matrix::new(values, self.tokens, width)
    }

    /// Writes what [`Self::head`] reads.
    fn set_head(
        self,
        x: &mut [f32],
        parts: usize,
        part: usize,
        h: usize,
        values: &Matrix,
    ) -> Result<()> {
        let width = self.channels / self.heads;
        let start = part * self.channels + h * width;
        for (row, values) in x.chunks_exact_mut(parts * self.channels).zip(values.rows()?) {
            row[start..start + width].copy_from_slice(values);
        }
        Ok(())
    }
}

/// A small matrix, multiplied by candle's product: too small to be worth more than one thread, of which each has its own.
struct Matrix {
    values: CpuStorage,
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn new(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        let values = CpuStorage::F32(values);
        Self { values, rows, cols }
    }

    /// `A·B`
    fn times(&self, b: &Matrix) -> Result<Matrix> {
        let (m, k, n) = (self.rows, self.cols, b.cols);
        self.product(&self.layout(), b, &b.layout(), (m, n, k))
    }

    /// `A·Bᵀ`
    fn times_transposed(&self, b: &Matrix) -> Result<Matrix> {
        let (m, k, n) = (self.rows, self.cols, b.rows);
        self.product(&self.layout(), b, &b.layout().transpose(0, 1)?, (m, n, k))
    }

    /// `Aᵀ·B`
    fn transposed_times(&self, b: &Matrix) -> Result<Matrix> {
        let (m, k, n) = (self.cols, self.rows, b.cols);
        self.product(&self.layout().transpose(0, 1)?, b, &b.layout(), (m, n, k))
    }

    fn product(
        &self,
        layout: &Layout,
        b: &Matrix,
        b_layout: &Layout,
        (m, n, k): (usize, usize, usize),
    ) -> Result<Matrix> {
        let values = self.values.matmul(&b.values, (1, m, n, k), layout, b_layout)?;
        Ok(Matrix { values, rows: m, cols: n })
    }

    fn layout(&self) -> Layout {
        Layout::contiguous((self.rows, self.cols))
    }

    fn rows(&self) -> Result<impl Iterator<Item = &[f32]>> {
        Ok(self.values.as_slice::<f32>()?.chunks_exact(self.cols))
    }

    fn rows_mut(&mut self) -> Result<impl Iterator<Item = &mut [f32]>> {
        match &mut self.values {
            CpuStorage::F32(values) => Ok(values.chunks_exact_mut(self.cols)),
            other => Err(Error::Msg(format!("expected f32, got {:?}", other.dtype()))),
        }
    }
}
