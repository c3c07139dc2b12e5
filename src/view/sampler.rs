//! Draws pairs of views.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    config::{CropRange, Pairing, ViewConfig},
    pair::{View, ViewPair},
    relative::overlap,
};
use crate::{
    Error, Result, TokenGrid,
    group::{Affine, D4, Element, GroupAction, Scale, Subgroup, Window},
};

/// The most images of a batch. It keeps an absurd size an error, where a vector of so many elements could not exist.
const MOST_IMAGES: usize = 1 << 24;

/// Redraws before the second view takes the crop and motion of the first.
const TRIES: usize = 20;

/// Draws pairs of views.
///
/// Scales are rounded to whole tokens: with area `a ~ U(area)` and aspect `q` log-uniform the view
/// has `round(rows·√(a/q)) × round(cols·√(a·q))` tokens, at least one along each side, shared by
/// the batch. Source: arXiv 2603.06693 and the authors' code.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, view::{ViewConfig, ViewSampler}};
///
/// let sampler = ViewSampler::new(TokenGrid::square(7)?, ViewConfig::paper())?; // 28 px, patches of 4
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
    /// If a range is reversed or not finite, lies beyond the bounds that its field names, or allows
    /// views of 2^32 tokens or more; if `min_overlap` is no fraction; if
    /// [`Filter::Fourier`](crate::Filter::Fourier) would resample crops or motions. A configuration
    /// that is accepted never fails at a draw.
    pub fn new(base: TokenGrid, config: ViewConfig) -> Result<Self> {
        config.check(base)?;
        Ok(Self { config, base })
    }

    /// The token grid of an image of the usual size.
    pub fn grid(&self) -> TokenGrid {
        self.base
    }

    /// Draws both views of a batch. The same state of `rng` gives the same draw.
    ///
    /// # Errors
    /// If the batch is empty or has more than 2^24 images.
    pub fn sample_pair<R: Rng + ?Sized>(&self, rng: &mut R, batch: usize) -> Result<ViewPair> {
        if !(1..=MOST_IMAGES).contains(&batch) {
            let expected = "a batch of at least one sample and at most 2^24";
            return Err(Error::input("ViewSampler::sample_pair", expected, batch));
        }
        let (first, mut second) = match self.config.pairing {
            Pairing::Independent(group) => (
                self.sample_independent(rng, group, batch)?,
                self.sample_independent(rng, group, batch)?,
            ),
            Pairing::Complement => self.sample_complement(rng, batch)?,
        };
        // Drawn in every case, so that the caller's generator does not depend on `min_overlap`.
        let redraws = rng.random();
        if self.config.min_overlap > 0.0 && self.config.is_partial() {
            self.redraw(&first, &mut second, &mut StdRng::seed_from_u64(redraws))?;
        }
        Ok(ViewPair { first: self.view(first), second: self.view(second) })
    }

    fn view(&self, transforms: Transforms) -> View {
        let elements = transforms.samples.iter().map(|s| s.element);
        View {
            elements: elements.collect(),
            base: self.base,
            grid: transforms.grid,
            scaled: transforms.scaled,
            resample: self.config.resample,
        }
    }

    /// Draws second views again until each sees enough of the first.
    fn redraw(&self, first: &Transforms, second: &mut Transforms, rng: &mut StdRng) -> Result<()> {
        let (from, to) = (first.grid, second.grid);
        for (one, two) in first.samples.iter().zip(&mut second.samples) {
            let enough = |two: &Transform| -> Result<bool> {
                let share = overlap(&Element::relative(&one.element, &two.element), from, to)?;
                Ok(share >= self.config.min_overlap)
            };
            let mut tries = 0;
            while !enough(two)? {
                if tries == TRIES {
                    *two = self.transform(one.motion, two.turn, to)?;
                    break;
                }
                *two = self.transform(self.sample_motion(rng, two.turn, to)?, two.turn, to)?;
                tries += 1;
            }
        }
        Ok(())
    }

    fn sample_independent<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        group: Subgroup,
        batch: usize,
    ) -> Result<Transforms> {
        let grid = self.sample_grid(rng)?;
        let scaled = grid != self.base;
        let mut elements = group.elements().to_vec();
        if !self.base.is_square() {
            let odd = elements[rng.random_range(0..elements.len())].swaps_axes();
            elements.retain(|g| g.swaps_axes() == odd);
        }
        // A square base is turned first and then stretched to `grid`, so that it may mix all turns.
        let turned = |g: &D4| g.swaps_axes() && !self.base.is_square();
        let grid = if turned(&elements[0]) { grid.transposed() } else { grid };
        let draw = |_| {
            let turn = elements[rng.random_range(0..elements.len())];
            self.transform(self.sample_motion(rng, turn, grid)?, turn, grid)
        };
        Ok(Transforms { samples: (0..batch).map(draw).collect::<Result<_>>()?, grid, scaled })
    }

    fn sample_complement<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        batch: usize,
    ) -> Result<(Transforms, Transforms)> {
        let choices: Vec<(bool, bool)> = (0..batch).map(|_| (rng.random(), rng.random())).collect();
        let mut view = |complement: bool| {
            let drawn = self.sample_grid(rng)?;
            let turns = D4::rot90(rng.random_range(0..4));
            let grid = if turns.swaps_axes() { drawn.transposed() } else { drawn };
            let draw = |&(half_turn, flip): &(bool, bool)| {
                let half_turn = D4::rot90(if half_turn ^ complement { 2 } else { 0 });
                let flip = D4::new(0, flip ^ complement);
                let turn = turns.compose(&flip).compose(&half_turn);
                self.transform(self.sample_motion(rng, turn, grid)?, turn, grid)
            };
            Ok::<_, Error>(Transforms {
                samples: choices.iter().map(draw).collect::<Result<_>>()?,
                grid,
                scaled: drawn != self.base,
            })
        };
        Ok((view(false)?, view(true)?))
    }

    fn sample_grid<R: Rng + ?Sized>(&self, rng: &mut R) -> Result<TokenGrid> {
        let area = rng.random_range(self.config.area.0..=self.config.area.1);
        let aspect = log_uniform(rng, self.config.aspect);
        self.config.scaled(self.base, area, aspect)
    }

    /// A crop and the continuous motion after it.
    fn sample_motion<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        turn: D4,
        grid: TokenGrid,
    ) -> Result<Element> {
        let window = match self.config.crop {
            Some(range) => sample_window(rng, range)?,
            None => Window::identity(),
        };
        let crop = Element::from(window);
        let Some(range) = self.config.affine else {
            return Ok(crop);
        };
        // The rotation is rigid in the cells of the view before its quarter turn.
        let upright = if turn.swaps_axes() { grid.transposed() } else { grid };
        let mut draw = |(lo, hi): (f64, f64)| rng.random_range(lo..=hi);
        let rotation = Affine::rotation_on(draw(range.rotation), upright, upright)?;
        let translation = Affine::translation(draw(range.translation), draw(range.translation))?;
        let shear = Affine::shear(draw(range.shear), draw(range.shear))?;
        Ok(crop.then(translation.compose(&rotation).compose(&shear)))
    }

    /// The motion, then the turn, then the resize to `grid`.
    fn transform(&self, motion: Element, turn: D4, grid: TokenGrid) -> Result<Transform> {
        // The sides of the crop in cells; the motion after it does not change them.
        let [h, w] = motion.zoom();
        let (h, w) = (h * self.base.rows() as f64, w * self.base.cols() as f64);
        let (h, w) = if turn.swaps_axes() { (w, h) } else { (h, w) };
        let scale = Scale::new(grid.rows() as f64 / h, grid.cols() as f64 / w)?;
        Ok(Transform { motion, turn, element: motion.then(turn).then(scale) })
    }
}

/// What one view does to each sample of the batch.
struct Transforms {
    samples: Vec<Transform>,
    grid: TokenGrid,
    /// Whether the grid is another than the base grid and its transpose.
    scaled: bool,
}

/// What one view does to one sample.
struct Transform {
    /// The crop and the continuous motion.
    motion: Element,
    turn: D4,
    /// All of it, from the source to the view.
    element: Element,
}

fn log_uniform<R: Rng + ?Sized>(rng: &mut R, (lo, hi): (f64, f64)) -> f64 {
    rng.random_range(lo.ln()..=hi.ln()).exp()
}

/// A random window of the given area and aspect within the unit square, as torchvision's
/// `RandomResizedCrop` draws it: ten tries, then the largest centered window of an allowed aspect.
fn sample_window<R: Rng + ?Sized>(rng: &mut R, range: CropRange) -> Result<Window> {
    for _ in 0..10 {
        let area = rng.random_range(range.area.0..=range.area.1);
        let aspect = log_uniform(rng, range.aspect);
        let (h, w) = ((area / aspect).sqrt(), (area * aspect).sqrt());
        if h <= 1.0 && w <= 1.0 {
            let (top, left) = (rng.random_range(0.0..=1.0 - h), rng.random_range(0.0..=1.0 - w));
            return Window::new(top, left, h, w);
        }
    }
    let aspect = 1f64.clamp(range.aspect.0, range.aspect.1);
    let (h, w) = ((1.0 / aspect).min(1.0), aspect.min(1.0));
    Window::new((1.0 - h) / 2.0, (1.0 - w) / 2.0, h, w)
}
