//! Image files that are decoded when they are needed.

use std::path::PathBuf;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use super::{
    decode::decode,
    images::Images,
    picture::{Picture, Shaper},
    walk::Skipped,
};

/// Files with labels.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    pub files: Vec<PathBuf>,
    pub labels: Vec<u32>,
}

/// Files decoded at a time.
const BLOCK: usize = 1024;

impl Folder {
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// The files of these numbers.
    pub fn pick(&self, indices: &[usize]) -> Self {
        let mut some = Folder::default();
        for &i in indices {
            some.push(self.files[i].clone(), self.labels[i]);
        }
        some
    }

    /// The middles of the images, `fraction` of the largest square; files that cannot be read are added to `skipped`.
    pub fn decode(
        &self,
        side: usize,
        fraction: f64,
        what: &str,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Images> {
        let bar = ProgressBar::new(self.len() as u64);
        bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {eta} left")?);
        bar.set_message(format!("decoding {what} images"));
        let mut images = Images { channels: 3, side, ..Default::default() };
        let blocks = self.files.chunks(BLOCK).zip(self.labels.chunks(BLOCK));
        for (files, labels) in blocks {
            let one = |shaper: &mut Shaper, path: &PathBuf| -> Result<Vec<u8>> {
                bar.inc(1);
                let picture = Picture::Rgb(decode(path)?);
                let mut pixels = vec![0; images.stride()];
                shaper.shape(&picture, picture.middle(fraction), side, &mut pixels)?;
                Ok(pixels)
            };
            let pictures: Vec<Result<Vec<u8>>> =
                files.par_iter().map_init(Shaper::default, one).collect();
            for ((picture, path), &label) in pictures.into_iter().zip(files).zip(labels) {
                match picture {
                    Ok(pixels) => images.push(&pixels, label),
                    Err(why) => skipped.push((path.clone(), format!("{why:#}"))),
                }
            }
        }
        bar.finish_and_clear();
        Ok(images)
    }

    pub(super) fn push(&mut self, file: PathBuf, label: u32) {
        self.files.push(file);
        self.labels.push(label);
    }
}
