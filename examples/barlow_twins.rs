//! Barlow Twins (arXiv 2103.03230) with soft equivariance regularization, on 8,000 real pictures, in minutes on two CPU
//! cores.
//!
//! ```text
//! cargo run --release --example barlow_twins                 # Barlow Twins + SER
//! cargo run --release --example barlow_twins -- --lambda 0   # control: the same batches and encoder, no SER loss
//! cargo run --release --example barlow_twins -- --baseline   # Barlow Twins alone: no poses, CLS token from the start
//! ```
//!
//! Lines marked `SER` are what the regularizer adds to the base method; the model has one more, its tap, and its CLS token
//! joins after the tapped block.
//!
//! What the small preset changes, and why: the projector is 256 wide instead of 8,192, since a batch of 64 pictures says
//! nothing of more correlations; the redundancy term weighs 0.02 instead of 0.0051, there being fewer of its summands; the
//! loss is scaled by 10/256, for 256 dimensions; and AdamW takes the place of LARS, as in SER's own runs.
//! There is one encoder: the keys of the regularizer come from the same weights, with gradient. The rest is as in
//! `moco_v3`. `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::{Context, Result};
use clap::Parser;
use ser_reg::{TokenGrid, grad, ser::SerLoss, view::ViewSampler};
use ser_reg_trainers::{
    balance::Balance,
    cli::Args,
    clip::clip_to,
    environment,
    method::{Head, barlow},
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
    let mut run = Run::open(Method::BarlowTwins, &Args::parse())?;
    let settings = run.settings.clone();
    let Base::BarlowTwins(base) = &settings.base else {
        unreachable!("the settings of Barlow Twins");
    };
    let dim = run.vit.dim;

    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let project = Head::new(&base.projector, vb.pp("projector"))?;
    let ser_config = settings.ser.loss(run.vit.prefix(settings.ser.layer)); // SER
    let mut ser = SerLoss::new(ser_config, dim, vb.pp("ser"))?; // SER
    let balance = Balance::new(&settings.ser, &run.vit)?;

    let grid = TokenGrid::square(run.vit.grid())?; // SER
    let sampler = ViewSampler::new(grid, settings.ser.views())?; // SER
    let part = settings.partition()?; // SER
    let block = format!("block{}", settings.ser.layer);

    let schedules = settings.schedules(run.steps())?;
    let mut state = State {
        optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?,
        online: online.clone(),
        momentum: None,
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

        let dropped = seed(settings.seed, Purpose::DropPath, step);
        let encoded = views.encode(&encoder, &block, Some(dropped))?;
        // Each view has batch statistics of its own in the projector.
        let [z1, z2] = encoded.features.map(|x| project.forward(&x));
        let invariance = barlow::loss(&z1?, &z2?, base.redundancy, base.scale)?;

        let mut loss = invariance.clone();
        let mut seen = now;
        if let Some(posed) = encoded.posed {
            ser.set_lambda(balance.lambda()?)?;
            let [first, second] = posed.maps(); // SER
            let out = ser.forward(first, second, &posed.relative)?; // SER
            loss = (loss + &out.loss)?; // SER
            seen = seen.regularized(&out, ser.config().lambda)?;
            run.measure(&balance, &invariance, &out, &online)?;
            run.probe(&posed, |[first, second]| {
                ser.forward(first, second, &posed.relative)
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
        run.end_step(seen, Vec::new(), &encoder, &mut state)?;
    }
    run.finish(&encoder, &state)
}
