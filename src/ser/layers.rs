//! The loss at several layers of one model.

use std::f64::consts::PI;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::{SerConfig, SerLoss, SerOutput};
use crate::view::Relative;
use crate::{Error, GroupAction, Result};

/// The weight of a layer by its depth: from the first tapped layer at 0 to the last at 1, evenly spaced.
///
/// ```
/// use ser_reg::ser::Depth;
/// assert_eq!(Depth::Linear { from: 1.0, to: 0.0 }.weights(3)?, [1.0, 0.5, 0.0]);
/// assert_eq!(Depth::Geometric { ratio: 0.5 }.weights(3)?, [1.0, 0.5, 0.25]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Depth {
    /// 1 each.
    #[default]
    Constant,
    /// `from + (to − from)·t`.
    Linear {
        /// The first layer's weight.
        from: f64,
        /// The last layer's weight.
        to: f64,
    },
    /// `to + ½(from − to)(1 + cos πt)`.
    Cosine {
        /// The first layer's weight.
        from: f64,
        /// The last layer's weight.
        to: f64,
    },
    /// `ratio^i` at the `i`-th layer, counted from 0.
    Geometric {
        /// What each layer weighs relative to the one before it; above 0.
        ratio: f64,
    },
}

impl Depth {
    /// The weights of `layers` layers, first to last. A single one has the first's.
    ///
    /// # Errors
    /// If a weight is negative or not finite, or a ratio not above 0.
    pub fn weights(&self, layers: usize) -> Result<Vec<f64>> {
        let bounds = match *self {
            Self::Constant => [1.0; 2],
            Self::Linear { from, to } | Self::Cosine { from, to } => [from, to],
            Self::Geometric { ratio } if ratio > 0.0 => [ratio; 2],
            Self::Geometric { ratio } => {
                return Err(Error::config("Depth", "a ratio above 0", ratio));
            }
        };
        for bound in bounds {
            check_weight(bound)?;
        }
        let last = layers.saturating_sub(1).max(1) as f64;
        let weight = |i: usize| {
            let t = i as f64 / last;
            match *self {
                Self::Constant => 1.0,
                Self::Linear { from, to } => from * (1.0 - t) + to * t,
                Self::Cosine { from, to } => {
                    let c = 0.5 * (1.0 + (PI * t).cos());
                    from * c + to * (1.0 - c)
                }
                Self::Geometric { ratio } => ratio.powf(i as f64),
            }
        };
        let weights: Vec<f64> = (0..layers).map(weight).collect();
        weights.iter().try_for_each(|w| check_weight(*w))?;
        Ok(weights)
    }
}

fn check_weight(weight: f64) -> Result<()> {
    if weight.is_finite() && weight >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        "weight of a layer",
        "a finite value of at least 0",
        weight,
    ))
}

/// A [`SerLoss`] with a projector of its own at each of several layers, and a weight for each:
///
/// ```text
/// L = Σ_l w_l · λ_l L_l
/// ```
///
/// Layers go by the names of their [taps](crate::tap), and maps come in the order of [`names`](Self::names).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Activation, VarBuilder, VarMap, seq};
/// use ser_reg::ser::{Depth, Objective, SerConfig, SerLayers};
/// use ser_reg::{TokenGrid, group::D4, tap::{self, Tapped}, view::Relative};
/// use candle_core::Module;
///
/// let net = seq().add(Tapped::new("early", Activation::Gelu)).add(Tapped::new("late", Activation::Silu));
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layers = [("early", 8), ("late", 8)]; // names and channels
/// let ser = SerLayers::new(SerConfig::default(), &layers, Depth::Geometric { ratio: 0.5 }, vb)?;
///
/// let grid = TokenGrid::square(4)?;
/// let relative = Relative::new(vec![D4::ROT90], grid, grid)?;
/// let x = Tensor::randn(0f32, 1., (2, 16, 8), &Device::Cpu)?;
/// let (_, maps1) = tap::capture_all(&ser.names(), || net.forward(&x))?;
/// let (_, maps2) = tap::capture_all(&ser.names(), || net.forward(&relative.to_second(&Default::default())?.apply(&x)?))?;
/// let out = ser.forward(&maps1, &maps2, &[relative])?;
/// for layer in &out.layers {
///     println!("{}: {} in {:?}", layer.name, layer.output.equivariance, layer.time);
/// }
/// assert_eq!(out.layers[1].weight, 0.5);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// The gradient of each layer's loss reaches every block before its tap. To stop it at the tapped layer before (each loss
/// then trains the blocks between two taps only), hand [`grad::routed`](crate::grad::routed) each layer's own
/// [`loss`](LayerOutput::loss) with the variables that it may train; the base loss keeps all of its own.
#[derive(Clone, Debug)]
pub struct SerLayers {
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    name: String,
    weight: f64,
    loss: SerLoss,
}

/// What [`SerLayers`] returns.
#[derive(Clone, Debug)]
pub struct LayersOutput {
    /// `Σ w_l λ_l L_l`: add it to the loss of the base method.
    pub loss: Tensor,
    /// Each layer, in the order of [`SerLayers::names`].
    pub layers: Vec<LayerOutput>,
}

/// One layer's part of a [`LayersOutput`].
#[derive(Clone, Debug)]
pub struct LayerOutput {
    /// The layer's name.
    pub name: String,
    /// Its weight `w_l`.
    pub weight: f64,
    /// `w_l λ_l L_l`, its part of the sum.
    pub loss: Tensor,
    /// What its own [`SerLoss`] returned, before the weight; of a layer of weight 0 nothing is computed.
    pub output: SerOutput,
    /// Wall time of this layer's loss: projector, alignment and comparison, whose gradient NT-Xent finds along. Neither
    /// the model nor the rest of the backward pass is in it. On other devices than the CPU the device is waited for
    /// before and after.
    pub time: Duration,
}

impl SerLayers {
    /// One loss of the same settings for each of `layers`, a name and a number of channels, first to last in the model;
    /// `depth` weighs them. The projector of a layer takes its variables from `vb.pp(name)`.
    ///
    /// # Errors
    /// As [`SerLoss::new`], [`Depth::weights`] and [`SerLayers::from_losses`].
    pub fn new(
        config: SerConfig,
        layers: &[(&str, usize)],
        depth: Depth,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weights = depth.weights(layers.len())?;
        let layers = layers
            .iter()
            .zip(weights)
            .map(|(&(name, channels), weight)| {
                Ok((name, weight, SerLoss::new(config, channels, vb.pp(name))?))
            });
        Self::from_losses(layers.collect::<Result<Vec<_>>>()?)
    }

    /// Layers of any settings and fields: name, weight and loss of each.
    ///
    /// # Errors
    /// If there is no layer, two have one name, or a weight is negative or not finite, or none is above 0.
    pub fn from_losses<S: Into<String>>(
        layers: impl IntoIterator<Item = (S, f64, SerLoss)>,
    ) -> Result<Self> {
        let layer = |(name, weight, loss): (S, f64, SerLoss)| Layer {
            name: name.into(),
            weight,
            loss,
        };
        let layers: Vec<Layer> = layers.into_iter().map(layer).collect();
        for (i, layer) in layers.iter().enumerate() {
            check_weight(layer.weight)?;
            if layers.iter().take(i).any(|l| l.name == layer.name) {
                return Err(Error::config(
                    "SerLayers",
                    "a name of its own for each layer",
                    format!("`{}` twice", layer.name),
                ));
            }
        }
        if layers.iter().all(|l| l.weight == 0.0) {
            return Err(Error::config(
                "SerLayers",
                "at least one layer of a weight above 0 (set lambda to 0 to switch all off)",
                format!("{} layers, none of them above 0", layers.len()),
            ));
        }
        Ok(Self { layers })
    }

    /// The names of the layers, as [`tap::capture_all`](crate::tap::capture_all) takes them.
    pub fn names(&self) -> Vec<&str> {
        self.layers.iter().map(|l| l.name.as_str()).collect()
    }

    /// The weights of the layers.
    pub fn weights(&self) -> Vec<f64> {
        self.layers.iter().map(|l| l.weight).collect()
    }

    /// Name, weight and loss of each layer.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, f64, &SerLoss)> {
        self.layers
            .iter()
            .map(|l| (l.name.as_str(), l.weight, &l.loss))
    }

    /// The loss of a layer, if there is one of that name.
    pub fn get(&self, name: &str) -> Option<&SerLoss> {
        let layer = self.layers.iter().find(|l| l.name == name);
        layer.map(|l| &l.loss)
    }

    /// Changes λ of every layer, as a schedule over training does.
    ///
    /// # Errors
    /// If it is negative or not finite.
    pub fn set_lambda(&mut self, lambda: f64) -> Result<()> {
        self.layers
            .iter_mut()
            .try_for_each(|l| l.loss.set_lambda(lambda))
    }

    /// The loss of the maps of two views, one per layer each.
    ///
    /// `relatives` is one for all layers, or one per layer where their grids differ: [`Relative::on`] carries the elements
    /// to another pair of grids.
    ///
    /// # Errors
    /// As [`SerLoss::forward`], and if maps or relative elements do not count as many as the layers.
    pub fn forward<G: GroupAction>(
        &self,
        maps1: &[Tensor],
        maps2: &[Tensor],
        relatives: &[Relative<G>],
    ) -> Result<LayersOutput> {
        self.check([maps1.len(), maps2.len()], relatives.len())?;
        self.each(maps1, relatives, |i, loss, map1, relative| {
            // The lengths are equal.
            let map2 = maps2.get(i).unwrap_or(map1);
            loss.forward(map1, map2, relative)
        })
    }

    /// The loss of queries against the keys of a momentum encoder, as [`SerLoss::forward_with_keys`] has it: maps of the
    /// first and of the second view, one per layer each.
    ///
    /// # Errors
    /// As [`SerLoss::forward_with_keys`], and if maps, relative elements or the key side do not count as many as the
    /// layers.
    pub fn forward_with_keys<G: GroupAction>(
        &self,
        queries: [&[Tensor]; 2],
        keys: [&[Tensor]; 2],
        key_side: &SerLayers,
        relatives: &[Relative<G>],
    ) -> Result<LayersOutput> {
        for maps in [queries, keys] {
            self.check(maps.map(<[Tensor]>::len), relatives.len())?;
        }
        if key_side.names() != self.names() {
            return Err(Error::input(
                "SerLayers::forward_with_keys",
                format!("a key side of the same layers, {:?}", self.names()),
                format!("{:?}", key_side.names()),
            ));
        }
        let [keys1, keys2] = keys;
        let sides = |i: usize| keys1.get(i).zip(keys2.get(i)).zip(key_side.layers.get(i));
        self.each(queries[0], relatives, |i, loss, query1, relative| {
            match (queries[1].get(i), sides(i)) {
                (Some(query2), Some(((key1, key2), side))) => {
                    loss.forward_with_keys([query1, query2], [key1, key2], &side.loss, relative)
                }
                // The lengths are equal.
                _ => loss.forward(query1, query1, relative),
            }
        })
    }

    /// `run(i, loss, map, relative)` of every layer that weighs anything, timed; `maps` are as many as the layers.
    fn each<G: GroupAction>(
        &self,
        maps: &[Tensor],
        relatives: &[Relative<G>],
        run: impl Fn(usize, &SerLoss, &Tensor, &Relative<G>) -> Result<SerOutput>,
    ) -> Result<LayersOutput> {
        let mut layers = Vec::with_capacity(self.layers.len());
        let relatives = relatives.iter().cycle();
        for (i, ((layer, map), relative)) in self.layers.iter().zip(maps).zip(relatives).enumerate()
        {
            map.device().synchronize()?;
            let start = Instant::now();
            let output = match layer.weight {
                0.0 => super::skipped(map)?,
                _ => run(i, &layer.loss, map, relative)?,
            };
            map.device().synchronize()?;
            layers.push(LayerOutput {
                name: layer.name.clone(),
                weight: layer.weight,
                loss: (&output.loss * layer.weight)?,
                output,
                time: start.elapsed(),
            });
        }
        let losses: Vec<&Tensor> = layers.iter().map(|l| &l.loss).collect();
        let loss = Tensor::stack(&losses, 0)?.sum(0)?;
        Ok(LayersOutput { loss, layers })
    }

    fn check(&self, maps: [usize; 2], relatives: usize) -> Result<()> {
        let count = self.layers.len();
        if maps != [count; 2] || (relatives != 1 && relatives != count) {
            return Err(Error::input(
                "SerLayers",
                format!(
                    "{count} maps of each view, one per layer, and relative elements for 1 or {count} pairs of grids"
                ),
                format!("{} and {} maps, {relatives} relatives", maps[0], maps[1]),
            ));
        }
        Ok(())
    }
}
