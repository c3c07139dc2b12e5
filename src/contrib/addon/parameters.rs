//! What an augmentation drew, as numbers that a head can be told or asked for.

use std::fmt::Debug;

use crate::{Error, Result};

/// The window that a view shows, as fractions of the picture's sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropParameters {
    /// First row (the authors' `i`) and first column (`j`).
    pub top: f32,
    /// See `top`.
    pub left: f32,
    /// Rows and columns of the window.
    pub height: f32,
    /// See `height`.
    pub width: f32,
}

impl CropParameters {
    /// All of the picture.
    pub const WHOLE: Self = Self {
        top: 0.0,
        left: 0.0,
        height: 1.0,
        width: 1.0,
    };

    /// The center `(y, x)`, as seen in a mirror or not.
    fn center(&self, mirrored: bool) -> [f64; 2] {
        let x = f64::from(self.left) + 0.5 * f64::from(self.width);
        let y = f64::from(self.top) + 0.5 * f64::from(self.height);
        [y, if mirrored { 1.0 - x } else { x }]
    }
}

/// A color jitter: four changes, one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JitterParameters {
    /// Whether it was applied; if not, the rest is that of [`JitterParameters::NONE`].
    pub applied: bool,
    /// Which change came first, second, …: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [u8; 4],
    /// Factors, 1 for no change.
    pub brightness: f32,
    /// See `brightness`.
    pub contrast: f32,
    /// See `brightness`.
    pub saturation: f32,
    /// Whole turns of the color circle, 0 for no change.
    pub hue: f32,
}

impl JitterParameters {
    /// No jitter.
    pub const NONE: Self = Self {
        applied: false,
        order: [0, 1, 2, 3],
        brightness: 1.0,
        contrast: 1.0,
        saturation: 1.0,
        hue: 0.0,
    };
}

/// What was drawn for one view of one picture. `None` is what the augmentation did not write down: an add-on that needs it
/// says so. What the augmentation knows and left alone has the values of [`AugmentationParameters::untouched`].
///
/// ```
/// use ser_reg::contrib::addon::{AugmentationParameters, CropParameters};
/// let view = AugmentationParameters {
///     crop: Some(CropParameters { top: 0.25, left: 0.0, height: 0.5, width: 0.5 }),
///     flip: Some(true),
///     ..AugmentationParameters::untouched()
/// };
/// assert_eq!(view.vector(false)?.len(), 17);
/// assert_eq!(view.vector(true)?.len(), 18);
/// assert_eq!(view.vector(false)?[..5], [0.25, 0.0, 0.5, 0.5, 1.0]);
/// let unknown = AugmentationParameters::default();
/// assert!(unknown.vector(false).unwrap_err().to_string().contains("crop"));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AugmentationParameters {
    /// The window.
    pub crop: Option<CropParameters>,
    /// Whether the view is mirrored, left and right exchanged.
    pub flip: Option<bool>,
    /// Brightness, contrast, saturation, hue.
    pub jitter: Option<JitterParameters>,
    /// Whether colors were taken away.
    pub grayscale: Option<bool>,
    /// Standard deviation of the blur; 0 for none.
    pub blur: Option<f32>,
    /// Values from here on, of 0 to 1, were inverted; 1 for none.
    pub solarize: Option<f32>,
    /// Quarter turns, counter-clockwise as displayed.
    pub rotation: Option<u32>,
}

impl AugmentationParameters {
    /// The picture as it is: everything known, nothing done.
    pub const fn untouched() -> Self {
        Self {
            crop: Some(CropParameters::WHOLE),
            flip: Some(false),
            jitter: Some(JitterParameters::NONE),
            grayscale: Some(false),
            blur: Some(0.0),
            solarize: Some(1.0),
            rotation: Some(0),
        }
    }

    /// EquiMod's description of a view (arXiv 2211.01244), before it is scaled:
    ///
    /// ```text
    /// top, left, height, width, flip | jitter?, order (4), brightness, contrast, saturation, hue, grayscale? | blur?, σ
    /// ```
    ///
    /// 17 numbers, and whether the view was solarized as an 18th if `solarize`.
    ///
    /// # Errors
    /// If one of these was not written down, or is not finite.
    pub fn vector(&self, solarize: bool) -> Result<Vec<f64>> {
        let crop = need("EquiMod", "crop", self.crop)?;
        let jitter = need("EquiMod", "jitter", self.jitter)?;
        let flag = |on: bool| if on { 1.0 } else { 0.0 };
        let mut vector = [crop.top, crop.left, crop.height, crop.width]
            .map(f64::from)
            .to_vec();
        vector.push(flag(need("EquiMod", "flip", self.flip)?));
        vector.push(flag(jitter.applied));
        vector.extend(jitter.order.map(f64::from));
        let strengths = [
            jitter.brightness,
            jitter.contrast,
            jitter.saturation,
            jitter.hue,
        ];
        vector.extend(strengths.map(f64::from));
        vector.push(flag(need("EquiMod", "grayscale", self.grayscale)?));
        let sigma = need("EquiMod", "blur", self.blur)?;
        vector.extend([flag(sigma > 0.0), f64::from(sigma)]);
        if solarize {
            vector.push(flag(need("EquiMod", "solarize", self.solarize)? < 1.0));
        }
        finite("EquiMod", vector)
    }

    /// AugSelf's difference of crops: of the centers' y and x, of heights, of widths. Both centers are seen in a mirror if
    /// this view is mirrored.
    pub(super) fn crop_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let (a, b) = (
            self.known("crop", self.crop)?,
            self.known("crop", other.crop)?,
        );
        let mirrored = self.known("flip", self.flip)?;
        let ([y1, x1], [y2, x2]) = (a.center(mirrored), b.center(mirrored));
        let sides = |c: CropParameters| (f64::from(c.height), f64::from(c.width));
        let ((h1, w1), (h2, w2)) = (sides(a), sides(b));
        finite("AugSelf", vec![y1 - y2, x1 - x2, h1 - h2, w1 - w2])
    }

    /// AugSelf's difference of the four strengths, each in units of the range that it is drawn from; 0 where that has no width.
    pub(super) fn color_difference(&self, other: &Self, widths: &[f64; 4]) -> Result<Vec<f64>> {
        let strengths = |jitter: JitterParameters| {
            let JitterParameters {
                brightness,
                contrast,
                saturation,
                hue,
                ..
            } = jitter;
            [brightness, contrast, saturation, hue].map(f64::from)
        };
        let a = strengths(self.known("jitter", self.jitter)?);
        let b = strengths(self.known("jitter", other.jitter)?);
        let each = a.iter().zip(b).zip(widths);
        let scaled = each.map(|((a, b), width)| if *width > 0.0 { (a - b) / width } else { 0.0 });
        finite("AugSelf", scaled.collect())
    }

    pub(super) fn blur_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let (a, b) = (
            self.known("blur", self.blur)?,
            self.known("blur", other.blur)?,
        );
        finite("AugSelf", vec![f64::from(a) - f64::from(b)])
    }

    pub(super) fn solarize_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let a = self.known("solarize", self.solarize)?;
        let b = self.known("solarize", other.solarize)?;
        finite("AugSelf", vec![f64::from(a) - f64::from(b)])
    }

    /// 1 if both are mirrored, or neither.
    pub(super) fn flips_agree(&self, other: &Self) -> Result<u32> {
        let (a, b) = (
            self.known("flip", self.flip)?,
            self.known("flip", other.flip)?,
        );
        Ok(u32::from(a == b))
    }

    /// Quarter turns from the other view to this one, modulo 4.
    pub(super) fn rotation_difference(&self, other: &Self) -> Result<u32> {
        let a = self.known("rotation", self.rotation)?;
        let b = self.known("rotation", other.rotation)?;
        Ok((a % 4 + 4 - b % 4) % 4)
    }

    fn known<T>(&self, name: &'static str, value: Option<T>) -> Result<T> {
        need("AugSelf", name, value)
    }
}

fn need<T>(op: &'static str, name: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| {
        Error::input(
            op,
            format!(
                "AugmentationParameters::{name} of every view (have the augmentation write down what it draws; \
                 AugmentationParameters::untouched() has what it leaves alone)"
            ),
            "None",
        )
    })
}

fn finite(op: &'static str, values: Vec<f64>) -> Result<Vec<f64>> {
    match values.iter().find(|v| !v.is_finite()) {
        Some(v) => Err(Error::input(op, "finite augmentation parameters", v)),
        None => Ok(values),
    }
}

/// Mean and standard deviation of each number of [`AugmentationParameters::vector`], over what an augmentation draws.
///
/// ```
/// use ser_reg::contrib::addon::{AugmentationParameters, ParameterStatistics};
/// let mirrored = AugmentationParameters { flip: Some(true), ..AugmentationParameters::untouched() };
/// let seen = [mirrored, AugmentationParameters::untouched()];
/// let statistics = ParameterStatistics::of(&seen, false)?;
/// assert_eq!((statistics.mean[4], statistics.std[4]), (0.5, 0.5));
/// assert_eq!(statistics.std[0], 0.0, "what never changes says nothing, and becomes 0");
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterStatistics {
    /// Means, 17 or 18.
    pub mean: Vec<f64>,
    /// Standard deviations, as many; a number whose deviation is 0 becomes 0.
    pub std: Vec<f64>,
}

impl ParameterStatistics {
    /// Of some views' parameters; a few thousand draws of the recipe will do.
    ///
    /// # Errors
    /// If there are none, or one of them lacks a parameter.
    pub fn of(parameters: &[AugmentationParameters], solarize: bool) -> Result<Self> {
        if parameters.is_empty() {
            return Err(Error::input(
                "ParameterStatistics",
                "the parameters of at least one view",
                "none",
            ));
        }
        let vectors = parameters.iter().map(|p| p.vector(solarize));
        let vectors: Vec<Vec<f64>> = vectors.collect::<Result<_>>()?;
        let (n, size) = (vectors.len() as f64, width(solarize));
        let mean_of =
            |f: &dyn Fn(&[f64], usize) -> f64, k| vectors.iter().map(|v| f(v, k)).sum::<f64>() / n;
        let mean: Vec<f64> = (0..size).map(|k| mean_of(&|v, k| v[k], k)).collect();
        let std = (0..size)
            .map(|k| mean_of(&|v, k| (v[k] - mean[k]).powi(2), k).sqrt())
            .collect();
        Ok(Self { mean, std })
    }

    pub(super) fn check(&self, solarize: bool) -> Result<()> {
        let (want, mean, std) = (width(solarize), self.mean.len(), self.std.len());
        if mean != want || std != want {
            return Err(Error::config(
                "EquiModConfig::statistics",
                format!("{want} means and deviations"),
                format!("{mean} and {std}"),
            ));
        }
        let bad = |v: &&f64| !v.is_finite();
        let bad = self
            .mean
            .iter()
            .find(bad)
            .or(self.std.iter().find(|v| bad(v) || **v < 0.0));
        match bad {
            Some(v) => Err(Error::config(
                "EquiModConfig::statistics",
                "finite means, and finite deviations of at least 0",
                v,
            )),
            None => Ok(()),
        }
    }

    pub(super) fn scale(&self, vector: &[f64]) -> impl Iterator<Item = f64> {
        let scale = |((v, mean), std): ((&f64, &f64), &f64)| match *std > 0.0 {
            true => (v - mean) / std,
            false => 0.0,
        };
        vector.iter().zip(&self.mean).zip(&self.std).map(scale)
    }
}

/// Numbers in EquiMod's description of a view.
pub(super) fn width(solarize: bool) -> usize {
    17 + usize::from(solarize)
}

/// That there are parameters for each sample of each view.
pub(super) fn check_counts(
    op: &'static str,
    parameters: [&[AugmentationParameters]; 2],
    batch: usize,
) -> Result<()> {
    let counts = parameters.map(<[_]>::len);
    if counts == [batch; 2] {
        return Ok(());
    }
    Err(Error::input(
        op,
        format!("the augmentation parameters of {batch} samples in each of two views"),
        format!("{} and {}", counts[0], counts[1]),
    ))
}
