//! `metrics.jsonl`: written line by line, and cut back to the checkpoint when a run is resumed.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::file;
use crate::records::Record;

pub struct Log {
    path: PathBuf,
    file: Option<File>,
    records: Vec<Record>,
}

impl Log {
    /// Of the run in `folder`; nothing is touched yet.
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join("metrics.jsonl"), file: None, records: Vec::new() }
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Starts an empty file.
    pub fn begin(&mut self) -> Result<()> {
        self.rewrite(Vec::new())
    }

    /// What the first `step` steps have written: a run that was killed has written more than its checkpoint knows. Nothing is
    /// touched yet.
    ///
    /// # Errors
    /// If records of these steps are missing.
    pub fn before(&self, step: usize) -> Result<Vec<Record>> {
        let mut records = match file::exists(&self.path)? {
            true => read(&self.path)?,
            false => Vec::new(),
        };
        records.retain(|record| match record {
            Record::Step(s) => s.step < step,
            Record::Epoch(e) => e.step <= step,
            Record::Balance(b) => b.step < step,
        });
        let steps = records.iter().filter_map(|record| match record {
            Record::Step(s) => Some(s.step),
            _ => None,
        });
        let whole = steps.clone().eq(0..step);
        ensure!(
            whole,
            "--resume: expected records of the {step} steps before the checkpoint in {}, got {}; put the file back, give \
             another --out, or leave out --resume to replace the run",
            self.path.display(),
            steps.count()
        );
        Ok(records)
    }

    /// Goes on after these records.
    pub fn resume(&mut self, records: Vec<Record>) -> Result<()> {
        self.rewrite(records)
    }

    /// Returns when all records are on the disk. A checkpoint must not be there without them.
    pub fn sync(&self) -> Result<()> {
        let file = self.file.as_ref().context("the run was not begun")?;
        file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }

    pub fn write(&mut self, record: Record) -> Result<()> {
        let mut line = serde_json::to_string(&record)?;
        line.push('\n');
        let file = self.file.as_mut().context("the run was not begun")?;
        file.write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.records.push(record);
        Ok(())
    }

    fn rewrite(&mut self, records: Vec<Record>) -> Result<()> {
        let mut text = String::new();
        for record in &records {
            text += &serde_json::to_string(record)?;
            text.push('\n');
        }
        file::write(&self.path, text.as_bytes())?;
        self.file = Some(OpenOptions::new().append(true).open(&self.path)?);
        self.records = records;
        Ok(())
    }
}

/// The records of a file. A last line that was cut off is left out: whoever wrote it was killed.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = String::from_utf8(file::read(path)?)
        .with_context(|| format!("{} is no text", path.display()))?;
    let mut lines = text.split_inclusive('\n').peekable();
    let mut records = Vec::new();
    while let Some(line) = lines.next() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(_) if lines.peek().is_none() && !line.ends_with('\n') => {}
            Err(e) => {
                let place = records.len() + 1;
                return Err(e).with_context(|| format!("{}, line {place}", path.display()));
            }
        }
    }
    Ok(records)
}
