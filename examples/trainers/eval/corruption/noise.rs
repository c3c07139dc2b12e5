//! Noise that is drawn for each pixel on its own.

use rand::{Rng, rngs::StdRng};
use rand_distr::{Distribution, Poisson, StandardNormal};

use super::Picture;

pub fn gaussian_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let sigma = match small {
        true => [0.04, 0.06, 0.08, 0.09, 0.10],
        false => [0.08, 0.12, 0.18, 0.26, 0.38],
    };
    gaussian(x, sigma[level], rng);
}

pub fn shot_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let photons = match small {
        true => [500.0, 250.0, 100.0, 75.0, 50.0],
        false => [60.0, 25.0, 12.0, 5.0, 3.0],
    };
    shot(x, photons[level], rng);
}

/// A fraction of the values becomes 0 or 1.
pub fn impulse_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let fraction = match small {
        true => [0.01, 0.02, 0.03, 0.05, 0.07],
        false => [0.03, 0.06, 0.09, 0.17, 0.27],
    };
    for p in &mut x.pixels {
        let (hit, salt) = (rng.random::<f64>() < fraction[level], rng.random::<bool>());
        if hit {
            *p = if salt { 1.0 } else { 0.0 };
        }
    }
}

/// `x + σ·ε`, not yet clipped.
pub fn gaussian(x: &mut Picture, sigma: f32, rng: &mut StdRng) {
    for p in &mut x.pixels {
        let noise: f32 = StandardNormal.sample(rng);
        *p += sigma * noise;
    }
}

/// The number of photons that arrive where `photons` would from a white pixel.
pub fn shot(x: &mut Picture, photons: f64, rng: &mut StdRng) {
    for p in &mut x.pixels {
        // A black pixel sends none, and has no distribution.
        *p =
            Poisson::new(f64::from(*p) * photons).map_or(0.0, |d| (d.sample(rng) / photons) as f32);
    }
}
