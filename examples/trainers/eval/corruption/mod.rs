//! The fifteen corruptions of Hendrycks & Dietterich (arXiv 1903.12261) in five severities.
//!
//! Parameters are theirs: those for 32 pixels where the side is below 64, those for 224 pixels elsewhere. Differences: no
//! photographs of frost come with this crate, so crystals are drawn and the corruption is called `frost_like`; zooms are
//! sampled about the center without their detour over whole pixels; results are not rounded to bytes; glass swaps pixels,
//! where the public code copies one over the other.

mod blur;
mod digital;
mod noise;
pub mod picture;
mod weather;

use rand::{SeedableRng, rngs::StdRng};

pub use blur::motion;
pub use digital::brighten;
pub use noise::{gaussian, shot};
pub use picture::Picture;
pub use weather::plasma;

/// One of the fifteen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Corruption {
    GaussianNoise,
    ShotNoise,
    ImpulseNoise,
    DefocusBlur,
    GlassBlur,
    MotionBlur,
    ZoomBlur,
    Snow,
    FrostLike,
    Fog,
    Brightness,
    Contrast,
    Elastic,
    Pixelate,
    Jpeg,
}

/// The weakest is 1.
pub const SEVERITIES: usize = 5;

impl Corruption {
    pub const ALL: [Self; 15] = [
        Self::GaussianNoise,
        Self::ShotNoise,
        Self::ImpulseNoise,
        Self::DefocusBlur,
        Self::GlassBlur,
        Self::MotionBlur,
        Self::ZoomBlur,
        Self::Snow,
        Self::FrostLike,
        Self::Fog,
        Self::Brightness,
        Self::Contrast,
        Self::Elastic,
        Self::Pixelate,
        Self::Jpeg,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::GaussianNoise => "gaussian_noise",
            Self::ShotNoise => "shot_noise",
            Self::ImpulseNoise => "impulse_noise",
            Self::DefocusBlur => "defocus_blur",
            Self::GlassBlur => "glass_blur",
            Self::MotionBlur => "motion_blur",
            Self::ZoomBlur => "zoom_blur",
            Self::Snow => "snow",
            Self::FrostLike => "frost_like",
            Self::Fog => "fog",
            Self::Brightness => "brightness",
            Self::Contrast => "contrast",
            Self::Elastic => "elastic",
            Self::Pixelate => "pixelate",
            Self::Jpeg => "jpeg",
        }
    }

    /// The image corrupted with `severity`, 1 to 5.
    pub fn apply(self, x: &mut Picture, severity: usize, rng: &mut StdRng) {
        let small = x.side < 64;
        let level = severity.clamp(1, SEVERITIES) - 1;
        match self {
            Self::GaussianNoise => noise::gaussian_at(x, level, small, rng),
            Self::ShotNoise => noise::shot_at(x, level, small, rng),
            Self::ImpulseNoise => noise::impulse_at(x, level, small, rng),
            Self::DefocusBlur => blur::defocus_at(x, level, small),
            Self::GlassBlur => blur::glass_at(x, level, small, rng),
            Self::MotionBlur => blur::motion_at(x, level, small, rng),
            Self::ZoomBlur => blur::zoom_at(x, level, small),
            Self::Snow => weather::snow_at(x, level, small, rng),
            Self::FrostLike => weather::frost_like_at(x, level, small, rng),
            Self::Fog => weather::fog_at(x, level, small, rng),
            Self::Brightness => digital::brightness_at(x, level, small),
            Self::Contrast => digital::contrast_at(x, level, small),
            Self::Elastic => digital::elastic_at(x, level, small, rng),
            Self::Pixelate => digital::pixelate_at(x, level, small),
            Self::Jpeg => digital::jpeg_at(x, level, small),
        }
        for p in &mut x.pixels {
            *p = p.clamp(0.0, 1.0);
        }
    }

    /// Image `index` of a set, corrupted with a generator of its own, so that results do not depend on the number of
    /// threads. The severities of an image share their draws.
    pub fn of(self, x: &Picture, severity: usize, seed: u64, index: usize) -> Picture {
        let mut x = x.clone();
        self.apply(&mut x, severity, &mut generator(seed, self as u64, index as u64));
        x
    }
}

/// The generator of image `index` in the stream called `stream`.
pub fn generator(seed: u64, stream: u64, index: u64) -> StdRng {
    // Odd factors keep the seeds apart; the generator hashes them.
    let stream = stream.wrapping_add(1).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let index = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    StdRng::seed_from_u64(seed.wrapping_add(stream).wrapping_add(index))
}
