//! The soft equivariance loss: two token maps of one batch, seen through two views, should differ by the views only.

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::loss::{self, Contrast, Form, InfoNce, NtXent, SameImage};
use crate::projector::{Projector, ProjectorConfig};
use crate::view::Relative;
use crate::{Error, GridOperator, GroupAction, Layout, Resample, Result, TokenGrid};

/// What is asked of corresponding tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// To be nearer to each other than to the tokens of the batch: [`loss::nt_xent`].
    NtXent {
        /// Which views the negatives come from.
        form: Form,
        /// Whether tokens of the same image are negatives.
        same_image: SameImage,
    },
    /// To be equal: [`loss::mse`].
    Mse,
    /// To be equal once normalised: [`loss::normalized_mse`].
    NormalizedMse,
    /// To point the same way: [`loss::cosine`].
    Cosine,
    /// To be equal: [`loss::l1`].
    L1,
    /// To be equal: [`loss::smooth_l1`].
    SmoothL1 {
        /// Where the parabola ends and the line begins; above 0.
        beta: f64,
    },
}

impl Default for Objective {
    /// NT-Xent in the paper's form, against other images only.
    fn default() -> Self {
        Self::NtXent {
            form: Form::default(),
            same_image: SameImage::default(),
        }
    }
}

/// Which side of a comparison gets no gradient.
///
/// In each direction the *anchors* are the tokens of one view where they stand, and the *keys* are those of the other
/// view, carried into the anchors' frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopGradient {
    /// Both sides learn.
    #[default]
    None,
    /// The keys are targets, as with a momentum encoder.
    Keys,
    /// The anchors are targets: the gradient passes through the group action only.
    Anchors,
}

/// What becomes of tokens without a counterpart: those that crops or rotations leave in one view only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validity {
    /// They weigh nothing: dropped as anchors, positives and negatives, and without gradient.
    #[default]
    Mask,
    /// They count in full, compared with what the padding shows: a control for the mask.
    Ignore,
}

/// The settings of a [`SerLoss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SerConfig {
    /// What is asked of corresponding tokens.
    pub objective: Objective,
    /// Temperature τ of NT-Xent; finite and above 0. The paper has 0.3 for MoCo-v3 and Barlow Twins and 0.5 for DINO,
    /// the authors' scripts 0.5 and 0.4.
    pub temperature: f64,
    /// The factor λ on the loss; finite and at least 0. With 0 nothing is computed.
    pub lambda: f64,
    /// The mean of both directions, or only the first view carried into the second's frame.
    pub symmetric: bool,
    /// Which side gets no gradient.
    pub stop_gradient: StopGradient,
    /// What becomes of tokens without a counterpart.
    pub validity: Validity,
    /// How the maps lay out their tokens.
    pub layout: Layout,
    /// At most so many anchors in each direction, spread evenly over the images; the cost of NT-Xent is quadratic in them,
    /// and it needs two. Which ones follows from the seed of the [`Relative`] elements: give each step another.
    pub max_tokens: Option<usize>,
    /// The head between map and loss; `None` compares the tokens themselves.
    pub projector: Option<ProjectorConfig>,
    /// How tokens are resampled where the relative element is no permutation.
    pub resample: Resample,
    /// Added to the squared norm inside the root of cosines; finite and at least 0. With 0 a zero token gives NaN.
    pub eps: f64,
    /// Bytes of similarities that NT-Xent holds at a time.
    pub block_bytes: usize,
}

impl Default for SerConfig {
    /// The paper's NT-Xent with τ = 0.3 and λ = 1, both directions, gradient to both sides, the 512-wide head.
    fn default() -> Self {
        let InfoNce {
            temperature,
            eps,
            block_bytes,
        } = InfoNce::default();
        Self {
            objective: Objective::default(),
            temperature,
            lambda: 1.0,
            symmetric: true,
            stop_gradient: StopGradient::default(),
            validity: Validity::default(),
            layout: Layout::default(),
            max_tokens: None,
            projector: Some(ProjectorConfig::default()),
            resample: Resample::default(),
            eps,
            block_bytes,
        }
    }
}

impl SerConfig {
    pub(crate) fn check(&self) -> Result<()> {
        check_lambda(self.lambda)?;
        self.info_nce().check()?;
        self.resample.check()?;
        match self.objective {
            Objective::SmoothL1 { beta } if !(beta.is_finite() && beta > 0.0) => {
                Err(Error::config("beta", "a finite value above 0", beta))
            }
            Objective::NtXent { .. } if self.max_tokens == Some(1) => Err(Error::config(
                "max_tokens",
                "at least 2 (one token has no negatives), or None for all tokens",
                1,
            )),
            _ if self.max_tokens == Some(0) => Err(Error::config(
                "max_tokens",
                "at least 1, or None for all tokens",
                0,
            )),
            _ => Ok(()),
        }
    }

    fn info_nce(&self) -> InfoNce {
        InfoNce {
            temperature: self.temperature,
            eps: self.eps,
            block_bytes: self.block_bytes,
        }
    }
}

fn check_lambda(lambda: f64) -> Result<()> {
    if lambda.is_finite() && lambda >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        "lambda",
        "a finite value of at least 0",
        lambda,
    ))
}

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
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{TokenGrid, ser::{SerConfig, SerLoss}, view::{ViewConfig, ViewSampler}};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let ser = SerLoss::new(SerConfig { lambda: 0.5, ..Default::default() }, 16, vb)?;
///
/// let sampler = ViewSampler::new(ViewConfig::default(), TokenGrid::square(7)?)?;
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
    channels: usize,
    projector: Option<Projector>,
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
        config.check()?;
        let projector = config
            .projector
            .map(|head| Projector::new(head, channels, vb))
            .transpose()?;
        Ok(Self {
            config,
            channels,
            projector,
        })
    }

    /// The settings.
    pub fn config(&self) -> &SerConfig {
        &self.config
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
        if tokens.dims()[2] != self.channels {
            return Err(Error::input(
                "SerLoss",
                format!("maps of {} channels", self.channels),
                format!("{} in {:?}", tokens.dims()[2], map.dims()),
            ));
        }
        match &self.projector {
            Some(head) => Ok(head.forward(&tokens)?),
            None => Ok(tokens),
        }
    }

    /// The loss of two maps that came out of one encoder: `map1` on `relative.from_grid()`, `map2` on `relative.to_grid()`.
    ///
    /// Maps are (B, prefix + N, C), (B, C, H, W) or (B, H, W, C), as [`SerConfig::layout`] says.
    ///
    /// # Errors
    /// If a map does not fit its grid, the maps differ in batch, type or device, the relative elements do not count 1 or B,
    /// no token of the batch is seen in both views, or NT-Xent without same-image negatives gets fewer than two images.
    pub fn forward<G: GroupAction>(
        &self,
        map1: &Tensor,
        map2: &Tensor,
        relative: &Relative<G>,
    ) -> Result<SerOutput> {
        if self.config.lambda == 0.0 {
            return skipped(map1);
        }
        let tokens = [
            self.project(map1, relative.from_grid())?,
            self.project(map2, relative.to_grid())?,
        ];
        self.compare(&tokens, &tokens, relative)
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
        let (from, to) = (relative.from_grid(), relative.to_grid());
        let queries = [
            self.project(queries[0], from)?,
            self.project(queries[1], to)?,
        ];
        let key =
            |map: &Tensor, grid| Ok::<_, Error>(key_side.project(&map.detach(), grid)?.detach());
        let keys = [key(keys[0], from)?, key(keys[1], to)?];
        self.compare(&queries, &keys, relative)
    }

    /// `anchors` and `keys` are projected tokens of views 1 and 2.
    fn compare<G: GroupAction>(
        &self,
        anchors: &[Tensor; 2],
        keys: &[Tensor; 2],
        relative: &Relative<G>,
    ) -> Result<SerOutput> {
        let config = &self.config;
        let images = anchors[0].dims()[0];
        self.check(anchors, keys)?;
        let rng = &mut StdRng::seed_from_u64(relative.seed());
        let there = relative.forward(&config.resample)?;
        let mut directions = vec![self.direction(&anchors[1], &keys[0], &there, rng)?];
        if config.symmetric {
            let back = relative.reverse(&config.resample)?;
            directions.push(self.direction(&anchors[0], &keys[1], &back, rng)?);
        }
        // Views that barely touch may share tokens on one of the two grids only: the mean is over what counts.
        let counted: Vec<Direction> = directions.into_iter().flatten().collect();
        if counted.is_empty() {
            return Err(Error::input(
                "SerLoss",
                "at least one token of the batch that both views see (draw larger crops, smaller angles and shifts, or set \
                 ViewConfig::min_overlap)",
                format!("no overlap in any of {images} samples"),
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
        match self.config.objective {
            Objective::NtXent {
                same_image: SameImage::Exclude,
                ..
            } if images < 2 => Err(Error::input(
                "SerLoss",
                "at least two images (NT-Xent with SameImage::Exclude has negatives in other images only)",
                images,
            )),
            _ => Ok(()),
        }
    }

    /// One direction: `keys` carried by `operator` into the frame of `anchors`. `None` if no token counts.
    fn direction(
        &self,
        anchors: &Tensor,
        keys: &Tensor,
        operator: &GridOperator,
        rng: &mut StdRng,
    ) -> Result<Option<Direction>> {
        let (anchors, keys) = match self.config.stop_gradient {
            StopGradient::None => (anchors.clone(), keys.clone()),
            StopGradient::Keys => (anchors.clone(), keys.detach()),
            StopGradient::Anchors => (anchors.detach(), keys.clone()),
        };
        let keys = operator.apply(&keys)?;
        let (images, n, _) = anchors.dims3()?;
        let chosen = choose(operator, images, &self.config, rng);
        let tokens = chosen.iter().map(Vec::len).sum();
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
        let (loss, accuracy) = self.objective(&anchors, &keys, &ids)?;
        Ok(Some(Direction {
            loss,
            accuracy,
            tokens,
        }))
    }

    fn objective(&self, a: &Tensor, b: &Tensor, ids: &[u32]) -> Result<(Tensor, Option<Tensor>)> {
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
                let Contrast { loss, accuracy } = loss::nt_xent_ragged(a, b, ids, None, &config)?;
                return Ok((loss, Some(accuracy)));
            }
            Objective::Mse => loss::mse(a, b, None)?,
            Objective::NormalizedMse => loss::normalized_mse(a, b, eps, None)?,
            Objective::Cosine => loss::cosine(a, b, eps, None)?,
            Objective::L1 => loss::l1(a, b, None)?,
            Objective::SmoothL1 { beta } => loss::smooth_l1(a, b, beta, None)?,
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

/// The cells of each image that count: the valid ones, at most `max_tokens` over all images.
///
/// Images share that cap evenly; what one cannot use goes to the others. Cells are drawn without replacement and kept in
/// order.
fn choose(
    operator: &GridOperator,
    images: usize,
    config: &SerConfig,
    rng: &mut StdRng,
) -> Vec<Vec<u32>> {
    let n = operator.out_grid().len() as u32;
    let mut cells: Vec<Vec<u32>> = (0..images)
        .map(|image| match operator.valid(image) {
            Some(valid) if config.validity == Validity::Mask => {
                (0..n).filter(|&cell| valid[cell as usize]).collect()
            }
            _ => (0..n).collect(),
        })
        .collect();
    let Some(mut left) = config.max_tokens else {
        return cells;
    };

    let mut order: Vec<usize> = (0..images).collect();
    order.shuffle(rng);
    order.sort_by_key(|&image| cells[image].len());
    for (done, &image) in order.iter().enumerate() {
        let own = &mut cells[image];
        let share = own.len().min(left / (images - done));
        let (drawn, _) = own.partial_shuffle(rng, share);
        drawn.sort_unstable();
        *own = drawn.to_vec();
        left -= share;
    }
    cells
}
