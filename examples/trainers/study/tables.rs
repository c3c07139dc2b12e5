//! Tables of means over seeds and of paired differences.

use super::{
    ledger::Entry,
    plan::{Group, Set},
    statistics::Mean,
};
use crate::{report::plots::Interval, settings::Method};

/// A figure of the tables: its name in the ledger, its heading, its digits.
pub type Column = (&'static str, &'static str, usize);

/// Accuracies and shares in percent, the equivariance score between −1 and 1.
pub const MAIN: [Column; 12] = [
    ("equivariance", "EqScore", 3),
    ("matching_d4_exact", "matches, exact", 1),
    ("d4_mean", "probe over D4", 1),
    ("probe", "probe", 1),
    ("matching_d4_near", "within a cell", 1),
    ("matching_d4_registered", "registered", 1),
    ("matching_similarity_near", "any rotation, within a cell", 1),
    ("matching_similarity_registered", "any rotation, registered", 1),
    ("d4_worst", "worst element", 1),
    ("d4_consistency", "agreement", 1),
    ("knn", "20-NN", 1),
    ("knn_poses", "20-NN, 7 elements", 1),
];

pub const COST: [Column; 7] = [
    ("overhead_measured", "cost, measured", 3),
    ("overhead_predicted", "cost, predicted", 3),
    ("gradient_ratio", "gradient ratio", 2),
    ("gradient_ratio_late", "the same, second half", 2),
    ("seconds", "seconds", 0),
    ("images_per_s", "images/s", 0),
    ("peak_mib", "MiB", 0),
];

pub const FEW: [Column; 6] = [
    ("few1_upright", "1 label a class", 1),
    ("few5_upright", "5 labels", 1),
    ("few20_upright", "20 labels", 1),
    ("few1_d4", "1 label, over D4", 1),
    ("few5_d4", "5 labels, over D4", 1),
    ("few20_d4", "20 labels, over D4", 1),
];

pub const STABILITY: [Column; 4] = [
    ("probe", "probe", 1),
    ("corrupted", "corrupted", 1),
    ("mce", "mCE", 1),
    ("flips", "flips", 1),
];

/// The runs of one variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub group: Group,
    pub set: Set,
    pub method: Method,
    pub variant: String,
}

impl Row {
    pub fn new(group: Group, set: Set, method: Method, variant: &str) -> Self {
        Self { group, set, method, variant: variant.to_string() }
    }

    pub fn is_of(&self, entry: &Entry) -> bool {
        entry.group == self.group.name()
            && entry.data.as_deref() == Some(self.set.name())
            && entry.method == self.method.name()
            && entry.variant == self.variant
    }

    /// The values of one figure by seed.
    pub fn values(&self, entries: &[Entry], figure: &str) -> Vec<(u64, f64)> {
        let value = |e: &Entry| {
            let value = match figure {
                "seconds" => (e.paused == 0.0).then_some(e.seconds)?,
                _ => *e.figures.get(figure)?,
            };
            Some((e.seed, value))
        };
        entries.iter().filter(|e| self.is_of(e)).filter_map(value).collect()
    }

    pub fn mean(&self, entries: &[Entry], figure: &str) -> Option<Mean> {
        let values: Vec<f64> = self.values(entries, figure).into_iter().map(|(_, v)| v).collect();
        Mean::of(&values)
    }

    /// `self − other`, paired by seed.
    pub fn minus(&self, other: &Self, entries: &[Entry], figure: &str) -> Option<Mean> {
        Mean::of_differences(&self.values(entries, figure), &other.values(entries, figure))
    }
}

fn head(first: &str, columns: &[Column]) -> String {
    let headings: String = columns.iter().map(|(_, heading, _)| format!(" {heading} |")).collect();
    format!("| {first} | seeds |{headings}\n|---|---|{}\n", "---|".repeat(columns.len()))
}

/// Means; rows without runs are left out.
pub fn means(entries: &[Entry], rows: &[Row], columns: &[Column]) -> String {
    let mut text = head("variant", columns);
    for row in rows {
        let seeds = entries.iter().filter(|e| row.is_of(e)).count();
        if seeds == 0 {
            continue;
        }
        text += &format!("| {} | {seeds} |", row.variant);
        for (figure, _, digits) in columns {
            let shown = row.mean(entries, figure);
            text += &format!(" {} |", shown.map_or("–".to_string(), |m| m.show(*digits)));
        }
        text += "\n";
    }
    text
}

/// Differences, paired by seed; bold if the interval does not contain zero. Pairs without a common seed are left out.
pub fn differences(entries: &[Entry], pairs: &[[Row; 2]], columns: &[Column]) -> String {
    let mut text = head("difference", columns);
    for [a, b] in pairs {
        let (mut seeds, mut cells) = (0, String::new());
        for (figure, _, digits) in columns {
            let difference = a.minus(b, entries, figure);
            seeds = seeds.max(difference.as_ref().map_or(0, |d| d.values.len()));
            cells += &difference.map_or(" – |".to_string(), |d| {
                let bold = if d.sign() == 0 { "" } else { "**" };
                format!(" {bold}{}{bold} |", d.show_signed(*digits))
            });
        }
        if seeds > 0 {
            text += &format!("| {} − {} | {seeds} |{cells}\n", a.variant, b.variant);
        }
    }
    text
}

/// A mean as charts take it.
pub(super) fn interval(mean: Mean) -> Option<Interval> {
    let half = mean.half_width.unwrap_or(f64::NAN);
    Some(Interval {
        mean: mean.mean,
        low: mean.mean - half,
        high: mean.mean + half,
        samples: mean.values,
    })
}
