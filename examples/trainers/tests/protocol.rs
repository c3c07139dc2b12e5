//! The study's plan, images, records, tests and rule, against docs/study/protocol.md and values by hand.

mod common;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
    process::Command,
};

use clap::Parser;
use common::{program, run, succeeds};
use ser_reg_trainers::{
    cli::Args,
    encoder::Network,
    records::{Balanced, BalancedLayer, Record, Step},
    run::finish::Outcome,
    settings::{SerImages, Settings},
    study::{
        endpoints,
        images::{self, Choice},
        ledger::{self, Entry},
        plan::{self, Cell, Group, Set, Work},
        protocol, record, summary,
        tables::Row,
    },
};
use tempfile::TempDir;

fn entry(cell: &Cell, seed: u64, figures: &[(&str, f64)]) -> Entry {
    let figures = figures.iter().map(|(name, value)| (name.to_string(), *value));
    Entry {
        id: cell.id(seed),
        group: cell.group.name().to_string(),
        data: Some(cell.set.name().to_string()),
        images: None,
        method: cell.method.name().to_string(),
        variant: cell.variant.clone(),
        seed,
        epochs: cell.epochs,
        options: Vec::new(),
        figures: figures.collect(),
        seconds: 1.0,
        paused: 0.0,
        threads: 1,
        commit: "none".to_string(),
        machine: "none".to_string(),
        network: Some(Network::Encoder),
        protocol: Some(protocol::hash()),
    }
}

fn cell(group: Group, set: Set, variant: &str) -> Cell {
    let of = |c: &Cell| c.group == group && c.set == set && c.variant == variant;
    plan::cells(None).into_iter().find(of).unwrap()
}

/// The table of groups: how many runs each has.
#[test]
fn the_plan_is_the_protocol_s() {
    let cells = plan::cells(None);
    let runs = |group| -> u64 {
        let of = cells.iter().filter(|c| c.group == group);
        of.map(|c| c.seeds.end - c.seeds.start).sum()
    };
    // A: 4 variants · (8 + 8 + 5) seeds; C: 8 · 2 sets · 4; H as A; I: 4 · 2 · 5.
    assert_eq!(Group::ALL.map(runs), [84, 30, 64, 12, 32, 4, 12, 84, 40]);
    let ids: Vec<String> =
        cells.iter().flat_map(|c| c.seeds.clone().map(|seed| c.id(seed))).collect();
    let distinct: HashSet<&String> = ids.iter().collect();
    assert_eq!(distinct.len(), ids.len());
    assert!(ids.iter().all(|id| !id.contains(['/', ' ', '='])), "{ids:?}");
    // The trials had the seeds 0 to 2.
    assert!(cells.iter().all(|c| c.seeds.start == 100));
    // Each encoder that another group needs is one of group A.
    for cell in &cells {
        for seed in cell.seeds.clone() {
            let source = cell.source(seed);
            let needs = [Group::E, Group::H, Group::I].contains(&cell.group);
            assert_eq!(source.is_some(), needs, "{}", cell.id(seed));
            if let Some(source) = source {
                assert!(source.starts_with("A-") && distinct.contains(&source), "{source}");
            }
        }
    }
    // What a variant is compared with has its seeds.
    for cell in cells.iter().filter(|c| [Group::C, Group::D].contains(&c.group)) {
        for variant in ["baseline", "own"] {
            let of = |c: &&Cell| c.group == Group::A && c.set == cell.set && c.variant == variant;
            assert!(cells.iter().find(of).unwrap().seeds.end >= cell.seeds.end);
        }
    }
    let extended = plan::cells(Some("own, λ=0.1"));
    let seeds = |cells: &[Cell], variant: &str| -> Vec<u64> {
        let of = cells.iter().filter(|c| c.group == Group::C && c.variant == variant);
        of.map(|c| c.seeds.end - c.seeds.start).collect()
    };
    assert_eq!(seeds(&extended, "own, λ=0.1"), [8, 8]);
    assert_eq!(seeds(&extended, "own, λ=0.3"), [4, 4]);
}

/// The trainers accept all options, and they mean what the names of the variants say.
#[test]
fn options_say_what_the_names_say() {
    for cell in plan::cells(None) {
        let (Work::Train(options) | Work::Continue(_, options)) = &cell.work else {
            continue;
        };
        let args = Args::parse_from(["test"].iter().map(|w| w.to_string()).chain(options.clone()));
        let settings = Settings::new(cell.method, &args).unwrap();
        let name = cell.variant.trim_start_matches("+1 epoch, ");
        let mode = match name {
            "baseline" => "baseline",
            "λ=0" => "lambda0",
            _ => "ser",
        };
        assert_eq!(settings.mode(), mode, "{name}");
        let after = |key: &str| name.split_once(key).map(|(_, value)| value.parse().unwrap());
        let ser = &settings.ser;
        let layer = after("layer ").map_or(2, |layer: f64| layer as usize);
        assert_eq!(ser.layer, layer, "{name}");
        if mode == "ser" {
            let own = if name.starts_with("own") { SerImages::Own } else { SerImages::Batch };
            assert_eq!(ser.images, own, "{name}");
            let lambda = if name.contains("λ=") { after("λ=").unwrap() } else { 1.0 };
            assert_eq!(ser.loss.lambda, lambda, "{name}");
            let balance = ser.balance.unwrap();
            assert_eq!((balance.every, balance.target), (50, after("balance ")), "{name}");
            assert_eq!(ser.final_lambda, name.ends_with("1 to 0").then_some(0.0), "{name}");
        }
    }
}

#[test]
fn a_smoke_run_needs_nothing_but_the_repository() {
    let cells = plan::smoke();
    let ids: Vec<String> = cells.iter().map(|c| c.id(100)).collect();
    assert_eq!(ids.len(), 3);
    for cell in &cells {
        assert_eq!((cell.set.given_as(), cell.epochs), (None, 2));
        assert_eq!(cell.seeds, 100..101);
        assert!(cell.source(100).is_none_or(|source| ids.contains(&source)), "{ids:?}");
    }
}

#[test]
fn records_of_two_protocols_are_not_mixed() {
    let cell = cell(Group::A, Set::Eurosat, "own");
    let path: &Path = "l.jsonl".as_ref();
    let own = entry(&cell, 100, &[]);
    let other = Entry { protocol: Some("12345678".to_string()), ..entry(&cell, 101, &[]) };
    let none = Entry { protocol: None, ..entry(&cell, 102, &[]) };
    let hash = protocol::hash();
    assert_eq!(hash.len(), 8);
    assert_eq!(protocol::of_all(&[], path).unwrap(), None);
    assert_eq!(protocol::of_all(&[own.clone(), own.clone()], path).unwrap(), Some(hash.clone()));
    for mixed in [[&own, &other], [&own, &none], [&other, &none]] {
        let error = protocol::of_all(&mixed.map(Entry::clone), path).unwrap_err().to_string();
        assert!(error.contains("--ledger: ") && error.contains("l.jsonl"), "{error}");
        assert!(error.contains("1 of "), "{error}");
    }
    // Runs are added to their own protocol alone.
    protocol::check(&[], path).unwrap();
    protocol::check(std::slice::from_ref(&own), path).unwrap();
    for (found, shown) in [(&other, "12345678"), (&none, "none")] {
        let error = protocol::check(&[own.clone(), found.clone()], path).unwrap_err().to_string();
        assert!(error.contains(shown) && error.contains(&hash), "{error}");
    }
    assert!(protocol::note(&[own.clone(), other]).starts_with("1 of 2 records"));
    // A line holds the hash, and lines of one run in two sets are two runs.
    let line = serde_json::to_string(&own).unwrap();
    assert!(line.contains(&hash) && !line.contains("paused"), "{line}");
    let on_cifar = self::cell(Group::A, Set::Cifar10, "own");
    let two = [own, entry(&on_cifar, 100, &[])];
    assert_eq!(ledger::distinct(&two).entries, two);
}

/// `n` empty images in each of these folders.
fn folders(root: &Path, names: &[&str], n: usize) {
    for name in names {
        let folder = root.join(name);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..n {
            fs::write(folder.join(format!("{name}_{i}.jpg").replace('/', "-")), "a file").unwrap();
        }
    }
}

#[test]
fn images_are_chosen_by_class_and_once() {
    let folder = TempDir::new().unwrap();
    folders(folder.path(), &["forest", "river"], 30);
    let chosen = images::choose(folder.path(), 12, 5).unwrap();
    let count = |chosen: &[Choice], begin: &str| {
        chosen.iter().filter(|c| c.place.starts_with(begin)).count()
    };
    for class in ["forest", "river"] {
        assert_eq!(count(&chosen, &format!("train/{class}")), 12);
        assert_eq!(count(&chosen, &format!("test/{class}")), 5);
    }
    let images: HashSet<_> = chosen.iter().map(|c| &c.image).collect();
    assert_eq!(images.len(), 34, "no image is chosen twice");
    assert_eq!(chosen, images::choose(folder.path(), 12, 5).unwrap());
    // They are not the first by name.
    assert!(
        !(0..12).all(|i| images.contains(&Path::new("forest").join(format!("forest_{i}.jpg"))))
    );
    let error = format!("{:#}", images::choose(folder.path(), 26, 5).unwrap_err());
    assert!(error.contains("at least 31 images") && error.contains("got 30"), "{error}");
    // A set that comes divided stays so.
    let divided = TempDir::new().unwrap();
    folders(divided.path(), &["train/a", "train/b"], 20);
    folders(divided.path(), &["test/a", "test/b"], 6);
    let chosen = images::choose(divided.path(), 12, 5).unwrap();
    assert_eq!((count(&chosen, "train"), count(&chosen, "test")), (24, 10));
    for choice in &chosen {
        assert_eq!(choice.place.components().next(), choice.image.components().next());
    }
    let empty = TempDir::new().unwrap();
    let error = format!("{:#}", images::choose(empty.path(), 1, 1).unwrap_err());
    assert!(error.contains("a folder for each class"), "{error}");
}

#[test]
fn a_chosen_part_is_copied_once() {
    let folder = TempDir::new().unwrap();
    let (given, out) = (folder.path().join("given"), folder.path().join("out"));
    folders(&given, &["a", "b"], images::TRAIN + images::TEST);
    let ready = images::ready(Set::Eurosat, &given, &out).unwrap();
    let train = fs::read_dir(ready.path.join("train/a")).unwrap().count();
    let test = fs::read_dir(ready.path.join("test/b")).unwrap().count();
    assert_eq!((train, test), (800, 200));
    let list = fs::read(out.join("data/eurosat.txt")).unwrap();
    assert_eq!(ready.list, Some(format!("{:08x}", crc32fast::hash(&list))));
    assert_eq!(images::ready(Set::Eurosat, &given, &out).unwrap(), ready);
    // An older copy without its list is not whole.
    fs::remove_file(out.join("data/eurosat.txt")).unwrap();
    fs::remove_dir_all(ready.path.join("train")).unwrap();
    assert_eq!(images::ready(Set::Eurosat, &given, &out).unwrap(), ready);
    assert_eq!(fs::read_dir(ready.path.join("train/a")).unwrap().count(), 800);
    // Other images are no more of the same runs.
    fs::rename(given.join("a"), given.join("c")).unwrap();
    let error = format!("{:#}", images::ready(Set::Eurosat, &given, &out).unwrap_err());
    assert!(error.contains("--data eurosat=") && error.contains("--out"), "{error}");
    // All of CIFAR-10 is read where it is.
    let all = images::ready(Set::Cifar10All, &given, &out).unwrap();
    assert_eq!((all.path, all.list), (given, None));
}

fn outcome() -> Outcome {
    Outcome {
        method: "moco_v3".to_string(),
        mode: "ser".to_string(),
        network: Network::Encoder,
        seed: 100,
        epochs: 1,
        steps: 4,
        first: None,
        last: None,
        lowest: None,
        knn: vec![70.0, 60.0],
        knn_poses: Some(60.0),
        equivariance: vec![Some(0.5), Some(0.75), None],
        feature_std: 0.5,
        images_per_s: 100.0,
        waiting: 0.0,
        overhead_predicted: Some(1.25),
        overhead_measured: Some(1.5),
        seconds: 1.0,
        peak_mib: Some(64.0),
        skipped: 0,
        note: String::new(),
        references: Vec::new(),
    }
}

/// Ratios 2·4/1 and 0.5·3/2 at the steps that were compared; their median is 4.375, and the later one 0.75.
#[test]
fn a_record_has_the_ratio_of_the_gradients_with_lambda() {
    let shared = |inv, equiv| BalancedLayer {
        name: "shared".to_string(),
        norm_inv: Some(inv),
        norm_equiv: Some(equiv),
        cosine: None,
    };
    // λ of the record is that of the next step.
    let balance = |step, inv, equiv| {
        Record::Balance(Balanced {
            step,
            lambda: 9.0,
            shared: shared(inv, equiv),
            layers: Vec::new(),
        })
    };
    let step = |step, lambda| Record::Step(Step { step, lambda, ..Step::default() });
    let records = [
        balance(0, 1.0, 4.0),
        step(0, 2.0),
        step(1, 1.0),
        balance(2, 2.0, 3.0),
        step(2, 0.5),
        step(3, 0.25),
    ];
    let mut figures = BTreeMap::new();
    record::training(&mut figures, &outcome(), &records, 2);
    assert_eq!(figures["gradient_ratio"], 4.375);
    assert_eq!(figures["gradient_ratio_late"], 0.75);
    assert_eq!(figures["lambda_last"], 0.25);
    assert_eq!((figures["equivariance"], figures["equivariance_block1"]), (0.75, 0.5));
    assert_eq!((figures["overhead_measured"], figures["overhead_predicted"]), (1.5, 1.25));
    let error = record::check(&figures).unwrap_err().to_string();
    assert!(error.ends_with("got none of matching_d4_exact, d4_mean, probe"), "{error}");
    figures.extend(record::PRIMARY.map(|name| (name.to_string(), 1.0)));
    record::check(&figures).unwrap();
    record::without_times(&mut figures);
    assert!(!figures.contains_key("overhead_measured") && figures.contains_key("knn"));
    // Without a comparison there is no ratio.
    let mut figures = BTreeMap::new();
    record::training(&mut figures, &outcome(), &[step(0, 1.0)], 2);
    assert!(!figures.contains_key("gradient_ratio"));
}

/// Runs of group A on EuroSAT, each with these values for the four endpoints of seeds 100, 101, ...
fn runs(variant: &str, values: &[[f64; 4]]) -> Vec<Entry> {
    let cell = cell(Group::A, Set::Eurosat, variant);
    let of = |(i, v): (usize, &[f64; 4])| {
        let named: Vec<_> = record::PRIMARY.into_iter().zip(*v).collect();
        entry(&cell, 100 + i as u64, &named)
    };
    values.iter().enumerate().map(of).collect()
}

/// Of three seeds a difference 1, 2, 3 has p = 1 − √(12/14) = 0.0742. The family has eight tests.
#[test]
fn primary_endpoints_are_corrected_over_a_set() {
    let zero = [[0.0; 4]; 3];
    // Own: the score rises without spread, matches by 1, 2, 3; the rest does not change.
    let own = [[0.5, 1.0, 0.0, 0.0], [0.5, 2.0, 0.0, 0.0], [0.5, 3.0, 0.0, -0.3]];
    let entries = [runs("baseline", &zero), runs("own", &own)].concat();
    let tests = endpoints::tests(&entries, Set::Eurosat);
    assert_eq!(tests.len(), 8);
    let find = |figure: &str| {
        tests.iter().find(|t| t.contrast == "own" && t.figure == figure).unwrap().clone()
    };
    let near = |a: Option<f64>, b: f64| assert!((a.unwrap() - b).abs() < 1e-9, "{a:?} {b}");
    near(find("equivariance").adjusted, 0.0);
    let p = 1.0 - (12f64 / 14.0).sqrt();
    near(find("matching_d4_exact").p, p);
    // The second smallest of eight, where those of the missing variant count as 1.
    near(find("matching_d4_exact").adjusted, 7.0 * p);
    near(find("d4_mean").adjusted, 1.0);
    assert!(tests.iter().filter(|t| t.contrast == "paper").all(|t| t.p.is_none()));
    let table = endpoints::table(&entries, Set::Eurosat);
    for row in [
        "| own | equivariance score | 3 | +0.500 ± 0.000 | 0.00e0 | 0.00e0 | confirmed |",
        "| own | right matches over D4 | 3 | +2.0 ± 2.5 | 7.42e-2 | 5.19e-1 | not confirmed |",
        "| own | upright probe | 3 | -0.1 ± 0.4 |",
    ] {
        assert!(table.contains(row), "{row} in {table}");
    }
    let upright = table.lines().find(|l| l.contains("upright probe")).unwrap();
    assert!(upright.ends_with("| not inferior |"), "{upright}");
    assert_eq!(endpoints::table(&entries, Set::Cifar10), "");
    let text = summary::markdown(&entries);
    assert!(text.contains("| own − baseline | 3 | **+0.500 ± 0.000** | +2.0 ± 2.5 |"), "{text}");
}

/// Runs on both color sets: gain of exact matches over the baseline, with a spread of ±0.1 over seeds, and upright difference.
fn candidate(group: Group, variant: &str, gain: f64, upright: f64, seeds: u64) -> Vec<Entry> {
    let mut entries = Vec::new();
    for set in plan::COLOR {
        let cell = cell(group, set, variant);
        for seed in 100..100 + seeds {
            let spread = if seed % 2 == 0 { 0.1 } else { -0.1 };
            let figures = [("matching_d4_exact", 10.0 + gain + spread), ("probe", 70.0 + upright)];
            let figures = [&figures[..], &[("overhead_measured", 1.2)]].concat();
            entries.push(entry(&cell, seed, &figures));
        }
    }
    entries
}

#[test]
fn the_rule_chooses_the_default() {
    let baseline: Vec<Entry> = plan::COLOR
        .into_iter()
        .flat_map(|set| {
            let cell = cell(Group::A, set, "baseline");
            (100..108).map(move |seed| {
                entry(&cell, seed, &[("matching_d4_exact", 10.0), ("probe", 70.0)])
            })
        })
        .collect();
    let chosen = |more: &[Vec<Entry>]| {
        let entries = [&[baseline.clone()][..], more].concat().concat();
        let candidates = endpoints::candidates(&entries);
        assert_eq!(candidates.len(), 10);
        endpoints::chosen(&candidates).map(|c| c.variant.clone())
    };
    let strong = candidate(Group::A, "own", 9.0, -2.0, 8);
    let mild = candidate(Group::C, "own, λ=0.1", 4.0, -0.5, 4);
    let middle = candidate(Group::C, "own, λ=0.3", 6.0, -0.9, 4);
    // The largest gain loses too much; of the others the larger gain wins.
    assert_eq!(chosen(std::slice::from_ref(&strong)), None);
    assert_eq!(chosen(&[strong.clone(), mild.clone()]).as_deref(), Some("own, λ=0.1"));
    assert_eq!(
        chosen(&[strong.clone(), mild.clone(), middle.clone()]).as_deref(),
        Some("own, λ=0.3")
    );
    // One set is not enough.
    let half: Vec<Entry> =
        middle.iter().filter(|e| e.data.as_deref() == Some("eurosat")).cloned().collect();
    assert_eq!(chosen(&[half, mild.clone()]).as_deref(), Some("own, λ=0.1"));
    // A gain within its spread is none.
    assert_eq!(chosen(&[candidate(Group::C, "own, λ=0.1", 0.05, 0.0, 4)]), None);
    // Equal gains and costs: own goes before paper.
    let paper = candidate(Group::C, "paper, λ=0.1", 4.0, 0.5, 4);
    assert_eq!(chosen(&[paper.clone(), mild.clone()]).as_deref(), Some("own, λ=0.1"));
    // The seeds from the fifth on judge and do not choose.
    let entries = [baseline.clone(), mild.clone()].concat();
    let text = endpoints::default(&entries);
    assert!(text.contains("--extend \"own, λ=0.1\""), "{text}");
    let later = candidate(Group::C, "own, λ=0.1", 4.0, -9.0, 8);
    let later = later.into_iter().filter(|e| e.seed >= 104).collect();
    assert_eq!(chosen(&[mild.clone(), later]).as_deref(), Some("own, λ=0.1"));
    let all = candidate(Group::C, "own, λ=0.1", 4.0, -0.5, 8);
    let text = endpoints::default(&[baseline, all].concat());
    assert!(text.contains("eurosat: -0.5 ± 0.0, not inferior"), "{text}");
    assert!(text.contains("9 of 10 candidates have no runs yet"), "{text}");
}

#[test]
fn tables_say_what_was_not_run() {
    let text = summary::markdown(&[]);
    assert!(text.contains("0 of 0 records have the hash"), "{text}");
    for row in ["| A | MoCo-v3 on three sets of images | 0 | 84 |", "| 0 | 40 |"] {
        assert!(text.contains(row), "{row} in {text}");
    }
    assert!(summary::html(&[]).is_ok());
    // A paused run has no seconds.
    let cell = cell(Group::A, Set::Eurosat, "own");
    let paused = Entry { paused: 3.0, ..entry(&cell, 100, &[]) };
    let row = Row::new(Group::A, Set::Eurosat, cell.method, "own");
    assert!(row.values(&[paused], "seconds").is_empty());
    assert_eq!(row.values(&[entry(&cell, 100, &[])], "seconds"), [(100, 1.0)]);
}

/// What cannot be run is listed with its reason, and everything else goes on.
#[test]
fn a_study_without_data_says_what_is_not_run() {
    let folder = TempDir::new().unwrap();
    let study = |only: &str| {
        let mut command = Command::new(program("study"));
        command.args(["--only", only, "--ledger", "l.jsonl", "--out", "out"]);
        succeeds(&run(command.current_dir(folder.path())))
    };
    let said = study("D,F,G");
    for line in [
        "D, eurosat: 12 runs not run: no data (--data eurosat=PATH)",
        "F, cifar10-all: 4 runs not run: no data (--data cifar10=PATH)",
        "G, bccd: 12 runs not run: ",
        "0 runs to do, 0 done",
        "0 of 0 records have the hash",
    ] {
        assert!(said.contains(line), "{line} in {said}");
    }
    // Its images are here, and its encoders are not.
    let said = study("H");
    assert!(said.contains("20 runs not run, because out has no encoder of group A"), "{said}");
    // Another protocol starts another ledger.
    let cell = cell(Group::A, Set::Eurosat, "own");
    let other = Entry { protocol: Some("12345678".to_string()), ..entry(&cell, 100, &[]) };
    let path = folder.path().join("l.jsonl");
    ledger::append(&path, &other).unwrap();
    let before = fs::read(&path).unwrap();
    let refused = |options: &[&str], part: &str| {
        let mut command = Command::new(program("study"));
        command.args(options).args(["--ledger", "l.jsonl", "--out", "out"]);
        common::fails(&run(command.current_dir(folder.path())), &["--ledger: ", part]);
        assert_eq!(fs::read(&path).unwrap(), before);
    };
    refused(&["--only", "D"], "12345678");
    let said = succeeds(&run(Command::new(program("study"))
        .args(["--report", "--ledger", "l.jsonl", "--out", "out"])
        .current_dir(folder.path())));
    assert!(said.contains("0 of 1 records have the hash"), "{said}");
    ledger::append(&path, &entry(&cell, 101, &[])).unwrap();
    let before = fs::read(&path).unwrap();
    let mut report = Command::new(program("study"));
    report.args(["--report", "--ledger", "l.jsonl", "--out", "out"]);
    common::fails(&run(report.current_dir(folder.path())), &["--ledger: ", "1 of 12345678"]);
    assert_eq!(fs::read(&path).unwrap(), before);
}
