//! InfoNCE and its gradient, in memory proportional to the number of tokens.
//!
//! Two twins compute one result: [`fused`] on the CPU, [`portable`] out of candle operations on every device.

mod fused;
mod portable;

use candle_core::{DType, Tensor};

use super::{ContrastiveOutput, InfoNce, Negatives};
use crate::Result;

/// Distinct token sets, known by their place: a tensor that plays several parts is entered once and has one gradient.
#[derive(Default)]
pub(super) struct Sets(Vec<Tensor>);

impl Sets {
    /// The place of `x` (…, D), whose rows are its tokens; enters it if it is new.
    pub(super) fn enter(&mut self, x: &Tensor) -> usize {
        match self.0.iter().position(|known| known.id() == x.id()) {
            Some(place) => place,
            None => {
                self.0.push(x.clone());
                self.0.len() - 1
            }
        }
    }
}

/// Who plays which part in one direction: places, and the groups of their rows.
pub(super) struct Roles<'a> {
    pub(super) anchors: (usize, &'a [u32]),
    pub(super) positives: usize,
    pub(super) candidates: Vec<(usize, &'a [u32])>,
}

/// What is contrasted with what.
pub(super) enum Task<'a> {
    Directed(Roles<'a>),
    /// The mean of both directions between two sets whose rows correspond and share their groups.
    Symmetric {
        sets: [usize; 2],
        groups: &'a [u32],
        form: Negatives,
    },
}

impl<'a> Task<'a> {
    /// One direction between two sets whose rows correspond.
    pub(super) fn toward(
        [anchors, positives]: [usize; 2],
        groups: &'a [u32],
        form: Negatives,
    ) -> Roles<'a> {
        let candidates = match form {
            Negatives::BothViews => vec![(anchors, groups), (positives, groups)],
            Negatives::OtherView => vec![(positives, groups)],
        };
        Roles {
            anchors: (anchors, groups),
            positives,
            candidates,
        }
    }

    fn anchors(&self) -> &'a [u32] {
        match self {
            Self::Directed(roles) => roles.anchors.1,
            Self::Symmetric { groups, .. } => groups,
        }
    }
}

/// By how much a positive must be the more similar one: cosines of equal tokens that two kernels make differ by rounding,
/// and a collapsed encoder must not pass for one that matches.
fn lead(width: usize, dtype: DType) -> f64 {
    let epsilon = match dtype {
        DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON),
    };
    8.0 * epsilon * (width as f64).sqrt()
}

/// Which twin computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Twin {
    Fused,
    Portable,
}

impl Twin {
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
    twin: Twin,
    sets: Sets,
    task: &Task,
    shares: &[f64],
    config: &InfoNce,
    dtype: DType,
) -> Result<ContrastiveOutput> {
    debug_assert_eq!(task.anchors().len(), shares.len());
    let engine = match twin {
        Twin::Fused => fused::run,
        Twin::Portable => portable::run,
    };
    Ok(engine(sets, task, shares, config, dtype)?)
}
