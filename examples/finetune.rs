//! Adds soft equivariance regularization (SER) to an encoder that is already trained, in one epoch.
//!
//! ```text
//! cargo run --release --example finetune    # trains an encoder on labels first
//! cargo run --release --example finetune -- --init runs/my-run/encoder.safetensors
//! ```
//!
//! A frozen copy of the encoder holds the features in place: their cosine distance is the base loss. SER has images of its
//! own, up to the tap. The program prints the equivariance score and the accuracy before and after.

#[macro_use]
mod console;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use clap::Parser;
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{Layout, Partition, Regularizer, SerConfig, TokenGrid, grad, loss};
use ser_reg_trainers::{
    data, encoder, environment,
    eval::{Evaluation, pose_mean},
    nn::Linear,
    optimizer::AdamW,
    progress::epoch,
    settings::check::{count, weight},
    vit::{Vit, VitConfig},
    weights::{Weights, tapped},
};

#[derive(Parser)]
struct Args {
    /// The encoder.safetensors or the checkpoint of a trainer's run [default: train an encoder on labels first].
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Data as for the trainers [default: 10,000 images of Fashion-MNIST that come with the repository].
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Weight of the equivariance loss.
    #[arg(long, default_value_t = 0.3, allow_negative_numbers = true)]
    lambda: f64,
    /// The block whose tokens SER compares, counted from 1.
    #[arg(long, default_value_t = 2)]
    layer: usize,
    /// Run on a part of the images.
    #[arg(long)]
    smoke: bool,
}

const BATCH: usize = 64;
const CPU: &Device = &Device::Cpu;

fn main() -> Result<()> {
    environment::prepare();
    // A worker of the pool trains, so that no operation has to wake the pool from outside.
    rayon::scope(|_| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    weight("--lambda", args.lambda)?;
    let path = args.data.clone().unwrap_or_else(data::embedded);
    let mut data = data::load(&path, &data::Wanted::default())?;
    if args.smoke {
        data = data.take(2048, 500);
    }
    let images = &data.bank;
    ensure!(
        data.is_labelled() || args.init.is_some(),
        "--data: expected images with classes, since without --init the encoder is trained on labels ({})",
        data.note
    );
    let read = |path| encoder::read(path, CPU);
    let loaded = args.init.as_deref().map(read).transpose()?;
    let (mut config, statistics) = match &loaded {
        Some((_, card)) => (card.vit.clone(), card.statistics.clone()),
        None => (VitConfig::small(images, 2, false)?, images.statistics()),
    };
    config.last_map |= args.layer == config.depth; // the tap needs all tokens of the last block
    let (expected, got) = ((config.channels, config.side), (images.channels, images.side));
    ensure!(
        expected == got,
        "--data: expected images of (channels, side) {expected:?}, which the encoder takes, got {got:?}"
    );
    ensure!(
        images.len() >= BATCH,
        "--data: expected at least {BATCH} training images, one batch, got {}",
        images.len()
    );
    count("--layer", 1..=config.depth, args.layer)?;
    println!("{}; {} and {} of them are used", data.note, data.bank.len(), data.test.len());
    let batch = |indices: &[usize]| images.gather(indices, &statistics, CPU);

    let online = Weights::seeded(0);
    let vb = online.builder(CPU);
    let model = Vit::new(&config, vb.pp("encoder"))?;
    match &loaded {
        Some((weights, _)) => online.load("encoder.", weights)?,
        None => {
            // An encoder trained on labels stands for the one that a reader has.
            let most = images.labels.iter().max().map_or(0, |&most| most as usize);
            let classify = Linear::new(config.dim, most + 1, vb.pp("classify"))?;
            let mut optimizer = AdamW::new(&online.named(), (0.9, 0.999), 1e-8)?;
            epoch("train", images.len(), BATCH, |_, indices| {
                let labels = Tensor::from_iter(indices.iter().map(|&i| images.labels[i]), CPU)?;
                let logits = classify.forward(&model.forward(&batch(indices)?)?)?;
                let loss = candle_nn::loss::cross_entropy(&logits, &labels)?;
                optimizer.step(&loss.backward()?, 1e-3, 0.05)?;
                Ok(format!("cross-entropy {:.3}", loss.to_scalar::<f32>()?))
            })?;
        }
    }
    let evaluation = Evaluation::of(&data, &statistics, CPU);
    let measure = |name: &str| -> Result<()> {
        let score = evaluation.equivariance(&model)?[args.layer - 1];
        let knn = evaluation.accuracies(|x| Ok(model.forward(x)?))?;
        println!("{name} SER: equivariance {score:.3}");
        if let Some(moved) = pose_mean(&knn) {
            println!("  20-NN {:.1} % upright, {moved:.1} % rotated or flipped", knn[0]);
        }
        Ok(())
    };
    measure("before")?;

    // The frozen copy, and SER on an eighth of each batch.
    let frozen = Vit::new(&config, online.momentum_copy().builder(CPU).pp("encoder"))?;
    let layout = Layout {
        prefix: config.prefix(args.layer), // the CLS token, if it has joined
        ..Layout::default()
    };
    let ser_config = SerConfig { lambda: args.lambda, layout, ..SerConfig::default() };
    let (layer, grid) = (args.layer, TokenGrid::square(config.grid())?);
    let name = format!("block{layer}");
    let ser = Regularizer::new(name, grid, config.dim, ser_config, vb.pp("ser"))?;
    let part = Partition::new(BATCH, 0.125)?;
    let named = online.named();
    let mut optimizer = AdamW::new(&named, (0.9, 0.999), 1e-8)?;
    let rng = &mut StdRng::seed_from_u64(1);
    epoch("add SER", images.len(), BATCH, |step, indices| {
        let x = batch(indices)?;
        let distance = loss::cosine(&model.forward(&x)?, &frozen.forward(&x)?, 1e-12, None)?;
        let out = ser.forward(&part.split(&x)?.1, rng, |view| model.forward(view))?;
        if step == 0 {
            grad::assert_reaches(&out.unweighted, tapped(&named, &config, layer))?;
        }
        let loss = (&distance + &out.loss)?;
        optimizer.step(&loss.backward()?, 5e-4, 0.0)?;
        let [distance, ser] = [&distance, &out.unweighted].map(|x| x.to_scalar::<f32>());
        Ok(format!("distance {:.3}  SER {:.3}", distance?, ser?))
    })?;
    measure("after ")
}
