//! Whether tokens match between two poses of an image.
//!
//! Each pose has colors of its own. Mutual nearest neighbors among the tokens of one block are the matches; from the matches
//! follows the relative pose.

pub mod nearest;
pub mod pairs;
pub mod registration;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use ser_reg::{Filter, GridOperator, Resample, TokenGrid, group::Affine};
use serde::{Deserialize, Serialize};

use self::pairs::{Kind, Pair, distance, place};
use super::{
    border::Border,
    corruption::{Picture, generator, picture},
    features::{self, patches},
    subject::Subject,
};
use crate::{
    augment::Photometric,
    data::Images,
    nn::{mean_row, normalize},
};

/// Images that go through the encoder at a time.
const CHUNK: usize = 50;
/// Mean error of an estimated pose, in tokens, up to which it is right.
const RIGHT: f64 = 0.5;

/// How many test images, and which block.
#[derive(Clone, Debug)]
pub struct Options {
    /// Test images, drawn by class.
    pub images: usize,
    /// The block whose tokens are matched, counted from 1; `None`: the one with the equivariance loss.
    pub layer: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self { images: 200, layer: None }
    }
}

/// Values in percent, of each kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Matching {
    /// Test images, drawn by class; each has one pair of poses of each kind.
    pub images: usize,
    pub layer: usize,
    /// Rows, and columns, of the token grid.
    pub grid: usize,
    /// The last row has random tokens: chance.
    pub rows: Vec<Row>,
}

/// Values in percent of one kind of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub features: String,
    /// Poses that differ by an element of D4.
    pub d4: Score,
    /// Poses that differ by a rotation by any angle, a scale and a shift.
    pub similarity: Score,
}

/// How matches and poses of one kind fare, in percent. A token counts if both poses show its place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Matches with the cell that shows the same place; 0 without matches.
    pub exact: f64,
    /// Matches at most one cell away from that place.
    pub near: f64,
    /// Tokens that have a mutual match.
    pub matched: f64,
    /// Pairs whose relative pose is estimated within half a token, on average over the tokens.
    pub registered: f64,
}

/// One pair of views of each image.
struct Views {
    kind: Kind,
    pairs: Vec<Pair>,
    /// `(n, C, S, S)` of either pose.
    x: [Tensor; 2],
}

/// Scores each of `subjects`, the patches of pixels if `raw`, and random tokens.
pub fn measure(
    subjects: &[&Subject],
    raw: bool,
    test: &Images,
    border: Border,
    options: &Options,
    seed: u64,
    mut done: impl FnMut(),
) -> Result<Matching> {
    let first = subjects.first().context("expected an encoder, got none")?;
    let config = &first.card.vit;
    let layer = first.layer(options.layer)?;
    ensure!(
        options.images > 0 && !test.is_empty(),
        "expected at least one test image to match, got {} of {}",
        options.images,
        test.len()
    );
    ensure!(
        config.grid() > 1,
        "matching: expected an encoder with more than one token, got a grid of {0} x {0}",
        config.grid()
    );
    let grid = TokenGrid::square(config.grid())?;
    let indices = test.drawn(options.images);
    let views = [Kind::D4, Kind::Similarity]
        .map(|kind| views(kind, first, test, &indices, border, seed))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    let mut add = |name: &str, encode: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<()> {
        let score = |views: &Views| {
            let [a, b] = &views.x;
            score(
                views.kind,
                &views.pairs,
                [&features::chunked(a, CHUNK, encode)?, &features::chunked(b, CHUNK, encode)?],
                grid,
                seed,
            )
        };
        let (d4, similarity) = (score(&views[0])?, score(&views[1])?);
        rows.push(Row { features: name.to_string(), d4, similarity });
        done();
        Ok(())
    };
    for subject in subjects {
        let vit = subject.at_side(config.side)?;
        add(&subject.name, &|x| subject.tokens(&vit, x, layer))?;
    }
    if raw {
        add("raw patches", &|x| patches(x, config.patch))?;
    }
    let rng = std::cell::RefCell::new(generator(seed, 303, 0));
    add("chance", &|x| {
        let shape = (x.dim(0)?, grid.len(), config.dim);
        let rng = &mut *rng.borrow_mut();
        let values = (0..shape.0 * shape.1 * shape.2).map(|_| rng.sample(StandardNormal));
        Ok(Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)?)
    })?;
    Ok(Matching { images: indices.len(), layer, grid: config.grid(), rows })
}

/// Both poses of each image, each in colors of its own.
fn views(
    kind: Kind,
    subject: &Subject,
    test: &Images,
    indices: &[usize],
    border: Border,
    seed: u64,
) -> Result<Views> {
    let stream = 300 + kind as u64;
    let draw = |&i: &usize| -> Result<(Pair, [Picture; 2])> {
        let rng = &mut generator(seed, stream, i as u64);
        let pair = Pair::draw(kind, rng)?;
        let colored = [(); 2].map(|()| {
            let mut picture = Picture::of(test, i);
            Photometric::small().apply(&mut picture.pixels, picture.side, rng);
            picture
        });
        Ok((pair, colored))
    };
    let drawn: Vec<(Pair, [Picture; 2])> = indices.par_iter().map(draw).collect::<Result<_>>()?;
    let (pairs, pictures): (Vec<Pair>, Vec<[Picture; 2]>) = drawn.into_iter().unzip();
    let resample = Resample { filter: Filter::Bilinear, padding: border.padding() };
    let pixels = TokenGrid::square(test.side)?;
    let (statistics, device) = (&subject.card.statistics, &subject.device);
    let pose = |side: usize, element: fn(&Pair) -> Affine| -> Result<Tensor> {
        let pictures: Vec<Picture> = pictures.iter().map(|p| p[side].clone()).collect();
        let elements: Vec<Affine> = pairs.iter().map(element).collect();
        let operator = GridOperator::new(&elements, pixels, &resample)?;
        border.moved(&operator, &picture::normalized(&pictures, statistics, device)?, statistics)
    };
    let x = [pose(0, |pair| pair.first)?, pose(1, |pair| pair.second)?];
    Ok(Views { kind, pairs, x })
}

/// Scores the token maps `(n, N, d)` of both poses of `n` images.
pub fn score(
    kind: Kind,
    pairs: &[Pair],
    maps: [&Tensor; 2],
    grid: TokenGrid,
    seed: u64,
) -> Result<Score> {
    let both = Tensor::cat(&maps, 0)?.to_device(&Device::Cpu)?;
    ensure!(
        both.rank() == 3 && both.dim(0)? == 2 * pairs.len() && both.dim(1)? == grid.len(),
        "expected two token maps ({}, {}, d), got {:?} and {:?}",
        pairs.len(),
        grid.len(),
        maps[0].dims(),
        maps[1].dims()
    );
    let unit = normalize(&both.broadcast_sub(&mean_row(&both.flatten_to(1)?)?)?)?;
    let half = |i: usize| unit.narrow(0, i * pairs.len(), pairs.len());
    let cosines = half(0)?.matmul(&half(1)?.transpose(1, 2)?.contiguous()?)?;
    let cosines: Vec<f32> = cosines.flatten_all()?.to_vec1()?;
    let area = grid.len() * grid.len();
    let judge = |(i, (pair, cosines)): (usize, (&Pair, &[f32]))| -> Result<[usize; 5]> {
        let matches = nearest::mutual(cosines, grid.len());
        let targets = pair.targets(grid)?;
        let shown: Vec<usize> = (0..grid.len()).filter(|&t| targets[t].is_some()).collect();
        let apart = |&(from, to): &nearest::Match| {
            targets[from].map(|target| {
                let [y, x] = target.map(f64::round);
                ([y, x] == place(to, grid), distance(target, place(to, grid)))
            })
        };
        let judged: Vec<(bool, f64)> = matches.iter().filter_map(apart).collect();
        let estimated = match kind {
            Kind::D4 => registration::vote(&matches, grid)?,
            Kind::Similarity => {
                registration::similarity(&matches, grid, &mut generator(seed, 302, i as u64))?
            }
        };
        let truth = pair.relative();
        let right = |g: Affine| registration::error(&g, &truth, &shown, grid) <= RIGHT;
        Ok([
            judged.iter().filter(|m| m.0).count(),
            // A little more than 1, for rounding.
            judged.iter().filter(|m| m.1 <= 1.0 + 1e-9).count(),
            judged.len(),
            shown.len(),
            usize::from(estimated.is_some_and(right)),
        ])
    };
    let counts: Vec<[usize; 5]> = pairs
        .par_iter()
        .zip(cosines.par_chunks_exact(area))
        .enumerate()
        .map(judge)
        .collect::<Result<_>>()?;
    let sum = |k: usize| counts.iter().map(|c| c[k]).sum::<usize>();
    let percent = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
    Ok(Score {
        exact: percent(sum(0), sum(2)),
        near: percent(sum(1), sum(2)),
        matched: percent(sum(2), sum(3)),
        registered: percent(sum(4), pairs.len()),
    })
}
