//! One D4 element per sample of a batch.

use candle_core::{Device, Result, Tensor};
use ser_reg::{GridOperator, Resample, TokenGrid, group::D4};

pub const BATCH: usize = 64;

/// All eight elements, one after the other.
pub fn elements() -> Vec<D4> {
    (0..BATCH).map(|b| D4::ALL[b % 8]).collect()
}

/// The operator of [`elements`] on a square grid.
pub fn operator(side: usize) -> GridOperator {
    let grid = TokenGrid::square(side).unwrap();
    GridOperator::new(&elements(), grid, &Resample::default()).unwrap()
}

/// Plain candle: a flip and a transpose per sample, then a stack.
pub fn plain(x: &Tensor, side: usize) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    let map = x.reshape((batch, side, side, channels))?;
    let turned = elements().into_iter().enumerate().map(|(b, g)| {
        let mut x = map.get(b)?;
        if g.flip() {
            x = x.flip(&[1])?;
        }
        match g.turns() {
            0 => Ok(x),
            1 => x.transpose(0, 1)?.contiguous()?.flip(&[0]),
            2 => x.flip(&[0, 1]),
            _ => x.transpose(0, 1)?.contiguous()?.flip(&[1]),
        }
    });
    Tensor::stack(&turned.collect::<Result<Vec<_>>>()?, 0)?.reshape((batch, side * side, channels))
}

/// The source of each token of the flattened batch.
pub fn indices(side: usize) -> Tensor {
    let grid = TokenGrid::square(side).unwrap();
    let n = grid.len() as u32;
    let indices: Vec<u32> = (0u32..)
        .zip(elements())
        .flat_map(|(b, g)| g.source_indices(grid).into_iter().map(move |i| b * n + i))
        .collect();
    Tensor::from_vec(indices, BATCH * grid.len(), &Device::Cpu).unwrap()
}

/// One gather over the flattened batch, the fastest form in plain candle.
pub fn gather(x: &Tensor, indices: &Tensor) -> Result<Tensor> {
    x.flatten(0, 1)?.index_select(indices, 0)?.reshape(x.dims())
}

/// The backward pass of [`gather`]: a scatter that adds.
pub fn scatter(cotangent: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let flat = cotangent.flatten(0, 1)?;
    flat.zeros_like()?.index_add(indices, &flat, 0)?.reshape(cotangent.dims())
}
