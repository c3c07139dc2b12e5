//! Matrices of observations, their cross products and factors. Factorizations are nalgebra's;
//! products run on one thread, so that no result depends on how many there are.

use candle_core::Tensor;
use nalgebra::{DMatrix, SVD, SymmetricEigen};

use super::{
    harness::{finite_host, values},
    unit::unit,
};
use crate::{Error, Result};

/// Observations per partial product: a block of them stays in the cache.
const BLOCK: usize = 1024;

/// Sweeps of an iterative factorization before it is given up.
const SWEEPS: usize = 10_000;

/// What is left of a value after its mean is gone counts as zero below this part of it.
const ROUNDING: f64 = 1e-12;

/// Observations of some variables: a column is an observation.
pub(super) struct Observations(pub DMatrix<f64>);

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
        Ok(Self(DMatrix::from_vec(d, n, x)))
    }

    pub fn len(&self) -> usize {
        self.0.ncols()
    }

    pub fn variables(&self) -> usize {
        self.0.nrows()
    }

    /// Multiplies by a power of two, so that products stay within range.
    pub fn normalize(&mut self) {
        self.0 *= unit(self.0.iter());
    }

    /// Takes the mean observation away and returns it; a variable that is constant but for rounding
    /// becomes zero.
    pub fn center(&mut self) -> Vec<f64> {
        let (d, n) = self.0.shape();
        let mut mean = vec![0.; d];
        let mut largest = vec![0f64; d];
        for x in self.0.column_iter() {
            for (i, &x) in x.iter().enumerate() {
                mean[i] += x;
                largest[i] = largest[i].max(x.abs());
            }
        }
        mean.iter_mut().for_each(|m| *m /= n as f64);
        let mut spread = vec![0f64; d];
        for mut x in self.0.column_iter_mut() {
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
    pub fn cross(&self, other: &Self) -> DMatrix<f64> {
        let mut sum = DMatrix::zeros(self.variables(), other.variables());
        for start in (0..self.len()).step_by(BLOCK) {
            let size = BLOCK.min(self.len() - start);
            let b = other.0.columns(start, size).transpose();
            sum.gemm(1., &self.0.columns(start, size), &b, 1.);
        }
        sum
    }

    /// [`cross`](Self::cross) with observation `order[n]` of this side beside observation `n` of
    /// the other side.
    pub fn cross_shuffled(&self, other: &Self, order: &[usize]) -> DMatrix<f64> {
        let mut sum = DMatrix::zeros(self.variables(), other.variables());
        for (i, order) in order.chunks(BLOCK).enumerate() {
            let b = other.0.columns(i * BLOCK, order.len()).transpose();
            sum.gemm(1., &self.0.select_columns(order), &b, 1.);
        }
        sum
    }

    /// Inner products of the observations, `n × n`: only where they are fewer than the variables.
    pub fn kernel(&self) -> DMatrix<f64> {
        self.0.transpose() * &self.0
    }
}

const ROWS: &str = "rows (n, d) or tokens (B, N, d), none of them zero";

/// Eigenvalues of a symmetric positive matrix, largest first, and the eigenvectors as columns.
pub(super) fn eigen(op: &'static str, m: DMatrix<f64>) -> Result<(Vec<f64>, DMatrix<f64>)> {
    let Some(e) = SymmetricEigen::try_new(m, f64::EPSILON, SWEEPS) else {
        return Err(diverged(op));
    };
    let mut order: Vec<usize> = (0..e.eigenvalues.len()).collect();
    order.sort_by(|&i, &j| e.eigenvalues[j].total_cmp(&e.eigenvalues[i]));
    let sorted = order.iter().map(|&i| e.eigenvalues[i].max(0.)).collect();
    Ok((sorted, e.eigenvectors.select_columns(&order)))
}

/// `m = M·diag(ρ)·Nᵀ` with ρ falling: `(M, ρ, N)`.
pub(super) fn svd(
    op: &'static str,
    m: DMatrix<f64>,
) -> Result<(DMatrix<f64>, Vec<f64>, DMatrix<f64>)> {
    match SVD::try_new(m, true, true, f64::EPSILON, SWEEPS) {
        Some(SVD { u: Some(u), v_t: Some(v_t), singular_values }) => {
            Ok((u, singular_values.iter().copied().collect(), v_t.transpose()))
        }
        _ => Err(diverged(op)),
    }
}

fn diverged(op: &'static str) -> Error {
    Error::input(
        op,
        "values whose factorization converges",
        format!("none after {SWEEPS} sweeps; look for values of very different size"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffled_product_pairs_the_observations_it_says() {
        let n = 2 * BLOCK + 7;
        let wave = |i: usize, j: usize| ((3 * i + 7 * j * j + 1) as f64).sin();
        let x = Observations(DMatrix::from_fn(6, n, wave));
        let y = Observations(DMatrix::from_fn(7, n, |i, j| wave(i + 9, j)));
        let order: Vec<usize> = (0..n).map(|i| (i * 5 + 3) % n).collect();
        let shuffled = Observations(x.0.select_columns(&order));
        assert_eq!(x.cross_shuffled(&y, &order), shuffled.cross(&y));
        let plain = &shuffled.0 * y.0.transpose();
        assert!((shuffled.cross(&y) - plain).amax() < 1e-9);
    }
}
