//! Image files of any format: decoded by their content, upright, in color, without transparency, and within limits.

mod files;

use std::path::Path;

use files::{assert_says, encoded, error, filled, folder, jpeg, load, name, png, ramp};
use image::{
    DynamicImage, ExtendedColorType, GrayAlphaImage, GrayImage, ImageBuffer, ImageEncoder,
    ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage, codecs::png::PngEncoder,
};
use ser_reg_trainers::data::{self, Picture, Wanted};

/// The pixels of one file, as training sees them.
fn decoded(name: &str, bytes: Vec<u8>) -> Result<RgbImage, String> {
    let files = [
        (format!("train/a/{name}"), bytes),
        ("train/b/1.png".into(), png(2, 2, [0; 3])),
        ("val/a/1.png".into(), png(2, 2, [0; 3])),
    ];
    let dir = folder(&files);
    let data = data::load(dir.path(), &Wanted::streamed(8)).map_err(|e| format!("{e:#}"))?;
    match data.train.picture(0) {
        Ok(Picture::Rgb(image)) => Ok(image),
        Ok(Picture::Planes { .. }) => panic!("files are decoded pixel by pixel"),
        Err(e) => Err(format!("{e:#}")),
    }
}

#[test]
fn formats_are_told_by_content() {
    let image = ramp(11, 7, 90);
    for format in [
        ImageFormat::Png,
        ImageFormat::WebP,
        ImageFormat::Tiff,
        ImageFormat::Bmp,
        ImageFormat::Pnm,
        ImageFormat::Qoi,
    ] {
        let bytes = encoded(image.clone(), format);
        for name in ["1", "1.png", "1.jpg", "1.dat"] {
            let found = decoded(name, bytes.clone());
            assert!(found.as_ref() == Ok(&image), "{format:?} as {name}: {:?}", found.err());
        }
    }
    // TGA begins with nothing of its own.
    let bytes = encoded(image.clone(), ImageFormat::Tga);
    assert!(decoded("1.tga", bytes.clone()).unwrap() == image);
    assert!(decoded("1.TGA", bytes).unwrap() == image);
    let near = |a: &RgbImage| a.iter().zip(image.iter()).all(|(a, b)| a.abs_diff(*b) < 25);
    for format in [ImageFormat::Jpeg, ImageFormat::Gif] {
        assert!(near(&decoded("1", encoded(image.clone(), format)).unwrap()), "{format:?}");
    }
}

#[test]
fn an_animation_shows_its_first_image() {
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
    for color in [[200, 0, 0, 255], [0, 200, 0, 255]] {
        let frame = RgbaImage::from_pixel(6, 5, Rgba(color));
        encoder.encode_frame(image::Frame::new(frame)).unwrap();
    }
    drop(encoder);
    assert_eq!(decoded("1.gif", bytes).unwrap(), RgbImage::from_pixel(6, 5, Rgb([200, 0, 0])));
}

#[test]
fn transparent_parts_are_white() {
    let color = |image: DynamicImage, format| {
        let image = decoded("1", encoded(image, format)).unwrap();
        image.get_pixel(0, 0).0
    };
    let rgba = |alpha| RgbaImage::from_pixel(3, 3, Rgba([10, 20, 30, alpha])).into();
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Tiff, ImageFormat::Qoi] {
        assert_eq!(color(rgba(0), format), [255; 3], "{format:?}");
        assert_eq!(color(rgba(255), format), [10, 20, 30], "{format:?}");
        // (10 · 102 + 255 · 153) / 255
        assert_eq!(color(rgba(102), format), [157, 161, 165], "{format:?}");
    }
    let gray = GrayAlphaImage::from_pixel(3, 3, LumaA([0, 0])).into();
    assert_eq!(color(gray, ImageFormat::Png), [255; 3]);
    let deep = ImageBuffer::from_pixel(3, 3, Rgba([0u16, 0, 0, 0]));
    assert_eq!(color(deep.into(), ImageFormat::Png), [255; 3]);
    let gif = RgbaImage::from_fn(4, 4, |x, _| Rgba([10, 20, 30, if x < 2 { 0 } else { 255 }]));
    assert_eq!(color(gif.into(), ImageFormat::Gif), [255; 3]);
}

#[test]
fn images_of_any_depth_and_size_are_read() {
    let color = |bytes: Vec<u8>| decoded("1.png", bytes).unwrap().get_pixel(0, 0).0;
    let gray = GrayImage::from_pixel(5, 7, Luma([90]));
    assert_eq!(color(encoded(gray.clone(), ImageFormat::Png)), [90; 3]);
    assert_eq!(color(encoded(gray, ImageFormat::Jpeg)), [90; 3]);
    let deep = ImageBuffer::from_pixel(6, 6, Rgb([0u16, 257 * 100, 65535]));
    assert_eq!(color(encoded(deep, ImageFormat::Png)), [0, 100, 255]);
    let deep = ImageBuffer::from_pixel(6, 6, Luma([257 * 100u16]));
    assert_eq!(color(encoded(deep, ImageFormat::Png)), [100; 3]);
    // All of them in one set.
    let files = [
        ("a/1.png", png(1, 1, [1, 2, 3])),
        ("a/2.png", png(400, 1, [4, 5, 6])),
        ("a/3.jpg", encoded(GrayImage::from_pixel(5, 70, Luma([90])), ImageFormat::Jpeg)),
        ("b/1.jpeg", png(3, 3, [7, 8, 9])),
        ("b/2.jpeg", jpeg(31, 8)),
        ("b/3.jpeg", cmyk([255, 0, 0, 255])),
    ];
    for wanted in [Wanted::default(), Wanted::streamed(32)] {
        let data = data::load(folder(&files).path(), &wanted).unwrap();
        assert_eq!((data.skipped.len(), data.train.len(), data.test.len()), (0, 4, 2));
    }
}

/// A JPEG file of 8x8 pixels of one color in four inks, as Adobe writes them: 255 is no ink.
fn cmyk(inks: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8];
    let mut segment = |marker: u8, body: &[u8]| {
        bytes.extend([0xff, marker, 0, body.len() as u8 + 2]);
        bytes.extend(body);
    };
    segment(0xee, &[&b"Adobe"[..], &[0, 100, 0, 0, 0, 0, 0]].concat());
    segment(0xdb, &[&[0][..], &[8; 64]].concat());
    let components = [1u8, 2, 3, 4];
    let frame = components.iter().flat_map(|&c| [c, 0x11, 0]).collect::<Vec<_>>();
    segment(0xc0, &[&[8, 0, 8, 0, 8, 4][..], &frame].concat());
    // Sizes 0 to 8 of a mean have codes of four bits; the end of a block has one.
    let mut lengths = [0; 16];
    lengths[3] = 9;
    segment(0xc4, &[&[0][..], &lengths, &[0, 1, 2, 3, 4, 5, 6, 7, 8]].concat());
    let mut lengths = [0; 16];
    lengths[0] = 1;
    segment(0xc4, &[&[0x10][..], &lengths, &[0]].concat());
    let scan = components.iter().flat_map(|&c| [c, 0]).collect::<Vec<_>>();
    segment(0xda, &[&[4][..], &scan, &[0, 63, 0]].concat());
    let mut bits = Vec::new();
    for ink in inks {
        let mean = i32::from(ink) - 128;
        let size = 32 - mean.unsigned_abs().leading_zeros();
        let code = if mean < 0 { mean + (1 << size) - 1 } else { mean };
        bits.extend((0..4).rev().map(|i| size >> i & 1 == 1));
        bits.extend((0..size).rev().map(|i| code >> i & 1 == 1));
        bits.push(false);
    }
    for byte in bits.chunks(8) {
        let value = (0..8).fold(0, |v, i| v << 1 | u8::from(*byte.get(i).unwrap_or(&true)));
        bytes.push(value);
        if value == 0xff {
            bytes.push(0);
        }
    }
    bytes.extend([0xff, 0xd9]);
    bytes
}

#[test]
fn inks_become_colors() {
    for (inks, expected) in [
        ([255, 0, 0, 255], [255, 0, 0]),
        ([255, 255, 255, 255], [255, 255, 255]),
        ([255, 255, 255, 0], [0, 0, 0]),
        ([0, 255, 255, 255], [0, 255, 255]),
    ] {
        let found = decoded("1.jpg", cmyk(inks)).unwrap().get_pixel(3, 3).0;
        let near = found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 2);
        assert!(near, "{inks:?}: {found:?}");
    }
}

/// The description that a camera writes, with an orientation in it.
fn exif(orientation: u8) -> Vec<u8> {
    let mut bytes = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    bytes.extend([orientation, 0, 0, 0, 0, 0, 0]);
    bytes
}

#[test]
fn images_stand_upright() {
    // Red on the left; orientation 6 is shown after a quarter turn to the right: red on top.
    let image =
        RgbImage::from_fn(32, 16, |x, _| Rgb(if x < 16 { [250, 0, 0] } else { [0, 0, 250] }));
    let jpeg = encoded(image.clone(), ImageFormat::Jpeg);
    let described = |orientation: u8| {
        let body = [&b"Exif\0\0"[..], &exif(orientation)].concat();
        let segment = [&[0xff, 0xe1, 0, body.len() as u8 + 2][..], &body].concat();
        [&jpeg[..2], &segment, &jpeg[2..]].concat()
    };
    let is_red = |image: &RgbImage, x, y| image.get_pixel(x, y)[0] > 200;
    let turned = |image: RgbImage| {
        assert_eq!(image.dimensions(), (16, 32));
        (is_red(&image, 8, 2), is_red(&image, 8, 29))
    };
    assert_eq!(turned(decoded("1.jpg", described(6)).unwrap()), (true, false));
    assert_eq!(turned(decoded("1.jpg", described(8)).unwrap()), (false, true));
    let mirrored = decoded("1.jpg", described(2)).unwrap();
    assert_eq!((mirrored.dimensions(), is_red(&mirrored, 2, 8)), ((32, 16), false));
    for nonsense in [0, 1, 77] {
        let image = decoded("1.jpg", described(nonsense)).unwrap();
        assert_eq!((image.dimensions(), is_red(&image, 2, 8)), ((32, 16), true));
    }
    let mut bytes = Vec::new();
    let mut encoder = PngEncoder::new(&mut bytes);
    encoder.set_exif_metadata(exif(6)).unwrap();
    encoder.write_image(&image, 32, 16, ExtendedColorType::Rgb8).unwrap();
    assert_eq!(turned(decoded("1.png", bytes).unwrap()), (true, false));
}

#[test]
fn the_end_of_a_thumbnail_is_not_the_end_of_an_image() {
    // A segment of the header that holds the end of an image of its own.
    let whole = jpeg(40, 30);
    let nested = [&whole[..2], &[0xff, 0xe1, 0, 6, 0xff, 0xd8, 0xff, 0xd9], &whole[2..]].concat();
    assert!(decoded("1.jpg", nested.clone()).is_ok());
    let cut = nested[..nested.len() - 60].to_vec();
    assert_says(&decoded("1.jpg", cut).unwrap_err(), &["truncated or damaged", "do not end"]);
}

/// A PNG file that declares another size than it has.
fn declared(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = png(4, 4, [1; 3]);
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let mut sum = flate2::Crc::new();
    sum.update(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&sum.sum().to_be_bytes());
    bytes
}

#[test]
fn huge_declared_sizes_take_no_memory() {
    for (width, height) in [(60_000, 60_000), (u32::MAX >> 1, 1), (u32::MAX >> 1, u32::MAX >> 1)] {
        let why = decoded("1.png", declared(width, height)).unwrap_err();
        assert!(why.contains("at most 512 MiB") || why.contains("imit"), "{why}");
    }
    assert_says(&decoded("1.png", declared(60_000, 60_000)).unwrap_err(), &["60000x60000"]);
    let mut bmp = encoded(ramp(3, 3, 1), ImageFormat::Bmp);
    bmp[18..22].copy_from_slice(&60_000u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&60_000u32.to_le_bytes());
    assert_says(&decoded("1.bmp", bmp).unwrap_err(), &["60000x60000"]);
    let ppm = b"P6 90000 90000 255\nabc".to_vec();
    assert_says(&decoded("1.ppm", ppm).unwrap_err(), &["90000x90000"]);
}

#[test]
fn formats_that_are_not_read_are_named() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3])]);
    files.push(("a/6.avif".into(), b"\0\0\0\x1cftypavif\0\0\0\0".to_vec()));
    // Its suffix promises more than its content holds.
    files.push(("b/6.png".into(), b"\0\0\0\x1cftypavif\0\0\0\0".to_vec()));
    let dir = folder(&files);
    let data = load(dir.path());
    assert_says(&data.note, &["1 .avif", "1 skipped"]);
    assert_eq!(name(&data.skipped[0].0), "b/6.png");
    assert_says(&data.skipped[0].1, &["Avif"]);
    let only = folder(&[("a/1.avif", vec![1]), ("b/1.heic", vec![1])]);
    assert_says(&error(only.path()), &["found none", "1 .avif, 1 .heic"]);
    assert_says(&error(Path::new("nowhere")), &["--data", "nowhere"]);
}
