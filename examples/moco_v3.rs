//! MoCo-v3 (arXiv 2104.02057) with soft equivariance regularization, on 8,000 real pictures, in minutes on two CPU cores.
//!
//! ```text
//! cargo run --release --example moco_v3                 # MoCo-v3 + SER
//! cargo run --release --example moco_v3 -- --lambda 0   # control: the same batches and encoder, no SER loss
//! cargo run --release --example moco_v3 -- --baseline   # MoCo-v3 alone: no poses, CLS token from the start
//! cargo run --release --example moco_v3 -- --baseline --addon equimod --addon-layer 1  # with another method's loss
//! ```
//!
//! Lines marked `SER` are what the regularizer adds to the base method; the model has one more, its tap, and its CLS token
//! joins after the tapped block.
//!
//! What the small preset does not reproduce: the figures of the papers. The encoder has 0.14 million parameters instead of
//! 22 million, pictures have 28 pixels, hidden layers of heads are an eighth as wide, batches have 64 pictures instead of
//! thousands; the patch embedding is trained; brightness and contrast vary, but pictures are gray and neither blurred nor
//! solarized. The momentum starts at 0.95, a
//! memory of twenty steps: a run has a thousand, not a hundred thousand. The equivariant part is an eighth of a batch
//! instead of a hundredth (it takes two pictures at least), and its views differ by turns and flips, not in scale.
//! `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::{Context, Result};
use clap::Parser;
use ser_reg::{TokenGrid, grad, ser::SerLoss, view::ViewSampler};
use ser_reg_trainers::{
    addon::{self, AddOn},
    balance::Balance,
    cli::Args,
    clip::clip_to,
    environment,
    method::moco::{contrast, predictor, projector},
    optimizer::AdamW,
    random::{Purpose, generator, seed},
    records::Step,
    run::{Run, checkpoint::State},
    settings::{Base, Method},
    views::Views,
    vit::Vit,
    weights::{Weights, tapped, trained},
};

fn main() -> Result<()> {
    environment::prepare();
    // On a worker of the pool, so that no operation has to wake it from outside.
    rayon::scope(|_| train())
}

fn train() -> Result<()> {
    let mut run = Run::open(Method::MocoV3, &Args::parse())?;
    let settings = run.settings.clone();
    let Base::MocoV3(base) = &settings.base else {
        unreachable!("the settings of MoCo-v3");
    };
    let dim = run.vit.dim;

    // An online encoder with its heads, and a momentum copy of encoder and projector, which makes the keys.
    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let project = projector(dim, base.widths, vb.pp("projector"))?;
    let predict = predictor(base.widths, vb.pp("predictor"))?;
    let ser_config = settings.ser.loss(run.vit.prefix(settings.ser.layer)); // SER
    let mut ser = SerLoss::new(ser_config, dim, vb.pp("ser"))?; // SER
    let balance = Balance::new(&settings.ser, &run.vit)?;
    let addon = AddOn::new(&settings, &run.vit, run.augment(), vb.pp("addon"))?;

    let momentum = online.momentum_copy();
    let vb = momentum.builder(&run.device);
    let key_encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let key_project = projector(dim, base.widths, vb.pp("projector"))?;
    let key_ser = SerLoss::new(ser_config, dim, vb.pp("ser"))?; // SER

    let grid = TokenGrid::square(run.vit.grid())?; // SER
    let sampler = ViewSampler::new(grid, settings.ser.views())?; // SER
    let part = settings.partition()?; // SER
    let block = format!("block{}", settings.ser.layer);

    let schedules = settings.schedules(run.steps())?;
    let mut state = State {
        optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?,
        online: online.clone(),
        momentum: Some(momentum.clone()),
        buffers: balance.buffers(),
    };

    run.begin(&encoder, &mut state)?;
    while let Some(batch) = run.next_batch()? {
        let step = batch.step;
        let now = schedules.at(step);
        // Poses draw from a generator of their own: batches and crops are the same with and without them.
        let mut rng = generator(settings.seed, Purpose::Poses, step);
        let views = match &part {
            None => Views::plain(batch.first, batch.second),
            Some(part) => {
                let pair = sampler.sample_pair(&mut rng, part.equivariant().len())?; // SER
                Views::posed(&batch.first, &batch.second, part, pair)? // SER
            }
        };

        momentum.follow(&online, now.momentum.context("MoCo-v3 has a momentum")?)?;
        let keys = views.encode(&key_encoder, &block, None)?;
        let dropped = seed(settings.seed, Purpose::DropPath, step);
        let read = addon.as_ref().and_then(AddOn::block);
        let queries = views.encode_and_tap(&encoder, &block, read, Some(dropped))?;
        // Each view has batch statistics of its own in the heads.
        let [k1, k2] = keys.features.map(|k| key_project.forward(&k));
        let [q1, q2] = queries
            .features
            .each_ref()
            .map(|q| predict.forward(&project.forward(q)?));
        let first = contrast(&q1?, &k2?, 0, base.temperature)?;
        let invariance = (first + contrast(&q2?, &k1?, 0, base.temperature)?)?;

        let mut loss = invariance.clone();
        let (mut seen, mut figures) = (now, Vec::new());
        if let Some(addon) = &addon {
            let dropped = seed(settings.seed, Purpose::AddonDropPath, step);
            let out = addon.loss(&encoder, &queries, &batch.drawn, dropped)?;
            loss = (loss + &out.loss)?;
            (seen, figures) = addon::seen(seen, &out)?;
            if step == 0 {
                addon.assert_reaches(&out, &online.named(), &run.vit)?;
            }
        }
        if let (Some(q), Some(k)) = (queries.posed, keys.posed) {
            ser.set_lambda(balance.lambda()?)?;
            let out = ser.forward_with_keys(q.maps(), k.maps(), &key_ser, &q.relative)?; // SER
            loss = (loss + &out.loss)?; // SER
            seen = seen.regularized(&out, ser.config().lambda)?;
            run.measure(&balance, &invariance, &out, &online)?;
            run.probe(&q, |maps| {
                ser.forward_with_keys(maps, k.maps(), &key_ser, &q.relative)
            })?;
            if step == 0 && settings.ser.lambda > 0.0 {
                let reached = tapped(&online.named(), &run.vit, settings.ser.layer); // SER
                grad::assert_reaches(&out.loss, reached)?; // SER
            }
        }
        let seen = Step {
            loss: loss.to_scalar()?,
            invariance: invariance.to_scalar()?,
            ..seen
        };
        run.check(&seen)?;
        if step == 0 {
            grad::assert_reaches(&loss, trained(&online.named(), &run.vit))?;
        }

        let mut grads = loss.backward()?;
        let gradient = clip_to(&settings.optimizer, &online.named(), &mut grads)
            .with_context(|| run.position())?;
        state
            .optimizer
            .step(&grads, now.learning_rate, now.weight_decay)?;
        let seen = Step { gradient, ..seen };
        run.end_step(seen, figures, &encoder, &mut state)?;
    }
    run.finish(&encoder, &state)
}
