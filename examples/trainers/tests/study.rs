//! The study's arithmetic, ledger and plan.

use std::{collections::HashSet, fs};

use ser_reg_trainers::study::{
    ledger::{self, Entry, Ledger},
    plan,
    statistics::Mean,
    summary,
};
use tempfile::TempDir;

fn entry(method: &str, variant: &str, seed: u64, probe: f64) -> Entry {
    Entry {
        id: format!("{method}-{variant}-{seed}"),
        group: "methods".to_string(),
        method: method.to_string(),
        variant: variant.to_string(),
        seed,
        epochs: 3,
        options: Vec::new(),
        figures: [("probe", probe), ("knn", 70.0)]
            .into_iter()
            .map(|(name, value)| (name.to_string(), value))
            .collect(),
        seconds: 1.0,
        threads: 1,
        commit: "none".to_string(),
        machine: "none".to_string(),
        network: None,
    }
}

#[test]
fn intervals_are_student_s() {
    // Mean 3, standard deviation 1.5811, t of 4 degrees 2.776: 2.776 * 1.5811 / sqrt 5.
    let mean = Mean::of(&[1., 2., 3., 4., 5.]).unwrap();
    assert_eq!(mean.mean, 3.0);
    assert!((mean.half_width.unwrap() - 1.9629).abs() < 1e-3);
    assert_eq!(mean.sign(), 1);
    assert_eq!(Mean::of(&[1., -1.]).unwrap().sign(), 0);
    assert_eq!(Mean::of(&[-3., -3.1, -2.9]).unwrap().sign(), -1);
    // One value says nothing of its spread, so nothing of its sign.
    let one = Mean::of(&[4.0]).unwrap();
    assert_eq!((one.half_width, one.sign()), (None, 0));
    assert_eq!(Mean::of(&[]), None);
    // Beyond the table.
    assert!(Mean::of(&vec![1.0; 100]).unwrap().half_width.unwrap() == 0.0);
}

#[test]
fn differences_pair_seeds() {
    let a = [(0, 10.0), (1, 20.0), (2, 30.0)];
    let b = [(2, 29.0), (0, 9.0), (7, 100.0)];
    let difference = Mean::of_differences(&a, &b).unwrap();
    assert_eq!(difference.values, [1.0, 1.0]);
    assert_eq!(Mean::of_differences(&a, &[(9, 1.0)]), None);
}

#[test]
fn a_ledger_survives_a_line_cut_off() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("deep/study.jsonl");
    assert_eq!(ledger::read(&path).unwrap(), Ledger::default());
    let entries = [entry("dino", "SER", 0, 70.0), entry("dino", "SER", 1, 71.0)];
    for e in &entries {
        ledger::append(&path, e).unwrap();
    }
    assert_eq!(ledger::read(&path).unwrap().entries, entries);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}{{\"id\": \"cut")).unwrap();
    let read = ledger::read(&path).unwrap();
    assert_eq!(read.entries, entries);
    assert!(read.notes[0].contains("line 3 was cut off"), "{:?}", read.notes);
    // The next line begins on its own.
    let mended = ledger::mend(&path).unwrap().unwrap();
    assert!(mended.contains("study.jsonl") && mended.contains(r#"{"id": "cut"#), "{mended}");
    assert_eq!(ledger::mend(&path).unwrap(), None);
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    ledger::append(&path, &entry("dino", "SER", 2, 72.0)).unwrap();
    assert_eq!(ledger::read(&path).unwrap().entries.len(), 3);
    ledger::mend(&folder.path().join("none")).unwrap();
    fs::write(&path, format!("nonsense\n{text}")).unwrap();
    let error = format!("{:#}", ledger::read(&path).unwrap_err());
    assert!(error.contains("study.jsonl, line 1"), "{error}");
}

/// A line may be cut off by a kill, in the middle or just before its end, and another study may write the next one.
#[test]
fn a_line_that_was_cut_off_spoils_no_other() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("study.jsonl");
    let [first, second] = [entry("dino", "SER", 0, 70.0), entry("dino", "SER", 1, 71.0)];
    let line = serde_json::to_string(&first).unwrap();
    fs::write(&path, format!("{line}\n{}", &line[..line.len() / 2])).unwrap();
    ledger::append(&path, &second).unwrap();
    assert_eq!(ledger::read(&path).unwrap().entries, [first.clone(), second.clone()]);
    // A whole line without its end is a finished run.
    fs::write(&path, &line).unwrap();
    ledger::mend(&path).unwrap();
    assert_eq!(ledger::read(&path).unwrap().entries, std::slice::from_ref(&first));
    fs::write(&path, &line).unwrap();
    ledger::append(&path, &second).unwrap();
    assert_eq!(ledger::read(&path).unwrap().entries, [first, second]);
}

#[test]
fn several_studies_write_one_ledger() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("study.jsonl");
    let all: Vec<Entry> = (0..120).map(|seed| entry("dino", "SER", seed, 70.0)).collect();
    std::thread::scope(|scope| {
        for part in all.chunks(30) {
            let path = &path;
            scope.spawn(move || {
                for entry in part {
                    ledger::mend(path).unwrap();
                    ledger::append(path, entry).unwrap();
                }
            });
        }
    });
    let mut entries = ledger::read(&path).unwrap().entries;
    entries.sort_by_key(|e| e.seed);
    assert_eq!(entries, all);
    // A run belongs to one study at a time.
    let run = folder.path().join("run");
    let claim = ledger::claim(&run).unwrap();
    assert!(claim.is_some() && ledger::claim(&run).unwrap().is_none());
    drop(claim);
    assert!(ledger::claim(&run).unwrap().is_some());
}

/// Five runs stay five runs, however often their lines are in the ledger.
#[test]
fn a_run_counts_once() {
    let runs: Vec<Entry> =
        (0..5).map(|seed| entry("moco_v3", "SER", seed, 70.0 + seed as f64)).collect();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("study.jsonl");
    for run in runs.iter().chain(&runs) {
        ledger::append(&path, run).unwrap();
    }
    let read = ledger::read(&path).unwrap();
    assert_eq!(read.entries, runs);
    assert_eq!(read.notes.len(), 1);
    for part in ["5 entries repeat an earlier one", "moco_v3-SER-0", "moco_v3-SER-4"] {
        assert!(read.notes[0].contains(part), "{:?}", read.notes);
    }
    // Nor do callers with entries of their own.
    let twice = [runs.clone(), runs.clone()].concat();
    assert_eq!(summary::markdown(&twice), summary::markdown(&runs));
    assert!(summary::markdown(&twice).contains("| moco_v3 | SER | 5 | 72.0 ± 2.0 |"));
    assert_eq!(summary::html(&twice).unwrap(), summary::html(&runs).unwrap());
    // Of two results of one run the later one counts, under its old id or another.
    for id in ["moco_v3-SER-2", "renamed"] {
        let later = Entry { id: id.to_string(), seconds: 9.0, ..runs[2].clone() };
        let later = Entry { figures: entry("", "", 0, 90.0).figures, ..later };
        let distinct = ledger::distinct(&[&runs[..], std::slice::from_ref(&later)].concat());
        assert_eq!(distinct.entries.len(), 5);
        assert_eq!(distinct.entries[2], later);
        let note = &distinct.notes[0];
        assert!(note.contains("the later one counts") && note.contains(id), "{note}");
    }
    // Runs of another length, or another variant, are other runs.
    let longer = Entry { id: "longer".to_string(), epochs: 4, ..runs[0].clone() };
    assert_eq!(ledger::distinct(&[runs[0].clone(), longer]).notes, [""; 0]);
}

#[test]
fn runs_have_names_of_their_own() {
    let cells = plan::cells();
    let ids: Vec<String> =
        cells.iter().flat_map(|cell| (0..cell.seeds).map(move |seed| cell.id(seed, 3))).collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
    assert!(ids.iter().all(|id| !id.contains(['/', ' '])));
    let seeds = |group: &str, method: &str| -> Vec<u64> {
        let of = |c: &&plan::Cell| c.group == group && c.method.name() == method;
        cells.iter().filter(of).map(|c| c.seeds).collect()
    };
    assert_eq!(seeds("methods", "moco_v3"), [5, 5, 5]);
    assert_eq!(seeds("methods", "dino"), [3, 3, 3]);
    assert_eq!(seeds("methods", "barlow_twins"), [3, 3, 3]);
    for group in plan::SWEEPS {
        assert!(!seeds(group, "moco_v3").is_empty(), "{group}");
        assert!(seeds(group, "moco_v3").iter().all(|&n| n >= 3), "{group}");
    }
    // What a sweep is paired with is run, with as many seeds.
    for cell in cells.iter().filter(|c| c.group != "methods") {
        let reference = plan::reference(cell.group);
        let of = |c: &&plan::Cell| c.method == cell.method && c.variant == reference;
        let found = cells.iter().find(of);
        assert!(found.is_some_and(|r| r.seeds >= cell.seeds), "{}", cell.variant);
    }
}

#[test]
fn sweeps_are_paired_with_what_they_depart_from() {
    let mut entries = Vec::new();
    for seed in 0..2 {
        let noise = 10.0 * seed as f64;
        entries.push(entry("moco_v3", "SER", seed, 70.0 + noise));
        entries.push(entry("moco_v3", "λ=3", seed, 71.5 + noise));
        entries.push(entry("moco_v3", "D4 and scales, nearest", seed, 60.0 + noise));
        let bicubic = entry("moco_v3", "D4 and scales, bicubic", seed, 62.0 + noise);
        entries.push(bicubic);
    }
    let text = summary::markdown(&entries);
    assert!(text.contains("| moco_v3 | λ=3 − SER | 2 | **+1.5 ± 0.0** |"));
    let nearest =
        "| moco_v3 | D4 and scales, nearest − D4 and scales, bicubic | 2 | **-2.0 ± 0.0** |";
    assert!(text.contains(nearest));
    // Of sweeps without runs there is nothing to say.
    assert!(!text.contains("## Sweep: layer"));
}

#[test]
fn add_ons_are_compared_between_layers() {
    let mut entries = Vec::new();
    for seed in 0..3 {
        let noise = seed as f64;
        entries.push(entry("moco_v3", "baseline", seed, 70.0 + noise));
        entries.push(entry("moco_v3", "EquiMod final", seed, 69.0 + noise));
        entries.push(entry("moco_v3", "EquiMod layer 1", seed, 69.5 + noise));
    }
    let text = summary::markdown(&entries);
    for row in [
        "| moco_v3 | EquiMod layer 1 − baseline | 3 | **-0.5 ± 0.0** |",
        "| moco_v3 | EquiMod layer 1 − EquiMod final | 3 | **+0.5 ± 0.0** |",
        "| +0.56 | +0.5 ± 0.0 | 3 | confirmed |",
        "| +0.68 | – | 0 | not run |",
    ] {
        assert!(text.contains(row), "{row} in {text}");
    }
}

/// The names under which runs stand in the ledger are those of the plan: a finished run is not run again.
#[test]
fn finished_runs_are_known_by_the_plan() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/results/study.jsonl");
    let done = ledger::read(path.as_ref()).unwrap().entries;
    assert!(done.len() >= 84, "{}", done.len());
    let cells = plan::cells();
    for entry in done {
        let cell = cells
            .iter()
            .find(|c| entry.seed < c.seeds && c.id(entry.seed, entry.epochs) == entry.id);
        let cell = cell.unwrap_or_else(|| panic!("{} is not planned", entry.id));
        // The kept runs were made with 0.1, which had other words for two groups.
        let words = entry.options.iter().map(|word| match word.as_str() {
            "rotations" => "c4",
            "none" => "trivial",
            word => word,
        });
        assert!(words.eq(cell.options.iter().map(String::as_str)), "{}", entry.id);
        assert_eq!(cell.group, entry.group, "{}", entry.id);
    }
}

#[test]
fn verdicts_follow_from_intervals() {
    let mut entries = Vec::new();
    for seed in 0..3 {
        let noise = seed as f64;
        entries.push(entry("moco_v3", "baseline", seed, 70.0 + noise));
        // Paired, this difference is clear; unpaired it would drown.
        entries.push(entry("moco_v3", "SER", seed, 71.0 + noise + 0.01 * noise));
        entries.push(entry("moco_v3", "λ=0", seed, 69.0 + noise + 0.01 * noise));
    }
    let text = summary::markdown(&entries);
    let row = |claim: &str| {
        let row = text.lines().find(|l| l.contains(claim));
        row.unwrap_or_else(|| panic!("{claim} in {text}")).to_string()
    };
    assert!(row("SER over the baseline, upright").ends_with("| confirmed |"));
    assert!(row("delayed CLS alone").ends_with("| not confirmed: the opposite |"));
    assert!(row("DINO: SER over").ends_with("| not run |"));
    // Rows come in the order of the plan, whatever finished first.
    let at = |part: &str| text.find(part).unwrap();
    assert!(at("| moco_v3 | baseline |") < at("| moco_v3 | λ=0 |"));
    assert!(at("| moco_v3 | λ=0 |") < at("| moco_v3 | SER |"));
    assert!(summary::html(&entries).unwrap().contains("<svg"));
    assert!(!summary::markdown(&[]).is_empty());
}
