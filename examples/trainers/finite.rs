//! Whether features and weights are usable numbers. A single NaN would otherwise be scored like any other feature.

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use ser_reg::tap;

use super::vit::Vit;

/// The largest magnitude that is accepted: the sum of many squares is finite, too. Beyond it a normalization returns zeros.
const LARGEST: f32 = 1e15;

/// The number of values of `x` that are NaN, infinite, or of a magnitude above 1e15.
pub fn count(x: &Tensor) -> Result<usize> {
    let values = x.flatten_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    // NaN compares as false.
    let usable = |v: &&f32| v.abs() <= LARGEST;
    let values = values.to_vec1::<f32>()?;
    Ok(values.len() - values.iter().filter(usable).count())
}

/// Fails unless all values of `x` are finite; `what` names them.
pub fn ensure(what: &str, x: &Tensor) -> Result<()> {
    match count(x)? {
        0 => Ok(()),
        bad => bail!("{}", unusable(what, bad, x)),
    }
}

fn unusable(what: &str, bad: usize, x: &Tensor) -> String {
    let all = x.elem_count();
    format!("{what}: expected finite values, got {bad} of {all} that are NaN or above {LARGEST:e}")
}

/// Fails unless all `weights` are finite; names the first one in the order of the forward pass that is not.
pub fn ensure_weights<'a>(weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
    match first_weight(weights, usize::MAX)? {
        None => Ok(()),
        Some((name, bad, weight)) => {
            bail!("{}", unusable(&format!("the weight {name}"), bad, weight))
        }
    }
}

/// The first weight in the order of the forward pass, up to block `last`, that is not finite, and the number of its
/// values that are not.
fn first_weight<'a>(
    weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    last: usize,
) -> Result<Option<(&'a str, usize, &'a Tensor)>> {
    let mut weights: Vec<(&str, &Tensor)> = weights.into_iter().collect();
    weights.retain(|(name, _)| place(name).0 <= last);
    weights.sort_by_key(|(name, _)| (place(name), *name));
    for (name, weight) in weights {
        let bad = count(weight)?;
        if bad > 0 {
            return Ok(Some((name, bad, weight)));
        }
    }
    Ok(None)
}

/// Features `(n, d)` of images. As [`encode`], and it also fails if the features come from a value that is not finite: the
/// last normalization makes zeros of a value that is too large.
pub fn features<'a>(
    vit: &Vit,
    weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    x: &Tensor,
) -> Result<Tensor> {
    let last = format!("block{}", vit.config().depth);
    let features = encode(vit, weights, x, |x| {
        let (features, map) = tap::capture(&last, || vit.forward(x))?;
        // The tokens are sums over all blocks, so what was too large in one of them is too large here.
        Tensor::cat(&[features, map.narrow(1, 0, 1)?.squeeze(1)?], 0)
    })?;
    Ok(features.narrow(0, 0, x.dim(0)?)?)
}

/// Encodes images by `forward`, a function of `vit`, and fails if the result is not finite.
///
/// # Errors
/// Names the layer of `vit` in which the first value that is not finite appears. `weights` are those of the encoder, by the
/// names that [`Vit::new`] asks for.
pub fn encode<'a>(
    vit: &Vit,
    weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    x: &Tensor,
    forward: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let features = forward(x)?;
    match count(&features)? {
        0 => Ok(features),
        bad => bail!("{}. {}", unusable("features", bad, &features), origin(vit, weights, x)?),
    }
}

/// A sentence on where the first value that is not finite appears when `vit` encodes `x`.
fn origin<'a>(
    vit: &Vit,
    weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    x: &Tensor,
) -> Result<String> {
    let bad = count(x)?;
    if bad > 0 {
        let all = x.elem_count();
        return Ok(format!("The normalized images have {bad} of {all} such values already"));
    }
    let depth = vit.config().depth;
    let names: Vec<String> = (1..=depth).map(|i| format!("block{i}")).collect();
    let (_, maps) = tap::capture_all(&names, || vit.forward(x))?;
    let mut first = None;
    for (block, map) in (1..).zip(&maps) {
        if count(map)? > 0 {
            first = Some(block);
            break;
        }
    }
    // A weight can do harm only in the block that shows it or in one before.
    if let Some((name, bad, weight)) = first_weight(weights, first.unwrap_or(usize::MAX))? {
        let all = weight.elem_count();
        return Ok(format!("The first are {bad} of the {all} values of the weight {name}"));
    }
    let place = match first {
        Some(block) => format!("the output of block {block}"),
        None => "the last normalization".to_string(),
    };
    Ok(format!("The first appear in {place}, although the weights up to there are finite"))
}

/// The place of a weight in the forward pass: 0 before the blocks, the number of its block, the largest number after them;
/// and its place there.
fn place(name: &str) -> (usize, usize) {
    const LAYERS: [&str; 9] =
        ["patch", "positions", "cls", "norm1", "qkv", "out", "norm2", "up", "down"];
    let name = name.strip_prefix("encoder.").unwrap_or(name);
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    let block = first.strip_prefix("block").and_then(|number| number.parse().ok());
    let layer = block.map_or(first, |_| rest.split('.').next().unwrap_or(""));
    match (block, LAYERS.iter().position(|known| *known == layer)) {
        (Some(block), within) => (block, within.unwrap_or(LAYERS.len())),
        (None, Some(within)) => (0, within),
        (None, None) => (usize::MAX, 0),
    }
}
