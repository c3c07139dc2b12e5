//! Windows of images, to train on without labels.

use std::path::PathBuf;

use anyhow::Result;
use rand::Rng;
use rayon::prelude::*;

use crate::{
    data::{
        decode, draw,
        images::Images,
        picture::{Picture, Shaper, Window},
        walk::Skipped,
    },
    random::{self, Purpose},
};

/// Windows of one image, where there are few images.
const MOST: usize = 16;
/// Windows of all images, where there are many.
const ALL: usize = 16_000;
/// A window takes this part of the shorter side of its image: about the scale at which boxes are read.
const PART: usize = 4;

/// Seeded square windows of the images, each a quarter of the shorter side and scaled to `side`. A window of fewer pixels
/// than `side` is enlarged up to that, where the image is large enough. Files that cannot be read are added to `skipped`.
pub fn windows(files: &[PathBuf], side: usize, skipped: &mut Vec<Skipped>) -> Result<Images> {
    let count = (ALL / files.len().max(1)).clamp(1, MOST);
    let mut images = Images { channels: 3, side, ..Default::default() };
    let stride = images.stride();
    let one = |shaper: &mut Shaper, (i, file): (usize, &PathBuf)| -> Result<Vec<u8>> {
        let picture = Picture::Rgb(decode::decode(file)?);
        let (height, width) = picture.size();
        let shorter = height.min(width);
        let length = (shorter / PART).max(side).min(shorter);
        let rng = &mut random::generator(draw::SEED, Purpose::Windows, i);
        let mut pixels = vec![0; count * stride];
        for out in pixels.chunks_exact_mut(stride) {
            let window = Window {
                top: rng.random_range(0..=height - length),
                left: rng.random_range(0..=width - length),
                height: length,
                width: length,
            };
            shaper.shape(&picture, window, side, out)?;
        }
        Ok(pixels)
    };
    let cut: Vec<Result<Vec<u8>>> =
        files.par_iter().enumerate().map_init(Shaper::default, one).collect();
    for (pixels, file) in cut.into_iter().zip(files) {
        match pixels {
            Ok(pixels) => pixels.chunks_exact(stride).for_each(|window| images.push(window, 0)),
            Err(why) => skipped.push((file.clone(), format!("{why:#}"))),
        }
    }
    Ok(images)
}
