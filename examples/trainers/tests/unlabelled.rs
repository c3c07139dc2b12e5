//! Images without classes: all three trainers train on them, and everything says what is skipped.

mod files;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use files::{assert_says, encoded, filled, folder};
use image::{ImageFormat, Rgb, RgbImage};
use ser_reg_trainers::{
    eval::Report,
    run::{finish::Outcome, log},
};
use tempfile::TempDir;

fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let mut command = Command::new(test.ancestors().nth(2).unwrap().join("examples").join(name));
    command.env("RAYON_NUM_THREADS", "1");
    command
}

/// 40 images of squares in other places, some of them deeper.
fn images() -> TempDir {
    let image = |i: u32| {
        let inside = |x: u32, y: u32| (i % 20..i % 20 + 9).contains(&x) && (5..20).contains(&y);
        let shade = |x, y| if inside(x, y) { 220 } else { (x * 3 + y * i) as u8 % 60 };
        RgbImage::from_fn(32, 32, |x, y| Rgb([shade(x, y), shade(y, x), 90]))
    };
    let place =
        |i: u32| if i.is_multiple_of(3) { format!("deep/{i}.png") } else { format!("{i}.png") };
    let files: Vec<_> = (0..40).map(|i| (place(i), encoded(image(i), ImageFormat::Png))).collect();
    folder(&files)
}

fn train(method: &str, data: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = program(method);
    command.args(["--epochs", "2", "--batch-size", "8", "--ratio", "0.25", "--data"]);
    command.arg(data).arg("--out").arg(out).args(more).output().unwrap()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn fails(output: &Output, parts: &[&str]) {
    assert!(!output.status.success(), "it must fail: {parts:?}");
    assert_says(&String::from_utf8_lossy(&output.stderr), parts);
}

fn outcome(out: &Path) -> Outcome {
    serde_json::from_slice(&fs::read(out.join("result.json")).unwrap()).unwrap()
}

#[test]
fn all_trainers_train_without_labels_and_say_what_is_skipped() {
    let (data, runs) = (images(), tempfile::tempdir().unwrap());
    let mut outs: Vec<PathBuf> = Vec::new();
    for method in ["moco_v3", "dino", "barlow_twins"] {
        let out = runs.path().join(method);
        let said = succeeds(&train(method, data.path(), &out, &[]));
        let note = ["32 images train, 8 test", "no classes", "nearest neighbors", "are skipped"];
        assert_says(&said, &note);
        let outcome = outcome(&out);
        assert_says(&outcome.note, &note);
        assert_eq!((outcome.knn.len(), outcome.knn_poses), (0, None));
        // What needs no labels is there, of the encoder and of its references.
        assert!(outcome.feature_std > 0.0 && outcome.equivariance.iter().all(Option::is_some));
        assert!(outcome.references.iter().all(|r| r.knn.is_empty()));
        assert!(outcome.references[0].equivariance.iter().all(Option::is_some));
        assert_says(&fs::read_to_string(out.join("report.html")).unwrap(), &["no classes"]);
        assert!(!log::read(&out.join("metrics.jsonl")).unwrap().is_empty());
        outs.push(out);
    }
    let page = runs.path().join("both.html");
    let both = program("report")
        .arg("--compare")
        .args(&outs[..2])
        .arg("--out")
        .arg(&page)
        .output()
        .unwrap();
    succeeds(&both);

    let said = succeeds(&program("evaluate").arg(&outs[0]).arg("--smoke").output().unwrap());
    let skipped =
        "skipped, because the images have no labels: probe, knn, poses, corruptions, perturbations";
    assert_says(&said, &[skipped, "Tokens of block", "no classes"]);
    let report = fs::read(outs[0].join("evaluation.json")).unwrap();
    let report: Report = serde_json::from_slice(&report).unwrap();
    assert!(report.dense.is_some() && report.probe.is_empty() && report.corruptions.is_none());
    let mut only = program("evaluate");
    only.arg(&outs[0]).args(["--only", "probe,knn"]);
    fails(&only.output().unwrap(), &["--only", "dense", "got probe, knn", "no classes"]);
    // The table of a run that was evaluated.
    succeeds(&program("report").arg(&outs[0]).arg("--out").arg(&page).output().unwrap());

    let mut finetune = program("finetune");
    finetune.arg("--data").arg(data.path());
    fails(&finetune.output().unwrap(), &["--data", "images with classes", "without --init"]);
}

#[test]
fn images_of_one_color_are_refused_before_a_run_is_touched() {
    let data = folder(&filled(10, &[("a", [255; 3]), ("b", [0; 3])]));
    let out = tempfile::tempdir().unwrap();
    let old = out.path().join("result.json");
    fs::write(&old, "old").unwrap();
    let parts =
        ["--data: expected images with content", "16 images of one color each", "2 classes"];
    fails(&train("moco_v3", data.path(), out.path(), &[]), &parts);
    assert_eq!(fs::read_to_string(old).unwrap(), "old");
}

#[test]
fn a_batch_that_is_too_large_names_what_was_ignored() {
    let mut files = filled(5, &[("a", [255; 3]), ("b", [0; 3])]);
    let patterned = RgbImage::from_fn(9, 9, |x, y| Rgb([(x * y) as u8, 0, 9]));
    files.iter_mut().for_each(|f| f.1 = encoded(patterned.clone(), ImageFormat::Png));
    files.extend((0..30).map(|i| (format!("a/{i}.heic"), vec![1])));
    let (data, out) = (folder(&files), tempfile::tempdir().unwrap());
    let parts = ["--batch-size: expected at most 8", "ignored 30 files: 30 .heic", "got 16"];
    let more = ["--batch-size", "16"];
    fails(&train("moco_v3", data.path(), &out.path().join("run"), &more), &parts);
    assert!(!out.path().join("run").exists());
}
