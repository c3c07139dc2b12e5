//! E-SSL (arXiv 2111.00899): tell which way up a small crop is.

use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;

use super::{
    AddonOutput, Reads,
    nn::{self, Mlp},
    reads::Reader,
};
use crate::{Error, Result};

/// The settings of [`ESsl`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ESslConfig {
    /// Width of the two hidden layers.
    pub hidden: usize,
    /// Width of the layer before the four outputs.
    pub out: usize,
    /// Weight λ; finite and at least 0.
    pub lambda: f64,
}

impl Default for ESslConfig {
    /// The authors': 2048-2048-128, λ = 0.4.
    fn default() -> Self {
        Self {
            hidden: 2048,
            out: 128,
            lambda: 0.4,
        }
    }
}

/// E-SSL's head and loss.
///
/// ```text
/// L = λ · CE( r(h(rot90^k x_small)), k ),   k = 0, 1, 2, 3
/// ```
///
/// `x_small` is one extra crop of each picture, small in pixels (the authors': 16 of 32 with 0.2 to 1 of the area for CIFAR-10, 96 of
/// 224 with 0.05 to 0.14 for ImageNet), in all four turns: [`four_rotations`]. The head is twice linear, layer normalization
/// and ReLU, then linear and layer normalization, then linear to four classes. Its figure `accuracy` is the share of crops whose
/// turn is told; a quarter is chance.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::addon::{ESsl, ESslConfig, Reads, four_rotations};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let add_on = ESsl::new(ESslConfig { hidden: 32, ..Default::default() }, Reads::Final, 48, vb)?;
/// let (crops, turns) = four_rotations(&Tensor::randn(0f32, 1., (2, 3, 4, 4), &Device::Cpu)?)?;
/// let encoder = |x: &Tensor| x.flatten_from(1);
/// let out = add_on.forward(&encoder(&crops)?, &turns)?;
/// assert!(out.loss.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ESsl {
    config: ESslConfig,
    reader: Reader,
    head: Mlp,
}

impl ESsl {
    const OP: &'static str = "ESsl";

    /// The add-on for features of `channels` channels at the layer that `reads` names. Variables: `norm.*` (tokens only),
    /// `head.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` cannot hand out the variables.
    pub fn new(config: ESslConfig, reads: Reads, channels: usize, vb: VarBuilder) -> Result<Self> {
        let ESslConfig { hidden, out, .. } = config;
        nn::check_widths(&[("ESslConfig::hidden", hidden), ("ESslConfig::out", out)])?;
        nn::check_weight("ESslConfig::lambda", config.lambda)?;
        let reader = Reader::new(reads, channels, vb.clone())?;
        let widths = [channels, hidden, hidden, out, 4];
        let relu = [true, true, false, false];
        Ok(Self {
            config,
            reader,
            head: Mlp::layer_norm(&widths, &relu, vb.pp("head"))?,
        })
    }

    /// The loss of the features of turned crops, (M, D) or token maps as [`Reads`] says; `quarter_turns` says how often each was
    /// turned, 0 to 3.
    ///
    /// # Errors
    /// If the turns do not count as many as the features or exceed 3, or shape or type do not fit the layer that is read.
    pub fn forward(&self, features: &Tensor, quarter_turns: &[u32]) -> Result<AddonOutput> {
        let h = self.reader.features(Self::OP, features)?;
        let batch = h.dim(0)?;
        if quarter_turns.len() != batch {
            return Err(Error::input(
                Self::OP,
                format!("one number of quarter turns a crop, {batch}"),
                quarter_turns.len(),
            ));
        }
        if let Some(k) = quarter_turns.iter().find(|k| **k > 3) {
            return Err(Error::input(Self::OP, "0 to 3 quarter turns", k));
        }
        let logits = self.head.forward(&h)?;
        let loss = nn::cross_entropy(&logits, quarter_turns)?;
        let figures = vec![("accuracy", nn::accuracy(&logits, quarter_turns)?)];
        AddonOutput::weighted(loss, self.config.lambda, figures)
    }
}

/// Square images (B, C, S, S) in their four turns, (4B, C, S, S), and how often each was turned: first all as they are, then all
/// turned once counter-clockwise, as `torch.rot90(x, k, [2, 3])`. Exact.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[[[1f32, 2.], [3., 4.]]]], &Device::Cpu)?;
/// let (turned, turns) = ser_reg::contrib::addon::four_rotations(&x)?;
/// assert_eq!(turned.get(1)?.flatten_all()?.to_vec1::<f32>()?, [2., 4., 1., 3.]);
/// assert_eq!(turns, [0, 1, 2, 3]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If the images are not square, or there are none.
pub fn four_rotations(images: &Tensor) -> Result<(Tensor, Vec<u32>)> {
    let &[batch, _, rows, cols] = images.dims() else {
        return Err(Error::input(
            "four_rotations",
            "images (B, C, S, S)",
            format!("{:?}", images.dims()),
        ));
    };
    if rows != cols || images.elem_count() == 0 {
        return Err(Error::input(
            "four_rotations",
            "at least one square image (B, C, S, S), so that all turns form one batch",
            format!("{:?}", images.dims()),
        ));
    }
    // candle flips contiguous tensors only.
    let images = images.contiguous()?;
    let transposed = images.transpose(2, 3)?.contiguous()?;
    let (once, thrice) = (transposed.flip(&[2])?, transposed.flip(&[3])?);
    let half = images.flip(&[2])?.flip(&[3])?;
    let turned = Tensor::cat(&[&images, &once, &half, &thrice], 0)?;
    let turns = (0..4).flat_map(|k| std::iter::repeat_n(k, batch));
    Ok((turned, turns.collect()))
}
