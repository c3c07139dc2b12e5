//! One run of the study: a process of a trainer, then one of `evaluate`, each with one thread.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    images::Ready,
    ledger::{self, Entry},
    plan::{Cell, Set, Work},
    protocol, record,
};
use crate::{
    environment,
    eval::Report,
    run::{file, finish::Outcome, interrupt::Interrupt, log},
};

/// Test images that are moved, matched and corrupted.
const IMAGES: &str = "1000";
const THREADS: usize = 1;

/// A cell with one seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub cell: Cell,
    pub seed: u64,
    pub id: String,
}

/// What all runs share.
pub struct Runs<'a> {
    /// Folder of the runs.
    pub out: &'a Path,
    pub ledger: &'a Path,
    pub sets: BTreeMap<Set, Ready>,
    /// While this file exists, running processes stand still and no other one starts.
    pub pause: PathBuf,
    pub smoke: bool,
    pub interrupt: &'a Interrupt,
    /// The commit of the programs that are about to run, not of what is checked out while they do.
    pub commit: String,
}

/// The files and times of both processes.
struct Made {
    folder: PathBuf,
    start: Instant,
    paused: Duration,
}

impl Runs<'_> {
    /// Makes a run and adds it to the ledger; `None` if another study that shares the ledger does so.
    pub fn make(&self, job: &Job) -> Result<Option<Entry>> {
        while self.paused() && !self.interrupt.asked() {
            sleep(Duration::from_millis(200));
        }
        ensure!(!self.interrupt.asked(), "stopped before it began");
        let folder = self.out.join(&job.id);
        let Some(_claim) = ledger::claim(&folder)? else {
            return Ok(None);
        };
        if ledger::read(self.ledger)?.entries.iter().any(|e| e.id == job.id) {
            return Ok(None);
        }
        let entry = self.train_and_evaluate(job)?;
        ledger::append(self.ledger, &entry)?;
        // The run is in the ledger: nothing will resume it.
        let checkpoint = folder.join("checkpoint.safetensors");
        if checkpoint.exists() {
            std::fs::remove_file(checkpoint)?;
        }
        Ok(Some(entry))
    }

    /// The encoder that the job needs; `None` if it needs none.
    pub fn source(&self, job: &Job) -> Option<PathBuf> {
        let source = job.cell.source(job.seed)?;
        Some(self.out.join(source).join("encoder.safetensors"))
    }

    fn paused(&self) -> bool {
        self.pause.exists()
    }

    /// Both processes. A training that was stopped continues.
    fn train_and_evaluate(&self, job: &Job) -> Result<Entry> {
        let mut made =
            Made { folder: self.out.join(&job.id), start: Instant::now(), paused: Duration::ZERO };
        let source = self.source(job);
        let source = source.as_deref().map(utf8).transpose()?;
        let path = utf8(&made.folder)?.to_string();
        let mut figures = BTreeMap::new();
        let options = match &job.cell.work {
            Work::Missing(why) => bail!("{why}"),
            Work::Train(options) | Work::Continue(_, options) => {
                let mut words: Vec<&str> = options.iter().map(String::as_str).collect();
                if let Some(source) = source {
                    words.extend(["--init", source]);
                }
                self.train(job, &words, &mut made)?;
                let parts = "probe,knn,poses,matching";
                self.evaluate(&[&path, "--only", parts], &mut made)?;
                options
            }
            Work::Evaluate(options) => {
                let encoder = source.context("expected an encoder of group A")?;
                let json = made.folder.join("evaluation.json");
                let words = options.iter().map(String::as_str);
                let words: Vec<&str> =
                    [encoder, "--json", utf8(&json)?].into_iter().chain(words).collect();
                self.evaluate(&words, &mut made)?;
                options
            }
        };
        let report: Report =
            serde_json::from_slice(&file::read(&made.folder.join("evaluation.json"))?)?;
        record::evaluation(&mut figures, &report);
        if !matches!(job.cell.work, Work::Evaluate(_)) {
            let outcome: Outcome =
                serde_json::from_slice(&file::read(&made.folder.join("result.json"))?)?;
            let records = log::read(&made.folder.join("metrics.jsonl"))?;
            record::training(&mut figures, &outcome, &records, report.card.layer);
            record::check(&figures)?;
        }
        if !made.paused.is_zero() {
            record::without_times(&mut figures);
        }
        let cell = &job.cell;
        Ok(Entry {
            id: job.id.clone(),
            group: cell.group.name().to_string(),
            data: Some(cell.set.name().to_string()),
            images: self.sets.get(&cell.set).and_then(|set| set.list.clone()),
            method: cell.method.name().to_string(),
            variant: cell.variant.clone(),
            seed: job.seed,
            epochs: cell.epochs,
            options: options.clone(),
            figures,
            seconds: (made.start.elapsed() - made.paused).as_secs_f64(),
            paused: made.paused.as_secs_f64(),
            threads: THREADS,
            commit: self.commit.clone(),
            machine: machine(),
            network: Some(report.card.network),
            protocol: Some(protocol::hash()),
        })
    }

    fn train(&self, job: &Job, options: &[&str], made: &mut Made) -> Result<()> {
        let (epochs, seed) = (job.cell.epochs.to_string(), job.seed.to_string());
        let set = self.sets.get(&job.cell.set).context("expected the images of the run")?;
        let fixed = ["--evaluate-every", "0", "--brief", "--resume"];
        let mut words = [options, &fixed].concat();
        let folder = made.folder.clone();
        words.extend(["--data", utf8(&set.path)?, "--out", utf8(&folder)?]);
        words.extend(["--epochs", &epochs, "--seed", &seed]);
        self.process(job.cell.method.name(), &words, made)
    }

    fn evaluate(&self, options: &[&str], made: &mut Made) -> Result<()> {
        let words = [options, &["--quick", "--images", IMAGES]].concat();
        self.process("evaluate", &words, made)
    }

    /// Runs the example of this name, which lies beside this one.
    fn process(&self, name: &str, options: &[&str], made: &mut Made) -> Result<()> {
        let here = std::env::current_exe()?;
        let program = here.parent().unwrap_or(Path::new(".")).join(name);
        ensure!(
            program.exists(),
            "expected {}; build it with: cargo build --release --examples",
            program.display()
        );
        let mut command = Command::new(program);
        command.args(options).envs(environment::settings(THREADS));
        if self.smoke {
            command.arg("--smoke");
        }
        let output = self.interrupt.output(&mut command, || self.paused());
        let (output, paused) = output.with_context(|| format!("cannot start {name}"))?;
        made.paused += paused;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last: Vec<&str> = said.lines().rev().take(5).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            bail!("{name} {}: {}", output.status, last.join(" | "));
        }
        Ok(())
    }
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("expected a name in UTF-8, got {}", path.display()))
}

/// The commit that is checked out, if this is a clone.
pub fn commit() -> String {
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
