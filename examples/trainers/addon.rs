//! The add-on of a run: its heads, the views that it needs, its loss.
//!
//! It reads the base method's crops. The views of the regularizer are left out: the parameters of their augmentation do not
//! describe their rotations and flips.

use std::cell::RefCell;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;
use ser_reg::{
    Layout,
    contrib::{
        AddonInput, AddonOutput, AugSelf, AugSelfConfig, Care, CareConfig, ESsl, ESslConfig,
        EquiMod, EquiModConfig, ParameterStatistics, Stl, StlConfig, four_rotations,
    },
    grad, tap,
};

use super::{
    augment::{Augment, Photometric, SmallCrop},
    loader::{Drawn, Extras, Third},
    random::{Purpose, generator},
    reach,
    settings::{Addon, AddonName, Preset, Settings},
    vit::{Vit, VitConfig},
    weights::{trained, under},
};

/// Views that the statistics of EquiMod's parameters are taken from, in pairs.
const SAMPLES: usize = 4096;

/// Without `--addon` it does nothing.
pub struct AddOn(Option<Inner>);

struct Inner {
    kind: Kind,
    layer: usize,
    /// The block that is tapped; `None` for the final embedding.
    block: Option<String>,
    /// Its reading of both crops in this step.
    read: RefCell<Option<[Tensor; 2]>>,
}

enum Kind {
    EquiMod(EquiMod),
    AugSelf(AugSelf),
    ESsl(ESsl),
    Stl(Stl),
    Care(Care),
}

impl AddOn {
    /// The add-on of the settings.
    pub fn new(
        settings: &Settings,
        vit: &VitConfig,
        augment: &Augment,
        vb: VarBuilder,
    ) -> Result<Self> {
        let Some(addon) = &settings.addon else {
            return Ok(Self(None));
        };
        let Addon { layer, lambda, hidden, out, .. } = *addon;
        let block = (layer < vit.depth).then(|| format!("block{layer}"));
        let reads = match &block {
            None => AddonInput::Embedding,
            Some(_) => {
                AddonInput::Tokens(Layout { prefix: vit.prefix(layer), ..Layout::default() })
            }
        };
        let dim = vit.dim;
        let kind = match addon.name {
            AddonName::EquiMod => {
                let config = EquiModConfig {
                    hidden,
                    out,
                    lambda,
                    solarize: true,
                    statistics: Some(statistics(settings.seed, augment, vit.channels)?),
                    ..EquiModConfig::default()
                };
                Kind::EquiMod(EquiMod::new(config, reads, dim, vb)?)
            }
            AddonName::AugSelf => {
                let config = AugSelfConfig {
                    hidden,
                    lambda,
                    color_widths: color_widths(&augment.views[0]),
                    ..AugSelfConfig::default()
                };
                Kind::AugSelf(AugSelf::new(config, reads, dim, vb)?)
            }
            AddonName::ESsl => {
                let config = ESslConfig { hidden, out, lambda };
                Kind::ESsl(ESsl::new(config, reads, dim, vb)?)
            }
            AddonName::Stl => {
                let config = StlConfig {
                    hidden,
                    out,
                    transformation_width: out,
                    lambda,
                    // MoCo's own contrast is that term, at the final layer.
                    invariance: 0.0,
                    ..StlConfig::default()
                };
                Kind::Stl(Stl::new(config, reads, dim, vb)?)
            }
            AddonName::Care => Kind::Care(Care::new(care(lambda), reads, dim, vb)?),
        };
        Ok(Self(Some(Inner { kind, layer, block, read: RefCell::new(None) })))
    }

    /// Whether the settings name one.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Runs `encode`, the forward pass of the base method's crops, and keeps what the add-on reads of it.
    pub fn watch(
        &self,
        encode: impl FnOnce() -> candle_core::Result<Option<[Tensor; 2]>>,
    ) -> candle_core::Result<Option<[Tensor; 2]>> {
        let Some(inner) = &self.0 else {
            return encode();
        };
        let (features, read) = match &inner.block {
            None => {
                let features = encode()?;
                (features.clone(), features)
            }
            Some(block) => {
                let (features, map) = tap::capture(block, encode)?;
                let count = map.dim(0)? / 2;
                let halves = [map.narrow(0, 0, count)?, map.narrow(0, count, count)?];
                (features, Some(halves))
            }
        };
        inner.read.replace(read);
        Ok(features)
    }

    /// Its loss on the crops that it watched, and on views of its own.
    pub fn loss(&self, encoder: &Vit, drawn: &Drawn, drop_path: u64) -> Result<AddonOutput> {
        let inner = self.0.as_ref().context("no add-on was asked for")?;
        let views = inner.read.take();
        let views = views.context("the add-on watched no crops in this step")?;
        let views = views.each_ref();
        let parameters = drawn.parameters.each_ref().map(Vec::as_slice);
        let third = || drawn.third.as_ref().context("the loader made no third view");
        Ok(match &inner.kind {
            Kind::EquiMod(addon) => {
                let plain = inner.read(encoder, third()?, drop_path)?;
                addon.forward(&plain, views, parameters)?
            }
            Kind::AugSelf(addon) => addon.forward(views, parameters)?,
            Kind::ESsl(addon) => {
                let (crops, turns) = four_rotations(third()?)?;
                addon.forward(&inner.read(encoder, &crops, drop_path)?, &turns)?
            }
            Kind::Stl(addon) => addon.forward(views)?,
            Kind::Care(addon) => addon.forward(views)?,
        })
    }

    /// Fails unless the gradient arrives at its heads and at the encoder up to the layer that it reads, and at no block after.
    /// `images` are those of the batch.
    pub fn assert_reaches(
        &self,
        out: &AddonOutput,
        named: &[(String, Var)],
        vit: &VitConfig,
        images: &[&Tensor],
    ) -> Result<()> {
        let inner = self.0.as_ref().context("no add-on was asked for")?;
        let mut reached = under(named, "addon.");
        // A batch normalization follows these shifts and takes them out again: what arrives is rounding.
        reached.retain(|(name, _)| match inner.kind {
            Kind::EquiMod(_) => name != "addon.norm.bias" && name != "addon.describe.norm.bias",
            Kind::AugSelf(_) | Kind::Stl(_) => name != "addon.norm.bias",
            Kind::ESsl(_) | Kind::Care(_) => true,
        });
        let encoder = trained(named, vit);
        let of_block = |name: &str| -> Option<usize> {
            let rest = name.strip_prefix("encoder.block")?;
            rest.split('.').next()?.parse().ok()
        };
        let (before, after): (Vec<_>, Vec<_>) = encoder.into_iter().partition(|(name, _)| {
            inner.block.is_none() || of_block(name).is_none_or(|block| block <= inner.layer)
        });
        // What joins after the blocks, the tapped loss need not see.
        let seen = |name: &str| {
            inner.block.is_none() || of_block(name).is_some() || name.starts_with("encoder.patch.")
        };
        reached.extend(before.into_iter().filter(|(name, _)| seen(name)));
        reach::assert_reaches(&out.unweighted, reached, images.iter().copied())?;
        if after.is_empty() {
            return Ok(());
        }
        let arrived: Vec<String> = grad::reach(&out.unweighted, after)?
            .into_iter()
            .filter(|reach| reach.norm.is_some_and(|norm| norm != 0.0))
            .map(|reach| reach.name)
            .collect();
        if !arrived.is_empty() {
            bail!(
                "the add-on reads block {}, and its gradient arrives after it, at {}",
                inner.layer,
                arrived.join(", ")
            );
        }
        Ok(())
    }
}

impl Inner {
    /// What the add-on reads of images.
    fn read(&self, encoder: &Vit, x: &Tensor, drop_path: u64) -> Result<Tensor> {
        Ok(match &self.block {
            None => encoder.forward_training(x, drop_path)?,
            Some(block) => tap::capture_until(block, || encoder.forward_training(x, drop_path))?,
        })
    }
}

/// What the add-on of these settings needs of a batch.
pub fn extras(settings: &Settings) -> Result<Extras> {
    let Some(addon) = &settings.addon else {
        return Ok(Extras::default());
    };
    let plain = settings.batch_size - settings.shared()?;
    let name = addon.name.name();
    Ok(match addon.name {
        AddonName::AugSelf => Extras::default(),
        AddonName::EquiMod => Extras { third: Some(Third::Untouched), ..Extras::default() },
        AddonName::ESsl => Extras {
            third: Some(Third::Small(match settings.preset {
                Preset::FashionTiny => SmallCrop { side: 16, area: (0.2, 1.0) },
                Preset::ImagenetVitS16 => SmallCrop { side: 96, area: (0.05, 0.14) },
            })),
            ..Extras::default()
        },
        AddonName::Stl => {
            if !plain.is_multiple_of(2) {
                bail!(
                    "--addon {name}: expected an even number of images of a batch beside those of the regularizer, got {plain} \
                     of {} (--batch-size, --ratio)",
                    settings.batch_size
                );
            }
            Extras { alike: (0..plain).map(|i| i / 2 * 2).collect(), ..Extras::default() }
        }
        AddonName::Care => {
            let chunks = care(addon.lambda).ranges(plain);
            let chunks = chunks.with_context(|| format!("--addon {name}: batch too small"))?;
            let alike =
                chunks.into_iter().flat_map(|chunk| std::iter::repeat_n(chunk.start, chunk.len()));
            Extras { alike: alike.collect(), ..Extras::default() }
        }
    })
}

fn care(lambda: f64) -> CareConfig {
    CareConfig { lambda, ..CareConfig::default() }
}

/// Means and deviations of the augmentation's parameters for square images.
fn statistics(seed: u64, augment: &Augment, channels: usize) -> Result<ParameterStatistics> {
    let mut rng = generator(seed, Purpose::AddonStatistics, 0);
    let drawn: Vec<_> = (0..SAMPLES).flat_map(|_| augment.draw(channels, &mut rng)).collect();
    Ok(ParameterStatistics::of(&drawn, true)?)
}

/// Widths of the ranges that the strengths of the jitter are drawn from.
fn color_widths(colors: &Photometric) -> [f64; 4] {
    let Photometric { brightness, contrast, saturation, hue, .. } = *colors;
    [brightness, contrast, saturation, hue].map(|(low, high)| f64::from(high - low))
}
