//! Pairs of geometric views of one batch, and the relative element that aligns their token maps.

use candle_core::Tensor;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    Error, Filter, GridOperator, Resample, Result, TokenGrid,
    group::{Affine, D4, Element, GroupAction, Scale, Subgroup, Window},
};

/// Draws of a second view before it takes the chart of the first.
const TRIES: usize = 20;

/// How the turns and flips of the two views of a sample are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Each view of each sample draws uniformly from the subgroup, so that the relative element is uniform over it too.
    /// On a non-square grid all samples of a view share the parity of their quarter turns.
    Independent(Subgroup),
    /// As in the authors' code: flip and half turn per sample, the second view taking the complement of the first;
    /// quarter turns shared by the batch. The relative element is then always one of the four reflections, and the same
    /// for the whole batch.
    Complement,
}

/// Ranges of a random resized crop: area as a fraction of the image, aspect as width over height, log-uniform.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropRange {
    /// Fraction of the image's area, within `(0, 1]`.
    pub area: (f64, f64),
    /// Width over height, in units of the image's own aspect.
    pub aspect: (f64, f64),
}

impl Default for CropRange {
    /// Area 0.3 to 1, aspect 3/4 to 4/3.
    fn default() -> Self {
        Self {
            area: (0.3, 1.0),
            aspect: (3.0 / 4.0, 4.0 / 3.0),
        }
    }
}

/// Ranges of a continuous pose about the center of the view, all uniform; `(0, 0)`, the default, leaves a motion out.
///
/// The motions act in this order: shear, rotation (rigid in cells), translation. Masks drop tokens that have no counterpart
/// in the other view. Beyond the border of the source both views show what the padding continues it with.
///
/// ```
/// use ser_reg::view::{AffineRange, ViewConfig};
/// let any_angle = AffineRange { rotation: (-180.0, 180.0), ..Default::default() };
/// let config = ViewConfig { affine: Some(any_angle), min_overlap: 0.25, ..Default::default() };
/// # assert_eq!(config.affine.unwrap().shear, (0.0, 0.0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AffineRange {
    /// Angle in degrees, counter-clockwise; within ±360.
    pub rotation: (f64, f64),
    /// Shift down and shift right, drawn apart, in units of the view's side; between −1 and 1.
    pub translation: (f64, f64),
    /// Shear along rows and along columns, drawn apart, as in [`Affine::shear`]; between −1 and 1.
    pub shear: (f64, f64),
}

/// What a [`ViewSampler`] draws from. The default draws freely from D4 with the paper's scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ViewConfig {
    /// How turns and flips are drawn.
    pub pairing: Pairing,
    /// Range of the token grid's area relative to the base grid, uniform; `(1, 1)` with aspect `(1, 1)`: no scaling.
    pub area: (f64, f64),
    /// Range of the token grid's aspect (columns over rows, relative to the base grid), log-uniform.
    pub aspect: (f64, f64),
    /// A random crop per sample and view; `None`, the paper's choice: both views show the whole image.
    pub crop: Option<CropRange>,
    /// A random pose per sample and view, after the crop and before the turn; `None`, the paper's choice: turns and flips
    /// only.
    pub affine: Option<AffineRange>,
    /// Smallest share of each view's tokens that the other view of the sample sees too, in `[0, 1]`. A second view with a
    /// smaller one is drawn again, twenty times at most; then it shows the crop and pose of the first, under its own turn.
    /// With 0, the default, nothing is drawn again; above it every sample has an overlap. What is drawn again comes from a
    /// generator of its own, so that the caller's moves on as it would.
    pub min_overlap: f64,
    /// How images are resampled.
    pub resample: Resample,
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self {
            pairing: Pairing::Independent(Subgroup::D4),
            area: (0.7, 1.3),
            aspect: (3.0 / 4.0, 4.0 / 3.0),
            crop: None,
            affine: None,
            min_overlap: 0.0,
            resample: Resample::default(),
        }
    }
}

impl ViewConfig {
    /// Whether two views of a sample may show different parts of it.
    fn is_partial(&self) -> bool {
        self.crop.is_some() || self.affine.is_some()
    }
}

/// Draws pairs of views.
///
/// Scales are snapped to whole tokens: with area `a ~ U(area)` and aspect `q` log-uniform the view has
/// `round(rows·√(a/q)) × round(cols·√(a·q))` tokens, shared by the batch. Source: arXiv 2603.06693 and the authors' code.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, view::{ViewConfig, ViewSampler}};
///
/// let sampler = ViewSampler::new(TokenGrid::square(7)?, ViewConfig::default())?; // 28 px, patches of 4
/// let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 2)?;
/// let images = Tensor::zeros((2, 3, 28, 28), DType::F32, &Device::Cpu)?;
/// let view = views.first.apply(&images)?;
/// assert_eq!(view.dims()[2], 4 * views.first.grid().rows());
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ViewSampler {
    config: ViewConfig,
    base: TokenGrid,
}

impl ViewSampler {
    /// A sampler for images whose token grid is `base`.
    ///
    /// # Errors
    /// If a range is reversed or not finite, a scale or crop is not positive, a crop's area exceeds 1, a pose lies beyond the
    /// bounds of [`AffineRange`], `min_overlap` is no fraction, or crops or poses are to be resampled by
    /// [`Filter::Fourier`].
    pub fn new(base: TokenGrid, config: ViewConfig) -> Result<Self> {
        check_range("ViewConfig::area", config.area, f64::MAX)?;
        check_range("ViewConfig::aspect", config.aspect, f64::MAX)?;
        if let Some(crop) = config.crop {
            check_range("CropRange::area", crop.area, 1.0)?;
            check_range("CropRange::aspect", crop.aspect, f64::MAX)?;
        }
        if let Some(range) = config.affine {
            check_motion("AffineRange::rotation", range.rotation, "<= 360", |v| {
                v <= 360.0
            })?;
            // A shift by a whole side leaves nothing of the image, a shear of one can be singular.
            for (field, range) in [
                ("AffineRange::translation", range.translation),
                ("AffineRange::shear", range.shear),
            ] {
                check_motion(field, range, "< 1", |v| v < 1.0)?;
            }
        }
        if !(0.0..=1.0).contains(&config.min_overlap) {
            return Err(Error::config(
                "ViewConfig::min_overlap",
                "a fraction within [0, 1]",
                config.min_overlap,
            ));
        }
        config.resample.check()?;
        if config.resample.filter == Filter::Fourier && config.is_partial() {
            return Err(Error::config(
                "ViewConfig::resample",
                "another filter than Fourier for crops and poses (it keeps the period of the map: whole images only)",
                "Filter::Fourier",
            ));
        }
        Ok(Self { config, base })
    }

    /// Draws both views of a batch. The same state of `rng` gives the same draw.
    ///
    /// # Errors
    /// If the batch is empty, or a drawn scale leaves a grid without cells or with too many.
    pub fn sample_pair<R: Rng + ?Sized>(&self, rng: &mut R, batch: usize) -> Result<ViewPair> {
        if batch == 0 {
            return Err(Error::input(
                "ViewSampler::sample_pair",
                "a batch of at least one sample",
                "0",
            ));
        }
        let (mut first, mut second) = match self.config.pairing {
            Pairing::Independent(group) => (
                self.sample_free(rng, group, batch)?,
                self.sample_free(rng, group, batch)?,
            ),
            Pairing::Complement => self.sample_complement(rng, batch)?,
        };
        let seed = rng.random();
        if self.config.min_overlap > 0.0 && self.config.is_partial() {
            self.overlap(&mut first, &mut second, seed)?;
        }
        let view = |draft: Draft| View {
            elements: draft.samples.iter().map(|s| s.element).collect(),
            base: self.base,
            grid: draft.grid,
            resample: self.config.resample,
        };
        Ok(ViewPair {
            first: view(first),
            second: view(second),
            seed,
        })
    }

    /// Draws second views again until each sees enough of the first.
    fn overlap(&self, first: &mut Draft, second: &mut Draft, seed: u64) -> Result<()> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let (from, to) = (first.grid, second.grid);
        for (one, two) in first.samples.iter().zip(&mut second.samples) {
            let enough = |two: &Sample| -> Result<bool> {
                let share = overlap(&Element::relative(&one.element, &two.element), from, to)?;
                Ok(share >= self.config.min_overlap)
            };
            let mut tries = 0;
            while !enough(two)? {
                if tries == TRIES {
                    *two = self.sample(one.chart, two.turn, to)?;
                    break;
                }
                *two = self.sample(self.chart(rng, two.turn, to)?, two.turn, to)?;
                tries += 1;
            }
        }
        Ok(())
    }

    fn sample_free<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        group: Subgroup,
        batch: usize,
    ) -> Result<Draft> {
        let grid = self.sample_grid(rng)?;
        let mut elements = group.elements().to_vec();
        if !self.base.is_square() {
            let odd = elements[rng.random_range(0..elements.len())].swaps_axes();
            elements.retain(|g| g.swaps_axes() == odd);
        }
        // The turned base grid is stretched to `grid` rather than turned after: then a square base may mix all turns.
        let turned = |g: &D4| g.swaps_axes() && !self.base.is_square();
        let grid = if turned(&elements[0]) {
            grid.transposed()
        } else {
            grid
        };
        let draw = |_| {
            let turn = elements[rng.random_range(0..elements.len())];
            self.sample(self.chart(rng, turn, grid)?, turn, grid)
        };
        Ok(Draft {
            samples: (0..batch).map(draw).collect::<Result<_>>()?,
            grid,
        })
    }

    fn sample_complement<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        batch: usize,
    ) -> Result<(Draft, Draft)> {
        let choices: Vec<(bool, bool)> = (0..batch).map(|_| (rng.random(), rng.random())).collect();
        let mut view = |complement: bool| {
            let scaled = self.sample_grid(rng)?;
            let turns = D4::rot90(rng.random_range(0..4));
            let grid = if turns.swaps_axes() {
                scaled.transposed()
            } else {
                scaled
            };
            let draw = |&(half_turn, flip): &(bool, bool)| {
                let half_turn = D4::rot90(if half_turn ^ complement { 2 } else { 0 });
                let flip = D4::new(0, flip ^ complement);
                let turn = turns.compose(&flip).compose(&half_turn);
                self.sample(self.chart(rng, turn, grid)?, turn, grid)
            };
            Ok::<_, Error>(Draft {
                samples: choices.iter().map(draw).collect::<Result<_>>()?,
                grid,
            })
        };
        Ok((view(false)?, view(true)?))
    }

    fn sample_grid<R: Rng + ?Sized>(&self, rng: &mut R) -> Result<TokenGrid> {
        let area = rng.random_range(self.config.area.0..=self.config.area.1);
        let aspect = log_uniform(rng, self.config.aspect);
        let side = |n: usize, s: f64| (n as f64 * s.sqrt()).round() as usize;
        TokenGrid::new(
            side(self.base.rows(), area / aspect),
            side(self.base.cols(), area * aspect),
        )
    }

    /// What a view shows of the source before it is turned and resized to `grid`: a crop in a pose.
    fn chart<R: Rng + ?Sized>(&self, rng: &mut R, turn: D4, grid: TokenGrid) -> Result<Element> {
        let window = match self.config.crop {
            Some(range) => sample_window(rng, range)?,
            None => Window::identity(),
        };
        let crop = Element::from(window);
        let Some(range) = self.config.affine else {
            return Ok(crop);
        };
        // Rigid in the cells that the view will have; a quarter turn is still to come.
        let upright = if turn.swaps_axes() {
            grid.transposed()
        } else {
            grid
        };
        let mut draw = |(lo, hi): (f64, f64)| rng.random_range(lo..=hi);
        let rotation = Affine::rotation_on(draw(range.rotation), upright, upright)?;
        let translation = Affine::translation(draw(range.translation), draw(range.translation))?;
        let shear = Affine::shear(draw(range.shear), draw(range.shear))?;
        Ok(crop.then(translation.compose(&rotation).compose(&shear)))
    }

    /// The chart, turned, resized to `grid`.
    fn sample(&self, chart: Element, turn: D4, grid: TokenGrid) -> Result<Sample> {
        // Its sides in cells; poses leave them as the crop made them.
        let [h, w] = chart.zoom();
        let (h, w) = (h * self.base.rows() as f64, w * self.base.cols() as f64);
        let (h, w) = if turn.swaps_axes() { (w, h) } else { (h, w) };
        let scale = Scale::new(grid.rows() as f64 / h, grid.cols() as f64 / w)?;
        Ok(Sample {
            chart,
            turn,
            element: chart.then(turn).then(scale),
        })
    }
}

/// A view that may still be drawn again.
struct Draft {
    samples: Vec<Sample>,
    grid: TokenGrid,
}

/// One sample of a view.
struct Sample {
    chart: Element,
    turn: D4,
    /// The whole of it: source to view.
    element: Element,
}

/// One geometric view of a batch: an element per sample and the token grid that the view has.
#[derive(Clone, Debug)]
pub struct View {
    elements: Vec<Element>,
    base: TokenGrid,
    grid: TokenGrid,
    resample: Resample,
}

impl View {
    /// The element of each sample: source to view.
    pub fn elements(&self) -> &[Element] {
        &self.elements
    }

    /// The token grid of the view.
    pub fn grid(&self) -> TokenGrid {
        self.grid
    }

    /// The view of images `(B, C, H, W)`, or of token maps on the base grid.
    ///
    /// With `H` and `W` whole multiples `P` of the base grid's sides the result has `P·rows × P·cols` pixels of the
    /// view's [`grid`](Self::grid).
    ///
    /// # Errors
    /// If the tensor is no image, its sides are no multiples of the base grid's, its batch differs from the view's, or a
    /// quarter turn meets patches that are not square.
    pub fn apply(&self, images: &Tensor) -> Result<Tensor> {
        let (rows, cols) = (self.base.rows(), self.base.cols());
        let pixels = match *images.dims() {
            [_, _, h, w] if h > 0 && w > 0 && h % rows == 0 && w % cols == 0 => {
                TokenGrid::new(h, w)?
            }
            _ => {
                return Err(Error::input(
                    "View::apply",
                    format!(
                        "images (B, C, H, W) with H a multiple of {rows} and W of {cols}, the base token grid"
                    ),
                    format!("{:?}", images.dims()),
                ));
            }
        };
        let (batch, drawn) = (images.dims()[0], self.elements.len());
        if batch != drawn {
            // An operator of one element would serve any batch; a view of one sample must not.
            return Err(Error::input(
                "View::apply",
                format!("a batch of {drawn} samples, as many as were drawn"),
                format!("{:?}", images.dims()),
            ));
        }
        let operator = GridOperator::new(&self.elements, pixels, &self.resample)?;
        let (height, width) = (pixels.rows() / rows, pixels.cols() / cols);
        let own = TokenGrid::new(self.grid.rows() * height, self.grid.cols() * width)?;
        if operator.out_grid() != own {
            return Err(Error::input(
                "View::apply",
                "images of square patches, since a quarter turn swaps the sides of a patch too",
                format!(
                    "{:?}, patches of {height}x{width} pixels on the base token grid {}",
                    images.dims(),
                    self.base
                ),
            ));
        }
        operator.apply(images)
    }
}

/// Two views of one batch.
#[derive(Clone, Debug)]
pub struct ViewPair {
    /// The first view.
    pub first: View,
    /// The second view.
    pub second: View,
    seed: u64,
}

impl ViewPair {
    /// The relative elements `g₂ ∘ g₁⁻¹`, which carry token maps of the first view into the second's frame.
    pub fn relative(&self) -> Relative<Element> {
        let pairs = self.first.elements.iter().zip(&self.second.elements);
        Relative {
            elements: pairs.map(|(a, b)| Element::relative(a, b)).collect(),
            from: self.first.grid,
            to: self.second.grid,
            seed: self.seed,
        }
    }
}

/// The elements that carry token maps of a first view into the frame of a second, with both token grids.
///
/// A [`ViewSampler`] hands it out; with elements of one's own it is built from them:
///
/// ```
/// use ser_reg::{TokenGrid, group::D4, view::Relative};
/// let grid = TokenGrid::square(7)?;
/// let relative = Relative::new(vec![D4::ROT90, D4::HFLIP], grid, grid)?; // two samples
/// assert_eq!(relative.len(), 2);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Relative<G> {
    elements: Vec<G>,
    from: TokenGrid,
    to: TokenGrid,
    seed: u64,
}

impl<G: GroupAction> Relative<G> {
    /// One relative element per sample, or one for the whole batch; `from` and `to` are the views' token grids. Where a cap
    /// on tokens draws some of them, [`with_seed`](Self::with_seed) makes each step draw others.
    ///
    /// # Errors
    /// If there is no element.
    pub fn new(elements: Vec<G>, from: TokenGrid, to: TokenGrid) -> Result<Self> {
        if elements.is_empty() {
            return Err(Error::input(
                "Relative::new",
                "one element, or one per sample",
                "none",
            ));
        }
        Ok(Self {
            elements,
            from,
            to,
            seed: 0,
        })
    }

    /// Sets the seed from which token subsampling draws.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The same elements between the grids of another layer, with the same seed.
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::D4, view::Relative};
    /// let early = TokenGrid::square(8)?;
    /// let relative = Relative::new(vec![D4::ROT90], early, early)?;
    /// let late = TokenGrid::square(4)?;
    /// assert_eq!(relative.on(late, late).from_grid(), late);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    pub fn on(&self, from: TokenGrid, to: TokenGrid) -> Self {
        Self {
            elements: self.elements.clone(),
            from,
            to,
            seed: self.seed,
        }
    }

    /// The elements, one per sample or one for all.
    pub fn elements(&self) -> &[G] {
        &self.elements
    }

    /// Number of elements, never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// The first view's token grid.
    pub fn from_grid(&self) -> TokenGrid {
        self.from
    }

    /// The second view's token grid.
    pub fn to_grid(&self) -> TokenGrid {
        self.to
    }

    /// The seed from which token subsampling draws, drawn with the views.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// For each element, the share of a view's tokens that the other view sees too, of both views the smaller share: 1 is
    /// a full overlap, 0 none, and then the sample takes no part in a [`SerLoss`](crate::SerLoss).
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::Window, view::Relative};
    /// let grid = TokenGrid::square(4)?;
    /// let shift = |cells| Window::from_cells(0, cells, 4, 4, grid);
    /// let relative = Relative::new(vec![shift(1)?, shift(4)?], grid, grid)?;
    /// assert_eq!(relative.overlap()?, [0.75, 0.0]);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// None today; operators may come to reject elements.
    pub fn overlap(&self) -> Result<Vec<f64>> {
        let share = |g: &G| overlap(g, self.from, self.to);
        self.elements.iter().map(share).collect()
    }

    /// The operator from the first view's tokens to the second's frame.
    ///
    /// # Errors
    /// If `resample` has [`Filter::Fourier`] and an element or the padding breaks the period.
    pub fn to_second(&self, resample: &Resample) -> Result<GridOperator> {
        GridOperator::between(&self.elements, self.from, self.to, resample)
    }

    /// The operator from the second view's tokens to the first's frame.
    ///
    /// # Errors
    /// If `resample` has [`Filter::Fourier`] and an element or the padding breaks the period.
    pub fn to_first(&self, resample: &Resample) -> Result<GridOperator> {
        let inverse: Vec<G> = self.elements.iter().map(G::inverse).collect();
        GridOperator::between(&inverse, self.to, self.from, resample)
    }
}

/// The share of valid tokens, of both directions the smaller.
fn overlap<G: GroupAction>(g: &G, from: TokenGrid, to: TokenGrid) -> Result<f64> {
    let valid = |g: G, from, to: TokenGrid| -> Result<f64> {
        // Masks do not depend on the filter; this one is the cheapest.
        let operator = GridOperator::between(&[g], from, to, &Filter::Nearest.into())?;
        let counted = operator.valid(0).map(|v| v.iter().filter(|&&v| v).count());
        Ok(counted.unwrap_or(to.len()) as f64 / to.len() as f64)
    };
    Ok(valid(g.clone(), from, to)?.min(valid(g.inverse(), to, from)?))
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
        format!("({lo}, {hi})"),
    ))
}

fn check_range(field: &'static str, (lo, hi): (f64, f64), most: f64) -> Result<()> {
    if lo.is_finite() && hi.is_finite() && 0.0 < lo && lo <= hi && hi <= most {
        return Ok(());
    }
    let most = if most == f64::MAX {
        String::new()
    } else {
        format!(" <= {most}")
    };
    Err(Error::config(
        field,
        format!("a range 0 < low <= high{most}, finite"),
        format!("({lo}, {hi})"),
    ))
}

fn log_uniform<R: Rng + ?Sized>(rng: &mut R, (lo, hi): (f64, f64)) -> f64 {
    rng.random_range(lo.ln()..=hi.ln()).exp()
}

/// A random window of the given area and aspect within the unit square; a fitting one is tried ten times, then the
/// largest whose aspect is allowed is centered, as torchvision's `RandomResizedCrop` does.
fn sample_window<R: Rng + ?Sized>(rng: &mut R, range: CropRange) -> Result<Window> {
    for _ in 0..10 {
        let area = rng.random_range(range.area.0..=range.area.1);
        let aspect = log_uniform(rng, range.aspect);
        let (h, w) = ((area / aspect).sqrt(), (area * aspect).sqrt());
        if h <= 1.0 && w <= 1.0 {
            let (top, left) = (
                rng.random_range(0.0..=1.0 - h),
                rng.random_range(0.0..=1.0 - w),
            );
            return Window::new(top, left, h, w);
        }
    }
    let aspect = 1f64.clamp(range.aspect.0, range.aspect.1);
    let (h, w) = ((1.0 / aspect).min(1.0), aspect.min(1.0));
    Window::new((1.0 - h) / 2.0, (1.0 - w) / 2.0, h, w)
}
