//! Pairs of geometric views of one batch, and the relative element that aligns their token maps.

use candle_core::Tensor;
use rand::Rng;

use crate::{
    Error, GridOperator, Resample, Result, TokenGrid,
    group::{D4, Element, GroupAction, Scale, Subgroup, Window},
};

/// How the turns and flips of the two views of a sample are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Each view of each sample draws uniformly from the subgroup, so that the relative element is uniform over it too.
    /// On a non-square grid all samples of a view share the parity of their quarter turns.
    Free(Subgroup),
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
    /// How images are resampled.
    pub resample: Resample,
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self {
            pairing: Pairing::Free(Subgroup::D4),
            area: (0.7, 1.3),
            aspect: (3.0 / 4.0, 4.0 / 3.0),
            crop: None,
            resample: Resample::default(),
        }
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
/// let sampler = ViewSampler::new(ViewConfig::default(), TokenGrid::square(7)?)?; // 28 px, patches of 4
/// let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 2)?;
/// let images = Tensor::zeros((2, 3, 28, 28), DType::F32, &Device::Cpu)?;
/// let view = views.first.act(&images)?;
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
    /// If a range is not finite and positive, or reversed, or a crop's area exceeds 1.
    pub fn new(config: ViewConfig, base: TokenGrid) -> Result<Self> {
        check_range("ViewConfig::area", config.area, f64::MAX)?;
        check_range("ViewConfig::aspect", config.aspect, f64::MAX)?;
        if let Some(crop) = config.crop {
            check_range("CropRange::area", crop.area, 1.0)?;
            check_range("CropRange::aspect", crop.aspect, f64::MAX)?;
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
        let (first, second) = match self.config.pairing {
            Pairing::Free(group) => (
                self.sample_free(rng, group, batch)?,
                self.sample_free(rng, group, batch)?,
            ),
            Pairing::Complement => self.sample_complement(rng, batch)?,
        };
        Ok(ViewPair {
            first,
            second,
            seed: rng.random(),
        })
    }

    fn sample_free<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        group: Subgroup,
        batch: usize,
    ) -> Result<View> {
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
            self.element(rng, turn, grid)
        };
        Ok(View {
            elements: (0..batch).map(draw).collect::<Result<_>>()?,
            base: self.base,
            grid,
            resample: self.config.resample,
        })
    }

    fn sample_complement<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        batch: usize,
    ) -> Result<(View, View)> {
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
                self.element(rng, turns.compose(&flip).compose(&half_turn), grid)
            };
            Ok::<_, Error>(View {
                elements: choices.iter().map(draw).collect::<Result<_>>()?,
                base: self.base,
                grid,
                resample: self.config.resample,
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

    /// Crop, turn, resize to `grid`.
    fn element<R: Rng + ?Sized>(&self, rng: &mut R, turn: D4, grid: TokenGrid) -> Result<Element> {
        let window = match self.config.crop {
            Some(range) => sample_window(rng, range)?,
            None => Window::identity(),
        };
        let [h, w] = window.size();
        let (h, w) = (h * self.base.rows() as f64, w * self.base.cols() as f64);
        let (h, w) = if turn.swaps_axes() { (w, h) } else { (h, w) };
        let scale = Scale::new(grid.rows() as f64 / h, grid.cols() as f64 / w)?;
        Ok(Element::from(window).then(turn).then(scale))
    }
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
    pub fn act(&self, images: &Tensor) -> Result<Tensor> {
        let (rows, cols) = (self.base.rows(), self.base.cols());
        let pixels = match *images.dims() {
            [_, _, h, w] if h > 0 && w > 0 && h % rows == 0 && w % cols == 0 => {
                TokenGrid::new(h, w)?
            }
            _ => {
                return Err(Error::input(
                    "View::act",
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
                "View::act",
                format!("a batch of {drawn} samples, as many as were drawn"),
                format!("{:?}", images.dims()),
            ));
        }
        let operator = GridOperator::new(&self.elements, pixels, &self.resample)?;
        let (height, width) = (pixels.rows() / rows, pixels.cols() / cols);
        let own = TokenGrid::new(self.grid.rows() * height, self.grid.cols() * width)?;
        if operator.out_grid() != own {
            return Err(Error::input(
                "View::act",
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

    /// The operator from the first view's tokens to the second's frame.
    ///
    /// # Errors
    /// None today; operators may come to reject elements.
    pub fn forward(&self, resample: &Resample) -> Result<GridOperator> {
        GridOperator::between(&self.elements, self.from, self.to, resample)
    }

    /// The operator from the second view's tokens to the first's frame.
    ///
    /// # Errors
    /// None today; operators may come to reject elements.
    pub fn reverse(&self, resample: &Resample) -> Result<GridOperator> {
        let inverse: Vec<G> = self.elements.iter().map(G::inverse).collect();
        GridOperator::between(&inverse, self.to, self.from, resample)
    }
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
/// largest whose aspect is allowed is centred, as torchvision's `RandomResizedCrop` does.
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
