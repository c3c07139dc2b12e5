//! Blurs: out of focus, through frosted glass, in motion, while zooming.

use rand::{Rng, rngs::StdRng};

use super::{Picture, picture::Edge};

/// A disk, whose own steps a small Gaussian smoothes.
pub fn defocus_at(x: &mut Picture, level: usize, small: bool) {
    let (radius, alias) = match small {
        true => [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)],
        false => [(3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)],
    }[level];
    *x = x.filtered(&disk(radius, alias), Edge::Mirror);
}

fn disk(radius: f32, alias: f32) -> Vec<(i64, i64, f32)> {
    let half = if radius <= 8.0 { 8 } else { radius as i64 };
    let side = (2 * half + 1) as usize;
    let place = |i: usize| ((i / side) as i64 - half, (i % side) as i64 - half);
    let mut kernel = Picture::plane(side, 0.0);
    for (i, p) in kernel.pixels.iter_mut().enumerate() {
        let (y, x) = place(i);
        *p = f32::from(((y * y + x * x) as f32) <= radius * radius);
    }
    // Their filter of 3 taps, or 5 for large disks.
    let reach = if radius <= 8.0 { 1.0 } else { 2.0 };
    let kernel = kernel.blurred(alias, reach / alias, Edge::Mirror);
    let total: f32 = kernel.pixels.iter().sum();
    let taps = kernel.pixels.iter().enumerate();
    taps.filter(|(_, p)| **p > 1e-6 * total)
        .map(|(i, p)| (place(i).0, place(i).1, p / total))
        .collect()
}

/// Blurred, then pixels change places with others nearby, then blurred again.
pub fn glass_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let (sigma, reach, rounds) = match small {
        true => [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        false => [(0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    }[level];
    let mut y = x.blurred(sigma, 4.0, Edge::Nearest);
    let (side, area) = (x.side, x.side * x.side);
    for _ in 0..rounds {
        for row in (reach + 1..(side + 1).saturating_sub(reach)).rev() {
            for col in (reach + 1..(side + 1).saturating_sub(reach)).rev() {
                let r = row + rng.random_range(0..2 * reach) - reach;
                let c = col + rng.random_range(0..2 * reach) - reach;
                for plane in 0..x.channels {
                    let start = plane * area;
                    y.pixels.swap(start + row * side + col, start + r * side + c);
                }
            }
        }
    }
    *x = y.blurred(sigma, 4.0, Edge::Nearest);
}

pub fn motion_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    let (radius, sigma) = match small {
        true => [(6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)],
        false => [(10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)],
    }[level];
    let angle = rng.random_range(-45.0..45.0);
    *x = motion(x, radius, sigma, angle);
}

/// Smeared along a line that begins at each pixel: half a Gaussian, `2·radius + 1` long, at `degrees`.
pub fn motion(x: &Picture, radius: usize, sigma: f32, degrees: f32) -> Picture {
    let (sin, cos) = degrees.to_radians().sin_cos();
    let tap = |i: usize| {
        let i = i as f32;
        let weight = (-0.5 * (i / sigma).powi(2)).exp();
        ((i * sin).round() as i64, (i * cos).round() as i64, weight)
    };
    let mut taps: Vec<_> = (0..=2 * radius).map(tap).collect();
    let total: f32 = taps.iter().map(|t| t.2).sum();
    taps.iter_mut().for_each(|t| t.2 /= total);
    x.filtered(&taps, Edge::Nearest)
}

/// The mean of the image and of magnified copies.
pub fn zoom_at(x: &mut Picture, level: usize, small: bool) {
    let (end, step) = match small {
        true => [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        false => [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    }[level];
    let copies = ((end - 1.0) / step - 1e-3f32).ceil() as usize;
    let mut total = x.pixels.clone();
    for i in 0..copies {
        let zoomed = x.zoomed(1.0 + i as f32 * step, Edge::Nearest);
        for (t, p) in total.iter_mut().zip(zoomed.pixels) {
            *t += p;
        }
    }
    for (p, t) in x.pixels.iter_mut().zip(total) {
        *p = t / (copies + 1) as f32;
    }
}
