//! The add-on of a run: its heads, the views it wants, its loss.
//!
//! It reads the plain part of a batch: posed pictures moved by more than their augmentation says.

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use candle_nn::VarBuilder;
use ser_reg::{
    Layout,
    contrib::addon::{
        AddonOutput, AugSelf, AugSelfConfig, Care, CareConfig, ESsl, ESslConfig, EquiMod,
        EquiModConfig, ParameterStatistics, Reads, Stl, StlConfig, four_rotations,
    },
    grad, tap,
};

use super::{
    augment::{Augment, Photometric, SmallCrop},
    loader::{Drawn, Third, Wishes},
    random::{Purpose, generator},
    records::Step,
    settings::{Addon, AddonName, Preset, Settings},
    views::Encoded,
    vit::{Vit, VitConfig},
    weights::{trained, under},
};

/// Views that the statistics of EquiMod's parameters are taken from, in pairs.
const SAMPLES: usize = 4096;

pub struct AddOn {
    kind: Kind,
    layer: usize,
    /// The block that is tapped; `None` for the final embedding.
    block: Option<String>,
}

enum Kind {
    EquiMod(EquiMod),
    AugSelf(AugSelf),
    ESsl(ESsl),
    Stl(Stl),
    Care(Care),
}

impl AddOn {
    /// The add-on that the settings name, if they do.
    pub fn new(
        settings: &Settings,
        vit: &VitConfig,
        augment: &Augment,
        vb: VarBuilder,
    ) -> Result<Option<Self>> {
        let Some(addon) = &settings.addon else {
            return Ok(None);
        };
        let Addon {
            layer,
            lambda,
            hidden,
            out,
            ..
        } = *addon;
        let block = (layer < vit.depth).then(|| format!("block{layer}"));
        let reads = match &block {
            None => Reads::Final,
            Some(_) => Reads::Tokens(Layout {
                prefix: vit.prefix(layer),
                ..Layout::default()
            }),
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
                let config = ESslConfig {
                    hidden,
                    out,
                    lambda,
                };
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
        Ok(Some(Self { kind, layer, block }))
    }

    /// The block whose tokens it reads; `None` if it reads the final embedding.
    pub fn block(&self) -> Option<&str> {
        self.block.as_deref()
    }

    /// Its loss on what the encoder made of the batch, and on views of its own.
    pub fn loss(
        &self,
        encoder: &Vit,
        encoded: &Encoded,
        drawn: &Drawn,
        drop_path: u64,
    ) -> Result<AddonOutput> {
        let views = encoded.plain.as_ref();
        let views = views.context("all pictures are posed: there are none for the add-on")?;
        let views = views.each_ref();
        let parameters = drawn.parameters.each_ref().map(Vec::as_slice);
        let third = || {
            drawn
                .third
                .as_ref()
                .context("the loader made no third view")
        };
        Ok(match &self.kind {
            Kind::EquiMod(addon) => {
                let plain = self.read(encoder, third()?, drop_path)?;
                addon.forward(&plain, views, parameters)?
            }
            Kind::AugSelf(addon) => addon.forward(views, parameters)?,
            Kind::ESsl(addon) => {
                let (crops, turns) = four_rotations(third()?)?;
                addon.forward(&self.read(encoder, &crops, drop_path)?, &turns)?
            }
            Kind::Stl(addon) => addon.forward(views)?,
            Kind::Care(addon) => addon.forward(views)?,
        })
    }

    /// What the add-on reads of pictures.
    fn read(&self, encoder: &Vit, x: &Tensor, drop_path: u64) -> Result<Tensor> {
        Ok(match &self.block {
            None => encoder.forward_training(x, drop_path)?,
            Some(block) => tap::capture(block, || encoder.forward_training(x, drop_path))?.1,
        })
    }

    /// Fails unless the gradient arrives at its heads and at the encoder up to the layer that it reads, and at no block after.
    pub fn assert_reaches(
        &self,
        out: &AddonOutput,
        named: &[(String, Var)],
        vit: &VitConfig,
    ) -> Result<()> {
        let mut reached = under(named, "addon.");
        // A batch normalization follows these shifts and takes them out again: what arrives is rounding.
        reached.retain(|(name, _)| match self.kind {
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
            self.block.is_none() || of_block(name).is_none_or(|block| block <= self.layer)
        });
        // What joins after the blocks, the tapped loss need not see.
        let seen = |name: &str| {
            self.block.is_none() || of_block(name).is_some() || name.starts_with("encoder.patch.")
        };
        reached.extend(before.into_iter().filter(|(name, _)| seen(name)));
        grad::assert_reaches(&out.unweighted, reached)?;
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
                self.layer,
                arrived.join(", ")
            );
        }
        Ok(())
    }
}

/// The record of a step with an add-on's loss in it, and its figures by name.
pub fn seen(step: Step, out: &AddonOutput) -> Result<(Step, Vec<(&'static str, f64)>)> {
    let addon = Some(out.unweighted.to_scalar::<f32>()?);
    let number = |(name, x): &(&'static str, Tensor)| Ok((*name, f64::from(x.to_scalar::<f32>()?)));
    let figures = out.figures.iter().map(number).collect::<Result<_>>()?;
    Ok((Step { addon, ..step }, figures))
}

/// What the add-on of these settings wants of a batch.
pub fn wishes(settings: &Settings) -> Result<Wishes> {
    let Some(addon) = &settings.addon else {
        return Ok(Wishes::default());
    };
    let plain = settings.batch_size - settings.posed()?;
    let name = addon.name.name();
    Ok(match addon.name {
        AddonName::AugSelf => Wishes::default(),
        AddonName::EquiMod => Wishes {
            third: Some(Third::Untouched),
            ..Wishes::default()
        },
        AddonName::ESsl => Wishes {
            third: Some(Third::Small(match settings.preset {
                Preset::FashionTiny => SmallCrop {
                    side: 16,
                    area: (0.2, 1.0),
                },
                Preset::ImagenetVitS16 => SmallCrop {
                    side: 96,
                    area: (0.05, 0.14),
                },
            })),
            ..Wishes::default()
        },
        AddonName::Stl => {
            if !plain.is_multiple_of(2) {
                bail!(
                    "--addon {name}: expected an even number of pictures of a batch that are not posed, got {plain} of {} \
                     (--batch-size, --ratio)",
                    settings.batch_size
                );
            }
            Wishes {
                alike: (0..plain).map(|i| i / 2 * 2).collect(),
                ..Wishes::default()
            }
        }
        AddonName::Care => {
            let chunks = care(addon.lambda).ranges(plain);
            let chunks = chunks.with_context(|| format!("--addon {name}: batch too small"))?;
            let alike = chunks
                .into_iter()
                .flat_map(|chunk| std::iter::repeat_n(chunk.start, chunk.len()));
            Wishes {
                alike: alike.collect(),
                ..Wishes::default()
            }
        }
    })
}

fn care(lambda: f64) -> CareConfig {
    CareConfig {
        lambda,
        ..CareConfig::default()
    }
}

/// Means and deviations of what the augmentation draws for square pictures.
fn statistics(seed: u64, augment: &Augment, channels: usize) -> Result<ParameterStatistics> {
    let mut rng = generator(seed, Purpose::AddonStatistics, 0);
    let drawn: Vec<_> = (0..SAMPLES)
        .flat_map(|_| augment.draw(channels, &mut rng))
        .collect();
    Ok(ParameterStatistics::of(&drawn, true)?)
}

/// Widths of the ranges that the strengths of the jitter are drawn from.
fn color_widths(colors: &Photometric) -> [f64; 4] {
    let Photometric {
        brightness,
        contrast,
        saturation,
        hue,
        ..
    } = *colors;
    [brightness, contrast, saturation, hue].map(|(low, high)| f64::from(high - low))
}
