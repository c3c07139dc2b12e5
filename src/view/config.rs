//! What a sampler draws from.

use crate::{Error, Filter, Resample, Result, TokenGrid, error::short, group::Subgroup};

/// How the turns and flips of the two views of a sample are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Pairing {
    /// Each view of each sample draws uniformly from the subgroup. The relative element is then
    /// uniform over the subgroup too. On a non-square grid all samples of a view share the parity
    /// of their quarter turns.
    Independent(Subgroup),
    /// The scheme of the authors' code. Flip and half turn are drawn per sample, and the second
    /// view takes the complement of the first. Quarter turns are shared by the batch. The relative
    /// element is always one of the four reflections, and the same for the whole batch.
    Complement,
}

/// Ranges of a random resized crop. Area and aspect are drawn as torchvision draws them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CropRange {
    /// Fraction of the image's area, uniform, within `[1e-6, 1]`.
    pub area: (f64, f64),
    /// Width over height, in units of the image's own aspect, log-uniform, within `[1e-4, 1e4]`.
    pub aspect: (f64, f64),
}

impl Default for CropRange {
    /// Area 0.3 to 1, aspect 3/4 to 4/3.
    fn default() -> Self {
        Self { area: (0.3, 1.0), aspect: (3.0 / 4.0, 4.0 / 3.0) }
    }
}

/// Ranges of a continuous motion about the center of the view, all uniform. The default, `(0, 0)`,
/// leaves a motion out.
///
/// The motions act in this order: shear, rotation (rigid in cells), translation. Masks drop tokens
/// that have no counterpart in the other view. Beyond the border of the source both views show what
/// the padding continues it with.
///
/// ```
/// use ser_reg::view::{AffineRange, ViewConfig};
/// let any_angle = AffineRange { rotation: (-180.0, 180.0), ..Default::default() };
/// let config = ViewConfig { affine: Some(any_angle), min_overlap: 0.25, ..Default::default() };
/// # assert_eq!(config.affine.unwrap().shear, (0.0, 0.0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct AffineRange {
    /// Angle in degrees, counter-clockwise; within ±360.
    pub rotation: (f64, f64),
    /// Shift down and shift right, drawn apart, in units of the view's side; between −1 and 1.
    pub translation: (f64, f64),
    /// Shear along rows and along columns, drawn apart, as in
    /// [`Affine::shear`](crate::group::Affine::shear); within ±0.999999.
    pub shear: (f64, f64),
}

/// What a [`ViewSampler`](super::ViewSampler) draws from.
///
/// [`ViewConfig::default`] draws turns and flips only, so that a view has the size of its image.
/// [`ViewConfig::paper`] also scales the views.
///
/// A scaled view has another height and width than its image, and all samples of a batch share
/// them. It needs a model that accepts any size: a convolutional network, or a ViT that
/// interpolates its position embedding. A ViT of fixed size fails inside its own code.
///
/// ```
/// use ser_reg::ViewConfig;
/// assert_eq!(ViewConfig::default().area, (1.0, 1.0));
/// assert_eq!(ViewConfig::paper().area, (0.7, 1.3));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ViewConfig {
    /// How turns and flips are drawn; default: uniformly from D4 for each view of each sample.
    pub pairing: Pairing,
    /// Range of the token grid's area relative to the base grid, uniform; default `(1, 1)`, which
    /// with aspect `(1, 1)` leaves scaling out.
    pub area: (f64, f64),
    /// Range of the token grid's aspect (columns over rows, relative to the base grid),
    /// log-uniform, within `[1e-4, 1e4]`; default `(1, 1)`.
    pub aspect: (f64, f64),
    /// A random crop per sample and view; `None`, the default and the paper's choice: both views
    /// show the whole image.
    pub crop: Option<CropRange>,
    /// A random motion per sample and view, after the crop and before the turn; `None`, the default
    /// and the paper's choice: turns and flips only.
    pub affine: Option<AffineRange>,
    /// Smallest share of each view's tokens that the other view of the sample sees too, in `[0,
    /// 1]`.
    ///
    /// A second view with a smaller share is drawn again, twenty times at most. Then it takes the
    /// crop and motion of the first view, under its own turn. With 0, the default, nothing is drawn
    /// again; above 0 every sample has an overlap. The redraws come from a generator of their own,
    /// so that the caller's generator advances by the same number of draws either way.
    pub min_overlap: f64,
    /// How images are resampled; default: [`Resample::default`].
    ///
    /// Bicubic filters overshoot at edges, so that pixels in `[0, 1]` can leave this range. Views are not clamped,
    /// because an action is linear. Clamp them before a step that needs the range, such as a power.
    pub resample: Resample,
}

impl Default for ViewConfig {
    /// Turns and flips of D4 without scaling: area `(1, 1)`, aspect `(1, 1)`, no crop, no motion.
    fn default() -> Self {
        Self {
            pairing: Pairing::Independent(Subgroup::D4),
            area: (1.0, 1.0),
            aspect: (1.0, 1.0),
            crop: None,
            affine: None,
            min_overlap: 0.0,
            resample: Resample::default(),
        }
    }
}

/// Aspects beyond these are refused; they would underflow within a crop.
const ASPECT: (f64, f64) = (1e-4, 1e4);

/// The largest shear of one axis; the matrix of two shears of 1 is singular.
const SHEAR: f64 = 0.999_999;

/// Sides of a view that rotates may differ by this factor; beyond it the rotation is singular in
/// f64.
const SLENDER: f64 = 1e5;

impl ViewConfig {
    /// The scales of the SER paper (arXiv 2603.06693): area 0.7 to 1.3, aspect 3/4 to 4/3;
    /// otherwise the default. The model must accept images of any size.
    pub fn paper() -> Self {
        Self { area: (0.7, 1.3), aspect: (3.0 / 4.0, 4.0 / 3.0), ..Self::default() }
    }

    /// Whether two views of a sample may show different parts of it.
    pub(super) fn is_partial(&self) -> bool {
        self.crop.is_some() || self.affine.is_some()
    }

    /// The token grid of a view of this area and aspect; no side falls below one cell.
    pub(super) fn scaled(&self, base: TokenGrid, area: f64, aspect: f64) -> Result<TokenGrid> {
        let side = |n: usize, s: f64| (n as f64 * s.sqrt()).round().max(1.0) as usize;
        TokenGrid::new(side(base.rows(), area / aspect), side(base.cols(), area * aspect))
    }

    /// Refuses every configuration of which a draw could fail.
    pub(super) fn check(&self, base: TokenGrid) -> Result<()> {
        check_range("ViewConfig::area", self.area, (0.0, f64::MAX))?;
        check_range("ViewConfig::aspect", self.aspect, ASPECT)?;
        self.check_grids(base)?;
        if let Some(crop) = self.crop {
            check_range("CropRange::area", crop.area, (1e-6, 1.0))?;
            check_range("CropRange::aspect", crop.aspect, ASPECT)?;
        }
        if let Some(range) = self.affine {
            check_motion("AffineRange::rotation", range.rotation, "<= 360", |v| v <= 360.0)?;
            // A shift by a whole side leaves nothing of the image.
            check_motion("AffineRange::translation", range.translation, "< 1", |v| v < 1.0)?;
            check_motion("AffineRange::shear", range.shear, "<= 0.999999", |v| v <= SHEAR)?;
        }
        if !(0.0..=1.0).contains(&self.min_overlap) {
            return Err(Error::config(
                "ViewConfig::min_overlap",
                "a fraction within [0, 1]",
                self.min_overlap,
            ));
        }
        self.resample.check()?;
        if self.resample.filter == Filter::Fourier && self.is_partial() {
            return Err(Error::config(
                "ViewConfig::resample",
                "another filter than Fourier for crops and motions (it keeps the period of the map: \
                 whole images only)",
                "Filter::Fourier",
            ));
        }
        Ok(())
    }

    /// That the largest view has a grid, and that the most slender one can rotate.
    fn check_grids(&self, base: TokenGrid) -> Result<()> {
        let ((least, most), (low, high)) = (self.area, self.aspect);
        let fail = |expected: String| {
            let got = format!("area {:?}, aspect {:?}", self.area, self.aspect);
            Err(Error::config("ViewConfig::area", expected, got))
        };
        let tall = self.scaled(base, most, low);
        let wide = self.scaled(base, most, high);
        let (Ok(tall), Ok(wide)) = (tall, wide) else {
            return fail(format!("views of fewer than 2^32 tokens on the base grid {base}"));
        };
        let rotates = self.affine.is_some_and(|range| range.rotation != (0.0, 0.0));
        let short = self.scaled(base, least, high)?.rows();
        let narrow = self.scaled(base, least, low)?.cols();
        let slender = (tall.rows() as f64 / narrow as f64).max(wide.cols() as f64 / short as f64);
        if rotates && slender > SLENDER {
            return fail(format!(
                "rotated views whose sides differ by a factor of {SLENDER:e} at most"
            ));
        }
        Ok(())
    }
}

fn check_motion(
    field: &'static str,
    (lo, hi): (f64, f64),
    bound: &str,
    within: impl Fn(f64) -> bool,
) -> Result<()> {
    if lo <= hi && [lo, hi].iter().all(|v| v.is_finite() && within(v.abs())) {
        return Ok(());
    }
    Err(Error::config(
        field,
        format!("a range low <= high with absolute values {bound} ((0, 0) for none)"),
        format!("({}, {})", short(lo), short(hi)),
    ))
}

/// A range `0 < lo <= hi` within `least..=most`.
fn check_range(field: &'static str, (lo, hi): (f64, f64), (least, most): (f64, f64)) -> Result<()> {
    if lo.is_finite() && hi.is_finite() && 0.0 < lo && least <= lo && lo <= hi && hi <= most {
        return Ok(());
    }
    let most = match most {
        f64::MAX => String::new(),
        most => format!(" <= {most}"),
    };
    let least = match least {
        0.0 => "0 < ".to_string(),
        least => format!("{least} <= "),
    };
    Err(Error::config(
        field,
        format!("a range {least}low <= high{most}, finite"),
        format!("({}, {})", short(lo), short(hi)),
    ))
}
