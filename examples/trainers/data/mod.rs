//! Labelled images from disk: IDX files, CIFAR-10 binaries, or a folder of class sub-folders.

mod cifar;
mod fingerprint;
mod folder;
mod idx;
mod images;
mod picture;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};

use folder::Listing;

pub use fingerprint::Fingerprint;
pub use folder::Folder;
pub use images::Images;
pub use picture::{Interpolation, Picture, Shaper, Window};

/// A file, or a class, that was passed over, and why.
pub type Skipped = (PathBuf, String);

/// Training pictures: decoded, or to be decoded when they are needed.
#[derive(Clone, Debug)]
pub enum Source {
    Memory(Arc<Images>),
    Folder(Arc<Folder>),
}

impl Source {
    pub fn len(&self) -> usize {
        self.labels().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn labels(&self) -> &[u32] {
        match self {
            Source::Memory(images) => &images.labels,
            Source::Folder(folder) => &folder.labels,
        }
    }

    pub fn channels(&self) -> usize {
        match self {
            Source::Memory(images) => images.channels,
            Source::Folder(_) => 3,
        }
    }

    pub fn picture(&self, i: usize) -> Result<Picture<'_>> {
        Ok(match self {
            Source::Memory(images) => images.picture(i),
            Source::Folder(folder) => Picture::Rgb(picture::decode(&folder.files[i])?),
        })
    }

    /// Where image `i` comes from; images in memory have a number only.
    pub fn path(&self, i: usize) -> PathBuf {
        match self {
            Source::Memory(_) => format!("image {i}").into(),
            Source::Folder(folder) => folder.files[i].clone(),
        }
    }
}

/// A data set, and how it was divided.
#[derive(Debug)]
pub struct Data {
    pub train: Source,
    /// Training images as they are, for evaluation.
    pub bank: Arc<Images>,
    pub test: Images,
    /// Names of the labels.
    pub classes: Vec<String>,
    /// One sentence on where the division comes from, to stand beside every figure.
    pub note: String,
    pub skipped: Vec<Skipped>,
}

impl Data {
    /// The data with at most `train` and `test` images, at even distances.
    pub fn take(self, train: usize, test: usize) -> Self {
        let bank = Arc::new(self.bank.spread(train));
        Self {
            train: match &self.train {
                // Bank and training images stay one, unless the bank has another size.
                Source::Memory(images) if Arc::ptr_eq(images, &self.bank) => {
                    Source::Memory(bank.clone())
                }
                Source::Memory(images) => Source::Memory(Arc::new(images.spread(train))),
                Source::Folder(folder) => Source::Folder(Arc::new(folder.spread(train))),
            },
            bank,
            test: self.test.spread(test),
            ..self
        }
    }
}

/// What a trainer needs of the images.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Side of the images for evaluation; `None`: as they come, and 32 for a folder of images.
    pub side: Option<usize>,
    /// Images of a folder stay in their files until they are needed, instead of being decoded once at a small size.
    pub stream: bool,
    /// The most training images, and test images, of the evaluation.
    pub bank_limit: usize,
    pub test_limit: usize,
}

impl Default for Wanted {
    /// Everything in memory.
    fn default() -> Self {
        Self { side: None, stream: false, bank_limit: usize::MAX, test_limit: usize::MAX }
    }
}

impl Wanted {
    /// Images of `side`, which may be more than memory holds.
    pub fn streamed(side: usize) -> Self {
        Self { side: Some(side), stream: true, bank_limit: 5000, test_limit: 1000 }
    }
}

/// 10,000 images of Fashion-MNIST (its official test file) that come with the repository.
pub fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/fashion-mnist")
}

/// Reads `path`, whatever of the three layouts it holds.
pub fn load(path: &Path, wanted: &Wanted) -> Result<Data> {
    let checked = || {
        let data = read(path, wanted)?;
        let (train, test) = (data.train.len(), data.test.len());
        ensure!(
            train >= 2 && test >= 1 && !data.bank.is_empty(),
            "expected at least two training images and one test image, got {train} and {test}"
        );
        let labels = data.train.labels();
        ensure!(
            labels.iter().any(|l| *l != labels[0]),
            "expected at least two classes, got images of one"
        );
        Ok(data)
    };
    checked().with_context(|| format!("cannot read data from {}", path.display()))
}

fn read(path: &Path, wanted: &Wanted) -> Result<Data> {
    ensure!(
        path.exists(),
        "no such file or folder; the published crate leaves the images out, so run the example in a clone of the \
         repository, or give --data a folder of IDX files, of CIFAR-10 binaries, or of class sub-folders"
    );
    if path.is_file() {
        let is_bin = path.extension().is_some_and(|e| e == "bin");
        let images = if is_bin { cifar::read(path)? } else { idx::read(path)? };
        return in_memory(images.split_tail(), "the last fifth of the file", wanted);
    }
    let entries = sorted_entries(path)?;
    let named = |test: fn(&str) -> bool| -> Vec<PathBuf> {
        let matches = |p: &&PathBuf| test(&file_name(p));
        entries.iter().filter(matches).cloned().collect()
    };
    let mut idx_files = named(idx::is_images);
    // The same file may lie there plain and gzipped.
    let mut stems = HashSet::new();
    idx_files.retain(|p| stems.insert(file_name(p).trim_end_matches(".gz").to_string()));
    let cifar_files = named(cifar::is_batch);
    if !idx_files.is_empty() {
        let (parts, note) = read_parts(&idx_files, idx::read, |n| n.starts_with("t10k"), "t10k")?;
        return in_memory(parts, &note, wanted);
    }
    if !cifar_files.is_empty() {
        let (parts, note) = read_parts(&cifar_files, cifar::read, |n| n.contains("test"), "test")?;
        return in_memory(parts, &note, wanted);
    }
    if entries.iter().any(|p| p.is_dir()) {
        let listing = Listing::read(path)?;
        return match wanted.stream {
            true => streamed(listing, wanted),
            false => decoded(listing, wanted),
        };
    }
    bail!(
        "expected *-images-idx3-ubyte[.gz] with its labels, *_batch*.bin (CIFAR-10), or sub-folders of PNG or JPEG \
         files, one for each class; found none of these among {} files",
        entries.len()
    )
}

/// Several files: those `is_test` names are the test part; without both parts, all images are divided again, and the
/// second value says how.
fn read_parts(
    files: &[PathBuf],
    read: fn(&Path) -> Result<Images>,
    is_test: fn(&str) -> bool,
    test_name: &str,
) -> Result<((Images, Images), String)> {
    let (mut train, mut test) = (Images::default(), Images::default());
    for file in files {
        let part = match is_test(&file_name(file)) {
            true => &mut test,
            false => &mut train,
        };
        let images = read(file)?;
        part.append(images).with_context(|| file.display().to_string())?;
    }
    match (train.len(), test.len()) {
        (0, _) => {
            Ok((test.split_tail(), format!("the last fifth of the official {test_name} file")))
        }
        (_, 0) => Ok((train.split_tail(), "the last fifth of the files".into())),
        _ => {
            let (a, b) = ((train.channels, train.side), (test.channels, test.side));
            ensure!(
                a == b,
                "expected test images of (channels, side) {a:?} as in the training files, got {b:?}"
            );
            Ok(((train, test), OFFICIAL.into()))
        }
    }
}

const OFFICIAL: &str = "official split";

fn note(division: &str, train: usize, test: usize) -> String {
    match division {
        OFFICIAL => format!("{OFFICIAL}: {train} training and {test} test images"),
        _ => format!(
            "re-split: {train} images train, {test} test ({division}); not comparable with published accuracies"
        ),
    }
}

/// Files that hold all pictures: only evaluation may want them larger or fewer.
fn in_memory((train, test): (Images, Images), division: &str, wanted: &Wanted) -> Result<Data> {
    let note = note(division, train.len(), test.len());
    let labels = train.labels.iter().chain(&test.labels);
    let classes = labels.max().map_or(0, |&last| last + 1);
    let shown = |images: &Images, limit: usize| -> Result<Images> {
        let some = images.spread(limit);
        match wanted.side {
            Some(side) if side != some.side => some.scaled(side),
            _ => Ok(some),
        }
    };
    let as_it_is = wanted.bank_limit >= train.len() && wanted.side.is_none_or(|s| s == train.side);
    let train = Arc::new(train);
    Ok(Data {
        bank: match as_it_is {
            true => train.clone(),
            false => Arc::new(shown(&train, wanted.bank_limit)?),
        },
        train: Source::Memory(train),
        test: shown(&test, wanted.test_limit)?,
        classes: (0..classes).map(|c| c.to_string()).collect(),
        note,
        skipped: Vec::new(),
    })
}

/// Side of the images of a folder in memory.
const SIDE: usize = 32;
/// What evaluation sees of a large picture: 224 of 256 pixels of its shorter side.
const MIDDLE: f64 = 224.0 / 256.0;

/// A folder, all of it decoded; classes of which nothing can be read are left out.
fn decoded(listing: Listing, wanted: &Wanted) -> Result<Data> {
    let side = wanted.side.unwrap_or(SIDE);
    let mut skipped = listing.skipped;
    let mut decode = |part: &Folder, what| part.decode(side, 1.0, what, &mut skipped);
    let mut train = decode(&listing.train, "training")?;
    let mut test = decode(&listing.test, "test")?;
    ensure_some(&skipped, train.len(), listing.train.len())?;
    let mut classes = Vec::new();
    // The new label of each class, where it keeps one.
    let mut labels = Vec::new();
    for (label, class) in listing.classes.iter().enumerate() {
        let kept = train.labels.contains(&(label as u32));
        labels.push(kept.then_some(classes.len() as u32));
        match kept {
            true => classes.push(class.clone()),
            false => skipped.push((class.into(), "no training image of it can be read".into())),
        }
    }
    ensure!(
        classes.len() >= 2,
        "expected at least two classes whose images can be read, got {}; {}",
        classes.len(),
        named(&skipped)
    );
    train.relabel(&labels);
    test.relabel(&labels);
    let mut data = in_memory((train, test), division(listing.official), wanted)?;
    data.classes = classes;
    data.note += &count(&skipped);
    data.skipped = skipped;
    Ok(data)
}

/// A folder whose images are decoded when they are needed; those of the evaluation are, now.
fn streamed(listing: Listing, wanted: &Wanted) -> Result<Data> {
    let side = wanted.side.unwrap_or(SIDE);
    let note = note(division(listing.official), listing.train.len(), listing.test.len());
    let mut skipped = listing.skipped;
    let bank = listing.train.spread(wanted.bank_limit);
    let test = listing.test.spread(wanted.test_limit);
    let mut decode = |part: &Folder, what| part.decode(side, MIDDLE, what, &mut skipped);
    let bank_images = decode(&bank, "training")?;
    let test = decode(&test, "test")?;
    ensure_some(&skipped, bank_images.len(), bank.len())?;
    Ok(Data {
        note: format!(
            "{note}; evaluated with {} and {} of them{}",
            bank_images.len(),
            test.len(),
            count(&skipped)
        ),
        train: Source::Folder(Arc::new(listing.train)),
        bank: Arc::new(bank_images),
        test,
        classes: listing.classes,
        skipped,
    })
}

fn division(official: bool) -> &'static str {
    match official {
        true => OFFICIAL,
        false => "every fifth file of a class",
    }
}

fn ensure_some(skipped: &[Skipped], read: usize, files: usize) -> Result<()> {
    ensure!(read > 0, "none of {files} training images can be read; {}", named(skipped));
    Ok(())
}

/// The first few that were passed over.
fn named(skipped: &[Skipped]) -> String {
    let lines = skipped.iter().take(5);
    let lines: Vec<String> =
        lines.map(|(path, why)| format!("{}: {why}", path.display())).collect();
    lines.join("; ")
}

fn count(skipped: &[Skipped]) -> String {
    match skipped.len() {
        0 => String::new(),
        n => format!("; {n} skipped"),
    }
}

/// The entries of a folder by name, without hidden ones: the order must not depend on the file system.
fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in folder.read_dir().context("cannot list the folder")? {
        let path = entry.context("cannot list the folder")?.path();
        if !file_name(&path).starts_with('.') {
            entries.push(path);
        }
    }
    entries.sort();
    Ok(entries)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
