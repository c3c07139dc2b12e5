//! Decodes one image file, whatever its format: upright, in color, without transparency.

use std::{fs, io::Cursor, path::Path};

use anyhow::{Context, Result, ensure};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

/// The most memory that a decoded image may take: a small file can declare a huge image.
const LIMIT: u64 = 512 << 20;
/// What shows through transparent pixels.
const BACKGROUND: u32 = 255;

/// The image in a file, by its content and not by its name: the first one of an animation, turned as its EXIF orientation
/// says, on white where it is transparent.
pub(super) fn decode(path: &Path) -> Result<RgbImage> {
    decoded(path, true)
}

/// The same as its pixels are stored, whatever its EXIF orientation says: boxes refer to these pixels.
pub fn stored(path: &Path) -> Result<RgbImage> {
    decoded(path, false)
}

/// Width and height of the image as it is stored, from its header.
pub(super) fn stored_size(path: &Path) -> Result<(u32, u32)> {
    let bytes = fs::read(path).context("cannot read the file")?;
    Ok(reader(&bytes, path)?.into_decoder().context(DAMAGED)?.dimensions())
}

const DAMAGED: &str = "truncated or damaged image";

fn reader<'a>(bytes: &'a [u8], path: &Path) -> Result<ImageReader<Cursor<&'a [u8]>>> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    // TGA files do not begin with a signature.
    if reader.format().is_none() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tga"))
    {
        reader.set_format(ImageFormat::Tga);
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(LIMIT);
    reader.limits(limits);
    Ok(reader)
}

fn decoded(path: &Path, turn: bool) -> Result<RgbImage> {
    let bytes = fs::read(path).context("cannot read the file")?;
    let mut decoder = reader(&bytes, path)?.into_decoder().context(DAMAGED)?;
    let (width, height) = decoder.dimensions();
    ensure!(width > 0 && height > 0, "expected an image with pixels, got {width}x{height}");
    ensure!(
        decoder.total_bytes() <= LIMIT,
        "expected an image of at most {} MiB when decoded, got {width}x{height} pixels",
        LIMIT >> 20
    );
    // A damaged description does not damage the image.
    let orientation = decoder.orientation().ok().filter(|_| turn);
    let mut image = DynamicImage::from_decoder(decoder).context(DAMAGED)?;
    // The decoder paints what a cut-off JPEG lacks gray, and says nothing.
    ensure!(
        !bytes.starts_with(&JPEG) || has_end(&bytes),
        "truncated or damaged image: the JPEG data do not end"
    );
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(match image.color().has_alpha() {
        true => on_background(image),
        false => image.into_rgb8(),
    })
}

fn on_background(image: DynamicImage) -> RgbImage {
    let image = image.into_rgba8();
    let mut opaque = RgbImage::new(image.width(), image.height());
    for (out, pixel) in opaque.pixels_mut().zip(image.pixels()) {
        let alpha = u32::from(pixel[3]);
        let mixed = |c: u8| (u32::from(c) * alpha + BACKGROUND * (255 - alpha) + 127) / 255;
        out.0 = [0, 1, 2].map(|c| mixed(pixel[c]) as u8);
    }
    opaque
}

const JPEG: [u8; 2] = [0xff, 0xd8];

/// Whether the marker of the end follows the first scan. A thumbnail in the header has an end of its own, so segments
/// before the scan are passed over by their lengths.
fn has_end(jpeg: &[u8]) -> bool {
    let mut at = JPEG.len();
    loop {
        match jpeg.get(at..at + 4) {
            Some([0xff, 0xff, ..]) => at += 1,
            Some([0xff, 0xda, ..]) => break,
            Some(&[0xff, _, high, low]) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
            _ => return false,
        }
    }
    jpeg[at..].windows(2).any(|marker| marker == [0xff, 0xd9])
}
