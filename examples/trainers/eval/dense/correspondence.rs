//! Whether tokens match: for each token of a canvas, the nearest token of the rotated or flipped canvas.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use rayon::prelude::*;
use ser_reg::{GridOperator, Resample, TokenGrid};
use serde::{Deserialize, Serialize};

use crate::{
    eval::watch::POSES,
    nn::{mean_row, normalize},
};

/// Percentages of tokens of objects, mean over the seven elements of D4 that are not the identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Correspondence {
    /// Matches at most one token away from the true counterpart: the correct keypoints, PCK@1.
    pub pck1: f64,
    /// Matches with the counterpart itself.
    pub exact: f64,
    /// PCK@1 under each element.
    pub poses: Vec<(String, f64)>,
    /// PCK@1 of matches drawn at random.
    pub chance: f64,
}

/// Matches the tokens of `images (B, C, S, S)` for which `asked` (a value for each token) with those of turned images, by
/// the cosine of tokens less the mean token of either side.
pub fn measure(
    images: &Tensor,
    asked: &[bool],
    grid: usize,
    encode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Correspondence> {
    let (batch, _, side, _) = images.dims4()?;
    let area = grid * grid;
    ensure!(
        asked.len() == batch * area && asked.contains(&true),
        "expected to be asked for some of {batch} x {area} tokens, got {} of {}",
        asked.iter().filter(|a| **a).count(),
        asked.len()
    );
    let token_grid = TokenGrid::square(grid)?;
    let pixel_grid = TokenGrid::square(side)?;
    let queries = unit(&encode(images)?)?;
    let (mut poses, mut total) = (Vec::new(), [0; 4]);
    for (name, g) in &POSES[1..] {
        let turned = GridOperator::new(&[*g], pixel_grid, &Resample::default())?.apply(images)?;
        let keys = unit(&encode(&turned)?)?;
        // A transformed cell holds the index of the cell that it came from: this gives the target of token `p`.
        let mut goes = vec![0; area];
        for (to, from) in g.source_indices(token_grid).into_iter().enumerate() {
            goes[from as usize] = to;
        }
        let cosines = queries.matmul(&keys.t()?.contiguous()?)?;
        let cosines: Vec<f32> = cosines.flatten_all()?.to_vec1()?;
        let hits = cosines.par_chunks_exact(area).zip(asked).enumerate();
        let judge = |(i, (row, asked)): (usize, (&[f32], &bool))| {
            if !asked {
                return [0usize; 4];
            }
            let best = (0..area).rev().max_by(|&a, &b| row[a].total_cmp(&row[b]));
            let (truth, best) = (goes[i % area], best.unwrap_or(0));
            let near = (0..area).filter(|&p| distance(p, truth, grid) <= 1).count();
            let hit = distance(best, truth, grid) <= 1;
            [1, usize::from(hit), usize::from(best == truth), near]
        };
        let add = |a: [usize; 4], b: [usize; 4]| std::array::from_fn(|i| a[i] + b[i]);
        let counts = hits.map(judge).reduce(|| [0; 4], add);
        poses.push((name.to_string(), percent(counts[1], counts[0])));
        total = add(total, counts);
    }
    // Every element has the same number of tokens, so the mean over elements is the mean over all tokens.
    let [count, near, same, possible] = total;
    Ok(Correspondence {
        pck1: percent(near, count),
        exact: percent(same, count),
        poses,
        chance: percent(possible, area * count),
    })
}

fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole as f64
}

/// Squared distance of two tokens.
fn distance(a: usize, b: usize, grid: usize) -> usize {
    (a / grid).abs_diff(b / grid).pow(2) + (a % grid).abs_diff(b % grid).pow(2)
}

fn unit(map: &Tensor) -> Result<Tensor> {
    let mean = mean_row(&map.flatten_to(1)?)?;
    Ok(normalize(&map.broadcast_sub(&mean)?)?)
}
