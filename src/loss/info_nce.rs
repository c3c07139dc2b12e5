//! InfoNCE of any anchors, positives and candidates, in memory proportional to the number of tokens.

use candle_core::Tensor;

use super::contrast::{self, Engine, Roles, Sets, Task};
use super::{Contrastive, ContrastiveOutput, check_pair, check_peer, shares, work_dtype};
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

/// InfoNCE: each anchor against its positive and against the candidates of other groups.
///
/// ```text
/// L = Σ_i w_i ℓ_i / Σ_i w_i,   ℓ_i = −log( e^{s(a_i,p_i)} / ( e^{s(a_i,p_i)} + Σ_{c: g_c ≠ g_i} e^{s(a_i,c)} ) ),   s(a,b) = cos(a,b)/τ
/// ```
///
/// `anchors` and `positives` are (M, D), row by row; `candidates` any number of sets (M_k, D); `weights` one per anchor,
/// or `None` for the plain mean. A positive counts once, whether or not it is among the candidates, as long as it carries
/// its anchor's group there. Gradients reach every tensor that has one; detach what should get none, and the work for it
/// is saved. An anchor of weight 0 takes no part, whatever it holds; a NaN in any other token makes the loss NaN. The
/// gradient is found together with the value, so `backward` is cheap and second derivatives do not exist.
///
/// Time: three products of M×D by D×ΣM_k. Memory: a few copies of the tokens and `block_bytes`, never M×M.
///
/// Tokens gathered from other processes are plain tensors here. A process that takes the anchors of all of them, its own
/// live and the others' detached, finds for its own tokens the gradient of one process holding the whole batch.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use ser_reg::loss::{Contrastive, TokenSet, info_nce};
/// let q = Var::randn(0f32, 1., (6, 8), &Device::Cpu)?; // 3 images of 2 tokens
/// let k = Tensor::randn(0f32, 1., (6, 8), &Device::Cpu)?;
/// let images = [0, 0, 1, 1, 2, 2];
/// let anchors = TokenSet { tokens: &q, labels: &images };
/// let keys = TokenSet { tokens: &k, labels: &images };
/// let out = info_nce(anchors, &k, &[keys], None, &Contrastive::default())?;
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
    config: &Contrastive,
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

    // An anchor of weight 0 is left out and not multiplied by 0, which a NaN survives.
    let kept: Vec<u32> = (0..shares.len() as u32).filter(|&i| shares[i as usize] > 0.0).collect();
    let counted = |x: &Tensor| match kept.len() == shares.len() {
        true => Ok(x.clone()),
        false => x.index_select(&Tensor::new(kept.as_slice(), x.device())?, 0),
    };
    let (tokens, positives) = (counted(anchors.tokens)?, counted(positives)?);
    let labels: Vec<u32> = kept.iter().map(|&i| anchors.labels[i as usize]).collect();
    let shares: Vec<f64> = kept.iter().map(|&i| shares[i as usize]).collect();

    let mut sets = Sets::default();
    let roles = Roles {
        anchors: (sets.enter(&tokens), &labels),
        positives: sets.enter(&positives),
        candidates: candidates.iter().map(|set| (sets.enter(set.tokens), set.labels)).collect(),
    };
    let dtype = work_dtype(op, anchors.tokens)?;
    let engine = Engine::of(anchors.tokens);
    contrast::run(engine, sets, &Task::Directed(roles), &shares, config, dtype)
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
