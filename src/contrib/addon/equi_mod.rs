//! EquiMod (arXiv 2211.01244): predict how an augmentation moves the embedding.

use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    AddonOutput, Reads,
    nn::{self, BatchNorm, Mlp},
    parameters::{self, AugmentationParameters, ParameterStatistics},
    reads::Reader,
};
use crate::{
    Error, Result,
    loss::{Negatives, NtXent, SameImage, nt_xent_ragged},
};

/// The settings of [`EquiMod`].
#[derive(Clone, Debug, PartialEq)]
pub struct EquiModConfig {
    /// Width of both hidden layers of the projector g.
    pub hidden: usize,
    /// Width of its output, of φ and of the prediction.
    pub out: usize,
    /// Temperature τ' of the contrast; finite and above 0.
    pub temperature: f64,
    /// Weight λ; finite and at least 0.
    pub lambda: f64,
    /// Whether the description of a view says that it was solarized: 18 numbers instead of the authors' 17.
    pub solarize: bool,
    /// What the description is scaled by. The authors z-score it: give [`ParameterStatistics::of`] many draws of the recipe
    /// at hand. `None` leaves it as it is, and its small numbers (hue, crops) count little beside the order of the jitter.
    pub statistics: Option<ParameterStatistics>,
}

impl Default for EquiModConfig {
    /// The authors' for ResNet-50: 2048-2048-128, τ' = 0.2, λ = 1, 17 parameters. (SER's runs with ViT-S have 384-384-128.)
    /// Their statistics follow from the recipe, so there are none here.
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

/// EquiMod's head and loss.
///
/// ```text
/// y = g(h(x)),   ŷ_t = u([y₀; φ(p_t)]),   L = λ · NT-Xent_{τ'}({y_t} ∪ {ŷ_t})
/// ```
///
/// over both views t: each of the 4B embeddings is to find its partner among the 4B − 1 others. `x₀` is a third view without
/// augmentation and `p_t` the [description](AugmentationParameters::vector) of view t. `g` has three linear maps, batch
/// normalization and ReLU between them and batch normalization without scale and shift at its end; `φ` is a linear map and a
/// batch normalization, `u` a linear map and one without scale and shift. No gradient is stopped.
///
/// The prediction may learn to ignore `p`, and the features become invariant. Its figures tell: `absolute` is the mean
/// `cos(y_t, ŷ_t)`, `invariance` the mean `cos(y_t, y₀)`, and `relative` is the first less the second, 0 where `p` is of no use;
/// `matched` is the share of embeddings that find their partner.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::addon::{AugmentationParameters, EquiMod, EquiModConfig, Reads};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = EquiModConfig { hidden: 32, ..Default::default() };
/// let add_on = EquiMod::new(config, Reads::Final, 16, vb)?;
/// let h = || Tensor::randn(0f32, 1., (4, 16), &Device::Cpu);
/// let drawn = [AugmentationParameters::untouched(); 4];
/// let out = add_on.forward(&h()?, [&h()?, &h()?], [&drawn, &drawn])?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EquiMod {
    config: EquiModConfig,
    reader: Reader,
    project: Mlp,
    describe: (Linear, BatchNorm),
    predict: (Linear, BatchNorm),
}

impl EquiMod {
    const OP: &'static str = "EquiMod";

    /// The add-on for features of `channels` channels at the layer that `reads` names. Variables: `norm.*` (tokens only),
    /// `project.*`, `describe.*`, `predict.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` cannot hand out the variables.
    pub fn new(
        config: EquiModConfig,
        reads: Reads,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let EquiModConfig { hidden, out, .. } = config;
        nn::check_widths(&[
            ("EquiModConfig::hidden", hidden),
            ("EquiModConfig::out", out),
        ])?;
        nn::check_weight("EquiModConfig::lambda", config.lambda)?;
        super::check_temperature("EquiModConfig::temperature", config.temperature)?;
        if let Some(statistics) = &config.statistics {
            statistics.check(config.solarize)?;
        }
        let widths = [channels, hidden, hidden, out];
        let numbers = parameters::width(config.solarize);
        let (describe, predict) = (vb.pp("describe"), vb.pp("predict"));
        Ok(Self {
            reader: Reader::new(reads, channels, vb.clone())?,
            project: Mlp::batch_norm(&widths, false, vb.pp("project"))?.with_last_norm(),
            describe: (
                nn::linear(numbers, out, false, describe.clone())?,
                BatchNorm::new(out, describe.pp("norm"))?,
            ),
            predict: (
                nn::linear(2 * out, out, false, predict)?,
                BatchNorm::without_affine(),
            ),
            config,
        })
    }

    /// The loss of `views`, given the same pictures without augmentation, `plain`, and what was drawn for each view.
    ///
    /// Features are (B, D) or token maps, as [`Reads`] says; `parameters` are one a sample and view.
    ///
    /// # Errors
    /// If the batches differ or have fewer than two samples, shapes or types do not fit the layer that is read, or a
    /// parameter was not written down.
    pub fn forward(
        &self,
        plain: &Tensor,
        views: [&Tensor; 2],
        parameters: [&[AugmentationParameters]; 2],
    ) -> Result<AddonOutput> {
        let features = self.reader.all(Self::OP, [plain, views[0], views[1]])?;
        let batch = features.first().map_or(Ok(0), |x| x.dim(0))?;
        nn::check_batch(Self::OP, batch)?;
        parameters::check_counts(Self::OP, parameters, batch)?;
        let drawn = self.describe(parameters, plain)?;

        let y = self.project.forward(&Tensor::cat(&features, 0)?)?;
        let (origin, moved) = (y.narrow(0, 0, batch)?, y.narrow(0, batch, 2 * batch)?);
        let origin = Tensor::cat(&[&origin, &origin], 0)?;
        let (map, norm) = &self.describe;
        let phi = norm.forward(&map.forward(&drawn)?)?;
        let (map, norm) = &self.predict;
        let predicted = norm.forward(&map.forward(&Tensor::cat(&[&origin, &phi], 1)?)?)?;

        let ids: Vec<u32> = (0..2 * batch as u32).collect();
        let contrast = NtXent {
            form: Negatives::BothViews,
            same_image: SameImage::Keep,
            symmetric: true,
            temperature: self.config.temperature,
            ..NtXent::default()
        };
        let out = nt_xent_ragged(&moved, &predicted, &ids, None, &contrast)?;
        let absolute = nn::mean_cosine(&moved, &predicted)?;
        let invariance = nn::mean_cosine(&moved, &origin)?;
        let relative = (&absolute - &invariance)?;
        let figures = vec![
            ("absolute", absolute),
            ("invariance", invariance),
            ("relative", relative),
            ("matched", out.accuracy),
        ];
        AddonOutput::weighted(out.loss, self.config.lambda, figures)
    }

    /// The scaled descriptions of both views, (2B, 17 or 18).
    fn describe(
        &self,
        parameters: [&[AugmentationParameters]; 2],
        like: &Tensor,
    ) -> Result<Tensor> {
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
        let dtype = self.reader.dtype();
        nn::constant(numbers, shape, dtype, like.device()).map_err(Error::from)
    }
}
