//! Sequences in which an image changes little by little (ImageNet-P of Hendrycks & Dietterich, arXiv 1903.12261).
//!
//! Frames are those of their sequences for 32 pixels; what lies beyond the border is a choice. Snow is left out.

use nalgebra::{Matrix3, Matrix3x4, Matrix4, Matrix4x3, Vector3};

use super::corruption::{self, Picture, generator, picture::Edge};

/// A kind of sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Perturbation {
    GaussianNoise,
    ShotNoise,
    MotionBlur,
    ZoomBlur,
    Brightness,
    Translate,
    Rotate,
    Tilt,
    Scale,
}

impl Perturbation {
    pub const ALL: [Self; 9] = [
        Self::GaussianNoise,
        Self::ShotNoise,
        Self::MotionBlur,
        Self::ZoomBlur,
        Self::Brightness,
        Self::Translate,
        Self::Rotate,
        Self::Tilt,
        Self::Scale,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::GaussianNoise => "gaussian_noise",
            Self::ShotNoise => "shot_noise",
            Self::MotionBlur => "motion_blur",
            Self::ZoomBlur => "zoom_blur",
            Self::Brightness => "brightness",
            Self::Translate => "translate",
            Self::Rotate => "rotate",
            Self::Tilt => "tilt",
            Self::Scale => "scale",
        }
    }

    /// Frames of a sequence.
    pub fn length(self) -> usize {
        match self {
            Self::MotionBlur => 21,
            Self::Translate => 16,
            _ => 31,
        }
    }

    /// Whether frames are independent draws about the first, clean one.
    pub fn is_noise(self) -> bool {
        matches!(self, Self::GaussianNoise | Self::ShotNoise)
    }

    /// The sequence of image `index`; beyond the border lies `edge`.
    pub fn frames(self, x: &Picture, edge: Edge, seed: u64, index: u64) -> Vec<Picture> {
        // Streams of their own, apart from those of the corruptions.
        let mut rng = generator(seed, 100 + self as u64, index);
        let mut mixed = x.clone();
        let frames = (0..self.length()).map(|i| {
            let centered = i as f32 - 15.0;
            let mut frame = match self {
                Self::GaussianNoise | Self::ShotNoise if i == 0 => x.clone(),
                Self::GaussianNoise => {
                    let mut y = x.clone();
                    corruption::gaussian(&mut y, 0.02, &mut rng);
                    y
                }
                Self::ShotNoise => {
                    let mut y = x.clone();
                    corruption::shot(&mut y, 700.0, &mut rng);
                    y
                }
                Self::MotionBlur => corruption::motion(x, 6, 1.8, 9.0 * (i as f32 - 20.0)),
                Self::ZoomBlur if i == 0 => x.clone(),
                Self::ZoomBlur => {
                    let zoomed = x.zoomed(1.0 + 0.004 * i as f32, edge);
                    let pixels = mixed.pixels.iter_mut().zip(zoomed.pixels);
                    pixels.for_each(|(m, z)| *m += z);
                    let mut y = mixed.clone();
                    y.pixels.iter_mut().for_each(|p| *p /= (i + 1) as f32);
                    y
                }
                Self::Brightness => {
                    let mut y = x.clone();
                    corruption::brighten(&mut y, 0.015 * centered);
                    y
                }
                Self::Translate => {
                    let right = i as f32 - 7.0;
                    x.warp(edge, |row, col| (row, col - right))
                }
                Self::Rotate => rotated(x, edge, centered),
                Self::Tilt => tilted(x, edge, 0.75 * centered),
                Self::Scale => x.zoomed(0.7 + 0.02 * i as f32, edge),
            };
            frame.pixels.iter_mut().for_each(|p| *p = p.clamp(0.0, 1.0));
            frame
        });
        frames.collect()
    }
}

fn rotated(x: &Picture, edge: Edge, degrees: f32) -> Picture {
    let center = (x.side as f32 - 1.0) / 2.0;
    let (sin, cos) = degrees.to_radians().sin_cos();
    x.warp(edge, |row, col| {
        let (y, x) = (row - center, col - center);
        (center + cos * y - sin * x, center + sin * y + cos * x)
    })
}

/// Seen from the side: the plane of the image is turned about both of its axes before a camera as far away as the
/// diagonal is long.
fn tilted(x: &Picture, edge: Edge, degrees: f32) -> Picture {
    let side = f64::from(x.side as u32);
    let far = side * 2f64.sqrt();
    let (sin, cos) = f64::from(degrees).to_radians().sin_cos();
    let half = side / 2.0;
    #[rustfmt::skip]
    let centered = Matrix4x3::new(
        1.0, 0.0, -half,
        0.0, 1.0, -half,
        0.0, 0.0, 0.0,
        0.0, 0.0, 1.0,
    );
    #[rustfmt::skip]
    let about_x = Matrix4::new(
        1.0, 0.0, 0.0, 0.0,
        0.0, cos, -sin, 0.0,
        0.0, sin, cos, 0.0,
        0.0, 0.0, 0.0, 1.0,
    );
    #[rustfmt::skip]
    let about_y = Matrix4::new(
        cos, 0.0, -sin, 0.0,
        0.0, 1.0, 0.0, 0.0,
        sin, 0.0, cos, 0.0,
        0.0, 0.0, 0.0, 1.0,
    );
    #[rustfmt::skip]
    let camera = Matrix3x4::new(
        far, 0.0, half, half * far,
        0.0, far, half, half * far,
        0.0, 0.0, 1.0, far,
    );
    let map: Matrix3<f64> = camera * about_x * about_y * centered;
    // Far from edge-on, so there is an inverse.
    let Some(back) = map.try_inverse() else {
        return x.clone();
    };
    x.warp(edge, |row, col| {
        let p = back * Vector3::new(f64::from(col), f64::from(row), 1.0);
        ((p.y / p.z) as f32, (p.x / p.z) as f32)
    })
}
