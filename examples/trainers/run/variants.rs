//! What `--compare` adds to a run: the baseline and lambda = 0, trained with the same options, and a page of all three.

use std::{ffi::OsString, process::Command};

use anyhow::{Context, Result, bail, ensure};

use super::{Run, file, interrupt::STOPPED};
use crate::{
    cli::Args,
    report::{compare::Comparison, folder::Folder},
    settings::Settings,
};

/// The variants: their folders below the run's, and their options.
pub const VARIANTS: [(&str, &[&str]); 2] =
    [("lambda0", &["--lambda", "0"]), ("baseline", &["--baseline"])];

/// Whether `--compare` can train its variants with these options.
pub fn check(settings: &Settings, args: &Args) -> Result<()> {
    if !args.compare {
        return Ok(());
    }
    let mode = settings.mode();
    ensure!(
        mode == "ser",
        "--compare: expected a SER run, without --baseline and with lambda above 0, got mode {mode}"
    );
    let lambda0 = Args { lambda: Some(0.0), ..args.clone() };
    let baseline = Args { baseline: true, ..args.clone() };
    for (variant, (name, _)) in [lambda0, baseline].iter().zip(VARIANTS) {
        Settings::new(settings.method, variant)
            .with_context(|| format!("--compare: these options do not fit the variant {name}"))?;
    }
    Ok(())
}

impl Run {
    /// Trains the baseline and lambda = 0 by this program with the same options, each in a folder of its own below the run's.
    pub(super) fn train_variants(&self) -> Result<()> {
        let program = std::env::current_exe()?;
        let left_out = |arg: &OsString| arg == "--compare" || arg == "--brief";
        let given = || std::env::args_os().skip(1).filter(|arg| !left_out(arg));
        for (name, options) in VARIANTS {
            let folder = self.folder.join(name);
            let stopped = || -> ! {
                println!(
                    "stopped before {name} was trained; the same command with --resume goes on"
                );
                std::process::exit(STOPPED)
            };
            if self.interrupt.asked() {
                stopped();
            }
            println!("\n--compare trains {name}");
            let child = Command::new(&program)
                .args(given())
                .args(options)
                .args(["--brief", "--out"])
                .arg(&folder)
                .spawn()
                .with_context(|| format!("cannot start {}", program.display()))?;
            let status = self.interrupt.wait(child)?;
            match status.code() {
                Some(0) => {}
                Some(STOPPED) => stopped(),
                _ => bail!("--compare: the run in {} failed, {status}", folder.display()),
            }
        }
        Ok(())
    }

    /// Writes the page of the comparison.
    pub(super) fn write_comparison(&self) -> Result<()> {
        let names = VARIANTS.map(|(name, _)| self.folder.join(name));
        let folders = [&names[1], &names[0], &self.folder];
        let mut runs =
            folders.map(|folder| Folder::read(folder)).into_iter().collect::<Result<Vec<_>>>()?;
        for run in &mut runs {
            run.name = run.settings.label();
        }
        let page = self.folder.join("compare.html");
        file::write(&page, Comparison::new(runs, Vec::new()).html()?.as_bytes())?;
        println!("comparison {}", page.display());
        Ok(())
    }
}
