//! `metrics.jsonl`: written line by line, and cut back to the checkpoint when a run is resumed.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

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

    /// Keeps what belongs to the first `step` steps: a run that was killed has written more than its checkpoint knows.
    pub fn resume(&mut self, step: usize) -> Result<()> {
        let kept = match self.path.exists() {
            true => read(&self.path)?,
            false => Vec::new(),
        };
        let kept = kept.into_iter().filter(|record| match record {
            Record::Step(s) => s.step < step,
            Record::Epoch(e) => e.step <= step,
            Record::Balance(b) => b.step < step,
        });
        self.rewrite(kept.collect())
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
