//! A step of MoCo-v3 with ViT-S/16 at 224 pixels, batch 32: both encoders, heads, losses, gradients, AdamW.
#![allow(dead_code)] // each bench uses a part

use std::cell::RefCell;

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{Partition, Projector, ProjectorConfig, Regularizer, SerConfig, TokenGrid};
use ser_reg_trainers::{
    method::{
        Head,
        moco::{Widths, contrast, predictor, projector},
    },
    optimizer::AdamW,
    overhead,
    views::{self, Images},
    vit::{Vit, VitConfig},
    weights::Weights,
};

use crate::workload::random;

const BATCH: usize = 32;
const LAYER: usize = 3;

/// What a step does beyond MoCo-v3.
#[derive(Clone, Copy, PartialEq)]
pub enum Variant {
    /// Two images are in rotated and flipped views, and their tokens are compared.
    Ser,
    /// Two images are in such views: λ = 0.
    Control,
    /// Nothing.
    Plain,
}

struct Branch {
    encoder: Vit,
    project: Head,
}

impl Branch {
    fn new(weights: &Weights) -> Result<Self> {
        let config = VitConfig::s16(LAYER, false)?;
        let vb = weights.builder(&Device::Cpu);
        Ok(Self {
            encoder: Vit::new(&config, vb.pp("encoder"))?,
            project: projector(config.dim, Widths::PAPER, vb.pp("projector"))?,
        })
    }
}

pub struct Training {
    online: Weights,
    momentum: Weights,
    queries: Branch,
    keys: Branch,
    predict: Head,
    ser: Regularizer,
    key_head: Projector,
    optimizer: RefCell<AdamW>,
    part: Partition,
    images: [Tensor; 2],
}

impl Training {
    pub fn new() -> Result<Self> {
        let online = Weights::seeded(0);
        let queries = Branch::new(&online)?;
        let vb = online.builder(&Device::Cpu);
        let predict = predictor(Widths::PAPER, vb.pp("predictor"))?;
        let (layer, grid) = (format!("block{LAYER}"), TokenGrid::square(14)?);
        let width = queries.encoder.config().dim;
        let ser = Regularizer::new(layer, grid, width, SerConfig::default(), vb.pp("ser"))?;
        let momentum = online.momentum_copy();
        let key_vb = momentum.builder(&Device::Cpu).pp("ser");
        Ok(Self {
            keys: Branch::new(&momentum)?,
            key_head: Projector::new(width, ProjectorConfig::default(), key_vb)?,
            optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?.into(),
            part: Partition::new(BATCH, 2.0 / BATCH as f64)?,
            images: [1, 2].map(|seed| random(&[BATCH, 3, 224, 224], seed)),
            online,
            momentum,
            queries,
            predict,
            ser,
        })
    }

    /// Milliseconds that the regularizer adds to a step with λ = 0, forward and backward: on two images that it shares with
    /// MoCo-v3, or on two of its own, which pass up to the tap.
    pub fn regularizer(&self, own: bool) -> Result<f64> {
        let images = self.images[0].narrow(0, 0, 2)?;
        let images = match own {
            true => Images::Own(images),
            false => Images::Shared(Tensor::cat(&[&images, &images], 1)?),
        };
        let keys = Some((&self.keys.encoder, &self.key_head));
        let rng = &mut StdRng::seed_from_u64(0);
        Ok(1e3 * overhead::time(&self.ser, &images, &self.queries.encoder, keys, rng)?)
    }

    /// The part of the encoder's blocks that lies before the tap, times the part of the images: what images of their own cost.
    pub fn own_share(&self) -> f64 {
        let depth = self.queries.encoder.config().depth;
        2.0 / BATCH as f64 * LAYER as f64 / depth as f64
    }

    /// One step; the loss.
    pub fn step(&self, variant: Variant) -> Result<f32> {
        self.momentum.follow(&self.online, 0.99)?;
        let (keys, queries) = (&self.keys, &self.queries);
        let model = |x: &Tensor| queries.encoder.forward(x);
        let key_model = |x: &Tensor| keys.encoder.forward(x);
        let (crops, shared) = match variant {
            Variant::Plain => (self.images.clone(), None),
            Variant::Ser | Variant::Control => views::shared(&self.part, &self.images)?,
        };
        let mut term = None;
        let (mut outputs, mut key_outputs) = (None, None);
        if let Some(views::Images::Shared(images)) = &shared {
            let mut rng = StdRng::seed_from_u64(0);
            let (model, keys) = (views::colored(model), views::colored(key_model));
            if variant == Variant::Ser {
                let head = &self.key_head;
                let ser = &self.ser;
                let out = ser.forward_with_outputs_and_keys(images, &mut rng, model, keys, head)?;
                (outputs, key_outputs) = (Some(out.outputs), Some(out.key_outputs));
                term = Some(out.loss);
            } else {
                let pair = self.ser.sampler().sample_pair(&mut rng, images.dim(0)?)?;
                let views = [pair.first.apply(images)?, pair.second.apply(images)?];
                outputs = Some([model(&views[0])?, model(&views[1])?]);
                key_outputs = Some([keys(&views[0])?, keys(&views[1])?]);
            }
        }
        let q = views::join(views::encode(&crops, model)?, outputs)?;
        let k = views::join(views::encode(&crops, key_model)?, key_outputs)?;
        let [k1, k2] = k.map(|k| keys.project.forward(&k));
        let [q1, q2] = q.map(|q| self.predict.forward(&queries.project.forward(&q)?));
        let mut loss = (contrast(&q1?, &k2?, 0, 0.2)? + contrast(&q2?, &k1?, 0, 0.2)?)?;
        if let Some(term) = term {
            loss = (loss + term)?;
        }
        let grads = loss.backward()?;
        self.optimizer.borrow_mut().step(&grads, 1e-6, 0.1)?;
        Ok(loss.to_scalar()?)
    }
}
