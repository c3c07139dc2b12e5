//! Applying an operator to tokens, maps and the outputs of layers.

use candle_core::{DType, Device, Tensor};

use super::{GridOperator, cpu, memory::Memory, portable};
use crate::{Channels, Error, Layout, Result, storage::is_movable};

impl GridOperator {
    /// Acts on tokens `(B, N, C)` or on a map or image `(B, C, H, W)`, and returns the same kind on
    /// [`out_grid`](Self::out_grid). It is differentiable; the backward pass is the adjoint.
    ///
    /// A permutation moves values of any type and keeps every bit. Other operators compute `f16`
    /// and `bf16` in `f32`, and refuse integers. A NaN or an infinity reaches only the cells that
    /// read it.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, the tokens do not fit [`in_grid`](Self::in_grid), the batch
    /// is empty or does not fit the number of samples, or cells of integers would be mixed.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let memory = self.check(x)?;
        if self.chains.is_identity() {
            return Ok(x.clone());
        }
        let dtype = x.dtype();
        if !self.is_exact() && matches!(dtype, DType::F16 | DType::BF16) {
            return Ok(self.apply(&x.to_dtype(DType::F32)?)?.to_dtype(dtype)?);
        }
        if matches!(x.device(), Device::Cpu) {
            return Ok(cpu::apply(&self.chains, memory, x)?);
        }
        self.apply_portable(x)
    }

    /// Acts on the output of a layer with the given `layout`; differentiable. Prefix tokens (CLS,
    /// registers) do not change and lead the result. `(B, H, W, C)` maps stay channels-last.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use ser_reg::{GridOperator, Layout, Resample, TokenGrid, group::D4};
    /// let vit = Tensor::new(&[[[9f32], [0.], [1.], [2.], [3.]]], &Device::Cpu)?; // CLS and 2x2 tokens
    /// let flip = GridOperator::new(&[D4::HFLIP], TokenGrid::square(2)?, &Resample::default())?;
    /// let flipped = flip.apply_in(Layout { prefix: 1, ..Default::default() }, &vit)?;
    /// assert_eq!(flipped.flatten_all()?.to_vec1::<f32>()?, [9., 1., 0., 3., 2.]);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`apply`](Self::apply), and a tensor that does not fit the layout.
    pub fn apply_in(&self, layout: Layout, x: &Tensor) -> Result<Tensor> {
        let tokens = self.apply(&layout.tokens(x, self.in_grid())?)?;
        let (b, _, c) = tokens.dims3()?;
        let (rows, cols) = (self.out_grid().rows(), self.out_grid().cols());
        Ok(match (x.rank(), layout.channels) {
            (4, Channels::First) => {
                tokens.transpose(1, 2)?.contiguous()?.reshape((b, c, rows, cols))?
            }
            (4, Channels::Last) => tokens.reshape((b, rows, cols, c))?,
            _ if layout.prefix == 0 => tokens,
            _ => Tensor::cat(&[&x.narrow(1, 0, layout.prefix)?, &tokens], 1)?,
        })
    }

    /// As [`apply`](Self::apply), made of plain candle ops only. Devices other than the CPU run it,
    /// and tests compare the fused op with it.
    #[doc(hidden)]
    pub fn apply_portable(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.check(x)? {
            Memory::Tokens(_) => portable::apply(&self.chains, x)?,
            Memory::Planes(_) => {
                let (b, c, _, _) = x.dims4()?;
                let tokens = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
                let (rows, cols) = (self.out_grid().rows(), self.out_grid().cols());
                let out = portable::apply(&self.chains, &tokens)?;
                out.transpose(1, 2)?.contiguous()?.reshape((b, c, rows, cols))?
            }
        })
    }

    fn check(&self, x: &Tensor) -> Result<Memory> {
        let (op, got) = ("GridOperator::apply", || format!("{:?} {:?}", x.dims(), x.dtype()));
        let grid = self.in_grid();
        let (n, rows, cols) = (grid.len(), grid.rows(), grid.cols());
        let memory = match *x.dims() {
            [_, tokens, c] if tokens == n => Memory::Tokens(c),
            [_, c, h, w] if (h, w) == (rows, cols) => Memory::Planes(c),
            _ => {
                let expected = format!(
                    "tokens (B, {n}, C) of a {rows}x{cols} grid without prefix tokens, or a map \
                     (B, C, {rows}, {cols})"
                );
                return Err(Error::input(op, expected, got()));
            }
        };
        let batch = x.dims()[0];
        if batch == 0 || x.elem_count() == 0 {
            return Err(Error::input(op, "at least one sample and one channel", got()));
        }
        if self.samples() != 1 && self.samples() != batch {
            let expected = format!("a batch of {} samples, one per element", self.samples());
            return Err(Error::input(op, expected, got()));
        }
        if !is_movable(x.dtype()) || !(self.is_exact() || x.dtype().is_float()) {
            let expected = if self.is_exact() {
                "integers, or floats of at least 16 bits"
            } else {
                "floats (this operator mixes cells; only permutations move integers)"
            };
            return Err(Error::input(op, expected, got()));
        }
        Ok(memory)
    }
}
