//! One line on what was read, to stand beside every value measured on it.

use super::walk::Skipped;

/// Where the division into training and test images comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    Official,
    /// Drawn by class from these images.
    Drawn(&'static str),
    /// Drawn from all images.
    Unlabelled,
}

impl Division {
    pub fn text(self, train: usize, test: usize) -> String {
        match self {
            Self::Official => format!("official split: {train} training and {test} test images"),
            Self::Drawn(of) => format!(
                "re-split: {train} images train, {test} test (a seeded fifth of each class of {of}); not comparable with \
                 published accuracies"
            ),
            Self::Unlabelled => {
                format!("re-split: {train} images train, {test} test (a seeded fifth)")
            }
        }
    }
}

/// What is skipped without labels.
pub const UNLABELLED: &str = "no classes: training needs none, but nearest neighbors, the probe and all else that needs labels \
                              are skipped";

/// The classes by name, or the first few of many.
pub fn classes(names: &[String]) -> String {
    let shown = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => UNLABELLED.to_string(),
        n @ 1..6 => format!("{n} classes: {shown}"),
        n => format!("{n} classes: {shown}, …"),
    }
}

/// The first few that were passed over.
pub fn named(skipped: &[Skipped]) -> String {
    let lines = skipped.iter().take(5);
    let lines: Vec<String> =
        lines.map(|(path, why)| format!("{}: {why}", path.display())).collect();
    lines.join("; ")
}

/// The number that were passed over; empty if there are none.
pub fn count(skipped: &[Skipped]) -> String {
    match skipped.len() {
        0 => String::new(),
        n => format!("{n} skipped"),
    }
}

/// That most images show nothing; empty if they do.
pub fn constant(constant: usize, all: usize) -> String {
    match 2 * constant > all {
        true => format!(
            "{constant} of {all} images are of one color each (transparent parts are white)"
        ),
        false => String::new(),
    }
}

/// The parts that say something, in a row.
pub fn joined(parts: impl IntoIterator<Item = String>) -> String {
    let parts: Vec<String> = parts.into_iter().filter(|p| !p.is_empty()).collect();
    parts.join("; ")
}
