//! Random resized crops.

use anyhow::{Result, ensure};
use rand::{Rng, rngs::StdRng};
use ser_reg::contrib::CropParameters;
use serde::{Deserialize, Serialize};

use super::range;
use crate::data::{Picture, Shaper, Window};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CropRanges {
    /// Area of a crop, as a fraction of the image.
    pub area: (f32, f32),
    /// Width over height of a crop.
    pub aspect: (f32, f32),
}

/// A window of an image, perhaps mirrored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crop {
    pub window: Window,
    pub flip: bool,
}

impl CropRanges {
    pub(super) fn check(&self) -> Result<()> {
        range("area", self.area, 0.0, 1.0)?;
        range("aspect", self.aspect, 0.0, f32::MAX)?;
        ensure!(
            self.area.0 > 0.0 && self.aspect.0 > 0.0,
            "area and aspect: expected positive ranges, got {} and {} as their lower ends",
            self.area.0,
            self.aspect.0
        );
        Ok(())
    }

    /// A window of random area and aspect that fits into the image; the largest in the middle whose aspect is in
    /// range, if none did in ten draws.
    pub fn draw(&self, (height, width): (usize, usize), rng: &mut StdRng) -> Window {
        let full = (height * width) as f32;
        for _ in 0..10 {
            let area = full * rng.random_range(self.area.0..=self.area.1);
            let aspect = rng.random_range(self.aspect.0.ln()..=self.aspect.1.ln()).exp();
            let w = (area * aspect).sqrt().round() as usize;
            let h = (area / aspect).sqrt().round() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                return Window {
                    top: rng.random_range(0..=height - h),
                    left: rng.random_range(0..=width - w),
                    height: h,
                    width: w,
                };
            }
        }
        let aspect = (width as f32 / height as f32).clamp(self.aspect.0, self.aspect.1);
        let w = (height as f32 * aspect).round().max(1.0) as usize;
        let h = (width as f32 / aspect).round().max(1.0) as usize;
        let (w, h) = (w.min(width), h.min(height));
        Window { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
    }
}

impl Crop {
    /// The crop of an image of size `to` that lies as this one does on a sheet of size `from`.
    pub fn carried(self, from: (usize, usize), to: (usize, usize)) -> Self {
        if from == to {
            return self;
        }
        let side = |start: usize, length: usize, from: usize, to: usize| {
            let place = |at: usize| (at as f64 * to as f64 / from as f64).round() as usize;
            let first = place(start).min(to - 1);
            (first, place(start + length).clamp(first + 1, to) - first)
        };
        let window = self.window;
        let (top, height) = side(window.top, window.height, from.0, to.0);
        let (left, width) = side(window.left, window.width, from.1, to.1);
        Self { window: Window { top, left, height, width }, ..self }
    }

    /// The largest square in the middle of an image, not mirrored.
    pub fn central((height, width): (usize, usize)) -> Self {
        let side = height.min(width);
        Self {
            window: Window {
                top: (height - side) / 2,
                left: (width - side) / 2,
                height: side,
                width: side,
            },
            flip: false,
        }
    }

    /// The window as an add-on reads it, in sides of the image that it was drawn on.
    pub fn parameters(&self, (height, width): (usize, usize)) -> CropParameters {
        let part = |n: usize, of: usize| (n as f64 / of as f64) as f32;
        CropParameters {
            top: part(self.window.top, height),
            left: part(self.window.left, width),
            height: part(self.window.height, height),
            width: part(self.window.width, width),
        }
    }

    /// Writes the crop, resized to `(C, side, side)`, values in `[0, 1]`.
    pub fn render(
        &self,
        picture: &Picture,
        side: usize,
        shaper: &mut Shaper,
        out: &mut [f32],
    ) -> Result<()> {
        let mut pixels = vec![0; out.len()];
        shaper.shape(picture, self.window, side, &mut pixels)?;
        for (row, out) in pixels.chunks_exact_mut(side).zip(out.chunks_exact_mut(side)) {
            if self.flip {
                row.reverse();
            }
            for (out, &p) in out.iter_mut().zip(&*row) {
                *out = f32::from(p) / 255.0;
            }
        }
        Ok(())
    }
}
