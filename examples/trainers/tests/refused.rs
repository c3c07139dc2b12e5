//! What is refused is refused at once: no file of an older run is touched, and the message names the option.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{command, fails, pictures, program, run, succeeds};
use ser_reg_trainers::{run::lock::Lock, settings::Method};
use tempfile::TempDir;

/// All files in a folder with their bytes.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    files.sort();
    files
}

/// Numbers that no option for a number takes, and counts that no option for a count takes.
#[test]
fn a_refused_command_touches_no_old_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    let before = files(&out);
    let refused = |method, options: &[&str], parts: &[&str]| {
        fails(&run(&mut command(method, &data, &out, options)), parts);
        assert!(before == files(&out), "{options:?}");
    };
    let numbers = [
        "--lambda",
        "--lambda-end",
        "--ratio",
        "--temperature",
        "--min-overlap",
        "--balance-target",
        "--learning-rate",
        "--warm-up",
        "--weight-decay",
        "--clip",
        "--momentum",
        "--crop-min",
        "--drop-path",
    ];
    for option in numbers {
        for value in ["-1", "nan", "inf", "1e300"] {
            refused(Method::MocoV3, &[option, value], &[&format!("{option}: expected ")]);
        }
    }
    for option in ["--scale", "--aspect", "--crops", "--rotation", "--translation", "--shear"] {
        for value in ["nan,nan", "nan,1", "-1,nan", "1e300,1e300", "inf,inf", "0.9,-0.9"] {
            refused(Method::MocoV3, &[option, value], &[&format!("{option}: expected LO,HI")]);
        }
    }
    let counts = [
        "--epochs",
        "--batch-size",
        "--layer",
        "--balance-every",
        "--checkpoint-every",
        "--evaluate-every",
        "--workers",
    ];
    for option in counts {
        refused(
            Method::MocoV3,
            &[option, "18446744073709551615"],
            &[&format!("{option}: expected")],
        );
        if option != "--evaluate-every" {
            refused(Method::MocoV3, &[option, "0"], &[&format!("{option}: expected")]);
        }
    }
    let addon = |option, value| [&["--addon", "equimod", option, value][..]].concat();
    for (options, parts) in [
        // Not used, and in the configuration all the same.
        (vec!["--baseline", "--lambda", "nan"], vec!["--lambda: "]),
        (vec!["--baseline", "--ratio", "nan"], vec!["--ratio: "]),
        (vec!["--smoke", "--epochs", "0"], vec!["--epochs: "]),
        (addon("--addon-lambda", "nan"), vec!["--addon-lambda: "]),
        (addon("--addon-layer", "18446744073709551615"), vec!["--addon-layer: "]),
        // Too small for f32, or for a gradient.
        (vec!["--lambda", "1e-45"], vec!["--lambda: "]),
        (vec!["--temperature", "0.001"], vec!["--temperature: "]),
        (vec!["--warm-up", "0.9999999999999999"], vec!["--warm-up: "]),
        // Two views without a common token would end the run later.
        (vec!["--crops", "0.01,0.02", "--min-overlap", "0"], vec!["--min-overlap: "]),
        (vec!["--scale", "1e6,1e6"], vec!["--scale: "]),
        (vec!["--init", "/nowhere"], vec!["/nowhere"]),
        (vec!["--device", "cuda:x"], vec!["--device: "]),
    ] {
        refused(Method::MocoV3, &options, &parts);
    }
    refused(Method::BarlowTwins, &["--momentum", "nan"], &["--momentum: "]);
    // The run would remove the encoder that it is to start from.
    let encoder = out.join("encoder.safetensors");
    let init = ["--init", encoder.to_str().unwrap()];
    refused(Method::MocoV3, &init, &["--init: ", "another --out"]);
    fails(&run(&mut command(Method::MocoV3, &data, Path::new(""), &[])), &["--out"]);
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"d\xffta"));
        fs::rename(&data, &odd).unwrap();
        fails(&run(&mut command(Method::MocoV3, &odd, &out, &[])), &["UTF-8", "--data"]);
        fs::rename(&odd, &data).unwrap();
        assert!(before == files(&out));
    }
}

/// A run that has ended keeps its results when its checkpoint is gone, whichever of them are left.
#[test]
fn resume_never_removes_a_result() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    fs::remove_file(out.join("checkpoint.safetensors")).unwrap();
    for gone in ["", "result.json"] {
        let _ = fs::remove_file(out.join(gone));
        let before = files(&out);
        let resumed = run(&mut command(Method::MocoV3, &data, &out, &["--resume"]));
        fails(&resumed, &["--resume: ", "has ended", "checkpoint is gone"]);
        assert!(before == files(&out));
    }
}

/// A checkpoint belongs to its images. The way to write their path does not matter.
#[test]
fn other_images_are_no_resumed_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let started = |path: &Path, more: &[&str]| {
        let mut command = command(Method::MocoV3, path, &out, more);
        command.current_dir(folder.path());
        run(&mut command)
    };
    succeeds(&started(Path::new("data"), &[]));
    for same in [data.clone(), "./data".into(), "data/".into(), "data/../data/.".into()] {
        succeeds(&started(&same, &["--resume"]));
    }
    // The encoder is evaluated on the same images from any folder.
    let elsewhere = TempDir::new().unwrap();
    let evaluate = |folder: &Path| {
        let mut command = Command::new(program("evaluate"));
        command.arg(&out).args(["--only", "knn"]).current_dir(folder);
        run(&mut command)
    };
    fs::create_dir(elsewhere.path().join("data")).unwrap();
    succeeds(&evaluate(elsewhere.path()));
    let before = files(&out);
    // The same relative path leads to other images there.
    let other = pictures(elsewhere.path());
    let mut moved = command(Method::MocoV3, Path::new("data"), &out, &["--resume"]);
    fails(&run(moved.current_dir(elsewhere.path())), &["data: ", "another --out"]);
    // One pixel differs, then one image is missing.
    let path = data.join("train-images-idx3-ubyte");
    let whole = fs::read(&path).unwrap();
    let mut pixels = whole.clone();
    *pixels.last_mut().unwrap() ^= 1;
    fs::write(&path, &pixels).unwrap();
    let parts = ["--data: expected the images that the run began with", "38 training", "--out"];
    fails(&started(&data, &["--resume"]), &parts);
    fs::write(&path, &whole).unwrap();
    assert!(before == files(&out));
    succeeds(&started(&data, &["--resume"]));
    drop(other);
}

/// Files of a folder that is decoded as it is needed: their names and sizes count.
#[test]
fn a_file_more_or_less_is_another_data_set() {
    use ser_reg_trainers::data::{Wanted, load};
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("images");
    for class in ["a", "b"] {
        fs::create_dir_all(root.join(class)).unwrap();
        for i in 0..10u8 {
            let picture = image::RgbImage::from_pixel(40, 40, image::Rgb([20 * i, 90, 7]));
            picture.save(root.join(class).join(format!("{i}.png"))).unwrap();
        }
    }
    let wanted = Wanted { bank_limit: 4, test_limit: 2, ..Wanted::streamed(32) };
    let fingerprint = |root: &Path| load(root, &wanted).unwrap().fingerprint(root);
    let first = fingerprint(&root);
    assert_eq!(first, fingerprint(&root));
    // The images may move as a whole.
    let moved = folder.path().join("moved");
    fs::rename(&root, &moved).unwrap();
    assert_eq!(first, fingerprint(&moved));
    // The name after the last one of its class, so that no other file changes its place.
    let more = moved.join("b/9a.png");
    fs::copy(moved.join("b/8.png"), &more).unwrap();
    assert_ne!(first, fingerprint(&moved));
    fs::remove_file(&more).unwrap();
    assert_eq!(first, fingerprint(&moved));
    // Another file of the same name; as many as before under other names.
    let one = moved.join("b/7.png");
    let bytes = fs::read(&one).unwrap();
    fs::write(&one, [&bytes[..], &[0]].concat()).unwrap();
    assert_ne!(first, fingerprint(&moved));
    fs::write(&one, &bytes).unwrap();
    assert_eq!(first, fingerprint(&moved));
    fs::rename(&one, moved.join("b/7a.png")).unwrap();
    assert_ne!(first, fingerprint(&moved));
}

/// What `evaluate`, `report`, `study` and `finetune` cannot do is refused before the work, and nothing is written.
#[test]
fn programs_refuse_at_once() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    let before = files(&out);
    let started = |name: &str, options: &[&str]| {
        let mut command = Command::new(program(name));
        command.args(options).current_dir(folder.path()).env("RAYON_NUM_THREADS", "1");
        run(&mut command)
    };
    for (name, options, parts) in [
        // A probe on all images would have been printed before the old failure.
        ("evaluate", vec!["run", "--json", "none/at/all.json"], vec!["--json: "]),
        ("evaluate", vec!["run", "--json", "data"], vec!["--json: ", "a folder"]),
        ("evaluate", vec!["run", "--json", "all.json/"], vec!["--json: ", "a folder"]),
        (
            "evaluate",
            vec!["run", "--dense-layer", "9"],
            vec!["--dense-layer: expected 1 to 4, got 9"],
        ),
        ("evaluate", vec!["run", "--dense-layer", "0"], vec!["--dense-layer: "]),
        ("evaluate", vec!["run", "--reference", "none"], vec!["--reference none"]),
        ("report", vec!["run", "--out", "none/page.html"], vec!["--out: "]),
        ("report", vec!["run", "--compare", "--out", "data"], vec!["--out: ", "a folder"]),
        (
            "study",
            vec!["--report", "--ledger", "missing.jsonl"],
            vec!["--ledger: ", "missing.jsonl"],
        ),
        ("study", vec!["--report", "--ledger", "data"], vec!["--ledger: ", "data"]),
        ("study", vec!["--ledger", "data"], vec!["--ledger: ", "data"]),
        ("study", vec!["--smoke", "--jobs", "0"], vec!["--jobs: "]),
        ("study", vec!["--smoke", "--jobs", "18446744073709551615"], vec!["--jobs: "]),
        ("study", vec!["--smoke", "--minutes", "nan"], vec!["--minutes: "]),
        ("study", vec!["--smoke", "--minutes", "-1"], vec!["--minutes: "]),
        ("study", vec!["--smoke", "--minutes", "inf"], vec!["--minutes: "]),
        ("study", vec!["--smoke", "--only", "nothing"], vec!["--only: ", "A to I", "nothing"]),
        ("study", vec!["--ledger", "l", "--only", "A,methods"], vec!["--only: ", "methods"]),
        ("study", vec!["--ledger", "l", "--data", "run"], vec!["--data: expected NAME=PATH"]),
        ("study", vec!["--ledger", "l", "--data", "imagenet=run"], vec!["--data: ", "eurosat"]),
        (
            "study",
            vec!["--ledger", "l", "--data", "eurosat=none"],
            vec!["--data eurosat: ", "none"],
        ),
        (
            "study",
            vec!["--ledger", "l", "--data", "bccd=run", "--data", "bccd=data"],
            vec!["--data: ", "two"],
        ),
        ("study", vec!["--ledger", "l", "--extend", "own"], vec!["--extend: ", "own, λ=0.1"]),
        (
            "evaluate",
            vec!["run", "--labels-per-class", "0"],
            vec!["--labels-per-class: expected 1"],
        ),
        ("evaluate", vec!["run", "--labels-per-class", "1,99"], vec!["--labels-per-class: ", "99"]),
        (
            "evaluate",
            vec!["run", "--only", "knn", "--labels-per-class", "1"],
            vec!["--labels-per-class: ", "probe"],
        ),
        ("study", vec![], vec!["root of the repository", "--ledger"]),
        ("finetune", vec!["--lambda", "nan"], vec!["--lambda: "]),
        ("finetune", vec!["--lambda", "-1"], vec!["--lambda: "]),
        ("finetune", vec!["--smoke", "--layer", "9"], vec!["--layer: expected 1 to 4, got 9"]),
        ("finetune", vec!["--data", "data"], vec!["--data: ", "at least 64", "got 38"]),
    ] {
        let output = started(name, &options);
        fails(&output, &parts);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{name} {options:?}");
    }
    assert!(before == files(&out));
    // A study that runs has its folder to itself, and a run that is evaluated its own.
    let lock = Lock::take(&out, "--out").unwrap();
    let owner = format!("process {} on ", std::process::id());
    fails(&started("study", &["--smoke", "--out", "run"]), &["--out: ", &owner]);
    fails(&started("evaluate", &["run"]), &["--json: ", &owner]);
    fails(&run(&mut command(Method::MocoV3, &data, &out, &[])), &["--out: ", &owner]);
    drop(lock);
    assert!(before == files(&out));
    // A configuration that cannot be read is no reason to take other images.
    for config in ["{}", "{\"data\": 5}", "no json"] {
        fs::write(out.join("config.json"), config).unwrap();
        fails(&started("evaluate", &["run", "--only", "knn"]), &["config.json"]);
    }
    // A bare name is a file in the current folder.
    fs::copy(out.join("encoder.safetensors"), folder.path().join("bare.safetensors")).unwrap();
    for (more, written) in [(&["--json", "bare.json"][..], "bare.json"), (&[], "evaluation.json")] {
        let options = [&["bare.safetensors", "--data", "data", "--only", "knn"], more].concat();
        succeeds(&started("evaluate", &options));
        assert!(folder.path().join(written).is_file());
    }
}
