//! DINO (arXiv 2104.14294) with soft equivariance regularization, on 8,000 real pictures, in minutes on two CPU cores.
//!
//! ```text
//! cargo run --release --example dino                 # DINO + SER
//! cargo run --release --example dino -- --lambda 0   # control: the same batches and encoder, no SER loss
//! cargo run --release --example dino -- --baseline   # DINO alone: no poses, CLS token from the start
//! ```
//!
//! Lines marked `SER` are what the regularizer adds to the base method; the model has one more, its tap, and its CLS token
//! joins after the tapped block.
//!
//! What the small preset changes, and why: the head has batch normalization, without which it learned nothing in a
//! thousand steps; it is 256 wide with 256 prototypes instead of 65,536, for ten classes, of length 1 and never frozen; the
//! teacher's temperature and the weight decay are constant, the momentum starts at 0.97, a memory of thirty steps, and
//! gradients are clipped at 1 all together: a run has a thousand steps. There are no local crops, as in SER's own runs. The
//! regularizer's keys come from the teacher's copy of its head. The rest is as in `moco_v3`. `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor, Var};
use clap::Parser;
use ser_reg::{TokenGrid, grad, schedule::Schedule, ser::SerLoss, view::ViewSampler};
use ser_reg_trainers::{
    balance::Balance,
    cli::Args,
    clip::{clip_to, freeze},
    environment,
    method::dino::{self, DinoHead, Entropies},
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
    let mut run = Run::open(Method::Dino, &Args::parse())?;
    let settings = run.settings.clone();
    let Base::Dino(base) = &settings.base else {
        unreachable!("the settings of DINO");
    };
    let dim = run.vit.dim;

    // A student, and a teacher that is its moving average.
    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let head = |vb| DinoHead::new(&base.mlp, base.prototypes, base.learned_lengths, vb);
    let student = head(vb.pp("head"))?;
    let ser_config = settings.ser.loss(run.vit.prefix(settings.ser.layer)); // SER
    let mut ser = SerLoss::new(ser_config, dim, vb.pp("ser"))?; // SER
    let balance = Balance::new(&settings.ser, &run.vit)?;

    let momentum = online.momentum_copy();
    let vb = momentum.builder(&run.device);
    let teacher_encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let teacher = head(vb.pp("head"))?;
    let teacher_ser = SerLoss::new(ser_config, dim, vb.pp("ser"))?; // SER
    let center = Var::zeros((1, base.prototypes), DType::F32, &run.device)?;

    let grid = TokenGrid::square(run.vit.grid())?; // SER
    let sampler = ViewSampler::new(grid, settings.ser.views())?; // SER
    let part = settings.partition()?; // SER
    let block = format!("block{}", settings.ser.layer);

    let schedules = settings.schedules(run.steps())?;
    let frozen = run.fraction(base.freeze_prototypes);
    let (cool, warm) = base.teacher_temperature;
    let sharpness = Schedule::linear(cool, warm, run.fraction(base.teacher_warm_up).max(1))?;
    let mut state = State {
        optimizer: AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?,
        online: online.clone(),
        momentum: Some(momentum.clone()),
        buffers: [vec![("center", center.clone())], balance.buffers()].concat(),
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

        let taught = views.encode(&teacher_encoder, &block, None)?;
        let dropped = seed(settings.seed, Purpose::DropPath, step);
        let learned = views.encode(&encoder, &block, Some(dropped))?;
        // Each view has batch statistics of its own in the heads.
        let [t1, t2] = taught.features.map(|x| teacher.forward(&x));
        let [s1, s2] = learned.features.map(|x| student.forward(&x));
        let (t1, t2) = (t1?, t2?);
        let target = |scores| dino::targets(scores, &center, sharpness.at(step));
        let targets = [target(&t1)?, target(&t2)?];
        let invariance = dino::loss(&[s1?, s2?], &targets, base.student_temperature)?;

        let mut loss = invariance.clone();
        let mut seen = now;
        if let (Some(q), Some(k)) = (learned.posed, taught.posed) {
            ser.set_lambda(balance.lambda()?)?;
            let out = ser.forward_with_keys(q.maps(), k.maps(), &teacher_ser, &q.relative)?; // SER
            loss = (loss + &out.loss)?; // SER
            seen = seen.regularized(&out, ser.config().lambda)?;
            run.measure(&balance, &invariance, &out, &online)?;
            run.probe(&q, |maps| {
                ser.forward_with_keys(maps, k.maps(), &teacher_ser, &q.relative)
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
        if step < frozen {
            freeze(&online.named(), &mut grads, "head.prototypes.")?;
        }
        state
            .optimizer
            .step(&grads, now.learning_rate, now.weight_decay)?;
        // The center of this step is for the next one, and the teacher follows the student's new weights.
        let scores = Tensor::cat(&[&t1, &t2], 0)?;
        center.set(&dino::updated_center(
            &center,
            &scores,
            base.center_momentum,
        )?)?;
        momentum.follow(&online, now.momentum.context("DINO has a momentum")?)?;

        let seen = Step { gradient, ..seen };
        // A collapse shows here first: both zero, or both ln K.
        let extra = match run.epoch_ends() {
            true => {
                let entropies = Entropies::of(&Tensor::cat(&targets, 0)?)?;
                vec![
                    ("entropy", entropies.each),
                    ("entropy of mean", entropies.mean),
                ]
            }
            false => Vec::new(),
        };
        run.end_step(seen, extra, &encoder, &mut state)?;
    }
    run.finish(&encoder, &state)
}
