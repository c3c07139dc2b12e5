//! The orbit of an image: how much does a model's answer vary over it?

use candle_core::Tensor;

use super::{
    harness::{Harness, values},
    unit::unit,
};
use crate::{Error, GroupAction, Resample, Result, TokenGrid};

/// The invariance of a closure from images to vectors, measured over orbits.
///
/// The orbit of an image is the image and its transforms by `elements`.
///
/// ```text
/// variance     Σ_d E_x Var_g f_d(g·x) / Σ_d Var_x f_d(x)      0: invariant; about 1: a transform changes as much as another image
/// consistency  P(argmax f(g·x) = argmax f(x))                 of class scores
/// ```
///
/// Both are population variances (divided by the number of elements, of images). Source: the group
/// averages of Rath and Condurache, arXiv 2202.03967. A constant (collapsed) representation has no
/// variance to compare with, and scores NaN. Consistency is 1 at best and about 1 / classes by
/// chance; it does not say whether a class is right.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, group::D4, metric::Orbit};
///
/// let images = Tensor::randn(0f64, 1., (64, 3, 8, 8), &Device::Cpu)?;
/// let orbit = Orbit::new(TokenGrid::square(4)?);
/// let others = &D4::ALL[1..]; // the identity is there already
/// let means = orbit.measure(&images, others, |x| x.mean((2, 3)))?;
/// assert!(means.variance < 1e-20 && means.consistency == 1.);
/// let corner = orbit.measure(&images, others, |x| x.narrow(2, 0, 1)?.narrow(3, 0, 1)?.flatten_from(1))?;
/// assert!(corner.variance > 0.3 && corner.worst < 0.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Orbit {
    /// The token grid of the images; an element that scales takes it to another grid of whole
    /// tokens.
    pub grid: TokenGrid,
    /// How images are resampled where an element needs it.
    pub resample: Resample,
    /// Images per call of the closure.
    pub chunk: usize,
}

/// How a closure's vectors vary over orbits.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct OrbitReport<G> {
    /// Variance within orbits over variance between images; NaN if the images do not differ.
    pub variance: f64,
    /// Mean over the elements of the share of images whose largest entry keeps its index (the
    /// first, if there are several).
    pub consistency: f64,
    /// The share of images whose largest entry keeps its index under every element.
    pub worst: f64,
    /// The consistency of each element, in the order they were handed in.
    pub elements: Vec<(G, f64)>,
}

const OP: &str = "Orbit::measure";

impl Orbit {
    /// For images of this token grid: the default filter, 64 images at a time.
    pub fn new(grid: TokenGrid) -> Self {
        Self { grid, resample: Resample::default(), chunk: 64 }
    }

    /// Measures `map`, from images to vectors `(B, D)`, on `images` of shape `(B, C, H, W)`. It
    /// runs `1 + elements.len()` times on each.
    ///
    /// # Errors
    /// Those of `map`. If there are fewer than two images or no element, an element scales images
    /// that the grid does not divide, or the closure returns something other than finite vectors.
    pub fn measure<G: GroupAction>(
        &self,
        images: &Tensor,
        elements: &[G],
        mut map: impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<OrbitReport<G>> {
        let harness =
            Harness { op: OP, grid: self.grid, resample: &self.resample, chunk: self.chunk };
        harness.check(images, elements.len())?;
        let batch = images.dims()[0];
        if batch < 2 {
            return Err(Error::input(OP, "at least two images", batch));
        }
        let upright = harness.vectors(images, None, &mut map)?;
        let width = upright.dims()[1];
        let unit = unit(&values(&upright)?);
        let scaled = |x: &Tensor| -> Result<Vec<f64>> { values(&x.affine(unit, 0.)?) };
        let still = scaled(&upright)?;
        let classes = argmax(&still, width);
        let mut steady = vec![true; batch];
        let mut scored = Vec::with_capacity(elements.len());
        // Differences from the upright vector, which is in the orbit too: a common offset costs no
        // digits.
        let (mut sum, mut squares) = (vec![0.; still.len()], vec![0.; still.len()]);
        for g in elements {
            let mover = harness.mover(images, g)?;
            let moved = harness.vectors(images, Some(&mover), &mut map)?;
            if moved.dims() != upright.dims() {
                let expected =
                    format!("vectors {:?} for the transformed images too", upright.dims());
                return Err(Error::input(OP, expected, format!("{:?}", moved.dims())));
            }
            let moved = scaled(&moved)?;
            for (i, (x, x0)) in moved.iter().zip(&still).enumerate() {
                sum[i] += x - x0;
                squares[i] += (x - x0) * (x - x0);
            }
            let mut same = 0;
            for (b, (now, before)) in argmax(&moved, width).iter().zip(&classes).enumerate() {
                same += (now == before) as usize;
                steady[b] &= now == before;
            }
            scored.push((g.clone(), same as f64 / batch as f64));
        }
        let n = (1 + elements.len()) as f64;
        let between = match variance(&still, width) {
            0. => f64::NAN,
            between => between,
        };
        let within = sum.iter().zip(&squares).map(|(s, q)| q / n - (s / n) * (s / n));
        let within = within.sum::<f64>() / batch as f64;
        let consistency = scored.iter().map(|(_, c)| c).sum::<f64>() / elements.len() as f64;
        Ok(OrbitReport {
            variance: within.max(0.) / between,
            consistency,
            worst: steady.iter().filter(|&&s| s).count() as f64 / batch as f64,
            elements: scored,
        })
    }
}

/// The variance of the rows, summed over columns.
fn variance(x: &[f64], width: usize) -> f64 {
    let rows = (x.len() / width) as f64;
    let column = |d: usize| {
        let values = || x.iter().skip(d).step_by(width);
        let mean = values().sum::<f64>() / rows;
        let variance = values().map(|v| (v - mean) * (v - mean)).sum::<f64>() / rows;
        // rounding of the mean
        if variance <= 1e-24 * mean * mean { 0. } else { variance }
    };
    (0..width).map(column).sum()
}

/// The index of each row's largest entry, the first if there are several.
fn argmax(x: &[f64], width: usize) -> Vec<usize> {
    let of = |row: &[f64]| (1..width).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    x.chunks_exact(width).map(of).collect()
}
