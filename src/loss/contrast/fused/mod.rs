//! The contrast on the CPU: blocks of anchors, products into memory that is used again, and one vectorized pass over the
//! cosines. The gradient is found together with the value.

mod bank;
mod block;
mod directed;
mod product;
mod real;
mod symmetric;
mod tile;

use candle_core::{DType, Device, Result, Tensor};

use self::{bank::Bank, block::Value, real::Real};
use super::task::{Sets, Task};
use crate::loss::contrastive::{Contrastive, ContrastiveOutput};

/// In `dtype`, f32 or f64.
pub(super) fn run(
    sets: Sets,
    task: &Task,
    shares: &[f64],
    config: &Contrastive,
    dtype: DType,
) -> Result<ContrastiveOutput> {
    match dtype {
        DType::F64 => typed::<f64>(sets, task, shares, config),
        _ => typed::<f32>(sets, task, shares, config),
    }
}

fn typed<T: Real>(
    sets: Sets,
    task: &Task,
    shares: &[f64],
    config: &Contrastive,
) -> Result<ContrastiveOutput> {
    let mut bank = Bank::<T>::new(sets, config.eps)?;
    let value = match task {
        Task::Directed(roles) => directed::run(&mut bank, roles, shares, config)?,
        &Task::Symmetric { pair, labels } => {
            let halves: Vec<f64> = shares.iter().map(|share| 0.5 * share).collect();
            if symmetric::fits::<T>(config) {
                symmetric::run(&mut bank, pair, labels, &halves, config)?
            } else {
                let mut direction = |pair| {
                    let roles = Task::toward(pair, labels, config.negatives);
                    directed::run(&mut bank, &roles, &halves, config)
                };
                let [a, b] = pair;
                let (one, two) = (direction([a, b])?, direction([b, a])?);
                Value { loss: one.loss + two.loss, accuracy: one.accuracy + two.accuracy }
            }
        }
    };
    Ok(ContrastiveOutput {
        loss: bank.inject(value.loss)?,
        accuracy: Tensor::new(T::from_f64(value.accuracy), &Device::Cpu)?,
    })
}
