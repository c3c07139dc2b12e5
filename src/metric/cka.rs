//! Linear centered kernel alignment: how alike are two representations of the same rows?

use candle_core::Tensor;
use faer::Mat;

use super::linalg::{Observations, dot};
use crate::{Error, Result};

/// The estimator of the Hilbert–Schmidt independence criterion within [`cka`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hsic {
    /// Debiased below 1,000 rows, biased from there on.
    #[default]
    Auto,
    /// `‖YᵀX‖²_F` of centered columns. It is near 1 for few rows and many features, whatever the
    /// values.
    Biased,
    /// The unbiased U-statistic of Song et al. (JMLR 2012): about 0 for unrelated rows, so that it
    /// may be negative. At least 4 rows.
    Debiased,
}

/// Rows from which [`Hsic::Auto`] is biased.
const MANY: usize = 1000;

const OP: &str = "cka";

/// Linear CKA of the rows of `x` and `y`, each `(n, d)` or tokens `(B, N, d)` whose rows are images
/// times positions; the widths may differ.
///
/// ```text
/// CKA = HSIC(X, Y) / √(HSIC(X, X)·HSIC(Y, Y)),   biased: ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), columns centered
/// ```
///
/// Source: Kornblith et al., arXiv 1905.00414. It is 1 for equal rows; chance is 0 debiased and
/// above 0 biased. It does not change under an orthogonal map, an isotropic scale or an offset of
/// either side. So CKA of `F(x)` and `F(g·x)` measures invariance up to a linear re-encoding of the
/// channels; of `ρ(g)F(x)` and `F(g·x)`, equivariance up to one
/// ([`MatchedMaps::matched`](super::MatchedMaps::matched)). The debiased form takes rows as
/// independent draws. Tokens of one image are not independent: compare scores of the same number of
/// images and positions.
///
/// With centered columns, `a_i = ‖x_i‖²` and `b_i = ‖y_i‖²`, the debiased HSIC is, but for a factor
/// that cancels, `‖YᵀX‖²_F − n/(n−2) Σ a_i b_i + Σ a_i Σ b_i / ((n−1)(n−2))`: no `n×n` matrix is
/// formed unless the rows are fewer than the features. Constant channels drop out. A side with no
/// variance at all makes the result NaN.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::metric::{Hsic, cka};
/// let x = Tensor::randn(0f64, 1., (200, 8), &Device::Cpu)?;
/// assert!((cka(&x, &(&x * 3.)?, Hsic::Auto)? - 1.).abs() < 1e-9);
/// let other = Tensor::randn(0f64, 1., (200, 8), &Device::Cpu)?;
/// assert!(cka(&x, &other, Hsic::Auto)?.abs() < 0.1);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If a side is no matrix of rows or holds a NaN or infinity, their numbers of rows differ, or
/// there are fewer than 2 (debiased: 4).
pub fn cka(x: &Tensor, y: &Tensor, hsic: Hsic) -> Result<f64> {
    let (mut x, mut y) = (Observations::rows(OP, x)?, Observations::rows(OP, y)?);
    let n = x.len();
    if y.len() != n {
        let expected = format!("{n} rows on the other side too");
        return Err(Error::input(OP, expected, y.len()));
    }
    let debiased = match hsic {
        Hsic::Auto => n < MANY,
        Hsic::Biased => false,
        Hsic::Debiased => true,
    };
    let least = if debiased { 4 } else { 2 };
    if n < least {
        let expected = format!("at least {least} rows");
        return Err(Error::input(OP, expected, n));
    }
    x.normalize();
    y.normalize();
    x.center();
    y.center();
    let [xy, xx, yy] = if n < x.variables().max(y.variables()) {
        let (k, l) = (x.kernel(), y.kernel());
        [(&k, &l), (&k, &k), (&l, &l)].map(|(k, l)| dot(k.as_ref(), l.as_ref()))
    } else {
        [x.cross(&y), x.cross(&x), y.cross(&y)].map(|c: Mat<f64>| dot(c.as_ref(), c.as_ref()))
    };
    let hsic = |product: f64, a: &[f64], b: &[f64]| {
        if !debiased {
            return product;
        }
        let n = n as f64;
        let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
        let sums = a.iter().sum::<f64>() * b.iter().sum::<f64>();
        let debiased = product - n / (n - 2.) * dot + sums / ((n - 1.) * (n - 2.));
        // What the difference of such large terms leaves below their rounding is nothing.
        let rounding = 1e-14 * n * (product + 2. * dot + sums / (n * n));
        if debiased.abs() < rounding { 0. } else { debiased }
    };
    let squares = |x: &Observations| -> Vec<f64> {
        x.0.col_iter().map(|c| c.iter().map(|v| v * v).sum()).collect()
    };
    let (a, b) = (squares(&x), squares(&y));
    Ok(hsic(xy, &a, &b) / (hsic(xx, &a, &a).sqrt() * hsic(yy, &b, &b).sqrt()))
}
