//! The predicates that several methods share.

use candle_core::{DType, Tensor};

use crate::{Error, Result, TokenGrid, group::Subgroup};

/// The type of the computation: f64 for f64, f32 for the other floating-point types.
pub(super) fn work_dtype(op: &'static str, x: &Tensor) -> Result<DType> {
    match x.dtype() {
        DType::F16 | DType::BF16 | DType::F32 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        other => Err(Error::input(op, "a tensor of type f16, bf16, f32 or f64", other.as_str())),
    }
}

/// `a` and `b` have one shape, type and device, and at least one element.
pub(super) fn pair(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.elem_count() == 0 {
        return Err(Error::input(op, "at least one element", format!("{:?}", a.dims())));
    }
    if a.dims() != b.dims() {
        let expected = format!("tensors of one shape, the first {:?}", a.dims());
        return Err(Error::input(op, expected, format!("{:?}", b.dims())));
    }
    if a.dtype() != b.dtype() {
        let expected = format!("tensors of one type, the first {}", a.dtype().as_str());
        return Err(Error::input(op, expected, b.dtype().as_str()));
    }
    if !a.device().same_device(b.device()) {
        let expected = format!("tensors on one device, the first {:?}", a.device().location());
        return Err(Error::input(op, expected, format!("{:?}", b.device().location())));
    }
    Ok(())
}

/// Tokens `(B, N, C)` on `grid`.
pub(super) fn tokens(op: &'static str, tokens: &Tensor, grid: TokenGrid) -> Result<()> {
    match *tokens.dims() {
        [b, n, c] if b > 0 && c > 0 && n == grid.len() => Ok(()),
        _ => {
            let expected = format!(
                "nonempty tokens (B, {}, C) of a {grid} grid, without prefix tokens",
                grid.len()
            );
            Err(Error::input(op, expected, format!("{:?}", tokens.dims())))
        }
    }
}

/// Every element of `group` maps `grid` to itself.
pub(super) fn grid(op: &'static str, group: Subgroup, grid: TokenGrid) -> Result<()> {
    if grid.is_square() || !group.elements().iter().any(|g| g.swaps_axes()) {
        return Ok(());
    }
    let expected = format!(
        "a square grid for {group:?}, which exchanges rows and columns (C2, HFlip, VFlip and Flips \
         accept every grid)"
    );
    Err(Error::input(op, expected, grid))
}

/// A batch that a head can normalize.
pub(super) fn batch(op: &'static str, batch: usize) -> Result<()> {
    if batch >= 2 {
        return Ok(());
    }
    let expected = "at least 2 samples, because the head normalizes over the batch";
    Err(Error::input(op, expected, batch))
}

/// Widths of layers, by field.
pub(super) fn widths(widths: &[(&'static str, usize)]) -> Result<()> {
    match widths.iter().find(|(_, width)| !(1..=1 << 24).contains(width)) {
        Some(&(field, width)) => {
            Err(Error::config(field, "a width of at least 1 and at most 2^24", width))
        }
        None => Ok(()),
    }
}

/// A weight, a margin or an `eps`.
pub(super) fn not_negative(field: &'static str, value: f64) -> Result<()> {
    if value == 0.0 || (value > 0.0 && (value as f32).is_normal()) {
        return Ok(());
    }
    Err(Error::config(field, "a finite value of at least 0, in f32 too", value))
}

/// A temperature or an exponent.
pub(super) fn positive(field: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && (value as f32).is_normal() {
        return Ok(());
    }
    Err(Error::config(field, "a finite value above 0, in f32 too", value))
}

/// Checks that a weight has inputs and outputs and is not absurd: memory for it must be able to exist.
pub fn weight(inputs: usize, outputs: usize) -> Result<()> {
    match inputs.checked_mul(outputs) {
        Some(1..=MOST) => Ok(()),
        _ => Err(Error::config(
            "widths of a head",
            "weights of 1 to 2^31 numbers",
            format!("{inputs} x {outputs}"),
        )),
    }
}

const MOST: usize = 1 << 31;
