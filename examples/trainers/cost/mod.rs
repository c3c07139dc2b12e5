//! What the regularizer costs, counted before anything runs: multiply–adds, bytes moved, bytes held.
//!
//! **One MAC is one multiply–add is two FLOP.** Everything here counts MACs, says so in its name, and has `flops()` beside
//! it; papers that give a ViT-S/16 "4.6 GFLOPs" count MACs as well. Counted are products of matrices and resampling; norms,
//! activations and exponentials are linear in what they act on and left out, except that [`Contrast`] gives the number of its
//! exponentials. All is for one process and one training step.
//!
//! # What is counted
//!
//! With B images to a process, a fraction r of them, `n₂ = round(r·B)`, in the equivariant part, N tokens to an image, C
//! channels tapped, H and D the widths of the projector, `M = n₂·N` and P processes:
//!
//! | part | MACs | grows |
//! |---|---|---|
//! | base: encoder | B · (3·views + key views) · encoder | with the batch |
//! | base: heads, loss | B · (3·views · heads + key views · key heads) + loss | with the batch |
//! | [`projector`](Cost::projector) | M · (C·H + H·D), once for each map and again twice if it learns | linearly |
//! | [`alignment`](Cost::alignment) | M · D · taps a direction, again if the keys learn | linearly |
//! | [`geometry`](Cost::geometry) | 2 · n₂ · pixels · taps | linearly |
//! | [`contrast`](Cost::contrast) | products of M×D by D×M', see below | **quadratically** |
//!
//! The backward pass of a linear map is two products of the size of the forward one. That of the equivariance loss runs
//! through the encoder together with that of the base loss, and the images of the equivariant part are images of the batch,
//! so neither costs anything of its own. One direction of the contrast makes the cosines of its anchors with all candidates,
//! then one more product for the anchors' gradient, and one for each candidate set with a gradient:
//!
//! | MACs of one direction | both sides learn | keys of a momentum encoder |
//! |---|---|---|
//! | [`Negatives::BothViews`]: candidates of both views | 6 M²D | 5 M²D |
//! | [`Negatives::OtherView`]: of the other view | 3 M²D | 2 M²D |
//!
//! [`SerLoss`](ser_reg::SerLoss) has another pair of token sets in the frame of each view, so both directions are twice one; two
//! sets that are compared both ways share their cosines: [`nt_xent`].
//!
//! # Two counts
//!
//! [`Regularizer::authors`] is what the paper (arXiv 2603.06693) counts when it says 1.008×: the authors' code gathers the
//! tokens of all processes, on each of which it then compares all with all, across views, both directions with three products
//! each, and sends maps of both encoders through one trained head. [`Regularizer::default`] is what this crate executes:
//! tokens of the own process, whatever [`SerConfig`] says.
//!
//! ```
//! use ser_reg_trainers::cost::{Regularizer, Training};
//! let training = Training::paper()?; // MoCo-v3, ViT-S/16, 8 processes with 256 images each
//! let cost = Regularizer::authors(0.01).cost(&training)?;
//! assert_eq!(format!("{:.3}x", cost.overhead()), "1.008x");
//! // Quadratic: a fraction ten times as large costs seventy times as much.
//! let cost = Regularizer::authors(0.1).cost(&training)?;
//! assert_eq!(format!("{:.2}x", cost.overhead()), "1.54x");
//! // This crate, whose processes do not gather, at a fraction of 0.01 again.
//! let cost = Regularizer::default().cost(&training)?;
//! assert_eq!(format!("{:.4}x", cost.overhead()), "1.0004x");
//! println!("{:.2e} FLOP, {:.0} MiB", cost.regularizer_flops(), cost.contrast.memory.total() / 1048576.0);
//! # Ok::<(), ser_reg::Error>(())
//! ```

mod contrast;
mod encoder;

pub use contrast::{Contrast, Memory, nt_xent};
pub use encoder::Vit;

use contrast::{Tokens, directed, toward};
use ser_reg::loss::{Negatives, SameImage};
use ser_reg::projector::ProjectorConfig;
use ser_reg::ser::{Objective, SerConfig, StopGradient};
use ser_reg::{Error, Partition, Result};

/// Bytes of a value: f32, in which half precision is worked on too.
const BYTES: f64 = 4.0;

/// Products, and what they move.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Multiply–adds; exact as long as they are below 2⁵³.
    pub macs: f64,
    /// Bytes to and from memory in f32, if each operation reads its operands and writes its result once, a product of one
    /// block of anchors being an operation: what a cache holds from one to the next is not taken off.
    pub bytes: f64,
}

impl Work {
    /// Floating-point operations: two for each multiply–add.
    pub fn flops(&self) -> f64 {
        2.0 * self.macs
    }

    fn times(self, times: f64) -> Self {
        Self {
            macs: self.macs * times,
            bytes: self.bytes * times,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            macs: self.macs + other.macs,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// A training step of the base method, on one process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// MACs of one forward pass of the encoder for one image: [`Vit::macs`], or any other count.
    pub encoder_macs: f64,
    /// MACs of the trained heads for one view of one image, forward.
    pub head_macs: f64,
    /// MACs of the momentum encoder's heads for one view of one image.
    pub key_head_macs: f64,
    /// MACs of the base loss a step, forward and backward.
    pub loss_macs: f64,
    /// Images to a process, B.
    pub batch: usize,
    /// Processes, P, each with such a batch.
    pub processes: usize,
    /// Views of an image that pass forward and backward: three times the encoder each.
    pub views: usize,
    /// Views that pass forward through a momentum encoder; 0 without one.
    pub key_views: usize,
}

impl Training {
    /// The paper's: MoCo-v3 (arXiv 2104.02057) with ViT-S/16 at 224 pixels, 8 processes of 256 images, heads of 4096
    /// hidden channels, two views through both encoders.
    ///
    /// # Errors
    /// None: the sizes fit.
    pub fn paper() -> Result<Self> {
        let projector = mlp_macs(&[384, 4096, 4096, 256]);
        Ok(Self {
            encoder_macs: Vit::s16().macs()?,
            head_macs: projector + mlp_macs(&[256, 4096, 256]),
            key_head_macs: projector,
            // 256 queries against 2048 keys, cosines and their gradient, for either view.
            loss_macs: 2.0 * 2.0 * 256.0 * 2048.0 * 256.0,
            batch: 256,
            processes: 8,
            views: 2,
            key_views: 2,
        })
    }

    fn check(&self) -> Result<()> {
        at_least_one("Training::batch", self.batch)?;
        at_least_one("Training::processes", self.processes)?;
        at_least_one("Training::views", self.views)?;
        for (field, macs, least) in [
            ("Training::encoder_macs", self.encoder_macs, 1.0),
            ("Training::head_macs", self.head_macs, 0.0),
            ("Training::key_head_macs", self.key_head_macs, 0.0),
            ("Training::loss_macs", self.loss_macs, 0.0),
        ] {
            if !(macs.is_finite() && macs >= least) {
                let expected = format!("a finite number of multiply–adds, at least {least}");
                return Err(Error::config(field, expected, macs));
            }
        }
        Ok(())
    }
}

/// MACs of linear maps one after the other: the sum of the products of neighboring widths.
///
/// ```
/// assert_eq!(ser_reg_trainers::cost::mlp_macs(&[384, 512, 512]), 458_752.0);
/// ```
pub fn mlp_macs(widths: &[usize]) -> f64 {
    widths
        .iter()
        .zip(widths.iter().skip(1))
        .map(|(&a, &b)| a as f64 * b as f64)
        .sum()
}

/// Where the keys come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keys {
    /// From the trained encoder, [`SerLoss::forward`](ser_reg::SerLoss::forward): two maps, each anchor once and key once.
    Trained,
    /// From a momentum encoder and the momentum copy of the projector,
    /// [`SerLoss::forward_with_keys`](ser_reg::SerLoss::forward_with_keys): two more maps, forward only.
    #[default]
    Momentum,
    /// From a momentum encoder through the trained projector, which learns from them, as the authors' code is built. This
    /// crate does not: keys have no gradient.
    SharedHead,
}

/// What becomes of the tokens of other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gather {
    /// Nothing: each process has a loss of its own, as [`SerLoss`](ser_reg::SerLoss).
    #[default]
    Own,
    /// They are candidates for the own anchors and get no gradient here: [`loss::info_nce`](ser_reg::loss::info_nce).
    Candidates,
    /// Each process compares all with all, as the authors' code: M is P times as large, on every process.
    All,
}

/// The regularizer beside a training step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regularizer {
    /// Fraction r of the batch in the equivariant part, cut off by [`Partition`].
    pub fraction: f64,
    /// Tokens of an image's grid, N. Scaled views have more or fewer, and crops drop some: take the mean.
    pub tokens: usize,
    /// Channels of the tapped map, C.
    pub channels: usize,
    /// The loss: projector, objective, form, directions, stop-gradient, cap on tokens, bytes of a block. With λ = 0 only the
    /// views are left.
    pub ser: SerConfig,
    /// Where the keys come from.
    pub keys: Keys,
    /// What becomes of the tokens of other processes.
    pub gather: Gather,
    /// MACs of resampling for each token value that comes out: 0 for quarter turns and flips, which move values only; for
    /// scales and crops 8 with a bicubic filter (4 in either axis), 4 with a bilinear one, rows + columns of the source
    /// with Fourier's; for rotations and shears 16 and 4.
    pub token_taps: usize,
    /// The same for each pixel value.
    pub image_taps: usize,
    /// Values of an image, channels × height × width, that views are made from; 0 leaves that out.
    pub pixels: usize,
}

impl Default for Regularizer {
    /// The paper's sizes as this crate runs them: ViT-S/16, a hundredth of the batch, [`SerConfig::default`], momentum keys,
    /// each process by itself.
    fn default() -> Self {
        Self {
            fraction: 0.01,
            tokens: 196,
            channels: 384,
            ser: SerConfig::default(),
            keys: Keys::default(),
            gather: Gather::default(),
            token_taps: 8,
            image_taps: 8,
            pixels: 3 * 224 * 224,
        }
    }
}

impl Regularizer {
    /// The paper's sizes as its authors' code counts: see the [module](self).
    pub fn authors(fraction: f64) -> Self {
        Self {
            fraction,
            ser: SerConfig {
                objective: Objective::NtXent {
                    form: Negatives::OtherView,
                    same_image: SameImage::Exclude,
                },
                ..Default::default()
            },
            keys: Keys::SharedHead,
            gather: Gather::All,
            ..Default::default()
        }
    }

    /// What it adds to `training`, and beside what.
    ///
    /// # Errors
    /// If a size is 0, the fraction is outside `[0, 1]` or leaves fewer than two images, or a setting of the loss is out of
    /// its range.
    pub fn cost(&self, training: &Training) -> Result<Cost> {
        training.check()?;
        at_least_one("Regularizer::tokens", self.tokens)?;
        at_least_one("Regularizer::channels", self.channels)?;
        if let Some(head) = &self.ser.projector {
            at_least_one("ProjectorConfig::hidden", head.hidden)?;
            at_least_one("ProjectorConfig::out", head.out)?;
        }
        let images = Partition::new(training.batch, self.fraction)?.equivariant();
        let images = images.len() as f64;
        let on = self.ser.lambda > 0.0;
        let off = |work| if on { work } else { Work::default() };

        let projected = images * self.tokens as f64;
        let anchors = match self.ser.max_tokens {
            Some(most) => projected.min(most as f64),
            None => projected,
        };
        let batch = training.batch as f64;
        let (views, key_views) = (training.views as f64, training.key_views as f64);
        let heads = 3.0 * views * training.head_macs + key_views * training.key_head_macs;
        Ok(Cost {
            encoder_macs: batch * (3.0 * views + key_views) * training.encoder_macs,
            head_macs: batch * heads + training.loss_macs,
            projector: off(self.projector(projected)),
            alignment: off(self.alignment(projected)),
            geometry: resampled(2.0 * images * self.pixels as f64, self.image_taps),
            contrast: match on {
                true => self.contrast(anchors, training.processes as f64),
                false => Contrast::default(),
            },
            projected,
            anchors,
            tokens: self.tokens as f64,
            is_quadratic: on && matches!(self.ser.objective, Objective::NtXent { .. }),
        })
    }

    fn directions(&self) -> f64 {
        if self.ser.symmetric { 2.0 } else { 1.0 }
    }

    /// Whether anchors and keys want a gradient.
    fn learning(&self) -> [bool; 2] {
        let stop = self.ser.stop_gradient;
        let keys = self.keys != Keys::Momentum && stop != StopGradient::Keys;
        [stop != StopGradient::Anchors, keys]
    }

    fn width(&self) -> usize {
        self.ser.projector.map_or(self.channels, |head| head.out)
    }

    /// Forward for every map, backward for those that learn.
    fn projector(&self, tokens: f64) -> Work {
        let Some(ProjectorConfig { hidden, out, norm }) = self.ser.projector else {
            return Work::default();
        };
        let [anchors, keys] = self
            .learning()
            .map(|l| if l { self.directions() } else { 0.0 });
        let (maps, learning) = match self.keys {
            // A map that is anchor in one direction and key in the other is projected once.
            Keys::Trained => (2.0, (anchors + keys).min(2.0)),
            Keys::Momentum | Keys::SharedHead => (4.0, anchors + keys),
        };
        let (c, h, d) = (self.channels as f64, hidden as f64, out as f64);
        let norm = if norm { 2.0 * c } else { 0.0 };
        // Norm, linear map, GELU, linear map: each reads and writes.
        let values = tokens * (norm + (c + h) + 2.0 * h + (h + d)) + c * h + h * d;
        let once = Work {
            macs: tokens * mlp_macs(&[self.channels, hidden, out]),
            bytes: BYTES * values,
        };
        once.times(maps + 2.0 * learning)
    }

    /// The keys of each direction, carried into the frame of the anchors; the adjoint on the way back.
    fn alignment(&self, tokens: f64) -> Work {
        let [_, keys] = self.learning();
        let passes = if keys { 2.0 } else { 1.0 };
        resampled(tokens * self.width() as f64, self.token_taps).times(passes * self.directions())
    }

    fn contrast(&self, anchors: f64, processes: f64) -> Contrast {
        let width = self.width() as f64;
        let [own, others] = match self.gather {
            Gather::Own => [anchors, 0.0],
            Gather::Candidates => [anchors, anchors * (processes - 1.0)],
            Gather::All => [anchors * processes, 0.0],
        };
        let [a, k] = self.learning().map(|learns| Tokens { count: own, learns });
        let Objective::NtXent { form, .. } = self.ser.objective else {
            return regression([a, k], width).times(self.directions());
        };
        let block = self.ser.block_bytes;
        let one = match others {
            0.0 => toward([a, k], form, width, block),
            _ => {
                let foreign = Tokens {
                    count: others,
                    learns: false,
                };
                match form {
                    Negatives::BothViews => directed(a, k, &[a, foreign, k, foreign], width, block),
                    Negatives::OtherView => directed(a, k, &[k, foreign], width, block),
                }
            }
        };
        one.times(self.directions())
    }
}

/// A loss of pairs: one multiply–add for each value, and one more for each side that learns.
fn regression(sides: [Tokens; 2], width: f64) -> Contrast {
    let learning = sides
        .iter()
        .filter(|t| t.learns)
        .map(|t| t.count)
        .sum::<f64>()
        * width;
    let values = sides[0].count * width;
    Contrast {
        work: Work {
            macs: values + learning,
            bytes: BYTES * (2.0 * values + 3.0 * learning),
        },
        gradient: BYTES * learning,
        ..Default::default()
    }
}

/// So many values read, combined by `taps` multiply–adds each, and written.
fn resampled(values: f64, taps: usize) -> Work {
    Work {
        macs: values * taps as f64,
        bytes: BYTES * 2.0 * values,
    }
}

fn at_least_one(field: &'static str, size: usize) -> Result<()> {
    match size {
        0 => Err(Error::config(field, "a size of at least 1", 0)),
        _ => Ok(()),
    }
}

/// The cost of one training step on one process: [`Regularizer::cost`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// The base method's encoder passes.
    pub encoder_macs: f64,
    /// The base method's heads and loss.
    pub head_macs: f64,
    /// The head between map and loss.
    pub projector: Work,
    /// Keys carried into the frame of the anchors.
    pub alignment: Work,
    /// Views of the equivariant part's images.
    pub geometry: Work,
    /// The objective, gradient included.
    pub contrast: Contrast,
    /// Tokens of one map of the equivariant part, `n₂·N`.
    pub projected: f64,
    /// Those of them that the loss has as anchors in each direction, M: all, or as many as the cap allows.
    pub anchors: f64,
    tokens: f64,
    is_quadratic: bool,
}

impl Cost {
    /// Multiply–adds of the base method alone.
    pub fn base_macs(&self) -> f64 {
        self.encoder_macs + self.head_macs
    }

    /// Multiply–adds that the regularizer adds.
    pub fn regularizer_macs(&self) -> f64 {
        self.linear_macs() + self.contrast.work.macs
    }

    /// Those of them that grow linearly with the tokens, whatever the objective.
    fn linear_macs(&self) -> f64 {
        self.projector.macs + self.alignment.macs + self.geometry.macs
    }

    /// Floating-point operations that the regularizer adds: two for each multiply–add.
    pub fn regularizer_flops(&self) -> f64 {
        2.0 * self.regularizer_macs()
    }

    /// Bytes that the regularizer moves to and from memory.
    pub fn regularizer_bytes(&self) -> f64 {
        let parts = [
            self.projector,
            self.alignment,
            self.geometry,
            self.contrast.work,
        ];
        parts.iter().map(|work| work.bytes).sum()
    }

    /// `(base + regularizer) / base`, in multiply–adds: 1.008 in the paper.
    pub fn overhead(&self) -> f64 {
        1.0 + self.regularizer_macs() / self.base_macs()
    }

    /// Images in the equivariant part of a process above which the contrast takes more multiply–adds than projector,
    /// alignment and views together; `None` for a loss that is not quadratic. A cap on tokens is not looked at.
    ///
    /// Where contrast is `k·M²` and the rest `p·M`, that is `M = p/k`.
    pub fn images_until_contrast_leads(&self) -> Option<f64> {
        Some(self.linear_macs() / self.projected / self.square()? / self.tokens)
    }

    /// Images in the equivariant part of a process above which the contrast takes more multiply–adds than the whole base
    /// method; `None` for a loss that is not quadratic. The batch is left as it is, so the result may exceed it.
    ///
    /// Where contrast is `k·M²`, that is `M = √(base/k)`.
    pub fn images_until_contrast_doubles(&self) -> Option<f64> {
        Some((self.base_macs() / self.square()?).sqrt() / self.tokens)
    }

    /// `k` where contrast is `k·M²`.
    fn square(&self) -> Option<f64> {
        let square = self.contrast.work.macs / (self.anchors * self.anchors);
        self.is_quadratic.then_some(square).filter(|k| *k > 0.0)
    }
}
