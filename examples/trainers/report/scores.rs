//! The final table: what an encoder scores, and what its training costs.

use super::page::Table;
use crate::{
    eval::{self, pose_mean},
    run::finish::Outcome,
    settings::Settings,
};

/// One row of the final table. A value that was not measured is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    pub name: String,
    /// Centered equivariance score of the tapped block; 1 is exact.
    pub equivariance: Option<f64>,
    /// 20-NN accuracy in percent of upright images, and the mean over the seven rotations and flips.
    pub upright: Option<f64>,
    pub moved: Option<f64>,
    /// Accuracy of the linear probe in percent.
    pub probe: Option<f64>,
    /// Share of frames in percent at which the prediction changes under a slow perturbation.
    pub flips: Option<f64>,
    /// Multiply-adds of a step relative to the base method.
    pub cost: Option<f64>,
    /// Training images per second, and seconds of training; evaluation does not count.
    pub images_per_s: Option<f64>,
    pub seconds: Option<f64>,
}

impl Scores {
    /// The scores of a finished run, with those of `evaluate` if it ran.
    pub fn of(
        name: &str,
        settings: &Settings,
        outcome: &Outcome,
        evaluation: Option<&eval::Report>,
    ) -> Self {
        let rate = Some(outcome.images_per_s).filter(|rate| *rate > 0.0);
        let images = (outcome.steps * settings.batch_size) as f64;
        let probe = evaluation.and_then(|e| e.probe.first());
        let flips = evaluation.and_then(|e| e.perturbations.as_ref());
        Self {
            name: name.to_string(),
            equivariance: outcome.score(settings.ser.layer),
            upright: outcome.knn.first().copied(),
            moved: outcome.knn_poses,
            probe: probe.map(|row| row.accuracy),
            flips: flips.map(|p| {
                p.each.iter().map(|row| row.probability).sum::<f64>() / p.each.len() as f64
            }),
            cost: match (settings.mode(), &settings.addon) {
                ("ser", _) => outcome.overhead_predicted,
                (_, None) => Some(1.0),
                // The cost model does not count add-ons.
                (_, Some(_)) => None,
            },
            images_per_s: rate,
            seconds: rate.map(|rate| images / rate),
        }
    }

    /// The rows for comparison below the trained encoders: the untrained encoder and raw pixels.
    pub fn of_references(settings: &Settings, outcome: &Outcome) -> Vec<Self> {
        let row = |reference: &crate::run::finish::Reference| {
            let scores = &reference.equivariance;
            Self {
                name: reference.name.clone(),
                equivariance: scores.get(settings.ser.layer - 1).copied().flatten(),
                upright: reference.knn.first().copied(),
                moved: pose_mean(&reference.knn),
                ..Default::default()
            }
        };
        outcome.references.iter().map(row).collect()
    }
}

/// A column: its title, and the text of a row, if the row has a value.
type Column<'a> = (&'a str, fn(&Scores) -> Option<String>);

/// The rows as a table, the equivariance score first. A column without a value is left out.
pub fn table<'a>(title: &'a str, layer: Option<usize>, rows: &[Scores]) -> Table<'a> {
    let score = match layer {
        Some(layer) => format!("equivariance, block {layer}"),
        None => "equivariance".to_string(),
    };
    let columns: [Column; 8] = [
        (&score, |s| Some(format!("{:.3}", s.equivariance?))),
        ("20-NN upright %", |s| Some(format!("{:.1}", s.upright?))),
        ("rotated/flipped %", |s| Some(format!("{:.1}", s.moved?))),
        ("probe %", |s| Some(format!("{:.1}", s.probe?))),
        ("flips %", |s| Some(format!("{:.2}", s.flips?))),
        ("cost", |s| Some(format!("{:.3}x", s.cost?))),
        ("images/s", |s| Some(format!("{:.0}", s.images_per_s?))),
        ("training s", |s| Some(format!("{:.0}", s.seconds?))),
    ];
    let shown = columns.iter().filter(|(_, value)| rows.iter().any(|row| value(row).is_some()));
    let mut header = vec![String::new()];
    let mut cells: Vec<Vec<String>> = rows.iter().map(|row| vec![row.name.clone()]).collect();
    for (name, value) in shown {
        header.push(name.to_string());
        for (cells, row) in cells.iter_mut().zip(rows) {
            cells.push(value(row).unwrap_or_else(|| "–".to_string()));
        }
    }
    Table { title, header, rows: cells }
}

/// How to read the table.
pub const READING: &str = "The equivariance score is the mean cosine between the tokens of a rotated or flipped image and \
    the rotated or flipped tokens of the image, each less their mean token: 1 is exact, 0 is unrelated. 20-NN is the accuracy \
    of 20 nearest neighbors among upright training images, for upright test images and as the mean over the seven rotations \
    and flips. The cost counts multiply-adds of a training step relative to the base method.";

/// The same in short, for the terminal.
pub const SHORT: &str = "equivariance: 1 is exact, 0 is unrelated. rotated/flipped: mean 20-NN accuracy over seven transforms \
    of the test images.\ncost: multiply-adds of a training step relative to the base method.";
