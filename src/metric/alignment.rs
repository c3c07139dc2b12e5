//! Does the stride of a layer meet both ends of its input alike?

use crate::{Error, Result};

/// Whether a layer that slides a window over `side` pixels treats both ends alike:
/// `(side + 2·padding − kernel) mod stride = 0`.
///
/// A convolution or a pooling commutes with flips and quarter turns only if this holds along both
/// axes (and its kernel is symmetric). Otherwise the last window ends before the last pixel: the
/// windows of the flipped image fall between the windows of the image. No training removes that
/// error; it is a ceiling of every equivariance score behind the layer. Mean centered
/// [`EqScore`](super::EqScore) over D4 of one random layer with symmetric kernels, on an even side:
///
/// | kernel, stride, padding | aligned | score |
/// |---|---|---|
/// | 3, 2, 1 | no | 0.671 |
/// | 7, 2, 3 (the stem of a ResNet) | no | 0.595 |
/// | 4, 2, 1 | yes | 1.000 |
/// | 2, 2, 0 and 4, 4, 0 (patches) | yes | 1.000 |
///
/// So either choose the side (a 3, 2, 1 layer is aligned on an odd side: 225 in place of 224), or
/// the layer (4, 2, 1 in place of 3, 2, 1). Check each layer with the side that reaches it. A
/// dilated kernel counts with its extent, `dilation·(kernel − 1) + 1`.
///
/// To measure a whole network, score it before training, with each kernel replaced by its mean over
/// the elements of D4: all that is missing to 1 is alignment (and position embeddings).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, group::D4, metric::{EqScore, stride_aligned}};
///
/// assert!(!stride_aligned(8, 3, 2, 1)?);
/// assert!(stride_aligned(9, 3, 2, 1)?);
/// assert!(stride_aligned(224, 16, 16, 0)?);
///
/// // measured: a layer whose kernel has the symmetry of D4
/// let kernel = Tensor::ones((1, 3, 3, 3), candle_core::DType::F64, &Device::Cpu)?;
/// for (side, tokens, aligned) in [(8, 4, false), (9, 5, true)] {
///     let images = Tensor::rand(0f64, 1., (4, 3, side, side), &Device::Cpu)?;
///     let rng = &mut StdRng::seed_from_u64(0);
///     let layer = |x: &Tensor| x.conv2d(&kernel, 1, 2, 1, 1);
///     let score = EqScore::new(TokenGrid::square(tokens)?);
///     let report = score.measure(&images, &D4::ALL[1..], rng, layer)?;
///     assert_eq!(report.mean.score.centered > 0.999, aligned);
/// }
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If a side, kernel or stride is zero, the padding is not below the kernel, or the kernel is
/// larger than the padded side.
pub fn stride_aligned(side: usize, kernel: usize, stride: usize, padding: usize) -> Result<bool> {
    let fail = |expected: &str| {
        let got = format!("side {side}, kernel {kernel}, stride {stride}, padding {padding}");
        Err(Error::input("stride_aligned", expected, got))
    };
    if side == 0 || kernel == 0 || stride == 0 {
        return fail("a side, a kernel and a stride of at least 1");
    }
    if padding >= kernel {
        return fail("a padding below the kernel (a window of padding alone sees nothing)");
    }
    let padded = padding.checked_mul(2).and_then(|p| p.checked_add(side));
    match padded.and_then(|padded| padded.checked_sub(kernel)) {
        Some(rest) => Ok(rest % stride == 0),
        None => fail("a kernel that fits into the padded side"),
    }
}
