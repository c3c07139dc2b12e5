//! Tokens (64, 14×14, 384) resampled to 12×16.

use candle_core::{DType, Device, Result, Tensor, Var};
use ser_reg::{Filter, GridOperator, TokenGrid, group::Scale};

pub const SHAPE: [usize; 3] = [64, 196, 384];

pub fn operator(filter: Filter) -> GridOperator {
    between(TokenGrid::square(14).unwrap(), TokenGrid::new(12, 16).unwrap(), filter)
}

fn between(from: TokenGrid, to: TokenGrid, filter: Filter) -> GridOperator {
    GridOperator::new(&[Scale::to_grid(from, to)], from, &filter.into()).unwrap()
}

/// Two dense products, `R·X·Cᵀ`: how one resizes tokens in candle, which has no differentiable resizing.
pub struct Plain {
    rows: Tensor,
    cols: Tensor,
}

impl Plain {
    pub fn new(filter: Filter) -> Self {
        let dense = |n_in, n_out| {
            let line = |n| TokenGrid::new(n, 1).unwrap();
            let eye = Tensor::eye(n_in, DType::F32, &Device::Cpu).unwrap();
            let eye = eye.unsqueeze(0).unwrap();
            let matrix = between(line(n_in), line(n_out), filter).apply(&eye);
            matrix.unwrap().squeeze(0).unwrap()
        };
        Self { rows: dense(14, 12), cols: dense(14, 16) }
    }

    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, channels) = x.dims3()?;
        let (h, h_in) = self.rows.dims2()?;
        let (w, w_in) = self.cols.dims2()?;
        let x = x.reshape((batch, h_in, w_in * channels))?;
        let tall = self.rows.broadcast_matmul(&x)?;
        let tall = tall.reshape((batch * h, w_in, channels))?;
        let y = self.cols.broadcast_matmul(&tall)?;
        y.reshape((batch, h * w, channels))
    }
}

/// Forward and backward with a cotangent of ones, as candle starts from whatever is differentiated.
pub fn forward_backward(x: &Var, f: impl Fn(&Tensor) -> Result<Tensor>) -> Tensor {
    let y = f(x.as_tensor()).unwrap();
    y.backward().unwrap().remove(x).unwrap()
}
