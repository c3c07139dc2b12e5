//! What the finished runs say, group by group.

use anyhow::Result;

use super::{
    endpoints,
    ledger::{self, Entry},
    plan::{self, Cell, Group, Set},
    protocol,
    tables::{self, COST, Column, FEW, MAIN, Row, STABILITY, interval},
};
use crate::{
    report::{
        page::{Figure, Page},
        plots::{self, Axes, Intervals, PALETTE},
    },
    settings::Method,
};

/// Everything as Markdown.
pub fn markdown(entries: &[Entry]) -> String {
    let entries = &ledger::distinct(entries).entries;
    let mut text = format!("{}\n\n## Finished runs\n\n", protocol::note(entries));
    text += &progress(entries);
    text += "\nA value is a mean ± its 95 % interval (t) over seeds. Differences are paired by seed. Bold: the interval does \
             not contain zero.\n";
    for group in Group::ALL {
        text += &section(entries, group);
    }
    let default = endpoints::default(entries);
    if !default.is_empty() {
        text += &format!("\n## Rule for the default\n\n{default}");
    }
    text
}

/// How many runs of each group are there, of how many.
fn progress(entries: &[Entry]) -> String {
    let mut text = "| group | | finished | planned |\n|---|---|---|---|\n".to_string();
    let cells = plan::cells(None);
    for group in Group::ALL {
        let planned: u64 = of_group(&cells, group).map(|c| c.seeds.end - c.seeds.start).sum();
        let finished = entries.iter().filter(|e| e.group == group.name()).count();
        text += &format!("| {} | {} | {finished} | {planned} |\n", group.name(), group.title());
    }
    text
}

fn of_group(cells: &[Cell], group: Group) -> impl Iterator<Item = &Cell> {
    cells.iter().filter(move |cell| cell.group == group)
}

/// The tables of a group, for each set and method with runs.
fn section(entries: &[Entry], group: Group) -> String {
    let cells = plan::cells(None);
    let mut parts: Vec<(Set, Method)> = Vec::new();
    for cell in of_group(&cells, group) {
        if !parts.contains(&(cell.set, cell.method)) {
            parts.push((cell.set, cell.method));
        }
    }
    let mut text = String::new();
    for (set, method) in parts {
        let row = |group, variant: &str| Row::new(group, set, method, variant);
        let of_part = of_group(&cells, group).filter(|c| (c.set, c.method) == (set, method));
        let own: Vec<Row> = of_part.map(|c| row(group, &c.variant)).collect();
        if !entries.iter().any(|e| own.iter().any(|row| row.is_of(e))) {
            continue;
        }
        text += &format!("\n## {}: {}, {set}, {}\n", group.name(), group.title(), method.name());
        let beside: &[&str] = match group {
            Group::C => &["baseline", "own", "paper"],
            Group::D => &["baseline", "own"],
            Group::E => &["baseline"],
            _ => &[],
        };
        let beside: Vec<Row> = beside.iter().map(|variant| row(Group::A, variant)).collect();
        let pairs = pairs(&own, &beside, group);
        let rows = [own, beside].concat();
        for columns in columns(group) {
            text += &format!("\n{}", tables::means(entries, &rows, columns));
        }
        text += &format!("\n{}", tables::differences(entries, &pairs, columns(group)[0]));
        if group == Group::A {
            text += &format!("\nPrimary endpoints:\n\n{}", endpoints::table(entries, set));
        }
    }
    text
}

/// The tables of a group; the differences are of the first.
fn columns(group: Group) -> &'static [&'static [Column]] {
    match group {
        Group::H => &[&FEW],
        Group::I => &[&STABILITY],
        _ => &[&MAIN, &COST],
    }
}

/// What is compared within a group, and with rows of group A beside it.
fn pairs(own: &[Row], beside: &[Row], group: Group) -> Vec<[Row; 2]> {
    let named = [
        ["own", "baseline"],
        ["paper", "baseline"],
        ["λ=0", "baseline"],
        ["own", "λ=0"],
        ["paper", "λ=0"],
        ["own", "paper"],
        ["+1 epoch, own", "+1 epoch, baseline"],
    ];
    let find = |name: &str| own.iter().find(|row| row.variant == name);
    let mut pairs: Vec<[Row; 2]> =
        named.iter().filter_map(|[a, b]| Some([find(a)?.clone(), find(b)?.clone()])).collect();
    for reference in beside {
        // Forms are compared within C's values of λ by eye; each candidate with what it may replace.
        if group == Group::C && reference.variant == "paper" {
            continue;
        }
        pairs.extend(own.iter().map(|row| [row.clone(), reference.clone()]));
    }
    pairs
}

/// Group A as a page of charts.
pub fn html(entries: &[Entry]) -> Result<String> {
    let entries = &ledger::distinct(entries).entries;
    let sets = [Set::Eurosat, Set::Cifar10, Set::FashionMnist];
    let names = sets.map(Set::name);
    let mut page = Page::new(
        "MoCo-v3 with and without SER on three sets of images",
        "Dots are means over seeds, whiskers their 95 % intervals, pale dots the runs. λ=0 has the partition and the views of \
         the paper's form without its loss.",
    );
    let mut figures = Vec::new();
    for (figure, heading, _) in MAIN {
        let unit = if figure == "equivariance" { "1 is exact" } else { "%" };
        let y = format!("{heading}, {unit}");
        let series: Vec<Intervals> = plan::VARIANTS
            .iter()
            .zip(PALETTE)
            .map(|(variant, color)| Intervals {
                name: variant.to_string(),
                color,
                values: sets
                    .iter()
                    .map(|&set| {
                        let row = Row::new(Group::A, set, Method::MocoV3, variant);
                        interval(row.mean(entries, figure)?)
                    })
                    .collect(),
            })
            .collect();
        let axes = Axes { y: &y, ..Axes::default() };
        let svg = plots::interval_chart(&axes, &names, &series)?;
        figures.push(Figure { title: heading, caption: "", svg, wide: false });
    }
    page.figures(&figures);
    Ok(page.html())
}
