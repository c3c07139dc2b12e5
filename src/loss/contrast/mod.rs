//! InfoNCE and its gradient, in memory proportional to the number of tokens.
//!
//! Two engines compute the same result: [`fused`] on the CPU, [`portable`] out of candle operations on every device.

mod fused;
mod portable;
mod task;

use candle_core::{DType, Tensor};

use super::contrastive::{Contrastive, ContrastiveOutput};
use crate::Result;

pub(super) use task::{Roles, Sets, Task};

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
