//! Several runs on one page: final scores, curves, accuracy by transform, token maps.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Result;
use plotters::style::{Color, HSLColor, RGBColor};

use super::{
    folder::Folder,
    page::{Figure, Page, Table},
    panel::{self, Panel},
    plots::{self, Axes, Bars, PALETTE},
    quantities::{self, LOSSES, Lines, SCHEDULES, SCORES, SPEED, SPREAD, Series, TRAINING},
    scores,
};
use crate::{data::Data, eval::POSES};

/// Images in the token maps of each run.
const SHOWN: usize = 2;

/// Runs to compare, and what a reader must know of them.
pub struct Comparison {
    pub runs: Vec<Folder>,
    /// One sentence each: unfinished runs, different data, a run that was named twice.
    pub notes: Vec<String>,
}

impl Comparison {
    /// Reads the runs. A run that is named twice is read once, and a copy of a run is left out.
    ///
    /// # Errors
    /// If a path is not the folder of a run.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let (mut runs, mut notes) = (Vec::<Folder>::new(), Vec::new());
        let mut known: Vec<PathBuf> = Vec::new();
        for path in paths {
            let run = Folder::read(path)?;
            let real = path.canonicalize()?;
            if known.contains(&real) {
                notes.push(format!("{} was named twice and is shown once.", path.display()));
                continue;
            }
            if let Some(original) = runs.iter().find(|other| same_run(other, &run)) {
                notes.push(format!(
                    "{} is a copy of {}, and one of both is shown.",
                    path.display(),
                    original.path.display()
                ));
                continue;
            }
            known.push(real);
            runs.push(run);
        }
        Ok(Self::new(runs, notes))
    }

    /// Adds what the runs themselves tell to `notes`.
    pub fn new(mut runs: Vec<Folder>, mut notes: Vec<String>) -> Self {
        // Folders of one name differ in their paths.
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for run in &mut runs {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = run.path.display().to_string();
            }
        }
        if runs.len() == 1 {
            notes
                .push("There is one run only, so there is nothing to compare it with.".to_string());
        }
        for run in runs.iter().filter(|run| run.outcome.is_none()) {
            notes.push(format!(
                "{} is unfinished: its curves end after {} steps, and the table has no scores of it.",
                run.name,
                run.steps()
            ));
        }
        if runs.iter().any(|run| data_of(run) != data_of(&runs[0])) {
            let each = |run: &Folder| format!("{}: {}", run.name, described(run));
            let each: Vec<String> = runs.iter().map(each).collect();
            notes.push(format!(
                "The runs used different data, so their scores are not comparable. {}.",
                each.join(". ")
            ));
        }
        Self { runs, notes }
    }

    /// The final scores, a row for each run.
    pub fn table(&self) -> Table<'static> {
        let rows: Vec<_> = self.runs.iter().map(|run| run.scores(&run.name)).collect();
        let first = self.runs.first().map(|run| run.settings.ser.layer);
        let same = |layer: &usize| self.runs.iter().all(|run| run.settings.ser.layer == *layer);
        scores::table("Final scores", first.filter(same), &rows)
    }

    /// The page.
    pub fn html(&self) -> Result<String> {
        let names: Vec<&str> = self.runs.iter().map(|run| run.name.as_str()).collect();
        let mut page = Page::new("Comparison of runs", &names.join(", "));
        page.notes(&self.notes);
        page.legend(&names.iter().zip(0..).map(|(name, i)| (*name, color(i))).collect::<Vec<_>>());
        page.tables(&[self.table()]);
        page.text(scores::READING);
        page.tables(&[self.differences()?]);

        let lines: Vec<Lines> = self.runs.iter().map(|r| Lines::of(&r.records)).collect();
        let series: Vec<Series> = self
            .runs
            .iter()
            .zip(&lines)
            .enumerate()
            .map(|(i, (run, lines))| Series {
                name: &run.name,
                color: Some(color(i)),
                lines,
                layer: run.settings.ser.layer,
            })
            .collect();
        if self.runs.iter().any(|run| run.outcome.is_some()) {
            page.section(
                "Rotated and flipped images",
                "Final scores of each encoder on all test images.",
            );
            page.figures(&self.bars()?);
        }
        if lines.iter().any(|l| l.epochs.iter().any(|e| e.is_measured())) {
            page.section(
                "Accuracy and equivariance by epoch",
                "Measured on a part of the test images after each epoch; epoch 0 is the untrained encoder.",
            );
            page.figures(&quantities::figures(&SCORES, &series)?);
            page.figures(&[SPREAD.figure(&series)?]);
            page.figures(&quantities::extras(&series)?);
        }
        if lines.iter().any(|l| !l.steps.is_empty()) {
            page.section(
                "Training",
                "One step is one batch. The pale line shows every step, the dark line a moving average.",
            );
            page.figures(&quantities::figures(&LOSSES, &series)?);
            page.figures(&quantities::figures(&TRAINING, &series)?);
            page.figures(&quantities::figures(&SCHEDULES, &series)?);
            page.section("Speed", "The speed of training; evaluation does not count.");
            page.figures(&quantities::figures(&SPEED, &series)?);
        }
        let (panels, missing) = self.panels();
        if !panels.is_empty() {
            let panels: Vec<_> = panels.iter().map(|(name, panel)| (*name, panel)).collect();
            panel::write(&panels, &mut page);
        }
        page.notes(&missing);
        Ok(page.html())
    }

    /// The settings in which the runs differ.
    fn differences(&self) -> Result<Table<'static>> {
        let mut header = vec![String::new()];
        let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (i, run) in self.runs.iter().enumerate() {
            header.push(run.name.clone());
            for (name, value) in run.flat_settings()? {
                let unset = || vec!["–".to_string(); self.runs.len()];
                values.entry(name).or_insert_with(unset)[i] = value;
            }
        }
        let differ = |(_, values): &(String, Vec<String>)| values.iter().any(|v| *v != values[0]);
        let row = |(name, values): (String, Vec<String>)| [vec![name], values].concat();
        Ok(Table {
            title: "Settings that differ",
            header,
            rows: values.into_iter().filter(differ).map(row).collect(),
        })
    }

    fn bars(&self) -> Result<Vec<Figure<'static>>> {
        let bars = |values: &dyn Fn(&Folder) -> Vec<Option<f64>>| -> Vec<Bars> {
            let bar = |(i, run): (usize, &Folder)| Bars {
                name: run.name.clone(),
                color: color(i),
                values: values(run),
            };
            self.runs.iter().enumerate().map(bar).collect()
        };
        let accuracy = bars(&|run| match &run.outcome {
            Some(outcome) => outcome.knn.iter().copied().map(Some).collect(),
            None => Vec::new(),
        });
        let scores =
            bars(&|run| run.outcome.as_ref().map_or(Vec::new(), |o| o.equivariance.clone()));
        let axes = Axes {
            x: "transform of the test images",
            y: "20-NN accuracy (%)",
            include: &[0.0, 100.0],
            wide: true,
            ..Default::default()
        };
        let depth = scores.iter().map(|bars| bars.values.len()).max().unwrap_or(0);
        let blocks: Vec<String> = (1..=depth).map(|k| format!("block {k}")).collect();
        let blocks: Vec<&str> = blocks.iter().map(String::as_str).collect();
        let block_axes = Axes {
            x: "",
            y: "centered equivariance score",
            include: &[0.0, 1.0],
            wide: true,
            ..Default::default()
        };
        Ok(vec![
            Figure {
                title: "Accuracy by transform",
                caption: "The neighbors are upright, the test images are rotated or flipped; transp and antitr mirror them \
                          at a diagonal.",
                svg: plots::bars(&axes, &POSES.map(|(name, _)| name), &accuracy)?,
                wide: true,
            },
            Figure {
                title: "Equivariance by block",
                caption: "1 is exact, 0 is unrelated.",
                svg: plots::bars(&block_axes, &blocks, &scores)?,
                wide: true,
            },
        ])
    }

    /// The token maps of each run, and why some are missing.
    fn panels(&self) -> (Vec<(&str, Panel)>, Vec<String>) {
        let (mut panels, mut missing) = (Vec::new(), Vec::new());
        // Runs on the same data read it once.
        let mut loaded: Option<(_, Data)> = None;
        for run in &self.runs {
            let source = (run.settings.data.clone(), run.settings.preset, run.settings.smoke);
            let mut panel = || -> Result<Panel> {
                let data = match loaded.take() {
                    Some((known, data)) if known == source => data,
                    _ => run.data()?,
                };
                let panel = run.panel(&data.test, SHOWN);
                loaded = Some((source.clone(), data));
                panel
            };
            match panel() {
                Ok(panel) => panels.push((run.name.as_str(), panel)),
                Err(e) => {
                    missing.push(format!("The token maps of {} are missing: {e:#}.", run.name))
                }
            }
        }
        (panels, missing)
    }
}

/// Whether two folders hold one run: settings and every record are the same, and there are some.
fn same_run(a: &Folder, b: &Folder) -> bool {
    a.settings == b.settings && !a.records.is_empty() && a.records == b.records
}

/// What decides which images a run was trained and measured on.
fn data_of(run: &Folder) -> (Option<&Path>, bool, &'static str) {
    let preset = match run.settings.preset {
        crate::settings::Preset::FashionTiny => "fashion-tiny",
        crate::settings::Preset::ImagenetVitS16 => "imagenet-vit-s16",
    };
    (run.settings.data.as_deref(), run.settings.smoke, preset)
}

fn described(run: &Folder) -> String {
    match (&run.outcome, &run.settings.data) {
        (Some(outcome), _) => outcome.note.clone(),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => "the images of the repository".to_string(),
    }
}

/// The color of a run: from the palette, then hues that are far from each other.
fn color(i: usize) -> RGBColor {
    match PALETTE.get(i) {
        Some(color) => *color,
        None => {
            let hue = (0.1 + 0.618 * (i - PALETTE.len()) as f64).fract();
            let (r, g, b) = HSLColor(hue, 0.6, 0.32).to_backend_color().rgb;
            RGBColor(r, g, b)
        }
    }
}
