//! MoCo-v3 with soft equivariance regularization, on 8,000 real pictures, in minutes on two CPU cores.
//!
//!     cargo run --release --example moco_v3                 # MoCo-v3 + SER
//!     cargo run --release --example moco_v3 -- --lambda 0   # control: the same batches and encoder, no SER loss
//!     cargo run --release --example moco_v3 -- --baseline   # MoCo-v3 alone
//!
//! Lines marked `SER` are what the regularizer adds to the base method; the model has one more, its tap.
//!
//! What it does not reproduce: the papers' figures. The encoder has 0.13 million parameters instead of 22, pictures have
//! 28 pixels, the heads are an eighth as wide, batches have 64 pictures, the patch embedding is trained, and there is no
//! blur, colour jitter or solarisation. A quarter-size momentum (0.95) suits 1,000 steps. The equivariant part of a batch
//! is an eighth instead of a hundredth (two pictures are the least), and views differ by turns and flips only, not in
//! scale.

mod common;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{Tensor, Var};
use common::{
    augment::Augment,
    cli::Args,
    environment,
    eval::{self, Evaluation},
    knn,
    moco::{Head, contrast},
    optimizer::Decoupled,
    progress::{Progress, Step},
    vit::{Vit, VitConfig},
    weights::Weights,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use ser_reg::{
    TokenGrid, grad,
    partition::Partition,
    projector::ProjectorConfig,
    schedule::Schedule,
    ser::{SerConfig, SerLoss},
    tap,
    view::{View, ViewConfig, ViewSampler},
};

const LEARNING_RATE: f64 = 2e-3;
const WEIGHT_DECAY: f64 = 0.05;
const MOMENTUM: f64 = 0.95;
const TEMPERATURE: f64 = 0.2;

fn main() -> Result<()> {
    environment::prepare()?;
    let start = Instant::now();
    let args = Args::read();
    let (device, data, batch) = (args.device()?, args.data()?, args.batch_size);
    let augment = Augment::new(&data.train);
    println!("data: {}", data.note);

    // Online encoder, projector and predictor; momentum copies of the first two.
    let cls_after = if args.baseline { 0 } else { args.layer };
    let config = VitConfig::small(data.train.channels, data.train.side, cls_after, args.layer)?;
    let online = Weights::seeded(args.seed);
    let vb = online.builder(&device);
    let encoder = Vit::new(&config, vb.pp("encoder"))?;
    let projector = Head::projector(config.dim, vb.pp("projector"))?;
    let predictor = Head::predictor(vb.pp("predictor"))?;

    let grid = TokenGrid::square(config.grid())?;
    let ser_config = SerConfig {                                                                              // SER
        lambda: args.lambda,
        temperature: args.temperature,
        projector: Some(ProjectorConfig { hidden: 128, out: 128, norm: true }),
        ..Default::default()
    };
    let ser = SerLoss::new(ser_config, config.dim, vb.pp("ser"))?;                                            // SER

    Ok(())
}
