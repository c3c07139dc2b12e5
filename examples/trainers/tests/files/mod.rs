//! Files for the tests of the loaders, made by code.
#![allow(dead_code)]

use std::{fs, io::Cursor, path::Path};

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use ser_reg_trainers::data::{self, Data, Wanted};
use tempfile::TempDir;

/// A folder with these files.
pub fn folder<N: AsRef<str>>(files: &[(N, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name.as_ref());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

pub fn load(path: &Path) -> Data {
    data::load(path, &Wanted::default()).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Why the data are refused.
#[track_caller]
pub fn error(path: &Path) -> String {
    let error = data::load(path, &Wanted::default()).expect_err("the data should be refused");
    format!("{error:#}")
}

#[track_caller]
pub fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
}

pub fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A PNG file of one color.
pub fn png(width: u32, height: u32, color: [u8; 3]) -> Vec<u8> {
    encoded(RgbImage::from_pixel(width, height, Rgb(color)), ImageFormat::Png)
}

/// A PNG file whose pixels differ.
pub fn ramp(width: u32, height: u32, blue: u8) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([x as u8 * 5, y as u8 * 7, blue]))
}

pub fn jpeg(width: u32, height: u32) -> Vec<u8> {
    encoded(ramp(width, height, 90), ImageFormat::Jpeg)
}

/// `count` PNG files of one color in each folder.
pub fn filled(count: usize, folders: &[(&str, [u8; 3])]) -> Vec<(String, Vec<u8>)> {
    let files = folders.iter().flat_map(|(folder, color)| {
        (0..count).map(move |i| (format!("{folder}/{i}.png"), png(12, 9, *color)))
    });
    files.collect()
}

/// The last two parts of a path.
pub fn name(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(2).collect();
    let parts: Vec<_> = parts.iter().rev().map(|p| p.to_string_lossy()).collect();
    parts.join("/")
}
