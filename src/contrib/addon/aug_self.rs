//! AugSelf (arXiv 2111.09613): tell from two views how their augmentations differ.

use candle_core::{Device, Module, Tensor};
use candle_nn::VarBuilder;

use super::{
    AddonOutput, Reads,
    nn::{self, Mlp},
    parameters::{self, AugmentationParameters},
    reads::Reader,
};
use crate::{Error, Result};

/// The settings of [`AugSelf`]. A weight of 0 leaves its task out, and its head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AugSelfConfig {
    /// Width of both hidden layers of each head.
    pub hidden: usize,
    /// Weight of where the windows lie and how large they are.
    pub crop: f64,
    /// Weight of the four strengths of the color jitter.
    pub color: f64,
    /// Weight of whether both views are mirrored, or neither.
    pub flip: f64,
    /// Weight of the blurs.
    pub blur: f64,
    /// Weight of the thresholds of solarization.
    pub solarize: f64,
    /// Weight of the quarter turns.
    pub rotation: f64,
    /// Widths of the ranges that brightness, contrast, saturation and hue are drawn from; 0 for what is not drawn.
    pub color_widths: [f64; 4],
    /// Weight λ of the whole; finite and at least 0.
    pub lambda: f64,
}

impl Default for AugSelfConfig {
    /// The authors' for ImageNet-100: crop and color weigh 0.5, the rest is off; heads are 512 wide; jitter of 0.4, 0.4, 0.4
    /// and 0.1. For STL-10 they weigh crop and color with 1.
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
        nn::check_widths(&[("AugSelfConfig::hidden", self.hidden)])?;
        nn::check_weight("AugSelfConfig::lambda", self.lambda)?;
        for task in Task::ALL {
            nn::check_weight(task.field(), self.weight(task))?;
        }
        for width in self.color_widths {
            nn::check_weight("AugSelfConfig::color_widths", width)?;
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

/// What is asked of a pair of views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Crop,
    Color,
    Flip,
    Blur,
    Solarize,
    Rotation,
}

/// What a task's head shall say.
enum Target {
    /// `tanh` of its outputs, one row a pair.
    Numbers(Vec<f64>),
    /// Its largest output.
    Classes(Vec<u32>),
}

impl Task {
    const ALL: [Self; 6] = [
        Self::Crop,
        Self::Color,
        Self::Flip,
        Self::Blur,
        Self::Solarize,
        Self::Rotation,
    ];

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

    /// Of pairs of a view and another.
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
                    // One output is the logit against 0: cross-entropy over both is the binary one, and never overflows.
                    1 => Tensor::cat(&[&outputs.zeros_like()?, outputs], 1)?,
                    _ => outputs.clone(),
                };
                nn::cross_entropy(&logits, &classes)
            }
        }
    }
}

/// AugSelf's heads and loss.
///
/// ```text
/// L = λ Σ_a w_a · mean ℓ_a( MLP_a([h₁; h₂]), d_a(1, 2) ),   over the orders (1, 2) and (2, 1)
/// ```
///
/// | task | `d(1, 2)` | ℓ |
/// |---|---|---|
/// | crop | differences of the centers' y and x, of heights, of widths, in sides of the picture; both centers mirrored if view 1 is | MSE of tanh |
/// | color | differences of brightness, contrast, saturation, hue, each over the width of its range | MSE of tanh |
/// | blur, solarize | difference of the deviations σ, of the thresholds | MSE of tanh |
/// | flip | whether both views are mirrored, or neither | binary cross-entropy |
/// | rotation | `(k₁ − k₂) mod 4` | cross-entropy |
///
/// Each task has an MLP of its own, 2D → 512 → 512 → outputs, with batch normalization and ReLU; both orders are one batch.
/// Both features get the gradient; if one comes from a momentum encoder, only the other does. The figures are the tasks'
/// losses before their weights.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::addon::{AugSelf, AugSelfConfig, AugmentationParameters, Reads};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let add_on = AugSelf::new(AugSelfConfig::default(), Reads::Final, 16, vb)?;
/// let h = || Tensor::randn(0f32, 1., (4, 16), &Device::Cpu);
/// let drawn = [AugmentationParameters::untouched(); 4];
/// let out = add_on.forward([&h()?, &h()?], [&drawn, &drawn])?;
/// assert_eq!(out.figures.len(), 2, "crop and color");
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

    /// The add-on for features of `channels` channels at the layer that `reads` names. Variables: `norm.*` (tokens only), and
    /// those of a head for each task with a weight, `crop.*`, `color.*`, ….
    ///
    /// # Errors
    /// If a setting is out of range, no task has a weight, or `vb` cannot hand out the variables.
    pub fn new(
        config: AugSelfConfig,
        reads: Reads,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.check()?;
        let reader = Reader::new(reads, channels, vb.clone())?;
        let mut heads = Vec::new();
        for task in Task::ALL {
            if config.weight(task) > 0.0 {
                let widths = [2 * channels, config.hidden, config.hidden, task.outputs()];
                heads.push((task, Mlp::batch_norm(&widths, true, vb.pp(task.name()))?));
            }
        }
        Ok(Self {
            config,
            reader,
            heads,
        })
    }

    /// The loss of two views' features, (B, D) or token maps as [`Reads`] says, and of what was drawn for each.
    ///
    /// # Errors
    /// If the batches differ or have fewer than two samples, shapes or types do not fit the layer that is read, or a parameter
    /// that a task asks for was not written down.
    pub fn forward(
        &self,
        views: [&Tensor; 2],
        parameters: [&[AugmentationParameters]; 2],
    ) -> Result<AddonOutput> {
        let features = self.reader.all(Self::OP, views)?;
        let [h1, h2] = &features[..] else {
            return Err(Error::input(Self::OP, "two views", features.len()));
        };
        let batch = h1.dim(0)?;
        nn::check_batch(Self::OP, batch)?;
        parameters::check_counts(Self::OP, parameters, batch)?;
        let there = Tensor::cat(&[h1, h2], 1)?;
        let back = Tensor::cat(&[h2, h1], 1)?;
        let pairs = Tensor::cat(&[there, back], 0)?;
        let [first, second] = parameters;
        let orders: Vec<(&P, &P)> = first
            .iter()
            .zip(second)
            .chain(second.iter().zip(first))
            .collect();

        let mut total =
            Tensor::zeros((), pairs.dtype(), &Device::Cpu)?.to_device(pairs.device())?;
        let mut figures = Vec::with_capacity(self.heads.len());
        for (task, head) in &self.heads {
            let target = task.target(&orders, &self.config)?;
            let loss = target.loss(&head.forward(&pairs)?)?;
            total = (total + (&loss * self.config.weight(*task))?)?;
            figures.push((task.name(), loss.detach()));
        }
        AddonOutput::weighted(total, self.config.lambda, figures)
    }
}
