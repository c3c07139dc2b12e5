//! The operations of [`super`] in candle operations: any device and type, and the reference for [`super::fused`].

use candle_core::{D, Result, Tensor};

pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Tensor> {
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let std = (variance + f64::from(eps))?.sqrt()?;
    centered.broadcast_div(&std)?.broadcast_mul(scale)?.broadcast_add(shift)
}

pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.gelu()
}

pub fn affine(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(weight)?.broadcast_add(bias)
}

pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, width) = qkv.dims3()?;
    let channels = width / 3;
    let head = channels / heads;
    let parts =
        qkv.reshape((batch, tokens, 3, heads, head))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
    let (q, k, v) = (parts.get(0)?, parts.get(1)?, parts.get(2)?);
    let scores = (q.matmul(&k.t()?)? / (head as f64).sqrt())?;
    // Not softmax_last_dim: it would cut the gradient.
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
    mixed.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, channels))
}
