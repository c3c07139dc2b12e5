//! Whether the gradients of the first step arrive; and if they do not, whether the images are the reason.

use anyhow::{Result, bail};
use candle_core::{D, DType, Device, Tensor, Var};
use ser_reg::{Error, grad};

/// Fails unless the gradient of `loss` reaches all `vars`. `images`, each `(B, C, H, W)`, are what `loss` was computed from.
///
/// # Errors
/// As [`grad::assert_reaches`]. If a gradient is zero and all images are constant or alike, the error says so instead: the
/// model is not at fault.
pub fn assert_reaches<'a>(
    loss: &Tensor,
    vars: Vec<(String, Var)>,
    images: impl IntoIterator<Item = &'a Tensor>,
) -> Result<()> {
    let Err(error) = grad::assert_reaches(loss, vars) else {
        return Ok(());
    };
    let Error::Unreached { absent, zero, not_finite, total } = &error else {
        return Err(error.into());
    };
    // A run with `--ratio 1` has no images of the base method alone.
    let images: Vec<&Tensor> = images.into_iter().filter(|x| x.elem_count() > 0).collect();
    if absent.is_empty()
        && not_finite.is_empty()
        && let Some(fault) = fault(&images)?
    {
        bail!(
            "--data: expected images that differ, got a first batch in which {fault}; the gradient is zero at {} of {total} \
             parameters: {}",
            zero.len(),
            zero.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ")
        );
    }
    Err(error.into())
}

/// A difference of normalized pixels that rounding makes.
const ROUNDING: f64 = 1e-3;

/// What is wrong with `images`, if anything is: nothing can be learned from them.
fn fault(images: &[&Tensor]) -> Result<Option<&'static str>> {
    let (mut constant, mut alike) = (!images.is_empty(), !images.is_empty());
    for images in images {
        let planes = images.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_from(2)?;
        let range = (planes.max(D::Minus1)? - planes.min(D::Minus1)?)?;
        constant &= range.flatten_all()?.max(0)?.to_scalar::<f64>()? < ROUNDING;
        let range = (planes.max(0)? - planes.min(0)?)?;
        alike &= images.dim(0)? > 1 && range.flatten_all()?.max(0)?.to_scalar::<f64>()? < ROUNDING;
    }
    Ok(match (constant, alike) {
        (true, _) => Some("every image is constant: its pixels have one value in each channel"),
        (false, true) => Some("all images are alike"),
        (false, false) => None,
    })
}
