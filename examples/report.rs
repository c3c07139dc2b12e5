//! Pages of finished and unfinished runs: one run, or several side by side.
//!
//! ```text
//! cargo run --release --example report -- runs/a                             # rebuilds runs/a/report.html
//! cargo run --release --example report -- --compare runs/a runs/b runs/c     # one page of all, compare.html
//! ```

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use ser_reg_trainers::{
    environment, println,
    report::{compare::Comparison, folder::Folder},
    run::file,
};

#[derive(Debug, Parser)]
struct Args {
    /// Folders of runs.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Put all runs on one page.
    #[arg(long)]
    compare: bool,
    /// The page to write [default: report.html in the run's folder; with --compare, compare.html].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    environment::prepare();
    let args = Args::parse();
    ensure!(
        args.compare || args.runs.len() == 1,
        "expected one run, or --compare, got {} runs",
        args.runs.len()
    );
    let page = match (args.out, args.compare) {
        (Some(page), _) => page,
        (None, true) => PathBuf::from("compare.html"),
        (None, false) => args.runs[0].join("report.html"),
    };
    let html = match args.compare {
        true => {
            file::check_writable(&page, "--out")?;
            let comparison = Comparison::read(&args.runs)?;
            println!("{}", comparison.table().text());
            for note in &comparison.notes {
                println!("{note}");
            }
            comparison.html()?
        }
        false => {
            let run = Folder::read(&args.runs[0])?;
            file::check_writable(&page, "--out")?;
            let panel = run.data().and_then(|data| run.panel(&data.test, 4));
            let panel = match panel {
                Ok(panel) => Some(panel),
                Err(e) => {
                    println!("the page has no token maps: {e:#}");
                    None
                }
            };
            run.page(panel)?
        }
    };
    file::write(&page, html.as_bytes())?;
    println!("written to {}", page.display());
    Ok(())
}
