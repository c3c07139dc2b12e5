//! Two poses of one image, and where the tokens of the first are in the second.

use anyhow::Result;
use rand::{Rng, rngs::StdRng};
use ser_reg::{
    GridOperator, Resample, TokenGrid,
    group::{Affine, D4, GroupAction, Point},
};

/// How two poses of an image differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By an element of D4 other than the identity.
    D4,
    /// By a rotation, a scale from 0.8 to 1.25 and a shift of an eighth of the image at most.
    Similarity,
}

/// The elements of both poses.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub first: Affine,
    pub second: Affine,
}

const SCALE: f64 = 1.25;
const SHIFT: f64 = 0.125;

impl Pair {
    /// Draws a pair. The first pose is an element of D4.
    pub fn draw(kind: Kind, rng: &mut StdRng) -> Result<Self> {
        let first = Affine::from(D4::ALL[rng.random_range(0..8)]);
        let relative = match kind {
            Kind::D4 => Affine::from(D4::ALL[rng.random_range(1..8)]),
            Kind::Similarity => {
                let turn = Affine::rotation(rng.random_range(-180.0..180.0))?;
                let scale = f64::exp(SCALE.ln() * rng.random_range(-1.0..=1.0));
                let mut shift = || rng.random_range(-SHIFT..=SHIFT);
                let moved = Affine::translation(shift(), shift())?;
                moved.compose(&Affine::zoom(scale, scale)?).compose(&turn)
            }
        };
        Ok(Self { second: relative.compose(&first), first })
    }

    /// The element that carries the first pose into the second.
    pub fn relative(&self) -> Affine {
        Affine::relative(&self.first, &self.second)
    }

    /// For each token of the first pose the point of the second, in cells, that shows the same place of the image; `None` where
    /// one of the poses does not show it.
    pub fn targets(&self, grid: TokenGrid) -> Result<Vec<Option<Point>>> {
        let relative = self.relative();
        // A cell of the first pose is valid if the image has such a place, and if the second pose shows it.
        let operator = |g: &Affine| GridOperator::new(&[*g], grid, &Resample::default());
        let (own, other) = (operator(&self.first)?, operator(&relative.inverse())?);
        let masks = [own.valid(0)?, other.valid(0)?];
        let valid = |token: usize| masks.iter().flatten().all(|mask| mask[token]);
        let target = |token| valid(token).then(|| apply(&relative, token, grid));
        Ok((0..grid.len()).map(target).collect())
    }
}

/// Where `g` takes the center of a token, in cells: the center of the first cell is (0, 0).
pub fn apply(g: &Affine, token: usize, grid: TokenGrid) -> Point {
    let (rows, cols) = (grid.rows() as f64, grid.cols() as f64);
    let [row, col] = place(token, grid);
    let [y, x] = g.inverse().source([(row + 0.5) / rows, (col + 0.5) / cols]);
    [y * rows - 0.5, x * cols - 0.5]
}

/// Row and column of a token.
pub fn place(token: usize, grid: TokenGrid) -> Point {
    [(token / grid.cols()) as f64, (token % grid.cols()) as f64]
}

/// The distance of two points.
pub fn distance(a: Point, b: Point) -> f64 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}
