//! Runs every case of a directory of reference values (`tests/goldens`, or the one that
//! `SER_REG_GOLDENS` names) and prints how many. An unknown kind or op fails. The format is
//! described in `tests/goldens/README.md`.

mod runner;

mod geometry;

mod losses;

use std::path::PathBuf;

use runner::{Case, Golden};

/// The number of cases in `tests/goldens`, so that a lost file or case fails.
const CASES: usize = 323;

/// Runs one case, or says that its kind and op are not known here.
fn run(kind: &str, case: &Case) -> anyhow::Result<()> {
    match kind {
        "actions" => geometry::actions(case),
        "resample" => geometry::resample(case),
        "crops" => geometry::crops(case),
        "affine" => geometry::affine(case),
        "ser_views" => geometry::ser_views(case),
        "token_losses" => losses::token_losses(case),
        "ssl_losses" => losses::ssl_losses(case),
        "schedules" => losses::schedules(case),
        _ => anyhow::bail!("unknown kind {kind}"),
    }
}

fn main() {
    if std::env::args().any(|a| a == "--list") {
        return println!("goldens: test");
    }
    let dir = std::env::var_os("SER_REG_GOLDENS")
        .map(PathBuf::from)
        // The manifest is that of the trainers' package, which has the base losses.
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens"));
    let goldens = match Golden::read_all(&dir) {
        Ok(goldens) => goldens,
        Err(e) => {
            eprintln!("goldens: {e:#}");
            std::process::exit(1)
        }
    };
    let (mut passed, mut failed) = (0, 0);
    for golden in &goldens {
        let mut here = 0;
        for case in &golden.cases {
            match run(&golden.kind, case) {
                Ok(()) => here += 1,
                Err(e) => {
                    failed += 1;
                    println!("FAILED {}/{} ({}): {e:#}", golden.kind, case.name, case.op);
                }
            }
        }
        println!("goldens {:<13} {here} cases", golden.kind);
        passed += here;
    }
    println!("goldens: {} files of {}", goldens.len(), dir.display());
    println!("{passed} passed, {failed} failed");
    let own = std::env::var_os("SER_REG_GOLDENS").is_none();
    let complete = !own || passed + failed == CASES;
    if !complete {
        println!("expected {CASES} cases in the directory of the project");
    }
    if failed > 0 || passed == 0 || !complete {
        std::process::exit(1);
    }
}
