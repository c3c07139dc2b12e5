//! Clipping and freezing of gradients, between the backward pass and the optimizer.

use anyhow::{Result, ensure};
use candle_core::{DType, Storage, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;

use super::settings::Optimizer;

/// Shrinks all gradients of `named` by one factor so that their joint L2 norm is `max_norm` at most; gives the norm that
/// they had.
///
/// # Errors
/// If a gradient is not finite: the names of the first few, and nothing is changed.
pub fn clip(named: &[(String, Var)], grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    shrink(named, grads, max_norm, |_, joint| joint)
}

/// The same for the gradient of each parameter by itself; gives the joint norm that they had.
///
/// # Errors
/// As [`clip`].
pub fn clip_each(named: &[(String, Var)], grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    shrink(named, grads, max_norm, |own, _| own)
}

/// Shrinks each gradient by the factor that brings `measured`, of its own norm and the joint one, down to `max_norm`.
fn shrink(
    named: &[(String, Var)],
    grads: &mut GradStore,
    max_norm: f64,
    measured: fn(f64, f64) -> f64,
) -> Result<f64> {
    ensure!(max_norm > 0.0, "expected a positive norm to clip gradients to, got {max_norm}");
    let present: Vec<_> =
        named.iter().filter_map(|(name, var)| Some((name, var, grads.get(var)?))).collect();
    let squares = square_norms(present.iter().map(|(_, _, grad)| *grad))?;
    let bad = present.iter().zip(&squares).filter(|(_, s)| !s.is_finite());
    let bad: Vec<&str> = bad.map(|((name, ..), _)| name.as_str()).take(5).collect();
    ensure!(bad.is_empty(), "expected finite gradients, got others at: {}", bad.join(", "));
    let joint = squares.iter().sum::<f64>().sqrt();
    let mut clipped = Vec::new();
    for ((_, var, grad), square) in present.iter().zip(&squares) {
        let norm = measured(square.sqrt(), joint);
        if norm > max_norm {
            // Not in place: two parameters may share one gradient tensor. Detached, since a gradient from candle may hang on
            // the graph.
            clipped.push((*var, (grad.detach() * (max_norm / norm))?));
        }
    }
    for (var, grad) in clipped {
        grads.insert(var, grad);
    }
    Ok(joint)
}

/// [`clip`] or [`clip_each`] where there is a bound; gives the joint norm then.
pub fn clip_to(
    rule: &Optimizer,
    named: &[(String, Var)],
    grads: &mut GradStore,
) -> Result<Option<f64>> {
    let clip = if rule.clip_each { clip_each } else { clip };
    rule.clip.map(|most| clip(named, grads, most)).transpose()
}

/// Takes the gradients of the parameters whose names begin with `prefix` out, so that the optimizer leaves those alone:
/// DINO keeps its prototypes fixed in the first epoch.
pub fn freeze(named: &[(String, Var)], grads: &mut GradStore, prefix: &str) -> Result<()> {
    let mut frozen = named.iter().filter(|(name, _)| name.starts_with(prefix)).peekable();
    ensure!(
        frozen.peek().is_some(),
        "expected parameters whose names begin with {prefix}, got none"
    );
    frozen.for_each(|(_, var)| {
        grads.remove(var);
    });
    Ok(())
}

/// Squared L2 norms, summed in `f64` on the CPU; other devices sum in `f32` and are asked once for all.
fn square_norms<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> candle_core::Result<Vec<f64>> {
    let (mut norms, mut waiting) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let place = norms.len();
        norms.push(0.0);
        if tensor.device().is_cpu() {
            norms[place] = square_norm_on_cpu(tensor)?;
        } else {
            let square = tensor.to_dtype(DType::F32)?.sqr()?.sum_all()?;
            waiting.push((place, square));
        }
    }
    if !waiting.is_empty() {
        let (places, squares): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
        for (place, square) in places.into_iter().zip(Tensor::stack(&squares, 0)?.to_vec1::<f32>()?)
        {
            norms[place] = f64::from(square);
        }
    }
    Ok(norms)
}

fn square_norm_on_cpu(tensor: &Tensor) -> candle_core::Result<f64> {
    if tensor.dtype() == DType::F32 {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        if let (Storage::Cpu(storage), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        {
            // Pieces of a fixed size, summed in order: the result does not depend on the number of threads.
            let pieces = storage.as_slice::<f32>()?[start..end].par_chunks(1 << 14);
            return Ok(pieces.map(square_sum).collect::<Vec<_>>().iter().sum());
        }
    }
    tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}

/// Several running sums: one alone would wait for each addition.
fn square_sum(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0f64; 8];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    let rest = rest.iter().map(|&v| f64::from(v) * f64::from(v));
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}
