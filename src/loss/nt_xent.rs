//! NT-Xent over the tokens of two aligned views.

use candle_core::Tensor;

use super::contrast::{self, Engine, Sets, Task};
use super::{Contrastive, ContrastiveOutput, SameImage, check_pair, shares, work_dtype};
use crate::{Error, Result};

/// NT-Xent of `z` and `zp`, (B, N, D) each: token `(i, j)` of `z` is the anchor of token `(i, j)` of `zp`.
///
/// ```text
/// ℓ_ij = −log e^{s(z_ij,z'_ij)} / ( e^{s(z_ij,z'_ij)} + Σ_{m≠i,n} e^{s(z_ij,z_mn)} + Σ_{m≠i,n} e^{s(z_ij,z'_mn)} )
/// ```
///
/// The loss is the mean over all tokens, with `s(a, b) = cos(a, b)/τ` (arXiv 2603.06693).
/// [`Negatives::OtherView`](super::Negatives) drops the middle sum. [`SameImage::Keep`] lets the sums run over every token
/// but `(i, j)`. Gradients reach both sides; detach a side to stop them there.
///
/// With one image and [`SameImage::Exclude`] there are no negatives: the loss and its gradient are 0. A NaN or an infinity
/// in a token makes the loss NaN.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::loss::{Contrastive, nt_xent};
/// let z = Var::randn(0f32, 1., (4, 49, 32), &Device::Cpu)?;
/// let zp = Var::randn(0f32, 1., (4, 49, 32), &Device::Cpu)?;
/// let out = nt_xent(&z, &zp, &Contrastive { temperature: 0.2, ..Default::default() })?;
/// let grads = out.loss.backward()?;
/// assert_eq!(grads.get(&z).map(|g| g.dims()), Some(&[4, 49, 32][..]));
/// println!("loss {}, matched {}", out.loss, out.accuracy);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the rank is not 3, the shapes, types or devices differ, a tensor is empty or not of a floating point type, or a
/// setting is out of range.
pub fn nt_xent(z: &Tensor, zp: &Tensor, config: &Contrastive) -> Result<ContrastiveOutput> {
    let ids = image_ids("nt_xent", z, zp)?;
    pairs("nt_xent", [z, zp], &ids, None, config, false)
}

/// The mean of both directions, `½(L(z, z') + L(z', z))`, with `L` as in [`nt_xent`].
///
/// On the CPU both directions together cost about 1.4 times one direction.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::loss::{Contrastive, nt_xent, nt_xent_symmetric};
/// let z = Tensor::randn(0f64, 1., (4, 9, 8), &Device::Cpu)?;
/// let zp = Tensor::randn(0f64, 1., (4, 9, 8), &Device::Cpu)?;
/// let config = Contrastive::default();
/// let loss = |a, b| nt_xent(a, b, &config)?.loss.to_scalar::<f64>().map_err(ser_reg::Error::from);
/// let both = nt_xent_symmetric(&z, &zp, &config)?.loss.to_scalar::<f64>()?;
/// assert!((both - (loss(&z, &zp)? + loss(&zp, &z)?) / 2.).abs() < 1e-12);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`nt_xent`].
pub fn nt_xent_symmetric(
    z: &Tensor,
    zp: &Tensor,
    config: &Contrastive,
) -> Result<ContrastiveOutput> {
    let ids = image_ids("nt_xent_symmetric", z, zp)?;
    pairs("nt_xent_symmetric", [z, zp], &ids, None, config, true)
}

/// [`nt_xent`] of flat tokens (M, D): `image_ids[p]` is the image of row `p` of both `z` and `zp`.
///
/// Images may have different numbers of tokens, in any order, as after invalid tokens were dropped. `weights` has one
/// weight per anchor; `None` takes the plain mean.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::loss::{Contrastive, nt_xent_ragged};
/// let z = Tensor::randn(0f32, 1., (5, 16), &Device::Cpu)?;
/// let zp = Tensor::randn(0f32, 1., (5, 16), &Device::Cpu)?;
/// let out = nt_xent_ragged(&z, &zp, &[0, 0, 0, 1, 1], None, &Contrastive::default())?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`nt_xent`], and if ids or weights differ in number from the tokens, a weight is negative or not finite, or none
/// is above 0.
pub fn nt_xent_ragged(
    z: &Tensor,
    zp: &Tensor,
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &Contrastive,
) -> Result<ContrastiveOutput> {
    pairs("nt_xent_ragged", [z, zp], image_ids, weights, config, false)
}

/// [`nt_xent_ragged`], in both directions if `symmetric`, out of candle operations only.
///
/// Other devices run this code, and tests compare the fused code with it.
///
/// # Errors
/// See [`nt_xent_ragged`].
#[doc(hidden)]
pub fn nt_xent_portable(
    z: &Tensor,
    zp: &Tensor,
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &Contrastive,
    symmetric: bool,
) -> Result<ContrastiveOutput> {
    let op = "nt_xent_portable";
    run(op, Engine::Portable, [z, zp], image_ids, weights, config, symmetric)
}

/// NT-Xent of flat tokens (M, D), in one direction or as the mean of both.
pub(crate) fn pairs(
    op: &'static str,
    tokens: [&Tensor; 2],
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &Contrastive,
    symmetric: bool,
) -> Result<ContrastiveOutput> {
    let engine = Engine::of(tokens[0]);
    run(op, engine, tokens, image_ids, weights, config, symmetric)
}

/// One id per token of `z` (B, N, D): the index of its image.
fn image_ids(op: &'static str, z: &Tensor, zp: &Tensor) -> Result<Vec<u32>> {
    check_pair(op, z, zp)?;
    let &[images, tokens, _] = z.dims() else {
        let expected = "tokens of rank 3, (B, N, D) (nt_xent_ragged takes (M, D) and image ids)";
        return Err(Error::input(op, expected, format!("{:?}", z.dims())));
    };
    let ids = 0..images as u32;
    Ok(ids.flat_map(|image| std::iter::repeat_n(image, tokens)).collect())
}

fn run(
    op: &'static str,
    engine: Engine,
    [z, zp]: [&Tensor; 2],
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &Contrastive,
    symmetric: bool,
) -> Result<ContrastiveOutput> {
    check_pair(op, z, zp)?;
    config.check()?;
    let dtype = work_dtype(op, z)?;
    let Some((_, rows @ [_, ..])) = z.dims().split_last() else {
        let expected = "tokens of rank 2, (M, D)";
        return Err(Error::input(op, expected, format!("{:?}", z.dims())));
    };
    let count: usize = rows.iter().product();
    if image_ids.len() != count {
        let expected = format!("one image id per token, {count}");
        return Err(Error::input(op, expected, image_ids.len()));
    }
    let shares = shares(op, weights, count)?;
    let each: Vec<u32>;
    let labels = match config.same_image {
        SameImage::Exclude => image_ids,
        SameImage::Keep => {
            each = (0..count as u32).collect();
            &each
        }
    };

    let mut sets = Sets::default();
    let pair = [sets.enter(z), sets.enter(zp)];
    let task = match symmetric {
        true => Task::Symmetric { pair, labels },
        false => Task::Directed(Task::toward(pair, labels, config.negatives)),
    };
    contrast::run(engine, sets, &task, &shares, config, dtype)
}
