//! What a run has left in its folder, finished or not.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde::de::DeserializeOwned;

use super::{
    Report, kept,
    page::Table,
    panel::Panel,
    scores::{self, Scores},
};
use crate::{
    data::{Data, Images, draw},
    encoder,
    eval::{self, subject},
    records::Record,
    run::{file, finish::Outcome, images, log, variants::VARIANTS},
    settings::Settings,
    vit::Vit,
};

/// A run as its folder holds it.
pub struct Folder {
    /// The name of the folder.
    pub name: String,
    pub path: PathBuf,
    pub settings: Settings,
    pub records: Vec<Record>,
    /// `None` if the run has not finished.
    pub outcome: Option<Outcome>,
    /// What `evaluate` has measured; `None` if it did not run.
    pub evaluation: Option<eval::Report>,
}

impl Folder {
    /// Reads the files of the run in `path`.
    ///
    /// # Errors
    /// If there is no such folder, no `config.json` in it, or a file that cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        ensure!(path.is_dir(), "{shown}: expected the folder of a run, got no folder");
        let config = path.join("config.json");
        ensure!(
            config.exists(),
            "{shown}: expected the folder of a run, got a folder without config.json"
        );
        let settings: Settings = json(&config)?;
        let metrics = path.join("metrics.jsonl");
        let name = path.canonicalize()?;
        let name = name.file_name().unwrap_or(path.as_os_str());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            path: path.to_path_buf(),
            settings,
            records: match metrics.exists() {
                true => log::read(&metrics)?,
                false => Vec::new(),
            },
            outcome: optional(&path.join("result.json"))?,
            evaluation: optional(&path.join("evaluation.json"))?,
        })
    }

    /// Steps that the run has made.
    pub fn steps(&self) -> usize {
        let step = |record: &Record| match record {
            Record::Step(step) => Some(step.step + 1),
            _ => None,
        };
        self.records.iter().filter_map(step).max().unwrap_or(0)
    }

    /// Name and value of every setting, `ser.lambda` for a field in a field.
    pub fn flat_settings(&self) -> Result<Vec<(String, String)>> {
        fn walk(path: &str, value: &serde_json::Value, rows: &mut Vec<(String, String)>) {
            match value {
                serde_json::Value::Object(fields) => {
                    for (name, value) in fields {
                        let dot = if path.is_empty() { "" } else { "." };
                        walk(&format!("{path}{dot}{name}"), value, rows);
                    }
                }
                serde_json::Value::Null => {}
                serde_json::Value::String(text) => rows.push((path.to_string(), text.clone())),
                value => rows.push((path.to_string(), value.to_string())),
            }
        }
        let mut rows = Vec::new();
        walk("", &serde_json::to_value(&self.settings)?, &mut rows);
        rows.sort();
        Ok(rows)
    }

    /// The row of the final table; its values are empty if the run has not finished.
    pub fn scores(&self, name: &str) -> Scores {
        match &self.outcome {
            Some(outcome) => Scores::of(name, &self.settings, outcome, self.evaluation.as_ref()),
            None => Scores {
                name: format!("{name} (unfinished, {} steps)", self.steps()),
                ..Default::default()
            },
        }
    }

    /// The final table of this run: its scores, the other variants, and the references below. Then sentences on it.
    ///
    /// # Errors
    /// If a file of a variant or the kept scores cannot be read.
    pub fn table(&self) -> Result<(Table<'static>, Vec<String>)> {
        let settings = &self.settings;
        let name = match settings.mode() {
            "ser" => format!("SER, lambda {}", settings.ser.loss.lambda),
            "lambda0" => "lambda = 0".to_string(),
            mode => mode.to_string(),
        };
        let name = format!("{name} (this run, seed {})", settings.seed);
        let mut rows = vec![self.scores(&name)];
        let (others, notes) = self.variants()?;
        rows.extend(others);
        if let Some(outcome) = &self.outcome {
            rows.extend(Scores::of_references(settings, outcome));
        }
        let table = scores::table("What SER changed", Some(settings.ser.layer), &rows);
        Ok((table, notes))
    }

    /// The variants that `--compare` has trained with these settings, or else kept scores.
    fn variants(&self) -> Result<(Vec<Scores>, Vec<String>)> {
        let (mut rows, mut notes) = (Vec::new(), Vec::new());
        for (name, _) in VARIANTS {
            let path = self.path.join(name);
            if !path.join("result.json").exists() {
                continue;
            }
            let variant = Self::read(&path)?;
            let mut same = variant.settings.clone();
            same.baseline = self.settings.baseline;
            same.ser.loss.lambda = self.settings.ser.loss.lambda;
            if same == self.settings {
                let title = if name == "lambda0" { "lambda = 0" } else { name };
                rows.push(variant.scores(&format!("{title} (--compare)")));
            }
        }
        if rows.is_empty() {
            let note;
            (rows, note) = kept::beside(&self.settings)?;
            notes.push(note);
        }
        Ok((rows, notes))
    }

    /// Prints the final table.
    pub fn print(&self) -> Result<()> {
        let (table, notes) = self.table()?;
        println!("\n{}", table.text());
        println!("{}", scores::SHORT);
        for note in notes {
            println!("{note}");
        }
        if let Some(outcome) = &self.outcome {
            println!("data: {}", outcome.note);
        }
        Ok(())
    }

    /// The page of this run alone.
    pub fn page(&self, panel: Option<Panel>) -> Result<String> {
        let settings = &self.settings;
        let (scores, mut notes) = self.table()?;
        if self.outcome.is_none() {
            let steps = self.steps();
            notes.push(format!("The run is unfinished: its curves end after {steps} steps."));
        }
        let report = Report {
            title: &format!(
                "{} / {} / seed {}",
                settings.method.name(),
                settings.mode(),
                settings.seed
            ),
            scores,
            notes: &notes,
            config: self.flat_settings()?,
            result: self.outcome.as_ref().map_or(Vec::new(), result_rows),
            records: &self.records,
            panel,
        };
        report.html()
    }

    /// The images that the run was trained and measured on.
    pub fn data(&self) -> Result<Data> {
        Ok(images(&self.settings)?.0)
    }

    /// The token maps of `count` test images, by the encoder or the checkpoint in the folder.
    pub fn panel(&self, test: &Images, count: usize) -> Result<Panel> {
        let (vit, card) = encoder::load(&subject::file(&self.path), &Device::Cpu)?;
        panel(&vit, test, count, &card.statistics, card.layer, &Device::Cpu)
    }
}

/// The token maps of `count` test images, drawn by class.
pub fn panel(
    vit: &Vit,
    test: &Images,
    count: usize,
    statistics: &[(f32, f32)],
    layer: usize,
    device: &Device,
) -> Result<Panel> {
    let indices = draw::by_class(&test.labels, count, draw::SEED);
    let vit = vit.with_last_map();
    Panel::new(&vit, test, &indices, statistics, layer, device)
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&file::read(path)?)
        .with_context(|| format!("{} was not written by this version", path.display()))
}

fn optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    path.exists().then(|| json(path)).transpose()
}

fn result_rows(outcome: &Outcome) -> Vec<(String, String)> {
    let row = |name: &str, value: String| (name.to_string(), value);
    let ratio = |x: Option<f64>| x.map_or("–".to_string(), |x| format!("{x:.4}x"));
    let scores = outcome.equivariance.iter().enumerate().map(|(i, score)| {
        let shown = score.map_or("–".to_string(), |s| format!("{s:.3}"));
        row(&format!("equivariance score, block {}", i + 1), shown)
    });
    let others = [
        row("network measured", outcome.network.name().to_string()),
        row("steps", outcome.steps.to_string()),
        row("images/s", format!("{:.0}", outcome.images_per_s)),
        row("waiting for images", format!("{:.1} %", 100.0 * outcome.waiting)),
        row("cost of the regularizer, counted", ratio(outcome.overhead_predicted)),
        row("cost of the regularizer, timed", ratio(outcome.overhead_measured)),
        row("images skipped", outcome.skipped.to_string()),
        row("data", outcome.note.clone()),
    ];
    scores.chain(others).collect()
}
