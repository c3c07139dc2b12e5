//! The contrast out of candle operations, for any device. Tests compare the fused engine with it.

use candle_core::{DType, Device, Result, Tensor};

use super::task::{Roles, Sets, Task, margin};
use crate::loss::contrastive::{Contrastive, ContrastiveOutput};

pub(super) fn run(
    sets: Sets,
    task: &Task,
    shares: &[f64],
    config: &Contrastive,
    dtype: DType,
) -> Result<ContrastiveOutput> {
    let bank = Bank::new(sets, config.eps, dtype)?;
    let ContrastiveOutput { loss, accuracy } = match task {
        Task::Directed(roles) => directed(&bank, roles, shares, config)?,
        &Task::Symmetric { pair: [a, b], labels } => {
            let halves: Vec<f64> = shares.iter().map(|share| 0.5 * share).collect();
            let direction = |pair| {
                let roles = Task::toward(pair, labels, config.negatives);
                directed(&bank, &roles, &halves, config)
            };
            let (one, two) = (direction([a, b])?, direction([b, a])?);
            ContrastiveOutput {
                loss: (one.loss + two.loss)?,
                accuracy: (one.accuracy + two.accuracy)?,
            }
        }
    };
    Ok(ContrastiveOutput { loss: bank.inject(loss)?, accuracy })
}

/// The value and accuracy of one direction, detached; its gradient is added to the bank.
fn directed(
    bank: &Bank,
    roles: &Roles,
    shares: &[f64],
    config: &Contrastive,
) -> Result<ContrastiveOutput> {
    let (anchors, labels) = (bank.rows(roles.anchors.0), roles.anchors.1);
    let positives = bank.rows(roles.positives);
    let (dtype, device, rows) = (anchors.dtype(), anchors.device(), labels.len());
    let rate = 1.0 / config.temperature;
    // Cast on the host: not every device knows f64.
    let shares = Tensor::from_slice(shares, (rows, 1), &Device::Cpu)?;
    let shares = shares.to_dtype(dtype)?.to_device(device)?;
    let margin = margin(anchors.dim(1)?, dtype);
    let hidden = Tensor::full(f32::NEG_INFINITY, (1, 1), device)?.to_dtype(dtype)?;
    let columns = |labels: &[u32]| Tensor::from_slice(labels, (1, labels.len()), device);
    let candidates: Vec<(usize, Tensor)> = roles
        .candidates
        .iter()
        .map(|&(i, labels)| Ok((i, columns(labels)?)))
        .collect::<Result<_>>()?;
    let width: usize = roles.candidates.iter().map(|(_, labels)| labels.len()).sum();
    let block = (config.block_bytes / (width * dtype.size_in_bytes())).clamp(1, rows);

    let mut loss = Tensor::zeros((), dtype, device)?;
    let mut accuracy = loss.clone();
    for start in (0..rows).step_by(block) {
        let len = block.min(rows - start);
        let anchor = anchors.narrow(0, start, len)?;
        let positive = positives.narrow(0, start, len)?;
        let share = shares.narrow(0, start, len)?;
        let own = Tensor::from_slice(&labels[start..start + len], (len, 1), device)?;

        let paired = (&anchor * &positive)?.sum_keepdim(1)?;
        let mut cosines = Vec::with_capacity(candidates.len());
        let mut nearest = hidden.broadcast_as((len, 1))?;
        for (i, cols) in &candidates {
            let s = anchor.matmul(&bank.rows(*i).t()?)?;
            let s = own.broadcast_ne(cols)?.where_cond(&s, &hidden.broadcast_as(s.shape())?)?;
            nearest = nearest.maximum(&s.max_keepdim(1)?)?;
            cosines.push(s);
        }

        // Log-sum-exp with the largest exponent taken out: some term is 1, and none is above.
        let top = paired.maximum(&nearest)?;
        let mut negatives = share.zeros_like()?;
        let mut exps = Vec::with_capacity(cosines.len());
        for s in cosines {
            let e = (s.broadcast_sub(&top)? * rate)?.exp()?;
            negatives = (negatives + e.sum_keepdim(1)?)?;
            exps.push(e);
        }
        let total = (((&paired - &top)? * rate)?.exp()? + &negatives)?;
        let each = (((&top - &paired)? * rate)? + total.log()?)?;
        loss = (loss + (each * &share)?.sum_all()?)?;
        let matched = paired.gt(&(nearest + margin)?)?.to_dtype(dtype)?;
        accuracy = (accuracy + (matched * &share)?.sum_all()?)?;

        // dL/ds of a candidate is scale·e, of the positive −scale·Σe over its negatives.
        let scale = (share / (total * config.temperature)?)?;
        let pull = (&scale * negatives)?.neg()?;
        if bank.is_live(roles.anchors.0) {
            let mut push = anchor.zeros_like()?;
            for (e, (i, _)) in exps.iter().zip(&candidates) {
                push = (push + e.matmul(bank.rows(*i))?)?;
            }
            let grad = (push.broadcast_mul(&scale)? + positive.broadcast_mul(&pull)?)?;
            bank.accumulate(roles.anchors.0, start, &grad)?;
        }
        bank.accumulate(roles.positives, start, &anchor.broadcast_mul(&pull)?)?;
        let scaled = anchor.broadcast_mul(&scale)?;
        for (e, (i, _)) in exps.iter().zip(&candidates) {
            if bank.is_live(*i) {
                bank.accumulate(*i, 0, &e.t()?.matmul(&scaled)?)?;
            }
        }
    }
    Ok(ContrastiveOutput { loss, accuracy })
}

/// Unit tokens `û = x / √(|x|² + eps)` of one tensor, outside the graph, and the gradient with respect to them.
struct Unit {
    source: Tensor,
    rows: Tensor,
    norm: Tensor,
    grad: Option<Tensor>,
}

struct Bank(Vec<Unit>);

impl Bank {
    fn new(sets: Sets, eps: f64, dtype: DType) -> Result<Self> {
        let units = sets.0.into_iter().map(|source| {
            let width = source.dims().last().copied().unwrap_or(1);
            let values = source.detach().to_dtype(dtype)?.reshape(((), width))?;
            let norm = (values.sqr()?.sum_keepdim(1)? + eps)?.sqrt()?;
            // A norm that overflows is no number, so that its token does not pass for zero.
            let norm = (&norm + (&norm * 0.0)?)?;
            let rows = values.broadcast_div(&norm)?;
            let grad = source.track_op().then(|| rows.zeros_like()).transpose()?;
            Ok(Unit { source, rows, norm, grad })
        });
        Ok(Self(units.collect::<Result<_>>()?))
    }

    /// The unit tokens (M, D).
    fn rows(&self, i: usize) -> &Tensor {
        &self.0[i].rows
    }

    /// Whether a gradient is wanted.
    fn is_live(&self, i: usize) -> bool {
        self.0[i].grad.is_some()
    }

    /// Adds to the gradient of the rows from `start` on, if one is wanted.
    fn accumulate(&self, i: usize, start: usize, delta: &Tensor) -> Result<()> {
        let Some(grad) = &self.0[i].grad else {
            return Ok(());
        };
        let sum = (grad.narrow(0, start, delta.dim(0)?)? + delta)?;
        grad.slice_set(&sum, 0, start)
    }

    /// `value` as a node of the graph whose gradient with respect to each source is the one collected here.
    ///
    /// With the gradient `g` of `x` known, `⟨x, g⟩` with `g` held fixed has just that gradient, on every device. Its own
    /// value, which is nearly 0 since the cosine does not see the length of `x`, is taken out again.
    fn inject(self, value: Tensor) -> Result<Tensor> {
        let mut carrier: Option<Tensor> = None;
        for Unit { source, rows, norm, grad } in self.0 {
            let Some(grad) = grad else { continue };
            // dû/dx = (I − û ûᵀ) / √(|x|² + eps)
            let radial = (&rows * &grad)?.sum_keepdim(1)?;
            let grad = (grad - rows.broadcast_mul(&radial)?)?.broadcast_div(&norm)?;
            let n = grad.elem_count();
            let x = source.to_dtype(grad.dtype())?.reshape((1, n))?;
            let dot = x.matmul(&grad.reshape((n, 1))?)?.reshape(())?;
            carrier = Some(match carrier {
                Some(sum) => (sum + dot)?,
                None => dot,
            });
        }
        match carrier {
            Some(carrier) => &carrier + (value - carrier.detach())?,
            None => Ok(value),
        }
    }
}
