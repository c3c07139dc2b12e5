//! NT-Xent over the tokens of two aligned views.

use candle_core::Tensor;

use super::contrast::{self, Sets, Task, Twin};
use super::info_nce::{ContrastiveOutput, InfoNce};
use super::{check_pair, shares, work_dtype};
use crate::{Error, Result};

/// Which tokens an anchor is contrasted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Negatives {
    /// Tokens of both views: the formula of the paper.
    #[default]
    BothViews,
    /// Tokens of the other view only: what the authors' code computes.
    OtherView,
}

/// Whether tokens of the anchor's own image are negatives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SameImage {
    /// They are left out, as in SER: neighboring tokens may look alike without being wrong.
    #[default]
    Exclude,
    /// They are negatives, all but the anchor itself and its positive.
    Keep,
}

/// The settings of [`nt_xent`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NtXent {
    /// Which views the negatives come from.
    pub form: Negatives,
    /// Whether tokens of the anchor's own image are negatives.
    pub same_image: SameImage,
    /// `½(L(z, z') + L(z', z))` instead of `L(z, z')`.
    pub symmetric: bool,
    /// Temperature τ that divides the cosines; finite and above 0.
    pub temperature: f64,
    /// Added to the squared norm inside the root of the cosine; finite and at least 0. With 0 a zero token gives NaN.
    pub eps: f64,
    /// Bytes of similarities held at a time. Changes memory and speed, not the result beyond rounding.
    pub block_bytes: usize,
}

impl Default for NtXent {
    /// The paper's form, other images only, both directions, τ = 0.3, eps = 1e-6, 12 MiB.
    fn default() -> Self {
        let InfoNce {
            temperature,
            eps,
            block_bytes,
        } = InfoNce::default();
        Self {
            form: Negatives::default(),
            same_image: SameImage::default(),
            symmetric: true,
            temperature,
            eps,
            block_bytes,
        }
    }
}

/// NT-Xent of `z` and `zp`, (B, N, D) each: token `(i, j)` of `z` belongs with token `(i, j)` of `zp`.
///
/// ```text
/// ℓ_ij = −log e^{s(z_ij,z'_ij)} / ( e^{s(z_ij,z'_ij)} + Σ_{m≠i,n} e^{s(z_ij,z_mn)} + Σ_{m≠i,n} e^{s(z_ij,z'_mn)} )
/// ```
///
/// averaged over all tokens, with `s(a, b) = cos(a, b)/τ` (arXiv 2603.06693). [`Negatives::OtherView`] drops the middle sum,
/// [`SameImage::Keep`] lets the sums run over every token but `(i, j)`. The authors' loss is the mean of two cross-view
/// terms, one in the frame of each view, as `SerLoss` forms it. Gradients reach both sides; detach a side to stop it there.
///
/// With one image and [`SameImage::Exclude`] there are no negatives: the loss and its gradient are 0.
///
/// ```
/// use candle_core::{Device, Var};
/// use ser_reg::loss::{NtXent, nt_xent};
/// let z = Var::randn(0f32, 1., (4, 49, 32), &Device::Cpu)?;
/// let zp = Var::randn(0f32, 1., (4, 49, 32), &Device::Cpu)?;
/// let out = nt_xent(&z, &zp, &NtXent { temperature: 0.2, ..Default::default() })?;
/// let grads = out.loss.backward()?;
/// assert_eq!(grads.get(&z).map(|g| g.dims()), Some(&[4, 49, 32][..]));
/// println!("loss {}, matched {}", out.loss, out.accuracy);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the rank is not 3, the shapes, types or devices differ, a tensor is empty or not of a floating point type, or a
/// setting is out of range.
pub fn nt_xent(z: &Tensor, zp: &Tensor, config: &NtXent) -> Result<ContrastiveOutput> {
    let op = "nt_xent";
    check_pair(op, z, zp)?;
    let &[images, tokens, _] = z.dims() else {
        return Err(Error::input(
            op,
            "tokens of rank 3, (B, N, D) (nt_xent_ragged takes (M, D) and image ids)",
            format!("{:?}", z.dims()),
        ));
    };
    let ids: Vec<u32> = (0..images as u32)
        .flat_map(|image| std::iter::repeat_n(image, tokens))
        .collect();
    pair(op, Twin::of(z), [z, zp], &ids, None, config)
}

/// [`nt_xent`] of flat tokens (M, D): `image_ids[p]` is the image of row `p` of both `z` and `zp`.
///
/// Images may own different numbers of tokens, in any order: what is left after invalid tokens were dropped. `weights`
/// are one per token and weigh the anchors, `None` for the plain mean.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::loss::{NtXent, nt_xent_ragged};
/// let z = Tensor::randn(0f32, 1., (5, 16), &Device::Cpu)?;
/// let zp = Tensor::randn(0f32, 1., (5, 16), &Device::Cpu)?;
/// let out = nt_xent_ragged(&z, &zp, &[0, 0, 0, 1, 1], None, &NtXent::default())?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`nt_xent`], and if ids or weights do not count as many as the tokens, a weight is negative or not finite, or none
/// is above 0.
pub fn nt_xent_ragged(
    z: &Tensor,
    zp: &Tensor,
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &NtXent,
) -> Result<ContrastiveOutput> {
    let op = "nt_xent_ragged";
    check_pair(op, z, zp)?;
    if z.rank() != 2 {
        return Err(Error::input(
            op,
            "tokens of rank 2, (M, D)",
            format!("{:?}", z.dims()),
        ));
    }
    pair(op, Twin::of(z), [z, zp], image_ids, weights, config)
}

/// As [`nt_xent_ragged`], out of plain candle operations only: what other devices run, and the oracle of the fused one.
///
/// # Errors
/// See [`nt_xent_ragged`].
#[doc(hidden)]
pub fn nt_xent_portable(
    z: &Tensor,
    zp: &Tensor,
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &NtXent,
) -> Result<ContrastiveOutput> {
    let op = "nt_xent_portable";
    check_pair(op, z, zp)?;
    if z.rank() == 0 {
        return Err(Error::input(op, "tokens (…, D)", "a scalar"));
    }
    pair(op, Twin::Portable, [z, zp], image_ids, weights, config)
}

fn pair(
    op: &'static str,
    twin: Twin,
    [z, zp]: [&Tensor; 2],
    image_ids: &[u32],
    weights: Option<&[f32]>,
    config: &NtXent,
) -> Result<ContrastiveOutput> {
    let numbers = InfoNce {
        temperature: config.temperature,
        eps: config.eps,
        block_bytes: config.block_bytes,
    };
    numbers.check()?;
    let dtype = work_dtype(op, z)?;
    let count: usize = z.dims()[..z.rank() - 1].iter().product();
    if image_ids.len() != count {
        return Err(Error::input(
            op,
            format!("one image id per token, {count}"),
            image_ids.len(),
        ));
    }
    let shares = shares(op, weights, count)?;
    let each: Vec<u32>;
    let groups = match config.same_image {
        SameImage::Exclude => image_ids,
        SameImage::Keep => {
            each = (0..count as u32).collect();
            &each
        }
    };

    let mut places = Sets::default();
    let sets = [places.enter(z), places.enter(zp)];
    let form = config.form;
    let task = match config.symmetric {
        true => Task::Symmetric { sets, groups, form },
        false => Task::Directed(Task::toward(sets, groups, form)),
    };
    contrast::run(twin, places, &task, &shares, &numbers, dtype)
}
