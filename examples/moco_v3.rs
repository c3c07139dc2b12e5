//! MoCo-v3 with soft equivariance regularization, on 8,000 real pictures, in minutes on two CPU cores.
//!
//! ```text
//! cargo run --release --example moco_v3                 # MoCo-v3 + SER
//! cargo run --release --example moco_v3 -- --lambda 0   # control: the same batches and encoder, no SER loss
//! cargo run --release --example moco_v3 -- --baseline   # MoCo-v3 alone: no poses, CLS token from the start
//! ```
//!
//! Lines marked `SER` are what the regularizer adds to the base method; the model has one more, its tap.
//!
//! What it does not reproduce: the figures of the papers. The encoder has 0.13 million parameters instead of 22 million,
//! pictures have 28 pixels, heads are an eighth as wide, batches have 64 pictures instead of thousands; the patch
//! embedding is trained, and there is no blur, no colour jitter, no solarisation. The equivariant part is an eighth of a
//! batch instead of a hundredth (it takes two pictures at least), and its views differ by turns and flips, not in scale.

mod common;

use std::time::Instant;

use anyhow::{Result, ensure};
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
    schedule::Schedule,
    ser::SerLoss,
    tap,
    view::{View, ViewSampler},
};

const LEARNING_RATE: f64 = 2e-3;
const WEIGHT_DECAY: f64 = 0.05;
/// First momentum of the key encoder; it rises to 1.
const MOMENTUM: f64 = 0.95;
/// Temperature of the base method's loss.
const TEMPERATURE: f64 = 0.2;

fn main() -> Result<()> {
    environment::prepare();
    // On a worker of the pool, so that no operation has to wake it from outside.
    rayon::scope(|_| train())
}

fn train() -> Result<()> {
    let start = Instant::now();
    let args = Args::read();
    let (device, data) = (args.device()?, args.data()?);
    println!("{} | {}", args.mode(), data.note);

    // An online encoder with its heads, and a momentum copy of encoder and projector, which makes the keys.
    let config = VitConfig::small(&data.train, args.layer, args.baseline)?;
    let online = Weights::seeded(args.seed);
    let vb = online.builder(&device);
    let encoder = Vit::new(&config, vb.pp("encoder"))?;
    let projector = Head::projector(config.dim, vb.pp("projector"))?;
    let predictor = Head::predictor(vb.pp("predictor"))?;

    let ser_config = args.ser(config.prefix(args.layer));
    let ser = SerLoss::new(ser_config, config.dim, vb.pp("ser"))?; // SER
    let sampler = ViewSampler::new(args.poses(), TokenGrid::square(config.grid())?)?; // SER
    let part = args.partition()?; // SER

    let momentum = online.momentum_copy();
    let vb = momentum.builder(&device);
    let key_encoder = Vit::new(&config, vb.pp("encoder"))?;
    let key_projector = Head::projector(config.dim, vb.pp("projector"))?;
    let key_ser = SerLoss::new(ser_config, config.dim, vb.pp("ser"))?; // SER

    let batch = args.batch_size;
    let steps = args.epochs * (data.train.len() / batch);
    let warm_up = steps / 10;
    let learning_rate = Schedule::cosine(LEARNING_RATE, 0.0, steps - warm_up)?.warm_up(warm_up);
    let momentum_course = Schedule::cosine(MOMENTUM, 1.0, steps)?;
    let mut optimizer = Decoupled::new(&online.named(), WEIGHT_DECAY)?;

    let augment = Augment::new(&data.train);
    let evaluation = Evaluation {
        bank: &data.train,
        test: &data.test,
        statistics: &augment.statistics,
        device: &device,
    };
    let untrained = evaluation.poses(|x| Ok(encoder.forward(x)?))?;

    let mut rng = StdRng::seed_from_u64(args.seed);
    // Poses draw from a generator of their own: batches and crops are then the same with and without them.
    let mut pose_rng = StdRng::seed_from_u64(args.seed.wrapping_add(1));
    let layer = format!("block{}", args.layer);
    let mut progress = Progress::new(steps, batch)?;
    let mut order: Vec<usize> = (0..data.train.len()).collect();
    let mut score = f64::NAN;
    for epoch in 1..=args.epochs {
        order.shuffle(&mut rng);
        progress.begin_epoch();
        for indices in order.chunks_exact(batch) {
            let step = progress.steps_done();
            // Both views of the last pictures of a batch show one crop, each in a pose of its own.
            let shared = part.map_or(0, |part| part.equivariant().len()); // SER
            let seed = rng.random();
            let (mut x1, mut x2) = augment.pair(&data.train, indices, shared, seed, &device)?;
            let mut posed = None;
            if let Some(part) = &part {
                let views = sampler.sample_pair(&mut pose_rng, shared)?; // SER
                x1 = turned(&x1, part, &views.first)?; // SER
                x2 = turned(&x2, part, &views.second)?; // SER
                posed = Some((part, views));
            }
            let x = Tensor::cat(&[&x1, &x2], 0)?;

            let m = momentum_course.at(step);
            momentum.follow(&online, m)?;
            // Both views go through the encoders together, and through the heads apart: each has its batch statistics.
            let (keys, key_map) = tap::capture(&layer, || key_encoder.forward(&x))?; // SER: captures
            let [k1, k2] = halves(&keys)?.map(|k| key_projector.forward(&k));
            let (queries, map) = tap::capture(&layer, || encoder.forward(&x))?; // SER: captures
            let [q1, q2] = halves(&queries)?.map(|q| predictor.forward(&projector.forward(&q)?));
            let first = contrast(&q1?, &k2?, 0, TEMPERATURE)?;
            let invariance = (first + contrast(&q2?, &k1?, 0, TEMPERATURE)?)?;

            let mut loss = invariance.clone();
            let mut seen = Step::default();
            if let Some((part, views)) = &posed {
                let (q, k) = (maps(&map, part)?, maps(&key_map, part)?); // SER
                let out =
                    ser.forward_with_keys(q.each_ref(), k.each_ref(), &key_ser, &views.relative())?; // SER
                loss = (loss + &out.loss)?; // SER
                if step == 0 && args.lambda > 0.0 {
                    grad::assert_reaches(&out.loss, tapped(&online.named(), args.layer))?; // SER
                }
                seen.equivariance = out.equivariance.to_scalar()?;
                seen.matching = out.accuracy.map_or(Ok(0.0), |a| a.to_scalar())?;
            }
            if step == 0 {
                grad::assert_reaches(&loss, under(&online.named(), "encoder."))?;
            }
            optimizer.step(&loss.backward()?, learning_rate.at(step))?;
            seen.loss = loss.to_scalar()?;
            seen.invariance = invariance.to_scalar()?;
            progress.step(seen, args.lambda, m)?;
        }
        let features = evaluation.test_features(|x| Ok(encoder.forward(x)?))?;
        score = evaluation.equivariance(&encoder, args.layer)?;
        progress.end_epoch(epoch, knn::spread(&features)?, score);
    }

    let trained = evaluation.poses(|x| Ok(encoder.forward(x)?))?;
    let raw = evaluation.poses(eval::raw_pixels)?;
    let rows = [
        ("trained encoder", trained),
        ("untrained encoder", untrained),
        ("raw pixels", raw),
    ];
    eval::print_table(&data.note, &rows);
    let (first, last) = progress.ends();
    // One line for machines: CI reads it.
    println!(
        "\nresult method=moco_v3 mode={} seed={} epochs={} steps={steps} loss_first={:.4} loss_last={:.4} \
         invariance_last={:.4} equivariance_last={:.4} score={score:.4} knn={:.2} knn_poses={:.2} images_per_s={:.0} \
         seconds={:.0}",
        args.mode(),
        args.seed,
        args.epochs,
        first.loss,
        last.loss,
        last.invariance,
        last.equivariance,
        trained[0],
        eval::pose_mean(&trained),
        progress.speed(),
        start.elapsed().as_secs_f64(),
    );
    ensure!(
        !args.smoke || last.loss < 0.95 * first.loss,
        "the loss did not fall by 5 %: {:.4} at first, {:.4} at last",
        first.loss,
        last.loss
    );
    Ok(())
}

/// Both views ran as one batch; these are their halves.
fn halves(x: &Tensor) -> Result<[Tensor; 2]> {
    let batch = x.dim(0)? / 2;
    Ok([x.narrow(0, 0, batch)?, x.narrow(0, batch, batch)?])
}

/// SER: the batch with its equivariant part turned by `view`.
fn turned(images: &Tensor, part: &Partition, view: &View) -> Result<Tensor> {
    let (plain, shared) = part.split(images)?;
    Ok(Tensor::cat(&[&plain, &view.act(&shared)?], 0)?)
}

/// SER: the maps of the equivariant part, in the first view and in the second.
fn maps(map: &Tensor, part: &Partition) -> Result<[Tensor; 2]> {
    let [first, second] = halves(map)?;
    Ok([part.split(&first)?.1, part.split(&second)?.1])
}

/// SER: the parameters that its loss must reach: patches, blocks up to `layer`, and its projector.
fn tapped(named: &[(String, Var)], layer: usize) -> Vec<(String, Var)> {
    let mut vars = [under(named, "encoder.patch."), under(named, "ser.")].concat();
    for block in 1..=layer {
        vars.extend(under(named, &format!("encoder.block{block}.")));
    }
    vars
}

/// The parameters whose names begin with `prefix`.
fn under(named: &[(String, Var)], prefix: &str) -> Vec<(String, Var)> {
    let begins = |(name, _): &&(String, Var)| name.starts_with(prefix);
    named.iter().filter(begins).cloned().collect()
}
