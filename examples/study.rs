//! Makes the runs of docs/study/protocol.md, paired by seed, and reports on them.
//!
//! ```text
//! cargo build --release --examples
//! cargo run --release --example study -- --data eurosat=FOLDER --data cifar10=FOLDER   # continues where it stopped
//! cargo run --release --example study -- --report                                      # tables of the finished runs
//! cargo run --release --example study -- --report --ledger docs/results/study.jsonl    # those of the first study
//! ```
//!
//! Every run is a process of a trainer, then one of `evaluate`, with one thread; finished runs are lines of
//! docs/study/ledger.jsonl. Ctrl-C stops it at any time, and the same command goes on. While the file of `--pause-file`
//! exists, running processes stand still and no run starts. `kill -STOP -- -GROUP` does the same for the process group, and
//! `kill -CONT -- -GROUP` ends it, but such a pause counts as time of the runs.

use std::{
    collections::{BTreeMap, VecDeque, btree_map},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use ser_reg_trainers::{
    data, eprintln, println,
    report::kept,
    run::{
        file,
        interrupt::{Interrupt, STOPPED},
        lock::Lock,
    },
    settings::check::{MOST, count},
    study::{
        first,
        images::{self, Ready},
        ledger::{self, Entry, Ledger},
        plan::{self, Cell, Group, Set, Work},
        protocol,
        runs::{Job, Runs, commit},
        summary,
    },
};

/// The ledger of the runs that follow the protocol.
const LEDGER: &str = "docs/study/ledger.jsonl";
/// The ledger of the first study, which the kept scores of the trainers come from.
const FIRST: &str = "docs/results/study.jsonl";
/// Seconds of a run before any was measured.
const GUESS: f64 = 200.0;
const LAST_WORDS: &str = "stopped; the same command goes on";

#[derive(Debug, Parser)]
struct Args {
    /// The folder of a set of images, eurosat, cifar10 or bccd. Runs of a set without a folder are not made.
    #[arg(long, value_name = "NAME=PATH")]
    data: Vec<String>,
    /// Only these groups of the protocol: A to I, as A,C.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Give this candidate of group C as many seeds as group A has, once the rule has chosen it.
    #[arg(long, value_name = "VARIANT")]
    extend: Option<String>,
    /// Runs at a time, each with one thread.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Start no run after this number of minutes.
    #[arg(long, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// While this file exists, the runs stand still, and the time does not count [default: the file pause in --out].
    #[arg(long, value_name = "FILE")]
    pause_file: Option<PathBuf>,
    /// Finished runs [default: docs/study/ledger.jsonl; of a smoke run, a new file in its folder].
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Folder of the runs. Groups E, H and I need the encoders of group A in it.
    #[arg(long, default_value = "runs/study")]
    out: PathBuf,
    /// Print tables of the finished runs, and run nothing.
    #[arg(long)]
    report: bool,
    /// Make two short runs and an evaluation, on the images that come with the repository.
    #[arg(long)]
    smoke: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = match (&args.ledger, args.smoke) {
        (Some(path), _) => path.clone(),
        (None, false) => PathBuf::from(LEDGER),
        (None, true) => args.out.join("smoke.jsonl"),
    };
    let given = check(&args, &path)?;
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
        protocol::check(&ledger::read(&path)?.entries, &path)?;
        if let Some(mended) = ledger::mend(&path)? {
            println!("{mended}");
        }
        run(&args, &given, &path, &interrupt)?;
    }
    report(&path, &page)
}

fn report(ledger: &Path, page: &Path) -> Result<()> {
    let Ledger { entries, notes } = ledger::read(ledger)?;
    let of = protocol::of_all(&entries, ledger)?;
    for note in notes {
        println!("{}: {note}", ledger.display());
    }
    if ledger == Path::new(FIRST) {
        // The trainers show them beside their own runs.
        file::write(kept::PATH.as_ref(), kept::json(&entries)?.as_bytes())?;
    }
    let (text, html) = match of {
        None if !entries.is_empty() => {
            println!("{}", protocol::note(&entries));
            (first::markdown(&entries), first::html(&entries)?)
        }
        _ => (summary::markdown(&entries), summary::html(&entries)?),
    };
    println!("\n{text}");
    file::write(page, html.as_bytes())?;
    println!("charts {}", page.display());
    Ok(())
}

/// Refuses what would fail later; gives the folders of `--data`.
fn check(args: &Args, ledger: &Path) -> Result<BTreeMap<String, PathBuf>> {
    count("--jobs", 1..=MOST, args.jobs)?;
    if let Some(minutes) = args.minutes {
        let accepted = minutes >= 0.0 && minutes.is_finite();
        ensure!(accepted, "--minutes: expected a finite number, at least 0, got {minutes}");
    }
    for group in &args.only {
        Group::from_str(group).map_err(|e| anyhow!("--only: {e}"))?;
    }
    if let Some(variant) = &args.extend {
        let names: Vec<String> = plan::candidates().into_iter().map(|(name, _)| name).collect();
        ensure!(
            names.contains(variant),
            "--extend: expected a candidate of group C ({}), got {variant}",
            names.join("; ")
        );
    }
    let given = images::given(&args.data)?;
    if args.report {
        ensure!(
            ledger.is_file(),
            "--ledger: expected the file of finished runs, got {}, which is no file",
            ledger.display()
        );
    } else {
        let folder = file::folder(ledger);
        ensure!(
            ledger != Path::new(LEDGER) || folder.is_dir(),
            "--ledger: expected the folder {} here; run it in the root of the repository, or give --ledger",
            folder.display()
        );
        std::fs::create_dir_all(folder)
            .with_context(|| format!("--ledger: cannot make the folder {}", folder.display()))?;
        file::check_writable(ledger, "--ledger")?;
    }
    if args.report && ledger == Path::new(FIRST) {
        let kept = "run it in the root of the repository, or give --ledger";
        file::check_writable(kept::PATH.as_ref(), "--ledger").context(kept)?;
    }
    Ok(given)
}

/// Makes the sets ready that the cells need; says which cells are not run, and leaves them out.
fn sets(
    cells: &mut Vec<Cell>,
    given: &BTreeMap<String, PathBuf>,
    out: &Path,
) -> Result<BTreeMap<Set, Ready>> {
    let mut sets = BTreeMap::new();
    let mut skipped = BTreeMap::<(Group, Set, String), u64>::new();
    let mut left = Vec::new();
    for cell in cells.drain(..) {
        let path = match cell.set.given_as() {
            None => Some(data::fashion_mnist()),
            Some(name) => given.get(name).cloned(),
        };
        let reason = match (&cell.work, path) {
            (Work::Missing(why), _) => why.to_string(),
            (_, None) => {
                format!("no data (--data {}=PATH)", cell.set.given_as().unwrap_or_default())
            }
            (_, Some(path)) => {
                if let btree_map::Entry::Vacant(set) = sets.entry(cell.set) {
                    set.insert(images::ready(cell.set, &path, out)?);
                }
                left.push(cell);
                continue;
            }
        };
        let runs = cell.seeds.end - cell.seeds.start;
        *skipped.entry((cell.group, cell.set, reason)).or_default() += runs;
    }
    for ((group, set, reason), runs) in skipped {
        println!("{}, {set}: {runs} runs not run: {reason}", group.name());
    }
    *cells = left;
    Ok(sets)
}

fn run(
    args: &Args,
    given: &BTreeMap<String, PathBuf>,
    ledger: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut cells = match args.smoke {
        true => plan::smoke(),
        false => plan::cells(args.extend.as_deref()),
    };
    cells.retain(|c| args.only.is_empty() || args.only.iter().any(|name| name == c.group.name()));
    let sets = sets(&mut cells, given, &args.out)?;
    let done = ledger::read(ledger)?.entries;
    let job = |cell: &Cell, seed| Job { id: cell.id(seed), cell: cell.clone(), seed };
    let mut jobs: Vec<Job> =
        cells.iter().flat_map(|cell| cell.seeds.clone().map(move |seed| job(cell, seed))).collect();
    jobs.retain(|job| !done.iter().any(|e| e.id == job.id));
    let known: Vec<f64> = done.iter().map(|e| e.seconds).collect();
    let each = match known.is_empty() {
        true => GUESS,
        false => known.iter().sum::<f64>() / known.len() as f64,
    };
    println!(
        "{} runs to do, {} done; about {:.0} minutes with {} at a time{}",
        jobs.len(),
        known.len(),
        jobs.len() as f64 * each / args.jobs as f64 / 60.0,
        args.jobs,
        if known.is_empty() { " (a guess)" } else { "" }
    );
    let runs = Runs {
        out: &args.out,
        ledger,
        sets,
        pause: args.pause_file.clone().unwrap_or_else(|| args.out.join("pause")),
        smoke: args.smoke,
        interrupt,
        commit: commit(),
    };
    println!("runs stand still while {} exists", runs.pause.display());
    let start = Instant::now();
    interrupt.busy();
    let (needing, first): (Vec<Job>, Vec<Job>) =
        jobs.into_iter().partition(|job| runs.source(job).is_some());
    let mut failures = all(args, &runs, first, start)?;
    // Only now the encoders of group A are there.
    let (needing, without): (Vec<Job>, Vec<Job>) =
        needing.into_iter().partition(|job| runs.source(job).is_some_and(|path| path.is_file()));
    if !without.is_empty() && !interrupt.asked() {
        let ids: Vec<&str> = without.iter().map(|job| job.id.as_str()).collect();
        println!(
            "{} runs not run, because {} has no encoder of group A for them: {}",
            ids.len(),
            args.out.display(),
            ids.join(", ")
        );
    }
    failures.extend(all(args, &runs, needing, start)?);
    if interrupt.asked() {
        println!("{LAST_WORDS}");
        std::process::exit(STOPPED);
    }
    println!("{:.0} minutes", start.elapsed().as_secs_f64() / 60.0);
    ensure!(
        failures.is_empty(),
        "failed: {}; run again to try these once more",
        failures.join(", ")
    );
    Ok(())
}

/// Makes these runs, several at a time; gives the names of those that failed.
fn all(args: &Args, runs: &Runs, jobs: Vec<Job>, start: Instant) -> Result<Vec<String>> {
    let bar = ProgressBar::new(jobs.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len} runs  {msg}  {eta} left")?);
    let late = || {
        let over = args.minutes.is_some_and(|m| start.elapsed().as_secs_f64() > 60.0 * m);
        over || runs.interrupt.asked()
    };
    let at_once = args.jobs.min(jobs.len());
    let queue: Mutex<VecDeque<Job>> = Mutex::new(jobs.into());
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
                    let outcome = runs.make(&job);
                    bar.inc(1);
                    match outcome {
                        Ok(Some(entry)) => bar.suspend(|| {
                            println!("{} in {:.0} s: {}", job.id, entry.seconds, line(&entry));
                        }),
                        Ok(None) => bar.suspend(|| {
                            println!("{}: another study runs it, or has run it", job.id);
                        }),
                        // Its training has a checkpoint.
                        Err(_) if runs.interrupt.asked() => {}
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
    Ok(failures.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// The figures of a finished run in one line.
fn line(entry: &Entry) -> String {
    let shown =
        ["equivariance", "matching_d4_exact", "d4_mean", "probe", "knn", "few5_upright", "flips"];
    let show = |name: &&str| Some(format!("{name} {:.3}", entry.figures.get(*name)?));
    shown.iter().filter_map(show).collect::<Vec<_>>().join("  ")
}
