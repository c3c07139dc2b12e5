//! A step of MoCo-v3 with ViT-S/16 at 224 pixels, batch 32: both encoders, heads, losses, gradients, AdamW.

use std::cell::RefCell;

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{
    Partition, SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler, group::Subgroup,
    view::Pairing,
};
use ser_reg_trainers::{
    method::{
        Head,
        moco::{Widths, contrast, predictor, projector},
    },
    optimizer::AdamW,
    views::Views,
    vit::{Vit, VitConfig},
    weights::Weights,
};

use super::random;

const BATCH: usize = 32;
const LAYER: usize = 3;

/// What a step does beyond MoCo-v3.
#[derive(Clone, Copy, PartialEq)]
pub enum Variant {
    /// Two images are posed and their tokens compared.
    Ser,
    /// Two images are posed: λ = 0.
    Control,
    /// Nothing.
    Plain,
}

struct Branch {
    encoder: Vit,
    project: Head,
    ser: SerLoss,
}

impl Branch {
    fn new(weights: &Weights) -> Result<Self> {
        let config = VitConfig::s16(LAYER, false)?;
        let vb = weights.builder(&Device::Cpu);
        Ok(Self {
            encoder: Vit::new(&config, vb.pp("encoder"))?,
            project: projector(config.dim, Widths::PAPER, vb.pp("projector"))?,
            ser: SerLoss::new(SerConfig::default(), config.dim, vb.pp("ser"))?,
        })
    }
}

pub struct Training {
    online: Weights,
    momentum: Weights,
    queries: Branch,
    keys: Branch,
    predict: Head,
    optimizer: RefCell<AdamW>,
    sampler: ViewSampler,
    part: Partition,
    images: [Tensor; 2],
}

impl Training {
    pub fn new() -> Result<Self> {
        let online = Weights::seeded(0);
        let queries = Branch::new(&online)?;
        let predict = predictor(Widths::PAPER, online.builder(&Device::Cpu).pp("predictor"))?;
        let momentum = online.momentum_copy();
        // Views of one size, so that all images go through the encoder at once.
        let views = ViewConfig {
            pairing: Pairing::Independent(Subgroup::D4),
            area: (1.0, 1.0),
            aspect: (1.0, 1.0),
            ..Default::default()
        };
        Ok(Self {
            keys: Branch::new(&momentum)?,
            optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?.into(),
            sampler: ViewSampler::new(TokenGrid::square(14)?, views)?,
            part: Partition::new(BATCH, 2.0 / BATCH as f64)?,
            images: [1, 2].map(|seed| random(&[BATCH, 3, 224, 224], seed)),
            online,
            momentum,
            queries,
            predict,
        })
    }

    /// One step; the loss.
    pub fn step(&self, variant: Variant) -> Result<f32> {
        let [first, second] = &self.images;
        let views = match variant {
            Variant::Plain => Views::plain(first.clone(), second.clone()),
            _ => {
                let mut rng = StdRng::seed_from_u64(0);
                let posed = self.part.equivariant().len();
                let pair = self.sampler.sample_pair(&mut rng, posed)?;
                Views::posed(first, second, &self.part, pair)?
            }
        };
        self.momentum.follow(&self.online, 0.99)?;
        let block = format!("block{LAYER}");
        let (keys, queries) = (&self.keys, &self.queries);
        let k = views.encode(&keys.encoder, &block, None)?;
        let q = views.encode(&queries.encoder, &block, None)?;
        let [k1, k2] = k.features.map(|k| keys.project.forward(&k));
        let guess = |q| self.predict.forward(&queries.project.forward(&q)?);
        let [q1, q2] = q.features.map(guess);
        let mut loss = (contrast(&q1?, &k2?, 0, 0.2)? + contrast(&q2?, &k1?, 0, 0.2)?)?;
        if let (Variant::Ser, Some(q), Some(k)) = (variant, q.posed, k.posed) {
            let out = queries
                .ser
                .forward_with_keys(q.maps(), k.maps(), &keys.ser, &q.relative)?;
            loss = (loss + out.loss)?;
        }
        let grads = loss.backward()?;
        self.optimizer.borrow_mut().step(&grads, 1e-6, 0.1)?;
        Ok(loss.to_scalar()?)
    }
}
