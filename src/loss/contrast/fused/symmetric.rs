//! Both directions between two sets at once.
//!
//! Against the fixed top 1 the exponentials of the cosines are symmetric, e_ij = e_ji, so one triangle of them serves both
//! directions: a first pass sums rows and columns, a second makes the cosines anew (but for the last ones, which still lie
//! there) and weighs each once for both,
//!
//! ```text
//! ∂L/∂s_ij + ∂L/∂s_ji = (c_i + c_j)·e_ij,   c_i = w_i / (τ Z_i)
//! ```
//!
//! With the 2M tokens of both sides that is ½ + ½ + 1 products of 2M×D by D×2M; one direction alone takes three of M×D by
//! D×2M. So both cost 4/3 of one, and a block's cosines less.

use std::ops::Range;

use candle_core::Result;

use crate::loss::contrast::task::margin;
use crate::loss::contrastive::{Contrastive, Negatives};

use super::bank::{Bank, dot};
use super::block::{Value, block_rows};
use super::product::{PANEL, add_product, add_transposed_product, gram, panels};
use super::real::Real;
use super::tile::{self, Labels, Margins};

/// Whether the fixed top leaves the least exponential, `e^(−2/τ)`, a normal number.
pub(super) fn fits<T: Real>(config: &Contrastive) -> bool {
    2.0 / config.temperature < T::LOWEST_EXPONENT
}

/// Tokens `range` of side 0 or 1.
#[derive(Clone, PartialEq)]
struct Part {
    side: usize,
    range: Range<usize>,
}

impl Part {
    /// Where they lie in the rows of their side.
    fn span(&self, width: usize) -> Range<usize> {
        self.range.start * width..self.range.end * width
    }
}

/// Cosines to look at: each pair of tokens lies in one rectangle, except that a square of tokens with themselves, being
/// symmetric, holds both (i, j) and (j, i).
struct Rectangle {
    rows: Part,
    cols: Part,
}

impl Rectangle {
    fn cosines(&self) -> usize {
        self.rows.range.len() * self.cols.range.len()
    }

    /// Of tokens of one side.
    fn is_within(&self) -> bool {
        self.rows.side == self.cols.side
    }

    fn is_square(&self) -> bool {
        self.rows == self.cols
    }
}

/// `len` rows at a time, the upper triangle over both sides or what lies between them; the largest last.
fn rectangles(count: usize, len: usize, negatives: Negatives) -> Vec<Rectangle> {
    let part = |side, range| Part { side, range };
    let mut all = Vec::new();
    for start in (0..count).step_by(len) {
        let range = start..count.min(start + len);
        for side in [0, 1] {
            let square = part(side, range.clone());
            let later = part(side, range.end..count);
            let across = part(1, 0..count);
            let seen = match (negatives, side) {
                (Negatives::BothViews, 0) => vec![square, later, across],
                (Negatives::BothViews, _) => vec![square, later],
                (Negatives::OtherView, 0) => vec![across],
                (Negatives::OtherView, _) => vec![],
            };
            all.extend(
                seen.into_iter()
                    .filter(|cols| !cols.range.is_empty())
                    .map(|cols| Rectangle { rows: part(side, range.clone()), cols }),
            );
        }
    }
    all.sort_by_key(|rectangle| (rectangle.cosines(), !rectangle.is_within()));
    all
}

/// What is known of a token as an anchor.
struct Anchor {
    /// Cosine with its positive.
    paired: f64,
    /// Sum of `exp((s − 1)/τ)` over its negatives, and the largest `s` among them.
    negatives: f64,
    nearest: f64,
}

/// The weights of an anchor's gradient.
struct Weights<T> {
    /// `c` of each anchor, for its negatives.
    scale: Vec<T>,
    /// For its positive.
    pull: Vec<f64>,
}

/// The value of both directions; their gradient is added to the bank. `shares` weigh the anchors of each.
pub(super) fn run<T: Real>(
    bank: &mut Bank<T>,
    sets: [usize; 2],
    labels: &[u32],
    shares: &[f64],
    config: &Contrastive,
) -> Result<Value> {
    let (width, count) = (bank.width, labels.len());
    let rate = 1.0 / config.temperature;
    let len = block_rows::<T>(config, count, count);
    let rectangles = rectangles(count, len, config.negatives);
    let mut cosines = vec![T::zero(); len * count];
    // Which rectangle's cosines lie there: the second pass goes backwards and finds the last and largest one's made.
    let mut kept = None;

    let mut anchors = [0, 1].map(|_| anchors(bank, sets));
    for (i, rectangle) in rectangles.iter().enumerate() {
        kept = Some(i);
        let Rectangle { rows, cols } = rectangle;
        let (row_labels, col_labels) = (&labels[rows.range.clone()], &labels[cols.range.clone()]);
        let block = &mut cosines[..rows.range.len() * cols.range.len()];
        let a = &bank.rows[sets[rows.side]][rows.span(width)];
        let b = &bank.rows[sets[cols.side]][cols.span(width)];
        let margins = gram(a, b, width, block, |first, tile| {
            let cols = &col_labels[first..col_labels.len().min(first + PANEL)];
            let labels = Labels { rows: row_labels, cols };
            tile::margins(tile, T::from_f64(rate), labels)
        });
        for (panel, Margins { by_row, by_col }) in margins.iter().enumerate() {
            accumulate(&mut anchors[rows.side][rows.range.start..], by_row);
            if !rectangle.is_square() {
                let first = cols.range.start + panel * PANEL;
                accumulate(&mut anchors[cols.side][first..], by_col);
            }
        }
    }

    let mut value = Value::default();
    let margin = margin(width, T::DTYPE);
    let weights = anchors.map(|anchors| weights::<T>(&anchors, shares, rate, margin, &mut value));
    let live = sets.map(|set| bank.is_live(set));
    for (i, rectangle) in rectangles.iter().enumerate().rev() {
        let Rectangle { rows, cols } = rectangle;
        if !(live[rows.side] || live[cols.side]) {
            continue;
        }
        let (row_labels, col_labels) = (&labels[rows.range.clone()], &labels[cols.range.clone()]);
        let block = &mut cosines[..rows.range.len() * cols.range.len()];
        let a = &bank.rows[sets[rows.side]][rows.span(width)];
        let b = &bank.rows[sets[cols.side]][cols.span(width)];
        let (of_rows, of_cols) = (&weights[rows.side], &weights[cols.side]);
        let weigh = |first: usize, tile: &mut [T]| {
            let cols_seen = &col_labels[first..col_labels.len().min(first + PANEL)];
            let labels = Labels { rows: row_labels, cols: cols_seen };
            let first = cols.range.start + first;
            let end = first + cols_seen.len();
            let (r, c) = (&of_rows.scale[rows.range.clone()], &of_cols.scale[first..end]);
            tile::weigh(tile, T::from_f64(rate), labels, r, c);
        };
        match kept.take() == Some(i) {
            true => panels(block, rows.range.len(), weigh),
            false => drop(gram(a, b, width, block, weigh)),
        }
        if let Some(grad) = &mut bank.grads[sets[rows.side]] {
            add_product(block, b, width, &mut grad[rows.span(width)]);
        }
        if let Some(grad) = &mut bank.grads[sets[cols.side]]
            && !rectangle.is_square()
        {
            add_transposed_product(block, a, width, &mut grad[cols.span(width)]);
        }
    }
    // The pulls of the positives come last: they are much larger than the pushes, and a sum that holds one rounds every
    // later push to its size.
    let pulls = weights[0].pull.iter().zip(&weights[1].pull).map(|(a, b)| T::from_f64(a + b));
    let pulls: Vec<T> = pulls.collect();
    for (own, other) in [(sets[0], sets[1]), (sets[1], sets[0])] {
        let Some(grad) = &mut bank.grads[own] else {
            continue;
        };
        let pairs = grad.chunks_exact_mut(width).zip(bank.rows[other].chunks_exact(width));
        for ((grad, p), &pull) in pairs.zip(&pulls) {
            grad.iter_mut().zip(p).for_each(|(g, &p)| *g += pull * p);
        }
    }
    Ok(value)
}

/// The anchors of one side, before any negative was seen.
fn anchors<T: Real>(bank: &Bank<T>, sets: [usize; 2]) -> Vec<Anchor> {
    let [a, b] = sets.map(|set| bank.rows[set].chunks_exact(bank.width));
    a.zip(b)
        .map(|(a, b)| Anchor {
            paired: dot(a, b).widen(),
            negatives: 0.0,
            nearest: f64::NEG_INFINITY,
        })
        .collect()
}

fn accumulate<T: Real>(anchors: &mut [Anchor], seen: &[(T, T)]) {
    for (anchor, (sum, max)) in anchors.iter_mut().zip(seen) {
        anchor.negatives += sum.widen();
        anchor.nearest = anchor.nearest.max(max.widen());
    }
}

fn weights<T: Real>(
    anchors: &[Anchor],
    shares: &[f64],
    rate: f64,
    margin: f64,
    value: &mut Value,
) -> Weights<T> {
    let weigh = |(anchor, share): (&Anchor, &f64)| {
        let positive = ((anchor.paired - 1.0) * rate).exp();
        value.loss += share * (anchor.negatives / positive).ln_1p();
        if anchor.paired > anchor.nearest + margin {
            value.accuracy += share;
        }
        let scale = share * rate / (positive + anchor.negatives);
        (T::from_f64(scale), -scale * anchor.negatives)
    };
    let (scale, pull) = anchors.iter().zip(shares).map(weigh).unzip();
    Weights { scale, pull }
}
