//! The trainers as programs: stopped, killed, resumed, and given bad input.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use clap::Parser;
use common::{command, fails, kill_after, pictures, program, run, succeeds, traces};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg_trainers::{
    cli::Args,
    data,
    encoder::{self, Network},
    eval::{Evaluation, Report},
    overhead, reach,
    records::{Balanced, Record, Step},
    run::{file, finish::Outcome, log},
    settings::{Method, Settings},
    vit::Vit,
};
use tempfile::TempDir;

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for (method, images) in [
        (Method::MocoV3, "batch"),
        (Method::Dino, "batch"),
        (Method::BarlowTwins, "batch"),
        (Method::MocoV3, "own"),
    ] {
        // Long enough for the kills to come before its end.
        let long = ["--epochs", "12", "--ser-images", images];
        let name = format!("{}-{images}", method.name());
        let whole = folder.path().join(format!("{name}-whole"));
        succeeds(&run(&mut command(method, &data, &whole, &long)));
        let killed = folder.path().join(format!("{name}-killed"));
        let more = [&long[..], &["--checkpoint-every", "2", "--resume"]].concat();
        // At three moments: before the first checkpoint, between two, and later.
        for lines in [1, 5, 9] {
            kill_after(lines, command(method, &data, &killed, &more), &killed);
        }
        succeeds(&run(&mut command(method, &data, &killed, &more)));
        let (expected, got) = (traces(&whole), traces(&killed));
        assert_eq!(expected.1, got.1, "{name}: metrics");
        assert!(expected.0 == got.0, "{name}: encoder");
        assert!(killed.join("report.html").exists());
    }
}

/// SER on images of its own: it learns, the base method keeps its whole batch, and it runs for all three methods.
#[test]
fn a_run_with_images_of_its_own() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for method in Method::ALL {
        let at = |name: &str| folder.path().join(format!("{}-{name}", method.name()));
        let own = ["--ser-images", "own"];
        let said = succeeds(&run(&mut command(method, &data, &at("own"), &own)));
        assert!(said.contains("measured overhead 1."), "{said}");
        let steps = |name: &str| -> Vec<Step> {
            let records = traces(&at(name)).1.into_iter();
            let step = |record| match record {
                Record::Step(step) => Some(step),
                _ => None,
            };
            records.filter_map(step).collect()
        };
        let of_own = steps("own");
        assert!(of_own.iter().all(|s| s.equivariance.is_some_and(f32::is_finite)));
        // The first base loss is that of a run without SER: the same crops, and no rotated view among them.
        let control = [&own[..], &["--lambda", "0"]].concat();
        succeeds(&run(&mut command(method, &data, &at("control"), &control)));
        let of_control = steps("control");
        assert_eq!(of_own[0].invariance, of_control[0].invariance);
        // The rate of the first step is zero, so the weights differ from the third step on.
        assert_ne!(of_own[2].invariance, of_control[2].invariance);
        assert!(of_control.iter().all(|s| s.equivariance.is_none()));
        // With shared views it is another one.
        succeeds(&run(&mut command(method, &data, &at("shared"), &[])));
        assert_ne!(of_own[0].invariance, steps("shared")[0].invariance);
    }
}

/// `--init` starts from the encoder of another run, and the run keeps a note of it.
#[test]
fn a_run_starts_from_an_encoder() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let first = folder.path().join("first");
    succeeds(&run(&mut command(Method::MocoV3, &data, &first, &["--baseline"])));
    let file = first.join("encoder.safetensors");
    let init = ["--init", file.to_str().unwrap()];
    // A rate of zero leaves it as it was, whatever the method, and so does the placement of its CLS token.
    let second = folder.path().join("second");
    let still = [&init[..], &["--learning-rate", "0"]].concat();
    succeeds(&run(&mut command(Method::BarlowTwins, &data, &second, &still)));
    let x = Tensor::rand(0f32, 1., (2, 1, 12, 12), &Device::Cpu).unwrap();
    let output = |folder: &Path| {
        let (vit, card) = encoder::load(&folder.join("encoder.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(card.vit.cls_after, 0);
        vit.forward(&x).unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(output(&first), output(&second));
    let config = fs::read_to_string(second.join("config.json")).unwrap();
    assert!(config.contains("\"init\""), "{config}");
    fails(
        &run(&mut command(
            Method::BarlowTwins,
            &data,
            &second,
            &["--learning-rate", "0", "--resume"],
        )),
        &["init: ", "now null"],
    );
    // Another encoder is refused, and nothing of the old run is lost.
    let before = traces(&second);
    let path = colorful(folder.path());
    let other = [&init[..], &["--data", path.to_str().unwrap()]].concat();
    fails(
        &run(&mut command(Method::BarlowTwins, &data, &second, &other)),
        &["--init", "channels: 1, now 3"],
    );
    let missing = ["--init", "/nowhere.safetensors"];
    fails(&run(&mut command(Method::MocoV3, &data, &second, &missing)), &["/nowhere.safetensors"]);
    assert_eq!(before.1, traces(&second).1);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::Dino, &data, &out, &[])));
    let path = out.join("checkpoint.safetensors");
    let good = fs::read(&path).unwrap();
    let resumed = |more: &[&str]| {
        let more = [&["--resume"], more].concat();
        run(&mut command(Method::Dino, &data, &out, &more))
    };

    fails(
        &resumed(&["--lambda", "0.5", "--layer", "3"]),
        &["ser.loss.lambda: 1.0, now 0.5", "ser.layer: 2, now 3", "checkpoint.safetensors"],
    );
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    fails(&resumed(&[]), &["truncated", "checkpoint.safetensors"]);
    fs::write(&path, &good[..4]).unwrap();
    fails(&resumed(&[]), &["truncated"]);

    // The header is text: a version, and a shape, that were never written.
    let edited = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
    };
    edited(r#""version":"2""#, r#""version":"0""#);
    fails(&resumed(&[]), &["expected a checkpoint of version 2, got 0"]);
    edited("online/encoder.cls", "online/encoder.clx");
    fails(&resumed(&[]), &["online/encoder.cls"]);
    // Sixty-four numbers in another arrangement.
    edited(r#""shape":[1,1,64]"#, r#""shape":[64,1,1]"#);
    fails(&resumed(&[]), &["expected [1, 1, 64]", "[64, 1, 1]"]);

    // Untouched, it is taken up: nothing is left to do, and the run ends as it did.
    fs::write(&path, &good).unwrap();
    let before = traces(&out);
    succeeds(&resumed(&[]));
    assert_eq!(before.1, traces(&out).1);
    assert!(before.0 == traces(&out).0);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for method in Method::ALL {
        let out = folder.path().join(method.name());
        let wild = ["--learning-rate", "1e30", "--warm-up", "0.5"];
        // The first step has a rate of zero, so the weights after it are good; those after the second are not.
        let parts = [
            "step 2: the loss is ",
            "the base method's is ",
            "the equivariance loss ",
            "There is no good checkpoint yet",
        ];
        fails(&run(&mut command(method, &data, &out, &wild)), &parts);
        // Where a checkpoint is due, the weights are looked at before they are saved.
        let more = [&wild[..], &["--checkpoint-every", "1"]].concat();
        let parts = [
            "after 2 steps. The last good checkpoint is of step 1: ",
            "the weight encoder.patch.bias: expected finite values",
        ];
        fails(&run(&mut command(method, &data, &out, &more)), &parts);
        // And that is the one which is there: its weights are finite, and it is taken up.
        let output = run(&mut command(method, &data, &out, &[&more[..], &["--resume"]].concat()));
        assert!(String::from_utf8_lossy(&output.stdout).contains("resumed after 1 of"));
        fails(&output, &parts);
        let files = fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name());
        let checkpoints = files.filter(|f| f.to_string_lossy().contains("checkpoint"));
        assert_eq!(checkpoints.count(), 1, "{}", method.name());
    }
}

/// The rate is written down and comes back as it was, whatever its digits.
#[test]
fn settings_come_back_as_they_were() {
    for method in Method::ALL {
        for batch_size in 2..600 {
            let args = Args::parse_from([
                "trainer",
                "--preset",
                "imagenet-vit-s16",
                "--ratio",
                "1",
                "--batch-size",
                &batch_size.to_string(),
            ]);
            let settings = Settings::new(method, &args).unwrap();
            let text = serde_json::to_string(&settings).unwrap();
            let back: serde_json::Value = serde_json::from_str(&text).unwrap();
            let now = serde_json::to_value(&settings).unwrap();
            let differences = Settings::differences(&back, &now);
            assert!(differences.is_empty(), "{differences:?}");
        }
    }
}

/// The schedules of the paper's preset, from their formulas.
#[test]
fn schedules_of_the_paper_preset() {
    let (epochs, steps) = (100, 1000);
    let cosine = |from: f64, to: f64, t: f64| {
        to + 0.5 * (from - to) * (1.0 + (std::f64::consts::PI * t).cos())
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{a}, not {b}");
    for method in Method::ALL {
        let args = Args::parse_from(["trainer", "--preset", "imagenet-vit-s16"]);
        let settings = Settings::new(method, &args).unwrap();
        assert_eq!(settings.epochs, epochs);
        let schedules = settings.schedules(steps).unwrap();
        let (peak, last) = match method {
            Method::MocoV3 => (2.4e-3, 0.0),
            Method::Dino => (8e-4, 1e-5),
            Method::BarlowTwins => (8e-4, 8e-7),
        };
        let rise = |t: usize| match method {
            // numpy.linspace(0, peak, 100)
            Method::Dino => peak * t as f64 / 99.0,
            _ => peak * t as f64 / 100.0,
        };
        for t in [0, 1, 50, 99] {
            near(schedules.at(t).learning_rate, rise(t));
        }
        for t in [100, 101, 550, 999] {
            let part = (t - 100) as f64 / 900.0;
            near(schedules.at(t).learning_rate, cosine(peak, last, part));
        }
        let part = 0.4;
        let decay = match method {
            Method::Dino => cosine(0.04, 0.4, part),
            _ => 0.1,
        };
        near(schedules.at(400).weight_decay, decay);
        let momentum = match method {
            Method::MocoV3 => Some(cosine(0.99, 1.0, part)),
            Method::Dino => Some(cosine(0.982, 1.0, part)),
            Method::BarlowTwins => None,
        };
        match (schedules.at(400).momentum, momentum) {
            (Some(a), Some(b)) => near(a, b),
            (a, b) => assert_eq!(a, b),
        }
    }
}

/// The regularizer sees all of a batch, in views of one or two sizes; as few images as possible; the last block.
#[test]
fn the_extremes_of_a_partition_train() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for (i, more) in [
        vec!["--ratio", "1"],
        vec!["--ratio", "1", "--scale", "0.5,2"],
        vec!["--ratio", "1", "--batch-size", "2", "--layer", "4"],
        vec!["--ratio", "0.25", "--crops", "0.5,1", "--negatives", "other-view"],
        // Crops that all but never meet by chance: the run must not end for want of an overlap.
        vec!["--crops", "0.01,0.02", "--group", "trivial"],
        vec!["--rotation", "-180,180", "--translation", "-0.9,0.9", "--shear", "-0.2,0.2"],
        vec!["--filter", "fourier", "--scale", "0.5,2"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = folder.path().join(i.to_string());
        let more = [&["--epochs", "1"], &more[..]].concat();
        succeeds(&run(&mut command(Method::ALL[i % 3], &data, &out, &more)));
    }
}

#[test]
fn a_finished_run_keeps_its_figures() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let said = succeeds(&run(&mut command(Method::BarlowTwins, &data, &out, &[])));
    for part in ["predicted overhead 1.", "measured overhead 1.", "overhead_measured=1."] {
        assert!(said.contains(part), "expected {part:?} in: {said}");
    }
    let result = || -> Outcome {
        serde_json::from_slice(&fs::read(out.join("result.json")).unwrap()).unwrap()
    };
    let first = result();
    assert!(first.images_per_s > 0.0);
    let again = || run(&mut command(Method::BarlowTwins, &data, &out, &["--resume"]));
    succeeds(&again());
    let second = result();
    assert_eq!(first.images_per_s, second.images_per_s);
    assert_eq!(first.waiting, second.waiting);
    assert!(first.overhead_predicted.is_some_and(|x| x > 1.0));
    assert!(first.overhead_measured.is_some_and(|x| x > 1.0));
    assert_eq!(first.overhead_predicted, second.overhead_predicted);
    assert_eq!(first.overhead_measured, second.overhead_measured);
    // A part of the metrics would give other figures.
    let before = fs::read(out.join("result.json")).unwrap();
    let path = out.join("metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    let without_a_step: Vec<&str> =
        whole.lines().filter(|line| !line.contains("\"step\":5,")).collect();
    assert_eq!(without_a_step.len(), whole.lines().count() - 1);
    fs::write(&path, without_a_step.join("\n") + "\n").unwrap();
    fails(&again(), &["--resume: expected records of the 12 steps", "got 11", "metrics.jsonl"]);
    fs::remove_file(&path).unwrap();
    fails(&again(), &["--resume: expected records of the 12 steps", "got 0", "metrics.jsonl"]);
    assert!(!path.exists() && fs::read(out.join("result.json")).unwrap() == before);
}

#[test]
fn a_run_without_regularizer_has_no_overhead() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for (i, more) in [&["--lambda", "0"][..], &["--baseline"]].iter().enumerate() {
        let out = folder.path().join(i.to_string());
        let said = succeeds(&run(&mut command(Method::MocoV3, &data, &out, more)));
        assert!(!said.contains("overhead 1"), "{said}");
        let result = fs::read(out.join("result.json")).unwrap();
        let result: Outcome = serde_json::from_slice(&result).unwrap();
        assert_eq!((result.overhead_predicted, result.overhead_measured), (None, None));
    }
}

/// The count of the paper's preset, with everything written out: 2,048 images, of which the regularizer has 20 (41 for DINO's
/// fraction of 0.02).
#[test]
fn the_predicted_overhead_of_the_paper_preset() {
    let folder = TempDir::new().unwrap();
    let images = data::load(&pictures(folder.path()), &data::Wanted::default()).unwrap();
    for (method, ratio, maps, products) in [
        (Method::MocoV3, "0.01", 2.0 * 3.0 + 2.0, 5.0),
        (Method::Dino, "0.02", 2.0 * 3.0 + 2.0, 5.0),
        (Method::BarlowTwins, "0.01", 2.0 * 3.0, 6.0),
    ] {
        let args = ["trainer", "--preset", "imagenet-vit-s16", "--ratio", ratio];
        let settings = Settings::new(method, &Args::parse_from(args)).unwrap();
        let vit = settings.vit(&images.bank).unwrap();
        let cost = overhead::predicted(&settings, &vit).unwrap().unwrap();
        let tokens = if ratio == "0.02" { 41.0 } else { 20.0 } * 196.0;
        assert_eq!(cost.ser_head, maps * tokens * (384.0 * 512.0 + 512.0 * 512.0));
        assert_eq!(cost.contrast, 2.0 * products * tokens * tokens * 512.0);
        let passes = if method == Method::BarlowTwins { 6.0 } else { 8.0 };
        let image = cost.encoder / passes / 2048.0;
        // The last block computes its CLS token only, and three go without it: below 4.6 GMAC.
        assert!((4.2e9..4.4e9).contains(&image), "{image:e}");
        let heads = match method {
            Method::MocoV3 => {
                let projector = 384. * 4096. + 4096. * 4096. + 4096. * 256.;
                8. * projector + 6. * 2. * 4096. * 256. + 4. * 2048. * 256.
            }
            Method::Dino => 8. * (384. * 2048. + 2048. * 2048. + 2048. * 256. + 256. * 65536.),
            Method::BarlowTwins => 6. * (384. * 8192. + 2. * 8192. * 8192.) + 3. * 8192. * 8192.,
        };
        assert_eq!(cost.heads, 2048.0 * heads);
    }
    for more in [&["--lambda", "0"][..], &["--baseline"]] {
        let args = [&["trainer", "--preset", "imagenet-vit-s16"], more].concat();
        let settings = Settings::new(Method::MocoV3, &Args::parse_from(args)).unwrap();
        let vit = settings.vit(&images.bank).unwrap();
        assert!(overhead::predicted(&settings, &vit).unwrap().is_none());
    }
}

#[test]
fn a_run_is_evaluated_on_its_own_pictures() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    let evaluate = |more: &[&str]| {
        let mut command = Command::new(program("evaluate"));
        command.arg(&out).args(["--only", "knn"]).args(more);
        run(&mut command)
    };
    let said = succeeds(&evaluate(&[]));
    assert!(said.contains("20-NN"), "{said}");
    let report = fs::read_to_string(out.join("evaluation.json")).unwrap();
    let report: Report = serde_json::from_str(&report).unwrap();
    assert_eq!(report.pictures.train + report.pictures.test, 48);
    // Others have to fit.
    fails(&evaluate(&["--data", data::embedded().to_str().unwrap()]), &["12", "28"]);
}

#[test]
fn a_smoke_run_that_learns_nothing_fails() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let mut frozen = command(
        Method::Dino,
        &data,
        &folder.path().join("run"),
        &["--smoke", "--learning-rate", "0"],
    );
    fails(&run(&mut frozen), &["the base method's loss did not fall"]);
}

#[test]
fn impossible_options_are_refused() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    for (options, parts) in [
        (vec!["--layer", "9"], vec!["--layer: expected one of the 4 blocks, got block 9"]),
        (vec!["--layer", "0"], vec!["expected one of the 4 blocks, got block 0"]),
        (vec!["--batch-size", "100"], vec!["expected at most 38", "got 100"]),
        (vec!["--batch-size", "1"], vec!["--batch-size"]),
        (vec!["--epochs", "0"], vec!["--epochs"]),
        (vec!["--lambda", "-1"], vec!["--lambda: "]),
        (vec!["--temperature", "0"], vec!["--temperature: "]),
        (vec!["--scale", "1.3,0.7"], vec!["--scale: ", "area", "got 1.3,0.7"]),
        (vec!["--crops", "0.5"], vec!["two numbers"]),
        (vec!["--crops", "0,0.5"], vec!["--crops: ", "<= LO", "got 0,0.5"]),
        (vec!["--rotation", "30,-30"], vec!["--rotation: ", "got 30,-30"]),
        (vec!["--translation", "-1,1"], vec!["--translation: ", "got -1,1"]),
        (vec!["--min-overlap", "2"], vec!["--min-overlap: ", "from 0 to 1"]),
        (
            vec!["--filter", "fourier", "--crops", "0.5,1"],
            vec!["--filter: expected another filter than Fourier"],
        ),
        (vec!["--learning-rate", "nan"], vec!["--learning-rate"]),
        (vec!["--momentum", "1.5"], vec!["--momentum"]),
        (vec!["--device", "abacus"], vec!["abacus"]),
        (vec!["--workers", "0"], vec!["worker"]),
        (vec!["--addon-layer", "1"], vec!["--addon"]),
        (vec!["--balance-every", "0"], vec!["--balance-every"]),
        (vec!["--balance-target", "-1"], vec!["--balance-target", "above 0"]),
        (vec!["--balance-target", "inf"], vec!["--balance-target", "inf"]),
        (vec!["--lambda-end", "-1"], vec!["--lambda-end", "-1"]),
        (vec!["--lambda-end", "0", "--baseline"], vec!["--lambda-end", "--baseline"]),
        (
            vec!["--lambda-end", "0", "--balance-target", "0.1"],
            vec!["--lambda-end", "--balance-target"],
        ),
        (vec!["--balance-every", "2", "--baseline"], vec!["--balance-every", "no second gradient"]),
        (
            vec!["--balance-target", "0.1", "--lambda", "0"],
            vec!["--balance-target", "no second gradient"],
        ),
        (
            vec!["--addon", "equimod", "--addon-layer", "5"],
            vec!["--addon-layer", "expected one of the 4 blocks, got block 5"],
        ),
        (vec!["--addon", "augself", "--addon-lambda", "nan"], vec!["--addon-lambda", "NaN"]),
        (
            vec!["--addon", "equimod", "--ratio", "1"],
            vec!["at least 2 images", "beside those of the regularizer", "0 of 8"],
        ),
        (vec!["--addon", "stl", "--batch-size", "9"], vec!["even number", "got 7", "of 9"]),
        (
            vec!["--addon", "care"],
            vec!["--addon care", "at least 2 samples in each of 8", "a batch of 6"],
        ),
        (vec!["--preset", "imagenet-vit-s16", "--data", "/nowhere"], vec!["/nowhere"]),
    ] {
        fails(&run(&mut command(Method::MocoV3, &data, &out, &options)), &parts);
    }
}

/// Each add-on at either layer, on its own and beside SER; what it computed is written down.
#[test]
fn every_add_on_trains_at_either_layer() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for addon in ["equimod", "augself", "essl", "stl", "care"] {
        for (layer, more) in [("4", "--baseline"), ("1", "--baseline"), ("3", "--brief")] {
            let out = folder.path().join(format!("{addon}{layer}"));
            let options = ["--addon", addon, "--addon-layer", layer, more];
            let short = ["--epochs", "1", "--batch-size", "24", "--evaluate-every", "1"];
            let options = [&options[..], &short].concat();
            let output = run(&mut command(Method::MocoV3, &data, &out, &options));
            let said = succeeds(&output);
            assert!(said.contains(&format!("{addon}{layer}")), "{said}");
            let records = traces(&out).1;
            let losses = records.iter().filter_map(|record| match record {
                Record::Step(step) => Some(step.addon.expect("its loss")),
                _ => None,
            });
            let losses: Vec<_> = losses.collect();
            assert!(!losses.is_empty() && losses.iter().all(|loss| loss.is_finite()));
            let figures = records.iter().filter_map(|record| match record {
                Record::Epoch(epoch) if epoch.epoch > 0 => Some(epoch.extra.len()),
                _ => None,
            });
            assert!(figures.sum::<usize>() > 0, "{addon}: figures of its own");
        }
    }
    let out = folder.path().join("other");
    let other = run(&mut command(Method::Dino, &data, &out, &["--addon", "care"]));
    fails(&other, &["--addon: expected with moco_v3, got care with dino"]);
}

#[test]
fn a_run_with_an_add_on_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let addon = ["--addon", "equimod", "--addon-layer", "1", "--epochs", "12"];
    let whole = folder.path().join("whole");
    succeeds(&run(&mut command(Method::MocoV3, &data, &whole, &addon)));
    let killed = folder.path().join("killed");
    let more = [&addon[..], &["--checkpoint-every", "2", "--resume"]].concat();
    kill_after(5, command(Method::MocoV3, &data, &killed, &more), &killed);
    // Another add-on, another layer, another weight or none: not this run.
    for (options, parts) in [
        (vec!["--addon", "equimod", "--addon-layer", "2"], vec!["addon.layer: 1, now 2"]),
        (
            vec!["--addon", "augself", "--addon-layer", "1"],
            vec!["addon.name: \"equimod\", now \"augself\""],
        ),
        ([&addon[..], &["--addon-lambda", "0.5"]].concat(), vec!["addon.lambda: 1.0, now 0.5"]),
        (vec![], vec!["addon: ", "now null"]),
    ] {
        let options = [&options[..], &["--resume"]].concat();
        fails(&run(&mut command(Method::MocoV3, &data, &killed, &options)), &parts);
    }
    succeeds(&run(&mut command(Method::MocoV3, &data, &killed, &more)));
    let (expected, got) = (traces(&whole), traces(&killed));
    assert_eq!(expected.1, got.1, "metrics");
    assert!(expected.0 == got.0, "encoder");
}

fn balances(records: &[Record]) -> Vec<&Balanced> {
    let balances = records.iter().filter_map(|record| match record {
        Record::Balance(balance) => Some(balance),
        _ => None,
    });
    balances.collect()
}

/// The second and third backward pass over the graph of a step leave its own gradients alone.
#[test]
fn comparing_gradients_changes_no_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    for method in Method::ALL {
        let [plain, measured] = ["plain", "measured"]
            .map(|name| folder.path().join(format!("{}-{name}", method.name())));
        succeeds(&run(&mut command(method, &data, &plain, &[])));
        let every = ["--balance-every", "3"];
        let said = succeeds(&run(&mut command(method, &data, &measured, &every)));
        assert!(said.contains("equivariance/invariance"), "{said}");
        let (expected, mut got) = (traces(&plain), traces(&measured));
        assert!(expected.0 == got.0, "{}: encoder", method.name());
        let found = balances(&got.1);
        // Two blocks of four lie before the tap.
        let steps: Vec<usize> = found.iter().map(|b| b.step).collect();
        assert_eq!(steps, [0, 3, 6, 9]);
        for balance in found {
            assert_eq!(balance.lambda, 1.0);
            let names: Vec<&str> = balance.layers.iter().map(|l| l.name.as_str()).collect();
            assert_eq!(names, ["patch", "block1", "block2", "block3", "block4"]);
            for (i, layer) in balance.layers.iter().enumerate() {
                assert!(layer.norm_inv.unwrap() > 0.0, "{layer:?}");
                assert_eq!(layer.norm_equiv.unwrap() > 0.0, i <= 2, "{layer:?}");
                assert_eq!(layer.cosine.is_some(), i <= 2, "{layer:?}");
            }
            let squares = balance.layers[..3].iter();
            let squares = squares.map(|l| l.norm_equiv.unwrap().powi(2));
            // `shared` has the positional table besides, which is in no block.
            let shared = balance.shared.norm_equiv.unwrap();
            assert!(shared >= squares.sum::<f64>().sqrt() * (1.0 - 1e-9));
        }
        // The equivariance loss is measured before its weight.
        let heavy = folder.path().join(format!("{}-heavy", method.name()));
        let options = [&every[..], &["--lambda", "3", "--epochs", "1"]].concat();
        succeeds(&run(&mut command(method, &data, &heavy, &options)));
        let heavy = traces(&heavy).1;
        let (one, three) = (&balances(&got.1)[0].shared, &balances(&heavy)[0].shared);
        assert_eq!(one.norm_inv, three.norm_inv);
        let (one, three) = (one.norm_equiv.unwrap(), three.norm_equiv.unwrap());
        assert!((one - three).abs() < 1e-4 * one, "{one}, {three}");
        got.1.retain(|record| !matches!(record, Record::Balance(_)));
        assert_eq!(expected.1, got.1, "{}: metrics", method.name());
        let page = fs::read_to_string(measured.join("report.html")).unwrap();
        assert!(page.contains("Balance of the gradients"));
        let page = fs::read_to_string(plain.join("report.html")).unwrap();
        assert!(!page.contains("Balance of the gradients"));
    }
}

/// λ falls by a cosine: `½·2·(1 + cos(π·t/12))` of 12 steps. A run that was killed goes on with the same values.
#[test]
fn lambda_falls_over_a_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let options = ["--lambda", "2", "--lambda-end", "0"];
    let whole = folder.path().join("whole");
    succeeds(&run(&mut command(Method::MocoV3, &data, &whole, &options)));
    let expected = traces(&whole);
    let mut steps = 0;
    for record in &expected.1 {
        if let Record::Step(step) = record {
            let lambda = 1.0 + (std::f64::consts::PI * step.step as f64 / 12.0).cos();
            assert!((step.lambda - lambda).abs() < 1e-12, "{step:?}, expected {lambda}");
            steps += 1;
        }
    }
    assert_eq!(steps, 12);
    let killed = folder.path().join("killed");
    kill_after(7, command(Method::MocoV3, &data, &killed, &options), &killed);
    let again = [&options[..], &["--resume"]].concat();
    succeeds(&run(&mut command(Method::MocoV3, &data, &killed, &again)));
    assert_eq!(expected.1, traces(&killed).1);
    assert!(expected.0 == traces(&killed).0);
}

/// λ is what the first measurement suggests, then its moving average; a run that was killed finds it again.
#[test]
fn lambda_follows_the_gradients() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let balance =
        ["--balance-every", "2", "--balance-target", "0.5", "--lambda", "3", "--epochs", "12"];
    for method in Method::ALL {
        let whole = folder.path().join(format!("{}-whole", method.name()));
        succeeds(&run(&mut command(method, &data, &whole, &balance)));
        let expected = traces(&whole);
        let found = balances(&expected.1);
        let mut log_lambda = None;
        for balance in &found {
            let suggested = (0.5 / balance.shared.ratio().unwrap()).ln();
            let next = log_lambda.map_or(suggested, |old: f64| 0.9 * old + 0.1 * suggested);
            let error = (balance.lambda.ln() - next).abs();
            assert!(error < 1e-9, "{balance:?}, expected {}", next.exp());
            log_lambda = Some(next);
        }
        for record in &expected.1 {
            if let Record::Step(step) = record {
                // A measurement holds from the step after its own.
                let last = found.iter().rev().find(|b| b.step < step.step);
                assert_eq!(step.lambda, last.map_or(3.0, |b| b.lambda), "{}", step.step);
                let parts = f64::from(step.invariance)
                    + step.lambda * f64::from(step.equivariance.unwrap());
                let error = (f64::from(step.loss) - parts).abs();
                assert!(error < 1e-5 * parts, "{step:?}, expected {parts}");
            }
        }

        let killed = folder.path().join(format!("{}-killed", method.name()));
        let more = [&balance[..], &["--checkpoint-every", "3", "--resume"]].concat();
        kill_after(9, command(method, &data, &killed, &more), &killed);
        let other = ["--balance-target", "0.1", "--lambda", "3", "--resume"];
        fails(
            &run(&mut command(method, &data, &killed, &other)),
            &["ser.balance.every: 2, now 50", "ser.balance.target: 0.5, now 0.1"],
        );
        succeeds(&run(&mut command(method, &data, &killed, &more)));
        let got = traces(&killed);
        assert_eq!(expected.1, got.1, "{}: metrics", method.name());
        assert!(expected.0 == got.0, "{}: encoder", method.name());
    }
}

/// What a run without add-on writes down says nothing of add-ons: folders of before there were any go on.
#[test]
fn without_an_add_on_nothing_is_said_of_one() {
    let args = Args::parse_from(["trainer"]);
    let settings = Settings::new(Method::MocoV3, &args).unwrap();
    let text = serde_json::to_string(&settings).unwrap();
    assert!(!text.contains("addon"), "{text}");
    let step = serde_json::to_string(&Record::Step(Default::default())).unwrap();
    assert!(!step.contains("addon"), "{step}");
    let args = Args::parse_from(["trainer", "--addon", "care"]);
    let settings = Settings::new(Method::MocoV3, &args).unwrap();
    assert_eq!(settings.addon.as_ref().map(|a| a.layer), Some(4));
    let back: Settings = serde_json::from_str(&serde_json::to_string(&settings).unwrap()).unwrap();
    assert_eq!(back, settings);
}

#[test]
fn a_full_disk_leaves_the_old_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    file::write(&path, b"old").unwrap();
    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = file::replace(&path, |file| {
        file.write_all(b"ne")?;
        Err(full())
    });
    let said = format!("{:#}", error.unwrap_err());
    assert!(said.contains("untouched") && said.contains("checkpoint.safetensors"), "{said}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    let new = folder.path().join("new");
    assert!(file::replace(&new, |_| Err(full())).is_err());
    assert!(!new.exists());
    // A folder that cannot be written into.
    assert!(file::write(&folder.path().join("none/file"), b"x").is_err());
}

#[test]
fn the_encoder_loads_from_a_mapped_file() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::BarlowTwins, &data, &out, &[])));
    let path = out.join("encoder.safetensors");
    let (of_checkpoint, _) =
        encoder::load(&out.join("checkpoint.safetensors"), &Device::Cpu).unwrap();
    let (vit, card) = encoder::load(&path, &Device::Cpu).unwrap();
    assert_eq!((card.method.as_str(), card.mode.as_str(), card.layer), ("barlow_twins", "ser", 2));
    // SAFETY: nobody else writes to the file.
    #[allow(unsafe_code)]
    let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &Device::Cpu) };
    let mapped = Vit::new(&card.vit, mapped.unwrap()).unwrap();
    let x = Tensor::rand(0f32, 1., (2, 1, 12, 12), &Device::Cpu).unwrap();
    let values = |vit: &Vit| vit.forward(&x).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(values(&vit), values(&mapped));
    assert_eq!(values(&vit), values(&of_checkpoint));
    for file in ["config.json", "result.json", "report.html", "metrics.jsonl"] {
        assert!(out.join(file).exists(), "{file}");
    }
    // A new run in the same folder that does not get far must not leave the old one's results.
    let broken = ["--learning-rate", "1e30", "--warm-up", "0.5"];
    fails(&run(&mut command(Method::BarlowTwins, &data, &out, &broken)), &["the loss is"]);
    for file in ["encoder.safetensors", "result.json", "report.html"] {
        assert!(!out.join(file).exists(), "{file}");
    }
}

/// The moving average of the student is the encoder of DINO; the student lies beside it.
#[test]
fn dino_saves_and_measures_its_teacher() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::Dino, &data, &out, &["--evaluate-every", "1"])));
    let checkpoint =
        candle_core::safetensors::load(out.join("checkpoint.safetensors"), &Device::Cpu);
    let checkpoint = checkpoint.unwrap();
    let read = |name: &str| encoder::read(&out.join(name), &Device::Cpu).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (file, prefix, network) in [
        ("encoder.safetensors", "momentum/encoder.", Network::Teacher),
        ("student.safetensors", "online/encoder.", Network::Encoder),
        ("checkpoint.safetensors", "momentum/encoder.", Network::Teacher),
    ] {
        let (weights, card) = read(file);
        assert_eq!(card.network, network, "{file}");
        assert!(weights.len() > 20);
        for (name, tensor) in &weights {
            assert_eq!(values(tensor), values(&checkpoint[&format!("{prefix}{name}")]), "{name}");
        }
    }
    // Both differ, and the measurements are the teacher's: those of the run are those of its file.
    let [teacher, student] = ["encoder.safetensors", "student.safetensors"].map(|name| {
        let (vit, card) = encoder::load(&out.join(name), &Device::Cpu).unwrap();
        let data = data::load(&data, &data::Wanted::default()).unwrap();
        let evaluation = Evaluation::of(&data, &card.statistics, &Device::Cpu);
        evaluation.equivariance(&vit).unwrap()
    });
    let outcome: Outcome =
        serde_json::from_slice(&fs::read(out.join("result.json")).unwrap()).unwrap();
    assert_eq!(outcome.network, Network::Teacher);
    let near = |scores: &[Option<f64>], expected: &[f64]| {
        scores.iter().zip(expected).all(|(a, b)| (a.unwrap() - b).abs() < 1e-6)
    };
    assert!(near(&outcome.equivariance, &teacher), "{:?} {teacher:?}", outcome.equivariance);
    assert!(!near(&outcome.equivariance, &student), "{student:?}");
    let records = log::read(&out.join("metrics.jsonl")).unwrap();
    let last = records.iter().rev().find_map(|record| match record {
        Record::Epoch(epoch) => Some(epoch),
        _ => None,
    });
    assert!(near(&last.unwrap().equivariance, &teacher));
    // The other methods save the encoder that gradients train.
    let out = folder.path().join("moco");
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    let (_, card) = encoder::read(&out.join("encoder.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(card.network, Network::Encoder);
    assert!(!out.join("student.safetensors").exists());
}

/// Black images: no weight of the patches can learn anything, and no layer is at fault.
#[test]
fn constant_images_are_named_as_such() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let path = data.join("train-images-idx3-ubyte");
    let mut bytes = fs::read(&path).unwrap();
    bytes[16..].fill(0);
    fs::write(&path, bytes).unwrap();
    let out = folder.path().join("run");
    let expected =
        "--data: expected images that differ, got a first batch in which every image is constant";
    for method in Method::ALL {
        for more in [&[][..], &["--baseline"], &["--ser-images", "own"], &["--ratio", "1"]] {
            let output = run(&mut command(method, &data, &out, more));
            fails(&output, &[expected, "encoder.patch.weight"]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!said.contains("cuts the graph"), "{said}");
        }
    }
    for addon in ["equimod", "augself", "essl", "stl"] {
        fails(&run(&mut command(Method::MocoV3, &data, &out, &["--addon", addon])), &[expected]);
    }
}

/// A graph that is cut stays the model's fault, whatever the images.
#[test]
fn only_a_zero_gradient_is_blamed_on_the_images() {
    let at =
        |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap().reshape((2, 1, 1, 2)).unwrap();
    let (w, other) = (Var::new(2f32, &Device::Cpu).unwrap(), Var::new(2f32, &Device::Cpu).unwrap());
    let error = |images: &Tensor, absent: bool| {
        let x = (images.get(0).unwrap() - images.get(1).unwrap()).unwrap();
        let loss = x.broadcast_mul(&w).unwrap().sum_all().unwrap();
        let mut vars = vec![("w".to_string(), w.clone())];
        if absent {
            vars.push(("other".to_string(), other.clone()));
        }
        reach::assert_reaches(&loss, vars, [images]).map_err(|e| e.to_string())
    };
    let (constant, alike) = (at(&[1., 1., 1., 1.]), at(&[1., 2., 1., 2.]));
    assert!(error(&constant, false).unwrap_err().contains("every image is constant"));
    assert!(error(&alike, false).unwrap_err().contains("all images are alike"));
    for images in [&constant, &alike] {
        assert!(error(images, true).unwrap_err().contains("cuts the graph"));
    }
    // Two images whose differences cancel: they are no reason.
    assert!(error(&at(&[1., 2., 2., 1.]), false).unwrap_err().contains("cuts the graph"));
    assert!(error(&at(&[1., 2., 5., 1.]), false).is_ok());
}

/// Colorful images of any size in two classes, one of them damaged.
fn colorful(folder: &Path) -> PathBuf {
    let root = folder.join("images");
    let mut rng = StdRng::seed_from_u64(2);
    for (class, hue) in [("blue", 2), ("red", 0)] {
        let folder = root.join(class);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..8u32 {
            let (width, height) = (240 + 8 * i, 230);
            let picture = image::RgbImage::from_fn(width, height, |x, y| {
                let mut pixel = [60 + (x % 64) as u8, 60 + (y % 64) as u8, 60];
                pixel[hue] = 150 + rng.random_range(0..100);
                image::Rgb(pixel)
            });
            let name = format!("{i}.{}", if i % 2 == 0 { "png" } else { "jpg" });
            picture.save(folder.join(name)).unwrap();
        }
    }
    fs::write(root.join("red/1.jpg"), b"no image").unwrap();
    root
}

#[test]
fn the_paper_preset_trains_on_a_folder() {
    let folder = TempDir::new().unwrap();
    let data = colorful(folder.path());
    let out = folder.path().join("run");
    let output = Command::new(program("moco_v3"))
        .args(["--preset", "imagenet-vit-s16", "--epochs", "1", "--batch-size", "4"])
        .args(["--ratio", "0.5", "--evaluate-every", "0", "--brief", "--workers", "2"])
        .arg("--data")
        .arg(&data)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let said = succeeds(&output);
    assert_eq!(said.matches("1.jpg").count(), 1, "named once: {said}");
    let result = fs::read_to_string(out.join("result.json")).unwrap();
    assert!(result.contains("\"skipped\": 1"), "{result}");
    assert!(said.contains("waiting"), "{said}");
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    for part in ["imagenet-vit-s16", "\"hidden\": 4096", "\"weight_decay\": 0.1"] {
        assert!(config.contains(part), "{part} in {config}");
    }
    let records = log::read(&out.join("metrics.jsonl")).unwrap();
    let steps: Vec<_> = records
        .iter()
        .filter_map(|r| match r {
            Record::Step(step) => Some(step),
            _ => None,
        })
        .collect();
    assert!(steps.len() >= 2 && steps.iter().all(|s| s.loss.is_finite()));
    assert!(steps.iter().all(|s| s.equivariance.is_some_and(|e| e > 0.0)));
}
