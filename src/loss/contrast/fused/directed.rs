//! One direction: any anchors, positives and candidates.
//!
//! All cosines of a block of anchors are kept at once, so the weights of its gradient are known before it is left:
//! three products of M×D by D×ΣM_k, the least without a second look at the cosines.

use candle_core::Result;
use rayon::prelude::*;

use crate::loss::contrast::task::{Roles, margin};
use crate::loss::contrastive::Contrastive;

use super::bank::{Bank, dot};
use super::block::{Value, block_rows};
use super::product::{PANEL, add_product, add_transposed_product, gram};
use super::real::Real;
use super::tile::{self, Labels, larger};

/// What a row needs for its gradient.
struct Row<T> {
    /// dL/ds of a candidate is `scale·e`,
    scale: T,
    /// of the positive this.
    pull: T,
}

/// The value of one direction; its gradient is added to the bank.
pub(super) fn run<T: Real>(
    bank: &mut Bank<T>,
    roles: &Roles,
    shares: &[f64],
    config: &Contrastive,
) -> Result<Value> {
    let width = bank.width;
    let (anchors, labels) = roles.anchors;
    let rate = 1.0 / config.temperature;
    let columns: usize = roles.candidates.iter().map(|(_, labels)| labels.len()).sum();
    let block_rows = block_rows::<T>(config, columns, labels.len());
    let mut block = vec![T::zero(); block_rows * columns];
    let mut scratch = vec![T::zero(); block_rows * width];
    let margin = margin(width, T::DTYPE);
    let learns = bank.grads.iter().any(Option::is_some);

    let mut value = Value::default();
    for start in (0..labels.len()).step_by(block_rows) {
        let len = block_rows.min(labels.len() - start);
        let own = &labels[start..start + len];
        let span = start * width..(start + len) * width;
        let anchor = &bank.rows[anchors][span.clone()];
        let positive = &bank.rows[roles.positives][span.clone()];

        let paired: Vec<T> = anchor
            .chunks_exact(width)
            .zip(positive.chunks_exact(width))
            .map(|(a, p)| dot(a, p))
            .collect();
        let mut nearest = vec![T::neg_infinity(); len];
        for (block, &(set, cols)) in segments(&mut block, len, roles).zip(&roles.candidates) {
            let tops = gram(anchor, &bank.rows[set], width, block, |first, tile| {
                let cols = &cols[first..cols.len().min(first + PANEL)];
                tile::max(tile, Labels { rows: own, cols })
            });
            for top in tops {
                nearest.iter_mut().zip(top).for_each(|(n, t)| *n = larger(*n, t));
            }
        }

        // Log-sum-exp with the largest exponent taken out: some term is 1, and none is above.
        let top: Vec<T> = paired.iter().zip(&nearest).map(|(p, n)| larger(*p, *n)).collect();
        let mut negatives = vec![0.0; len];
        for (block, &(_, cols)) in segments(&mut block, len, roles).zip(&roles.candidates) {
            let sums: Vec<Vec<T>> = block
                .par_chunks_mut(len * PANEL)
                .zip(cols.par_chunks(PANEL))
                .map(|(tile, cols)| {
                    tile::exp(tile, &top, T::from_f64(rate), Labels { rows: own, cols })
                })
                .collect();
            for sum in sums {
                negatives.iter_mut().zip(sum).for_each(|(n, s)| *n += s.widen());
            }
        }
        let rows: Vec<Row<T>> = (0..len)
            .map(|i| {
                let share = shares[start + i];
                let below = (top[i].widen() - paired[i].widen()) * rate;
                let total = (-below).exp() + negatives[i];
                value.loss += share * (below + total.ln());
                if paired[i].widen() > nearest[i].widen() + margin {
                    value.accuracy += share;
                }
                let scale = share * rate / total;
                Row { scale: T::from_f64(scale), pull: T::from_f64(-scale * negatives[i]) }
            })
            .collect();
        if !learns {
            continue;
        }

        let scratch = &mut scratch[..len * width];
        if bank.is_live(anchors) {
            scratch.fill(T::zero());
            for (block, &(set, _)) in segments(&mut block, len, roles).zip(&roles.candidates) {
                add_product(block, &bank.rows[set], width, scratch);
            }
            let positive = &bank.rows[roles.positives][span.clone()];
            if let Some(grad) = &mut bank.grads[anchors] {
                let pushes = scratch.chunks_exact(width).zip(positive.chunks_exact(width));
                for ((grad, (push, p)), row) in
                    grad[span.clone()].chunks_exact_mut(width).zip(pushes).zip(&rows)
                {
                    for ((g, &push), &p) in grad.iter_mut().zip(push).zip(p) {
                        *g += row.scale * push + row.pull * p;
                    }
                }
            }
        }
        let anchor = &bank.rows[anchors][span.clone()];
        if let Some(grad) = &mut bank.grads[roles.positives] {
            let pairs = grad[span].chunks_exact_mut(width).zip(anchor.chunks_exact(width));
            for ((grad, a), row) in pairs.zip(&rows) {
                grad.iter_mut().zip(a).for_each(|(g, &a)| *g += row.pull * a);
            }
        }
        let scaled = scratch.chunks_exact_mut(width).zip(anchor.chunks_exact(width));
        for ((scaled, a), row) in scaled.zip(&rows) {
            scaled.iter_mut().zip(a).for_each(|(s, &a)| *s = row.scale * a);
        }
        for (block, &(set, _)) in segments(&mut block, len, roles).zip(&roles.candidates) {
            if let Some(grad) = &mut bank.grads[set] {
                add_transposed_product(block, scratch, width, grad);
            }
        }
    }
    Ok(value)
}

/// The parts of a block of `len` anchors, one per candidate set.
fn segments<'a, T>(
    mut block: &'a mut [T],
    len: usize,
    roles: &Roles,
) -> impl Iterator<Item = &'a mut [T]> {
    roles.candidates.iter().map(move |(_, labels)| {
        let (segment, rest) = std::mem::take(&mut block).split_at_mut(len * labels.len());
        block = rest;
        segment
    })
}
