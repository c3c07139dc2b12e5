//! What NT-Xent computes, product by product.

use super::{BYTES, Work, at_least_one};
use ser_reg::Result;
use ser_reg::loss::{Negatives, NtXent};

/// What one evaluation of a contrastive loss takes, gradient included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Contrast {
    /// Products of matrices, and the bytes that pass between them and memory.
    pub work: Work,
    /// Exponentials, one for each cosine that is made; not among the multiply–adds.
    pub exponentials: f64,
    /// Bytes that are held until the loss is returned.
    pub memory: Memory,
    /// Bytes of the gradient, which is found with the value and stays until `backward`.
    pub gradient: f64,
}

/// Working memory of one direction, in bytes; none of it grows with the square of the tokens. What a product packs for
/// itself, a few hundred KiB for each thread, is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Copies of all tokens on the unit sphere.
    pub unit_rows: f64,
    /// Cosines of a block of anchors with all candidates: about `block_bytes`.
    pub block: f64,
    /// Tokens of a block, scaled.
    pub scratch: f64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.unit_rows + self.block + self.scratch
    }
}

impl Contrast {
    /// `times` evaluations one after the other: their gradients stay, their memory is used again.
    pub(super) fn times(self, times: f64) -> Self {
        Self {
            work: self.work.times(times),
            exponentials: self.exponentials * times,
            gradient: self.gradient * times,
            memory: self.memory,
        }
    }
}

/// Some tokens, and whether a gradient is wanted for them.
#[derive(Clone, Copy)]
pub(super) struct Tokens {
    pub(super) count: f64,
    pub(super) learns: bool,
}

/// [`ser_reg::loss::info_nce`] of `anchors` against `candidates`; `positives` are as many as the anchors.
///
/// With A anchors, K candidates in all and K' of them that learn, these are the products of `loss/contrast/fused/directed.rs`,
/// in multiply–adds, and those of its portable twin:
///
/// ```text
/// cosines                     A·D·K
/// gradient of the anchors     A·K·D    if they learn
/// gradient of the candidates  K'·A·D
/// ```
pub(super) fn directed(
    anchors: Tokens,
    positives: Tokens,
    candidates: &[Tokens],
    width: f64,
    block_bytes: usize,
) -> Contrast {
    let all: f64 = candidates.iter().map(|c| c.count).sum();
    let learning: f64 = candidates
        .iter()
        .filter(|c| c.learns)
        .map(|c| c.count)
        .sum();
    let asked = if anchors.learns { all } else { 0.0 };
    let rows = block_rows(block_bytes, all, anchors.count);
    let blocks = (anchors.count / rows).ceil();

    // Every block passes over the candidates for each of its products, and over their gradient to add to it.
    let streamed = blocks * width * (all + asked + 3.0 * learning);
    // The cosines are written, read and written as exponentials, and read by each product of the gradient.
    let cells = anchors.count * (3.0 * all + asked + learning);
    let sets = (anchors.count + positives.count) * width;
    let learns = |t: Tokens| if t.learns { t.count } else { 0.0 };
    let gradient = (learns(anchors) + learns(positives)) * width;
    Contrast {
        work: Work {
            macs: anchors.count * width * (all + asked + learning),
            bytes: BYTES * (streamed + cells + 2.0 * sets + 3.0 * gradient),
        },
        exponentials: anchors.count * all,
        memory: Memory {
            unit_rows: BYTES * sets,
            block: BYTES * rows * all,
            scratch: BYTES * rows * width,
        },
        gradient: BYTES * gradient,
    }
}

/// One direction between two sets of tokens.
pub(super) fn toward(
    [anchors, positives]: [Tokens; 2],
    form: Negatives,
    width: f64,
    block_bytes: usize,
) -> Contrast {
    let candidates: &[Tokens] = match form {
        Negatives::BothViews => &[anchors, positives],
        Negatives::OtherView => &[positives],
    };
    directed(anchors, positives, candidates, width, block_bytes)
}

/// What [`ser_reg::loss::nt_xent`] takes for two views of `tokens` tokens of `width` channels on the CPU, in f32, value and
/// gradient; `learns` says which of the views wants one. Multiply–adds, with M tokens and all of them learning:
///
/// | | one direction | both |
/// |---|---|---|
/// | [`Negatives::BothViews`] | 6 M²D | 8 M²D, and a little for squares on the diagonal, less what is found made |
/// | [`Negatives::OtherView`] | 3 M²D | 4 M²D, less what is found made |
///
/// Both directions share one triangle of the symmetric Gram matrix, made twice but for one block of rows; other devices, and temperatures below 0.025,
/// run them one by one at twice the price of one.
///
/// ```
/// use ser_reg::{cost, loss::NtXent};
/// let one = NtXent { symmetric: false, ..Default::default() };
/// let (m, d) = (16 * 196, 512);
/// let cost = cost::nt_xent(m, d, &one, [true, true])?;
/// assert_eq!(cost.work.macs, 6.0 * (m * m * d) as f64);
/// let both = cost::nt_xent(m, d, &NtXent::default(), [true, true])?;
/// assert!(both.work.macs < 1.45 * cost.work.macs);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If a size is 0, or a setting is out of range.
pub fn nt_xent(
    tokens: usize,
    width: usize,
    config: &NtXent,
    learns: [bool; 2],
) -> Result<Contrast> {
    at_least_one("tokens", tokens)?;
    at_least_one("width", width)?;
    let [a, b] = learns.map(|learns| Tokens {
        count: tokens as f64,
        learns,
    });
    let (form, width, block) = (config.form, width as f64, config.block_bytes);
    let one = toward([a, b], form, width, block);
    if !config.symmetric {
        return Ok(one);
    }
    if 2.0 / config.temperature >= 80.0 {
        let other = toward([b, a], form, width, block);
        return Ok(Contrast {
            work: one.work.plus(other.work),
            exponentials: one.exponentials + other.exponentials,
            // Both directions collect one gradient.
            ..one
        });
    }
    Ok(symmetric([a, b], form, width, block))
}

/// Both directions at once, as `loss/contrast/fused/symmetric.rs` goes: rectangles of a block of rows by what has not met
/// them, made for the sums and (but for the last) again for the weights, then a product for the rows' gradient, and one for the columns'
/// unless they are the rows.
fn symmetric([a, b]: [Tokens; 2], form: Negatives, width: f64, block_bytes: usize) -> Contrast {
    let count = a.count;
    let rows = block_rows(block_bytes, count, count);
    let blocks = (count / rows).ceil();
    let last = count - (blocks - 1.0) * rows;
    // Cells of the squares on the diagonal of one side, and of what lies right of them.
    let squares = (blocks - 1.0) * rows * rows + last * last;
    let beyond = (count * count - squares) / 2.0;

    // Cells that are made at all, made again, and multiplied for a gradient.
    let (mut first, mut second, mut products) = (0.0, 0.0, 0.0);
    let mut rectangle = |cells: f64, of_rows: bool, of_cols: Option<bool>| {
        first += cells;
        if of_rows || of_cols.unwrap_or(false) {
            second += cells;
        }
        products += cells * f64::from(u8::from(of_rows) + u8::from(of_cols.unwrap_or(false)));
    };
    rectangle(count * count, a.learns, Some(b.learns));
    if form == Negatives::BothViews {
        for side in [a, b] {
            rectangle(squares, side.learns, None);
            rectangle(beyond, side.learns, Some(side.learns));
        }
    }
    // The second pass begins with the last and largest rectangle of the first, across, and finds it made.
    let held = match a.learns || b.learns {
        true => rows * count,
        false => 0.0,
    };
    let made = first + second - held;
    let sets = 2.0 * count * width;
    let learning = f64::from(u8::from(a.learns) + u8::from(b.learns));
    let gradient = learning * count * width;
    // Columns are passed over once for each block of rows and product; those of a gradient are read and written.
    let streamed = (made + 2.0 * products) * width / rows;
    Contrast {
        work: Work {
            macs: width * (made + products),
            bytes: BYTES * (streamed + first + second + products + 2.0 * sets + 3.0 * gradient),
        },
        exponentials: first + second,
        memory: Memory {
            unit_rows: BYTES * sets,
            block: BYTES * rows * count,
            scratch: 0.0,
        },
        gradient: BYTES * gradient,
    }
}

/// Anchors to a block that may see `columns` tokens.
fn block_rows(block_bytes: usize, columns: f64, anchors: f64) -> f64 {
    (block_bytes as f64 / (columns * BYTES))
        .floor()
        .clamp(1.0, anchors)
}
