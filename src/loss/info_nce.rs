//! InfoNCE of any anchors, positives and candidates, in memory proportional to the number of tokens.

use candle_core::Tensor;

use super::contrast::{self, Roles, Sets, Task, Twin};
use super::{check_eps, check_pair, check_peer, shares, work_dtype};
use crate::{Error, Result};

/// Tokens (M, D) and the group each belongs to: an anchor sees no candidate of its own group.
///
/// Groups are labels, in any order and number. Image ids keep tokens of one image from repelling each other.
#[derive(Clone, Copy, Debug)]
pub struct TokenSet<'a> {
    /// Tokens (M, D): only their direction counts, as long as the squared length is well above `eps` and finite.
    pub tokens: &'a Tensor,
    /// One label per token, `M` of them.
    pub labels: &'a [u32],
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
    /// τ = 0.3, eps = 1e-6, 12 MiB.
    fn default() -> Self {
        Self {
            temperature: 0.3,
            eps: 1e-6,
            block_bytes: 12 << 20,
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
        check_eps("eps", self.eps)
    }
}

/// What a contrastive loss returns: two scalars, f32 (f64 for f64 tokens).
#[derive(Clone, Debug)]
pub struct ContrastiveOutput {
    /// The loss, differentiable once with respect to every token set.
    pub loss: Tensor,
    /// Share of anchors whose positive is more similar than every negative by more than rounding, weighted as the loss;
    /// detached. 0 where all tokens are equal.
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
/// let anchors = TokenSet { tokens: &q, labels: &images };
/// let keys = TokenSet { tokens: &k, labels: &images };
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
) -> Result<ContrastiveOutput> {
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
    let shares = shares(op, weights, anchors.labels.len())?;

    let mut sets = Sets::default();
    let roles = Roles {
        anchors: (sets.enter(anchors.tokens), anchors.labels),
        positives: sets.enter(positives),
        candidates: candidates
            .iter()
            .map(|set| (sets.enter(set.tokens), set.labels))
            .collect(),
    };
    let dtype = work_dtype(op, anchors.tokens)?;
    let twin = Twin::of(anchors.tokens);
    contrast::run(twin, sets, &Task::Directed(roles), &shares, config, dtype)
}

fn check_set(op: &'static str, set: TokenSet, like: &Tensor) -> Result<()> {
    let (tokens, labels) = (set.tokens, set.labels);
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
    if labels.len() != tokens.dims()[0] {
        return Err(Error::input(
            op,
            format!("one label per token, {}", tokens.dims()[0]),
            labels.len(),
        ));
    }
    work_dtype(op, tokens)?;
    check_peer(op, like, tokens)
}
