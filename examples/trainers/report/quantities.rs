//! Curves over steps and epochs, of one run or of several in one plot.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use plotters::style::RGBColor;

use super::{
    page::Figure,
    plots::{self, Axes, BLUE, GREEN, GREY, INK, Line, ORANGE, PALETTE, PURPLE, RED},
};
use crate::{
    eval::pose_mean,
    records::{Balanced, Epoch, Record, Step},
};

/// Records by kind, in order.
pub struct Lines<'a> {
    pub steps: Vec<&'a Step>,
    pub epochs: Vec<&'a Epoch>,
    pub balances: Vec<&'a Balanced>,
}

impl<'a> Lines<'a> {
    /// Of two records of one step or epoch the later one counts: a resumed run repeats some.
    pub fn of(records: &'a [Record]) -> Self {
        let (mut steps, mut epochs) = (BTreeMap::new(), BTreeMap::new());
        let mut balances = BTreeMap::new();
        for record in records {
            match record {
                Record::Step(step) => drop(steps.insert(step.step, step)),
                Record::Epoch(epoch) => drop(epochs.insert(epoch.epoch, epoch)),
                Record::Balance(balance) => drop(balances.insert(balance.step, balance)),
            }
        }
        Self {
            steps: steps.into_values().collect(),
            epochs: epochs.into_values().collect(),
            balances: balances.into_values().collect(),
        }
    }

    /// A series over steps; `None` is a gap.
    pub fn over_steps(&self, value: impl Fn(&Step) -> Option<f64>) -> Vec<(f64, f64)> {
        let point = |s: &&Step| (s.step as f64, value(s).unwrap_or(f64::NAN));
        self.steps.iter().map(point).collect()
    }

    /// A series over epochs; `None` is a gap.
    pub fn over_epochs(&self, value: impl Fn(&Epoch) -> Option<f64>) -> Vec<(f64, f64)> {
        let point = |e: &&Epoch| (e.epoch as f64, value(e).unwrap_or(f64::NAN));
        self.epochs.iter().map(point).collect()
    }
}

/// A run in a plot. A plot of one run has no legend and the color of its quantity.
pub struct Series<'a> {
    pub name: &'a str,
    pub color: Option<RGBColor>,
    pub lines: &'a Lines<'a>,
    /// The tapped block, counted from 1.
    pub layer: usize,
}

enum Value {
    Step(fn(&Step) -> Option<f64>),
    /// The second argument is the tapped block, counted from 1.
    Epoch(fn(&Epoch, usize) -> Option<f64>),
}

/// A value that a run records, and how it is drawn.
pub struct Quantity {
    title: &'static str,
    axis: &'static str,
    caption: &'static str,
    include: &'static [f64],
    color: RGBColor,
    noisy: bool,
    value: Value,
}

impl Quantity {
    /// The plot, with a line for each run.
    pub fn figure(&self, series: &[Series]) -> Result<Figure<'static>> {
        let line = |s: &Series| {
            let points = match self.value {
                Value::Step(value) => s.lines.over_steps(value),
                Value::Epoch(value) => s.lines.over_epochs(|e| value(e, s.layer)),
            };
            Line { noisy: self.noisy, ..Line::new(s.name, s.color.unwrap_or(self.color), points) }
        };
        let axes = Axes {
            x: match self.value {
                Value::Step(_) => "step",
                Value::Epoch(_) => "epoch",
            },
            y: self.axis,
            include: self.include,
            ..Default::default()
        };
        let lines: Vec<Line> = series.iter().map(line).collect();
        Ok(Figure {
            title: self.title,
            caption: self.caption,
            svg: plots::lines(&axes, &lines)?,
            wide: false,
        })
    }
}

/// The plots of several quantities.
pub fn figures(quantities: &[Quantity], series: &[Series]) -> Result<Vec<Figure<'static>>> {
    quantities.iter().map(|q| q.figure(series)).collect()
}

/// The plots of what only one method records (entropy of the teacher, say), by name.
pub fn extras<'a>(series: &[Series<'a>]) -> Result<Vec<Figure<'a>>> {
    let epochs = series.iter().flat_map(|s| &s.lines.epochs);
    let names: BTreeSet<&'a str> =
        epochs.flat_map(|e| e.extra.keys().map(String::as_str)).collect();
    let figure = |(i, name): (usize, &'a str)| {
        let line = |s: &Series| {
            let points = s.lines.over_epochs(|e| e.extra.get(name).copied());
            let color = s.color.unwrap_or(PALETTE[(i + 3) % PALETTE.len()]);
            Line::new(s.name, color, points)
        };
        let axes = Axes { x: "epoch", y: name, ..Default::default() };
        let lines: Vec<Line> = series.iter().map(line).collect();
        Ok(Figure { title: name, caption: "", svg: plots::lines(&axes, &lines)?, wide: false })
    };
    names.into_iter().enumerate().map(figure).collect()
}

const ZERO: &[f64] = &[0.0];
const UNIT: &[f64] = &[0.0, 1.0];

/// Accuracy and equivariance after each epoch; a page of one run shows these by transform and by block instead.
pub const SCORES: [Quantity; 3] = [
    Quantity {
        title: "Equivariance of the tapped block",
        axis: "centered equivariance score",
        caption: "1 is exact, 0 is unrelated.",
        include: UNIT,
        color: BLUE,
        noisy: false,
        value: Value::Epoch(|e, layer| *e.equivariance.get(layer.checked_sub(1)?)?),
    },
    Quantity {
        title: "Accuracy, upright",
        axis: "20-NN accuracy (%)",
        caption: "Weighted 20 nearest neighbors of upright test images.",
        include: &[],
        color: BLUE,
        noisy: false,
        value: Value::Epoch(|e, _| e.accuracy.first().copied()),
    },
    Quantity {
        title: "Accuracy, rotated or flipped",
        axis: "20-NN accuracy (%)",
        caption: "Mean over the seven rotations and flips of the test images. The neighbors are upright.",
        include: &[],
        color: BLUE,
        noisy: false,
        value: Value::Epoch(|e, _| pose_mean(&e.accuracy)),
    },
];

pub const SPREAD: Quantity = Quantity {
    title: "Spread of the features",
    axis: "feature std",
    caption: "Standard deviation of unit-length features times the square root of their dimension: 1 fills all directions, \
              0 is collapse.",
    include: UNIT,
    color: GREEN,
    noisy: false,
    value: Value::Epoch(|e, _| e.feature_std.map(f64::from)),
};

/// The two terms of the loss; a page of one run shows them in one plot.
pub const LOSSES: [Quantity; 2] = [
    Quantity {
        title: "Loss of the base method",
        axis: "loss",
        caption: "Runs of one method share their scale.",
        include: &[],
        color: BLUE,
        noisy: true,
        value: Value::Step(|s| Some(s.invariance.into())),
    },
    Quantity {
        title: "Equivariance loss, before lambda",
        axis: "loss",
        caption: "The baseline and lambda = 0 compute none.",
        include: &[],
        color: ORANGE,
        noisy: true,
        value: Value::Step(|s| s.equivariance.map(f64::from)),
    },
];

pub const TRAINING: [Quantity; 2] = [
    Quantity {
        title: "Matching of tokens",
        axis: "tokens matched (%)",
        caption: "Share of tokens that are nearer to their counterpart in the other view than to any other token. It rises \
                  as the map becomes equivariant.",
        include: ZERO,
        color: ORANGE,
        noisy: true,
        value: Value::Step(|s| s.matching.map(|m| 100.0 * f64::from(m))),
    },
    Quantity {
        title: "Gradient",
        axis: "norm",
        caption: "Norm of the gradient before clipping.",
        include: ZERO,
        color: PURPLE,
        noisy: true,
        value: Value::Step(|s| s.gradient),
    },
];

pub const SCHEDULES: [Quantity; 4] = [
    Quantity {
        title: "Learning rate",
        axis: "learning rate",
        caption: "It rises during the warm-up, then it decays.",
        include: ZERO,
        color: BLUE,
        noisy: false,
        value: Value::Step(|s| Some(s.learning_rate)),
    },
    Quantity {
        title: "Lambda",
        axis: "lambda",
        caption: "The weight of the equivariance loss; 0 is the control.",
        include: ZERO,
        color: ORANGE,
        noisy: false,
        value: Value::Step(|s| Some(s.lambda)),
    },
    Quantity {
        title: "Momentum",
        axis: "momentum",
        caption: "Share of the old weights that the key or teacher encoder keeps at each step; 1 keeps all.",
        include: &[],
        color: GREEN,
        noisy: false,
        value: Value::Step(|s| s.momentum),
    },
    Quantity {
        title: "Weight decay",
        axis: "weight decay",
        caption: "It is decoupled from the gradient.",
        include: ZERO,
        color: RED,
        noisy: false,
        value: Value::Step(|s| Some(s.weight_decay)),
    },
];

/// The untrained encoder, epoch 0, has no speed.
pub const SPEED: [Quantity; 2] = [
    Quantity {
        title: "Speed",
        axis: "images per second",
        caption: "Training images per second.",
        include: ZERO,
        color: INK,
        noisy: false,
        value: Value::Epoch(|e, _| (e.epoch > 0).then_some(e.images_per_s)),
    },
    Quantity {
        title: "Waiting for images",
        axis: "share of time (%)",
        caption: "Share of that time in which the next batch was not ready.",
        include: ZERO,
        color: GREY,
        noisy: false,
        value: Value::Epoch(|e, _| (e.epoch > 0).then_some(100.0 * e.waiting)),
    },
];
