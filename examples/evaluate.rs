//! Evaluates a trained encoder: a linear probe, nearest neighbors, robustness to transformations, corruptions and
//! perturbations, the objects that its tokens find, and whether tokens match between two poses of an image.
//!
//! Where a part does not measure all test images, it draws them by class, the same for all encoders. Moved images are continued
//! by black if their borders are dark, and otherwise by reflection; the tables and the JSON name the choice.
//!
//! ```text
//! cargo run --release --example evaluate -- runs/my-run                        # all parts, against the untrained encoder
//! cargo run --release --example evaluate -- a.safetensors --reference b.safetensors
//! cargo run --release --example evaluate -- runs/my-run --only probe,knn
//! ```
//!
//! Tables go to the terminal, and the same figures to `evaluation.json` beside the encoder.
//!
//! What it does not reproduce: the figures of the papers. Errors under corruption are relative to a reference that is named,
//! not to AlexNet; frost is drawn; and canvases with pasted objects stand in for detection on photographs.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use ser_reg_trainers::{
    cli,
    data::{self, Wanted},
    environment,
    eval::{self, Options, Part, Subject, dense, few, matching, subject},
    println,
    run::{file, lock::Lock},
    settings::check::count,
};

#[derive(Debug, Parser)]
struct Args {
    /// An exported encoder, a checkpoint, or the folder of a run.
    encoder: PathBuf,
    /// The reference of corruption errors and flips: another encoder or run, or `untrained`, the same encoder before its first
    /// step.
    #[arg(long, default_value = "untrained")]
    reference: String,
    /// Data as for the trainers [default: the data of the run; for an encoder without a run, the 10,000 images of Fashion-MNIST
    /// that come with the repository].
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Parts to measure: probe, knn, poses, corruptions, perturbations, dense, matching [default: all].
    #[arg(long, value_delimiter = ',')]
    only: Option<Vec<Part>>,
    /// Number of test images for corruptions, and at most for perturbations and matching; they are drawn by class [default: all,
    /// 200 and 200].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    images: Option<u32>,
    /// Fit the part probe on these numbers of labels a class too, each in 20 draws: 1,5,20.
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    labels_per_class: Vec<usize>,
    /// Use fewer images (500, or those of --images) and canvases, without rows for raw pixels and the reference.
    #[arg(long)]
    quick: bool,
    /// The block whose tokens the parts dense and matching read, counted from 1 [default: the one with the equivariance loss].
    #[arg(long, value_name = "LAYER")]
    dense_layer: Option<usize>,
    /// All random numbers follow from the seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// File for the figures [default: evaluation.json beside the encoder].
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Run all parts on few images.
    #[arg(long)]
    smoke: bool,
}

fn main() -> Result<()> {
    environment::prepare();
    // A worker of the pool runs it, so that no operation has to wake the pool from outside.
    rayon::scope(|_| run())
}

fn run() -> Result<()> {
    let start = Instant::now();
    let args = Args::parse();
    let device = cli::device(&args.device)?;
    let weights = subject::file(&args.encoder);
    let json = args.json.clone().unwrap_or_else(|| weights.with_file_name("evaluation.json"));
    let _lock = match weights.exists() {
        true => take(&json)?,
        false => None, // the encoder is refused where it is read
    };
    let encoder = Subject::load(&args.encoder, &device)?;
    let reference = match args.reference.as_str() {
        "untrained" => None,
        path => {
            let reference = Subject::load(path.as_ref(), &device);
            Some(reference.with_context(|| format!("--reference {path}"))?.named(path))
        }
    };
    if let Some(layer) = args.dense_layer {
        count("--dense-layer", 1..=encoder.card.vit.depth, layer)?;
    }
    let side = encoder.card.vit.side;
    // Small images come as they are, and are refused if the encoder is not for them; larger ones are scaled to it.
    let wanted = match side > 64 {
        true => Wanted::streamed(side),
        false => Wanted::default(),
    };
    let path = match &args.data {
        Some(path) => path.clone(),
        None => subject::data_of_run(&weights)?.unwrap_or_else(data::embedded),
    };
    let mut data = data::load(&path, &wanted)?;
    let mut options = options(&args);
    if args.smoke {
        data = data.take(1000, 200);
        let (train, test) = (data.train.len(), data.test.len());
        data.note += &format!("; smoke run on {train} and {test} of them, drawn by class");
        options.corrupted = Some(50);
        options.sequences = 10;
        (options.dense.train, options.dense.test) = (40, 20);
        options.matching.images = 20;
    }

    if !data.is_labelled() {
        options.parts = unlabelled(options.parts, &data.note)?;
    }

    if !options.few.is_empty() {
        ensure!(
            options.parts.contains(&Part::Probe),
            "--labels-per-class: expected with the part probe and images with classes, got the parts {}",
            names(&options.parts)
        );
        few::check("--labels-per-class", &options.few, &data.bank.labels)?;
    }

    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {eta} left")?);
    let mut report =
        eval::evaluate(&encoder, reference.as_ref(), &data.bank, &data.test, &options, &bar)?;
    bar.finish_and_clear();
    report.encoder = weights.display().to_string();
    report.data = data.note;
    report.print();

    let text = serde_json::to_string_pretty(&report)? + "\n";
    file::write(&json, text.as_bytes())?;
    println!("\nwritten to {} after {:.0} s", json.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// The parts that need no labels; it says which ones do.
fn unlabelled(parts: Vec<Part>, note: &str) -> Result<Vec<Part>> {
    let (skipped, left): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(|p| p.needs_labels());
    let names = names(&skipped);
    ensure!(
        !left.is_empty(),
        "--only: expected parts that need no labels (dense), got {names}; {note}"
    );
    if !skipped.is_empty() {
        println!("skipped, because the images have no labels: {names}");
    }
    Ok(left)
}

fn names(parts: &[Part]) -> String {
    parts.iter().map(|p| p.name()).collect::<Vec<_>>().join(", ")
}

/// Checks that the figures can be written, and takes the folder if it is one of a run: a training would replace the encoder.
fn take(json: &Path) -> Result<Option<Lock>> {
    file::check_writable(json, "--json")?;
    let folder = file::folder(json);
    let is_run = file::exists(&folder.join("config.json"))?;
    is_run.then(|| Lock::take(folder, "--json")).transpose()
}

fn options(args: &Args) -> Options {
    let images = args.images.map(|n| n as usize);
    let default = match args.quick {
        true => Options::quick(images.unwrap_or(500)),
        false => Options::default(),
    };
    Options {
        parts: args.only.clone().unwrap_or(default.parts),
        few: args.labels_per_class.clone(),
        corrupted: images.or(default.corrupted),
        sequences: images.map_or(default.sequences, |n| n.min(default.sequences)),
        dense: dense::Options { layer: args.dense_layer, ..default.dense },
        matching: matching::Options {
            images: images.map_or(default.matching.images, |n| n.min(default.matching.images)),
            layer: args.dense_layer,
        },
        seed: args.seed,
        ..default
    }
}
