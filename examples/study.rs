//! Trains three methods × {baseline, λ = 0, SER} × seeds, and sweeps over the settings of SER. Seeds pair the runs.
//!
//! ```text
//! cargo build --release --examples
//! cargo run --release --example study              # continues where it stopped; Ctrl-C at any time
//! cargo run --release --example study -- --report  # tables of the finished runs
//! ```
//!
//! Every run is a process of a trainer, then one of `evaluate`; finished runs are lines of docs/results/study.jsonl.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use ser_reg_trainers::{
    environment, eprintln,
    eval::Report,
    println,
    report::kept,
    run::{
        file,
        finish::Outcome,
        interrupt::{Interrupt, STOPPED},
        lock::Lock,
    },
    settings::check::{MOST, count},
    study::{
        ledger::{self, Entry, Ledger},
        plan::{self, Cell},
        summary,
    },
};

/// The ledger of the runs that the documentation shows.
const LEDGER: &str = "docs/results/study.jsonl";
/// Seconds of a run before any was measured.
const GUESS: f64 = 200.0;
const LAST_WORDS: &str = "stopped; the same command goes on";

#[derive(Debug, Parser)]
struct Args {
    /// Epochs of each run. Runs of another length do not count.
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    /// Runs at a time; the threads of the machine are shared among them [default: one for each thread].
    #[arg(long)]
    jobs: Option<usize>,
    /// Only these groups: methods, layer, group, lambda, temperature, fraction, filter, addons.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Start no run after this number of minutes.
    #[arg(long, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// Finished runs [default: docs/results/study.jsonl; of a smoke run, a new file in its folder].
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Folder of the runs.
    #[arg(long, default_value = "runs/study")]
    out: PathBuf,
    /// Print tables of the finished runs, and run nothing.
    #[arg(long)]
    report: bool,
    /// Make two short runs.
    #[arg(long)]
    smoke: bool,
}

struct Job {
    cell: Cell,
    seed: u64,
    id: String,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.smoke {
        // What the trainers' smoke runs make of it.
        args.epochs = 2;
    }
    let path = match (&args.ledger, args.smoke) {
        (Some(path), _) => path.clone(),
        (None, false) => PathBuf::from(LEDGER),
        (None, true) => args.out.join("smoke.jsonl"),
    };
    check(&args, &path)?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("--out: cannot make the folder {}", args.out.display()))?;
    let page = args.out.join("study.html");
    file::check_writable(&page, "--out")?;
    if !args.report {
        let interrupt = Interrupt::listen(LAST_WORDS);
        let _lock = Lock::take(&args.out, "--out")?;
        if args.smoke && args.ledger.is_none() && path.exists() {
            // Not among real runs, and not instead of running.
            std::fs::remove_file(&path)?;
        }
        if let Some(mended) = ledger::mend(&path)? {
            println!("{mended}");
        }
        run(&args, &path, &ledger::read(&path)?.entries, &interrupt)?;
    }
    let Ledger { mut entries, notes } = ledger::read(&path)?;
    for note in notes {
        println!("{}: {note}", path.display());
    }
    if path == Path::new(LEDGER) {
        // The trainers show them beside their own runs.
        file::write(kept::PATH.as_ref(), kept::json(&entries)?.as_bytes())?;
    }
    entries.retain(|e| e.epochs == args.epochs);
    println!("\n{}", summary::markdown(&entries));
    file::write(&page, summary::html(&entries)?.as_bytes())?;
    println!("charts {}", page.display());
    Ok(())
}

/// Refuses what would fail later.
fn check(args: &Args, ledger: &Path) -> Result<()> {
    count("--epochs", 1..=MOST, args.epochs)?;
    count("--jobs", 1..=MOST, args.jobs.unwrap_or(1))?;
    if let Some(minutes) = args.minutes {
        let accepted = minutes >= 0.0 && minutes.is_finite();
        ensure!(accepted, "--minutes: expected a finite number, at least 0, got {minutes}");
    }
    let groups: Vec<&str> = plan::cells().iter().map(|cell| cell.group).collect();
    for group in &args.only {
        ensure!(
            groups.contains(&group.as_str()),
            "--only: expected groups of the study, got {group}"
        );
    }
    if args.report {
        ensure!(
            ledger.is_file(),
            "--ledger: expected the file of finished runs, got {}, which is no file",
            ledger.display()
        );
    } else {
        let folder = file::folder(ledger);
        std::fs::create_dir_all(folder)
            .with_context(|| format!("--ledger: cannot make the folder {}", folder.display()))?;
        file::check_writable(ledger, "--ledger")?;
    }
    if ledger == Path::new(LEDGER) {
        let kept = "run it in the root of the repository, or give --ledger";
        file::check_writable(kept::PATH.as_ref(), "--ledger").context(kept)?;
    }
    Ok(())
}

fn run(args: &Args, ledger: &Path, done: &[Entry], interrupt: &Interrupt) -> Result<()> {
    let mut jobs = jobs(args, done)?;
    // Of the programs that are about to run, not of what is checked out while they do.
    let commit = commit();
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let at_once = args.jobs.unwrap_or(threads).clamp(1, threads);
    let known: Vec<f64> =
        done.iter().filter(|e| e.epochs == args.epochs).map(|e| e.seconds).collect();
    let each = match known.is_empty() {
        true => GUESS,
        false => known.iter().sum::<f64>() / known.len() as f64,
    };
    println!(
        "{} runs to do, {} done; about {:.0} minutes with {at_once} at a time{}",
        jobs.len(),
        known.len(),
        jobs.len() as f64 * each / at_once as f64 / 60.0,
        if known.is_empty() { " (a guess)" } else { "" }
    );
    let bar = ProgressBar::new(jobs.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len} runs  {msg}  {eta} left")?);
    let start = Instant::now();
    interrupt.busy();
    let late = || {
        let over = args.minutes.is_some_and(|m| start.elapsed().as_secs_f64() > 60.0 * m);
        over || interrupt.asked()
    };
    let queue: Mutex<VecDeque<Job>> = Mutex::new(jobs.drain(..).collect());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(|e| e.into_inner()).pop_front();
                    let Some(job) = next.filter(|_| !late()) else {
                        return;
                    };
                    bar.set_message(job.id.clone());
                    let outcome = one(args, &job, ledger, threads / at_once, &commit, interrupt);
                    bar.inc(1);
                    match outcome {
                        Ok(Some(entry)) => bar.suspend(|| {
                            println!("{} in {:.0} s: {}", job.id, entry.seconds, line(&entry));
                        }),
                        Ok(None) => bar.suspend(|| {
                            println!("{}: another study runs it, or has run it", job.id);
                        }),
                        // Its training has a checkpoint.
                        Err(_) if interrupt.asked() => {}
                        Err(e) => {
                            bar.suspend(|| eprintln!("{} failed: {e:#}", job.id));
                            let mut failures = failures.lock().unwrap_or_else(|e| e.into_inner());
                            failures.push(job.id);
                        }
                    }
                }
            });
        }
    });
    bar.finish_and_clear();
    if interrupt.asked() {
        println!("{LAST_WORDS}");
        std::process::exit(STOPPED);
    }
    println!("{:.0} minutes", start.elapsed().as_secs_f64() / 60.0);
    let failures = failures.into_inner().unwrap_or_else(|e| e.into_inner());
    ensure!(
        failures.is_empty(),
        "failed: {}; run again to try these once more",
        failures.join(", ")
    );
    Ok(())
}

/// The runs that are not in the ledger yet, in the order of the plan.
fn jobs(args: &Args, done: &[Entry]) -> Result<Vec<Job>> {
    let mut cells = plan::cells();
    if !args.only.is_empty() {
        cells.retain(|c| args.only.iter().any(|g| g == c.group));
    }
    if args.smoke {
        cells.truncate(2);
        cells.iter_mut().for_each(|c| c.seeds = 1);
    }
    let job = |cell: &Cell, seed| Job { id: cell.id(seed, args.epochs), cell: cell.clone(), seed };
    let mut jobs: Vec<Job> =
        cells.iter().flat_map(|cell| (0..cell.seeds).map(move |seed| job(cell, seed))).collect();
    jobs.retain(|job| !done.iter().any(|e| e.id == job.id));
    Ok(jobs)
}

/// Makes a run and adds it to the ledger; `None` if another study that shares the ledger does so.
fn one(
    args: &Args,
    job: &Job,
    ledger: &Path,
    threads: usize,
    commit: &str,
    interrupt: &Interrupt,
) -> Result<Option<Entry>> {
    let folder = args.out.join(&job.id);
    let Some(_claim) = ledger::claim(&folder)? else {
        return Ok(None);
    };
    if ledger::read(ledger)?.entries.iter().any(|e| e.id == job.id) {
        return Ok(None);
    }
    let entry = train_and_evaluate(args, job, threads, commit, interrupt)?;
    ledger::append(ledger, &entry)?;
    // The run is in the ledger: nothing will resume it.
    std::fs::remove_file(folder.join("checkpoint.safetensors"))?;
    Ok(Some(entry))
}

/// Both processes of a run. A training that was stopped continues.
fn train_and_evaluate(
    args: &Args,
    job: &Job,
    threads: usize,
    commit: &str,
    interrupt: &Interrupt,
) -> Result<Entry> {
    let start = Instant::now();
    let folder = args.out.join(&job.id);
    let (epochs, seed) = (args.epochs.to_string(), job.seed.to_string());
    let mut options: Vec<&str> = job.cell.options.iter().map(String::as_str).collect();
    let path = folder.to_str().context("the folder's name is no UTF-8")?;
    options.extend([
        "--epochs",
        &epochs,
        "--seed",
        &seed,
        "--evaluate-every",
        "0",
        "--brief",
        "--resume",
        "--out",
        path,
    ]);
    if args.smoke {
        options.push("--smoke");
    }
    process(job.cell.method.name(), &options, threads, interrupt)?;
    let mut options = vec![path, "--quick", "--images", "300"];
    if args.smoke {
        options.push("--smoke");
    }
    process("evaluate", &options, threads, interrupt)?;
    let outcome: Outcome = serde_json::from_slice(&file::read(&folder.join("result.json"))?)?;
    let evaluation: Report = serde_json::from_slice(&file::read(&folder.join("evaluation.json"))?)?;
    Ok(Entry {
        id: job.id.clone(),
        group: job.cell.group.to_string(),
        method: job.cell.method.name().to_string(),
        variant: job.cell.variant.clone(),
        seed: job.seed,
        epochs: args.epochs,
        options: job.cell.options.clone(),
        figures: figures(&outcome, &evaluation),
        seconds: start.elapsed().as_secs_f64(),
        threads,
        commit: commit.to_string(),
        machine: machine(),
        network: Some(outcome.network),
    })
}

/// Runs the example of this name, which lies beside this one.
fn process(name: &str, options: &[&str], threads: usize, interrupt: &Interrupt) -> Result<()> {
    let here = std::env::current_exe()?;
    let program = here.parent().unwrap_or(Path::new(".")).join(name);
    ensure!(
        program.exists(),
        "expected {}; build it with: cargo build --release --examples",
        program.display()
    );
    let mut command = Command::new(program);
    command.args(options).envs(environment::settings(threads));
    let output = interrupt.output(&mut command).with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = said.lines().rev().take(5).collect();
        bail!(
            "{name} {}: {}",
            output.status,
            last.into_iter().rev().collect::<Vec<_>>().join(" | ")
        );
    }
    Ok(())
}

fn figures(outcome: &Outcome, evaluation: &Report) -> BTreeMap<String, f64> {
    let mut figures = BTreeMap::new();
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(value) = value.filter(|v| v.is_finite()) {
            figures.insert(name.to_string(), value);
        }
    };
    let layer = evaluation.card.layer;
    put("knn", outcome.knn.first().copied());
    put("knn_poses", outcome.knn_poses);
    let scores = &outcome.equivariance;
    put("equivariance", scores.get(layer - 1).copied().flatten());
    for (i, score) in scores.iter().enumerate() {
        put(&format!("equivariance_block{}", i + 1), *score);
    }
    put("feature_std", Some(f64::from(outcome.feature_std)));
    if let Some(last) = &outcome.last {
        put("invariance_loss", Some(f64::from(last.invariance)));
        put("equivariance_loss", last.equivariance.map(f64::from));
        put("matching", last.matching.map(|m| 100.0 * f64::from(m)));
    }
    put("images_per_s", Some(outcome.images_per_s));
    put("peak_mib", outcome.peak_mib);
    put("probe", evaluation.probe.first().map(|r| r.accuracy));
    for orbit in evaluation.poses.first().iter().flat_map(|row| &row.orbits) {
        let name = &orbit.name;
        put(&format!("{name}_moved"), Some(orbit.probe.moved));
        put(&format!("{name}_worst"), Some(orbit.probe.worst_element));
        put(&format!("{name}_consistency"), Some(orbit.probe.consistency));
        put(&format!("{name}_averaged"), Some(orbit.averaged));
    }
    let corruptions = evaluation.corruptions.as_ref();
    put("corrupted", corruptions.map(|c| c.mean_accuracy));
    put("mce", corruptions.and_then(|c| c.mce));
    put(
        "flips",
        evaluation
            .perturbations
            .as_ref()
            .map(|p| p.each.iter().map(|f| f.probability).sum::<f64>() / p.each.len() as f64),
    );
    if let Some(row) = evaluation.dense.as_ref().and_then(|d| d.rows.first()) {
        put("miou", Some(row.miou));
        put("box_iou", Some(row.box_iou));
        put("ap50", Some(row.ap50));
        put("pck", Some(row.correspondence.pck1));
    }
    figures
}

/// The figures of a finished run in one line.
fn line(entry: &Entry) -> String {
    let shown = ["probe", "knn", "knn_poses", "equivariance", "corrupted", "box_iou", "pck"];
    let show = |name: &&str| Some(format!("{name} {:.3}", entry.figures.get(*name)?));
    shown.iter().filter_map(show).collect::<Vec<_>>().join("  ")
}

/// The commit that is checked out, if this is a clone.
fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let text = output.ok().filter(|o| o.status.success()).map(|o| o.stdout);
    text.map_or("unknown".to_string(), |t| String::from_utf8_lossy(&t).trim().to_string())
}

/// The processor's name and the number of its threads.
fn machine() -> String {
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let name = name.map_or("unknown processor", |(_, n)| n.trim());
    format!("{name}, {cores} threads")
}
