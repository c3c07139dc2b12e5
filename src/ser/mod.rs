//! The soft equivariance loss on the token maps of two views.

mod config;
mod frame;
mod pair;
mod weights;

use candle_core::{Module, Tensor};
use rand::{SeedableRng, rngs::StdRng};

pub use config::{Objective, SerConfig, StopGradient};
pub use pair::MapPair;
pub use weights::Weights;

use self::frame::Frame;
use crate::group::FieldType;
use crate::loss::{self, SameImage};
use crate::projector::Projector;
use crate::{Error, GroupAction, Result, check};

/// The result of a [`SerLoss`]. Scalars are f32, or f64 for f64 maps.
#[derive(Clone, Debug)]
pub struct SerOutput {
    /// `λ·L`: add it to the loss of the base method. At λ = 0 it is a constant zero, without a graph.
    pub loss: Tensor,
    /// `L`, with its graph at every λ. Lower is better. NT-Xent starts near `ln(1 + negatives)`, its value for tokens that
    /// tell nothing apart.
    pub unweighted: Tensor,
    /// Share of anchors whose positive is more similar than every negative, detached; NT-Xent only. Chance is
    /// `1/(1 + negatives)`. It can fall in a healthy run while the tokens of different images become more alike.
    pub accuracy: Option<Tensor>,
    /// The number of anchors over both directions.
    pub anchors: usize,
}

/// Soft equivariance regularization (arXiv 2603.06693) on the token maps of an intermediate layer.
///
/// With `h` the head, `F₁`, `F₂` the maps of two views and `ρ` the action of their relative element on tokens,
///
/// ```text
/// L = ½ ( ℓ(h(F₂), ρ₁→₂ h(F₁)) + ℓ(h(F₁), ρ₂→₁ h(F₂)) )
/// ```
///
/// where `ℓ(anchors, keys)` is the [`Objective`]. Tokens without a counterpart in the other view are dropped: they reach
/// neither the head nor the loss, and get no gradient. Only blocks up to the tapped layer learn from this loss.
///
/// The loss holds no variables: the head is a part of the [`MapPair`]. [`Regularizer`](crate::Regularizer) ties both to a
/// sampler of views and a tap.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use rand::{SeedableRng, rngs::StdRng};
/// use ser_reg::{MapPair, Projector, ProjectorConfig, SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let head = Projector::new(16, ProjectorConfig::default(), vb)?;
/// let ser = SerLoss::new(SerConfig { lambda: 0.5, ..Default::default() })?;
///
/// let sampler = ViewSampler::new(TokenGrid::square(7)?, ViewConfig::default())?;
/// let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 2)?;
/// // Two maps (B, N, C) of any model, on the grids of the two views.
/// let map = |grid: TokenGrid| Tensor::randn(0f32, 1., (2, grid.len(), 16), &Device::Cpu);
/// let (map1, map2) = (map(views.first.grid())?, map(views.second.grid())?);
/// let out = ser.forward(&MapPair::new([&map1, &map2], &views.relative()).head(&head))?;
/// out.loss.backward()?;
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SerLoss {
    config: SerConfig,
}

/// The loss of one or of both directions.
struct Compared {
    loss: Tensor,
    accuracy: Option<Tensor>,
    anchors: usize,
}

impl SerLoss {
    /// A loss with these settings.
    ///
    /// # Errors
    /// If a setting is out of its range.
    pub fn new(config: SerConfig) -> Result<Self> {
        config.check()?;
        Ok(Self { config })
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
        check::not_negative("lambda", lambda)?;
        self.config.lambda = lambda;
        Ok(())
    }

    /// The loss of `pair`. A NaN or an infinity in a token that counts makes the loss NaN.
    ///
    /// Where masks or weights leave tokens of one image only, NT-Xent without same-image negatives is 0.
    ///
    /// # Errors
    /// [`Error::NoOverlap`] if no token of the batch counts. Other errors if:
    ///
    /// - a map does not fit its grid and the layout, or its channels or type do not fit the head;
    /// - the maps differ in batch, type or device, or the relative elements are neither 1 nor B;
    /// - the field has a regular representation and an element lacks a [`d4_part`](GroupAction::d4_part) in its group;
    /// - the weights differ in number from what they weigh, or one is negative or not finite;
    /// - the filter of [`SerConfig::resample`] does not suit the elements.
    pub fn forward<G: GroupAction>(&self, pair: &MapPair<G>) -> Result<SerOutput> {
        let config = &self.config;
        let maps = self.tokens(pair, pair.maps)?;
        let key_maps = match pair.keys {
            Some(keys) => Some(self.tokens(pair, keys.maps)?),
            None => None,
        };
        let images = self.check_batch(pair, &maps, key_maps.as_ref())?;
        let field = compared_field(pair, maps[0].dims()[2])?;

        let rng = &mut StdRng::seed_from_u64(pair.seed);
        let mut frame = |view| Frame::new(pair, view, &field, images, config, rng);
        let second = frame(1)?;
        let first = match config.symmetric {
            true => Some(frame(0)?),
            false => None,
        };
        let frames = [first, Some(second)];
        if frames.iter().flatten().all(|frame| frame.anchors.len() == 0) {
            return Err(Error::NoOverlap { images });
        }

        let (anchors, keys) = project(pair, maps, key_maps, &frames)?;
        let Compared { loss: unweighted, accuracy, anchors } =
            self.compare(pair, &frames, &anchors, &keys)?;
        let loss = match config.lambda {
            0.0 => unweighted.zeros_like()?.detach(),
            lambda => (&unweighted * lambda)?,
        };
        Ok(SerOutput { loss, unweighted, accuracy, anchors })
    }

    /// The grid tokens of two maps.
    fn tokens<G: GroupAction>(&self, pair: &MapPair<G>, maps: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let layout = &self.config.layout;
        Ok([
            layout.tokens(maps[0], pair.relative.from_grid())?,
            layout.tokens(maps[1], pair.relative.to_grid())?,
        ])
    }

    /// Checks that all tokens are of one batch; its size.
    fn check_batch<G: GroupAction>(
        &self,
        pair: &MapPair<G>,
        maps: &[Tensor; 2],
        keys: Option<&[Tensor; 2]>,
    ) -> Result<usize> {
        let op = "SerLoss";
        let (images, relative) = (maps[0].dims()[0], pair.relative);
        let (dtype, device) = (maps[0].dtype(), maps[0].device());
        for tokens in maps.iter().chain(keys.into_iter().flatten()) {
            if tokens.dims()[0] != images {
                let expected = format!("maps of one batch, {images} images in the first");
                return Err(Error::input(op, expected, tokens.dims()[0]));
            }
            if tokens.dtype() != dtype || !tokens.device().same_device(device) {
                let text = |x: &Tensor| format!("{} on {:?}", x.dtype().as_str(), x.device());
                let expected = format!("maps of one type and device, {} first", text(&maps[0]));
                return Err(Error::input(op, expected, text(tokens)));
            }
        }
        if ![1, images].contains(&relative.len()) {
            let expected = format!("one relative element, or one for each of {images} images");
            return Err(Error::input(op, expected, relative.len()));
        }
        let excludes = matches!(
            self.config.objective,
            Objective::NtXent(c) if c.same_image == SameImage::Exclude
        );
        if images < 2 && excludes {
            let expected = "at least two images, because the tokens of other images are the negatives of NT-Xent (drop a short last batch, or use another Objective)";
            return Err(Error::input(op, expected, images));
        }
        let cells = [relative.from_grid().len(), relative.to_grid().len()];
        pair.weights.check(images, cells)?;
        Ok(images)
    }

    /// The loss over all frames; `anchors` and `keys` are projected tokens of views 1 and 2.
    fn compare<G: GroupAction>(
        &self,
        pair: &MapPair<G>,
        frames: &[Option<Frame>; 2],
        anchors: &[Tensor; 2],
        keys: &[Tensor; 2],
    ) -> Result<Compared> {
        if let (Objective::NtXent(contrastive), [Some(_), Some(second)]) =
            (&self.config.objective, frames)
            && self.is_one_pair(pair, second)
        {
            let [a, k] = second.rows(&anchors[1], &keys[0])?;
            let (ids, weights) = (second.anchors.image_ids(), &second.anchors.weights);
            let out =
                loss::pairs("SerLoss", [&a, &k], &ids, weights.as_deref(), contrastive, true)?;
            return Ok(Compared {
                loss: out.loss,
                accuracy: Some(out.accuracy),
                anchors: 2 * second.anchors.len(),
            });
        }
        let mut directions = Vec::with_capacity(2);
        for view in [1, 0] {
            // Views that barely touch may share tokens on one of the two grids only.
            if let Some(frame) = frames[view].as_ref().filter(|f| f.anchors.len() > 0) {
                directions.push(self.direction(frame, &anchors[view], &keys[1 - view])?);
            }
        }
        let count = directions.len() as f64;
        let mut directions = directions.into_iter();
        let Some(mut sum) = directions.next() else {
            return Err(Error::NoOverlap { images: anchors[0].dims()[0] });
        };
        for direction in directions {
            sum.loss = (sum.loss + direction.loss)?;
            sum.accuracy = match (sum.accuracy, direction.accuracy) {
                (Some(a), Some(b)) => Some((a + b)?),
                _ => None,
            };
            sum.anchors += direction.anchors;
        }
        Ok(Compared {
            loss: (sum.loss / count)?,
            accuracy: sum.accuracy.map(|a| a / count).transpose()?,
            anchors: sum.anchors,
        })
    }

    /// Whether both frames hold the same pairs of tokens, so that both directions are one symmetric NT-Xent.
    ///
    /// Where channels transform, the cosines of two images with different elements differ between the frames.
    fn is_one_pair<G: GroupAction>(&self, pair: &MapPair<G>, second: &Frame) -> bool {
        second.keeps_channels()
            && self.config.stop_gradient == StopGradient::None
            && self.config.max_tokens.is_none()
            && pair.keys.is_none()
            && pair.weights.tokens == [None, None]
            && frame::is_permutation(pair)
    }

    /// One direction: `keys` of the other view come into the frame of `anchors`.
    fn direction(&self, frame: &Frame, anchors: &Tensor, keys: &Tensor) -> Result<Compared> {
        let keys = match self.config.stop_gradient {
            StopGradient::None => keys.clone(),
            StopGradient::Keys => keys.detach(),
        };
        let [a, k] = &frame.rows(anchors, &keys)?;
        let w = frame.anchors.weights.as_deref();
        let mut accuracy = None;
        let loss = match &self.config.objective {
            Objective::NtXent(contrastive) => {
                let ids = frame.anchors.image_ids();
                let out = loss::pairs("SerLoss", [a, k], &ids, w, contrastive, false)?;
                accuracy = Some(out.accuracy);
                out.loss
            }
            Objective::Mse => loss::mse(a, k, w)?,
            &Objective::NormalizedMse { eps } => loss::normalized_mse(a, k, eps, w)?,
            &Objective::Cosine { eps } => loss::cosine(a, k, eps, w)?,
            Objective::L1 => loss::l1(a, k, w)?,
            &Objective::SmoothL1 { beta } => loss::smooth_l1(a, k, beta, w)?,
        };
        Ok(Compared { loss, accuracy, anchors: frame.anchors.len() })
    }
}

/// How the channels of the compared tokens transform.
fn compared_field<G: GroupAction>(pair: &MapPair<G>, channels: usize) -> Result<FieldType> {
    let op = "SerLoss";
    let Some(head) = pair.head else {
        if pair.keys.is_some_and(|keys| keys.head.is_some()) {
            let expected = "a head for both encoders, or for none (MapPair::head)";
            return Err(Error::input(op, expected, "a head for the keys only"));
        }
        let field = match pair.field {
            Some(field) => field.clone(),
            None => FieldType::trivial(channels),
        };
        return match field.channels() == channels {
            true => Ok(field),
            false => {
                let expected = format!("maps of {} channels, as the field", field.channels());
                Err(Error::input(op, expected, channels))
            }
        };
    };
    if pair.field.is_some() {
        let expected = "a field only where there is no head (Projector::on_field)";
        return Err(Error::input(op, expected, "both"));
    }
    if head.field().channels() != channels {
        let expected = format!(
            "maps of {} channels, as the head (pass the width of the map as `channels` to Regularizer::new or Projector::new)",
            head.field().channels()
        );
        return Err(Error::input(op, expected, channels));
    }
    let field = head.output_field();
    if let Some(keys) = pair.keys {
        match keys.head {
            Some(head) if head.output_field() == field => {}
            Some(head) => {
                let expected = format!(
                    "a key head with {} output channels on the same field (give it the ProjectorConfig of the head)",
                    field.channels()
                );
                let got =
                    format!("{} on {:?}", head.output_field().channels(), head.output_field());
                return Err(Error::input(op, expected, got));
            }
            None => {
                let expected = "a head for both encoders, or for none (MapPair::keys)";
                return Err(Error::input(op, expected, "none for the keys"));
            }
        }
    }
    Ok(field.clone())
}

/// Anchors and keys behind their heads.
///
/// Tokens that do not count are blanked before the head, so that their values reach no gradient.
fn project<G: GroupAction>(
    pair: &MapPair<G>,
    maps: [Tensor; 2],
    key_maps: Option<[Tensor; 2]>,
    frames: &[Option<Frame>; 2],
) -> Result<([Tensor; 2], [Tensor; 2])> {
    let head = |head: Option<&Projector>, tokens: Tensor| -> Result<Tensor> {
        match head {
            Some(head) => Ok(head.forward(&tokens)?),
            None => Ok(tokens),
        }
    };
    let frames = frames.each_ref().map(Option::as_ref);
    let [map1, map2] = maps;
    let Some(keys) = key_maps else {
        let tokens = [
            head(pair.head, frame::blank(map1, frames[0], frames[1])?)?,
            head(pair.head, frame::blank(map2, frames[1], frames[0])?)?,
        ];
        return Ok((tokens.clone(), tokens));
    };
    let anchors = [
        head(pair.head, frame::blank(map1, frames[0], None)?)?,
        head(pair.head, frame::blank(map2, frames[1], None)?)?,
    ];
    let key_head = pair.keys.and_then(|keys| keys.head);
    let key = |tokens: &Tensor, reader| -> Result<Tensor> {
        Ok(head(key_head, frame::blank(tokens.detach(), None, reader)?)?.detach())
    };
    Ok((anchors, [key(&keys[0], frames[1])?, key(&keys[1], frames[0])?]))
}
