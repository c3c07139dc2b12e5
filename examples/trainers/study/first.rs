//! What the runs of the first study say, on which docs/results/study.jsonl reports: tables of means, paired differences, and
//! the paper's trends beside ours. Its runs are not made any more.

use anyhow::Result;

use super::{
    ledger::{self, Entry},
    statistics::Mean,
    tables::interval,
};
use crate::{
    report::{
        page::{Figure, Page},
        plots::{self, Axes, Intervals, PALETTE},
    },
    settings::Method,
};

/// Epochs of its runs.
const EPOCHS: usize = 3;

/// Groups that vary one thing.
const SWEEPS: [&str; 7] =
    ["layer", "lambda", "temperature", "fraction", "group", "filter", "addons"];

/// Add-ons whose layer is varied: variants at the final layer, and at block 1 of 4, as deep as block 3 of 12.
const DECOUPLED: [[&str; 2]; 2] =
    [["EquiMod final", "EquiMod layer 1"], ["AugSelf final", "AugSelf layer 1"]];

/// The variants of each group in the order of its tables; the group of the methods first.
const VARIANTS: [(&str, &[&str]); 8] = [
    ("methods", &["baseline", "λ=0", "SER"]),
    ("layer", &["layer 1", "layer 3", "layer 4"]),
    ("group", &["rotations", "flips", "scales", "crops"]),
    ("lambda", &["λ=0.3", "λ=3"]),
    ("temperature", &["τ=0.2", "τ=0.5"]),
    ("fraction", &["fraction 1/16", "fraction 1/4"]),
    ("filter", &["D4 and scales, nearest", "D4 and scales, bilinear", "D4 and scales, bicubic"]),
    ("addons", &["EquiMod final", "EquiMod layer 1", "AugSelf final", "AugSelf layer 1"]),
];

/// The variant that a sweep departs from, and that its runs are paired with. Filters matter where something is resampled.
fn reference(group: &str) -> &'static str {
    match group {
        "filter" => "D4 and scales, bicubic",
        "addons" => "baseline",
        _ => "SER",
    }
}

/// A figure of the tables: its name in the ledger, its heading, its digits.
pub type Column = (&'static str, &'static str, usize);

/// Accuracies and shares in percent, the equivariance score between −1 and 1.
pub const COLUMNS: [Column; 9] = [
    ("probe", "probe", 1),
    ("knn", "20-NN", 1),
    ("knn_poses", "20-NN, 7 poses", 1),
    ("d4_consistency", "agreement over D4", 1),
    ("corrupted", "corrupted", 1),
    ("flips", "flips", 1),
    ("pck", "PCK", 1),
    ("box_iou", "box IoU", 1),
    ("equivariance", "EqScore", 3),
];

/// A trend of the paper: what it compares, its figure there, and which way it goes.
struct Trend {
    claim: &'static str,
    paper: &'static str,
    method: &'static str,
    figure: &'static str,
    pair: [&'static str; 2],
    rises: bool,
}

const TRENDS: [Trend; 15] = [
    trend(
        "MoCo-v3: SER over the baseline, upright (probe)",
        "+0.84",
        "moco_v3",
        "probe",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "MoCo-v3: partition and delayed CLS alone, upright (probe)",
        "+0.38",
        "moco_v3",
        "probe",
        ["λ=0", "baseline"],
        true,
    ),
    trend(
        "MoCo-v3: the loss itself, upright (probe)",
        "+0.46",
        "moco_v3",
        "probe",
        ["SER", "λ=0"],
        true,
    ),
    trend(
        "DINO: SER over the baseline, upright (probe)",
        "+0.26",
        "dino",
        "probe",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "Barlow Twins: SER over the baseline, upright (probe)",
        "+0.68",
        "barlow_twins",
        "probe",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "MoCo-v3: under corruptions (ImageNet-C)",
        "+1.11",
        "moco_v3",
        "corrupted",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "MoCo-v3: under perturbations, fewer flips (ImageNet-P: Top-1 +1.22)",
        "fewer",
        "moco_v3",
        "flips",
        ["SER", "baseline"],
        false,
    ),
    trend(
        "MoCo-v3: spatial transfer (COCO: +1.7 mAP; ours: box IoU)",
        "+1.7",
        "moco_v3",
        "box_iou",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "MoCo-v3: equivariance score (theirs .804 to .840)",
        "+0.036",
        "moco_v3",
        "equivariance",
        ["SER", "baseline"],
        true,
    ),
    trend(
        "a deeper layer is more equivariant (3 to 12 of 12: .840 to .924; ours 1 to 4 of 4, each at its own block)",
        "+0.084",
        "moco_v3",
        "equivariance",
        ["layer 4", "layer 1"],
        true,
    ),
    trend(
        "the same, read at block 2 of both runs",
        "–",
        "moco_v3",
        "equivariance_block2",
        ["layer 4", "layer 1"],
        true,
    ),
    trend(
        "a deeper layer is less accurate (3 to 12 of 12: 69.28 to 68.18; ours 1 to 4 of 4)",
        "−1.10",
        "moco_v3",
        "probe",
        ["layer 4", "layer 1"],
        false,
    ),
    trend(
        "MoCo-v3: the loss itself makes the map equivariant (no figure in the paper)",
        "–",
        "moco_v3",
        "equivariance",
        ["SER", "λ=0"],
        true,
    ),
    trend(
        "MoCo-v3 and EquiMod: its loss at an earlier layer (12 to 3 of 12: 68.95 to 69.51; ours 4 to 1 of 4)",
        "+0.56",
        "moco_v3",
        "probe",
        ["EquiMod layer 1", "EquiMod final"],
        true,
    ),
    trend(
        "MoCo-v3 and AugSelf: its loss at an earlier layer (12 to 3 of 12: 67.55 to 68.23; ours 4 to 1 of 4)",
        "+0.68",
        "moco_v3",
        "probe",
        ["AugSelf layer 1", "AugSelf final"],
        true,
    ),
];

const fn trend(
    claim: &'static str,
    paper: &'static str,
    method: &'static str,
    figure: &'static str,
    pair: [&'static str; 2],
    rises: bool,
) -> Trend {
    Trend { claim, paper, method, figure, pair, rises }
}

/// The values of one figure by seed.
fn values(entries: &[Entry], method: &str, variant: &str, figure: &str) -> Vec<(u64, f64)> {
    let of = |e: &&Entry| e.method == method && e.variant == variant;
    let value = |e: &Entry| Some((e.seed, *e.figures.get(figure)?));
    entries.iter().filter(of).filter_map(value).collect()
}

fn mean(entries: &[Entry], method: &str, variant: &str, figure: &str) -> Option<Mean> {
    let values: Vec<f64> =
        values(entries, method, variant, figure).into_iter().map(|(_, v)| v).collect();
    Mean::of(&values)
}

/// Methods and variants of a group that have entries.
fn variants(entries: &[Entry], group: &str) -> Vec<(String, String)> {
    let of_group = VARIANTS.iter().find(|(name, _)| *name == group);
    let mut rows = Vec::new();
    for method in Method::ALL.map(Method::name) {
        for variant in of_group.map_or(&[][..], |(_, variants)| variants) {
            if entries.iter().any(|e| e.method == method && e.variant == *variant) {
                rows.push((method.to_string(), variant.to_string()));
            }
        }
    }
    rows
}

/// Runs of the study's length, each once.
fn counted(entries: &[Entry]) -> Vec<Entry> {
    let mut entries = ledger::distinct(entries).entries;
    entries.retain(|e| e.epochs == EPOCHS);
    entries
}

/// Everything as Markdown.
pub fn markdown(entries: &[Entry]) -> String {
    let entries = &counted(entries);
    let mut text = String::new();
    text += "## Methods\n\nMean ± 95 % interval (t) over seeds.\n\n";
    text += &table(entries, &variants(entries, "methods"));
    text += "\n### Paired by seed\n\n";
    let mut pairs = Vec::new();
    for method in Method::ALL.map(Method::name) {
        for (a, b) in [("SER", "λ=0"), ("SER", "baseline"), ("λ=0", "baseline")] {
            pairs.push([method, a, b].map(str::to_string));
        }
    }
    text += &differences(entries, &pairs);
    text += "\nBold: the interval does not contain zero.\n";
    for group in SWEEPS {
        text += &sweep(entries, group);
    }
    text += "\n## The paper's trends beside ours\n\n";
    text += &trends(entries);
    text
}

/// A sweep beside what it departs from, and its differences; nothing if none of it was run.
fn sweep(entries: &[Entry], group: &str) -> String {
    let swept = variants(entries, group);
    if swept.is_empty() {
        return String::new();
    }
    let reference = reference(group);
    let mut rows = swept.clone();
    for (method, _) in &swept {
        for variant in [reference, "SER", "λ=0"] {
            let row = (method.clone(), variant.to_string());
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    let swept = swept.into_iter().filter(|(_, v)| v != reference);
    let mut pairs: Vec<_> =
        swept.map(|(method, variant)| [method, variant, reference.to_string()]).collect();
    if group == "addons" {
        // What the sweep is for: one add-on, two layers.
        let method = Method::MocoV3.name();
        let layers = DECOUPLED.map(|[coupled, decoupled]| [method, decoupled, coupled]);
        pairs.extend(layers.map(|pair| pair.map(str::to_string)));
    }
    format!("\n## Sweep: {group}\n\n{}\n{}", table(entries, &rows), differences(entries, &pairs))
}

fn table(entries: &[Entry], rows: &[(String, String)]) -> String {
    let mut text = "| method | variant | seeds |".to_string();
    for (_, heading, _) in COLUMNS {
        text += &format!(" {heading} |");
    }
    text += &format!("\n|---|---|---|{}\n", "---|".repeat(COLUMNS.len()));
    for (method, variant) in rows {
        let seeds = values(entries, method, variant, "knn").len();
        text += &format!("| {method} | {variant} | {seeds} |");
        for (figure, _, digits) in COLUMNS {
            let shown = mean(entries, method, variant, figure)
                .map_or("–".to_string(), |m| m.show(digits));
            text += &format!(" {shown} |");
        }
        text += "\n";
    }
    text
}

/// Rows `method, a, b`: `a − b`, paired by seed; those without a common seed are left out.
fn differences(entries: &[Entry], pairs: &[[String; 3]]) -> String {
    let mut text = "| method | difference | seeds |".to_string();
    for (_, heading, _) in COLUMNS {
        text += &format!(" {heading} |");
    }
    text += &format!("\n|---|---|---|{}\n", "---|".repeat(COLUMNS.len()));
    for [method, a, b] in pairs {
        let mut seeds = 0;
        let mut cells = String::new();
        for (figure, _, digits) in COLUMNS {
            let (x, y) = (values(entries, method, a, figure), values(entries, method, b, figure));
            let difference = Mean::of_differences(&x, &y);
            seeds = seeds.max(difference.as_ref().map_or(0, |d| d.values.len()));
            cells += &difference.map_or(" – |".to_string(), |d| {
                let bold = if d.sign() == 0 { "" } else { "**" };
                format!(" {bold}{}{bold} |", d.show_signed(digits))
            });
        }
        if seeds > 0 {
            text += &format!("| {method} | {a} − {b} | {seeds} |{cells}\n");
        }
    }
    text
}

fn trends(entries: &[Entry]) -> String {
    let mut text =
        "| trend | paper | ours | seeds | verdict |\n|---|---|---|---|---|\n".to_string();
    for t in TRENDS {
        let [a, b] = t.pair.map(|variant| values(entries, t.method, variant, t.figure));
        let digits = if t.figure.starts_with("equivariance") { 3 } else { 1 };
        let (ours, seeds, verdict) = match Mean::of_differences(&a, &b) {
            None => ("–".to_string(), 0, "not run"),
            Some(d) => {
                let direction = if t.rises { 1 } else { -1 };
                let verdict = match d.sign() * direction {
                    1 => "confirmed",
                    -1 => "not confirmed: the opposite",
                    _ if d.half_width.is_none() => "one seed: no verdict",
                    _ => "within the noise",
                };
                (d.show_signed(digits), d.values.len(), verdict)
            }
        };
        text += &format!("| {} | {} | {ours} | {seeds} | {verdict} |\n", t.claim, t.paper);
    }
    text
}

/// The methods as a page of charts.
pub fn html(entries: &[Entry]) -> Result<String> {
    let entries = &counted(entries);
    let methods = Method::ALL.map(Method::name);
    let variants = ["baseline", "λ=0", "SER"];
    let mut page = Page::new(
        "Three methods, with and without SER",
        "Dots are means over seeds, whiskers their 95 % intervals, pale dots the runs. λ = 0 has the same batches and the \
         same encoder as SER, without its loss.",
    );
    let mut charts = Vec::new();
    for (figure, heading, _) in COLUMNS {
        let unit = if figure == "equivariance" { "1 is exact" } else { "%" };
        let y = format!("{heading}, {unit}");
        let series: Vec<Intervals> = variants
            .iter()
            .zip(PALETTE)
            .map(|(variant, color)| Intervals {
                name: variant.to_string(),
                color,
                values: methods
                    .iter()
                    .map(|method| interval(mean(entries, method, variant, figure)?))
                    .collect(),
            })
            .collect();
        let axes = Axes { y: &y, ..Axes::default() };
        charts.push((heading, plots::interval_chart(&axes, &methods, &series)?));
    }
    let figures: Vec<Figure> = charts
        .into_iter()
        .map(|(title, svg)| Figure { title, caption: "", svg, wide: false })
        .collect();
    page.figures(&figures);
    Ok(page.html())
}
