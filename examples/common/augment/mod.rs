//! Two views of a picture: random resized crops, mirror images, and what is done to their colours.

mod crop;
mod photometric;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};

pub use crop::{Crop, CropRanges};
pub use photometric::Photometric;

use super::data::{Images, Interpolation, Picture, Shaper};

/// The recipe of both views, and the statistics that they are normalised with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Augment {
    /// Side of the views.
    pub side: usize,
    pub crop: CropRanges,
    /// Probability of a mirror image.
    pub flip: f64,
    pub interpolation: Interpolation,
    /// What is done to the colours of the first view, and of the second.
    pub views: [Photometric; 2],
    /// Mean and standard deviation of each channel.
    pub statistics: Vec<(f32, f32)>,
}

impl Augment {
    /// For pictures of a few dozen pixels: crops, mirror images, brightness and contrast.
    pub fn small(side: usize, statistics: Vec<(f32, f32)>) -> Self {
        Self {
            side,
            crop: CropRanges {
                area: (0.3, 1.0),
                aspect: (3.0 / 4.0, 4.0 / 3.0),
            },
            flip: 0.5,
            interpolation: Interpolation::Bilinear,
            views: [Photometric::small(), Photometric::small()],
            statistics,
        }
    }

    /// The recipe of MoCo-v3 and of SER for ImageNet; the smallest crop is a matter of the method.
    pub fn imagenet(area_min: f32) -> Self {
        Self {
            side: 224,
            crop: CropRanges {
                area: (area_min, 1.0),
                aspect: (3.0 / 4.0, 4.0 / 3.0),
            },
            flip: 0.5,
            interpolation: Interpolation::Bilinear,
            views: [
                Photometric::imagenet_first(),
                Photometric::imagenet_second(),
            ],
            statistics: vec![(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)],
        }
    }

    /// Refuses what cannot be drawn from.
    pub fn check(&self) -> Result<()> {
        ensure!(self.side > 0, "side: expected at least 1, got 0");
        probability("flip", self.flip)?;
        self.crop.check()?;
        self.views.iter().try_for_each(Photometric::check)
    }

    /// Writes two views of a picture, `(C, S, S)` each.
    ///
    /// Views that share their crop, and whether it is mirrored, differ in their colours only: poses are given to them
    /// afterwards.
    pub fn views(
        &self,
        picture: &Picture,
        shared: bool,
        rng: &mut StdRng,
        shaper: &mut Shaper,
        [first, second]: [&mut [f32]; 2],
    ) -> Result<()> {
        shaper.filter = self.interpolation;
        self.draw_crop(picture, rng)
            .render(picture, self.side, shaper, first)?;
        match shared {
            true => second.copy_from_slice(first),
            false => self
                .draw_crop(picture, rng)
                .render(picture, self.side, shaper, second)?,
        }
        for (view, photometric) in [first, second].into_iter().zip(&self.views) {
            photometric.apply(view, self.side, rng);
            for (plane, (mean, std)) in view
                .chunks_exact_mut(self.side * self.side)
                .zip(&self.statistics)
            {
                plane.iter_mut().for_each(|p| *p = (*p - mean) / std);
            }
        }
        Ok(())
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

    fn draw_crop(&self, picture: &Picture, rng: &mut StdRng) -> Crop {
        Crop {
            flip: rng.random_bool(self.flip),
            window: self.crop.draw(picture.size(), rng),
        }
    }
}

fn probability(name: &str, p: f64) -> Result<()> {
    ensure!(
        (0.0..=1.0).contains(&p),
        "{name}: expected a probability, got {p}"
    );
    Ok(())
}

/// A range whose ends are in order and between `least` and `most`.
fn range(name: &str, (low, high): (f32, f32), least: f32, most: f32) -> Result<()> {
    ensure!(
        least <= low && low <= high && high <= most,
        "{name}: expected a range within {least} to {most}, got {low} to {high}"
    );
    Ok(())
}
