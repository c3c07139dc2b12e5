//! A run as one HTML page to look at: configuration, result, curves, and token maps in eight poses.

pub mod page;
pub mod panel;
pub mod plots;
mod scale;
mod series;

use std::collections::BTreeMap;

use anyhow::Result;
use plotters::style::RGBColor;

use self::{
    page::{Figure, Page, Table},
    panel::Panel,
    plots::{Axes, BLUE, Bars, GREEN, GREY, INK, Line, ORANGE, PALETTE, PURPLE, RED},
};
use super::{
    eval::POSES,
    records::{Balanced, BalancedLayer, Epoch, Record, Step},
};

/// What the page shows. A plot without values is left out.
pub struct Report<'a> {
    /// Method, mode and seed.
    pub title: &'a str,
    /// Name and value of each option.
    pub config: Vec<(String, String)>,
    /// Name and value of each figure of the final result.
    pub result: Vec<(String, String)>,
    pub records: &'a [Record],
    pub panel: Option<Panel>,
}

impl Report<'_> {
    pub fn html(&self) -> Result<String> {
        let Lines {
            steps,
            epochs,
            balances,
        } = Lines::of(self.records);
        let mut page = Page::new(self.title, &lead(&steps, &epochs));
        let table = |title, rows: &[(String, String)]| Table {
            title,
            header: Vec::new(),
            rows: rows
                .iter()
                .map(|(k, v)| vec![k.clone(), v.clone()])
                .collect(),
        };
        page.tables(&[
            table("Result", &self.result),
            table("Configuration", &self.config),
        ]);
        if epochs.iter().any(|e| e.is_measured()) {
            page.section(
                "What the encoder has learnt",
                "Measured on test pictures after each epoch, the encoder frozen; epoch 0 is the untrained encoder.",
            );
            page.figures(&accuracy(&epochs)?);
            page.figures(&measures(&epochs)?);
        }
        if let Some(panel) = &self.panel {
            panel.write(&mut page, "Token maps in eight poses");
        }
        if !steps.is_empty() {
            page.section(
                "Training",
                "A step is one batch. In noisy series the pale line is every step and the dark one a moving average \
                 over a fiftieth of the run.",
            );
            page.figures(&losses(&steps)?);
            if !balances.is_empty() {
                page.section(
                    "Balance of the gradients",
                    "Of the equivariance loss, before lambda, and of the base method's, on the weights of each block. Blocks \
                     after the tapped one have a gradient of the latter only.",
                );
                page.figures(&gradients(&balances)?);
            }
            page.section("Schedules", "What was set at each step.");
            page.figures(&schedules(&steps)?);
        }
        if epochs.iter().any(|e| e.epoch > 0) {
            page.section(
                "Speed",
                "Of training; the measurements between epochs do not count.",
            );
            page.figures(&speed(&epochs)?);
        }
        Ok(page.html())
    }
}

/// Records by kind, in order.
struct Lines<'a> {
    steps: Vec<&'a Step>,
    epochs: Vec<&'a Epoch>,
    balances: Vec<&'a Balanced>,
}

impl<'a> Lines<'a> {
    /// Of two lines on the same step or epoch the later holds, as after a run that was taken up again.
    fn of(records: &'a [Record]) -> Self {
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
}

fn lead(steps: &[&Step], epochs: &[&Epoch]) -> String {
    let count = |n: usize, what: &str| {
        let s = if n == 1 { "" } else { "s" };
        format!("{} {what}{s}", scale::grouped(&n.to_string()))
    };
    let done = steps.last().map_or(0, |s| s.step + 1);
    let epochs = epochs.last().map_or(0, |e| e.epoch);
    format!(
        "Training report: {}, {}.",
        count(epochs, "epoch"),
        count(done, "step")
    )
}

/// A series over steps; `None` is a gap.
fn over_steps<T: Into<f64>>(
    steps: &[&Step],
    value: impl Fn(&Step) -> Option<T>,
) -> Vec<(f64, f64)> {
    let point = |s: &&Step| (s.step as f64, value(s).map_or(f64::NAN, Into::into));
    steps.iter().map(point).collect()
}

/// A series over epochs; `None` is a gap.
fn over_epochs(epochs: &[&Epoch], value: impl Fn(&Epoch) -> Option<f64>) -> Vec<(f64, f64)> {
    let point = |e: &&Epoch| (e.epoch as f64, value(e).unwrap_or(f64::NAN));
    epochs.iter().map(point).collect()
}

fn losses(steps: &[&Step]) -> Result<[Figure<'static>; 3]> {
    let step = |y| Axes {
        x: "step",
        y,
        ..Default::default()
    };
    let wide = Axes {
        wide: true,
        ..step("loss")
    };
    let total = Line::new("total", INK, over_steps(steps, |s| Some(s.loss)));
    let invariance = over_steps(steps, |s| Some(s.invariance));
    let equivariance = over_steps(steps, |s| s.equivariance);
    let loss = [
        total.noisy(),
        Line::new("invariance (base method)", BLUE, invariance).noisy(),
        Line::new("equivariance, before lambda", ORANGE, equivariance).noisy(),
    ];
    let matching = over_steps(steps, |s| s.matching.map(|m| 100.0 * m));
    let matching = [Line::new("matching", ORANGE, matching).noisy()];
    let gradient = over_steps(steps, |s| s.gradient);
    let gradient = [Line::new("gradient", PURPLE, gradient).noisy()];
    Ok([
        Figure {
            title: "Losses",
            caption: "The total is the invariance loss plus lambda times the equivariance loss. The baseline and the \
                      control, lambda = 0, compute no equivariance loss.",
            svg: plots::lines(&wide, &loss)?,
            wide: true,
        },
        Figure {
            title: "Matching of tokens",
            caption: "Share of tokens that are nearer to their own counterpart in the other pose than to any other \
                      token. It rises as the map becomes equivariant.",
            svg: plots::lines(
                &Axes {
                    include: &[0.0],
                    ..step("tokens matched (%)")
                },
                &matching,
            )?,
            wide: false,
        },
        Figure {
            title: "Gradient",
            caption: "Length of the gradient before clipping.",
            svg: plots::lines(
                &Axes {
                    include: &[0.0],
                    ..step("norm")
                },
                &gradient,
            )?,
            wide: false,
        },
    ])
}

/// A line for each part of the encoder.
fn gradients(balances: &[&Balanced]) -> Result<[Figure<'static>; 2]> {
    let depth = balances.iter().map(|b| b.layers.len()).max().unwrap_or(0);
    let series = |value: fn(&BalancedLayer) -> Option<f64>| -> Vec<Line> {
        let line = |k: usize| {
            let layer = |b: &Balanced| b.layers.get(k).and_then(value);
            let points = balances
                .iter()
                .map(|b| (b.step as f64, layer(b).unwrap_or(f64::NAN)));
            let name = balances.iter().find_map(|b| b.layers.get(k));
            let name = name.map_or("", |layer| layer.name.as_str());
            Line::new(name, depth_color(k, depth), points.collect())
        };
        (0..depth).map(line).collect()
    };
    let axes = |y, reference| Axes {
        x: "step",
        y,
        include: &[0.0],
        reference,
        ..Default::default()
    };
    Ok([
        Figure {
            title: "Ratio of the gradients",
            caption: "Norm of the equivariance loss's gradient over that of the base method's.",
            svg: plots::lines(&axes("ratio", None), &series(BalancedLayer::ratio))?,
            wide: false,
        },
        Figure {
            title: "Angle of the gradients",
            caption: "Cosine between both: above 0 they agree, below 0 they pull apart.",
            svg: plots::lines(&axes("cosine", Some(0.0)), &series(|layer| layer.cosine))?,
            wide: false,
        },
    ])
}

fn schedules(steps: &[&Step]) -> Result<[Figure<'static>; 4]> {
    let plot = |y, include, color, points| {
        let axes = Axes {
            x: "step",
            y,
            include,
            ..Default::default()
        };
        plots::lines(&axes, &[Line::new(y, color, points)])
    };
    let zero: &[f64] = &[0.0];
    let rate = over_steps(steps, |s| Some(s.learning_rate));
    let lambda = over_steps(steps, |s| Some(s.lambda));
    let momentum = over_steps(steps, |s| s.momentum);
    let decay = over_steps(steps, |s| Some(s.weight_decay));
    Ok([
        Figure {
            title: "Learning rate",
            caption: "Warm-up, then decay.",
            svg: plot("learning rate", zero, BLUE, rate)?,
            wide: false,
        },
        Figure {
            title: "Lambda",
            caption: "Weight of the equivariance loss; 0 is the control.",
            svg: plot("lambda", zero, ORANGE, lambda)?,
            wide: false,
        },
        Figure {
            title: "Momentum",
            caption: "Share of the old weights that the key or teacher encoder keeps at each step; 1 stands still.",
            svg: plot("momentum", &[], GREEN, momentum)?,
            wide: false,
        },
        Figure {
            title: "Weight decay",
            caption: "Decoupled from the gradient.",
            svg: plot("weight decay", zero, RED, decay)?,
            wide: false,
        },
    ])
}

/// Feature spread, equivariance, and the method's own figures.
fn measures<'a>(epochs: &[&'a Epoch]) -> Result<Vec<Figure<'a>>> {
    let epoch = |y, include| Axes {
        x: "epoch",
        y,
        include,
        ..Default::default()
    };
    let depth = epochs.iter().map(|e| e.equivariance.len()).max();
    let depth = depth.unwrap_or(0);
    let block = |k: usize| {
        let score = over_epochs(epochs, |e| e.equivariance.get(k).copied().flatten());
        Line::new(&format!("block {}", k + 1), depth_color(k, depth), score)
    };
    let blocks: Vec<Line> = (0..depth).map(block).collect();
    let scores = Axes {
        reference: Some(1.0),
        ..epoch("centered equivariance score", &[0.0, 1.0])
    };
    let spread = over_epochs(epochs, |e| e.feature_std.map(f64::from));
    let spread = [Line::new("feature std", GREEN, spread)];
    let mut figures = vec![
        Figure {
            title: "Equivariance by layer",
            caption: "Mean cosine between the tokens of a turned picture and the turned tokens of the picture, less \
                      their mean token, over the seven other poses: 1 (gray line) is exact, 0 is unrelated.",
            svg: plots::lines(&scores, &blocks)?,
            wide: false,
        },
        Figure {
            title: "Spread of the features",
            caption: "Standard deviation of unit-length features times the root of their number: 1 fills all \
                      directions, 0 is collapse.",
            svg: plots::lines(&epoch("feature std", &[0.0, 1.0]), &spread)?,
            wide: false,
        },
    ];
    let mut names: Vec<&'a String> = epochs.iter().flat_map(|e| e.extra.keys()).collect();
    names.sort();
    names.dedup();
    for (i, name) in names.into_iter().enumerate() {
        let points = over_epochs(epochs, |e| e.extra.get(name).copied());
        let line = Line::new(name, PALETTE[(i + 3) % PALETTE.len()], points);
        figures.push(Figure {
            title: name,
            caption: "",
            svg: plots::lines(&epoch(name, &[]), &[line])?,
            wide: false,
        });
    }
    Ok(figures)
}

fn accuracy(epochs: &[&Epoch]) -> Result<[Figure<'static>; 2]> {
    let axes = Axes {
        x: "epoch",
        y: "20-NN accuracy (%)",
        wide: true,
        ..Default::default()
    };
    let pose = |(k, ((name, _), color)): (usize, (_, RGBColor))| {
        let accuracy = over_epochs(epochs, |e| e.accuracy.get(k).copied());
        Line::new(name, color, accuracy)
    };
    let by_epoch: Vec<Line> = POSES
        .into_iter()
        .zip(POSE_COLOURS)
        .enumerate()
        .map(pose)
        .collect();
    let measured = |e: &&&Epoch| e.accuracy.iter().any(|a| a.is_finite());
    let (first, last) = (
        epochs.iter().find(measured),
        epochs.iter().rev().find(measured),
    );
    let bar = |name: &str, color, epoch: &Epoch| Bars {
        name: name.to_string(),
        color,
        values: (0..POSES.len())
            .map(|k| epoch.accuracy.get(k).copied())
            .collect(),
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
    let bar_axes = Axes {
        x: "pose of the test pictures",
        include: &[0.0, 100.0],
        ..axes
    };
    Ok([
        Figure {
            title: "Accuracy by pose, at the end",
            caption: "The bank of neighbors is upright, the test pictures are turned; transp and antitr mirror them \
                      at a diagonal. An encoder that poses do not disturb has bars of one height.",
            svg: plots::bars(&bar_axes, &names, &bars)?,
            wide: true,
        },
        Figure {
            title: "Accuracy by pose, by epoch",
            caption: "Weighted 20 nearest neighbors. Black is upright; blue poses keep rows as rows, orange ones \
                      lay the picture on its side.",
            svg: plots::lines(&axes, &by_epoch)?,
            wide: true,
        },
    ])
}

fn speed(epochs: &[&Epoch]) -> Result<[Figure<'static>; 2]> {
    // The untrained encoder has not run yet, and no speed.
    let ran: Vec<&Epoch> = epochs.iter().copied().filter(|e| e.epoch > 0).collect();
    let axes = |y| Axes {
        x: "epoch",
        y,
        include: &[0.0],
        ..Default::default()
    };
    let rate = over_epochs(&ran, |e| Some(e.images_per_s));
    let waiting = over_epochs(&ran, |e| Some(100.0 * e.waiting));
    Ok([
        Figure {
            title: "Speed",
            caption: "Training pictures per second.",
            svg: plots::lines(&axes("pictures per second"), &[Line::new("", INK, rate)])?,
            wide: false,
        },
        Figure {
            title: "Waiting for pictures",
            caption: "Share of that time in which the next batch was not ready.",
            svg: plots::lines(&axes("share of time (%)"), &[Line::new("", GREY, waiting)])?,
            wide: false,
        },
    ])
}

/// In the order of [`POSES`]: upright, three that keep rows as rows, four that do not.
const POSE_COLOURS: [RGBColor; 8] = [
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
    const STOPS: [(f64, f64, f64); 4] = [
        (70.0, 36.0, 118.0),
        (49.0, 104.0, 160.0),
        (31.0, 152.0, 139.0),
        (122.0, 190.0, 60.0),
    ];
    let last = STOPS.len() - 1;
    let at = k as f64 / (depth.max(2) - 1) as f64 * last as f64;
    let low = (at as usize).min(last - 1);
    let (a, b, t) = (STOPS[low], STOPS[low + 1], at - low as f64);
    let mix = |a: f64, b: f64| (a + t * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}
