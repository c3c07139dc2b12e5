//! Brightness, contrast, elastic bending, coarse pixels, JPEG.

use image::{DynamicImage, ExtendedColorType, ImageFormat, codecs::jpeg::JpegEncoder};
use rand::{Rng, rngs::StdRng};

use super::{Picture, picture::Edge};

pub fn brightness_at(x: &mut Picture, level: usize, small: bool) {
    let amount = match small {
        true => [0.05, 0.1, 0.15, 0.2, 0.3],
        false => [0.1, 0.2, 0.3, 0.4, 0.5],
    };
    brighten(x, amount[level]);
}

/// Adds to the value of hue, saturation and value.
pub fn brighten(x: &mut Picture, amount: f32) {
    let area = x.side * x.side;
    for i in 0..area {
        let pixel = (0..x.channels).map(|c| x.pixels[c * area + i]);
        let value = pixel.fold(0f32, f32::max);
        let new = (value + amount).clamp(0.0, 1.0);
        for c in 0..x.channels {
            let p = &mut x.pixels[c * area + i];
            // Black has no hue: it becomes gray.
            *p = if value > 0.0 { *p * (new / value) } else { new };
        }
    }
}

/// Each channel is drawn towards its mean.
pub fn contrast_at(x: &mut Picture, level: usize, small: bool) {
    let factor = match small {
        true => [0.75, 0.5, 0.4, 0.3, 0.15],
        false => [0.4, 0.3, 0.2, 0.1, 0.05],
    }[level];
    for plane in x.planes_mut() {
        let mean = plane.iter().sum::<f32>() / plane.len() as f32;
        plane.iter_mut().for_each(|p| *p = mean + factor * (*p - mean));
    }
}

/// A random affine map, then a smooth random displacement of each pixel.
pub fn elastic_at(x: &mut Picture, level: usize, small: bool, rng: &mut StdRng) {
    // Strength and smoothness of the displacement, and of the affine map, in sides.
    let (alpha, sigma, affine) = match small {
        true => [
            (0.0, 0.0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ],
        // Theirs are multiples of 244 on images of 224 pixels.
        false => [
            (2.0, 0.7, 0.1),
            (2.0, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        ]
        .map(|(a, s, f)| (a * 244.0 / 224.0, s * 244.0 / 224.0, f * 244.0 / 224.0)),
    }[level];
    let side = x.side as f32;
    let jitter = |rng: &mut StdRng| (2.0 * rng.random::<f32>() - 1.0) * affine * side;
    let (center, arm) = ((x.side / 2) as f32, (x.side / 3) as f32);
    // Three corners `(y, x)` of a square go to jittered places; the linear map between them, from new to old.
    let corners = [(arm, arm), (-arm, arm), (-arm, -arm)];
    let moved = corners.map(|(y, x)| (y + jitter(rng), x + jitter(rng)));
    let map = Affine::between(moved, corners);
    let bent = x.warp(Edge::Mirror, |row, col| {
        let (y, x) = map.apply((row - center, col - center));
        (center + y, center + x)
    });
    let smooth = |rng: &mut StdRng| {
        let mut plane = Picture::plane(x.side, 0.0);
        plane.pixels.iter_mut().for_each(|p| *p = 2.0 * rng.random::<f32>() - 1.0);
        plane.blurred(sigma * side, 3.0, Edge::Reflect).pixels
    };
    let (down, right) = (smooth(rng), smooth(rng));
    let at = |row: f32, col: f32| row as usize * x.side + col as usize;
    *x = bent.warp(Edge::Reflect, |row, col| {
        let i = at(row, col);
        (row + alpha * side * down[i], col + alpha * side * right[i])
    });
}

/// A map of the plane, points as `(y, x)`.
struct Affine {
    columns: [(f32, f32); 2],
    from: (f32, f32),
    to: (f32, f32),
}

impl Affine {
    /// The one that takes three points to three others; the identity where the first three lie on a line.
    fn between(from: [(f32, f32); 3], to: [(f32, f32); 3]) -> Self {
        let sides = |p: [(f32, f32); 3]| [1, 2].map(|i| (p[i].0 - p[0].0, p[i].1 - p[0].1));
        let ([a, b], [c, d]) = (sides(from), sides(to));
        let det = a.0 * b.1 - a.1 * b.0;
        let columns = match det.abs() > 1e-3 {
            true => [
                ((c.0 * b.1 - d.0 * a.1) / det, (c.1 * b.1 - d.1 * a.1) / det),
                ((d.0 * a.0 - c.0 * b.0) / det, (d.1 * a.0 - c.1 * b.0) / det),
            ],
            false => [(1.0, 0.0), (0.0, 1.0)],
        };
        let (from, to) = (from[0], to[0]);
        Self { columns, from, to }
    }

    fn apply(&self, (y, x): (f32, f32)) -> (f32, f32) {
        let (y, x) = (y - self.from.0, x - self.from.1);
        let [first, second] = self.columns;
        (self.to.0 + first.0 * y + second.0 * x, self.to.1 + first.1 * y + second.1 * x)
    }
}

/// Resized to fewer pixels and back, each time by means of whole pixels.
pub fn pixelate_at(x: &mut Picture, level: usize, small: bool) {
    let factor = match small {
        true => [0.95, 0.9, 0.85, 0.75, 0.65],
        false => [0.6, 0.5, 0.4, 0.3, 0.25],
    }[level];
    let (side, coarse) = (x.side, ((x.side as f32 * factor) as usize).max(1));
    let (down, up) = (boxes(side, coarse), boxes(coarse, side));
    for plane in x.planes_mut() {
        let small = mean_of_boxes(plane, side, &down);
        plane.copy_from_slice(&mean_of_boxes(&small, coarse, &up));
    }
}

/// For each of `to` pixels, the whole pixels among `from` whose centers it covers.
fn boxes(from: usize, to: usize) -> Vec<std::ops::Range<usize>> {
    let scale = from as f64 / to as f64;
    let half = 0.5 * scale.max(1.0);
    let cover = |i: usize| {
        let center = (i as f64 + 0.5) * scale;
        let start = ((center - half + 0.5) as usize).min(from - 1);
        start..((center + half + 0.5) as usize).clamp(start + 1, from)
    };
    (0..to).map(cover).collect()
}

fn mean_of_boxes(plane: &[f32], side: usize, boxes: &[std::ops::Range<usize>]) -> Vec<f32> {
    let mut out = Vec::with_capacity(boxes.len() * boxes.len());
    for rows in boxes {
        for cols in boxes {
            let lines = rows.clone().map(|r| &plane[r * side..][cols.clone()]);
            let total: f32 = lines.flatten().sum();
            out.push(total / (rows.len() * cols.len()) as f32);
        }
    }
    out
}

/// Through a JPEG file and back. An image that the encoder does not take stays as it is.
pub fn jpeg_at(x: &mut Picture, level: usize, small: bool) {
    let quality = match small {
        true => [80, 65, 58, 50, 40],
        false => [25, 18, 15, 10, 7],
    }[level];
    let (side, area) = (x.side, x.side * x.side);
    let kind = match x.channels {
        1 => ExtendedColorType::L8,
        _ => ExtendedColorType::Rgb8,
    };
    // Pixel by pixel, the channels of each together.
    let bytes: Vec<u8> = (0..area * x.channels)
        .map(|i| x.pixels[i % x.channels * area + i / x.channels])
        .map(|p| (255.0 * p.clamp(0.0, 1.0)).round() as u8)
        .collect();
    let mut file = Vec::new();
    let encoder = &mut JpegEncoder::new_with_quality(&mut file, quality);
    let Ok(()) = encoder.encode(&bytes, side as u32, side as u32, kind) else {
        return;
    };
    let Ok(decoded) = image::load_from_memory_with_format(&file, ImageFormat::Jpeg) else {
        return;
    };
    let bytes = match decoded {
        DynamicImage::ImageLuma8(gray) if x.channels == 1 => gray.into_raw(),
        other => other.into_rgb8().into_raw(),
    };
    for (i, byte) in bytes.iter().enumerate() {
        x.pixels[i % x.channels * area + i / x.channels] = f32::from(*byte) / 255.0;
    }
}
