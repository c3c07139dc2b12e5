//! Matrices of observations, their cross products and factors: faer's, on one thread, so that no result depends on how many
//! there are.

use candle_core::Tensor;
use faer::{
    Accum, Mat, MatRef, Par,
    diag::Diag,
    dyn_stack::{MemBuffer, MemStack, StackReq},
    linalg::{
        cholesky::llt,
        evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch},
        matmul::matmul,
        svd::{ComputeSvdVectors::Thin, svd as decompose, svd_scratch},
    },
};

use super::{
    harness::{finite_host, values},
    unit::unit,
};
use crate::{Error, Result};

/// What is left of a value after its mean is gone counts as zero below this part of it.
const ROUNDING: f64 = 1e-12;

/// Observations of some variables: a column is an observation.
pub(super) struct Observations(pub Mat<f64>);

impl Observations {
    /// Each row of `x`, `(n, d)` or `(B, N, d)`, is an observation.
    pub fn rows(op: &'static str, x: &Tensor) -> Result<Self> {
        let (n, d) = match *x.dims() {
            [n, d] => (n, d),
            [b, n, d] => (b * n, d),
            _ => return Err(Error::input(op, ROWS, format!("{:?}", x.dims()))),
        };
        if n == 0 || d == 0 {
            return Err(Error::input(op, ROWS, format!("{:?}", x.dims())));
        }
        let x = values(&finite_host(op, x)?)?;
        Ok(Self(MatRef::from_column_major_slice(&x, d, n).to_owned()))
    }

    pub fn len(&self) -> usize {
        self.0.ncols()
    }

    pub fn variables(&self) -> usize {
        self.0.nrows()
    }

    /// Multiplies by a power of two, so that products stay within range.
    pub fn normalize(&mut self) {
        let unit = unit(entries(self.0.as_ref()));
        self.0.col_iter_mut().for_each(|x| x.iter_mut().for_each(|x| *x *= unit));
    }

    /// Takes the mean observation away and returns it; a variable that is constant but for rounding
    /// becomes zero.
    pub fn center(&mut self) -> Vec<f64> {
        let (d, n) = self.0.shape();
        let mut mean = vec![0.; d];
        let mut largest = vec![0f64; d];
        for x in self.0.col_iter() {
            for (i, &x) in x.iter().enumerate() {
                mean[i] += x;
                largest[i] = largest[i].max(x.abs());
            }
        }
        mean.iter_mut().for_each(|m| *m /= n as f64);
        let mut spread = vec![0f64; d];
        for x in self.0.col_iter_mut() {
            for (i, x) in x.iter_mut().enumerate() {
                *x -= mean[i];
                spread[i] = spread[i].max(x.abs());
            }
        }
        for i in 0..d {
            if spread[i] <= ROUNDING * largest[i] {
                self.0.row_mut(i).fill(0.);
            }
        }
        mean
    }

    /// `Σ_n a_n b_nᵀ`, variables by variables.
    pub fn cross(&self, other: &Self) -> Mat<f64> {
        product(self.0.as_ref(), other.0.transpose())
    }

    /// [`cross`](Self::cross) with observation `order[n]` of this side beside observation `n` of
    /// the other side.
    pub fn cross_shuffled(&self, other: &Self, order: &[usize]) -> Mat<f64> {
        let shuffled = Mat::from_fn(self.variables(), order.len(), |i, j| self.0[(i, order[j])]);
        product(shuffled.as_ref(), other.0.transpose())
    }

    /// Inner products of the observations, `n × n`: only where they are fewer than the variables.
    pub fn kernel(&self) -> Mat<f64> {
        product(self.0.transpose(), self.0.as_ref())
    }
}

const ROWS: &str = "rows (n, d) or tokens (B, N, d), none of them zero";

/// All entries, column by column.
pub(super) fn entries(m: MatRef<'_, f64>) -> impl Iterator<Item = &f64> {
    (0..m.ncols()).flat_map(move |j| m.col(j).iter())
}

/// `Σ_ij a_ij b_ij`.
pub(super) fn dot(a: MatRef<f64>, b: MatRef<f64>) -> f64 {
    entries(a).zip(entries(b)).map(|(a, b)| a * b).sum()
}

/// `a·b`.
pub(super) fn product(a: MatRef<f64>, b: MatRef<f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(out.as_mut(), Accum::Replace, a, b, 1., Par::Seq);
    out
}

/// Runs `work` with memory for it.
fn with_memory<R>(need: StackReq, work: impl FnOnce(&mut MemStack) -> R) -> R {
    work(MemStack::new(&mut MemBuffer::new(need)))
}

/// Eigenvalues of a symmetric positive matrix, largest first, and the eigenvectors as columns.
pub(super) fn eigen(op: &'static str, m: Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = m.nrows();
    let (mut values, mut vectors) = (Diag::zeros(n), Mat::zeros(n, n));
    let need =
        self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    let (s, u) = (values.as_mut(), Some(vectors.as_mut()));
    with_memory(need, |stack| {
        self_adjoint_evd(m.as_ref(), s, u, Par::Seq, stack, Default::default())
    })
    .map_err(|_| diverged(op))?;
    let values: Vec<f64> = values.column_vector().iter().map(|&v: &f64| v.max(0.)).collect();
    // They come in rising order.
    let sorted = values.into_iter().rev().collect();
    Ok((sorted, Mat::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)])))
}

/// `m = M·diag(ρ)·Nᵀ` with ρ falling: `(M, ρ, N)`.
pub(super) fn svd(op: &'static str, m: Mat<f64>) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let (rows, cols) = m.shape();
    let size = rows.min(cols);
    let mut rho = Diag::zeros(size);
    let (mut u, mut v) = (Mat::zeros(rows, size), Mat::zeros(cols, size));
    let need = svd_scratch::<f64>(rows, cols, Thin, Thin, Par::Seq, Default::default());
    let (s, u_out, v_out) = (rho.as_mut(), Some(u.as_mut()), Some(v.as_mut()));
    with_memory(need, |stack| {
        decompose(m.as_ref(), s, u_out, v_out, Par::Seq, stack, Default::default())
    })
    .map_err(|_| diverged(op))?;
    Ok((u, rho.column_vector().iter().copied().collect(), v))
}

/// The solution of `m·x = b` with a symmetric matrix; `None` if it is not positive by more than rounding, of which
/// `largest` is the scale.
pub(super) fn solve(mut m: Mat<f64>, mut b: Mat<f64>, largest: f64) -> Option<Mat<f64>> {
    let n = m.nrows();
    let need = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let factor = |stack: &mut MemStack| {
        let (exact, settings) = (Default::default(), Default::default());
        llt::factor::cholesky_in_place(m.as_mut(), exact, Par::Seq, stack, settings)
    };
    with_memory(need, factor).ok()?;
    // A pivot that is rounding would pass as positive.
    let smallest = (0..n).map(|i| m[(i, i)] * m[(i, i)]).fold(f64::INFINITY, f64::min);
    if smallest <= 1e-13 * largest {
        return None;
    }
    let need = llt::solve::solve_in_place_scratch::<f64>(n, b.ncols(), Par::Seq);
    with_memory(need, |stack| {
        llt::solve::solve_in_place(m.as_ref(), b.as_mut(), Par::Seq, stack);
    });
    Some(b)
}

fn diverged(op: &'static str) -> Error {
    Error::input(
        op,
        "values whose factorization converges",
        "others (look for values of very different size)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffled_product_pairs_the_observations_it_says() {
        let n = 2055;
        let wave = |i: usize, j: usize| ((3 * i + 7 * j * j + 1) as f64).sin();
        let x = Observations(Mat::from_fn(6, n, wave));
        let y = Observations(Mat::from_fn(7, n, |i, j| wave(i + 9, j)));
        let order: Vec<usize> = (0..n).map(|i| (i * 5 + 3) % n).collect();
        let shuffled = Observations(Mat::from_fn(6, n, |i, j| x.0[(i, order[j])]));
        assert_eq!(x.cross_shuffled(&y, &order), shuffled.cross(&y));
        for (a, b) in (0..6).flat_map(|a| (0..7).map(move |b| (a, b))) {
            let plain: f64 = (0..n).map(|i| shuffled.0[(a, i)] * y.0[(b, i)]).sum();
            assert!((shuffled.cross(&y)[(a, b)] - plain).abs() < 1e-9);
        }
    }

    #[test]
    fn factors_rebuild_their_matrix_in_order() -> Result<()> {
        let wave = |i: usize, j: usize| ((i * i + 7 * j * j + i * j + 1) as f64).sin();
        let m = Mat::from_fn(9, 5, wave);
        let (u, rho, v) = svd("test", m.clone())?;
        assert!(rho.is_sorted_by(|a, b| a >= b) && u.shape() == (9, 5) && v.shape() == (5, 5));
        let scaled = Mat::from_fn(9, 5, |i, j| u[(i, j)] * rho[j]);
        let error = &product(scaled.as_ref(), v.transpose()) - &m;
        assert!(error.norm_max() < 1e-13);
        let gram = product(m.transpose(), m.as_ref());
        let (values, vectors) = eigen("test", gram.clone())?;
        assert!(values.iter().zip(&rho).all(|(v, r)| (v - r * r).abs() < 1e-12));
        let scaled = Mat::from_fn(5, 5, |i, j| vectors[(i, j)] * values[j]);
        let error = &product(scaled.as_ref(), vectors.transpose()) - &gram;
        assert!(error.norm_max() < 1e-12);
        let b = Mat::from_fn(5, 2, wave);
        let x = solve(gram.clone(), b.clone(), values[0]).expect("a solution");
        assert!((&product(gram.as_ref(), x.as_ref()) - &b).norm_max() < 1e-11);
        let flat = Mat::from_fn(5, 5, |_, _| 1.);
        assert!(solve(flat, b, 1.).is_none());
        Ok(())
    }
}
