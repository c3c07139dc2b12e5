//! InfoNCE of any anchors, positives and candidates, in memory proportional to the number of tokens.

use candle_core::Tensor;

use super::rows::{self, Groups};
use super::unit::Bank;
use super::{check_eps, check_pair, check_peer, shares, work_dtype};
use crate::{Error, Result};

/// Tokens (M, D) and the group each belongs to: an anchor sees no candidate of its own group.
///
/// Groups are labels, in any order and number. Image ids keep tokens of one image from repelling each other.
#[derive(Clone, Copy, Debug)]
pub struct TokenSet<'a> {
    /// Tokens (M, D), of any length: only their direction counts.
    pub tokens: &'a Tensor,
    /// One group per token, `M` of them.
    pub groups: &'a [u32],
}

/// The numbers of [`info_nce`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InfoNce {
    /// Temperature τ that divides the cosines; finite and above 0.
    pub temperature: f64,
    /// Added to the squared norm inside the root of the cosine; finite and at least 0. With 0 a zero token gives NaN.
    pub eps: f64,
    /// Bytes of similarities held at a time. Changes memory and speed, not the result beyond rounding.
    pub block_bytes: usize,
}

impl Default for InfoNce {
    /// τ = 0.3, eps = 1e-6, 16 MiB.
    fn default() -> Self {
        Self {
            temperature: 0.3,
            eps: 1e-6,
            block_bytes: 16 << 20,
        }
    }
}

impl InfoNce {
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::config(
                "temperature",
                "a finite value above 0",
                self.temperature,
            ));
        }
        if self.block_bytes == 0 {
            return Err(Error::config("block_bytes", "at least 1 byte", 0));
        }
        check_eps(self.eps)
    }
}

/// What a contrastive loss returns: two scalars, f32 (f64 for f64 tokens).
#[derive(Clone, Debug)]
pub struct Contrast {
    /// The loss, differentiable once with respect to every token set.
    pub loss: Tensor,
    /// Share of anchors whose positive is more similar than every negative, weighted as the loss; detached.
    pub accuracy: Tensor,
}

/// InfoNCE: each anchor against its positive and against the candidates of other groups.
///
/// ```text
/// L = Σ_i w_i ℓ_i / Σ_i w_i,   ℓ_i = −log( e^{s(a_i,p_i)} / ( e^{s(a_i,p_i)} + Σ_{c: g_c ≠ g_i} e^{s(a_i,c)} ) ),   s(a,b) = cos(a,b)/τ
/// ```
///
/// `anchors` and `positives` are (M, D), row by row; `candidates` any number of sets (M_k, D); `weights` one per anchor,
/// or `None` for the plain mean. A positive counts once, whether or not it is among the candidates, as long as it carries
/// its anchor's group there. Gradients reach every tensor that has one; detach what should get none, and the work for it
/// is saved. The gradient is found together with the value, so `backward` is cheap and second derivatives do not exist.
///
/// Time: three products of M×D by D×ΣM_k. Memory: a few copies of the tokens and `block_bytes`, never M×M.
///
/// Tokens gathered from other processes are plain tensors here. A process that takes the anchors of all of them, its own
/// live and the others' detached, finds for its own tokens the gradient of one process holding the whole batch.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use ser_reg::loss::{InfoNce, TokenSet, info_nce};
/// let q = Var::randn(0f32, 1., (6, 8), &Device::Cpu)?; // 3 images of 2 tokens
/// let k = Tensor::randn(0f32, 1., (6, 8), &Device::Cpu)?;
/// let images = [0, 0, 1, 1, 2, 2];
/// let anchors = TokenSet { tokens: &q, groups: &images };
/// let keys = TokenSet { tokens: &k, groups: &images };
/// let out = info_nce(anchors, &k, &[keys], None, &InfoNce::default())?;
/// assert!(out.loss.backward()?.get(&q).is_some());
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the temperature, `eps` or `block_bytes` is out of range; if a tensor is empty, not of rank 2, not of a floating
/// point type, or differs in width, type or device from the anchors; if groups or weights do not count as many as their
/// tokens; if there is no candidate, or no weight above 0.
pub fn info_nce(
    anchors: TokenSet,
    positives: &Tensor,
    candidates: &[TokenSet],
    weights: Option<&[f32]>,
    config: &InfoNce,
) -> Result<Contrast> {
    let op = "info_nce";
    config.check()?;
    check_set(op, anchors, anchors.tokens)?;
    check_pair(op, anchors.tokens, positives)?;
    if candidates.is_empty() {
        return Err(Error::input(op, "at least one set of candidates", "none"));
    }
    for set in candidates {
        check_set(op, *set, anchors.tokens)?;
    }
    let shares = shares(op, weights, anchors.groups.len())?;

    let mut bank = Bank::new(config.eps);
    let roles = Roles {
        anchors: (bank.enter(op, anchors.tokens)?, anchors.groups),
        positives: bank.enter(op, positives)?,
        candidates: candidates
            .iter()
            .map(|set| Ok((bank.enter(op, set.tokens)?, set.groups)))
            .collect::<Result<_>>()?,
    };
    let Contrast { loss, accuracy } = contrast(&bank, &roles, &shares, config)?;
    Ok(Contrast {
        loss: bank.inject(loss)?,
        accuracy,
    })
}

fn check_set(op: &'static str, set: TokenSet, like: &Tensor) -> Result<()> {
    let (tokens, groups) = (set.tokens, set.groups);
    let width = like.dims().last().copied().unwrap_or(0);
    match tokens.dims() {
        &[m, d] if m > 0 && d > 0 && d == width => {}
        dims => {
            let expected = match like.rank() {
                2 => format!("tokens (M, {width}) with M and the width above 0"),
                _ => "tokens of rank 2, (M, D)".to_string(),
            };
            return Err(Error::input(op, expected, format!("{dims:?}")));
        }
    }
    if groups.len() != tokens.dims()[0] {
        return Err(Error::input(
            op,
            format!("one group per token, {}", tokens.dims()[0]),
            groups.len(),
        ));
    }
    work_dtype(op, tokens)?;
    check_peer(op, like, tokens)
}

/// Who plays which part: places in the bank, and the groups of their rows.
pub(super) struct Roles<'a> {
    pub(super) anchors: (usize, &'a [u32]),
    pub(super) positives: usize,
    pub(super) candidates: Vec<(usize, &'a [u32])>,
}

/// The value and accuracy of one direction, detached; its gradient is added to the bank.
///
/// `shares` weigh the rows as they are: they need not add up to one.
pub(super) fn contrast(
    bank: &Bank,
    roles: &Roles,
    shares: &[f64],
    config: &InfoNce,
) -> Result<Contrast> {
    let (anchors, groups) = (bank.rows(roles.anchors.0), roles.anchors.1);
    let positives = bank.rows(roles.positives);
    let (dtype, device, rows) = (anchors.dtype(), anchors.device(), groups.len());
    let rate = 1.0 / config.temperature;
    let shares = Tensor::from_slice(shares, (rows, 1), device)?.to_dtype(dtype)?;
    let width: usize = roles
        .candidates
        .iter()
        .map(|(_, groups)| groups.len())
        .sum();
    let block = (config.block_bytes / (width * dtype.size_in_bytes())).clamp(1, rows);

    let mut loss = Tensor::zeros((), dtype, device)?;
    let mut accuracy = loss.clone();
    for start in (0..rows).step_by(block) {
        let len = block.min(rows - start);
        let anchor = anchors.narrow(0, start, len)?;
        let positive = positives.narrow(0, start, len)?;
        let share = shares.narrow(0, start, len)?;
        let see = |cols| Groups {
            rows: &groups[start..start + len],
            cols,
        };

        let paired = (&anchor * &positive)?.sum_keepdim(1)?;
        let mut cosines = Vec::with_capacity(roles.candidates.len());
        let mut nearest = Tensor::full(f32::NEG_INFINITY, (len, 1), device)?.to_dtype(dtype)?;
        for &(i, cols) in &roles.candidates {
            let s = anchor.matmul(&bank.rows(i).t()?)?;
            nearest = nearest.maximum(&rows::max(&s, see(cols))?)?;
            cosines.push(s);
        }

        // Log-sum-exp with the largest exponent taken out: some term is 1, and none is above.
        let top = paired.maximum(&nearest)?;
        let mut negatives = share.zeros_like()?;
        let mut exps = Vec::with_capacity(cosines.len());
        for (s, &(_, cols)) in cosines.into_iter().zip(&roles.candidates) {
            let (e, sum) = rows::exp(s, &top, rate, see(cols))?;
            negatives = (negatives + sum)?;
            exps.push(e);
        }
        let total = (((&paired - &top)? * rate)?.exp()? + &negatives)?;
        let each = (((&top - &paired)? * rate)? + total.log()?)?;
        loss = (loss + (each * &share)?.sum_all()?)?;
        accuracy = (accuracy + (paired.gt(&nearest)?.to_dtype(dtype)? * &share)?.sum_all()?)?;

        // dL/ds of a candidate is scale·e, of the positive −scale·Σe over its negatives.
        let scale = (share / (total * config.temperature)?)?;
        let pull = (&scale * negatives)?.neg()?;
        if bank.is_live(roles.anchors.0) {
            let mut push = anchor.zeros_like()?;
            for (e, &(i, _)) in exps.iter().zip(&roles.candidates) {
                push = (push + e.matmul(bank.rows(i))?)?;
            }
            let grad = (push.broadcast_mul(&scale)? + positive.broadcast_mul(&pull)?)?;
            bank.accumulate(roles.anchors.0, start, &grad)?;
        }
        if bank.is_live(roles.positives) {
            bank.accumulate(roles.positives, start, &anchor.broadcast_mul(&pull)?)?;
        }
        let scaled = anchor.broadcast_mul(&scale)?;
        for (e, &(i, _)) in exps.iter().zip(&roles.candidates) {
            if bank.is_live(i) {
                bank.accumulate(i, 0, &e.t()?.matmul(&scaled)?)?;
            }
        }
    }
    Ok(Contrast { loss, accuracy })
}
