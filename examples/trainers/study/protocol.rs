//! The protocol that the runs follow, and its hash in each record.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, ensure};

use super::ledger::Entry;

/// The text that this program was compiled with.
pub const TEXT: &str = include_str!("../../../docs/study/protocol.md");

/// The CRC-32 of [`TEXT`], without carriage returns, which a checkout may add.
pub fn hash() -> String {
    let text = TEXT.replace('\r', "");
    format!("{:08x}", crc32fast::hash(text.as_bytes()))
}

/// Refuses records of more than one protocol; gives the hash of those there are. Records of the first study have none.
pub fn of_all(entries: &[Entry], ledger: &Path) -> Result<Option<String>> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for entry in entries {
        *counts.entry(entry.protocol.as_deref().unwrap_or("none")).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(hash, n)| format!("{n} of {hash}")).collect();
    ensure!(
        counts.len() < 2,
        "--ledger: expected records of one protocol in {}, got {}; records of several protocols are not compared",
        ledger.display(),
        counts.join(" and ")
    );
    Ok(entries.first().and_then(|entry| entry.protocol.clone()))
}

/// Refuses a ledger with records of another protocol than this program's.
pub fn check(entries: &[Entry], ledger: &Path) -> Result<()> {
    let other = entries.iter().find(|entry| entry.protocol.as_ref() != Some(&hash()));
    ensure!(
        other.is_none(),
        "--ledger: expected records of the protocol {} in {}, got one of {} ({}); another protocol starts another ledger",
        hash(),
        ledger.display(),
        other.and_then(|e| e.protocol.as_deref()).unwrap_or("none"),
        other.map_or("", |e| &e.id)
    );
    Ok(())
}

/// A sentence on how many records follow the protocol of this program.
pub fn note(entries: &[Entry]) -> String {
    let own = entries.iter().filter(|entry| entry.protocol.as_ref() == Some(&hash())).count();
    format!(
        "{own} of {} records have the hash {} of docs/study/protocol.md.",
        entries.len(),
        hash()
    )
}
