//! Random resized crops, mirror images, brightness and contrast.
//!
//! Each picture of a batch draws from a generator of its own, so that views do not depend on the number of threads.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::prelude::*;

use super::data::Images;

/// Ranges of the augmentation, and the statistics that views are normalised with.
#[derive(Clone, Debug)]
pub struct Augment {
    /// Area of a crop, as a fraction of the picture.
    pub area: (f32, f32),
    /// Width over height of a crop.
    pub aspect: (f32, f32),
    /// Probability of a mirror image.
    pub flip: f64,
    /// Factor of the brightness.
    pub brightness: (f32, f32),
    /// Factor of the contrast.
    pub contrast: (f32, f32),
    /// Mean and standard deviation of each channel.
    pub statistics: Vec<(f32, f32)>,
}

impl Augment {
    /// The ranges of the preset, with the statistics of the training pictures.
    pub fn new(train: &Images) -> Self {
        Self {
            area: (0.3, 1.0),
            aspect: (3.0 / 4.0, 4.0 / 3.0),
            flip: 0.5,
            brightness: (0.7, 1.3),
            contrast: (0.7, 1.3),
            statistics: train.statistics(),
        }
    }

    /// Two views `(B, C, S, S)` of the pictures in `batch`.
    ///
    /// The two views of the last `shared` pictures show one crop and differ in brightness and contrast only: poses are
    /// given to them afterwards.
    pub fn pair(
        &self,
        images: &Images,
        batch: &[usize],
        shared: usize,
        seed: u64,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let stride = images.stride();
        let mut views = [
            vec![0f32; batch.len() * stride],
            vec![0f32; batch.len() * stride],
        ];
        let [first, second] = &mut views;
        first
            .par_chunks_exact_mut(stride)
            .zip(second.par_chunks_exact_mut(stride))
            .zip(batch.par_iter().enumerate())
            .for_each(|((first, second), (i, &index))| {
                // An odd factor keeps the seeds of a batch apart; the generator hashes them.
                let step = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut rng = StdRng::seed_from_u64(seed.wrapping_add(step));
                let crop = self.draw_crop(images.side, &mut rng);
                self.render(images, index, crop, &mut rng, first);
                let crop = if i + shared < batch.len() {
                    self.draw_crop(images.side, &mut rng)
                } else {
                    crop
                };
                self.render(images, index, crop, &mut rng, second);
            });
        let shape = (batch.len(), images.channels, images.side, images.side);
        let [first, second] = views;
        Ok((
            Tensor::from_vec(first, shape, device)?,
            Tensor::from_vec(second, shape, device)?,
        ))
    }

    /// The pictures as they are, normalised, `(B, C, S, S)`.
    pub fn plain(
        &self,
        images: &Images,
        batch: std::ops::Range<usize>,
        device: &Device,
    ) -> Result<Tensor> {
        images.normalized(batch, &self.statistics, device)
    }

    /// A crop of random area and aspect that fits into the picture; the whole picture if none did in ten draws.
    fn draw_crop(&self, side: usize, rng: &mut StdRng) -> Crop {
        let full = side as f32;
        let flip = rng.random_bool(self.flip);
        for _ in 0..10 {
            let area = full * full * rng.random_range(self.area.0..=self.area.1);
            let aspect = rng
                .random_range(self.aspect.0.ln()..=self.aspect.1.ln())
                .exp();
            let width = (area * aspect).sqrt().round() as usize;
            let height = (area / aspect).sqrt().round() as usize;
            if (1..=side).contains(&width) && (1..=side).contains(&height) {
                let top = rng.random_range(0..=side - height);
                let left = rng.random_range(0..=side - width);
                return Crop {
                    top,
                    left,
                    height,
                    width,
                    flip,
                };
            }
        }
        Crop {
            top: 0,
            left: 0,
            height: side,
            width: side,
            flip,
        }
    }

    /// Writes the crop, resized to the full side, with brightness and contrast of its own.
    fn render(&self, images: &Images, index: usize, crop: Crop, rng: &mut StdRng, out: &mut [f32]) {
        let side = images.side;
        let rows = taps(crop.top, crop.height, side);
        let mut cols = taps(crop.left, crop.width, side);
        if crop.flip {
            cols.reverse();
        }
        let planes = images.get(index).chunks_exact(side * side);
        for (plane, out) in planes.zip(out.chunks_exact_mut(side * side)) {
            for (&(top, bottom, down), out) in rows.iter().zip(out.chunks_exact_mut(side)) {
                let (top, bottom) = (&plane[top * side..], &plane[bottom * side..]);
                for (&(left, right, across), out) in cols.iter().zip(out) {
                    let lerp = |a: u8, b: u8| f32::from(a) + across * (f32::from(b) - f32::from(a));
                    let (upper, lower) = (
                        lerp(top[left], top[right]),
                        lerp(bottom[left], bottom[right]),
                    );
                    *out = (upper + down * (lower - upper)) / 255.0;
                }
            }
        }
        let brightness = rng.random_range(self.brightness.0..=self.brightness.1);
        let contrast = rng.random_range(self.contrast.0..=self.contrast.1);
        out.iter_mut()
            .for_each(|p| *p = (*p * brightness).clamp(0.0, 1.0));
        let mean = out.iter().sum::<f32>() / out.len() as f32;
        for (plane, (channel_mean, std)) in out.chunks_exact_mut(side * side).zip(&self.statistics)
        {
            for p in plane {
                let p_contrast = (mean + contrast * (*p - mean)).clamp(0.0, 1.0);
                *p = (p_contrast - channel_mean) / std;
            }
        }
    }
}

/// A window of the picture, in whole pixels, perhaps mirrored.
#[derive(Clone, Copy, Debug)]
struct Crop {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
    flip: bool,
}

/// For each of `out` samples over a window of `length` pixels: its two neighbours and the weight of the second
/// (bilinear, pixel centres at half integers, the window's border repeated).
fn taps(start: usize, length: usize, out: usize) -> Vec<(usize, usize, f32)> {
    let scale = length as f32 / out as f32;
    let tap = |i: usize| {
        let x = ((i as f32 + 0.5) * scale - 0.5).clamp(0.0, (length - 1) as f32);
        let low = x as usize;
        let high = (low + 1).min(length - 1);
        (start + low, start + high, x - low as f32)
    };
    (0..out).map(tap).collect()
}
