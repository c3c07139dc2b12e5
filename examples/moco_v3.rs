//! MoCo-v3 (arXiv 2104.02057) with soft equivariance regularization, on 8,000 images, in minutes on two CPU cores.
//!
//! ```text
//! cargo run --release --example moco_v3                  # MoCo-v3 + SER
//! cargo run --release --example moco_v3 -- --lambda 0    # control: same batches, no SER loss
//! cargo run --release --example moco_v3 -- --baseline    # MoCo-v3 alone, CLS from the start
//! cargo run --release --example moco_v3 -- --ser-images own  # SER on images of its own
//! ```
//!
//! As in the paper, the encoder that gradients train is measured and saved, not the key encoder.
//!
//! Lines marked `SER` are what the regularizer adds. The model has one more, its tap (`trainers/vit.rs`).
//!
//! The small preset does not reproduce the papers' figures: the encoder has 0.14 million parameters instead of 22 million,
//! the images have 28 pixels, and the heads are an eighth as wide. The momentum starts at 0.95, a memory of twenty steps: a
//! run has a thousand. SER sees an eighth of a batch instead of a hundredth, in rotations and flips without scales.
//! `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::Result;
use candle_core::Tensor;
use clap::Parser;
use ser_reg::Projector;
use ser_reg_trainers::{
    addon::AddOn,
    cli::Args,
    environment,
    method::moco::{contrast, predictor, projector},
    run::{Losses, Run, Term, checkpoint::State},
    settings::Method,
    views::{Images, colored, join},
    vit::Vit,
    weights::Weights,
};

fn main() -> Result<()> {
    environment::prepare();
    // A worker of the pool trains, so that no operation has to wake the pool from outside.
    rayon::scope(|_| train())
}

fn train() -> Result<()> {
    let mut run = Run::open(Method::MocoV3, &Args::parse())?;
    let settings = run.settings.clone();
    let base = settings.base.moco_v3()?;
    let dim = run.vit.dim;

    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let project = projector(dim, base.widths, vb.pp("projector"))?;
    let predict = predictor(base.widths, vb.pp("predictor"))?;
    let mut ser = settings.ser.regularizer(&run.vit, vb.pp("ser"))?; // SER: views, tap, head, loss
    let addon = AddOn::new(&settings, &run.vit, run.augment(), vb.pp("addon"))?;

    // The momentum copies of encoder, projector and SER's head make the keys.
    let momentum = online.momentum_copy();
    let vb = momentum.builder(&run.device);
    let key_encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let key_project = projector(dim, base.widths, vb.pp("projector"))?;
    let key_head = Projector::new(dim, settings.ser.head, vb.pp("ser"))?; // SER

    let mut state = State::new(&online, Some(&momentum))?;
    run.begin(&encoder, &mut ser, &mut state)?;
    while let Some(batch) = run.next_batch()? {
        momentum.follow(&online, batch.momentum()?)?;
        let training = encoder.training(batch.drop_path());
        let model = |x: &Tensor| training.forward(x);
        let keys = |x: &Tensor| key_encoder.forward(x);

        // SER draws two views of each of its images. Both encoders record block `--layer`, where the maps are compared.
        let rng = &mut batch.rng(); // SER
        let (term, shared, key_shared) = match &batch.ser {
            None => (None, None, None),
            Some(Images::Own(own)) => {
                let out = ser.forward_with_keys(own, rng, model, keys, &key_head)?; // SER
                (Some(Term::from(out)), None, None)
            }
            // The paper's form: the features of the views also enter the base loss.
            Some(Images::Shared(images)) => {
                let (model, keys) = (colored(model), colored(keys));
                let out = ser.forward_with_outputs_and_keys(images, rng, model, keys, &key_head)?; // SER
                Term::and_outputs(out)
            }
        };

        let queries = join(addon.watch(|| batch.encode(model))?, shared)?;
        let keys = join(batch.encode(keys)?, key_shared)?;
        // Each view has its own batch statistics in the heads.
        let [q1, q2] = queries.map(|q| predict.forward(&project.forward(&q)?));
        let [k1, k2] = keys.map(|k| key_project.forward(&k));
        let first = contrast(&q1?, &k2?, 0, base.temperature)?;
        let loss = (first + contrast(&q2?, &k1?, 0, base.temperature)?)?;

        let losses = Losses {
            keys: Some((&key_encoder, &key_head)),
            addon: Some(&addon),
            ..Losses::new(loss, term) // SER: the term is added to the base loss
        };
        run.step(&batch, losses, &encoder, &mut ser, &mut state)?;
    }
    run.finish(&encoder, &state)
}
