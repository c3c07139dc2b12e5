//! The maps that metrics compare: of the image, of the image with its map moved, of the moved image.

use candle_core::{Device, Tensor};

use super::{EqScore, run::Run};
use crate::fibre::FibreOperator;
use crate::{Error, GridOperator, GroupAction, Layout, Result, TokenGrid};

/// Where the tokens of one of several layers lie.
///
/// ```
/// use ser_reg::{Layout, TokenGrid, metric::Layer};
/// let conv = Layer::from(TokenGrid::square(14)?); // a map (B, C, 14, 14)
/// let vit = Layer { grid: TokenGrid::square(7)?, layout: Layout { prefix: 1, ..Default::default() } };
/// assert_eq!(conv.layout, Layout::default());
/// assert_eq!(vit.grid.len(), 49);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its token grid, for images as they come.
    pub grid: TokenGrid,
    /// How its output becomes tokens.
    pub layout: Layout,
}

impl From<TokenGrid> for Layer {
    /// No prefix tokens, channels first.
    fn from(grid: TokenGrid) -> Self {
        Self {
            grid,
            layout: Layout::default(),
        }
    }
}

/// What one layer makes of the images and of the moved images: `f64` tokens `(B, N, C)` on the host.
///
/// [`EqScore::map_pairs`] makes it; [`cka`](super::cka) and [`Seis`](super::Seis) read it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MapPair {
    /// `F(x)`: the map of the images as they come.
    pub upright: Tensor,
    /// `ρ(g)F(x)`: that map, moved, its channels turned by [`EqScore::field`] if there is one.
    pub aligned: Tensor,
    /// `F(g·x)`: the map of the moved images.
    pub moved: Tensor,
    valid: Vec<u32>,
}

impl MapPair {
    pub(super) fn new<G: GroupAction>(
        run: &Run,
        g: &G,
        action: &GridOperator,
        upright: &Tensor,
        moved: Tensor,
    ) -> Result<Self> {
        let valid: Vec<u32> = (0..action.out_grid().len() as u32)
            .filter(|&p| action.valid(0).is_none_or(|v| v[p as usize]))
            .collect();
        if valid.is_empty() {
            return Err(Error::input(
                run.op,
                "elements that leave some position a preimage",
                format!("{g:?}, which leaves none"),
            ));
        }
        let mut aligned = action.apply(upright)?;
        if let Some(field) = run.field {
            aligned = FibreOperator::new(field, std::slice::from_ref(g))?.apply(&aligned)?;
        }
        if aligned.dims() != moved.dims() {
            return Err(Error::input(
                run.op,
                format!("a map of {:?} for the moved images too", aligned.dims()),
                format!("{:?}", moved.dims()),
            ));
        }
        Ok(Self {
            upright: upright.clone(),
            aligned,
            moved,
            valid,
        })
    }

    /// `ρ(g)F(x)` and `F(g·x)` at the positions that have a preimage, `(B, N', C)` each: what should agree.
    ///
    /// # Errors
    /// Those of candle.
    pub fn matched(&self) -> Result<(Tensor, Tensor)> {
        let valid = Tensor::new(self.valid.as_slice(), &Device::Cpu)?;
        let at = |x: &Tensor| x.contiguous()?.index_select(&valid, 1);
        Ok((at(&self.aligned)?, at(&self.moved)?))
    }
}

impl EqScore {
    /// The maps of `layers` under `g`, for the metrics that compare two representations: [`cka`](super::cka),
    /// [`Seis`](super::Seis). `images` are `(B, C, H, W)`; `map` returns one map per layer.
    ///
    /// As in [`measure_layers`](Self::measure_layers), [`grid`](Self::grid) says how images move, and the layers' own
    /// layouts are read.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use rand::{SeedableRng, rngs::StdRng};
    /// use ser_reg::{TokenGrid, group::D4, metric::{EqScore, Hsic, Layer, Seis, cka}};
    ///
    /// let images = Tensor::rand(0f64, 1., (32, 3, 8, 8), &Device::Cpu)?;
    /// let grid = TokenGrid::square(4)?;
    /// let pairs = EqScore::new(grid).map_pairs(&images, &D4::ROT90, &[Layer::from(grid)], |x| {
    ///     Ok::<_, ser_reg::Error>(vec![x.avg_pool2d(2)?])
    /// })?;
    /// let (aligned, moved) = pairs[0].matched()?;
    /// assert!((cka(&aligned, &moved, Hsic::Auto)? - 1.).abs() < 1e-9); // equivariant
    /// assert!(cka(&pairs[0].upright, &moved, Hsic::Auto)? < 0.5); // not invariant
    /// // SEIS finds the action by itself
    /// let seis = Seis::default().measure(&pairs[0].upright, &moved, &mut StdRng::seed_from_u64(0))?;
    /// assert!(seis.score.equivariance > 0.99 && seis.score.invariance < 0.7);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`measure_layers`](Self::measure_layers).
    pub fn map_pairs<G: GroupAction, E: From<Error>>(
        &self,
        images: &Tensor,
        g: &G,
        layers: &[Layer],
        mut map: impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<MapPair>, E> {
        let run = self.run("EqScore::map_pairs");
        run.check(images, 1)?;
        let upright = run.tokens(images, None, layers, &mut map)?;
        let mut pairs = Vec::with_capacity(layers.len());
        run.pairs(images, g, layers, &upright, &mut map, |_, pair| {
            pairs.push(pair);
            Ok(())
        })?;
        Ok(pairs)
    }
}

impl Run<'_> {
    /// Runs `map` on the images that `g` moves and hands out each layer's pair in turn.
    pub fn pairs<G: GroupAction, E: From<Error>>(
        &self,
        images: &Tensor,
        g: &G,
        layers: &[Layer],
        upright: &[Tensor],
        map: &mut impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
        mut each: impl FnMut(usize, MapPair) -> Result<()>,
    ) -> Result<(), E> {
        let mover = self.mover(images, g)?;
        let moved = self.tokens(images, Some(&mover), layers, map)?;
        for (i, moved) in moved.into_iter().enumerate() {
            let to = self.moved_grid(images, &layers[i], &mover)?;
            let one = std::slice::from_ref(g);
            let action = GridOperator::between(one, layers[i].grid, to, self.resample)?;
            each(i, MapPair::new(self, g, &action, &upright[i], moved)?)?;
        }
        Ok(())
    }
}
