//! Checks of settings and weights that several rooms share.
//!
//! Numbers are checked in f32, because losses of f32 and half-precision maps work in it.

use crate::{Error, Result};

/// Whether `value` is a normal number in f32: neither zero, nor subnormal, nor infinite, nor NaN.
fn is_normal_in_f32(value: f64) -> bool {
    (value as f32).is_normal()
}

/// Checks that `value` is finite and above 0, in f32 too.
pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && is_normal_in_f32(value) {
        return Ok(());
    }
    let expected = "a finite value above 0 (in f32: from 1.2e-38 to 3.4e38)";
    Err(Error::config(field, expected, format!("{value:e}")))
}

/// Checks that `value` is 0, or finite and above 0, in f32 too.
pub(crate) fn not_negative(field: &'static str, value: f64) -> Result<()> {
    if value == 0.0 || (value > 0.0 && is_normal_in_f32(value)) {
        return Ok(());
    }
    let expected = "0, or a finite value above 0 (in f32: from 1.2e-38 to 3.4e38)";
    Err(Error::config(field, expected, format!("{value:e}")))
}

/// The largest width. It keeps an absurd size an error, where memory for it cannot exist.
const MOST: usize = 1 << 24;

/// Checks that a width is at least 1 and not absurd.
pub(crate) fn size(field: &'static str, value: usize) -> Result<()> {
    if (1..=MOST).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, "a size from 1 to 2^24", value))
}

/// Checks both widths of a weight, and that the weight is not absurd.
pub(crate) fn weight(field: &'static str, inputs: usize, outputs: usize) -> Result<()> {
    size(field, inputs)?;
    size(field, outputs)?;
    if inputs * outputs <= 1 << 31 {
        return Ok(());
    }
    let got = format!("{inputs} x {outputs}");
    Err(Error::config(field, "a weight of at most 2^31 numbers", got))
}

/// Checks that there are `count` weights, one per `of`, all finite and none negative.
pub(crate) fn weights(op: &'static str, weights: &[f32], count: usize, of: &str) -> Result<()> {
    if weights.len() != count {
        let expected = format!("one weight per {of}, {count}");
        return Err(Error::input(op, expected, weights.len()));
    }
    match weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
        Some(w) => Err(Error::input(op, "finite weights of at least 0", w)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_checked_in_f32() {
        for bad in [0.0, -1.0, 1e-39, 1e-46, 1e39, 1e300, f64::NAN, f64::INFINITY] {
            assert!(positive("x", bad).is_err(), "{bad:e}");
        }
        for bad in [-1e-9, 1e-46, 1e-40, 1e300, f64::NAN, f64::INFINITY] {
            assert!(not_negative("x", bad).is_err(), "{bad:e}");
        }
        for good in [1.2e-38, 0.3, 3.4e38] {
            assert!(positive("x", good).is_ok() && not_negative("x", good).is_ok());
        }
        assert!(not_negative("x", 0.0).is_ok());
        assert!(size("n", 0).is_err() && size("n", usize::MAX).is_err() && size("n", 7).is_ok());
        assert!(weight("n", 1 << 24, 1 << 7).is_ok() && weight("n", 1 << 24, 1 << 8).is_err());
        assert!(weight("n", usize::MAX, 2).is_err() && weight("n", 2, 0).is_err());
    }
}
