//! E-SSL (arXiv 2111.00899): classify the rotation of a small crop.

use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    AddonInput, AddonOutput,
    addon::Reader,
    check,
    nn::{self, Mlp, MlpConfig, Norm, Output},
    orbit,
};
use crate::{Error, Result, TokenGrid, group::D4};

/// The settings of [`ESsl`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ESslConfig {
    /// Width of the two hidden layers.
    pub hidden: usize,
    /// Width of the layer before the four logits.
    pub out: usize,
    /// Weight `λ` of the loss; finite and at least 0.
    pub lambda: f64,
}

impl Default for ESslConfig {
    /// The authors' values: 2048-2048-128, `λ = 0.4`.
    fn default() -> Self {
        Self { hidden: 2048, out: 128, lambda: 0.4 }
    }
}

/// The head and the loss of E-SSL.
///
/// ```text
/// L = λ · CE( r(h(rot90^k x_small)), k ),   k = 0, 1, 2, 3
/// ```
///
/// `x_small` is one extra crop of each image in all four rotations; [`four_rotations`] makes them.
/// The crop has few pixels. For CIFAR-10 the authors take 16 of 32 pixels with 0.2 to 1 of the
/// area. For ImageNet they take 96 of 224 pixels with 0.05 to 0.14 of the area.
///
/// The head has two hidden layers with layer normalization and ReLU, a third linear map with layer
/// normalization, and a linear map to four classes. The metric `accuracy` is the fraction of
/// correctly classified crops; 1/4 is chance.
///
/// Source: arXiv 2111.00899.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::{AddonInput, ESsl, ESslConfig, four_rotations};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = ESslConfig { hidden: 32, ..Default::default() };
/// let addon = ESsl::new(config, AddonInput::Embedding, 48, vb)?;
/// let (crops, turns) = four_rotations(&Tensor::randn(0f32, 1., (2, 3, 4, 4), &Device::Cpu)?)?;
/// let encoder = |x: &Tensor| x.flatten_from(1);
/// let out = addon.forward(&encoder(&crops)?, &turns)?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ESsl {
    config: ESslConfig,
    reader: Reader,
    head: Mlp,
    classifier: Linear,
}

impl ESsl {
    const OP: &'static str = "ESsl";

    /// An add-on for features of `channels` channels. Variables: `norm.*` (tokens only), `head.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` fails to return a variable.
    pub fn new(
        config: ESslConfig,
        input: AddonInput,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let ESslConfig { hidden, out, .. } = config;
        check::widths(&[("ESslConfig::hidden", hidden), ("ESslConfig::out", out)])?;
        check::not_negative("ESslConfig::lambda", config.lambda)?;
        let reader = Reader::new(input, channels, vb.clone())?;
        let vb = vb.pp("head");
        let head = MlpConfig {
            widths: &[channels, hidden, hidden, out],
            norm: Norm::Layer,
            output: Output::Normalized(Norm::Layer),
        };
        Ok(Self {
            config,
            reader,
            head: Mlp::new(&head, vb.clone())?,
            classifier: nn::linear(out, 4, true, vb.pp("layer4"))?,
        })
    }

    /// The loss of the features of rotated crops, `(M, D)` or token maps as [`AddonInput`] says.
    ///
    /// `quarter_turns` has the class of each crop, 0 to 3.
    ///
    /// # Errors
    /// If there is not one class of 0 to 3 per crop, or shape or type do not fit the input.
    pub fn forward(&self, features: &Tensor, quarter_turns: &[u32]) -> Result<AddonOutput> {
        let h = self.reader.features(Self::OP, features)?;
        let batch = h.dim(0)?;
        if quarter_turns.len() != batch {
            let expected = format!("one number of quarter turns per crop, {batch}");
            return Err(Error::input(Self::OP, expected, quarter_turns.len()));
        }
        if let Some(k) = quarter_turns.iter().find(|k| **k > 3) {
            return Err(Error::input(Self::OP, "0 to 3 quarter turns", k));
        }
        let logits = self.classifier.forward(&self.head.forward(&h)?)?;
        let loss = nn::cross_entropy(&logits, quarter_turns)?;
        let metrics = vec![("accuracy", nn::accuracy(&logits, quarter_turns)?)];
        AddonOutput::new(loss, self.config.lambda, metrics)
    }
}

/// Square images `(B, C, S, S)` in four rotations, `(4B, C, S, S)`, and the quarter turns of each.
///
/// The first `B` are the images themselves, the next `B` are turned once counterclockwise. The
/// values are those of `torch.rot90(x, k, [2, 3])`, exactly.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[[[1f32, 2.], [3., 4.]]]], &Device::Cpu)?;
/// let (rotated, turns) = ser_reg::contrib::four_rotations(&x)?;
/// assert_eq!(rotated.get(1)?.flatten_all()?.to_vec1::<f32>()?, [2., 4., 1., 3.]);
/// assert_eq!(turns, [0, 1, 2, 3]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the images are not square, or there are none.
pub fn four_rotations(images: &Tensor) -> Result<(Tensor, Vec<u32>)> {
    let (batch, side) = match *images.dims() {
        [batch, _, rows, cols] if rows == cols && images.elem_count() > 0 => (batch, rows),
        _ => {
            let expected = "at least one square image, (B, C, S, S)";
            let got = format!("{:?}", images.dims());
            return Err(Error::input("four_rotations", expected, got));
        }
    };
    let grid = TokenGrid::square(side)?;
    let rotations = [D4::IDENTITY, D4::ROT90, D4::ROT180, D4::ROT270];
    let rotated = rotations.iter().map(|&g| orbit::turn(g, images, grid));
    let rotated: Vec<Tensor> = rotated.collect::<Result<_>>()?;
    let turns = (0..4).flat_map(|k| std::iter::repeat_n(k, batch));
    Ok((Tensor::cat(&rotated, 0)?, turns.collect()))
}
