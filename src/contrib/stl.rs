//! STL (arXiv 2501.08712): read a transformation from a pair of views and apply it to another
//! image.

use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    AddonInput, AddonOutput,
    addon::Reader,
    check,
    nn::{self, Mlp, MlpConfig, Norm, Output},
};
use crate::{Error, Result};

/// The settings of [`Stl`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StlConfig {
    /// Width of the hidden layer of the feature projectors `g` and `g_e`.
    pub hidden: usize,
    /// Width of the output of the feature projectors.
    pub out: usize,
    /// Width of a transformation `t`, and of the hidden layers of `φ` and `g_t`.
    pub transformation_width: usize,
    /// Weight of the contrast of projected views.
    pub invariance: f64,
    /// Weight of the contrast of transformed features with the features of the other view.
    pub equivariance: f64,
    /// Weight of the contrast of the transformations of an image pair.
    pub transformation: f64,
    /// Temperature `τ` of all three contrasts; finite and above 0.
    pub temperature: f64,
    /// Weight `λ` of the loss; finite and at least 0.
    pub lambda: f64,
}

impl Default for StlConfig {
    /// The authors' values: projectors 512-128, transformations 128-128, `g_t` 128-128, weights 1,
    /// 1 and 0.1, `τ = 0.2`.
    fn default() -> Self {
        Self {
            hidden: 512,
            out: 128,
            transformation_width: 128,
            invariance: 1.0,
            equivariance: 1.0,
            transformation: 0.1,
            temperature: 0.2,
            lambda: 1.0,
        }
    }
}

impl StlConfig {
    fn check(&self) -> Result<()> {
        check::widths(&[
            ("StlConfig::hidden", self.hidden),
            ("StlConfig::out", self.out),
            ("StlConfig::transformation_width", self.transformation_width),
        ])?;
        for (field, weight) in [
            ("StlConfig::invariance", self.invariance),
            ("StlConfig::equivariance", self.equivariance),
            ("StlConfig::transformation", self.transformation),
            ("StlConfig::lambda", self.lambda),
        ] {
            check::not_negative(field, weight)?;
        }
        if self.invariance + self.equivariance + self.transformation == 0.0 {
            return Err(Error::config(
                "StlConfig",
                "a weight above 0 for at least one term (invariance, equivariance, transformation)",
                "all 0",
            ));
        }
        check::positive("StlConfig::temperature", self.temperature)
    }
}

/// The heads and the loss of STL.
///
/// The images 2i and 2i+1 of a batch share their augmentations: one for view 1 of both, another for
/// view 2 of both. They are partners.
///
/// ```text
/// t₁₂ = φ([h₁; h₂]),   W(t) = reshape(H t),   ĥ₁ = W(t₂₁ of the partner) h₂,   ĥ₂ = W(t₁₂ of the partner) h₁
/// L = λ ( w_inv NT-Xent(g(h₁), g(h₂)) + w_equi NT-Xent(g_e(h), g_e(ĥ)) + w_trans NT-Xent(g_t(t of 2i), g_t(t of 2i+1)) )
/// ```
///
/// The second term runs over both views, the third over both `t₁₂` and `t₂₁`. In each term all
/// other embeddings are negatives. Each MLP has two linear maps without bias, with batch
/// normalization and ReLU between them. `H` has `transformation_width · D²` weights: 18.9 million
/// for D = 384.
///
/// A term of weight 0 has no head and is not computed. If the base loss contrasts the views
/// already, as MoCo does, set the invariance to 0. The metrics are the terms before their weights.
///
/// Source: arXiv 2501.08712.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::{AddonInput, Stl, StlConfig};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let addon = Stl::new(StlConfig::default(), AddonInput::Embedding, 16, vb)?;
/// let h = |b| Tensor::randn(0f32, 1., (b, 16), &Device::Cpu);
/// assert!(addon.forward([&h(4)?, &h(4)?]).is_ok());
/// let odd = addon.forward([&h(5)?, &h(5)?]).unwrap_err();
/// assert!(odd.to_string().contains("even"));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stl {
    config: StlConfig,
    reader: Reader,
    /// `g`; `None` without the invariance term.
    invariant: Option<Mlp>,
    transformation: Option<Transformation>,
}

/// `φ` and the heads that read its transformations.
#[derive(Clone, Debug)]
struct Transformation {
    /// `φ`.
    encoder: Mlp,
    /// `H` and `g_e`; `None` without the equivariance term.
    equivariant: Option<(Linear, Mlp)>,
    /// `g_t`; `None` without the transformation term.
    projector: Option<Mlp>,
}

impl Stl {
    const OP: &'static str = "Stl";

    /// An add-on for features of `channels` channels.
    ///
    /// Variables: `norm.*` (tokens only), `transformation.*`, `hypernetwork.weight`, and the
    /// projectors `invariant.*`, `equivariant.*`, `projected.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` fails to return a variable.
    pub fn new(
        config: StlConfig,
        input: AddonInput,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.check()?;
        let StlConfig { hidden, out, transformation_width: wide, .. } = config;
        let entries = channels.checked_mul(channels).filter(|n| {
            // The weights of the hypernetwork must fit a tensor.
            n.checked_mul(wide).is_some_and(|all| all < isize::MAX as usize / 8)
        });
        let Some(entries) = entries else {
            let expected = "a width whose square fits the hypernetwork";
            return Err(Error::config("channels", expected, channels));
        };
        let reader = Reader::new(input, channels, vb.clone())?;
        let mlp = |widths: &[usize], name: &str| {
            let config = MlpConfig { widths, norm: Norm::Batch, output: Output::Linear };
            Mlp::new(&config, vb.pp(name))
        };
        let transformation = || -> Result<Transformation> {
            let equivariant = || -> Result<(Linear, Mlp)> {
                let hypernetwork = nn::linear(wide, entries, false, vb.pp("hypernetwork"))?;
                Ok((hypernetwork, mlp(&[channels, hidden, out], "equivariant")?))
            };
            Ok(Transformation {
                encoder: mlp(&[2 * channels, wide, wide], "transformation")?,
                equivariant: (config.equivariance > 0.0).then(equivariant).transpose()?,
                projector: (config.transformation > 0.0)
                    .then(|| mlp(&[wide, wide, wide], "projected"))
                    .transpose()?,
            })
        };
        Ok(Self {
            config,
            reader,
            invariant: (config.invariance > 0.0)
                .then(|| mlp(&[channels, hidden, out], "invariant"))
                .transpose()?,
            transformation: (config.equivariance + config.transformation > 0.0)
                .then(transformation)
                .transpose()?,
        })
    }

    /// The loss of the features of two views, `(B, D)` or token maps as [`AddonInput`] says.
    ///
    /// # Errors
    /// If the batch is odd, the batches differ, or shapes or types do not fit the input.
    pub fn forward(&self, views: [&Tensor; 2]) -> Result<AddonOutput> {
        let [h1, h2] = self.reader.pair(Self::OP, views)?;
        let batch = h1.dim(0)?;
        if !batch.is_multiple_of(2) {
            let expected = "an even batch, in which images 2i and 2i+1 share their augmentations (drop one image)";
            return Err(Error::input(Self::OP, expected, batch));
        }
        let config = &self.config;
        let contrast =
            |a: &Tensor, b: &Tensor| Ok::<_, Error>(nn::contrast(a, b, config.temperature)?.loss);
        let mut terms = Vec::new();
        if let Some(project) = &self.invariant {
            let loss = contrast(&project.forward(&h1)?, &project.forward(&h2)?)?;
            terms.push(("invariance", config.invariance, loss));
        }
        if let Some(Transformation { encoder, equivariant, projector }) = &self.transformation {
            let t12 = encoder.forward(&Tensor::cat(&[&h1, &h2], 1)?)?;
            let t21 = encoder.forward(&Tensor::cat(&[&h2, &h1], 1)?)?;
            if let Some((hypernetwork, project)) = equivariant {
                let moved1 = transform(hypernetwork, &partner(&t21)?, &h2)?;
                let moved2 = transform(hypernetwork, &partner(&t12)?, &h1)?;
                let both = |a: &Tensor, b: &Tensor| -> candle_core::Result<Tensor> {
                    Tensor::cat(&[project.forward(a)?, project.forward(b)?], 0)
                };
                let loss = contrast(&both(&h1, &h2)?, &both(&moved1, &moved2)?)?;
                terms.push(("equivariance", config.equivariance, loss));
            }
            if let Some(project) = projector {
                let half = |member| -> candle_core::Result<Tensor> {
                    let (t12, t21) = (every_other(&t12, member)?, every_other(&t21, member)?);
                    project.forward(&Tensor::cat(&[t12, t21], 0)?)
                };
                let loss = contrast(&half(0)?, &half(1)?)?;
                terms.push(("transformation", config.transformation, loss));
            }
        }
        AddonOutput::of_terms(&terms, config.lambda)
    }
}

/// `W(t) h` for each row.
fn transform(hypernetwork: &Linear, t: &Tensor, h: &Tensor) -> candle_core::Result<Tensor> {
    let d = h.dim(1)?;
    let maps = hypernetwork.forward(t)?.reshape(((), d, d))?;
    maps.matmul(&h.unsqueeze(2)?)?.squeeze(2)
}

/// The rows `member`, `member + 2`, ….
fn every_other(x: &Tensor, member: usize) -> candle_core::Result<Tensor> {
    let (batch, width) = x.dims2()?;
    let pairs = x.reshape((batch / 2, 2, width))?;
    pairs.narrow(1, member, 1)?.squeeze(1)?.contiguous()
}

/// The rows with 2i and 2i+1 exchanged.
fn partner(x: &Tensor) -> candle_core::Result<Tensor> {
    let (batch, width) = x.dims2()?;
    let pairs = x.reshape((batch / 2, 2, width))?;
    let (even, odd) = (pairs.narrow(1, 0, 1)?, pairs.narrow(1, 1, 1)?);
    Tensor::cat(&[odd, even], 1)?.reshape((batch, width))
}
