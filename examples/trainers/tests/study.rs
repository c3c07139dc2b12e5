//! The study's arithmetic and ledger, and the tables of the first study.

use std::{fs, path::Path};

use ser_reg_trainers::study::{
    first,
    ledger::{self, Entry, Ledger},
    protocol,
    statistics::{Mean, Verdict, holm, quantile},
};
use tempfile::TempDir;

fn entry(method: &str, variant: &str, seed: u64, probe: f64) -> Entry {
    Entry {
        id: format!("{method}-{variant}-{seed}"),
        group: "methods".to_string(),
        data: None,
        images: None,
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
        paused: 0.0,
        threads: 1,
        commit: "none".to_string(),
        machine: "none".to_string(),
        network: None,
        protocol: None,
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
    assert!(Mean::of(&vec![1.0; 100]).unwrap().half_width.unwrap() == 0.0);
}

/// Printed tables have 12.706, 2.776, 2.365 and 1.984 at 97.5 %, and 2.132 at 95 %.
#[test]
fn quantiles_are_those_of_printed_tables() {
    for (p, degrees, expected) in [
        (0.975, 1, 12.706),
        (0.975, 4, 2.776),
        (0.975, 7, 2.365),
        (0.975, 100, 1.984),
        (0.95, 4, 2.132),
        (0.025, 4, -2.776),
    ] {
        let found = quantile(p, degrees).unwrap();
        assert!((found - expected).abs() < 5e-4, "{p} {degrees}: {found}");
    }
    assert_eq!(quantile(0.975, 0), None);
}

/// Closed forms of Student's distribution: of 1 degree an arctangent, of 2 and 4 degrees roots.
#[test]
fn p_values_are_those_of_the_paired_t_test() {
    let p = |values: &[f64]| Mean::of(values).unwrap().p_value().unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
    // Mean 2, error 1: t = 2 with 1 degree.
    near(p(&[1.0, 3.0]), 1.0 - 2.0 / std::f64::consts::PI * 2f64.atan());
    // Mean 2, error 1/√3: t² = 12 with 2 degrees, and p = 1 − t/√(2 + t²).
    near(p(&[1.0, 2.0, 3.0]), 1.0 - (12f64 / 14.0).sqrt());
    // Mean 3, error √½: t² = 18 with 4 degrees. With s = t²/(4 + t²), p = 1 − √s·(3 − s)/2.
    let s = 18f64 / 22.0;
    near(p(&[1.0, 2.0, 3.0, 4.0, 5.0]), 1.0 - s.sqrt() * (3.0 - s) / 2.0);
    // The sign does not matter, and no spread is no doubt.
    near(p(&[-1.0, -2.0, -3.0]), p(&[1.0, 2.0, 3.0]));
    assert_eq!((p(&[2.0, 2.0]), p(&[0.0, 0.0])), (0.0, 1.0));
    assert_eq!(Mean::of(&[1.0]).unwrap().p_value(), None);
}

/// By hand: sorted .005·4, .01·3, .03·2, and .04·1, which stays at the .06 before it.
#[test]
fn holm_corrects_step_by_step() {
    let near = |found: Vec<f64>, expected: &[f64]| {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{found:?}"));
    };
    near(holm(&[0.01, 0.04, 0.03, 0.005]), &[0.03, 0.06, 0.06, 0.02]);
    near(holm(&[0.6, 0.7]), &[1.0, 1.0]);
    near(holm(&[0.02]), &[0.02]);
    near(holm(&[0.02, 0.02]), &[0.04, 0.04]);
    near(holm(&[]), &[]);
}

#[test]
fn non_inferiority_is_read_off_the_interval() {
    let verdict = |values: &[f64]| Verdict::of(&Mean::of(values).unwrap(), 1.0);
    // Mean −0.2, half width 4.303·0.1/√3 = 0.25: a small loss, and clearly less than a point.
    assert_eq!(verdict(&[-0.1, -0.2, -0.3]), Verdict::NonInferior);
    // The lower end is −1.05 with mean −0.8, and −0.95 with mean −0.7.
    assert_eq!(verdict(&[-0.7, -0.8, -0.9]), Verdict::NotShown);
    assert_eq!(verdict(&[-0.6, -0.7, -0.8]), Verdict::NonInferior);
    // The upper end is −1.05 with mean −1.3.
    assert_eq!(verdict(&[-1.2, -1.3, -1.4]), Verdict::Worse);
    assert_eq!(verdict(&[-1.1, -1.2, -1.3]), Verdict::NotShown);
    assert_eq!(verdict(&[5.0]), Verdict::NotShown);
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
    assert_eq!(first::markdown(&twice), first::markdown(&runs));
    assert!(first::markdown(&twice).contains("| moco_v3 | SER | 5 | 72.0 ± 2.0 |"));
    assert_eq!(first::html(&twice).unwrap(), first::html(&runs).unwrap());
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
    let text = first::markdown(&entries);
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
    let text = first::markdown(&entries);
    for row in [
        "| moco_v3 | EquiMod layer 1 − baseline | 3 | **-0.5 ± 0.0** |",
        "| moco_v3 | EquiMod layer 1 − EquiMod final | 3 | **+0.5 ± 0.0** |",
        "| +0.56 | +0.5 ± 0.0 | 3 | confirmed |",
        "| +0.68 | – | 0 | not run |",
    ] {
        assert!(text.contains(row), "{row} in {text}");
    }
}

/// The first study's runs are all in its tables, and stand under no protocol.
#[test]
fn the_first_study_is_still_read() {
    let path: &Path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/results/study.jsonl").as_ref();
    let entries = ledger::read(path).unwrap().entries;
    assert_eq!(entries.len(), 96);
    assert_eq!(protocol::of_all(&entries, path).unwrap(), None);
    assert!(protocol::note(&entries).starts_with("0 of 96 records"));
    let text = first::markdown(&entries);
    for entry in &entries {
        let row = format!("| {} | {} |", entry.method, entry.variant);
        assert!(text.contains(&row), "{row}");
    }
    assert!(text.contains("| moco_v3 | SER | 5 | 75.7 ± 1.6 | 72.0 ± 1.4 | 33.1 ± 3.6 |"));
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
    let text = first::markdown(&entries);
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
    assert!(first::html(&entries).unwrap().contains("<svg"));
    assert!(!first::markdown(&[]).is_empty());
}
