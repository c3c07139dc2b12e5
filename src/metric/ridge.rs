//! Ridge regression, and how much of a parameter a linear map reads from features.

use candle_core::{Device, Tensor};
use faer::Mat;

use super::{
    linalg::{Observations, entries, product, solve},
    unit::norm,
};
use crate::{Error, Result};

/// A linear map fitted by ridge regression, on features brought to mean 0 and variance 1.
///
/// With the standardized features `X` `(n, d)` and the centered targets `Y` `(n, k)`, `W = (XᵀX + λ
/// n I)⁻¹ XᵀY`: `λ` is in units of a feature's variance, whatever the number of rows. With fewer
/// rows than features the same solution comes from the `n×n` side. Constant features weigh nothing.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::metric::Ridge;
/// let x = Tensor::randn(0f64, 1., (50, 3), &Device::Cpu)?;
/// let y = ((x.sum_keepdim(1)? * 2.)? + 1.)?;
/// let error = (Ridge::fit(&x, &y, 1e-9)?.predict(&x)? - y)?.abs()?.max_all()?;
/// assert!(error.to_scalar::<f64>()? < 1e-6);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ridge {
    /// What is taken from each feature, and what it is divided by.
    means: Vec<f64>,
    scales: Vec<f64>,
    /// `k × d`.
    weights: Mat<f64>,
    offsets: Vec<f64>,
}

impl Ridge {
    /// Fits targets `y` `(n, k)` by features `x` `(n, d)`; `lambda` is the penalty, in units of a
    /// feature's variance.
    ///
    /// # Errors
    /// If the rows differ in number, there are fewer than two, a value is not finite, `lambda` is
    /// negative or not finite, or it is so small that the features determine no unique solution.
    pub fn fit(x: &Tensor, y: &Tensor, lambda: f64) -> Result<Self> {
        let op = "Ridge::fit";
        if !(lambda >= 0. && lambda.is_finite()) {
            return Err(Error::config("lambda", "a penalty of at least 0", lambda));
        }
        let (mut x, mut y) = (matrix(op, x)?, matrix(op, y)?);
        let n = x.len();
        if y.len() != n || n < 2 {
            return Err(Error::input(
                op,
                "as many rows of targets as of features, at least two",
                format!("{} and {n}", y.len()),
            ));
        }
        let (means, offsets) = (x.center(), y.center());
        let deviation = |i| norm(x.0.row(i).iter()) / (n as f64).sqrt();
        let scales: Vec<f64> = (0..x.variables()).map(deviation).collect();
        for x in x.0.col_iter_mut() {
            x.iter_mut().zip(&scales).filter(|(_, s)| **s > 0.).for_each(|(x, s)| *x /= s);
        }
        let penalty = lambda * n as f64;
        let solve = |mut m: Mat<f64>, b: Mat<f64>| {
            let diagonal = |m: &Mat<f64>, i| m[(i, i)];
            let largest = (0..m.nrows()).map(|i| diagonal(&m, i)).fold(f64::MIN, f64::max);
            for i in 0..m.nrows() {
                m[(i, i)] += penalty;
            }
            solve(m, b, largest + penalty).ok_or_else(|| {
                Error::config(
                    "lambda",
                    "a penalty that makes the solution unique: features repeat one another, or are more than the rows",
                    lambda,
                )
            })
        };
        let weights = if x.variables() <= n {
            // A constant feature has no equation of its own.
            let mut gram = x.cross(&x);
            for (i, &s) in scales.iter().enumerate() {
                if s == 0. {
                    gram[(i, i)] = n as f64;
                }
            }
            solve(gram, x.cross(&y))?.transpose().to_owned()
        } else {
            let dual = solve(x.kernel(), y.0.transpose().to_owned())?;
            product(dual.transpose(), x.0.transpose())
        };
        Ok(Self { means, scales, weights, offsets })
    }

    /// The targets `(n, k)` that the fit expects of features `x` `(n, d)`; `f64` on the host.
    ///
    /// # Errors
    /// If `x` is no matrix of as many features as the fit saw, or a value is not finite.
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        let op = "Ridge::predict";
        let mut x = matrix(op, x)?;
        if x.variables() != self.means.len() {
            let expected = format!("{} features", self.means.len());
            return Err(Error::input(op, expected, x.variables()));
        }
        for x in x.0.col_iter_mut() {
            for (i, x) in x.iter_mut().enumerate() {
                *x = if self.scales[i] > 0. { (*x - self.means[i]) / self.scales[i] } else { 0. };
            }
        }
        let y = product(self.weights.as_ref(), x.0.as_ref());
        let y: Vec<f64> = (y.col_iter())
            .flat_map(|y| y.iter().zip(&self.offsets).map(|(y, o)| y + o).collect::<Vec<_>>())
            .collect();
        Ok(Tensor::from_vec(y, (x.len(), self.offsets.len()), &Device::Cpu)?)
    }
}

/// What a linear map reads of parameters from features, on rows it was not fitted to.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ParameterR2 {
    /// `R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)²` of each parameter: 1 is exact, 0 no better than the mean,
    /// negative worse. NaN for a parameter that does not vary.
    pub parameters: Vec<f64>,
    /// Their mean, NaN ones left out; NaN if nothing is left.
    pub mean: f64,
}

/// How much of the parameters of a transformation (scale, crop, angle) survives in features: fits
/// [`Ridge`] on `train`, a pair of features `(n, d)` and parameters `(n, k)`, and takes `R²` on
/// `test`.
///
/// A high value says that the layer holds the information, not that the network uses it. A value
/// near 0 (chance; it can be negative) says that the layer is invariant to the transformation. For
/// relative parameters of two views join the features of both. No image may be in both the training
/// and the test part. Angles: use their sine and cosine. Source: the protocol of Garrido et al.
/// (SIE), arXiv 2302.10283, with ridge regression for their network.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::metric::parameter_r2;
/// let features = Tensor::randn(0f64, 1., (200, 4), &Device::Cpu)?;
/// let scale = (features.narrow(1, 0, 1)? + 3.)?; // the features know it
/// let angle = Tensor::randn(0f64, 1., (200, 1), &Device::Cpu)?; // but not this
/// let parameters = Tensor::cat(&[scale, angle], 1)?;
/// let part = |start| Ok::<_, ser_reg::Error>((features.narrow(0, start, 100)?, parameters.narrow(0, start, 100)?));
/// let ((x, y), (x_test, y_test)) = (part(0)?, part(100)?);
/// let r2 = parameter_r2((&x, &y), (&x_test, &y_test), 1e-3)?;
/// assert!(r2.parameters[0] > 0.99 && r2.parameters[1] < 0.3);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// As [`Ridge::fit`] and [`Ridge::predict`], and if the test parameters are not as many or have
/// fewer than two rows.
pub fn parameter_r2(
    train: (&Tensor, &Tensor),
    test: (&Tensor, &Tensor),
    lambda: f64,
) -> Result<ParameterR2> {
    let op = "parameter_r2";
    let predicted = Ridge::fit(train.0, train.1, lambda)?.predict(test.0)?;
    if test.1.dims() != predicted.dims() || predicted.dims()[0] < 2 {
        return Err(Error::input(
            op,
            format!("test parameters {:?}, at least two rows", predicted.dims()),
            format!("{:?}", test.1.dims()),
        ));
    }
    let predicted = matrix(op, &predicted)?;
    let truth = matrix(op, test.1)?;
    let error = &truth.0 - &predicted.0;
    let mut centered = truth;
    centered.center();
    let parameters: Vec<f64> = (0..centered.variables())
        .map(|i| match norm(centered.0.row(i).iter()) {
            0. => f64::NAN,
            total => 1. - (norm(error.row(i).iter()) / total).powi(2),
        })
        .collect();
    let defined: Vec<f64> = parameters.iter().copied().filter(|r| !r.is_nan()).collect();
    Ok(ParameterR2 { mean: defined.iter().sum::<f64>() / defined.len() as f64, parameters })
}

/// A matrix `(n, d)` of finite values; rank 2 and nothing else, so that rows are counted as the
/// caller counts them.
fn matrix(op: &'static str, x: &Tensor) -> Result<Observations> {
    if x.rank() != 2 {
        return Err(Error::input(op, "a matrix (n, d)", format!("{:?}", x.dims())));
    }
    let rows = Observations::rows(op, x)?;
    let large = entries(rows.0.as_ref()).copied().find(|v| v.abs() > LARGEST);
    match large {
        None => Ok(rows),
        Some(v) => Err(Error::input(
            op,
            format!("values of at most {LARGEST:e} in magnitude"),
            format!("{v:e}"),
        )),
    }
}

/// Sums of larger values may overflow.
const LARGEST: f64 = 1e290;
