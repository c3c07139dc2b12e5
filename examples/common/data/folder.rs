//! A folder with one sub-folder of PNG or JPEG files for each class.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use image::imageops::FilterType;
use rayon::prelude::*;

use super::{Images, sorted_entries};

/// Pictures are scaled to cover this square and cut to its middle.
const SIDE: usize = 32;

pub fn read(folder: &Path) -> Result<Images> {
    let mut classes = sorted_entries(folder)?;
    classes.retain(|p| p.is_dir());
    ensure!(
        classes.len() >= 2,
        "expected at least two sub-folders, one for each class, got {}",
        classes.len()
    );
    let mut images = Images {
        channels: 3,
        side: SIDE,
        ..Default::default()
    };
    for (label, class) in classes.iter().enumerate() {
        let mut files = sorted_entries(class)?;
        files.retain(|p| is_picture(p));
        ensure!(
            !files.is_empty(),
            "{}: expected PNG or JPEG files, found none",
            class.display()
        );
        let pictures: Vec<Vec<u8>> = files.par_iter().map(|f| decode(f)).collect::<Result<_>>()?;
        images.labels.extend(vec![label as u32; pictures.len()]);
        images.pixels.extend(pictures.concat());
    }
    Ok(images)
}

fn is_picture(path: &Path) -> bool {
    let extension = path
        .extension()
        .map(|e| e.to_string_lossy().to_ascii_lowercase());
    matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg"))
}

/// The RGB planes of one picture, one after the other.
fn decode(path: &Path) -> Result<Vec<u8>> {
    let picture = image::open(path)
        .with_context(|| format!("{}: truncated or damaged picture", path.display()))?;
    let rgb = picture
        .resize_to_fill(SIDE as u32, SIDE as u32, FilterType::Triangle)
        .to_rgb8();
    let planes = (0..3).flat_map(|c| rgb.pixels().map(move |p| p.0[c]));
    Ok(planes.collect())
}
