//! InfoNCE and its gradient, in memory proportional to the number of tokens.
//!
//! Two engines compute the same result: [`fused`] on the CPU, [`portable`] out of candle operations on every device.

mod fused;
mod portable;

use candle_core::{DType, Tensor};

use super::{Contrastive, ContrastiveOutput, Negatives};
use crate::Result;

/// Distinct token sets, known by their index. A tensor in several roles is entered once and has one gradient.
#[derive(Default)]
pub(super) struct Sets(Vec<Tensor>);

impl Sets {
    /// The index of `x` (…, D), whose rows are its tokens. A new tensor is added.
    pub(super) fn enter(&mut self, x: &Tensor) -> usize {
        match self.0.iter().position(|known| known.id() == x.id()) {
            Some(index) => index,
            None => {
                self.0.push(x.clone());
                self.0.len() - 1
            }
        }
    }
}

/// The sets of one direction by index, with the labels of their rows.
pub(super) struct Roles<'a> {
    pub(super) anchors: (usize, &'a [u32]),
    pub(super) positives: usize,
    pub(super) candidates: Vec<(usize, &'a [u32])>,
}

/// What is contrasted with what.
pub(super) enum Task<'a> {
    Directed(Roles<'a>),
    /// The mean of both directions between two sets whose rows correspond and share their labels.
    Symmetric {
        pair: [usize; 2],
        labels: &'a [u32],
    },
}

impl<'a> Task<'a> {
    /// One direction between two sets whose rows correspond.
    pub(super) fn toward(
        [anchors, positives]: [usize; 2],
        labels: &'a [u32],
        negatives: Negatives,
    ) -> Roles<'a> {
        let candidates = match negatives {
            Negatives::BothViews => vec![(anchors, labels), (positives, labels)],
            Negatives::OtherView => vec![(positives, labels)],
        };
        Roles {
            anchors: (anchors, labels),
            positives,
            candidates,
        }
    }

    fn anchors(&self) -> &'a [u32] {
        match self {
            Self::Directed(roles) => roles.anchors.1,
            Self::Symmetric { labels, .. } => labels,
        }
    }
}

/// The margin by which a positive must beat every negative to count as correct.
///
/// It is larger than the rounding of two kernels, so that a collapsed encoder has accuracy 0.
fn margin(width: usize, dtype: DType) -> f64 {
    let epsilon = match dtype {
        DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON),
    };
    8.0 * epsilon * (width as f64).sqrt()
}

/// The code that computes a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    Fused,
    Portable,
}

impl Engine {
    /// The faster one for tokens like `x`.
    pub(super) fn of(x: &Tensor) -> Self {
        match x.device().is_cpu() {
            true => Self::Fused,
            false => Self::Portable,
        }
    }
}

/// The loss and accuracy of `task`; `shares` weigh its anchors and add up to 1. `dtype` is what it is computed in.
pub(super) fn run(
    engine: Engine,
    sets: Sets,
    task: &Task,
    shares: &[f64],
    config: &Contrastive,
    dtype: DType,
) -> Result<ContrastiveOutput> {
    debug_assert_eq!(task.anchors().len(), shares.len());
    let run = match engine {
        Engine::Fused => fused::run,
        Engine::Portable => portable::run,
    };
    Ok(run(sets, task, shares, config, dtype)?)
}
