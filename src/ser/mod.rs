//! The soft equivariance loss: two token maps of one batch, seen through two views, should differ by the views only.

mod config;
mod counted;
mod head;
mod layers;
mod soft;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use rand::{SeedableRng, rngs::StdRng};

pub use config::{Objective, SerConfig, StopGradient, Validity};
pub use counted::Weights;
pub use layers::{Depth, LayerOutput, LayersOutput, SerLayers};
pub use soft::{Scope, SoftWeight, pair_visibility, token_visibility};

use self::config::check_lambda;
use self::counted::{TokenWeights, choose, valid};
use self::head::Head;
use crate::fibre::FibreOperator;
use crate::group::FieldType;
use crate::loss::{self, ContrastiveOutput, NtXent, SameImage};
use crate::view::Relative;
use crate::{Error, GridOperator, GroupAction, Result, TokenGrid};

/// What [`SerLoss`] returns. Scalars are f32, or f64 for f64 maps.
#[derive(Clone, Debug)]
pub struct SerOutput {
    /// `λ·L`: add it to the loss of the base method.
    pub loss: Tensor,
    /// `L` itself, detached; 0 where λ is.
    pub equivariance: Tensor,
    /// Share of anchors whose positive is above every negative, detached; NT-Xent only.
    pub accuracy: Option<Tensor>,
    /// How many anchors were counted, over both directions.
    pub tokens: usize,
}

/// Soft equivariance regularization (arXiv 2603.06693) on the token maps of an intermediate layer.
///
/// With `h` the projector, `F₁`, `F₂` the maps of two views and `ρ` the action of their relative element on tokens,
///
/// ```text
/// L = ½ ( ℓ(h(F₂), ρ₁→₂ h(F₁)) + ℓ(h(F₁), ρ₂→₁ h(F₂)) )
/// ```
///
/// where `ℓ(anchors, keys)` is the [`Objective`] and tokens without a counterpart in the other view are dropped: they get
/// no gradient. Only blocks up to the tapped one learn from it.
///
/// `ρ` moves tokens and leaves channels alone, unless [`with_field`](Self::with_field) says that they turn with the grid.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, ser::{SerConfig, SerLoss}, view::{ViewConfig, ViewSampler}};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let ser = SerLoss::new(SerConfig { lambda: 0.5, ..Default::default() }, 16, vb)?;
///
/// let sampler = ViewSampler::new(TokenGrid::square(7)?, ViewConfig::default())?;
/// let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 2)?;
/// // Two maps (B, N, C) of any model, on the grids of the two views.
/// let map = |grid: TokenGrid| Tensor::randn(0f32, 1., (2, grid.len(), 16), &Device::Cpu);
/// let out = ser.forward(&map(views.first.grid())?, &map(views.second.grid())?, &views.relative())?;
/// out.loss.backward()?;
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SerLoss {
    config: SerConfig,
    head: Head,
}

/// The frame of one view: how keys come into it, and what its tokens weigh.
struct Frame {
    operator: GridOperator,
    /// `None`: channels stay as they are.
    fibre: Option<FibreOperator>,
    weights: TokenWeights,
}

/// Anchors and aligned keys of one direction, and how they fared.
struct Direction {
    loss: Tensor,
    accuracy: Option<Tensor>,
    tokens: usize,
}

impl SerLoss {
    /// A loss on maps of `channels` channels; the projector takes its variables from `vb`.
    ///
    /// A momentum encoder has a second `SerLoss` with its own variables: see [`SerLoss::forward_with_keys`].
    ///
    /// # Errors
    /// If a setting is out of its range, a width is 0, or `vb` cannot hand out the variables.
    pub fn new(config: SerConfig, channels: usize, vb: VarBuilder) -> Result<Self> {
        Self::with_field(config, FieldType::trivial(channels), vb)
    }

    /// A loss on maps whose channels turn with the grid as `field` says: `ρ` then permutes channels too.
    ///
    /// The field is that of the map, and it is what is compared: a projector that mixed its channels would destroy it.
    /// What goes together:
    ///
    /// | field | projector | what is compared |
    /// |---|---|---|
    /// | trivial | none | the tokens |
    /// | trivial | any | the projected tokens |
    /// | any | none | the tokens, `ρ` permuting their channels |
    /// | blocks of one regular representation | any | the head runs on the blocks' channels of each group element alike, so it commutes with `ρ`: from `C/order` channels to [`out`](crate::projector::ProjectorConfig::out) blocks |
    /// | mixed | any | an error |
    ///
    /// With few blocks set the head's [`norm`](crate::projector::ProjectorConfig::norm) to false: a norm over two channels
    /// leaves little but a sign.
    ///
    /// Every [`Objective`] goes with every field. Relative elements must have a [`d4_part`](GroupAction::d4_part) in the
    /// group of each regular representation: turns, flips, scales and crops have one, other angles have not.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::VarBuilder;
    /// use ser_reg::group::{D4, FieldType, Subgroup};
    /// use ser_reg::{TokenGrid, ser::{Objective, SerConfig, SerLoss}, view::Relative};
    /// let config = SerConfig { objective: Objective::Mse, projector: None, ..Default::default() };
    /// let field = FieldType::trivial(16).and(FieldType::regular(Subgroup::D4, 32)?);
    /// let ser = SerLoss::with_field(config, field, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    ///
    /// let grid = TokenGrid::square(4)?;
    /// let map = Tensor::ones((2, 48, 4, 4), DType::F32, &Device::Cpu)?;
    /// let relative = Relative::new(vec![D4::ROT90, D4::VFLIP], grid, grid)?;
    /// assert_eq!(ser.forward(&map, &map, &relative)?.loss.to_scalar::<f32>()?, 0.0);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`SerLoss::new`], and for a projector on a mixed field, or with a norm over a single channel per group element.
    pub fn with_field(config: SerConfig, field: FieldType, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let head = Head::new(config.projector, field, vb)?;
        Ok(Self { config, head })
    }

    /// The settings.
    pub fn config(&self) -> &SerConfig {
        &self.config
    }

    /// How the channels of the map change when the grid turns.
    pub fn field(&self) -> &FieldType {
        self.head.field()
    }

    /// Changes λ, as a schedule does.
    ///
    /// # Errors
    /// If it is negative or not finite.
    pub fn set_lambda(&mut self, lambda: f64) -> Result<()> {
        check_lambda(lambda)?;
        self.config.lambda = lambda;
        Ok(())
    }

    /// The tokens that are compared, before any alignment: those of `map` on `grid`, through the projector, (B, N, D).
    ///
    /// # Errors
    /// If the map does not fit the grid and the layout, or the channels or type do not fit the projector.
    pub fn project(&self, map: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        let tokens = self.config.layout.tokens(map, grid)?;
        self.head.forward(&tokens, map.dims())
    }

    /// The loss of two maps that came out of one encoder: `map1` on `relative.from_grid()`, `map2` on `relative.to_grid()`.
    ///
    /// Maps are (B, prefix + N, C), (B, C, H, W) or (B, H, W, C), as [`SerConfig::layout`] says.
    ///
    /// # Errors
    /// If a map does not fit its grid, its channels or type do not fit the field or the projector, the maps differ in batch,
    /// type or device, the relative elements do not count 1 or B, one has no [`d4_part`](GroupAction::d4_part) in the group
    /// of each regular representation, [`SerConfig::resample`] does not go with them, or no token of the batch counts in
    /// either direction: one that both views see, of a weight above 0. Where masks or weights leave tokens of one image
    /// only, NT-Xent without same-image negatives is 0 and no error.
    pub fn forward<G: GroupAction>(
        &self,
        map1: &Tensor,
        map2: &Tensor,
        relative: &Relative<G>,
    ) -> Result<SerOutput> {
        self.forward_weighted(map1, map2, relative, &Weights::default())
    }

    /// [`forward`](Self::forward), with weights of samples or tokens.
    ///
    /// They multiply those of [`SerConfig::soft`].
    ///
    /// # Errors
    /// As [`SerLoss::forward`], and if weights do not count as many as what they weigh, one is negative or not finite, or
    /// none is above 0 at a token that counts.
    pub fn forward_weighted<G: GroupAction>(
        &self,
        map1: &Tensor,
        map2: &Tensor,
        relative: &Relative<G>,
        weights: &Weights,
    ) -> Result<SerOutput> {
        if self.config.lambda == 0.0 {
            return skipped(map1);
        }
        let tokens = [
            self.project(map1, relative.from_grid())?,
            self.project(map2, relative.to_grid())?,
        ];
        self.compare(&tokens, &tokens, relative, weights)
    }

    /// The loss of queries against the keys of a second, momentum encoder, as with MoCo-v3 and DINO.
    ///
    /// `queries` and `keys` are the maps of views 1 and 2 out of the two encoders; `key_side` projects the keys: the
    /// momentum copy of this loss, or this loss itself. The query of one view meets the key of the other, carried into the
    /// query's frame. No gradient reaches the keys.
    ///
    /// # Errors
    /// As [`SerLoss::forward`], and if [`SerConfig::stop_gradient`] stops the anchors: nothing would be left to train.
    pub fn forward_with_keys<G: GroupAction>(
        &self,
        queries: [&Tensor; 2],
        keys: [&Tensor; 2],
        key_side: &SerLoss,
        relative: &Relative<G>,
    ) -> Result<SerOutput> {
        self.forward_with_keys_weighted(queries, keys, key_side, relative, &Weights::default())
    }

    /// [`forward_with_keys`](Self::forward_with_keys), with weights of samples or tokens: those of the queries.
    ///
    /// # Errors
    /// As [`SerLoss::forward_with_keys`] and [`SerLoss::forward_weighted`].
    pub fn forward_with_keys_weighted<G: GroupAction>(
        &self,
        queries: [&Tensor; 2],
        keys: [&Tensor; 2],
        key_side: &SerLoss,
        relative: &Relative<G>,
        weights: &Weights,
    ) -> Result<SerOutput> {
        if self.config.lambda == 0.0 {
            return skipped(queries[0]);
        }
        if self.config.stop_gradient == StopGradient::Anchors {
            return Err(Error::config(
                "stop_gradient",
                "None or Keys: keys of a second encoder have no gradient, so that stopping the anchors stops all",
                "Anchors",
            ));
        }
        if !self.head.is_peer(&key_side.head) {
            return Err(Error::input(
                "SerLoss::forward_with_keys",
                format!(
                    "a key side on the same field as what is compared here, {:?}",
                    self.head.compared()
                ),
                format!("{:?}", key_side.head.compared()),
            ));
        }
        let (from, to) = (relative.from_grid(), relative.to_grid());
        let queries = [
            self.project(queries[0], from)?,
            self.project(queries[1], to)?,
        ];
        let key =
            |map: &Tensor, grid| Ok::<_, Error>(key_side.project(&map.detach(), grid)?.detach());
        let keys = [key(keys[0], from)?, key(keys[1], to)?];
        self.compare(&queries, &keys, relative, weights)
    }

    /// `anchors` and `keys` are projected tokens of views 1 and 2.
    fn compare<G: GroupAction>(
        &self,
        anchors: &[Tensor; 2],
        keys: &[Tensor; 2],
        relative: &Relative<G>,
        weights: &Weights,
    ) -> Result<SerOutput> {
        let config = &self.config;
        let images = anchors[0].dims()[0];
        self.check(anchors, keys)?;
        let rng = &mut StdRng::seed_from_u64(0);
        let cells = [relative.from_grid().len(), relative.to_grid().len()];
        weights.check(images, cells)?;
        let fibre = match self.head.compared() {
            field if field.is_trivial() => None,
            field => Some(FibreOperator::new(field, relative.elements())?),
        };
        let frame = |view: usize, operator: GridOperator, fibre| {
            let soft = config.soft.map(|s| s.tokens(relative, view, &operator));
            let weights = TokenWeights::new(weights, view, soft.transpose()?, images, cells[view]);
            Ok::<_, Error>(Frame {
                operator,
                fibre,
                weights,
            })
        };
        let back = fibre.as_ref().map(FibreOperator::inverse);
        let second = frame(1, relative.to_second(&config.resample)?, fibre)?;
        let mut directions = vec![self.direction(&anchors[1], &keys[0], &second, rng)?];
        if config.symmetric {
            let first = frame(0, relative.to_first(&config.resample)?, back)?;
            directions.push(self.direction(&anchors[0], &keys[1], &first, rng)?);
        }
        // Views that barely touch may share tokens on one of the two grids only: the mean is over what counts.
        let counted: Vec<Direction> = directions.into_iter().flatten().collect();
        if counted.is_empty() {
            let (expected, got) = match (weights, config.soft) {
                (
                    Weights {
                        samples: None,
                        tokens: [None, None],
                    },
                    None,
                ) => ("", "no overlap in"),
                _ => (", of a weight above 0", "none in"),
            };
            return Err(Error::input(
                "SerLoss",
                format!(
                    "at least one token of the batch that both views see{expected} (draw larger crops, smaller \
                     angles and shifts, or set ViewConfig::min_overlap)"
                ),
                format!("{got} any of {images} samples"),
            ));
        }
        let mean = |values: Vec<&Tensor>| -> Result<Tensor> {
            Ok((Tensor::stack(&values, 0)?.sum(0)? / values.len() as f64)?)
        };
        let equivariance = mean(counted.iter().map(|d| &d.loss).collect())?;
        let accuracies: Option<Vec<&Tensor>> =
            counted.iter().map(|d| d.accuracy.as_ref()).collect();
        Ok(SerOutput {
            loss: (&equivariance * config.lambda)?,
            equivariance: equivariance.detach(),
            accuracy: accuracies.map(mean).transpose()?,
            tokens: counted.iter().map(|d| d.tokens).sum(),
        })
    }

    fn check(&self, anchors: &[Tensor; 2], keys: &[Tensor; 2]) -> Result<()> {
        let images = anchors[0].dims()[0];
        for tokens in anchors.iter().chain(keys) {
            if tokens.dims()[0] != images {
                return Err(Error::input(
                    "SerLoss",
                    format!("maps of one batch, {images} samples in the first"),
                    tokens.dims()[0],
                ));
            }
        }
        let excludes = matches!(
            self.config.objective,
            Objective::NtXent {
                same_image: SameImage::Exclude,
                ..
            }
        );
        if images < 2 && excludes {
            return Err(Error::input(
                "SerLoss",
                "at least two images (NT-Xent with SameImage::Exclude has negatives in other images only)",
                images,
            ));
        }
        Ok(())
    }

    /// One direction: `keys` carried into the frame of `anchors`. `None` if no token counts.
    fn direction(
        &self,
        anchors: &Tensor,
        keys: &Tensor,
        frame: &Frame,
        rng: &mut StdRng,
    ) -> Result<Option<Direction>> {
        let (anchors, keys) = match self.config.stop_gradient {
            StopGradient::None => (anchors.clone(), keys.clone()),
            StopGradient::Keys => (anchors.clone(), keys.detach()),
            StopGradient::Anchors => (anchors.detach(), keys.clone()),
        };
        let mut keys = frame.operator.apply(&keys)?;
        if let Some(fibre) = &frame.fibre {
            keys = fibre.apply(&keys)?;
        }
        let (images, n, _) = anchors.dims3()?;
        let valid = valid(&frame.operator, images, &self.config);
        let chosen = choose(&valid, &frame.weights, &self.config, rng);
        let tokens = chosen.iter().map(Vec::len).sum();
        // Tokens of one image alone have no negatives: their loss is 0, and an unlucky draw ends no run.
        if tokens == 0 {
            return Ok(None);
        }
        let ids: Vec<u32> = chosen
            .iter()
            .enumerate()
            .flat_map(|(image, cells)| std::iter::repeat_n(image as u32, cells.len()))
            .collect();
        let (mut anchors, mut keys) = (anchors.flatten(0, 1)?, keys.flatten(0, 1)?);
        if tokens < images * n {
            let rows: Vec<u32> = chosen
                .iter()
                .enumerate()
                .flat_map(|(image, cells)| cells.iter().map(move |cell| (image * n) as u32 + cell))
                .collect();
            let rows = Tensor::from_vec(rows, tokens, anchors.device())?;
            anchors = anchors.contiguous()?.index_select(&rows, 0)?;
            keys = keys.contiguous()?.index_select(&rows, 0)?;
        }
        let weights = frame.weights.chosen(&chosen);
        let (mut loss, accuracy) = self.objective(&anchors, &keys, &ids, weights.as_deref())?;
        if self.config.soft.is_some_and(|soft| !soft.normalize) {
            loss = (loss * frame.weights.kept(&valid))?;
        }
        Ok(Some(Direction {
            loss,
            accuracy,
            tokens,
        }))
    }

    fn objective(
        &self,
        a: &Tensor,
        b: &Tensor,
        ids: &[u32],
        w: Option<&[f32]>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let SerConfig {
            temperature,
            eps,
            block_bytes,
            ..
        } = self.config;
        let loss = match self.config.objective {
            Objective::NtXent { form, same_image } => {
                let config = NtXent {
                    form,
                    same_image,
                    // The other direction is the other view's frame, not the swapped pair.
                    symmetric: false,
                    temperature,
                    eps,
                    block_bytes,
                };
                let ContrastiveOutput { loss, accuracy } =
                    loss::nt_xent_ragged(a, b, ids, w, &config)?;
                return Ok((loss, Some(accuracy)));
            }
            Objective::Mse => loss::mse(a, b, w)?,
            Objective::NormalizedMse => loss::normalized_mse(a, b, eps, w)?,
            Objective::Cosine => loss::cosine(a, b, eps, w)?,
            Objective::L1 => loss::l1(a, b, w)?,
            Objective::SmoothL1 { beta } => loss::smooth_l1(a, b, beta, w)?,
        };
        Ok((loss, None))
    }
}

fn skipped(like: &Tensor) -> Result<SerOutput> {
    let dtype = match like.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let zero = Tensor::zeros((), dtype, like.device())?;
    Ok(SerOutput {
        loss: zero.clone(),
        equivariance: zero,
        accuracy: None,
        tokens: 0,
    })
}
