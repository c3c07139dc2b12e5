//! Runs as processes: stopped by signals, printing to nobody, and two in one folder.
#![cfg(unix)]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use common::{command, fails, images, pictures, program, run, succeeds, traces, wait_for_lines};
use ser_reg_trainers::{records::Record, run::log, settings::Method};
use tempfile::TempDir;

const LONG: [&str; 2] = ["--epochs", "40"];

fn send(signal: &str, child: &Child) {
    let id = child.id().to_string();
    assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
}

/// Waits until `done`, or until the process has ended.
fn wait_until(child: &mut Child, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(120), "it hangs");
        sleep(Duration::from_millis(2));
    }
}

fn silent(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Ctrl-C, a scheduler's stop and a closed terminal: a checkpoint is written, and the run goes on from there bit for bit.
#[test]
fn a_stopped_run_has_a_checkpoint() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let whole = folder.path().join("whole");
    succeeds(&run(&mut command(Method::MocoV3, &data, &whole, &LONG)));
    for signal in ["-INT", "-TERM", "-HUP"] {
        let out = folder.path().join(signal);
        let mut command_ = command(Method::MocoV3, &data, &out, &LONG);
        let mut child = command_.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        wait_for_lines(&mut child, &out, 3);
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{signal}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("--resume"), "{signal}: {said}");
        assert!(out.join("checkpoint.safetensors").exists(), "{signal}");
        assert!(!out.join("result.json").exists() && !out.join(".lock").exists(), "{signal}");
        let again = [&LONG[..], &["--resume"]].concat();
        let said = succeeds(&run(&mut command(Method::MocoV3, &data, &out, &again)));
        assert!(said.contains("resumed after"), "{said}");
        assert_eq!(traces(&whole).1, traces(&out).1, "{signal}");
        assert!(traces(&whole).0 == traces(&out).0, "{signal}");
    }
}

/// What an evaluation has not recorded yet: its epoch, or the result of the run.
#[derive(Clone, Copy)]
enum Evaluation {
    OfEpoch,
    OfResult,
}

/// A stop ends an evaluation at once, and nothing of the epoch is lost.
#[test]
fn a_stop_does_not_wait_for_an_evaluation() {
    let folder = TempDir::new().unwrap();
    let data = images(folder.path(), 600);
    let whole = folder.path().join("whole");
    let options = ["--epochs", "1", "--batch-size", "96", "--evaluate-every", "1"];
    succeeds(&run(&mut command(Method::Dino, &data, &whole, &options)));
    let again = [&options[..], &["--resume"]].concat();
    let out = folder.path().join("stopped");
    for evaluation in [Evaluation::OfEpoch, Evaluation::OfResult] {
        // It begins when the first file is there and has ended when the second is written.
        let begun = out.join(match evaluation {
            Evaluation::OfEpoch => "checkpoint.safetensors",
            Evaluation::OfResult => "encoder.safetensors",
        });
        let ended = || match evaluation {
            Evaluation::OfEpoch => {
                let records = log::read(&out.join("metrics.jsonl")).unwrap();
                records.iter().any(|r| matches!(r, Record::Epoch(e) if e.epoch == 1))
            }
            Evaluation::OfResult => out.join("result.json").exists(),
        };
        // A signal may come too late.
        let stopped_within = (0..20).any(|_| {
            let _ = fs::remove_dir_all(&out);
            let mut child = silent(command(Method::Dino, &data, &out, &options));
            wait_until(&mut child, || begun.exists());
            send("-TERM", &child);
            let code = child.wait().unwrap().code();
            code == Some(130) && !ended()
        });
        assert!(stopped_within, "{}", begun.display());
        succeeds(&run(&mut command(Method::Dino, &data, &out, &again)));
        assert_eq!(traces(&whole).1, traces(&out).1);
        assert!(traces(&whole).0 == traces(&out).0);
    }
}

/// A process that is killed in an evaluation leaves out a record, which the resumed run makes again.
#[test]
fn a_missing_record_is_made_again() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let options = ["--evaluate-every", "1"];
    succeeds(&run(&mut command(Method::Dino, &data, &out, &options)));
    let whole = traces(&out).1;
    let again = [&options[..], &["--resume"]].concat();
    let path = out.join("metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.last().unwrap().contains("\"epoch\":3"));
    fs::write(&path, lines[..lines.len() - 1].join("\n") + "\n").unwrap();
    succeeds(&run(&mut command(Method::Dino, &data, &out, &again)));
    assert_eq!(whole, traces(&out).1);
}

/// USR1 writes a checkpoint between two epochs, and the run goes on.
#[test]
fn usr1_writes_a_checkpoint_and_goes_on() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    // One epoch of 19 steps, so that no other checkpoint is due before its end.
    let options = ["--epochs", "1", "--batch-size", "2", "--evaluate-every", "0"];
    let mut command_ = command(Method::MocoV3, &data, &out, &options);
    let mut child = command_.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_lines(&mut child, &out, 1);
    send("-USR1", &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find(|line| line.starts_with("checkpoint after "));
    let step: usize = line.expect(&said).split(' ').nth(2).unwrap().parse().unwrap();
    assert!((1..=19).contains(&step), "{said}");
    assert!(out.join("result.json").exists());
}

/// The parent of `--compare` sends a stop on to the variant that it trains.
#[test]
fn a_stop_reaches_the_variants() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let options = [&LONG[..], &["--compare"]].concat();
    let mut child = silent(command(Method::BarlowTwins, &data, &out, &options));
    let metrics = out.join("lambda0/metrics.jsonl");
    let begun = || fs::read_to_string(&metrics).unwrap_or_default().lines().count() >= 3;
    wait_until(&mut child, begun);
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(out.join("lambda0/checkpoint.safetensors").exists());
    assert!(!out.join("lambda0/result.json").exists() && !out.join("baseline").exists());
    let again = [&options[..], &["--resume"]].concat();
    let said = succeeds(&run(&mut command(Method::BarlowTwins, &data, &out, &again)));
    assert_eq!(said.matches("resumed after").count(), 2, "{said}");
    assert!(out.join("compare.html").exists());
}

/// So does `study`, and starts no other run.
#[test]
fn a_stop_reaches_the_runs_of_a_study() {
    let folder = TempDir::new().unwrap();
    let study = || {
        let mut command = Command::new(program("study"));
        command.args(["--smoke", "--jobs", "1", "--out"]).arg(folder.path());
        command
    };
    let mut child = silent(study());
    let first = folder.path().join("A-fashion-mnist-moco_v3-baseline-seed100-epochs2");
    let metrics = first.join("metrics.jsonl");
    let begun = || fs::read_to_string(&metrics).unwrap_or_default().lines().count() >= 3;
    wait_until(&mut child, begun);
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(first.join("checkpoint.safetensors").exists());
    // The run has ended: it has given its folder back.
    assert!(!first.join("result.json").exists() && !first.join(".lock").exists());
    assert!(!folder.path().join("A-fashion-mnist-moco_v3-own-seed100-epochs2").exists());
}

/// `nohup` lets a run outlive its terminal.
#[cfg(target_os = "linux")]
#[test]
fn an_ignored_hangup_stays_ignored() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let run = command(Method::MocoV3, &data, &out, &[]);
    let mut ignoring = Command::new("sh");
    ignoring.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(run.get_program());
    ignoring.args(run.get_args()).env("RAYON_NUM_THREADS", "1");
    let mut child = silent(ignoring);
    wait_for_lines(&mut child, &out, 2);
    send("-HUP", &child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(out.join("result.json").exists());
}

/// The second of two runs in one folder is refused, whatever it is, and the first one does not notice.
#[test]
fn a_folder_has_one_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let whole = folder.path().join("whole");
    succeeds(&run(&mut command(Method::MocoV3, &data, &whole, &LONG)));
    let out = folder.path().join("run");
    let mut first = silent(command(Method::MocoV3, &data, &out, &LONG));
    wait_for_lines(&mut first, &out, 2);
    send("-STOP", &first);
    let owner = format!("process {} on ", first.id());
    for (method, options) in
        [(Method::MocoV3, &[][..]), (Method::Dino, &["--resume"]), (Method::MocoV3, &LONG)]
    {
        fails(&run(&mut command(method, &data, &out, options)), &["--out: ", &owner]);
    }
    // An evaluation of this moment would stand beside the encoder of another one.
    let evaluate = |more: &[&str]| {
        let mut command = Command::new(program("evaluate"));
        run(command.arg(&whole).args(["--only", "knn"]).args(more))
    };
    let inside = out.join("evaluation.json");
    fails(&evaluate(&["--json", inside.to_str().unwrap()]), &["--json: ", &owner]);
    assert!(!inside.exists());
    succeeds(&evaluate(&[]));
    send("-CONT", &first);
    assert_eq!(first.wait().unwrap().code(), Some(0));
    assert_eq!(traces(&whole).1, traces(&out).1);
    assert!(traces(&whole).0 == traces(&out).0);
    // The lock of a killed run is taken over.
    let mut killed = silent(command(Method::MocoV3, &data, &out, &LONG));
    wait_until(&mut killed, || out.join(".lock").exists());
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(out.join(".lock").exists());
    succeeds(&run(&mut command(Method::MocoV3, &data, &out, &[])));
    assert!(!out.join(".lock").exists());
}

/// Runs a program that nobody reads after its first line; gives its status.
fn read_one_line(mut command: Command) -> Option<i32> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(!line.is_empty());
    child.wait().unwrap().code()
}

/// Runs a program on a full disk; gives its status and what it says as an error.
fn on_a_full_disk(mut command: Command) -> (Option<i32>, String) {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command.stdout(full()).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn output_that_nobody_reads_ends_no_run() {
    let folder = TempDir::new().unwrap();
    let data = pictures(folder.path());
    let out = folder.path().join("run");
    let train = || command(Method::Dino, &data, &out, &[]);
    let evaluate = || {
        let mut command = Command::new(program("evaluate"));
        command.arg(&out).args(["--only", "knn"]);
        command
    };
    let report = || {
        let mut command = Command::new(program("report"));
        command.arg(&out);
        command
    };
    type Program<'a> = &'a dyn Fn() -> Command;
    let programs: [(Program, &str); 3] =
        [(&train, "result.json"), (&evaluate, "evaluation.json"), (&report, "report.html")];
    for (program, written) in programs {
        let written = out.join(written);
        for closed in [true, false] {
            let _ = fs::remove_file(&written);
            match closed {
                true => assert_eq!(read_one_line(program()), Some(0)),
                false if Path::new("/dev/full").exists() => {
                    assert_eq!(on_a_full_disk(program()), (Some(0), String::new()));
                }
                false => continue,
            }
            assert!(written.exists(), "{}", written.display());
        }
    }
    let records = log::read(&out.join("metrics.jsonl")).unwrap();
    assert!(records.iter().any(|r| matches!(r, Record::Epoch(e) if e.epoch == 3)));
}
