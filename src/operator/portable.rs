//! The operator made of plain candle ops. It runs on any device, and candle's autograd
//! differentiates it. On the CPU it is the reference that tests compare the fused op with.

use candle_core::{Device, Result, Tensor, bail};

use super::{chain::Chains, step::Step, taps::Taps};

/// Applies `chains` to tokens `(B, N, C)`.
pub(super) fn apply(chains: &Chains, x: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    let first = &chains.get(0).steps;
    if chains.len() == 1 {
        return run(first, x);
    }
    let aligned = chains.iter().all(|chain| {
        let pairs = || first.iter().zip(&chain.steps);
        chain.steps.len() == first.len() && pairs().all(|(f, s)| same_shape(f, s))
    });
    if aligned {
        return (0..first.len()).try_fold(x.clone(), |x, k| {
            let steps: Vec<&Step> = chains.iter().map(|chain| &chain.steps[k]).collect();
            step(&steps, &x)
        });
    }
    // Chains of different shapes run one by one: as one matrix a separable step would be dense.
    let each = (0..batch).map(|b| run(&chains.get(b).steps, &x.narrow(0, b, 1)?));
    Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
}

fn run(steps: &[Step], x: &Tensor) -> Result<Tensor> {
    steps.iter().try_fold(x.clone(), |x, s| step(&[s], &x))
}

/// Whether two steps can be one batched operation.
fn same_shape(a: &Step, b: &Step) -> bool {
    let axes = |s: &Step| match s {
        Step::Separable { rows, cols } => {
            Some((rows.n_in(), rows.n_out(), cols.n_in(), cols.n_out()))
        }
        _ => None,
    };
    a.n_in() == b.n_in() && a.n_out() == b.n_out() && axes(a) == axes(b)
}

/// Applies one step: one for all samples, or one per sample of the same shape.
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
        let repeats = if axes.len() == 1 { 1 } else { h };
        let per_line = axes.iter().flat_map(|a| std::iter::repeat_n(a.1, repeats));
        return gather(&per_line.collect::<Vec<_>>(), &x)?.reshape((batch, h * w, channels));
    }
    let taps: Vec<Taps> = steps.iter().map(|s| s.matrix()).collect();
    gather(&taps.iter().collect::<Vec<_>>(), x)
}

/// `out[b, i, :] = Σ_k w[b, i, k] · x[b, index[b, i, k], :]`, one `index_select` per `k`.
fn gather(taps: &[&Taps], x: &Tensor) -> Result<Tensor> {
    let (batch, n_in, width) = x.dims3()?;
    let n_out = taps[0].n_out();
    if batch * n_in >= u32::MAX as usize {
        bail!("grid-operator: expected fewer than 2^32 cells in a batch, got {batch} x {n_in}");
    }
    let lengths = || taps.iter().flat_map(|t| t.rows().map(<[_]>::len));
    let depth = lengths().max().unwrap_or(0).max(1);
    let mut flat = x.contiguous()?.reshape((batch * n_in, width))?;
    // Shorter rows read an extra row of zeros. Reading a token with weight 0 instead would turn
    // its NaN or infinity into NaN.
    let zero = ((batch * n_in) as u32, 1.0);
    if lengths().any(|len| len < depth) {
        let row = Tensor::zeros((1, width), x.dtype(), x.device())?;
        flat = Tensor::cat(&[&flat, &row], 0)?;
    }
    let term = |k: usize| {
        let (mut indices, mut weights) = (Vec::new(), Vec::new());
        for b in 0..batch {
            for row in taps[if taps.len() == 1 { 0 } else { b }].rows() {
                let tap = row.get(k).map(|&(j, w)| ((b * n_in) as u32 + j, w));
                let (index, weight) = tap.unwrap_or(zero);
                indices.push(index);
                weights.push(weight);
            }
        }
        let exact = weights.iter().all(|&w| w == 1.0);
        let indices = Tensor::from_vec(indices, batch * n_out, x.device())?;
        let rows = flat.index_select(&indices, 0)?;
        if exact {
            return Ok(rows);
        }
        // Cast on the host, because some devices lack f64.
        let weights = Tensor::from_vec(weights, (batch * n_out, 1), &Device::Cpu)?;
        rows.broadcast_mul(&weights.to_dtype(x.dtype())?.to_device(x.device())?)
    };
    let sum = (1..depth).try_fold(term(0)?, |sum, k| sum + term(k)?)?;
    sum.reshape((batch, n_out, width))
}
