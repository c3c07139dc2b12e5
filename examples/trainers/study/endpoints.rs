//! The primary endpoints with their tests, and the rule for the default, as the protocol has them.

use super::{
    ledger::Entry,
    plan::{self, Group, Set},
    statistics::{Mean, Verdict, holm},
    tables::Row,
};
use crate::settings::Method;

/// The primary endpoints that are tested: figure, name, digits.
pub const TESTED: [(&str, &str, usize); 4] = [
    ("equivariance", "equivariance score", 3),
    ("matching_d4_exact", "right matches over D4", 1),
    ("d4_mean", "probe over D4", 1),
    ("probe", "upright probe", 1),
];
/// Points that the upright probe may fall by.
pub const MARGIN: f64 = 1.0;
/// Variants that are compared with the baseline.
const CONTRASTS: [&str; 2] = ["paper", "own"];
const LEVEL: f64 = 0.05;
/// Seeds that choose the default: those that all candidates have.
const CHOOSING: u64 = 4;
/// Seeds that judge it.
const JUDGING: usize = 8;

fn row(group: Group, set: Set, variant: &str) -> Row {
    Row::new(group, set, Method::MocoV3, variant)
}

/// One test of the family of a set.
#[derive(Clone, Debug, PartialEq)]
pub struct Test {
    pub contrast: &'static str,
    pub figure: &'static str,
    pub difference: Option<Mean>,
    pub p: Option<f64>,
    /// Corrected over the family. A test without a p value counts as 1.
    pub adjusted: Option<f64>,
}

/// The family of a set of group A.
pub fn tests(entries: &[Entry], set: Set) -> Vec<Test> {
    let baseline = row(Group::A, set, "baseline");
    let mut tests = Vec::new();
    for contrast in CONTRASTS {
        for (figure, ..) in TESTED {
            let difference = row(Group::A, set, contrast).minus(&baseline, entries, figure);
            let p = difference.as_ref().and_then(Mean::p_value);
            tests.push(Test { contrast, figure, difference, p, adjusted: None });
        }
    }
    let family: Vec<f64> = tests.iter().map(|t| t.p.unwrap_or(1.0)).collect();
    for (test, adjusted) in tests.iter_mut().zip(holm(&family)) {
        test.adjusted = test.p.map(|_| adjusted);
    }
    tests
}

/// The tests as a table, and the verdicts on the upright probe; empty without runs.
pub fn table(entries: &[Entry], set: Set) -> String {
    let tests = tests(entries, set);
    if tests.iter().all(|t| t.difference.is_none()) {
        return String::new();
    }
    let mut text = "| minus baseline | endpoint | seeds | difference | p | p, Holm | conclusion |\n|---|---|---|---|---|---|---|\n".to_string();
    for test in &tests {
        let Some(difference) = &test.difference else {
            continue;
        };
        let endpoint = TESTED.into_iter().find(|(figure, ..)| *figure == test.figure);
        let (_, name, digits) = endpoint.unwrap_or((test.figure, test.figure, 3));
        let conclusion = match test.figure {
            "probe" => Verdict::of(difference, MARGIN).name(),
            _ => confirmed(test),
        };
        let shown = |p: Option<f64>| p.map_or("–".to_string(), |p| format!("{p:.2e}"));
        text += &format!(
            "| {} | {name} | {} | {} | {} | {} | {conclusion} |\n",
            test.contrast,
            difference.values.len(),
            difference.show_signed(digits),
            shown(test.p),
            shown(test.adjusted)
        );
    }
    text + "\nThe conclusion on the upright probe is the verdict on non-inferiority with a margin of 1 point, from the \
            interval.\n"
}

fn confirmed(test: &Test) -> &'static str {
    let significant = test.adjusted.is_some_and(|p| p < LEVEL);
    match test.difference.as_ref().map_or(0.0, |d| d.mean) {
        mean if significant && mean > 0.0 => "confirmed",
        _ if significant => "the opposite",
        _ => "not confirmed",
    }
}

/// A candidate for the default, on the seeds that choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    pub group: Group,
    pub variant: String,
    /// Differences to the baseline on each of [`plan::COLOR`].
    pub upright: [Option<Mean>; 2],
    pub matches: [Option<Mean>; 2],
    pub cost: Option<f64>,
}

impl Candidate {
    pub fn is_admissible(&self) -> bool {
        let held = |d: &Option<Mean>| d.as_ref().is_some_and(|d| d.mean > -MARGIN);
        let gained = |d: &Option<Mean>| d.as_ref().is_some_and(|d| d.sign() > 0);
        self.upright.iter().all(held) && self.matches.iter().all(gained)
    }

    /// The mean gain of matches over both sets.
    fn gain(&self) -> Option<f64> {
        let [a, b] = &self.matches;
        Some((a.as_ref()?.mean + b.as_ref()?.mean) / 2.0)
    }

    fn row(&self, set: Set) -> Row {
        row(self.group, set, &self.variant)
    }
}

/// All candidates, in the order of the plan.
pub fn candidates(entries: &[Entry]) -> Vec<Candidate> {
    let last = plan::FIRST_SEED + CHOOSING;
    let first: Vec<Entry> = entries.iter().filter(|e| e.seed < last).cloned().collect();
    let of_c = plan::candidates().into_iter().map(|(name, _)| (Group::C, name));
    let of_a = ["own", "paper"].map(|name| (Group::A, name.to_string()));
    let candidate = |(group, variant): (Group, String)| {
        let difference = |figure: &str| {
            let of = |set| {
                let baseline = row(Group::A, set, "baseline");
                row(group, set, &variant).minus(&baseline, &first, figure)
            };
            plan::COLOR.map(of)
        };
        let costs: Option<Vec<f64>> = plan::COLOR
            .iter()
            .map(|&set| Some(row(group, set, &variant).mean(&first, "overhead_measured")?.mean))
            .collect();
        Candidate {
            group,
            upright: difference("probe"),
            matches: difference("matching_d4_exact"),
            cost: costs.map(|c| c.iter().sum::<f64>() / c.len() as f64),
            variant,
        }
    };
    of_a.into_iter().chain(of_c).map(candidate).collect()
}

/// The candidate that the rule chooses; `None` if none is admissible.
pub fn chosen(candidates: &[Candidate]) -> Option<&Candidate> {
    let admissible = candidates.iter().filter(|c| c.is_admissible());
    admissible.min_by(|a, b| {
        // Equal at one decimal is equal.
        let gain = |c: &Candidate| (10.0 * c.gain().unwrap_or(0.0)).round();
        let cost = |c: &Candidate| c.cost.unwrap_or(f64::INFINITY);
        let form = |c: &Candidate| c.variant.starts_with("paper");
        gain(b).total_cmp(&gain(a)).then(cost(a).total_cmp(&cost(b))).then(form(a).cmp(&form(b)))
    })
}

/// The candidates as a table, and what the rule says; empty without runs.
pub fn default(entries: &[Entry]) -> String {
    let candidates = candidates(entries);
    let known: Vec<&Candidate> =
        candidates.iter().filter(|c| c.matches.iter().any(Option::is_some)).collect();
    if known.is_empty() {
        return String::new();
    }
    let [a, b] = plan::COLOR;
    let mut text = format!(
        "| candidate | upright probe, {a} | the same, {b} | matches, {a} | the same, {b} | mean gain | cost | admissible |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for candidate in &known {
        let shown = |d: &Option<Mean>| {
            d.as_ref()
                .map_or("–".to_string(), |d| format!("{} ({})", d.show_signed(1), d.values.len()))
        };
        let number = |v: Option<f64>, digits: usize| {
            v.map_or("–".to_string(), |v| format!("{v:.digits$}"))
        };
        let cells: Vec<String> =
            candidate.upright.iter().chain(&candidate.matches).map(shown).collect();
        text += &format!(
            "| {} | {} | {} | {} | {} |\n",
            candidate.variant,
            cells.join(" | "),
            number(candidate.gain(), 1),
            number(candidate.cost, 3),
            if candidate.is_admissible() { "yes" } else { "no" }
        );
    }
    let missing = candidates.len() - known.len();
    if missing > 0 {
        text += &format!("\n{missing} of {} candidates have no runs yet.\n", candidates.len());
    }
    text + &match chosen(&candidates) {
        None => "\nNo candidate is admissible: the default stays.\n".to_string(),
        Some(chosen) => {
            format!("\nThe rule chooses {}. {}\n", chosen.variant, judged(entries, chosen))
        }
    }
}

/// The verdicts on the chosen candidate, from all of its seeds.
fn judged(entries: &[Entry], chosen: &Candidate) -> String {
    let of = |set: Set| {
        let baseline = row(Group::A, set, "baseline");
        chosen.row(set).minus(&baseline, entries, "probe")
    };
    let differences = plan::COLOR.map(of);
    if !differences.iter().flatten().all(|d| d.values.len() >= JUDGING) {
        return format!(
            "The verdict needs {JUDGING} seeds: study --only A,C --extend \"{}\".",
            chosen.variant
        );
    }
    let verdict = |(set, d): (Set, Option<Mean>)| {
        let d = d?;
        Some(format!("{set}: {}, {}", d.show_signed(1), Verdict::of(&d, MARGIN).name()))
    };
    let verdicts: Vec<String> =
        plan::COLOR.into_iter().zip(differences).filter_map(verdict).collect();
    format!(
        "Upright probe over all seeds, of which the first {CHOOSING} made the choice: {}.",
        verdicts.join("; ")
    )
}
