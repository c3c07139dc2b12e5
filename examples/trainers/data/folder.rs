//! A folder with one sub-folder of PNG or JPEG files for each class.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use super::{
    Images, Skipped, file_name,
    images::spread,
    picture::{Picture, Shaper, decode},
    sorted_entries,
};

/// Files that are decoded when they are needed.
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

    /// `n` files at even distances, or all when there are fewer.
    pub fn spread(&self, n: usize) -> Self {
        let mut some = Folder::default();
        for i in spread(self.len(), n) {
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
                let picture = Picture::Rgb(decode(path)?);
                let mut pixels = vec![0; images.stride()];
                shaper.shape(&picture, picture.middle(fraction), side, &mut pixels)?;
                bar.inc(1);
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

    fn push(&mut self, file: PathBuf, label: u32) {
        self.files.push(file);
        self.labels.push(label);
    }
}

/// What a folder holds, before anything is decoded.
#[derive(Debug, Default)]
pub struct Listing {
    pub classes: Vec<String>,
    pub train: Folder,
    pub test: Folder,
    /// Whether the division is the folder's own, in `train` and `val`.
    pub official: bool,
    /// Classes without files.
    pub skipped: Vec<Skipped>,
}

impl Listing {
    /// Every fifth file of a class is for testing, unless `train` and `val` have classes of their own.
    pub fn read(folder: &Path) -> Result<Self> {
        let (train, val) = (folder.join("train"), folder.join("val"));
        let official = has_folders(&train) && has_folders(&val);
        let mut listing = Listing { official, ..Default::default() };
        for class in folders(if official { &train } else { folder })? {
            let files = pictures(&class)?;
            if files.is_empty() {
                let why = "expected PNG or JPEG files, found none";
                listing.skipped.push((class, why.into()));
                continue;
            }
            let label = listing.classes.len() as u32;
            listing.classes.push(file_name(&class));
            for (i, file) in files.into_iter().enumerate() {
                let part = match official || (i + 1) % 5 != 0 {
                    true => &mut listing.train,
                    false => &mut listing.test,
                };
                part.push(file, label);
            }
        }
        let empty = listing.skipped.first();
        ensure!(
            listing.classes.len() >= 2,
            "expected at least two sub-folders of images, one for each class, got {}{}",
            listing.classes.len(),
            empty.map_or(String::new(), |(path, why)| format!("; {}: {why}", path.display()))
        );
        if official {
            for class in folders(&val)? {
                let name = file_name(&class);
                if listing.skipped.iter().any(|(c, _)| file_name(c) == name) {
                    continue;
                }
                let Some(label) = listing.classes.iter().position(|c| *c == name) else {
                    bail!(
                        "{}: expected one of the {} classes of train, got {name}",
                        class.display(),
                        listing.classes.len()
                    );
                };
                for file in pictures(&class)? {
                    listing.test.push(file, label as u32);
                }
            }
        }
        Ok(listing)
    }
}

fn has_folders(path: &Path) -> bool {
    path.is_dir() && folders(path).is_ok_and(|f| !f.is_empty())
}

fn folders(path: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = sorted_entries(path)?;
    entries.retain(|p| p.is_dir());
    Ok(entries)
}

fn pictures(class: &Path) -> Result<Vec<PathBuf>> {
    let mut files = sorted_entries(class)?;
    files.retain(|p| {
        let extension = p.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg"))
    });
    Ok(files)
}
