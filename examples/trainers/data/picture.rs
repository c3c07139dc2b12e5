//! One image, of whatever size, and a window of it as a square.

use anyhow::Result;
use fast_image_resize::{
    FilterType, ImageView, PixelTrait, ResizeAlg, ResizeOptions, Resizer,
    images::{TypedCroppedImage, TypedImage, TypedImageRef},
    pixels::{U8, U8x3},
};
use image::RgbImage;

/// A decoded image.
pub enum Picture<'a> {
    /// Square, channel by channel.
    Planes { pixels: &'a [u8], channels: usize, side: usize },
    /// Pixel by pixel.
    Rgb(RgbImage),
}

/// A rectangle in whole pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

impl Picture<'_> {
    pub fn channels(&self) -> usize {
        match self {
            Picture::Planes { channels, .. } => *channels,
            Picture::Rgb(_) => 3,
        }
    }

    /// Height and width.
    pub fn size(&self) -> (usize, usize) {
        match self {
            Picture::Planes { side, .. } => (*side, *side),
            Picture::Rgb(rgb) => (rgb.height() as usize, rgb.width() as usize),
        }
    }

    /// The largest square in the middle, `fraction` of it along each side.
    pub fn middle(&self, fraction: f64) -> Window {
        let (height, width) = self.size();
        let side = (height.min(width) as f64 * fraction).round().max(1.0) as usize;
        Window { top: (height - side) / 2, left: (width - side) / 2, height: side, width: side }
    }
}

/// Makes squares of windows. It holds working memory: each thread has one.
#[derive(Default)]
pub struct Shaper {
    resizer: Resizer,
    pub filter: Interpolation,
}

/// How pixels between pixels are found; both average over the pixels that one new pixel covers when they shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    #[default]
    Bilinear,
    Bicubic,
}

impl Shaper {
    /// The window, resized to `(channels, side, side)`; no pixel outside of it has a part in the result.
    pub fn shape(
        &mut self,
        picture: &Picture,
        window: Window,
        side: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let area = side * side;
        match picture {
            Picture::Planes { pixels, side: from, .. } => {
                let planes = pixels.chunks_exact(from * from);
                for (plane, out) in planes.zip(out.chunks_exact_mut(area)) {
                    let source =
                        TypedImageRef::<U8>::from_buffer(*from as u32, *from as u32, plane)?;
                    let mut square = TypedImage::<U8>::from_buffer(side as u32, side as u32, out)?;
                    self.resize(&source, window, &mut square)?;
                }
            }
            Picture::Rgb(rgb) => {
                let (width, height) = rgb.dimensions();
                let source = TypedImageRef::<U8x3>::from_buffer(width, height, rgb)?;
                let mut square = TypedImage::<U8x3>::new(side as u32, side as u32);
                self.resize(&source, window, &mut square)?;
                for (channel, plane) in out.chunks_exact_mut(area).enumerate() {
                    for (out, pixel) in plane.iter_mut().zip(square.pixels()) {
                        *out = pixel.0[channel];
                    }
                }
            }
        }
        Ok(())
    }

    fn resize<P: PixelTrait>(
        &mut self,
        source: &impl ImageView<Pixel = P>,
        window: Window,
        square: &mut TypedImage<P>,
    ) -> Result<()> {
        let filter = match self.filter {
            Interpolation::Bilinear => FilterType::Bilinear,
            Interpolation::Bicubic => FilterType::CatmullRom,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        let [left, top, width, height] =
            [window.left, window.top, window.width, window.height].map(|x| x as u32);
        let window = TypedCroppedImage::from_ref(source, left, top, width, height)?;
        Ok(self.resizer.resize_typed(&window, square, &options)?)
    }
}

/// The whole image at another size, which need not be square.
pub fn resized(image: &RgbImage, height: usize, width: usize) -> Result<RgbImage> {
    let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image)?;
    let mut out = RgbImage::new(width as u32, height as u32);
    let mut target = TypedImage::<U8x3>::from_buffer(width as u32, height as u32, &mut out)?;
    let filter = ResizeAlg::Convolution(FilterType::Bilinear);
    let options = ResizeOptions::new().resize_alg(filter);
    Resizer::new().resize_typed(&source, &mut target, &options)?;
    Ok(out)
}
