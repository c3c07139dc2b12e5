//! Runs as processes, on images that take no time.

#![allow(dead_code)]

#[cfg(unix)]
use std::os::unix::process::ExitStatusExt;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use candle_core::Device;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg_trainers::{
    data::Images,
    encoder::{Card, Network},
    eval::Subject,
    records::Record,
    run::log,
    settings::Method,
    vit::{Vit, VitConfig},
    weights::Weights,
};

/// The program of an example; `cargo test` builds them all.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap().join("examples");
    let program = folder.join(name);
    assert!(
        program.exists(),
        "{} is missing: run `cargo build --examples` in the profile of the test",
        program.display()
    );
    program
}

/// 48 images of 12x12 in two classes.
pub fn pictures(folder: &Path) -> PathBuf {
    images(folder, 48)
}

/// `n` images of 12x12 in two classes, as IDX files: squares and bars under noise.
pub fn images(folder: &Path, n: u32) -> PathBuf {
    let mut rng = StdRng::seed_from_u64(1);
    let side = 12usize;
    let header = |magic: u32, dims: &[u32]| -> Vec<u8> {
        let words = [&[magic], dims].concat();
        words.iter().flat_map(|w| w.to_be_bytes()).collect()
    };
    let mut pixels = header(0x803, &[n, side as u32, side as u32]);
    let mut labels = header(0x801, &[n]);
    for i in 0..n {
        let class = i % 2;
        labels.push(class as u8);
        for at in 0..side * side {
            let (row, col) = (at / side, at % side);
            let inside = (3..9).contains(&row) && (class == 0 || (5..7).contains(&col));
            pixels.push(if inside { 180 } else { 20 } + rng.random_range(0..40));
        }
    }
    let data = folder.join("data");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("train-images-idx3-ubyte"), pixels).unwrap();
    fs::write(data.join("train-labels-idx1-ubyte"), labels).unwrap();
    data
}

/// A short run on them.
pub fn command(method: Method, data: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(program(method.name()));
    command
        .args(["--epochs", "3", "--batch-size", "8", "--evaluate-every", "2", "--brief"])
        .args(["--ratio", "0.25", "--seed", "7"])
        .arg("--data")
        .arg(data)
        .arg("--out")
        .arg(out)
        .args(more)
        .env("RAYON_NUM_THREADS", "1");
    command
}

pub fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

#[track_caller]
pub fn succeeds(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
pub fn fails(output: &Output, parts: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it must fail: {parts:?}");
    for part in parts {
        assert!(said.contains(part), "expected {part:?} in: {said}");
    }
}

/// What a run has written that does not tell the time.
pub fn traces(out: &Path) -> (Vec<u8>, Vec<Record>) {
    let encoder = fs::read(out.join("encoder.safetensors")).unwrap();
    let mut records = log::read(&out.join("metrics.jsonl")).unwrap();
    for record in &mut records {
        if let Record::Epoch(epoch) = record {
            (epoch.images_per_s, epoch.waiting) = (0.0, 0.0);
            epoch.regularizer = None;
        }
    }
    (encoder, records)
}

/// Waits until the run has written `lines` lines of metrics, or has ended.
pub fn wait_for_lines(child: &mut Child, out: &Path, lines: usize) {
    let start = Instant::now();
    loop {
        let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= lines || child.try_wait().unwrap().is_some() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "the run hangs");
        sleep(Duration::from_millis(2));
    }
}

/// Runs it until it has written `lines` lines of metrics, and kills it.
#[track_caller]
pub fn kill_after(lines: usize, mut command: Command, out: &Path) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_lines(&mut child, out, lines);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    // A run that had ended before would prove nothing.
    #[cfg(unix)]
    assert_eq!(status.signal(), Some(9), "expected a kill, got {status}");
}

/// A small encoder's description, for these images.
pub fn card(images: &Images) -> Card {
    Card {
        vit: VitConfig { dim: 16, ..VitConfig::small(images, 2, false).unwrap() },
        statistics: images.statistics(),
        layer: 2,
        method: "moco_v3".to_string(),
        mode: "ser".to_string(),
        seed: 5,
        network: Network::Encoder,
    }
}

/// That encoder, untrained.
pub fn subject(images: &Images) -> Subject {
    let card = card(images);
    let weights = Weights::seeded(1);
    Vit::new(&card.vit, weights.builder(&Device::Cpu)).unwrap();
    let named = weights.named().into_iter().map(|(n, v)| (n, v.as_detached_tensor()));
    Subject::new("encoder", named, &card, &Device::Cpu).unwrap()
}
