//! A value whose gradient is known.

use candle_core::{Result, Tensor};

/// The value of `value` with the gradient of `carrier`, which must be finite and of the same shape.
///
/// `carrier − detach(carrier)` is exactly zero, so the value keeps its bits.
pub(super) fn with_gradient_of(value: &Tensor, carrier: &Tensor) -> Result<Tensor> {
    value.detach() + (carrier - carrier.detach())?
}
