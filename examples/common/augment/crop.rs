//! Random resized crops.

use anyhow::{Result, ensure};
use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::range;
use crate::data::{Picture, Shaper, Window};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CropRanges {
    /// Area of a crop, as a fraction of the picture.
    pub area: (f32, f32),
    /// Width over height of a crop.
    pub aspect: (f32, f32),
}

/// A window of a picture, perhaps mirrored.
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

    /// A window of random area and aspect that fits into the picture; the largest in the middle whose aspect is in
    /// range, if none did in ten draws.
    pub fn draw(&self, (height, width): (usize, usize), rng: &mut StdRng) -> Window {
        let full = (height * width) as f32;
        for _ in 0..10 {
            let area = full * rng.random_range(self.area.0..=self.area.1);
            let aspect = rng
                .random_range(self.aspect.0.ln()..=self.aspect.1.ln())
                .exp();
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
        Window {
            top: (height - h) / 2,
            left: (width - w) / 2,
            height: h,
            width: w,
        }
    }
}

impl Crop {
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
        for (row, out) in pixels
            .chunks_exact_mut(side)
            .zip(out.chunks_exact_mut(side))
        {
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
