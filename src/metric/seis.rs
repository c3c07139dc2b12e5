//! SEIS: do the maps of images and of transformed images span one subspace, along the same
//! directions?

use candle_core::Tensor;
use faer::Mat;
use rand::Rng;

use super::{
    harness::finite_host,
    linalg::{Observations, dot, eigen, product, svd},
    scores::cycle,
};
use crate::{Error, Result};

/// SEIS of two maps, of images and of transformed images. The transform need not be known.
///
/// Source: Lin, Farrahi, Cai, arXiv 2602.04054. Each channel of each image is an observation of its
/// `d = H·W` positions: a map is a matrix `A ∈ R^{n×d}`, `n = B·C`, its columns centered. With `A =
/// U S Vᵀ` cut to the fewest directions that hold [`energy`](Self::energy) of `Σ S²` (`k_A` of
/// them), the same for `A'`, and `U_Aᵀ U_A' = M diag(ρ) Nᵀ`, `r = min(k_A, k_A')`:
///
/// ```text
/// equivariance  S_equiv = 1/r Σ_i ρ_i                          the mean canonical correlation
/// invariance    S_inv   = 1/r Σ_i ρ_i |cos(w_i, v_i)|,         W = V_A S_A⁻¹ M,  V = V_A' S_A'⁻¹ N
/// ```
///
/// Both lie within `[0, 1]`. High and high: invariant. High and low: re-encoded, the positions hold
/// the same content in another order. Low and low: destroyed. Chance is
/// [`shuffled`](SeisReport::shuffled), never zero.
///
/// - *Channels are observations*: a map that re-encodes its channels without loss (a rotated fibre,
///   shuffled channels) counts as destroyed. Actions on positions only, such as a
///   [`GridOperator`](crate::GridOperator), are not affected.
/// - *`n` must be well above `d`*: two unrelated maps have correlations of about `0.85·√(k/n)`.
///   Fewer observations than positions are an error, since any two maps of full rank then agree.
/// - *Ties*: where correlations are equal (an exact map: all of them are 1), `M` and `N` are not
///   unique, and `S_inv` depends on rounding. If a map is exactly equivariant, only the first digit
///   of `S_inv` is reliable.
///
/// The thin factors come from the `d×d` matrices `AᵀA`, `A'ᵀA'` and `AᵀA'`. That squares the
/// condition number, which the cut makes harmless: the smallest direction kept has more than `(1 −
/// energy)/d` of the sum of squares, so its eigenvalue is good to about `d/(1 − energy)` roundings.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::metric::Seis;
///
/// let map = Tensor::randn(0f64, 1., (40, 16, 4, 4), &Device::Cpu)?;
/// let turned = map.transpose(2, 3)?;
/// let rng = &mut StdRng::seed_from_u64(0);
/// let same = Seis::default().measure(&map, &map, rng)?;
/// assert!(same.score.equivariance > 0.999 && same.score.invariance > 0.999);
/// let moved = Seis::default().measure(&map, &turned, rng)?;
/// assert!(moved.score.equivariance > 0.999 && moved.score.invariance < 0.7);
/// assert!(moved.shuffled.equivariance < 0.2);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seis {
    /// The part of the sum of squares that the directions kept must hold, within `(0, 1)`.
    pub energy: f64,
}

impl Default for Seis {
    /// 0.99, as in the paper.
    fn default() -> Self {
        Self { energy: 0.99 }
    }
}

/// The two scores of SEIS.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SeisScore {
    /// `S_equiv`: how much of the content is still there, in whatever order.
    pub equivariance: f64,
    /// `S_inv`: how much of it is there unmoved.
    pub invariance: f64,
}

/// SEIS of two maps beside its null.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SeisReport {
    /// The score; NaN if a map is constant.
    pub score: SeisScore,
    /// The chance level: the observations of one map are shuffled, as if maps of these spectra were
    /// unrelated.
    pub shuffled: SeisScore,
    /// The canonical correlations `ρ`, falling; `r` of them.
    pub correlations: Vec<f64>,
    /// `k_A` and `k_A'`: how many directions either map keeps.
    pub ranks: (usize, usize),
}

/// A map's directions: eigenvectors of the Gram matrix, each divided by its singular value.
struct Whitened {
    observations: Observations,
    /// `V S⁻¹`, `d × k`.
    directions: Mat<f64>,
}

const OP: &str = "Seis::measure";

impl Seis {
    /// Scores the map `a` of images against the map `b` of the same images, transformed; each `(B,
    /// C, H, W)` or tokens `(B, N, C)` without prefix tokens. `rng` shuffles the null.
    ///
    /// # Errors
    /// If the energy is not within `(0, 1)`, the maps differ in shape or hold a NaN or infinity, or
    /// there are no more observations `B·C` than positions.
    pub fn measure(
        &self,
        a: &Tensor,
        b: &Tensor,
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<SeisReport> {
        if !(self.energy > 0. && self.energy < 1.) {
            return Err(Error::config("Seis::energy", "a fraction within (0, 1)", self.energy));
        }
        if a.dims() != b.dims() {
            let expected = format!("a second map of the first one's shape, {:?}", a.dims());
            return Err(Error::input(OP, expected, format!("{:?}", b.dims())));
        }
        let (a, b) = (positions(a)?, positions(b)?);
        let n = a.len();
        if n <= a.variables() {
            return Err(Error::input(
                OP,
                format!(
                    "more observations (images times channels) than the {} positions, well more",
                    a.variables()
                ),
                n,
            ));
        }
        let order = cycle(n, rng);
        let (Some(a), Some(b)) = (self.whiten(a)?, self.whiten(b)?) else {
            let nan = SeisScore { equivariance: f64::NAN, invariance: f64::NAN };
            return Ok(SeisReport {
                score: nan,
                shuffled: nan,
                correlations: Vec::new(),
                ranks: (0, 0),
            });
        };
        let (score, correlations) = a.against(&b, &a.observations.cross(&b.observations))?;
        let cross = a.observations.cross_shuffled(&b.observations, &order);
        let (shuffled, _) = a.against(&b, &cross)?;
        Ok(SeisReport {
            score,
            shuffled,
            correlations,
            ranks: (a.directions.ncols(), b.directions.ncols()),
        })
    }

    /// `None` if the map is constant.
    fn whiten(&self, mut observations: Observations) -> Result<Option<Whitened>> {
        observations.center();
        let (energies, vectors) = eigen(OP, observations.cross(&observations))?;
        let total: f64 = energies.iter().sum();
        if total == 0. {
            return Ok(None);
        }
        let mut held = 0.;
        let mut rank = 0;
        while held < self.energy * total && rank < energies.len() {
            held += energies[rank];
            rank += 1;
        }
        let (d, k) = (vectors.nrows(), rank);
        let directions = Mat::from_fn(d, k, |i, j| vectors[(i, j)] / energies[j].sqrt());
        Ok(Some(Whitened { observations, directions }))
    }
}

impl Whitened {
    /// The scores and correlations, given `AᵀA'` of the observations.
    fn against(&self, other: &Self, cross: &Mat<f64>) -> Result<(SeisScore, Vec<f64>)> {
        let half = product(self.directions.transpose(), cross.as_ref());
        let (m, rho, n) = svd(OP, product(half.as_ref(), other.directions.as_ref()))?;
        let w = product(self.directions.as_ref(), m.as_ref());
        let v = product(other.directions.as_ref(), n.as_ref());
        let rho: Vec<f64> = rho.into_iter().map(|r| r.min(1.)).collect();
        let cosine = |i: usize| {
            let (w, v) = (w.as_ref().subcols(i, 1), v.as_ref().subcols(i, 1));
            (dot(w, v) / (dot(w, w) * dot(v, v)).sqrt()).abs()
        };
        let mean =
            |of: &dyn Fn(usize) -> f64| (0..rho.len()).map(of).sum::<f64>() / rho.len() as f64;
        let score = SeisScore {
            equivariance: mean(&|i| rho[i]),
            invariance: mean(&|i| rho[i] * cosine(i)),
        };
        Ok((score, rho))
    }
}

/// A map as observations of its positions: one for each channel of each image.
fn positions(map: &Tensor) -> Result<Observations> {
    let by_channel = match map.rank() {
        _ if map.elem_count() == 0 => Err(Error::input(
            OP,
            "at least one image, channel and position",
            format!("{:?}", map.dims()),
        )),
        3 => Ok(map.transpose(1, 2)?),
        4 => Ok(map.flatten_from(2)?),
        _ => Err(Error::input(
            OP,
            "a map (B, C, H, W) or tokens (B, N, C)",
            format!("{:?}", map.dims()),
        )),
    }?;
    let mut observations = Observations::rows(OP, &finite_host(OP, &by_channel)?)?;
    observations.normalize();
    Ok(observations)
}
