//! Two views of an image: random resized crops, mirror images, and what is done to their colors.

mod crop;
mod photometric;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rand::{Rng, rngs::StdRng};
use ser_reg::contrib::AugmentationParameters;
use serde::{Deserialize, Serialize};

pub use crop::{Crop, CropRanges};
pub use photometric::{Colors, Photometric};

use super::data::{Images, Interpolation, Picture, Shaper};

/// The recipe of both views, and the statistics that they are normalized with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Augment {
    /// Side of the views.
    pub side: usize,
    pub crop: CropRanges,
    /// Probability of a mirror image.
    pub flip: f64,
    pub interpolation: Interpolation,
    /// What is done to the colors of the first view, and of the second.
    pub views: [Photometric; 2],
    /// Mean and standard deviation of each channel.
    pub statistics: Vec<(f32, f32)>,
}

impl Augment {
    /// For images of a few dozen pixels: crops, mirror images, brightness and contrast.
    pub fn small(side: usize, statistics: Vec<(f32, f32)>) -> Self {
        Self {
            side,
            crop: CropRanges { area: (0.3, 1.0), aspect: (3.0 / 4.0, 4.0 / 3.0) },
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
            crop: CropRanges { area: (area_min, 1.0), aspect: (3.0 / 4.0, 4.0 / 3.0) },
            flip: 0.5,
            interpolation: Interpolation::Bilinear,
            views: [Photometric::imagenet_first(), Photometric::imagenet_second()],
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

    /// Writes two views of an image, `(C, S, S)` each; gives what was drawn for them.
    ///
    /// Views that share their crop, and whether it is mirrored, differ in their colors only: poses are given to them
    /// afterwards.
    pub fn views(
        &self,
        picture: &Picture,
        shared: bool,
        rng: &mut StdRng,
        shaper: &mut Shaper,
        views: [&mut [f32]; 2],
    ) -> Result<[AugmentationParameters; 2]> {
        self.views_on(picture.size(), picture, shared, rng, shaper, views)
    }

    /// The same with crops drawn on a sheet of size `sheet`: images of any size that are given the same generator are
    /// cropped alike.
    pub fn views_on(
        &self,
        sheet: (usize, usize),
        picture: &Picture,
        shared: bool,
        rng: &mut StdRng,
        shaper: &mut Shaper,
        [first, second]: [&mut [f32]; 2],
    ) -> Result<[AugmentationParameters; 2]> {
        shaper.filter = self.interpolation;
        let draw = |shaper: &mut Shaper, rng: &mut StdRng, out: &mut [f32]| {
            let crop = self.draw_crop(sheet, rng);
            let own = crop.carried(sheet, picture.size());
            own.render(picture, self.side, shaper, out).map(|()| crop)
        };
        let crop1 = draw(shaper, rng, first)?;
        let crop2 = match shared {
            true => {
                second.copy_from_slice(first);
                crop1
            }
            false => draw(shaper, rng, second)?,
        };
        let channels = picture.channels();
        let mut finish = |view: &mut [f32], photometric: &Photometric, crop: Crop| {
            let colors = photometric.apply(view, self.side, rng);
            self.normalize(view, self.side);
            described(crop, sheet, colors, channels)
        };
        let [one, two] = &self.views;
        let drawn = finish(first, one, crop1);
        Ok([drawn, finish(second, two, crop2)])
    }

    /// What would be drawn for the two views of one square image.
    pub fn draw(&self, channels: usize, rng: &mut StdRng) -> [AugmentationParameters; 2] {
        let sheet = (self.side, self.side);
        let crops = [self.draw_crop(sheet, rng), self.draw_crop(sheet, rng)];
        let [one, two] = &self.views;
        let colors = [one.draw(rng), two.draw(rng)];
        [0, 1].map(|view| described(crops[view], sheet, colors[view], channels))
    }

    /// Writes the middle of an image without augmentation, `(C, S, S)`.
    pub fn untouched(&self, picture: &Picture, shaper: &mut Shaper, out: &mut [f32]) -> Result<()> {
        shaper.filter = self.interpolation;
        Crop::central(picture.size()).render(picture, self.side, shaper, out)?;
        self.normalize(out, self.side);
        Ok(())
    }

    /// Writes one more crop, `(C, side, side)`, with the colors of the first view.
    pub fn small_crop(
        &self,
        picture: &Picture,
        small: &SmallCrop,
        rng: &mut StdRng,
        shaper: &mut Shaper,
        out: &mut [f32],
    ) -> Result<()> {
        shaper.filter = self.interpolation;
        let ranges = CropRanges { area: small.area, ..self.crop };
        let crop =
            Crop { flip: rng.random_bool(self.flip), window: ranges.draw(picture.size(), rng) };
        crop.render(picture, small.side, shaper, out)?;
        self.views[0].apply(out, small.side, rng);
        self.normalize(out, small.side);
        Ok(())
    }

    fn normalize(&self, view: &mut [f32], side: usize) {
        let planes = view.chunks_exact_mut(side * side);
        for (plane, (mean, std)) in planes.zip(&self.statistics) {
            plane.iter_mut().for_each(|p| *p = (*p - mean) / std);
        }
    }

    /// The images as they are, normalized, `(B, C, S, S)`.
    pub fn plain(
        &self,
        images: &Images,
        batch: std::ops::Range<usize>,
        device: &Device,
    ) -> Result<Tensor> {
        images.normalized(batch, &self.statistics, device)
    }

    fn draw_crop(&self, sheet: (usize, usize), rng: &mut StdRng) -> Crop {
        Crop { flip: rng.random_bool(self.flip), window: self.crop.draw(sheet, rng) }
    }
}

/// A crop of fewer pixels, of its own share of the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SmallCrop {
    pub side: usize,
    /// Area, as a fraction of the image.
    pub area: (f32, f32),
}

/// What was drawn, as an add-on reads it.
fn described(
    crop: Crop,
    sheet: (usize, usize),
    colors: Colors,
    channels: usize,
) -> AugmentationParameters {
    AugmentationParameters {
        crop: Some(crop.parameters(sheet)),
        flip: Some(crop.flip),
        ..colors.parameters(channels)
    }
}

fn probability(name: &str, p: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&p), "{name}: expected a probability, got {p}");
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
