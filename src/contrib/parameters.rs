//! The random parameters of an augmentation.

use std::fmt::Debug;

use crate::{Error, Result};

/// The crop window of a view, in fractions of the image sides.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CropParameters {
    /// The upper edge, `i` in the authors' code.
    pub top: f32,
    /// The left edge, `j` in the authors' code.
    pub left: f32,
    /// The height.
    pub height: f32,
    /// The width.
    pub width: f32,
}

impl CropParameters {
    /// The whole image.
    pub const WHOLE: Self = Self { top: 0.0, left: 0.0, height: 1.0, width: 1.0 };

    /// The center `(y, x)`, with x mirrored or not.
    fn center(&self, mirrored: bool) -> [f64; 2] {
        let x = f64::from(self.left) + 0.5 * f64::from(self.width);
        let y = f64::from(self.top) + 0.5 * f64::from(self.height);
        [y, if mirrored { 1.0 - x } else { x }]
    }
}

/// The color jitter of a view: four changes in a random order.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct JitterParameters {
    /// Whether the jitter was applied; if not, the other fields equal
    /// [`JitterParameters::NONE`].
    pub applied: bool,
    /// The order of the changes: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [u8; 4],
    /// The brightness factor; 1 for no change.
    pub brightness: f32,
    /// The contrast factor; 1 for no change.
    pub contrast: f32,
    /// The saturation factor; 1 for no change.
    pub saturation: f32,
    /// The hue shift in full turns of the color circle; 0 for no change.
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

/// The augmentation parameters of one view of one image.
///
/// `None` is an unknown parameter; an add-on that needs it returns an error. A known parameter of
/// an augmentation that was not applied has its value in [`AugmentationParameters::untouched`].
///
/// ```
/// use ser_reg::contrib::{AugmentationParameters, CropParameters};
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
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct AugmentationParameters {
    /// The crop window.
    pub crop: Option<CropParameters>,
    /// Whether the view is flipped horizontally.
    pub flip: Option<bool>,
    /// The color jitter.
    pub jitter: Option<JitterParameters>,
    /// Whether the view was converted to grayscale.
    pub grayscale: Option<bool>,
    /// Standard deviation of the Gaussian blur in pixels; 0 for none.
    pub blur: Option<f32>,
    /// Threshold of the solarization, 0 to 1: values from it on were inverted; 1 for none.
    pub solarize: Option<f32>,
    /// Counterclockwise quarter turns.
    pub rotation: Option<u32>,
}

impl AugmentationParameters {
    /// The parameters of the unaugmented image; all are known.
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

    /// The parameter vector of EquiMod (arXiv 2211.01244), unscaled:
    ///
    /// ```text
    /// top, left, height, width, flip | jitter?, order (4), brightness, contrast, saturation, hue, grayscale? | blur?, σ
    /// ```
    ///
    /// It has 17 numbers. With `solarize` an 18th is 1 for a solarized view.
    ///
    /// # Errors
    /// If one of these parameters is `None` or not finite.
    pub fn vector(&self, solarize: bool) -> Result<Vec<f64>> {
        let crop = need("EquiMod", "crop", self.crop)?;
        let jitter = need("EquiMod", "jitter", self.jitter)?;
        let flag = |on: bool| if on { 1.0 } else { 0.0 };
        let mut vector = [crop.top, crop.left, crop.height, crop.width].map(f64::from).to_vec();
        vector.push(flag(need("EquiMod", "flip", self.flip)?));
        vector.push(flag(jitter.applied));
        vector.extend(jitter.order.map(f64::from));
        let strengths = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue];
        vector.extend(strengths.map(f64::from));
        vector.push(flag(need("EquiMod", "grayscale", self.grayscale)?));
        let sigma = need("EquiMod", "blur", self.blur)?;
        vector.extend([flag(sigma > 0.0), f64::from(sigma)]);
        if solarize {
            vector.push(flag(need("EquiMod", "solarize", self.solarize)? < 1.0));
        }
        finite("EquiMod", vector)
    }

    /// AugSelf's differences of center y, center x, height and width. Both centers are mirrored if
    /// this view is flipped.
    pub(super) fn crop_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let (a, b) = (self.known("crop", self.crop)?, self.known("crop", other.crop)?);
        let mirrored = self.known("flip", self.flip)?;
        let ([y1, x1], [y2, x2]) = (a.center(mirrored), b.center(mirrored));
        let sides = |c: CropParameters| (f64::from(c.height), f64::from(c.width));
        let ((h1, w1), (h2, w2)) = (sides(a), sides(b));
        finite("AugSelf", vec![y1 - y2, x1 - x2, h1 - h2, w1 - w2])
    }

    /// AugSelf's differences of the four jitter parameters in units of their ranges; 0 for a range
    /// of no width.
    pub(super) fn color_difference(&self, other: &Self, widths: &[f64; 4]) -> Result<Vec<f64>> {
        let strengths = |jitter: JitterParameters| {
            let JitterParameters { brightness, contrast, saturation, hue, .. } = jitter;
            [brightness, contrast, saturation, hue].map(f64::from)
        };
        let a = strengths(self.known("jitter", self.jitter)?);
        let b = strengths(self.known("jitter", other.jitter)?);
        let each = a.iter().zip(b).zip(widths);
        let scaled = each.map(|((a, b), width)| if *width > 0.0 { (a - b) / width } else { 0.0 });
        finite("AugSelf", scaled.collect())
    }

    pub(super) fn blur_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let (a, b) = (self.known("blur", self.blur)?, self.known("blur", other.blur)?);
        finite("AugSelf", vec![f64::from(a) - f64::from(b)])
    }

    pub(super) fn solarize_difference(&self, other: &Self) -> Result<Vec<f64>> {
        let a = self.known("solarize", self.solarize)?;
        let b = self.known("solarize", other.solarize)?;
        finite("AugSelf", vec![f64::from(a) - f64::from(b)])
    }

    /// 1 if the flips of both views agree, else 0.
    pub(super) fn flips_agree(&self, other: &Self) -> Result<u32> {
        let (a, b) = (self.known("flip", self.flip)?, self.known("flip", other.flip)?);
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
                "AugmentationParameters::{name} of every view (record it in the augmentation; \
                 AugmentationParameters::untouched() has the value for an augmentation that was not applied)"
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

/// Mean and standard deviation of each number of [`AugmentationParameters::vector`] over many
/// draws.
///
/// ```
/// use ser_reg::contrib::{AugmentationParameters, ParameterStatistics};
/// let flipped = AugmentationParameters { flip: Some(true), ..AugmentationParameters::untouched() };
/// let draws = [flipped, AugmentationParameters::untouched()];
/// let statistics = ParameterStatistics::of(&draws, false)?;
/// assert_eq!((statistics.mean[4], statistics.std[4]), (0.5, 0.5));
/// assert_eq!(statistics.std[0], 0.0, "a constant number is scaled to 0");
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ParameterStatistics {
    /// The means, 17 or 18.
    pub mean: Vec<f64>,
    /// The standard deviations, as many as means; a number of deviation 0 is scaled to 0.
    pub std: Vec<f64>,
}

impl ParameterStatistics {
    /// The statistics of some draws of the augmentation; a few thousand suffice.
    ///
    /// # Errors
    /// If there is no draw, or a parameter of the vector is `None` or not finite.
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
        let std = (0..size).map(|k| mean_of(&|v, k| (v[k] - mean[k]).powi(2), k).sqrt()).collect();
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
        let bad = self.mean.iter().find(bad).or(self.std.iter().find(|v| bad(v) || **v < 0.0));
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

/// The length of EquiMod's parameter vector.
pub(super) fn width(solarize: bool) -> usize {
    17 + usize::from(solarize)
}

/// There are parameters for each sample of each view.
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
