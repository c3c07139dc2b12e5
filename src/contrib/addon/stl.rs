//! STL (arXiv 2501.08712): learn the transformation from a pair of views, and apply it to another picture.

use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    AddonOutput, Reads,
    nn::{self, Mlp},
    reads::Reader,
};
use crate::{
    Error, Result,
    loss::{Negatives, NtXent, SameImage, nt_xent_ragged},
};

/// The settings of [`Stl`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StlConfig {
    /// Width of the hidden layer of the projectors of features.
    pub hidden: usize,
    /// Width of their output.
    pub out: usize,
    /// Width of a transformation, and of what lies between it and the features or the loss.
    pub transformation_width: usize,
    /// Weight of the term that makes projected views agree.
    pub invariance: f64,
    /// Weight of the term that compares transformed features with those of the other view.
    pub equivariance: f64,
    /// Weight of the term that makes the transformations of a pair of pictures agree.
    pub transformation: f64,
    /// Temperature τ of all three; finite and above 0.
    pub temperature: f64,
    /// Weight λ of the whole; finite and at least 0.
    pub lambda: f64,
}

impl Default for StlConfig {
    /// The authors': projectors 512-128, transformations 128-128 with a projector 128-128, weights 1, 1 and 0.1, τ = 0.2.
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

/// STL's heads and loss.
///
/// The pictures 2i and 2i+1 of a batch are transformed alike: view 1 of both by one augmentation, view 2 of both by another.
///
/// ```text
/// t₁₂ = φ([h₁; h₂]),   W(t) = reshape(H t),   ĥ₁ = W(t₂₁ of the partner) h₂,   ĥ₂ = W(t₁₂ of the partner) h₁
/// L = λ ( w_inv NT-Xent(g(h₁), g(h₂)) + w_equi NT-Xent(g_e(h), g_e(ĥ)) + w_trans NT-Xent(g_t(t of 2i), g_t(t of 2i+1)) )
/// ```
///
/// over both views, and for the last one both directions of `t`; every other embedding of a term is a negative. All MLPs have
/// batch normalization and ReLU between their two linear maps, and no biases. `H` has `transformation_width · D²` weights: 18.9
/// million at D = 384. A term of weight 0 has no head and is not computed; beside a base loss that contrasts the views already,
/// as MoCo's does, leave the invariance out. The figures are the terms before their weights.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use ser_reg::contrib::addon::{Reads, Stl, StlConfig};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let add_on = Stl::new(StlConfig::default(), Reads::Final, 16, vb)?;
/// let h = |b| Tensor::randn(0f32, 1., (b, 16), &Device::Cpu);
/// assert!(add_on.forward([&h(4)?, &h(4)?]).is_ok());
/// let odd = add_on.forward([&h(5)?, &h(5)?]).unwrap_err();
/// assert!(odd.to_string().contains("even"));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stl {
    config: StlConfig,
    reader: Reader,
    transformation: Option<Mlp>,
    /// Of terms without weight there is no head.
    project: Option<Mlp>,
    moved: Option<Moved>,
    project_transformation: Option<Mlp>,
}

/// What transforms features, and projects them then.
#[derive(Clone, Debug)]
struct Moved {
    hypernetwork: Linear,
    project: Mlp,
}

impl Stl {
    const OP: &'static str = "Stl";

    /// The add-on for features of `channels` channels at the layer that `reads` names. Variables: `norm.*` (tokens only),
    /// `transformation.*`, `hypernetwork.weight`, and the projectors' `invariant.*`, `equivariant.*`, `projected.*`.
    ///
    /// # Errors
    /// If a setting is out of range, or `vb` cannot hand out the variables.
    pub fn new(config: StlConfig, reads: Reads, channels: usize, vb: VarBuilder) -> Result<Self> {
        let StlConfig {
            hidden,
            out,
            transformation_width: wide,
            ..
        } = config;
        nn::check_widths(&[
            ("StlConfig::hidden", hidden),
            ("StlConfig::out", out),
            ("StlConfig::transformation_width", wide),
        ])?;
        for (field, weight) in [
            ("StlConfig::invariance", config.invariance),
            ("StlConfig::equivariance", config.equivariance),
            ("StlConfig::transformation", config.transformation),
            ("StlConfig::lambda", config.lambda),
        ] {
            nn::check_weight(field, weight)?;
        }
        if config.invariance + config.equivariance + config.transformation == 0.0 {
            return Err(Error::config(
                "StlConfig",
                "a weight above 0 for one of the terms (invariance, equivariance, transformation)",
                "all 0",
            ));
        }
        super::check_temperature("StlConfig::temperature", config.temperature)?;
        let entries = channels.checked_mul(channels).filter(|n| {
            // As many as a tensor can hold, with the width of a transformation.
            n.checked_mul(wide)
                .is_some_and(|all| all < isize::MAX as usize / 8)
        });
        let Some(entries) = entries else {
            return Err(Error::config(
                "channels",
                "a width whose square the hypernetwork can hold",
                channels,
            ));
        };
        let reader = Reader::new(reads, channels, vb.clone())?;
        let mlp = |widths: &[usize], name: &str| Mlp::batch_norm(widths, false, vb.pp(name));
        Ok(Self {
            config,
            reader,
            transformation: (config.equivariance + config.transformation > 0.0)
                .then(|| mlp(&[2 * channels, wide, wide], "transformation"))
                .transpose()?,
            project: (config.invariance > 0.0)
                .then(|| mlp(&[channels, hidden, out], "invariant"))
                .transpose()?,
            moved: (config.equivariance > 0.0)
                .then(|| -> Result<Moved> {
                    Ok(Moved {
                        hypernetwork: nn::linear(wide, entries, false, vb.pp("hypernetwork"))?,
                        project: mlp(&[channels, hidden, out], "equivariant")?,
                    })
                })
                .transpose()?,
            project_transformation: (config.transformation > 0.0)
                .then(|| mlp(&[wide, wide, wide], "projected"))
                .transpose()?,
        })
    }

    /// The loss of two views' features, (B, D) or token maps as [`Reads`] says; rows 2i and 2i+1 were transformed alike.
    ///
    /// # Errors
    /// If the batch is odd, batches differ, or shapes or types do not fit the layer that is read.
    pub fn forward(&self, views: [&Tensor; 2]) -> Result<AddonOutput> {
        let features = self.reader.all(Self::OP, views)?;
        let [h1, h2] = &features[..] else {
            return Err(Error::input(Self::OP, "two views", features.len()));
        };
        let batch = h1.dim(0)?;
        if !batch.is_multiple_of(2) {
            return Err(Error::input(
                Self::OP,
                "an even batch, in which pictures 2i and 2i+1 share their transformations (drop one, or pair it)",
                batch,
            ));
        }
        let config = &self.config;
        let mut terms = Vec::new();
        if let Some(project) = &self.project {
            let loss = self.contrast(&project.forward(h1)?, &project.forward(h2)?)?;
            terms.push(("invariance", config.invariance, loss));
        }
        if let Some(transformation) = &self.transformation {
            let transformation =
                |from: &Tensor, to: &Tensor| transformation.forward(&Tensor::cat(&[from, to], 1)?);
            let (there, back) = (transformation(h1, h2)?, transformation(h2, h1)?);
            if let Some(moved) = &self.moved {
                let moved1 = moved.transform(&partner(&back)?, h2)?;
                let moved2 = moved.transform(&partner(&there)?, h1)?;
                let project = |a, b| -> candle_core::Result<Tensor> {
                    let (a, b) = (moved.project.forward(a)?, moved.project.forward(b)?);
                    Tensor::cat(&[a, b], 0)
                };
                let loss = self.contrast(&project(h1, h2)?, &project(&moved1, &moved2)?)?;
                terms.push(("equivariance", config.equivariance, loss));
            }
            if let Some(project) = &self.project_transformation {
                let half = |member| -> candle_core::Result<Tensor> {
                    let (there, back) = (every_other(&there, member)?, every_other(&back, member)?);
                    project.forward(&Tensor::cat(&[there, back], 0)?)
                };
                let loss = self.contrast(&half(0)?, &half(1)?)?;
                terms.push(("transformation", config.transformation, loss));
            }
        }
        let mut total: Option<Tensor> = None;
        for (_, weight, loss) in &terms {
            let term = (loss * *weight)?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        let total = total.ok_or_else(|| Error::config("StlConfig", "a weight above 0", "all 0"))?;
        let figures = terms.iter().map(|(name, _, loss)| (*name, loss.detach()));
        AddonOutput::weighted(total, config.lambda, figures.collect())
    }

    /// Each row of `a` with the same row of `b`, among all other rows of both.
    fn contrast(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let ids: Vec<u32> = (0..a.dim(0)? as u32).collect();
        let config = NtXent {
            form: Negatives::BothViews,
            same_image: SameImage::Keep,
            symmetric: true,
            temperature: self.config.temperature,
            ..NtXent::default()
        };
        Ok(nt_xent_ragged(a, b, &ids, None, &config)?.loss)
    }
}

impl Moved {
    /// `W(t) h` for each row.
    fn transform(&self, t: &Tensor, h: &Tensor) -> candle_core::Result<Tensor> {
        let d = h.dim(1)?;
        let maps = self.hypernetwork.forward(t)?.reshape(((), d, d))?;
        maps.matmul(&h.unsqueeze(2)?)?.squeeze(2)
    }
}

/// Rows `member`, `member + 2`, ….
fn every_other(x: &Tensor, member: usize) -> candle_core::Result<Tensor> {
    let (batch, width) = x.dims2()?;
    let pairs = x.reshape((batch / 2, 2, width))?;
    pairs.narrow(1, member, 1)?.squeeze(1)?.contiguous()
}

/// Rows 2i and 2i+1 exchanged.
fn partner(x: &Tensor) -> candle_core::Result<Tensor> {
    let (batch, width) = x.dims2()?;
    let pairs = x.reshape((batch / 2, 2, width))?;
    let (even, odd) = (pairs.narrow(1, 0, 1)?, pairs.narrow(1, 1, 1)?);
    Tensor::cat(&[odd, even], 1)?.reshape((batch, width))
}
