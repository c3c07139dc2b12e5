//! EquiMod (arXiv 2211.01244): predict how an augmentation moves the embedding.

use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    AddonInput, AddonOutput,
    addon::{self, Reader},
    check,
    nn::{self, BatchNorm, Mlp, MlpConfig, Norm, Output},
    parameters::{self, AugmentationParameters, ParameterStatistics},
};
use crate::Result;

/// The settings of [`EquiMod`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EquiModConfig {
    /// Width of both hidden layers of the projector `g`.
    pub hidden: usize,
    /// Width of the output of the projector, of `φ` and of the prediction.
    pub out: usize,
    /// Temperature `τ'`; finite and above 0.
    pub temperature: f64,
    /// Weight `λ` of the loss; finite and at least 0.
    pub lambda: f64,
    /// Whether the parameter vector has an 18th number, which is 1 for solarized views. The authors
    /// have 17 numbers.
    pub solarize: bool,
    /// Means and deviations that standardize the parameter vector; `None` leaves the vector
    /// unscaled.
    ///
    /// The authors standardize: pass [`ParameterStatistics::of`] for many draws of your
    /// augmentation. Without it, the small numbers (hue, crop) count little beside the order of the
    /// jitter.
    pub statistics: Option<ParameterStatistics>,
}

impl Default for EquiModConfig {
    /// The authors' values for ResNet-50: 2048-2048-128, `τ' = 0.2`, `λ = 1`, 17 parameters.
    ///
    /// The SER paper takes 384-384-128 for ViT-S. The statistics depend on the augmentation, so the
    /// default has none.
    fn default() -> Self {
        Self {
            hidden: 2048,
            out: 128,
            temperature: 0.2,
            lambda: 1.0,
            solarize: false,
            statistics: None,
        }
    }
}

/// The head and the loss of EquiMod.
///
/// ```text
/// y = g(h(x)),   ŷ_t = u([y₀; φ(p_t)]),   L = λ · NT-Xent_{τ'}({y_t} ∪ {ŷ_t}),   views t = 1, 2
/// ```
///
/// Each of the 4B embeddings must find its partner among the 4B − 1 others. `x₀` is the image
/// without augmentation, `p_t` the [parameter vector](AugmentationParameters::vector) of view t.
/// `g` has three linear maps with batch normalization and ReLU between them, and a batch
/// normalization without scale and shift at its end. `φ` is a linear map with a batch
/// normalization, `u` a linear map with one without scale and shift. All branches get a gradient.
///
/// The prediction may learn to ignore `p`; the features then become invariant. The metrics show it:
/// `absolute` is the mean `cos(y_t, ŷ_t)`, `invariance` the mean `cos(y_t, y₀)`, and `relative`
/// their difference. `relative` is 0 for a prediction that ignores `p`. `matched` is the fraction
/// of embeddings that find their partner.
///
/// Source: arXiv 2211.01244.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::{AddonInput, AugmentationParameters, EquiMod, EquiModConfig};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = EquiModConfig { hidden: 32, ..Default::default() };
/// let addon = EquiMod::new(config, AddonInput::Embedding, 16, vb)?;
/// let h = || Tensor::randn(0f32, 1., (4, 16), &Device::Cpu);
/// let parameters = [AugmentationParameters::untouched(); 4];
/// let out = addon.forward(&h()?, [&h()?, &h()?], [&parameters, &parameters])?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EquiMod {
    config: EquiModConfig,
    reader: Reader,
    /// `g`.
    projector: Mlp,
    /// `φ`.
    description: (Linear, BatchNorm),
    /// `u`.
    predictor: (Linear, BatchNorm),
}

impl EquiMod {
    const OP: &'static str = "EquiMod";

    /// An add-on for features of `channels` channels.
    ///
    /// Variables: `norm.*` (tokens only), `project.*`, `describe.*`, `predict.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` fails to return a variable.
    pub fn new(
        config: EquiModConfig,
        input: AddonInput,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let EquiModConfig { hidden, out, .. } = config;
        check::widths(&[("EquiModConfig::hidden", hidden), ("EquiModConfig::out", out)])?;
        check::not_negative("EquiModConfig::lambda", config.lambda)?;
        check::positive("EquiModConfig::temperature", config.temperature)?;
        if let Some(statistics) = &config.statistics {
            statistics.check(config.solarize)?;
        }
        let projector = MlpConfig {
            widths: &[channels, hidden, hidden, out],
            norm: Norm::Batch,
            output: Output::Normalized(Norm::PlainBatch),
        };
        let numbers = parameters::width(config.solarize);
        let (describe, predict) = (vb.pp("describe"), vb.pp("predict"));
        Ok(Self {
            reader: Reader::new(input, channels, vb.clone())?,
            projector: Mlp::new(&projector, vb.pp("project"))?,
            description: (
                nn::linear(numbers, out, false, describe.clone())?,
                BatchNorm::new(out, describe.pp("norm"))?,
            ),
            predictor: (nn::linear(2 * out, out, false, predict)?, BatchNorm::without_affine()),
            config,
        })
    }

    /// The loss of two views, given the unaugmented images `plain` and the augmentation parameters
    /// of each view.
    ///
    /// Features are `(B, D)` or token maps, as [`AddonInput`] says. `parameters` has one entry per
    /// sample and view.
    ///
    /// # Errors
    /// If the batches differ or have fewer than two samples, shapes or types do not fit the input,
    /// or a parameter is `None`.
    pub fn forward(
        &self,
        plain: &Tensor,
        views: [&Tensor; 2],
        parameters: [&[AugmentationParameters]; 2],
    ) -> Result<AddonOutput> {
        let h0 = self.reader.features(Self::OP, plain)?;
        let [h1, h2] = self.reader.pair(Self::OP, views)?;
        addon::check_batch(Self::OP, &h0, &h1)?;
        let batch = h0.dim(0)?;
        check::batch(Self::OP, batch)?;
        parameters::check_counts(Self::OP, parameters, batch)?;
        let vectors = self.vectors(parameters, &h0)?;

        let y = self.projector.forward(&Tensor::cat(&[h0, h1, h2], 0)?)?;
        let (origin, moved) = (y.narrow(0, 0, batch)?, y.narrow(0, batch, 2 * batch)?);
        let origin = Tensor::cat(&[&origin, &origin], 0)?;
        let (map, norm) = &self.description;
        let phi = norm.forward(&map.forward(&vectors)?)?;
        let (map, norm) = &self.predictor;
        let predicted = norm.forward(&map.forward(&Tensor::cat(&[&origin, &phi], 1)?)?)?;

        let out = nn::contrast(&moved, &predicted, self.config.temperature)?;
        let absolute = nn::mean_cosine(&moved, &predicted)?;
        let invariance = nn::mean_cosine(&moved, &origin)?;
        let relative = (&absolute - &invariance)?;
        let metrics = vec![
            ("absolute", absolute),
            ("invariance", invariance),
            ("relative", relative),
            ("matched", out.accuracy),
        ];
        AddonOutput::new(out.loss, self.config.lambda, metrics)
    }

    /// The scaled parameter vectors of both views, `(2B, 17)` or `(2B, 18)`.
    fn vectors(&self, parameters: [&[AugmentationParameters]; 2], like: &Tensor) -> Result<Tensor> {
        let mut numbers = Vec::new();
        for parameters in parameters.iter().flat_map(|view| view.iter()) {
            let vector = parameters.vector(self.config.solarize)?;
            match &self.config.statistics {
                Some(statistics) => numbers.extend(statistics.scale(&vector)),
                None => numbers.extend(vector),
            }
        }
        let width = parameters::width(self.config.solarize);
        let shape = (numbers.len() / width, width);
        Ok(nn::constant(numbers, shape, self.reader.dtype(), like.device())?)
    }
}
