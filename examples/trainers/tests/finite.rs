//! A value that is NaN or infinite ends an evaluation or a run with an error that says where it came from.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use candle_core::{Device, Tensor};
use common::card;
use indicatif::ProgressBar;
use ser_reg_trainers::{
    data::Images,
    encoder::{self, Card},
    eval::{self, Evaluation, Options, Part, Subject, dense, matching, probe::Probe},
    finite,
    knn::Bank,
    vit::Vit,
    weights::Weights,
};

const CPU: Device = Device::Cpu;

/// Images of 12x12 in two classes: bright above, and bright below.
fn images(n: usize) -> Images {
    let mut images = Images { channels: 1, side: 12, ..Default::default() };
    for i in 0..n {
        let class = i % 2;
        let pixel = |p: usize| if p / 72 == class { 150 + (p * (i + 3) % 80) as u8 } else { 3 };
        images.pixels.extend((0..144).map(pixel));
        images.labels.push(class as u32);
    }
    images
}

/// The weights of an untrained encoder; the first value of `name` becomes `value`.
fn weights(card: &Card, name: &str, value: f32) -> Vec<(String, Tensor)> {
    let weights = Weights::seeded(1);
    Vit::new(&card.vit, weights.builder(&CPU)).unwrap();
    let named = weights.named().into_iter().map(|(n, v)| {
        let mut values: Vec<f32> = v.flatten_all().unwrap().to_vec1().unwrap();
        if n == name {
            values[0] = value;
        }
        (n, Tensor::from_vec(values, v.shape(), &CPU).unwrap())
    });
    named.collect()
}

fn only(part: Part) -> Options {
    Options {
        parts: vec![part],
        corrupted: Some(4),
        sequences: 2,
        dense: dense::Options { train: 4, test: 2, side: Some(24), layer: Some(4) },
        matching: matching::Options { images: 4, layer: Some(4) },
        floors: false,
        ..Options::default()
    }
}

#[test]
fn no_part_scores_an_encoder_with_a_nan() {
    let (train, test) = (images(40), images(12));
    let card = card(&train);
    for (name, value) in
        [("block3.qkv.weight", f32::NAN), ("patch.bias", f32::INFINITY), ("norm.scale", f32::NAN)]
    {
        let subject = Subject::new("encoder", weights(&card, name, value), &card, &CPU).unwrap();
        for part in Options::default().parts {
            // The last normalization comes after all blocks, whose tokens the dense part reads.
            if [Part::Dense, Part::Matching].contains(&part) && name.starts_with("norm.") {
                continue;
            }
            let bar = ProgressBar::hidden();
            let report = eval::evaluate(&subject, None, &train, &test, &only(part), &bar);
            let error = format!("{:#}", report.expect_err(&format!("{part:?} {name}")));
            let expected = [format!("values of the weight {name}"), "encoder: features".into()];
            assert!(expected.iter().all(|e| error.contains(e)), "{part:?}: {error}");
        }
    }
    // A reference is no better.
    let good = Subject::new("good", weights(&card, "", 0.0), &card, &CPU).unwrap();
    let bad = weights(&card, "block1.up.bias", f32::NAN);
    let bad = Subject::new("reference", bad, &card, &CPU).unwrap();
    let options = only(Part::Corruptions);
    let report = eval::evaluate(&good, Some(&bad), &train, &test, &options, &ProgressBar::hidden());
    let error = format!("{:#}", report.unwrap_err());
    assert!(error.contains("reference: features") && error.contains("block1.up.bias"), "{error}");
}

/// Finite weights whose products overflow: the block is named in which they do.
#[test]
fn an_overflow_is_found_in_its_block() {
    let images = images(6);
    let card = card(&images);
    let mut weights = weights(&card, "", 0.0);
    for (name, tensor) in &mut weights {
        if name.starts_with("block3.down.") || name.starts_with("block3.up.") {
            *tensor = (tensor.ones_like().unwrap() * 1e14).unwrap();
        }
    }
    let subject = Subject::new("encoder", weights, &card, &CPU).unwrap();
    let x = images.normalized(0..6, &card.statistics, &CPU).unwrap();
    let error = |error: anyhow::Error| format!("{error:#}");
    // Tokens, which no normalization hides.
    let tokens = error(subject.tokens(&subject.vit, &x, 3).unwrap_err());
    assert!(tokens.contains("in the output of block 3, although the weights"), "{tokens}");
    assert!(subject.tokens(&subject.vit, &x, 2).is_ok());
    // Of features the last normalization makes zeros.
    let features = error(subject.encode(&x).unwrap_err());
    assert!(features.contains("in the output of block 3, although the weights"), "{features}");
    // Images that are no numbers themselves.
    let dark = Card { statistics: vec![(0.5, 0.0)], ..card };
    let subject = Subject::new("encoder", self::weights(&dark, "", 0.0), &dark, &CPU).unwrap();
    let x = images.normalized(0..6, &dark.statistics, &CPU).unwrap();
    let encoded = error(subject.encode(&x).unwrap_err());
    assert!(encoded.contains("The normalized images have"), "{encoded}");
    // Between epochs too.
    let data =
        Evaluation { bank: &images, test: &images, statistics: &dark.statistics, device: &CPU };
    assert!(error(data.poses(|x| Ok(x.flatten_from(1)?)).unwrap_err()).contains("features: "));
    let tokens = error(data.equivariance(&subject.vit).unwrap_err());
    assert!(tokens.contains("the tokens of block1: expected finite values"), "{tokens}");
}

#[test]
fn classifiers_refuse_features_that_are_not_finite() {
    let rows = |bad: f32| {
        let mut rows: Vec<f32> = (0..40 * 3).map(|i| (i * 7 % 11) as f32).collect();
        rows[50] = bad;
        Tensor::from_vec(rows, (40, 3), &CPU).unwrap()
    };
    let labels: Vec<u32> = (0..40).map(|i| i % 2).collect();
    let good = rows(0.0);
    let (bank, probe) = (Bank::new(&good, &labels).unwrap(), Probe::fit(&good, &labels).unwrap());
    // The square of the last one is infinite.
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        let bad = rows(bad);
        let errors = [
            Bank::new(&bad, &labels).err(),
            bank.predict(&bad).err(),
            bank.accuracy(&bad, &labels).err(),
            Probe::fit(&bad, &labels).err(),
            Probe::with_l2(&bad, &labels, 1e-3).err(),
            probe.predict(&bad).err(),
            probe.logits(&bad).err(),
            probe.probabilities(&bad).err(),
        ];
        for (i, error) in errors.into_iter().enumerate() {
            let error = error.unwrap_or_else(|| panic!("{i}")).to_string();
            assert!(error.contains("expected finite values, got 1 of 120"), "{error}");
        }
    }
}

#[test]
fn weights_are_named_in_the_order_of_the_forward_pass() {
    let bad = Tensor::new(&[1f32, f32::NAN], &CPU).unwrap();
    let good = Tensor::new(&[1f32, -2.0], &CPU).unwrap();
    let order = [
        "encoder.patch.weight",
        "encoder.cls",
        "encoder.block2.norm1.scale",
        "encoder.block2.qkv.weight",
        "encoder.block2.down.bias",
        "encoder.block10.norm1.scale",
        "encoder.norm.scale",
    ];
    for first in 0..order.len() {
        let tensors = order.iter().enumerate().rev();
        let weights = tensors.map(|(i, name)| (*name, if i < first { &good } else { &bad }));
        let error = finite::ensure_weights(weights).unwrap_err().to_string();
        assert!(error.contains(&format!("the weight {}: ", order[first])), "{error}");
    }
    assert!(finite::ensure_weights(order.map(|name| (name, &good))).is_ok());
}

// --- the programs ---------------------------------------------------------------------------------------------------

/// The program of an example; `cargo test` builds them all.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let mut command = Command::new(test.ancestors().nth(2).unwrap().join("examples").join(name));
    command.env("RAYON_NUM_THREADS", "1");
    command
}

/// 40 of [`images`] as IDX files.
fn data(folder: &Path) -> PathBuf {
    let images = images(40);
    let header = |magic: u32, dims: &[u32]| -> Vec<u8> {
        [&[magic], dims].concat().iter().flat_map(|word| word.to_be_bytes()).collect()
    };
    let data = folder.join("data");
    fs::create_dir_all(&data).unwrap();
    let pixels = [header(0x803, &[40, 12, 12]), images.pixels].concat();
    fs::write(data.join("train-images-idx3-ubyte"), pixels).unwrap();
    let labels = images.labels.iter().map(|l| *l as u8).collect();
    fs::write(data.join("train-labels-idx1-ubyte"), [header(0x801, &[40]), labels].concat())
        .unwrap();
    data
}

#[track_caller]
fn fails(output: &Output, parts: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it must fail: {parts:?}");
    for part in parts {
        assert!(said.contains(part), "expected {part:?} in: {said}");
    }
}

/// One step of a rate that ruins the weights: no loss is computed with them any more.
#[test]
fn the_last_step_of_a_run_may_not_ruin_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    for rate in ["1e30", "3e38"] {
        for every in ["0", "1"] {
            for method in ["moco_v3", "dino", "barlow_twins"] {
                let out = folder.path().join(format!("{method}-{rate}-{every}"));
                let output = program(method)
                    .args(["--epochs", "1", "--batch-size", "32", "--ratio", "0.25", "--brief"])
                    .args(["--learning-rate", rate, "--warm-up", "0", "--evaluate-every", every])
                    .args(["--data".as_ref(), data.as_os_str(), "--out".as_ref(), out.as_os_str()])
                    .output()
                    .unwrap();
                fails(&output, &["after 1 steps", "no good checkpoint", "the weight encoder."]);
                for file in ["result.json", "encoder.safetensors", "checkpoint.safetensors"] {
                    assert!(!out.join(file).exists(), "{method} {rate} {every}: {file}");
                }
            }
        }
    }
}

#[test]
fn evaluate_refuses_an_encoder_with_a_nan_and_leaves_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let card = card(&images(40));
    let path = folder.path().join("encoder.safetensors");
    let weights = weights(&card, "block2.out.weight", f32::NAN);
    fs::write(&path, encoder::to_bytes(&weights, &card).unwrap()).unwrap();
    let json = folder.path().join("evaluation.json");
    fs::write(&json, "before").unwrap();
    let output = program("evaluate").arg(&path).arg("--data").arg(&data).output().unwrap();
    fails(&output, &["encoder.safetensors", "the weight block2.out.weight: expected finite"]);
    assert_eq!(fs::read_to_string(&json).unwrap(), "before");
    // Nor does a run begin with it.
    let out = folder.path().join("run");
    let mut run = program("moco_v3");
    run.arg("--init").arg(&path).arg("--data").arg(&data).arg("--out").arg(&out);
    fails(&run.output().unwrap(), &["the weight block2.out.weight: expected finite"]);
    assert!(!out.join("config.json").exists());
}
