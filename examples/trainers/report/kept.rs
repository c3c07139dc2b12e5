//! Kept scores of the small preset: means over the runs of the study, to compare a single run with.
//!
//! `kept.json` is computed from `docs/results/study.jsonl`, the ledger of the first study, by
//! `study --report --ledger docs/results/study.jsonl`. A test compares both.

use anyhow::{Context, Result};
use clap::Parser;
use serde::{Deserialize, Serialize};

use super::scores::Scores;
use crate::{
    cli::Args,
    encoder::Network,
    settings::{Method, Settings},
    study::ledger::{self, Entry},
};

const FILE: &str = include_str!("kept.json");

/// Where `study --report` of the first study writes the kept scores, from the root of the repository.
pub const PATH: &str = "examples/trainers/report/kept.json";

/// Modes of a run, with their variants in the study and their names in the table.
const MODES: [(&str, &str, &str); 3] =
    [("ser", "SER", "SER"), ("lambda0", "λ=0", "lambda = 0"), ("baseline", "baseline", "baseline")];

/// Means over the seeds of one method, mode and number of epochs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub method: String,
    pub mode: String,
    pub epochs: usize,
    pub seeds: Vec<u64>,
    /// The commits that the runs were trained at.
    pub commits: Vec<String>,
    pub equivariance: f64,
    pub knn: f64,
    pub knn_poses: f64,
    pub probe: f64,
    pub flips: f64,
    /// The network that all of them measured; `None` where a line of the ledger does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// All kept scores.
pub fn all() -> Result<Vec<Kept>> {
    serde_json::from_str(FILE).context("cannot read the kept scores")
}

/// The kept scores as the file holds them.
pub fn json(entries: &[Entry]) -> Result<String> {
    Ok(serde_json::to_string_pretty(&from_ledger(entries)?)? + "\n")
}

/// The kept scores of the runs in the study's ledger.
pub fn from_ledger(entries: &[Entry]) -> Result<Vec<Kept>> {
    let entries = ledger::distinct(entries).entries;
    let mut kept = Vec::new();
    for method in Method::ALL.map(Method::name) {
        let of_method: Vec<&Entry> =
            entries.iter().filter(|e| e.group == "methods" && e.method == method).collect();
        let mut epochs: Vec<usize> = of_method.iter().map(|e| e.epochs).collect();
        epochs.sort_unstable();
        epochs.dedup();
        for epochs in epochs {
            for (mode, variant, _) in MODES {
                let is_run = |e: &&&Entry| e.variant == variant && e.epochs == epochs;
                let runs: Vec<&Entry> = of_method.iter().filter(is_run).copied().collect();
                if !runs.is_empty() {
                    kept.push(mean(method, mode, epochs, &runs)?);
                }
            }
        }
    }
    Ok(kept)
}

fn mean(method: &str, mode: &str, epochs: usize, runs: &[&Entry]) -> Result<Kept> {
    let mean = |name: &str| -> Result<f64> {
        let value = |run: &&Entry| run.figures.get(name).copied();
        let values: Option<Vec<f64>> = runs.iter().map(value).collect();
        let values = values.with_context(|| format!("{method} {mode}: a run has no {name}"))?;
        // Rounded, so that the file does not depend on the order of the sum.
        Ok((values.iter().sum::<f64>() / values.len() as f64 * 1e4).round() / 1e4)
    };
    let mut seeds: Vec<u64> = runs.iter().map(|e| e.seed).collect();
    seeds.sort_unstable();
    let mut commits: Vec<String> = runs.iter().map(|e| e.commit.clone()).collect();
    commits.sort();
    commits.dedup();
    Ok(Kept {
        method: method.to_string(),
        mode: mode.to_string(),
        epochs,
        seeds,
        commits,
        equivariance: mean("equivariance")?,
        knn: mean("knn")?,
        knn_poses: mean("knn_poses")?,
        probe: mean("probe")?,
        flips: mean("flips")?,
        network: runs[0].network.filter(|_| runs.iter().all(|run| run.network == runs[0].network)),
    })
}

/// The kept scores of the other modes of this run, and where they come from; without rows if none match the settings.
pub fn beside(settings: &Settings) -> Result<(Vec<Scores>, String)> {
    let none = "There are no kept scores for these settings; --compare trains the baseline and lambda = 0.";
    let nothing = || (Vec::new(), none.to_string());
    if !is_preset(settings) {
        return Ok(nothing());
    }
    let mut kept = all()?;
    kept.retain(|k| {
        k.method == settings.method.name()
            && k.epochs == settings.epochs
            && k.mode != settings.mode()
    });
    if kept.is_empty() {
        return Ok(nothing());
    }
    let row = |k: &Kept| {
        let (_, _, name) = MODES
            .into_iter()
            .find(|(mode, ..)| *mode == k.mode)
            .with_context(|| format!("the kept scores name an unknown mode, {}", k.mode))?;
        Ok(Scores {
            name: format!("{name} (kept, mean of {} seeds)", k.seeds.len()),
            equivariance: Some(k.equivariance),
            upright: Some(k.knn),
            moved: Some(k.knn_poses),
            probe: Some(k.probe),
            flips: Some(k.flips),
            cost: (k.mode != "ser").then_some(1.0),
            images_per_s: None,
            seconds: None,
        })
    };
    let rows = kept.iter().map(row).collect::<Result<_>>()?;
    let mut commits: Vec<&str> = kept.iter().flat_map(|k| &k.commits).map(String::as_str).collect();
    commits.sort_unstable();
    commits.dedup();
    let mut seeds: Vec<u64> = kept.iter().flat_map(|k| k.seeds.clone()).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    let is_other = |k: &Kept| k.network != Some(Network::Teacher);
    let network = match settings.method == Method::Dino && kept.iter().any(is_other) {
        true => " The kept runs of DINO measured the student, not the teacher.",
        false => "",
    };
    let note = format!(
        "Kept rows were not trained now: they are means over earlier runs of this preset ({} epochs, seeds {}, commit {}; \
         docs/results/study.jsonl). --compare trains these variants here.{network}",
        settings.epochs,
        seeds.join(", "),
        commits.join(", ")
    );
    Ok((rows, note))
}

/// Whether a run of other seed, mode, weight and length has the values of the small preset.
fn is_preset(settings: &Settings) -> bool {
    let Ok(args) = Args::try_parse_from(["kept"]) else {
        return false;
    };
    let Ok(preset) = Settings::new(settings.method, &args) else {
        return false;
    };
    let mut same = settings.clone();
    (same.seed, same.epochs, same.baseline) = (preset.seed, preset.epochs, preset.baseline);
    same.ser.loss.lambda = preset.ser.loss.lambda;
    same == preset
}
