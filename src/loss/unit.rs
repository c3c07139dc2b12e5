//! Token sets on the unit sphere, with the gradient that collects on them.

use candle_core::{Result, Tensor};

use super::work_dtype;

/// Unit tokens `û = x / √(|x|² + eps)` of one tensor, outside the graph, and the gradient with respect to them.
struct Unit {
    source: Tensor,
    rows: Tensor,
    norm: Tensor,
    grad: Option<Tensor>,
}

/// The distinct token sets of a loss. One tensor that plays several parts is normalised once and has one gradient.
pub(super) struct Bank {
    units: Vec<Unit>,
    eps: f64,
}

impl Bank {
    pub(super) fn new(eps: f64) -> Self {
        Self {
            units: Vec::new(),
            eps,
        }
    }

    /// The place of `x` (M, D) in the bank; enters it if it is new.
    pub(super) fn enter(&mut self, op: &'static str, x: &Tensor) -> crate::Result<usize> {
        if let Some(i) = self.units.iter().position(|u| u.source.id() == x.id()) {
            return Ok(i);
        }
        let values = x.detach().to_dtype(work_dtype(op, x)?)?;
        let norm = (values.sqr()?.sum_keepdim(1)? + self.eps)?.sqrt()?;
        let rows = values.broadcast_div(&norm)?;
        let grad = x.track_op().then(|| rows.zeros_like()).transpose()?;
        self.units.push(Unit {
            source: x.clone(),
            rows,
            norm,
            grad,
        });
        Ok(self.units.len() - 1)
    }

    /// The unit tokens (M, D).
    pub(super) fn rows(&self, i: usize) -> &Tensor {
        &self.units[i].rows
    }

    /// Whether a gradient is wanted.
    pub(super) fn is_live(&self, i: usize) -> bool {
        self.units[i].grad.is_some()
    }

    /// Adds to the gradient of the rows from `start` on, if one is wanted.
    pub(super) fn accumulate(&self, i: usize, start: usize, delta: &Tensor) -> Result<()> {
        // Some rows at a time, so that the sum is still in the cache when it is written back.
        const STEP: usize = 64;
        let Some(grad) = &self.units[i].grad else {
            return Ok(());
        };
        let rows = delta.dim(0)?;
        for first in (0..rows).step_by(STEP) {
            let len = STEP.min(rows - first);
            let sum = (grad.narrow(0, start + first, len)? + delta.narrow(0, first, len)?)?;
            grad.slice_set(&sum, 0, start + first)?;
        }
        Ok(())
    }

    /// `value` as a node of the graph whose gradient with respect to each source is the one collected here.
    ///
    /// With the gradient `g` of `x` known, `⟨x, g⟩` with `g` held fixed has just that gradient, on every device. Its own
    /// value, which is nearly 0 since the cosine does not see the length of `x`, is taken out again.
    pub(super) fn inject(self, value: Tensor) -> Result<Tensor> {
        let mut carrier: Option<Tensor> = None;
        for Unit {
            source,
            rows,
            norm,
            grad,
        } in self.units
        {
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    #[test]
    fn only_tokens_of_a_graph_collect_a_gradient() -> crate::Result<()> {
        let x = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
        let mut bank = Bank::new(0.0);
        let live = bank.enter("test", &x)?;
        let fixed = bank.enter("test", &x.detach())?;
        assert!(bank.is_live(live) && !bank.is_live(fixed));
        assert_eq!(bank.enter("test", &x)?, live, "one tensor has one place");
        Ok(())
    }
}
