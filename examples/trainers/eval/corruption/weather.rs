//! Snow, frost and fog.

use rand::{Rng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

use super::{Picture, blur, picture::Edge};

/// Flakes from thresholded noise, smeared as they fall, and the image made paler.
pub fn snow_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    // Mean and deviation of the noise, its magnification and threshold, radius and sigma of the fall, weight of the image.
    let (mean, std, zoom, threshold, radius, sigma, weight) = match small {
        true => [
            (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
        ],
        false => [
            (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
            (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
            (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
        ],
    }[level];
    let mut flakes = Picture::plane(x.side, 0.0);
    for p in &mut flakes.pixels {
        let noise: f32 = StandardNormal.sample(rng);
        *p = mean + std * noise;
    }
    let mut flakes = flakes.zoomed(zoom, Edge::Nearest);
    for p in &mut flakes.pixels {
        *p = if *p < threshold { 0.0 } else { p.clamp(0.0, 1.0) };
    }
    let flakes = blur::motion(&flakes, radius, sigma, rng.random_range(-135.0..-45.0)).pixels;
    let gray = x.gray();
    let area = gray.len();
    for plane in x.planes_mut() {
        for (i, p) in plane.iter_mut().enumerate() {
            let pale = p.max(1.5 * gray[i] + 0.5);
            // The same flakes once more, half a turn away.
            *p = weight * *p + (1.0 - weight) * pale + flakes[i] + flakes[area - 1 - i];
        }
    }
}

/// Crystals over the image; drawn, not photographed.
pub fn frost_like_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let (weight, ice) = match small {
        true => [(1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        false => [(1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    }[level];
    let frost = crystals(x.side, rng);
    // Ice is a little blue.
    let tints: &[f32] = if x.channels == 3 { &[0.9, 0.97, 1.0] } else { &[1.0] };
    for (plane, tint) in x.planes_mut().zip(tints.iter().cycle()) {
        for (p, f) in plane.iter_mut().zip(&frost) {
            *p = weight * *p + ice * tint * f;
        }
    }
}

/// Needles with side branches on veined ice, in `[0, 1]`.
fn crystals(side: usize, rng: &mut StdRng) -> Vec<f32> {
    let veins = plasma(side, 1.8, rng);
    let mut frost: Vec<f32> =
        veins.iter().map(|v| 0.2 + 0.5 * (1.0 - (2.0 * v - 1.0).abs()).powi(2)).collect();
    let size = side as f32;
    let mut needle = |y: f32, x: f32, angle: f32, length: f32, light: f32| {
        for i in 0..(2.0 * length) as usize {
            let t = i as f32 / 2.0;
            let (y, x) = (y + t * angle.sin(), x + t * angle.cos());
            if (0.0..size).contains(&y) && (0.0..size).contains(&x) {
                let p = &mut frost[y as usize * side + x as usize];
                *p = p.max(light * (1.0 - 0.6 * t / length));
            }
        }
    };
    for _ in 0..3 + side / 32 {
        let (y, x) = (rng.random::<f32>() * size, rng.random::<f32>() * size);
        let turn = rng.random_range(0.0..std::f32::consts::PI);
        let length = size * rng.random_range(0.2..0.45);
        for arm in 0..6 {
            let angle = turn + arm as f32 * std::f32::consts::FRAC_PI_3;
            needle(y, x, angle, length, 1.0);
            for branch in [0.35, 0.6, 0.8] {
                let (y, x) = (y + branch * length * angle.sin(), x + branch * length * angle.cos());
                for bend in [-std::f32::consts::FRAC_PI_3, std::f32::consts::FRAC_PI_3] {
                    needle(y, x, angle + bend, 0.4 * length * (1.0 - branch), 0.85);
                }
            }
        }
    }
    frost
}

/// Clouds between the camera and the scene.
pub fn fog_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let (amount, decay) = match small {
        true => [(0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)],
        false => [(1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)],
    }[level];
    let clouds = plasma(x.side, decay, rng);
    let brightest = x.pixels.iter().fold(0f32, |a, &b| a.max(b));
    for plane in x.planes_mut() {
        for (p, cloud) in plane.iter_mut().zip(&clouds) {
            *p = (*p + amount * cloud) * brightest / (brightest + amount);
        }
    }
}

/// A plasma fractal in `[0, 1]` by diamonds and squares on a torus; from one scale to the next, noise falls by the square of
/// `decay`.
pub fn plasma(side: usize, decay: f32, rng: &mut StdRng) -> Vec<f32> {
    let size = side.next_power_of_two().max(2);
    let mut map = vec![0f32; size * size];
    let (mut step, mut noise) = (size, 1f32);
    while step >= 2 {
        let half = step / 2;
        let at = |map: &[f32], row: usize, col: usize| map[row % size * size + col % size];
        // The center of each square, from its corners.
        for row in (0..size).step_by(step) {
            for col in (0..size).step_by(step) {
                let corners = at(&map, row, col)
                    + at(&map, row + step, col)
                    + at(&map, row, col + step)
                    + at(&map, row + step, col + step);
                map[(row + half) * size + col + half] =
                    corners / 4.0 + noise * rng.random_range(-1.0..1.0);
            }
        }
        // The center of each edge, from its ends and the two centers beside it.
        for row in (0..size).step_by(half) {
            let first = if (row / half).is_multiple_of(2) { half } else { 0 };
            for col in (first..size).step_by(step) {
                let around = at(&map, row + half, col)
                    + at(&map, row + size - half, col)
                    + at(&map, row, col + half)
                    + at(&map, row, col + size - half);
                map[row * size + col] = around / 4.0 + noise * rng.random_range(-1.0..1.0);
            }
        }
        step = half;
        noise /= decay * decay;
    }
    let low = map.iter().fold(f32::INFINITY, |a, &b| a.min(b));
    let high = map.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let scale = 1.0 / (high - low).max(f32::MIN_POSITIVE);
    let cut = (0..side * side).map(|i| map[i / side * size + i % side]);
    cut.map(|v| (v - low) * scale).collect()
}
