//! SER in one object: the sampler of views, the tap, the head and the loss.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use rand::Rng;

use crate::projector::{Projector, ProjectorConfig};
use crate::ser::{MapPair, SerConfig, SerLoss, SerOutput};
use crate::view::{View, ViewConfig, ViewPair, ViewSampler};
use crate::{Error, Result, TokenGrid, tap};

/// Soft equivariance regularization of one layer, ready to add to any training loop.
///
/// It draws two geometric views of each image, runs the model on them, takes the maps of the tapped layer, and compares
/// them. [`forward`](Self::forward) does so on images of its own and stops at the tap.
/// [`forward_with_outputs`](Self::forward_with_outputs) also serves the base loss, as in the paper.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{Regularizer, SerConfig, TokenGrid, grad, tap::Tapped};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let patches = Conv2dConfig { stride: 4, ..Default::default() };
/// let model = Tapped::new("stem", candle_nn::conv2d(3, 16, 4, patches, vb.pp("stem"))?);
/// let ser = Regularizer::new("stem", TokenGrid::square(6)?, 16, SerConfig::default(), vb.pp("ser"))?;
///
/// let mut rng = StdRng::seed_from_u64(0);
/// let images = Tensor::randn(0f32, 1., (4, 3, 24, 24), &Device::Cpu)?;
/// let out = ser.forward(&images, &mut rng, |view| model.forward(view))?;
/// // on step 0: does the gradient reach the layers before the tap, and the head?
/// for part in ["stem", "ser"] {
///     grad::assert_reaches(&out.unweighted, grad::named(&vars, part))?;
/// }
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Regularizer {
    layer: String,
    sampler: ViewSampler,
    head: Option<Projector>,
    loss: SerLoss,
}

/// The result of the paper's form: the outputs of the model for the base loss, and the fields of a [`SerOutput`].
#[derive(Clone, Debug)]
pub struct RegularizerOutput<T, K = ()> {
    /// The outputs of the model for the first and the second view.
    pub outputs: [T; 2],
    /// The outputs of the momentum encoder, if there is one.
    pub key_outputs: [K; 2],
    /// `λ·L`: add it to the base loss. See [`SerOutput::loss`].
    pub loss: Tensor,
    /// `L`, with its graph at every λ. See [`SerOutput::unweighted`].
    pub unweighted: Tensor,
    /// Share of anchors that find their positive. See [`SerOutput::accuracy`].
    pub accuracy: Option<Tensor>,
    /// The number of anchors over both directions.
    pub anchors: usize,
}

/// A model's output for both views, and the maps of the tapped layer.
struct Encoded<T> {
    outputs: [T; 2],
    maps: [Tensor; 2],
}

impl Regularizer {
    /// A regularizer for the map that the model records as `layer`.
    ///
    /// `grid` is the token grid of that map for an image of the usual size, and `channels` its width. The views are rotations
    /// and flips ([`ViewConfig::default`]). The head has the default shape of [`ProjectorConfig`] and its variables in `vb`.
    ///
    /// # Errors
    /// If a setting is out of its range, a width is 0, or `vb` cannot provide the variables.
    pub fn new(
        layer: impl Into<String>,
        grid: TokenGrid,
        channels: usize,
        config: SerConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let loss = SerLoss::new(config)?;
        let sampler = ViewSampler::new(grid, ViewConfig::default())?;
        let head = Projector::new(channels, ProjectorConfig::default(), vb)?;
        Ok(Self::from_parts(layer, sampler, Some(head), loss))
    }

    /// A regularizer of parts that are built apart: other views, another head or none.
    ///
    /// ```
    /// use ser_reg::{Regularizer, SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler, ser::Objective};
    /// let sampler = ViewSampler::new(TokenGrid::square(14)?, ViewConfig::paper())?;
    /// let loss = SerLoss::new(SerConfig { objective: Objective::Cosine { eps: 1e-6 }, ..Default::default() })?;
    /// let ser = Regularizer::from_parts("block3", sampler, None, loss); // compares the tokens themselves
    /// # let _ = ser;
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    pub fn from_parts(
        layer: impl Into<String>,
        sampler: ViewSampler,
        head: Option<Projector>,
        loss: SerLoss,
    ) -> Self {
        Self { layer: layer.into(), sampler, head, loss }
    }

    /// Draws views from `config`.
    ///
    /// # Errors
    /// As [`ViewSampler::new`].
    pub fn views(mut self, config: ViewConfig) -> Result<Self> {
        self.sampler = ViewSampler::new(self.sampler.grid(), config)?;
        Ok(self)
    }

    /// The name of the tapped layer.
    pub fn layer(&self) -> &str {
        &self.layer
    }

    /// The sampler of views.
    pub fn sampler(&self) -> &ViewSampler {
        &self.sampler
    }

    /// The head, if there is one.
    pub fn head(&self) -> Option<&Projector> {
        self.head.as_ref()
    }

    /// The loss.
    pub fn loss(&self) -> &SerLoss {
        &self.loss
    }

    /// Changes λ, as a schedule does.
    ///
    /// # Errors
    /// If it is negative or not finite.
    pub fn set_lambda(&mut self, lambda: f64) -> Result<()> {
        self.loss.set_lambda(lambda)
    }

    /// SER on images of its own, beside any base loss, supervised or self-supervised.
    ///
    /// `images` are (B, C, H, W), for example a part of the batch; NT-Xent needs at least two. `encode` is called once for
    /// each of two views, and ends at the tap: blocks behind it do not run. The base loss sees no rotated image. Apply color
    /// jitter and the like inside `encode`, to each view.
    ///
    /// With batch norm, the train flag inside `encode` decides: in train mode the rotated images enter the batch statistics
    /// and the running statistics. At λ = 0 `encode` still runs.
    ///
    /// # Errors
    /// Those of `encode`, of the tap if `layer` is not recorded, of [`View::apply`], and of [`SerLoss::forward`],
    /// [`Error::NoOverlap`] among them. A name that is recorded twice counts at the first record, where the pass ends.
    pub fn forward<T, R: Rng + ?Sized>(
        &self,
        images: &Tensor,
        rng: &mut R,
        encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
    ) -> Result<SerOutput> {
        let (views, seed) = self.draw(images, rng)?;
        let maps = self.encode_until(&views, images, encode)?;
        self.compare(&views, seed, &maps, None)
    }

    /// [`forward`](Self::forward) against the keys of a momentum encoder: `encode_keys`, with its own `key_head`.
    ///
    /// No gradient reaches the keys.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_keys<'a, T, K, R: Rng + ?Sized>(
        &self,
        images: &Tensor,
        rng: &mut R,
        encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
        encode_keys: impl FnMut(&Tensor) -> candle_core::Result<K>,
        key_head: impl Into<Option<&'a Projector>>,
    ) -> Result<SerOutput> {
        let (views, seed) = self.draw(images, rng)?;
        let maps = self.encode_until(&views, images, encode)?;
        let keys = self.encode_until(&views, images, encode_keys)?;
        self.compare(&views, seed, &maps, Some((&keys, key_head.into())))
    }

    /// The paper's form: one forward pass of each view serves both losses.
    ///
    /// `encode` runs the whole model on each view and returns what the base loss needs. [`Partition`](crate::Partition)
    /// splits off the images for it.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// # use rand::{SeedableRng, rngs::StdRng};
    /// # use ser_reg::{Regularizer, SerConfig, TokenGrid, tap};
    /// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let ser = Regularizer::new("map", TokenGrid::square(4)?, 3, SerConfig::default(), vb)?;
    /// # let mut rng = StdRng::seed_from_u64(0);
    /// let images = Tensor::ones((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
    /// let model = |x: &Tensor| {
    ///     tap::record("map", x)?;
    ///     x.mean((2, 3)) // an embedding (B, C)
    /// };
    /// let out = ser.forward_with_outputs(&images, &mut rng, |view| model(view))?;
    /// let base_loss = (&out.outputs[0] - &out.outputs[1])?.sqr()?.mean_all()?;
    /// let loss = (base_loss + &out.loss)?;
    /// # let _ = loss;
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_outputs<T, R: Rng + ?Sized>(
        &self,
        images: &Tensor,
        rng: &mut R,
        encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
    ) -> Result<RegularizerOutput<T>> {
        let (views, seed) = self.draw(images, rng)?;
        let Encoded { outputs, maps } = self.encode(&views, images, encode)?;
        let out = self.compare(&views, seed, &maps, None)?;
        Ok(RegularizerOutput::new(outputs, [(), ()], out))
    }

    /// [`forward_with_outputs`](Self::forward_with_outputs) against the keys of a momentum encoder: `encode_keys`, with its
    /// own `key_head`.
    ///
    /// No gradient reaches the keys through this loss.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_outputs_and_keys<'a, T, K, R: Rng + ?Sized>(
        &self,
        images: &Tensor,
        rng: &mut R,
        encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
        encode_keys: impl FnMut(&Tensor) -> candle_core::Result<K>,
        key_head: impl Into<Option<&'a Projector>>,
    ) -> Result<RegularizerOutput<T, K>> {
        let (views, seed) = self.draw(images, rng)?;
        let Encoded { outputs, maps } = self.encode(&views, images, encode)?;
        let keys = self.encode(&views, images, encode_keys)?;
        let out = self.compare(&views, seed, &maps, Some((&keys.maps, key_head.into())))?;
        Ok(RegularizerOutput::new(outputs, keys.outputs, out))
    }

    /// Two views of `images`, and the seed for the draw of tokens.
    fn draw<R: Rng + ?Sized>(&self, images: &Tensor, rng: &mut R) -> Result<(ViewPair, u64)> {
        let &[batch, ..] = images.dims() else {
            let expected = "images (B, C, H, W)";
            return Err(Error::input("Regularizer", expected, "a scalar"));
        };
        let views = self.sampler.sample_pair(rng, batch)?;
        Ok((views, rng.random()))
    }

    /// The loss of two maps, against the maps of a second encoder if there is one.
    ///
    /// An error about the shape of a map names the layer and the grid.
    fn compare(
        &self,
        views: &ViewPair,
        seed: u64,
        maps: &[Tensor; 2],
        keys: Option<(&[Tensor; 2], Option<&Projector>)>,
    ) -> Result<SerOutput> {
        let relative = views.relative();
        let mut pair = MapPair::new(maps.each_ref(), &relative).head(self.head()).seed(seed);
        if let Some((keys, head)) = keys {
            pair = pair.keys(keys.each_ref(), head);
        }
        self.loss.forward(&pair).map_err(|e| match e {
            Error::Input { op: "Layout::tokens", expected, got } => {
                let grid = self.sampler.grid();
                let expected = format!(
                    "a map {expected} from layer `{}`, for the grid {grid} of Regularizer::new and this view (pass the \
                     rows and columns of this map for an upright image, and Layout::prefix for CLS tokens)",
                    self.layer
                );
                Error::Input { op: "Regularizer", expected, got }
            }
            e => e,
        })
    }

    /// The maps of both views, up to the tap.
    fn encode_until<T>(
        &self,
        views: &ViewPair,
        images: &Tensor,
        mut encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
    ) -> Result<[Tensor; 2]> {
        let mut map = |view: &View| -> Result<Tensor> {
            let view = view.apply(images)?;
            tap::capture_until(&self.layer, || encode(&view)).map_err(|e| scaled(e, &view, images))
        };
        Ok([map(&views.first)?, map(&views.second)?])
    }

    /// The outputs and the maps of both views.
    fn encode<T>(
        &self,
        views: &ViewPair,
        images: &Tensor,
        mut encode: impl FnMut(&Tensor) -> candle_core::Result<T>,
    ) -> Result<Encoded<T>> {
        let mut both = |view: &View| -> Result<(T, Tensor)> {
            let view = view.apply(images)?;
            tap::capture(&self.layer, || encode(&view)).map_err(|e| scaled(e, &view, images))
        };
        let (output1, map1) = both(&views.first)?;
        let (output2, map2) = both(&views.second)?;
        Ok(Encoded { outputs: [output1, output2], maps: [map1, map2] })
    }
}

/// The error of a model on a view; if the view has another size than the images, the message says so.
fn scaled(e: candle_core::Error, view: &Tensor, images: &Tensor) -> Error {
    let (view, images) = (view.dims(), images.dims());
    if view.get(2..) == images.get(2..) {
        return e.into();
    }
    let size = |dims: &[usize]| {
        dims.get(2..).unwrap_or(&[]).iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    };
    e.context(format!(
        "the view has {} pixels, the images {}: ViewConfig scales the views, or turns images that are not square (a model \
         of fixed size needs ViewConfig::default() and square images)",
        size(view),
        size(images)
    ))
    .into()
}

impl<T, K> RegularizerOutput<T, K> {
    fn new(outputs: [T; 2], key_outputs: [K; 2], out: SerOutput) -> Self {
        Self {
            outputs,
            key_outputs,
            loss: out.loss,
            unweighted: out.unweighted,
            accuracy: out.accuracy,
            anchors: out.anchors,
        }
    }
}
