//! CIFAR-10 in its binary version: records of one label byte and 3 x 32 x 32 pixels.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

use super::images::Images;

const SIDE: usize = 32;
const PIXELS: usize = 3 * SIDE * SIDE;
const CLASSES: u8 = 10;

/// `data_batch_1.bin`; other files with this suffix may be anything.
pub fn is_batch(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().as_encoded_bytes();
    path.extension().is_some_and(|e| e == "bin") && stem.windows(5).any(|w| w == b"batch")
}

pub fn read(path: &Path) -> Result<Images> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let hint = if bytes.len() % (PIXELS + 2) == 0 {
        " (a multiple of 2 + 3072, as in CIFAR-100, whose two labels per image are not read here)"
    } else {
        ""
    };
    ensure!(
        !bytes.is_empty() && bytes.len() % (PIXELS + 1) == 0,
        "{}: truncated or unknown label layout: expected CIFAR-10 records of 1 + 3072 bytes, got {} bytes{hint}",
        path.display(),
        bytes.len()
    );
    let mut images = Images { channels: 3, side: SIDE, ..Default::default() };
    for (i, record) in bytes.chunks_exact(PIXELS + 1).enumerate() {
        ensure!(
            record[0] < CLASSES,
            "{}: unknown label layout: expected labels 0 to 9, got {} in record {i}",
            path.display(),
            record[0]
        );
        images.labels.push(u32::from(record[0]));
        images.pixels.extend_from_slice(&record[1..]);
    }
    Ok(images)
}
