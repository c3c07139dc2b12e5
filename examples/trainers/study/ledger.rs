//! Finished runs as JSON lines: what is there is not run again.

use std::{collections::BTreeMap, fs::OpenOptions, io::Write, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::encoder::Network;

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub id: String,
    pub group: String,
    pub method: String,
    pub variant: String,
    pub seed: u64,
    pub epochs: usize,
    pub options: Vec<String>,
    /// Measurements by name.
    pub figures: BTreeMap<String, f64>,
    /// Training and evaluation.
    pub seconds: f64,
    /// Threads that it had.
    pub threads: usize,
    pub commit: String,
    pub machine: String,
    /// Which network was measured; `None` in lines of older versions, which measured the student of DINO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// The entries of a ledger; none if there is no file. A last line that was cut off is left out.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut entries = Vec::new();
    let mut lines = text.split_inclusive('\n').enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        match serde_json::from_str(line) {
            Ok(entry) => entries.push(entry),
            Err(_) if lines.peek().is_none() && !line.ends_with('\n') => {}
            Err(e) => return Err(e).with_context(|| format!("{}, line {}", path.display(), i + 1)),
        }
    }
    Ok(entries)
}

/// Takes away what is left of a line that was cut off, so that the next one begins on its own.
pub fn mend(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let cannot = || format!("cannot mend {}", path.display());
    let bytes = std::fs::read(path).with_context(cannot)?;
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    if whole < bytes.len() {
        let file = OpenOptions::new().write(true).open(path);
        file.and_then(|f| f.set_len(whole as u64)).with_context(cannot)?;
    }
    Ok(())
}

/// Adds a line.
pub fn append(path: &Path, entry: &Entry) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(cannot)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path).with_context(cannot)?;
    // One write, so that a line is there whole or cut off at the end.
    let line = serde_json::to_string(entry)? + "\n";
    file.write_all(line.as_bytes()).with_context(cannot)
}
