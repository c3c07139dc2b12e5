//! AugSelf (arXiv 2111.09613): predict how the augmentations of two views differ.

use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;

use super::{
    AddonInput, AddonOutput,
    addon::Reader,
    check,
    nn::{self, Mlp, MlpConfig, Norm, Output},
    parameters::{self, AugmentationParameters},
};
use crate::{Error, Result};

/// The settings of [`AugSelf`]. A task of weight 0 has no head and is not computed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct AugSelfConfig {
    /// Width of both hidden layers of each head.
    pub hidden: usize,
    /// Weight of the crop task.
    pub crop: f64,
    /// Weight of the color jitter task.
    pub color: f64,
    /// Weight of the flip task.
    pub flip: f64,
    /// Weight of the blur task.
    pub blur: f64,
    /// Weight of the solarization task.
    pub solarize: f64,
    /// Weight of the rotation task.
    pub rotation: f64,
    /// Widths of the ranges of brightness, contrast, saturation and hue; 0 for a constant.
    pub color_widths: [f64; 4],
    /// Weight `λ` of the loss; finite and at least 0.
    pub lambda: f64,
}

impl Default for AugSelfConfig {
    /// The authors' values for ImageNet-100: weights of 0.5 for crop and color, 512 hidden units,
    /// jitter of 0.4, 0.4, 0.4 and 0.1. For STL-10 their weights are 1.
    fn default() -> Self {
        Self {
            hidden: 512,
            crop: 0.5,
            color: 0.5,
            flip: 0.0,
            blur: 0.0,
            solarize: 0.0,
            rotation: 0.0,
            color_widths: [0.8, 0.8, 0.8, 0.2],
            lambda: 1.0,
        }
    }
}

impl AugSelfConfig {
    fn weight(&self, task: Task) -> f64 {
        match task {
            Task::Crop => self.crop,
            Task::Color => self.color,
            Task::Flip => self.flip,
            Task::Blur => self.blur,
            Task::Solarize => self.solarize,
            Task::Rotation => self.rotation,
        }
    }

    fn check(&self) -> Result<()> {
        check::widths(&[("AugSelfConfig::hidden", self.hidden)])?;
        check::not_negative("AugSelfConfig::lambda", self.lambda)?;
        for task in Task::ALL {
            check::not_negative(task.field(), self.weight(task))?;
        }
        for width in self.color_widths {
            check::not_negative("AugSelfConfig::color_widths", width)?;
        }
        if Task::ALL.iter().all(|&task| self.weight(task) == 0.0) {
            return Err(Error::config(
                "AugSelfConfig",
                "at least one weight above 0 (crop, color, flip, blur, solarize, rotation)",
                "all 0",
            ));
        }
        Ok(())
    }
}

type P = AugmentationParameters;

/// A prediction task on a pair of views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Crop,
    Color,
    Flip,
    Blur,
    Solarize,
    Rotation,
}

/// The target of a task.
enum Target {
    /// Regression of `tanh` of the outputs, one row per pair.
    Numbers(Vec<f64>),
    /// Classification, one class per pair.
    Classes(Vec<u32>),
}

impl Task {
    const ALL: [Self; 6] =
        [Self::Crop, Self::Color, Self::Flip, Self::Blur, Self::Solarize, Self::Rotation];

    fn name(self) -> &'static str {
        match self {
            Self::Crop => "crop",
            Self::Color => "color",
            Self::Flip => "flip",
            Self::Blur => "blur",
            Self::Solarize => "solarize",
            Self::Rotation => "rotation",
        }
    }

    fn field(self) -> &'static str {
        match self {
            Self::Crop => "AugSelfConfig::crop",
            Self::Color => "AugSelfConfig::color",
            Self::Flip => "AugSelfConfig::flip",
            Self::Blur => "AugSelfConfig::blur",
            Self::Solarize => "AugSelfConfig::solarize",
            Self::Rotation => "AugSelfConfig::rotation",
        }
    }

    fn outputs(self) -> usize {
        match self {
            Self::Crop | Self::Color | Self::Rotation => 4,
            Self::Flip | Self::Blur | Self::Solarize => 1,
        }
    }

    /// The target of each pair of views.
    fn target(self, pairs: &[(&P, &P)], config: &AugSelfConfig) -> Result<Target> {
        let numbers = |difference: &dyn Fn(&P, &P) -> Result<Vec<f64>>| {
            let rows = pairs.iter().map(|(a, b)| difference(a, b));
            let rows: Vec<_> = rows.collect::<Result<_>>()?;
            Ok(Target::Numbers(rows.concat()))
        };
        let classes = |class: &dyn Fn(&P, &P) -> Result<u32>| {
            let classes = pairs.iter().map(|(a, b)| class(a, b));
            Ok(Target::Classes(classes.collect::<Result<_>>()?))
        };
        match self {
            Self::Crop => numbers(&P::crop_difference),
            Self::Color => numbers(&|a, b| a.color_difference(b, &config.color_widths)),
            Self::Blur => numbers(&P::blur_difference),
            Self::Solarize => numbers(&P::solarize_difference),
            Self::Flip => classes(&P::flips_agree),
            Self::Rotation => classes(&P::rotation_difference),
        }
    }
}

impl Target {
    fn loss(self, outputs: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Numbers(numbers) => {
                let target =
                    nn::constant(numbers, outputs.dims2()?, outputs.dtype(), outputs.device())?;
                (outputs.tanh()? - target)?.sqr()?.mean_all()
            }
            Self::Classes(classes) => {
                let logits = match outputs.dim(1)? {
                    // The cross-entropy of (0, logit) is the binary cross-entropy; it does not
                    // overflow.
                    1 => Tensor::cat(&[&outputs.zeros_like()?, outputs], 1)?,
                    _ => outputs.clone(),
                };
                nn::cross_entropy(&logits, &classes)
            }
        }
    }
}

/// The heads and the loss of AugSelf.
///
/// ```text
/// L = λ Σ_a w_a · mean ℓ_a( MLP_a([h₁; h₂]), d_a(1, 2) ),   over the orders (1, 2) and (2, 1)
/// ```
///
/// | task | target `d(1, 2)` | ℓ |
/// |---|---|---|
/// | crop | differences of center y, center x, height and width, in units of the image side | MSE of tanh |
/// | color | differences of brightness, contrast, saturation and hue, in units of their ranges | MSE of tanh |
/// | blur | difference of the standard deviations σ | MSE of tanh |
/// | solarize | difference of the thresholds | MSE of tanh |
/// | flip | 1 if the flips of both views agree, else 0 | binary cross-entropy |
/// | rotation | `(k₁ − k₂) mod 4` | cross-entropy |
///
/// If view 1 is flipped, the crop task mirrors the centers of both views. Each task has its own
/// MLP, 2D → 512 → 512 → outputs, with batch normalization and ReLU. Both orders form one batch.
/// Both features get a gradient, unless one comes from a momentum encoder. The metrics are the
/// losses of the tasks before their weights.
///
/// Source: arXiv 2111.09613.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::{AddonInput, AugSelf, AugSelfConfig, AugmentationParameters};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let addon = AugSelf::new(AugSelfConfig::default(), AddonInput::Embedding, 16, vb)?;
/// let h = || Tensor::randn(0f32, 1., (4, 16), &Device::Cpu);
/// let parameters = [AugmentationParameters::untouched(); 4];
/// let out = addon.forward([&h()?, &h()?], [&parameters, &parameters])?;
/// assert_eq!(out.metrics.len(), 2, "crop and color");
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AugSelf {
    config: AugSelfConfig,
    reader: Reader,
    heads: Vec<(Task, Mlp)>,
}

impl AugSelf {
    const OP: &'static str = "AugSelf";

    /// An add-on for features of `channels` channels.
    ///
    /// Variables: `norm.*` (tokens only), and a head for each task with a weight: `crop.*`,
    /// `color.*`, ….
    ///
    /// # Errors
    /// If a setting is out of range, no task has a weight, or `vb` fails to return a variable.
    pub fn new(
        config: AugSelfConfig,
        input: AddonInput,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.check()?;
        let reader = Reader::new(input, channels, vb.clone())?;
        let mut heads = Vec::new();
        for task in Task::ALL {
            if config.weight(task) > 0.0 {
                let head = MlpConfig {
                    widths: &[2 * channels, config.hidden, config.hidden, task.outputs()],
                    norm: Norm::Batch,
                    output: Output::Affine,
                };
                heads.push((task, Mlp::new(&head, vb.pp(task.name()))?));
            }
        }
        Ok(Self { config, reader, heads })
    }

    /// The loss of the features of two views, `(B, D)` or token maps as [`AddonInput`] says.
    ///
    /// `parameters` has the augmentation parameters of each sample and view.
    ///
    /// # Errors
    /// If the batches differ or have fewer than two samples. If shapes or types do not fit the
    /// input, or a parameter of a task is `None`.
    pub fn forward(
        &self,
        views: [&Tensor; 2],
        parameters: [&[AugmentationParameters]; 2],
    ) -> Result<AddonOutput> {
        let [h1, h2] = self.reader.pair(Self::OP, views)?;
        let batch = h1.dim(0)?;
        check::batch(Self::OP, batch)?;
        parameters::check_counts(Self::OP, parameters, batch)?;
        let h12 = Tensor::cat(&[&h1, &h2], 1)?;
        let h21 = Tensor::cat(&[&h2, &h1], 1)?;
        let features = Tensor::cat(&[h12, h21], 0)?;
        let [first, second] = parameters;
        let there = first.iter().zip(second);
        let back = second.iter().zip(first);
        let pairs: Vec<(&P, &P)> = there.chain(back).collect();

        let mut terms = Vec::with_capacity(self.heads.len());
        for (task, head) in &self.heads {
            let target = task.target(&pairs, &self.config)?;
            let loss = target.loss(&head.forward(&features)?)?;
            terms.push((task.name(), self.config.weight(*task), loss));
        }
        AddonOutput::of_terms(&terms, self.config.lambda)
    }
}
