//! Finished runs as JSON lines: what is there is not run again.
//!
//! Several studies may share a ledger. Each change of the file happens under a lock on it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::encoder::Network;

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub id: String,
    pub group: String,
    /// The set of images; `None` in lines of the first study, which had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// CRC-32 of the list of its images, where the study chose them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<String>,
    pub method: String,
    pub variant: String,
    pub seed: u64,
    pub epochs: usize,
    pub options: Vec<String>,
    /// Measurements by name.
    pub figures: BTreeMap<String, f64>,
    /// Training and evaluation, without pauses.
    pub seconds: f64,
    /// Seconds of pauses, which the trainer's own times contain.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub paused: f64,
    /// Threads that it had.
    pub threads: usize,
    pub commit: String,
    pub machine: String,
    /// Which network was measured; `None` in lines of older versions, which measured the student of DINO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// The hash of the protocol; `None` in lines of the first study.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
}

fn is_zero(seconds: &f64) -> bool {
    *seconds == 0.0
}

impl Entry {
    /// Whether both are results of one run: they have one id, or one seed of one variant of a group.
    fn is_of_the_run_of(&self, other: &Self) -> bool {
        let run = |e: &Self| (e.seed, e.epochs);
        let set = |e: &Self| e.data.clone();
        let cell = |e: &Self| [e.group.clone(), e.method.clone(), e.variant.clone()];
        self.id == other.id
            || run(self) == run(other) && set(self) == set(other) && cell(self) == cell(other)
    }
}

/// The runs of a ledger, one entry each, and a sentence on each thing that a reader must know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    pub entries: Vec<Entry>,
    pub notes: Vec<String>,
}

/// Reads a ledger; it is empty if there is no file. A last line that was cut off is left out.
///
/// # Errors
/// If the file cannot be read, or another line is no entry.
pub fn read(path: &Path) -> Result<Ledger> {
    if !path.exists() {
        return Ok(Ledger::default());
    }
    let shown = path.display();
    let cannot = || format!("cannot read {shown}");
    let mut file = File::open(path).with_context(cannot)?;
    file.lock_shared().with_context(cannot)?;
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(cannot)?;
    let (mut entries, mut cut) = (Vec::new(), None);
    let mut lines = text.split_inclusive('\n').enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        match serde_json::from_str(line) {
            Ok(entry) => entries.push(entry),
            Err(_) if lines.peek().is_none() && !line.ends_with('\n') => {
                cut = Some(format!("{shown}: line {} was cut off and does not count.", i + 1));
            }
            Err(e) => return Err(e).with_context(|| format!("{shown}, line {}", i + 1)),
        }
    }
    let mut ledger = distinct(&entries);
    ledger.notes.extend(cut);
    Ok(ledger)
}

/// One entry for each run, so that no result counts twice. Of several entries of one run the last counts.
pub fn distinct(entries: &[Entry]) -> Ledger {
    let mut ledger = Ledger::default();
    let (mut same, mut other) = (Vec::new(), Vec::new());
    for entry in entries {
        let earlier = ledger.entries.iter_mut().find(|known| known.is_of_the_run_of(entry));
        match earlier {
            None => ledger.entries.push(entry.clone()),
            Some(known) if known == entry => same.push(entry.id.as_str()),
            Some(known) => {
                other.push(entry.id.as_str());
                *known = entry.clone();
            }
        }
    }
    let mut note = |ids: Vec<&str>, what: &str| {
        if !ids.is_empty() {
            ledger.notes.push(format!("{} {what}: {}.", ids.len(), ids.join(", ")));
        }
    };
    note(same, "entries repeat an earlier one and count once");
    note(other, "entries differ from an earlier one of the same run, and the later one counts");
    ledger
}

/// Repairs a last line that was cut off; gives a sentence on what was done.
pub fn mend(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    let cannot = || format!("cannot mend {}", path.display());
    let mut file = locked(path).with_context(cannot)?;
    repair(&mut file, path).with_context(cannot)
}

/// Adds a line.
pub fn append(path: &Path, entry: &Entry) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(cannot)?;
    }
    let line = serde_json::to_string(entry)? + "\n";
    let mut file = locked(path).with_context(cannot)?;
    // Another study may have been killed in the middle of a line.
    repair(&mut file, path).with_context(cannot)?;
    file.seek(SeekFrom::End(0)).with_context(cannot)?;
    file.write_all(line.as_bytes()).with_context(cannot)
}

/// The file, which is made if there is none, for this process alone until it is closed.
fn locked(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    file.lock()?;
    Ok(file)
}

/// Ends a last line that is whole but for its end, and takes away one that is not.
fn repair(file: &mut File, path: &Path) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    let rest = &bytes[whole..];
    if rest.is_empty() {
        return Ok(None);
    }
    if serde_json::from_slice::<Entry>(rest).is_ok() {
        file.write_all(b"\n")?;
        return Ok(None);
    }
    file.set_len(whole as u64)?;
    let begin: String = String::from_utf8_lossy(rest).chars().take(60).collect();
    let shown = path.display();
    Ok(Some(format!("{shown}: the last line was cut off and is removed. It began with: {begin}")))
}

/// Takes `folder`, that of a run, for this study, until the file is closed; `None` if another study has it.
pub fn claim(folder: &Path) -> Result<Option<File>> {
    let cannot = || format!("cannot lock {}", folder.display());
    fs::create_dir_all(folder).with_context(cannot)?;
    let file = File::create(folder.join("study.lock")).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(e)) => Err(e).with_context(cannot),
    }
}
