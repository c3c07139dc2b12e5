//! What changes the colors of an image and not its shape. Values are in `[0, 1]`, channel by channel.

use anyhow::{Result, ensure};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use ser_reg::contrib::{AugmentationParameters, JitterParameters};
use serde::{Deserialize, Serialize};

use super::{probability, range};

/// Color jitter, then grayscale, blur and solarization, each with a probability of its own.
///
/// Images that do not have three channels have no saturation and no hue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Photometric {
    /// Probability of the next four, which come in random order.
    pub jitter: f64,
    /// Factor of all values.
    pub brightness: (f32, f32),
    /// Factor of the differences from the mean gray.
    pub contrast: (f32, f32),
    /// Factor of the differences from each pixel's gray.
    pub saturation: (f32, f32),
    /// Angle, in whole turns of the color circle.
    pub hue: (f32, f32),
    pub grayscale: f64,
    pub blur: f64,
    /// Standard deviation of the blur, in pixels.
    pub sigma: (f32, f32),
    /// Side of its kernel.
    pub kernel: usize,
    pub solarize: f64,
    /// Values from here on are inverted.
    pub threshold: f32,
}

impl Default for Photometric {
    /// Changes nothing.
    fn default() -> Self {
        Self {
            jitter: 0.0,
            brightness: (1.0, 1.0),
            contrast: (1.0, 1.0),
            saturation: (1.0, 1.0),
            hue: (0.0, 0.0),
            grayscale: 0.0,
            blur: 0.0,
            sigma: (0.1, 2.0),
            kernel: 9,
            solarize: 0.0,
            threshold: 0.5,
        }
    }
}

impl Photometric {
    pub fn small() -> Self {
        Self { jitter: 1.0, brightness: (0.7, 1.3), contrast: (0.7, 1.3), ..Self::default() }
    }

    /// The first view of SER's recipe: always blurred.
    pub fn imagenet_first() -> Self {
        Self {
            jitter: 0.8,
            brightness: (0.6, 1.4),
            contrast: (0.6, 1.4),
            saturation: (0.8, 1.2),
            hue: (-0.1, 0.1),
            grayscale: 0.2,
            blur: 1.0,
            ..Self::default()
        }
    }

    /// The second view of SER's recipe: seldom blurred, sometimes solarized.
    pub fn imagenet_second() -> Self {
        Self { blur: 0.1, solarize: 0.2, ..Self::imagenet_first() }
    }

    pub(super) fn check(&self) -> Result<()> {
        probability("jitter", self.jitter)?;
        probability("grayscale", self.grayscale)?;
        probability("blur", self.blur)?;
        probability("solarize", self.solarize)?;
        range("brightness", self.brightness, 0.0, f32::MAX)?;
        range("contrast", self.contrast, 0.0, f32::MAX)?;
        range("saturation", self.saturation, 0.0, f32::MAX)?;
        range("hue", self.hue, -0.5, 0.5)?;
        range("sigma", self.sigma, 1e-3, f32::MAX)?;
        ensure!(self.kernel % 2 == 1, "kernel: expected an odd side, got {}", self.kernel);
        Ok(())
    }

    /// Changes `(C, side, side)` in place; gives what it did.
    pub fn apply(&self, planes: &mut [f32], side: usize, rng: &mut StdRng) -> Colors {
        let drawn = self.draw(rng);
        self.render(&drawn, planes, side);
        drawn
    }

    /// What is done to one view.
    pub fn draw(&self, rng: &mut StdRng) -> Colors {
        let jitter = rng.random_bool(self.jitter).then(|| {
            let mut draw = |(low, high)| rng.random_range(low..=high);
            let mut steps = [
                Jitter::Brightness(draw(self.brightness)),
                Jitter::Contrast(draw(self.contrast)),
                Jitter::Saturation(draw(self.saturation)),
                Jitter::Hue(draw(self.hue)),
            ];
            steps.shuffle(rng);
            steps
        });
        let grayscale = rng.random_bool(self.grayscale);
        let blurred = rng.random_bool(self.blur);
        Colors {
            jitter,
            grayscale,
            sigma: blurred.then(|| rng.random_range(self.sigma.0..=self.sigma.1)),
            threshold: rng.random_bool(self.solarize).then_some(self.threshold),
        }
    }

    fn render(&self, drawn: &Colors, planes: &mut [f32], side: usize) {
        for step in drawn.jitter.iter().flatten() {
            step.apply(planes, side * side);
        }
        if drawn.grayscale {
            Jitter::Saturation(0.0).apply(planes, side * side);
        }
        if let Some(sigma) = drawn.sigma {
            blur(planes, side, &gaussian(sigma, self.kernel / 2));
        }
        if let Some(threshold) = drawn.threshold {
            for p in planes {
                if *p >= threshold {
                    *p = 1.0 - *p;
                }
            }
        }
    }
}

/// What was drawn for the colors of one view.
#[derive(Clone, Copy, Debug)]
pub struct Colors {
    /// In the order in which they were applied.
    jitter: Option<[Jitter; 4]>,
    grayscale: bool,
    sigma: Option<f32>,
    threshold: Option<f32>,
}

impl Colors {
    /// The same as an add-on reads it; an image that does not have three `channels` has no saturation, hue or grayscale to
    /// change.
    pub fn parameters(&self, channels: usize) -> AugmentationParameters {
        let colored = channels == 3;
        let mut jitter = JitterParameters::NONE;
        for (place, step) in self.jitter.iter().flatten().enumerate() {
            jitter.applied = true;
            jitter.order[place] = match *step {
                Jitter::Brightness(factor) => {
                    jitter.brightness = factor;
                    0
                }
                Jitter::Contrast(factor) => {
                    jitter.contrast = factor;
                    1
                }
                Jitter::Saturation(factor) => {
                    jitter.saturation = if colored { factor } else { 1.0 };
                    2
                }
                Jitter::Hue(turn) => {
                    jitter.hue = if colored { turn } else { 0.0 };
                    3
                }
            };
        }
        AugmentationParameters {
            jitter: Some(jitter),
            grayscale: Some(self.grayscale && colored),
            blur: Some(self.sigma.unwrap_or(0.0)),
            solarize: Some(self.threshold.unwrap_or(1.0)),
            ..AugmentationParameters::untouched()
        }
    }
}

/// One step of the color jitter.
#[derive(Clone, Copy, Debug)]
enum Jitter {
    Brightness(f32),
    Contrast(f32),
    Saturation(f32),
    Hue(f32),
}

impl Jitter {
    fn apply(self, planes: &mut [f32], area: usize) {
        match self {
            Jitter::Brightness(factor) if factor != 1.0 => {
                planes.iter_mut().for_each(|p| *p = (*p * factor).min(1.0));
            }
            Jitter::Contrast(factor) if factor != 1.0 => {
                let mean = mean_gray(planes, area);
                for p in planes {
                    *p = (mean + factor * (*p - mean)).clamp(0.0, 1.0);
                }
            }
            Jitter::Saturation(factor) if factor != 1.0 => {
                for_each_pixel(planes, area, |rgb| {
                    let gray = gray(rgb);
                    rgb.map(|c| (gray + factor * (c - gray)).clamp(0.0, 1.0))
                });
            }
            Jitter::Hue(turn) if turn != 0.0 => {
                for_each_pixel(planes, area, |rgb| turn_hue(rgb, 6.0 * turn));
            }
            _ => {}
        }
    }
}

/// ITU-R BT.601, as everywhere in image augmentation.
fn gray([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

/// The three channels, if there are three.
fn channels(planes: &mut [f32], area: usize) -> Option<[&mut [f32]; 3]> {
    if planes.len() != 3 * area {
        return None;
    }
    let (r, rest) = planes.split_at_mut(area);
    let (g, b) = rest.split_at_mut(area);
    Some([r, g, b])
}

fn for_each_pixel(planes: &mut [f32], area: usize, change: impl Fn([f32; 3]) -> [f32; 3]) {
    let Some([r, g, b]) = channels(planes, area) else {
        return;
    };
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        [*r, *g, *b] = change([*r, *g, *b]);
    }
}

fn mean_gray(planes: &mut [f32], area: usize) -> f32 {
    let mean = |plane: &[f32]| {
        // By rows of partial sums: one running sum of f32 would lose digits, and time.
        let mut sums = [0f32; 16];
        let chunks = plane.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().sum();
        for chunk in chunks {
            for (sum, p) in sums.iter_mut().zip(chunk) {
                *sum += p;
            }
        }
        (sums.iter().sum::<f32>() + rest) / plane.len() as f32
    };
    match channels(planes, area) {
        Some([r, g, b]) => gray([mean(r), mean(g), mean(b)]),
        None => mean(planes),
    }
}

/// Turns the hue by sixths of the circle, -3 to 3. Without branches, so that the compiler can take several pixels at a
/// time.
fn turn_hue([r, g, b]: [f32; 3], sixths: f32) -> [f32; 3] {
    let value = r.max(g).max(b);
    let chroma = value - r.min(g).min(b);
    let scale = if chroma > 0.0 { 1.0 / chroma } else { 0.0 };
    let from_red = (g - b) * scale;
    let from_green = (b - r) * scale + 2.0;
    let from_blue = (r - g) * scale + 4.0;
    let hue = if value == r {
        from_red
    } else if value == g {
        from_green
    } else {
        from_blue
    };
    let wrap = |h: f32| {
        let h = if h < 0.0 { h + 6.0 } else { h };
        if h >= 6.0 { h - 6.0 } else { h }
    };
    let hue = wrap(hue + sixths);
    // How far each channel is below the value: a trapezium over the circle.
    [5.0, 3.0, 1.0].map(|offset| {
        let k = wrap(offset + hue);
        value - chroma * k.min(4.0 - k).clamp(0.0, 1.0)
    })
}

/// Weights of a Gaussian from its middle outwards; with those on the other side they sum to 1.
fn gaussian(sigma: f32, radius: usize) -> Vec<f32> {
    let weight = |i: usize| (-0.5 * (i as f32 / sigma).powi(2)).exp();
    let weights: Vec<f32> = (0..=radius).map(weight).collect();
    let total = 2.0 * weights.iter().sum::<f32>() - weights[0];
    weights.iter().map(|w| w / total).collect()
}

/// Rows and then columns, the image mirrored at its border.
fn blur(planes: &mut [f32], side: usize, weights: &[f32]) {
    let radius = weights.len() - 1;
    let mut row = vec![0f32; side + 2 * radius];
    let mut rows = vec![0f32; side * side];
    for plane in planes.chunks_exact_mut(side * side) {
        for (from, to) in plane.chunks_exact(side).zip(rows.chunks_exact_mut(side)) {
            for i in 0..radius {
                row[i] = from[mirrored(i as isize - radius as isize, side)];
                row[radius + side + i] = from[mirrored((side + i) as isize, side)];
            }
            row[radius..radius + side].copy_from_slice(from);
            weigh(to, weights, |offset| &row[radius.wrapping_add_signed(offset)..]);
        }
        for (y, to) in plane.chunks_exact_mut(side).enumerate() {
            weigh(to, weights, |offset| &rows[mirrored(y as isize + offset, side) * side..]);
        }
    }
}

/// `out = Σ w[|k|] · line(k)`.
fn weigh<'a>(out: &mut [f32], weights: &[f32], line: impl Fn(isize) -> &'a [f32]) {
    for (out, middle) in out.iter_mut().zip(line(0)) {
        *out = weights[0] * middle;
    }
    for (k, weight) in weights.iter().enumerate().skip(1) {
        let (before, after) = (line(-(k as isize)), line(k as isize));
        for ((out, a), b) in out.iter_mut().zip(before).zip(after) {
            *out += weight * (a + b);
        }
    }
}

/// The pixel that stands at `i` when a line of `n` is mirrored at its end pixels, as often as it takes.
fn mirrored(i: isize, n: usize) -> usize {
    let period = (2 * n as isize - 2).max(1);
    let i = i.rem_euclid(period);
    i.min(period - i) as usize
}
