//! The operator out of plain candle ops: any device, differentiable by candle's own autograd. On the CPU it is the slow
//! twin of the fused op.

use candle_core::{Device, Result, Tensor};

use super::{
    GridOperator,
    step::Step,
    taps::{NONE, Taps},
};

/// Applies `operator` to tokens `(B, N, C)`.
pub(super) fn apply(operator: &GridOperator, x: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    if operator.samples() == 1 {
        return run(&operator.chain(0).steps, x);
    }
    let shared = |k: usize| (0..batch).map(move |b| operator.chain(b).steps.get(k));
    let depth = (0..batch)
        .map(|b| operator.chain(b).steps.len())
        .max()
        .unwrap_or(0);
    let aligned = (0..depth).all(|k| {
        let first = operator.chain(0).steps.get(k);
        shared(k).all(|s| s.zip(first).is_some_and(|(s, f)| same_form(s, f)))
    });
    if aligned {
        let mut x = x.clone();
        for k in 0..depth {
            let steps: Vec<&Step> = shared(k).flatten().collect();
            x = step(&steps, &x)?;
        }
        return Ok(x);
    }
    // Chains that differ in form go one by one: as one matrix each, a separable step would be dense.
    let each = (0..batch).map(|b| run(&operator.chain(b).steps, &x.narrow(0, b, 1)?));
    Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
}

fn run(steps: &[Step], x: &Tensor) -> Result<Tensor> {
    steps.iter().try_fold(x.clone(), |x, s| step(&[s], &x))
}

/// Whether two steps can be one batched operation.
fn same_form(a: &Step, b: &Step) -> bool {
    let middle = |s: &Step| match s {
        Step::Separable { rows, cols } => {
            Some((rows.n_in(), rows.n_out(), cols.n_in(), cols.n_out()))
        }
        _ => None,
    };
    a.n_in() == b.n_in() && a.n_out() == b.n_out() && middle(a) == middle(b)
}

/// One step: one for all samples, or one per sample, of the same form.
fn step(steps: &[&Step], x: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    let separable: Option<Vec<(&Taps, &Taps)>> = steps
        .iter()
        .map(|s| match s {
            Step::Separable { rows, cols } => Some((rows, cols)),
            _ => None,
        })
        .collect();
    if let Some(axes) = separable {
        let (rows, cols) = axes[0];
        let (h, w) = (rows.n_out(), cols.n_out());
        let x = x.reshape((batch, rows.n_in(), cols.n_in() * channels))?;
        let x = gather(&axes.iter().map(|a| a.0).collect::<Vec<_>>(), &x)?;
        let x = x.reshape((batch * h, cols.n_in(), channels))?;
        let per_line = axes
            .iter()
            .flat_map(|a| std::iter::repeat_n(a.1, if axes.len() == 1 { 1 } else { h }));
        return gather(&per_line.collect::<Vec<_>>(), &x)?.reshape((batch, h * w, channels));
    }
    let taps: Vec<Taps> = steps.iter().map(|s| s.matrix()).collect();
    gather(&taps.iter().collect::<Vec<_>>(), x)
}

/// `out[b, i, :] = Σ_k w[b, i, k] · x[b, index[b, i, k], :]`, one `index_select` per `k`.
fn gather(taps: &[&Taps], x: &Tensor) -> Result<Tensor> {
    let (batch, n_in, width) = x.dims3()?;
    let n_out = taps[0].n_out();
    let depth = taps
        .iter()
        .flat_map(|t| t.rows().map(<[_]>::len))
        .max()
        .unwrap_or(0);
    let flat = x.contiguous()?.reshape((batch * n_in, width))?;
    let mut sum: Option<Tensor> = None;
    for k in 0..depth.max(1) {
        let (mut indices, mut weights) = (Vec::new(), Vec::new());
        for b in 0..batch {
            for row in taps[if taps.len() == 1 { 0 } else { b }].rows() {
                let &(j, w) = row.get(k).unwrap_or(&(0, 0.0));
                indices.push((b * n_in) as u32 + j);
                weights.push(w);
            }
        }
        let exact = weights.iter().all(|&w| w == 1.0);
        let indices = Tensor::from_vec(indices, batch * n_out, x.device())?;
        let mut term = flat.index_select(&indices, 0)?;
        if !exact {
            // Cast on the host: not every device knows f64.
            let weights = Tensor::from_vec(weights, (batch * n_out, 1), &Device::Cpu)?;
            let weights = weights.to_dtype(x.dtype())?.to_device(x.device())?;
            term = term.broadcast_mul(&weights)?;
        }
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    match sum {
        Some(sum) => sum.reshape((batch, n_out, width)),
        None => Tensor::zeros((batch, n_out, width), x.dtype(), x.device()),
    }
}

impl Step {
    /// The step as a sparse matrix.
    pub(super) fn matrix(&self) -> Taps {
        let mut taps = Taps::with_capacity(self.n_in(), self.n_out());
        match self {
            Self::Sparse(taps) => return taps.clone(),
            Self::Permute(permutation) => {
                for &j in permutation.source() {
                    if j != NONE {
                        taps.push(j as usize, 1.0);
                    }
                    taps.end_row();
                }
            }
            Self::Separable { rows, cols } => {
                for row in rows.rows() {
                    for col in cols.rows() {
                        for &(i, u) in row {
                            for &(j, v) in col {
                                taps.push(i as usize * cols.n_in() + j as usize, u * v);
                            }
                        }
                        taps.end_row();
                    }
                }
            }
        }
        taps
    }
}
