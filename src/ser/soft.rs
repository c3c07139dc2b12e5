//! Weights that fall with the strength of an augmentation.

use crate::view::Relative;
use crate::{Error, Filter, GridOperator, GroupAction, Resample, Result, TokenGrid};

/// What a [`SoftWeight`] looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// The pair: all its tokens weigh `p` of the share of them that both views see.
    #[default]
    Pairs,
    /// The token: it weighs `p` of the share of it that the other view sees.
    Tokens,
    /// The product of both.
    Both,
}

/// Soft Augmentation (arXiv 2211.04625) as a weight: what an augmentation has left less of counts less.
///
/// ```text
/// p(v) = 1 − (1 − p_min)(1 − v)^k
/// ```
///
/// with `v` the visibility, 0 to 1, of a pair ([`pair_visibility`]) or of a token ([`token_visibility`]). Turns, flips and
/// scales leave everything visible: all weights are then 1.
///
/// ```
/// use ser_reg::ser::SoftWeight;
/// let soft = SoftWeight { p_min: 0.1, k: 2.0, ..Default::default() };
/// assert_eq!((soft.at(0.0), soft.at(1.0)), (0.1, 1.0));
/// assert!((soft.at(0.5) - (1.0 - 0.9 * 0.25)).abs() < 1e-15);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftWeight {
    /// The weight of what is not visible at all; within `[0, 1]`. The paper takes chance, one over the number of classes.
    pub p_min: f64,
    /// How late weights fall; finite and above 0. The paper takes 2 to 4; the larger, the less a partial view costs.
    pub k: f64,
    /// Whether pairs, tokens or both are weighed.
    pub scope: Scope,
    /// Whether weights are shares: `Σ p·ℓ / Σ p`. Otherwise they also lower the loss of a batch that is seen in part, as in
    /// the paper: `Σ p·ℓ / Σ 1` over the valid tokens, those of `p = 0` among them (under
    /// [`max_tokens`](super::SerConfig::max_tokens), `Σ p·ℓ / Σ p` of the drawn ones times `Σ p / Σ 1` of all).
    pub normalize: bool,
}

impl Default for SoftWeight {
    /// `p_min` 0, since nothing is guessed here; `k` 2; pairs; shares.
    fn default() -> Self {
        Self {
            p_min: 0.0,
            k: 2.0,
            scope: Scope::default(),
            normalize: true,
        }
    }
}

impl SoftWeight {
    /// `p(v)`; a visibility outside `[0, 1]` counts as the nearer end.
    pub fn at(&self, visibility: f64) -> f64 {
        let v = visibility.clamp(0.0, 1.0);
        // The formula, written so that both ends are exact.
        let lost = (1.0 - v).powf(self.k);
        self.p_min * lost + (1.0 - lost)
    }

    pub(super) fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.p_min) {
            return Err(Error::config(
                "SoftWeight::p_min",
                "a weight of 0 to 1",
                self.p_min,
            ));
        }
        if !(self.k.is_finite() && self.k > 0.0) {
            return Err(Error::config(
                "SoftWeight::k",
                "a finite value above 0",
                self.k,
            ));
        }
        Ok(())
    }

    /// `p` of each token of view 0 or 1, one row per element; `operator` leads into that view's frame.
    pub(super) fn tokens<G: GroupAction>(
        &self,
        relative: &Relative<G>,
        view: usize,
        operator: &GridOperator,
    ) -> Result<Vec<f64>> {
        let n = operator.out_grid().len();
        let pairs = match self.scope {
            Scope::Tokens => vec![1.0; operator.samples()],
            Scope::Pairs | Scope::Both => shares(operator).iter().map(|&v| self.at(v)).collect(),
        };
        let pairs = pairs.into_iter().flat_map(|p| std::iter::repeat_n(p, n));
        if self.scope == Scope::Pairs {
            return Ok(pairs.collect());
        }
        let seen = seen(relative, view)?;
        Ok(pairs.zip(seen).map(|(p, v)| p * self.at(v)).collect())
    }
}

/// The visibility of each pair: the share of the first view's tokens that the second view sees, and the other way round.
///
/// One value per relative element. With it a [`SoftWeight`] can weigh the invariance loss of a pair too.
///
/// ```
/// use ser_reg::{TokenGrid, group::{Element, GroupAction, Window}, ser::pair_visibility, view::Relative};
/// let left_half = Element::from(Window::new(0.0, 0.0, 1.0, 0.5)?);
/// let relative = Relative::new(vec![left_half], TokenGrid::square(4)?, TokenGrid::new(4, 2)?)?;
/// assert_eq!(pair_visibility(&relative)?, [[0.5], [1.0]]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// Those of [`Relative::to_second`].
pub fn pair_visibility<G: GroupAction>(relative: &Relative<G>) -> Result<[Vec<f64>; 2]> {
    Ok([
        shares(&mask(relative, 0, 1)?),
        shares(&mask(relative, 1, 1)?),
    ])
}

/// The visibility of each token, row after row of `N` for each relative element: of the first view's tokens in the second
/// view, and the other way round.
///
/// It is the share of the token's area that lies within the other view, found at 4×4 points of it. The mask of an operator
/// asks for the token's center alone.
///
/// ```
/// use ser_reg::{TokenGrid, group::{Affine, GroupAction}, ser::token_visibility, view::Relative};
/// let grid = TokenGrid::new(1, 4)?;
/// let shift = Affine::translation(0.0, 0.125)?; // half a token to the right
/// let [first, second] = token_visibility(&Relative::new(vec![shift], grid, grid)?)?;
/// assert_eq!((first, second), (vec![1.0, 1.0, 1.0, 0.5], vec![0.5, 1.0, 1.0, 1.0]));
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If a grid of four times the rows and columns has too many cells; those of [`Relative::to_second`].
pub fn token_visibility<G: GroupAction>(relative: &Relative<G>) -> Result<[Vec<f64>; 2]> {
    Ok([seen(relative, 0)?, seen(relative, 1)?])
}

/// Points along each side of a token at which its visibility is asked for.
const POINTS: usize = 4;

/// Into the frame of view 0 or 1, at `points × points` points of each token; only its mask is read.
fn mask<G: GroupAction>(
    relative: &Relative<G>,
    view: usize,
    points: usize,
) -> Result<GridOperator> {
    let fine = |g: TokenGrid| TokenGrid::new(g.rows() * points, g.cols() * points);
    let (from, to) = (relative.from_grid(), relative.to_grid());
    let nearest = Resample::from(Filter::Nearest);
    match view {
        0 => relative.on(fine(from)?, to).to_first(&nearest),
        _ => relative.on(from, fine(to)?).to_second(&nearest),
    }
}

/// The visibility of each token of view 0 or 1.
fn seen<G: GroupAction>(relative: &Relative<G>, view: usize) -> Result<Vec<f64>> {
    let mask = mask(relative, view, POINTS)?;
    let fine = mask.out_grid();
    let (rows, cols) = (fine.rows() / POINTS, fine.cols() / POINTS);
    let mut seen = Vec::with_capacity(mask.samples() * rows * cols);
    for sample in 0..mask.samples() {
        let Some(valid) = mask.valid(sample) else {
            seen.extend(std::iter::repeat_n(1.0, rows * cols));
            continue;
        };
        for lines in valid.chunks_exact(POINTS * fine.cols()) {
            let mut counts = vec![0; cols];
            for line in lines.chunks_exact(fine.cols()) {
                for (count, points) in counts.iter_mut().zip(line.chunks_exact(POINTS)) {
                    *count += points.iter().filter(|&&p| p).count();
                }
            }
            let share = |count| count as f64 / (POINTS * POINTS) as f64;
            seen.extend(counts.into_iter().map(share));
        }
    }
    Ok(seen)
}

/// The share of valid cells of each sample.
fn shares(operator: &GridOperator) -> Vec<f64> {
    let share = |valid: Option<&[bool]>| {
        valid.map_or(1.0, |v| {
            v.iter().filter(|&&v| v).count() as f64 / v.len() as f64
        })
    };
    (0..operator.samples())
        .map(|b| share(operator.valid(b)))
        .collect()
}
