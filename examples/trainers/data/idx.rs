//! IDX files (MNIST and its relatives), plain or gzipped.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;

use super::images::Images;

/// Unsigned bytes in three dimensions: images, rows, columns.
const IMAGES: u32 = 0x0803;
/// Unsigned bytes in one dimension: one label per image.
const LABELS: u32 = 0x0801;

pub fn is_images(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.windows(4).any(|w| w == b"idx3")
}

/// The images of `path`, and the labels of the file named alike.
pub fn read(path: &Path) -> Result<Images> {
    let (dims, pixels) =
        parse(path, IMAGES, "images").with_context(|| path.display().to_string())?;
    let (count, rows, cols) = (dims[0], dims[1], dims[2]);
    ensure!(
        rows == cols && rows > 0,
        "{}: expected square images, since quarter turns must keep their shape, got {rows}x{cols}",
        path.display()
    );
    let labels_path = labels_of(path)?;
    let (label_dims, labels) =
        parse(&labels_path, LABELS, "labels").with_context(|| labels_path.display().to_string())?;
    ensure!(
        label_dims[0] == count,
        "{}: expected {count} labels, one for each image, got {}",
        labels_path.display(),
        label_dims[0]
    );
    Ok(Images {
        pixels,
        labels: labels.into_iter().map(u32::from).collect(),
        channels: 1,
        side: rows,
    })
}

/// `x-images-idx3-ubyte[.gz]` has its labels in `x-labels-idx1-ubyte`, gzipped or not.
fn labels_of(images: &Path) -> Result<PathBuf> {
    let name = images.file_name().unwrap_or_default();
    // Bytes, because a name may be no text.
    let replaced = |name: &[u8], old: &str, new: &str| -> Vec<u8> {
        let at = name.windows(old.len()).position(|w| w == old.as_bytes());
        at.map_or(name.to_vec(), |at| {
            [&name[..at], new.as_bytes(), &name[at + old.len()..]].concat()
        })
    };
    let labels = replaced(name.as_encoded_bytes(), "images", "labels");
    let labels = replaced(&labels, "idx3", "idx1");
    ensure!(
        labels != name.as_encoded_bytes(),
        "{}: expected a file named like t10k-images-idx3-ubyte, whose labels are in t10k-labels-idx1-ubyte",
        images.display()
    );
    let stem = labels.strip_suffix(b".gz").unwrap_or(&labels);
    let folder = images.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut found = Vec::new();
    for entry in folder.read_dir().context("cannot list the folder")? {
        let path = entry.context("cannot list the folder")?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if path.is_file() && name.strip_suffix(b".gz").unwrap_or(name) == stem {
            found.push(path);
        }
    }
    // The plain one first.
    found.sort();
    found.into_iter().next().with_context(|| {
        let stem = stem.escape_ascii();
        format!(
            "{}: expected its labels beside it in {stem} or {stem}.gz, found neither",
            images.display()
        )
    })
}

/// The dimensions and the bytes of an IDX file that must carry `magic`.
fn parse(path: &Path, magic: u32, what: &str) -> Result<(Vec<usize>, Vec<u8>)> {
    let bytes = unzip(fs::read(path).context("cannot read the file")?)?;
    let word = |i: usize| -> Result<u32> {
        let word = bytes.get(4 * i..4 * i + 4).and_then(|w| w.try_into().ok());
        let word = word.with_context(|| {
            format!("truncated: expected an IDX header, got {} bytes", bytes.len())
        })?;
        Ok(u32::from_be_bytes(word))
    };
    let got = word(0)?;
    ensure!(
        got == magic,
        "unknown layout of {what}: expected IDX magic 0x{magic:08x} (unsigned bytes, {} dimensions), got 0x{got:08x}",
        magic & 0xff
    );
    let rank = (magic & 0xff) as usize;
    let mut dims = Vec::with_capacity(rank);
    for axis in 1..=rank {
        dims.push(word(axis)? as usize);
    }
    let body = &bytes[4 * (rank + 1)..];
    let expected = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    ensure!(
        expected == Some(body.len()),
        "truncated or damaged: the header promises {dims:?} {what}, expected {} bytes after it, got {}",
        expected.map_or("too many".to_string(), |n| n.to_string()),
        body.len()
    );
    Ok((dims, body.to_vec()))
}

fn unzip(bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    GzDecoder::new(bytes.as_slice())
        .read_to_end(&mut plain)
        .context("truncated or damaged gzip data")?;
    Ok(plain)
}
