//! EqSim (arXiv 2303.14465): swapping either side of two pairs changes their scores alike.

use candle_core::Tensor;

use super::check;
use crate::{Error, Result};

/// The margin below which differences are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Margin {
    /// No margin and no clamping: the closed form.
    #[default]
    None,
    /// The authors' first form: each of the two means over pairs, minus this margin, clamped at 0.
    Mean(f64),
    /// The authors' second form: the squares of each pair, minus this margin, clamped at 0, then
    /// the mean.
    Pair(f64),
}

/// A penalty on a matrix of scores `S`; `s_ij` is the score of item `i` of one side and item `j` of
/// the other.
///
/// For two matched pairs, swapping either side should change the score by the same amount:
///
/// ```text
/// side 1   ((s_ii − s_ij) − (s_jj − s_ji))² = (a − b)²        a = s_ii − s_jj,  b = s_ij − s_ji
/// side 2   ((s_ii − s_ji) − (s_jj − s_ij))² = (a + b)²
/// ```
///
/// Both vanish exactly if `s_ij = s_ji` and `s_ii = s_jj`, and their sum is `2a² + 2b²`. So the
/// default is
///
/// ```text
/// L = mean_{i≠j} (s_ij − s_ji)² + w · Var(diag S)             Var over B − 1
/// ```
///
/// The mean over pairs of both sides is twice this value at `w = 2`. With a margin the sides are
/// formed separately, as in the authors' code: `L = [mean (a−b)² − m]₊ + [mean (a+b)² − m]₊`, or
/// the same within the mean. Their weight is 0.5, their margin 0.1.
///
/// A clamped term has no gradient. In contrastive losses such clamping has multiplied the variance
/// between seeds (arXiv 2603.00951). Log [`EqSimOutput::clamped`], and prefer no margin and a small
/// weight.
///
/// The diagonal term asks for equal scores of all matched pairs. Cosines can satisfy it; raw logits
/// need not.
///
/// Source: arXiv 2303.14465.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::contrib::{EqSim, Margin};
/// let s = Tensor::new(&[[1f32, 0.5], [0.2, 0.6]], &Device::Cpu)?;
/// let out = EqSim::default().forward(&s)?;
/// assert!((out.loss.to_scalar::<f32>()? - (0.09 + 0.08)).abs() < 1e-6); // 0.3² + 0.4²/2
/// let within = EqSim { margin: Margin::Pair(1.), ..Default::default() }.forward(&s)?;
/// assert_eq!((within.loss.to_scalar::<f32>()?, within.clamped.to_scalar::<f32>()?), (0., 1.));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EqSim {
    /// Weight `w` of the variance of the diagonal; 0 penalizes asymmetry only. A margin ignores it.
    pub diagonal: f64,
    /// The margin.
    pub margin: Margin,
}

impl Default for EqSim {
    /// Weight 1, no margin.
    fn default() -> Self {
        Self { diagonal: 1.0, margin: Margin::None }
    }
}

/// The penalty and its parts, f32 (f64 for f64). Only the loss has a graph.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EqSimOutput {
    /// The penalty.
    pub loss: Tensor,
    /// `mean_{i≠j} (s_ij − s_ji)²`.
    pub asymmetry: Tensor,
    /// `Var(diag S)` with the denominator `B − 1`.
    pub variance: Tensor,
    /// The fraction of clamped terms; 0 without a margin.
    pub clamped: Tensor,
}

const OP: &str = "EqSim";

impl EqSim {
    /// The penalty of scores `(B, B)` with at least two rows.
    ///
    /// # Errors
    /// If the matrix is not square, has fewer than two rows, or is not of a floating-point type. If
    /// the weight or the margin is negative or not finite.
    pub fn forward(&self, scores: &Tensor) -> Result<EqSimOutput> {
        let dtype = check::work_dtype(OP, scores)?;
        let (margin, field) = match self.margin {
            Margin::None => (0.0, "EqSim::margin"),
            Margin::Mean(m) => (m, "Margin::Mean"),
            Margin::Pair(m) => (m, "Margin::Pair"),
        };
        for (field, value) in [("EqSim::diagonal", self.diagonal), (field, margin)] {
            check::not_negative(field, value)?;
        }
        let n = match *scores.dims() {
            [rows, cols] if rows == cols && rows >= 2 => rows,
            _ => {
                let expected = "a square matrix (B, B) of scores, with at least two matched pairs";
                return Err(Error::input(OP, expected, format!("{:?}", scores.dims())));
            }
        };
        let s = scores.to_dtype(dtype)?;
        let pairs = (n * (n - 1)) as f64;
        // Each pair (i, j) occurs twice; the diagonal is zero.
        let b = (&s - s.t()?)?;
        let index: Vec<u32> = (0..n).map(|i| (i * (n + 1)) as u32).collect();
        let index = Tensor::from_vec(index, n, s.device())?;
        let diagonal = s.contiguous()?.flatten_all()?.index_select(&index, 0)?;
        let centered = diagonal.broadcast_sub(&diagonal.mean_keepdim(0)?)?;
        let asymmetry = (b.sqr()?.sum_all()? / pairs)?;
        let variance = (centered.sqr()?.sum_all()? / (n - 1) as f64)?;
        let (loss, clamped) = match self.margin {
            Margin::None => {
                let loss = (&asymmetry + (&variance * self.diagonal)?)?;
                (loss, asymmetry.zeros_like()?)
            }
            Margin::Mean(_) | Margin::Pair(_) => {
                let a = centered.unsqueeze(1)?.broadcast_sub(&centered.unsqueeze(0)?)?;
                let sides = Tensor::stack(&[(&a - &b)?.sqr()?, (&a + &b)?.sqr()?], 0)?;
                // One number per side, or one per side and pair.
                let (terms, each) = match self.margin {
                    Margin::Mean(_) => ((sides.sum((1, 2))? / pairs)?, 1.0),
                    _ => (sides, pairs),
                };
                let over = (terms - margin)?;
                // A term at the margin counts as clamped: it has no gradient.
                let open = over.detach().gt(0.0)?.to_dtype(dtype)?;
                let loss = ((over * &open)?.sum_all()? / each)?;
                // The zeros of the diagonal are never open, so `each` counts pairs only.
                (loss, (1.0 - (open.sum_all()? / (2.0 * each))?)?)
            }
        };
        Ok(EqSimOutput {
            loss,
            asymmetry: asymmetry.detach(),
            variance: variance.detach(),
            clamped,
        })
    }
}
