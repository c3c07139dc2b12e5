//! The relative pose of two images, estimated from matches of their tokens.

use std::collections::HashMap;

use anyhow::Result;
use nalgebra::Complex;
use rand::{Rng, rngs::StdRng};
use ser_reg::{
    TokenGrid,
    group::{Affine, D4, GroupAction},
};

use super::{
    nearest::Match,
    pairs::{apply, distance, place},
};

/// Pairs of matches that are tried.
const TRIES: usize = 300;
/// Distance in cells from where a pose takes a token up to which a match supports the pose.
const NEAR: f64 = 1.0;
/// Least-squares fits to the matches that support the pose.
const FITS: usize = 5;

/// The element of D4 with a shift by whole cells that most matches support; `None` without matches.
pub fn vote(matches: &[Match], grid: TokenGrid) -> Result<Option<Affine>> {
    let mut best: Option<(usize, D4, [i64; 2])> = None;
    for g in D4::ALL {
        let element = Affine::from(g);
        let mut votes: HashMap<[i64; 2], usize> = HashMap::new();
        for &(from, to) in matches {
            let ([row, col], [y, x]) = (place(to, grid), apply(&element, from, grid));
            *votes.entry([row - y, col - x].map(|v| v.round() as i64)).or_default() += 1;
        }
        // Of equals the smallest shift, so that the order of the map does not matter.
        let size = |[dy, dx]: [i64; 2]| (dy * dy + dx * dx, dy, dx);
        let top = votes.into_iter().max_by_key(|&(s, n)| (n, std::cmp::Reverse(size(s))));
        if let Some((shift, votes)) = top
            && best.is_none_or(|(most, ..)| votes > most)
        {
            best = Some((votes, g, shift));
        }
    }
    let Some((_, g, [dy, dx])) = best else {
        return Ok(None);
    };
    let shift =
        Affine::translation(dy as f64 / grid.rows() as f64, dx as f64 / grid.cols() as f64)?;
    Ok(Some(shift.compose(&Affine::from(g))))
}

/// The rotation, scale and shift that fits the matches of a square grid best: by random samples of two matches (RANSAC), then by
/// least squares over the matches that support it. `None` if no two matches tell a pose.
pub fn similarity(matches: &[Match], grid: TokenGrid, rng: &mut StdRng) -> Result<Option<Affine>> {
    // Relative to the center of the image, so that a turn about it is a product.
    let center = [grid.rows() as f64, grid.cols() as f64].map(|n| (n - 1.0) / 2.0);
    let point = |token: usize| {
        let [row, col] = place(token, grid);
        Complex::new(row - center[0], col - center[1])
    };
    let points: Vec<(Complex<f64>, Complex<f64>)> =
        matches.iter().map(|&(from, to)| (point(from), point(to))).collect();
    if points.len() < 2 {
        return Ok(None);
    }
    let supporters = |pose: &Pose| -> Vec<usize> {
        let near = |i: &usize| (pose.apply(points[*i].0) - points[*i].1).norm() <= NEAR;
        (0..points.len()).filter(near).collect()
    };
    let mut best: Option<(Vec<usize>, Pose)> = None;
    for _ in 0..TRIES {
        let (i, j) = (rng.random_range(0..points.len()), rng.random_range(0..points.len()));
        let Some(pose) = Pose::fit(&[points[i], points[j]]) else {
            continue;
        };
        let support = supporters(&pose);
        if best.as_ref().is_none_or(|(most, _)| support.len() > most.len()) {
            best = Some((support, pose));
        }
    }
    let Some((mut support, mut pose)) = best else {
        return Ok(None);
    };
    for _ in 0..FITS {
        let chosen: Vec<_> = support.iter().map(|&i| points[i]).collect();
        let Some(fitted) = Pose::fit(&chosen) else {
            break;
        };
        (support, pose) = (supporters(&fitted), fitted);
    }
    let (a, shift) = (pose.factor, pose.shift);
    let cells = grid.rows() as f64;
    let element = Affine::new([[a.re, -a.im], [a.im, a.re]], [shift.re / cells, shift.im / cells])?;
    Ok(Some(element))
}

/// `p ↦ factor·p + shift` on points `y + ix`: the factor turns and scales.
#[derive(Clone, Copy)]
struct Pose {
    factor: Complex<f64>,
    shift: Complex<f64>,
}

impl Pose {
    /// The least-squares fit; `None` if all points are one, before or after.
    fn fit(points: &[(Complex<f64>, Complex<f64>)]) -> Option<Self> {
        let n = points.len() as f64;
        let from = points.iter().map(|p| p.0).sum::<Complex<f64>>() / n;
        let to = points.iter().map(|p| p.1).sum::<Complex<f64>>() / n;
        let spread: f64 = points.iter().map(|p| (p.0 - from).norm_sqr()).sum();
        let product: Complex<f64> = points.iter().map(|p| (p.0 - from).conj() * (p.1 - to)).sum();
        if !(spread > 1e-9 && product.norm() > 1e-9) {
            return None;
        }
        let factor = product / spread;
        Some(Self { factor, shift: to - factor * from })
    }

    fn apply(&self, p: Complex<f64>) -> Complex<f64> {
        self.factor * p + self.shift
    }
}

/// The mean distance, in cells, between where two elements take the `tokens`.
pub fn error(estimated: &Affine, truth: &Affine, tokens: &[usize], grid: TokenGrid) -> f64 {
    let apart = |&t: &usize| distance(apply(estimated, t, grid), apply(truth, t, grid));
    tokens.iter().map(apart).sum::<f64>() / tokens.len() as f64
}
