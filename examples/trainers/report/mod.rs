//! Runs as HTML pages: one run ([`Report`]), or several side by side ([`compare`]).

pub mod compare;
pub mod folder;
pub mod kept;
pub mod page;
pub mod panel;
pub mod plots;
mod quantities;
mod scale;
pub mod scores;
mod series;

use anyhow::Result;
use plotters::style::RGBColor;

use self::{
    page::{Figure, Page, Table},
    panel::Panel,
    plots::{Axes, BLUE, Bars, GREY, INK, Line, ORANGE},
    quantities::{Lines, SCHEDULES, SPEED, SPREAD, Series, TRAINING},
};
use super::{
    eval::POSES,
    records::{Balanced, BalancedLayer, Epoch, Record, Step},
};

/// What the page of one run shows. A plot without values is left out.
pub struct Report<'a> {
    /// Method, mode and seed.
    pub title: &'a str,
    /// The final table, and sentences on it.
    pub scores: Table<'a>,
    pub notes: &'a [String],
    /// Name and value of each option.
    pub config: Vec<(String, String)>,
    /// Name and value of each figure of the final result.
    pub result: Vec<(String, String)>,
    pub records: &'a [Record],
    pub panel: Option<Panel>,
}

impl Report<'_> {
    /// The page.
    pub fn html(&self) -> Result<String> {
        let lines = Lines::of(self.records);
        let series = [Series { name: "", color: None, lines: &lines, layer: 0 }];
        let mut page = Page::new(self.title, &lead(&lines.steps, &lines.epochs));
        let scored = !self.scores.rows.is_empty();
        page.tables(std::slice::from_ref(&self.scores));
        page.notes(self.notes);
        if scored {
            page.text(scores::READING);
        }
        let table = |title, rows: &[(String, String)]| Table {
            title,
            header: Vec::new(),
            rows: rows.iter().map(|(k, v)| vec![k.clone(), v.clone()]).collect(),
        };
        page.tables(&[table("Result", &self.result)]);
        if lines.epochs.iter().any(|e| e.is_measured()) {
            page.section(
                "Accuracy and equivariance by epoch",
                "Measured on test images after each epoch, with the encoder frozen; epoch 0 is the untrained encoder.",
            );
            page.figures(&accuracy(&lines)?);
            let mut figures = vec![by_block(&lines)?, SPREAD.figure(&series)?];
            figures.extend(quantities::extras(&series)?);
            page.figures(&figures);
        }
        if let Some(panel) = &self.panel {
            panel::write(&[("", panel)], &mut page);
        }
        if !lines.steps.is_empty() {
            page.section(
                "Training",
                "One step is one batch. The pale line shows every step, the dark line a moving average over a fiftieth of \
                 the run.",
            );
            page.figures(&[losses(&lines)?]);
            page.figures(&quantities::figures(&TRAINING, &series)?);
            if !lines.balances.is_empty() {
                page.section(
                    "Balance of the gradients",
                    "The gradients of the equivariance loss, before lambda, and of the base method's loss on the weights \
                     of each block. Only the base method's loss reaches the blocks after the tapped block.",
                );
                page.figures(&gradients(&lines.balances)?);
            }
            page.section("Schedules", "The values that were set at each step.");
            page.figures(&quantities::figures(&SCHEDULES, &series)?);
        }
        if lines.epochs.iter().any(|e| e.epoch > 0) {
            page.section("Speed", "The speed of training; evaluation does not count.");
            page.figures(&quantities::figures(&SPEED, &series)?);
        }
        page.section("Settings", "All settings of the run, as config.json holds them.");
        page.tables(&[table("Configuration", &self.config)]);
        Ok(page.html())
    }
}

fn lead(steps: &[&Step], epochs: &[&Epoch]) -> String {
    let count = |n: usize, what: &str| {
        let s = if n == 1 { "" } else { "s" };
        format!("{} {what}{s}", scale::grouped(&n.to_string()))
    };
    let done = steps.last().map_or(0, |s| s.step + 1);
    let epochs = epochs.last().map_or(0, |e| e.epoch);
    format!("Training report: {}, {}.", count(epochs, "epoch"), count(done, "step"))
}

/// The loss and both of its terms in one plot.
fn losses(lines: &Lines) -> Result<Figure<'static>> {
    let axes = Axes { x: "step", y: "loss", wide: true, ..Default::default() };
    let total = lines.over_steps(|s| Some(s.loss.into()));
    let invariance = lines.over_steps(|s| Some(s.invariance.into()));
    let equivariance = lines.over_steps(|s| s.equivariance.map(f64::from));
    let lines = [
        Line::new("total", INK, total).noisy(),
        Line::new("invariance (base method)", BLUE, invariance).noisy(),
        Line::new("equivariance, before lambda", ORANGE, equivariance).noisy(),
    ];
    Ok(Figure {
        title: "Losses",
        caption: "The total is the invariance loss plus lambda times the equivariance loss. The baseline and the control, \
                  lambda = 0, compute no equivariance loss.",
        svg: plots::lines(&axes, &lines)?,
        wide: true,
    })
}

/// A line for each part of the encoder.
fn gradients(balances: &[&Balanced]) -> Result<[Figure<'static>; 2]> {
    let depth = balances.iter().map(|b| b.layers.len()).max().unwrap_or(0);
    let series = |value: fn(&BalancedLayer) -> Option<f64>| -> Vec<Line> {
        let line = |k: usize| {
            let layer = |b: &Balanced| b.layers.get(k).and_then(value);
            let points = balances.iter().map(|b| (b.step as f64, layer(b).unwrap_or(f64::NAN)));
            let name = balances.iter().find_map(|b| b.layers.get(k));
            let name = name.map_or("", |layer| layer.name.as_str());
            Line::new(name, depth_color(k, depth), points.collect())
        };
        (0..depth).map(line).collect()
    };
    let axes =
        |y, reference| Axes { x: "step", y, include: &[0.0], reference, ..Default::default() };
    Ok([
        Figure {
            title: "Ratio of the gradients",
            caption: "Norm of the equivariance loss's gradient over the norm of the base method's gradient.",
            svg: plots::lines(&axes("ratio", None), &series(BalancedLayer::ratio))?,
            wide: false,
        },
        Figure {
            title: "Angle of the gradients",
            caption: "Cosine between both gradients: above 0 they agree, below 0 they conflict.",
            svg: plots::lines(&axes("cosine", Some(0.0)), &series(|layer| layer.cosine))?,
            wide: false,
        },
    ])
}

/// The equivariance score of each block.
fn by_block(lines: &Lines) -> Result<Figure<'static>> {
    let depth = lines.epochs.iter().map(|e| e.equivariance.len()).max();
    let depth = depth.unwrap_or(0);
    let block = |k: usize| {
        let score = lines.over_epochs(|e| e.equivariance.get(k).copied().flatten());
        Line::new(&format!("block {}", k + 1), depth_color(k, depth), score)
    };
    let blocks: Vec<Line> = (0..depth).map(block).collect();
    let axes = Axes {
        x: "epoch",
        y: "centered equivariance score",
        include: &[0.0, 1.0],
        reference: Some(1.0),
        ..Default::default()
    };
    Ok(Figure {
        title: "Equivariance by block",
        caption: "Mean cosine between the tokens of a rotated or flipped image and the rotated or flipped tokens of the \
                  image, each less their mean token: 1 (gray line) is exact, 0 is unrelated.",
        svg: plots::lines(&axes, &blocks)?,
        wide: false,
    })
}

fn accuracy(lines: &Lines) -> Result<[Figure<'static>; 2]> {
    let axes = Axes { x: "epoch", y: "20-NN accuracy (%)", wide: true, ..Default::default() };
    let transform = |(k, ((name, _), color)): (usize, (_, RGBColor))| {
        let accuracy = lines.over_epochs(|e| e.accuracy.get(k).copied());
        Line::new(name, color, accuracy)
    };
    let by_epoch: Vec<Line> =
        POSES.into_iter().zip(TRANSFORM_COLORS).enumerate().map(transform).collect();
    let measured = |e: &&&Epoch| e.accuracy.iter().any(|a| a.is_finite());
    let (first, last) =
        (lines.epochs.iter().find(measured), lines.epochs.iter().rev().find(measured));
    let bar = |name: &str, color, epoch: &Epoch| Bars {
        name: name.to_string(),
        color,
        values: (0..POSES.len()).map(|k| epoch.accuracy.get(k).copied()).collect(),
    };
    let mut bars = Vec::new();
    if let (Some(first), Some(last)) = (first, last) {
        if first.epoch == 0 && last.epoch > 0 {
            bars.push(bar("untrained", GREY, first));
        }
        let name = format!("after epoch {}", last.epoch);
        bars.push(bar(&name, BLUE, last));
    }
    let names = POSES.map(|(name, _)| name);
    let bar_axes = Axes { x: "transform of the test images", include: &[0.0, 100.0], ..axes };
    Ok([
        Figure {
            title: "Accuracy by transform, at the end",
            caption: "The neighbors are upright, the test images are rotated or flipped; transp and antitr mirror them \
                      at a diagonal. The bars of an invariant encoder have one height.",
            svg: plots::bars(&bar_axes, &names, &bars)?,
            wide: true,
        },
        Figure {
            title: "Accuracy by transform, by epoch",
            caption: "Weighted 20 nearest neighbors. Black is upright. Blue transforms keep rows as rows, orange \
                      transforms make rows columns.",
            svg: plots::lines(&axes, &by_epoch)?,
            wide: true,
        },
    ])
}

/// In the order of [`POSES`]: upright, three that keep rows as rows, four that do not.
const TRANSFORM_COLORS: [RGBColor; 8] = [
    INK,
    RGBColor(30, 80, 160),
    RGBColor(66, 133, 212),
    RGBColor(120, 180, 232),
    RGBColor(158, 62, 8),
    RGBColor(212, 100, 18),
    RGBColor(238, 150, 60),
    RGBColor(222, 184, 110),
];

/// From dark violet for the first block to green for the last.
fn depth_color(k: usize, depth: usize) -> RGBColor {
    const STOPS: [(f64, f64, f64); 4] =
        [(70.0, 36.0, 118.0), (49.0, 104.0, 160.0), (31.0, 152.0, 139.0), (122.0, 190.0, 60.0)];
    let last = STOPS.len() - 1;
    let at = k as f64 / (depth.max(2) - 1) as f64 * last as f64;
    let low = (at as usize).min(last - 1);
    let (a, b, t) = (STOPS[low], STOPS[low + 1], at - low as f64);
    let mix = |a: f64, b: f64| (a + t * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}
