//! Labelled pictures from disk: IDX files, CIFAR-10 binaries, or a folder of class sub-folders.

mod cifar;
mod folder;
mod idx;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};

/// Square pictures with labels, `(n, channels, side, side)` bytes.
#[derive(Clone, Debug, Default)]
pub struct Images {
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    pub channels: usize,
    pub side: usize,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Bytes per picture.
    pub fn stride(&self) -> usize {
        self.channels * self.side * self.side
    }

    /// Picture `i`, channel by channel.
    pub fn get(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.stride()..(i + 1) * self.stride()]
    }

    /// The first `n` pictures, or all when there are fewer.
    pub fn take(mut self, n: usize) -> Self {
        let n = n.min(self.len());
        self.pixels.truncate(n * self.stride());
        self.labels.truncate(n);
        self
    }

    /// Mean and standard deviation of each channel, pixels in `[0, 1]`.
    pub fn statistics(&self) -> Vec<(f32, f32)> {
        let area = self.side * self.side;
        let count = (self.len() * area) as f64;
        let mut sums = vec![(0f64, 0f64); self.channels];
        for (plane, pixels) in self.pixels.chunks_exact(area).enumerate() {
            let (sum, squares) = &mut sums[plane % self.channels];
            for &p in pixels {
                let p = f64::from(p) / 255.0;
                *sum += p;
                *squares += p * p;
            }
        }
        let moments = |(sum, squares): (f64, f64)| {
            let mean = sum / count;
            let variance = (squares / count - mean * mean).max(0.0);
            // One constant channel must not divide by zero.
            (mean as f32, variance.sqrt().max(1e-3) as f32)
        };
        sums.into_iter().map(moments).collect()
    }

    /// The pictures of `batch`, `(B, C, S, S)`, each channel less its mean and over its standard deviation.
    pub fn normalized(
        &self,
        batch: std::ops::Range<usize>,
        statistics: &[(f32, f32)],
        device: &Device,
    ) -> Result<Tensor> {
        let shape = (batch.len(), self.channels, self.side, self.side);
        let mut pixels = Vec::with_capacity(batch.len() * self.stride());
        for i in batch {
            let planes = self.get(i).chunks_exact(self.side * self.side);
            for (plane, (mean, std)) in planes.zip(statistics) {
                pixels.extend(plane.iter().map(|&p| (f32::from(p) / 255.0 - mean) / std));
            }
        }
        Ok(Tensor::from_vec(pixels, shape, device)?)
    }

    /// Appends pictures of the same shape; the first batch decides the shape.
    fn append(&mut self, more: Images) -> Result<()> {
        if self.labels.is_empty() {
            *self = more;
            return Ok(());
        }
        let shape = |i: &Images| (i.channels, i.side);
        let (expected, got) = (shape(self), shape(&more));
        ensure!(
            expected == got,
            "expected pictures of (channels, side) {expected:?} as in the files before, got {got:?}"
        );
        self.pixels.extend(more.pixels);
        self.labels.extend(more.labels);
        Ok(())
    }

    /// Every fifth picture of each class, in file order, is for testing.
    fn split_classes(self) -> (Images, Images) {
        let mut seen = std::collections::HashMap::new();
        self.partition(|_, label| {
            let n = seen.entry(label).or_insert(0);
            *n += 1;
            *n % 5 == 0
        })
    }

    /// The first four fifths are for training, the rest for testing.
    fn split_tail(self) -> (Images, Images) {
        let boundary = self.len() * 4 / 5;
        self.partition(|i, _| i >= boundary)
    }

    fn partition(self, mut is_test: impl FnMut(usize, u32) -> bool) -> (Images, Images) {
        let empty = Images {
            channels: self.channels,
            side: self.side,
            ..Default::default()
        };
        let (mut train, mut test) = (empty.clone(), empty);
        for i in 0..self.len() {
            let label = self.labels[i];
            let part = if is_test(i, label) {
                &mut test
            } else {
                &mut train
            };
            part.pixels.extend_from_slice(self.get(i));
            part.labels.push(label);
        }
        (train, test)
    }
}

/// A data set, and how it was divided.
#[derive(Debug)]
pub struct Data {
    pub train: Images,
    pub test: Images,
    /// One sentence on where the division comes from, to stand beside every figure.
    pub note: String,
}

/// 10,000 pictures of Fashion-MNIST (its official test file) that come with the repository.
pub fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/fashion-mnist")
}

/// Reads `path`, whatever of the three layouts it holds.
pub fn load(path: &Path) -> Result<Data> {
    let data = read(path).with_context(|| format!("cannot read data from {}", path.display()))?;
    ensure!(
        data.train.len() >= 2 && data.test.len() >= 1,
        "{}: expected at least two training pictures and one test picture, got {} and {}",
        path.display(),
        data.train.len(),
        data.test.len()
    );
    Ok(data)
}

fn read(path: &Path) -> Result<Data> {
    ensure!(
        path.exists(),
        "no such file or folder; the published crate leaves the pictures out, so run the example in a clone of the \
         repository, or give --data a folder of IDX files, of CIFAR-10 binaries, or of class sub-folders"
    );
    if path.is_file() {
        let is_bin = path.extension().is_some_and(|e| e == "bin");
        let images = if is_bin {
            cifar::read(path)?
        } else {
            idx::read(path)?
        };
        return Ok(divided(images.split_tail(), "the last fifth of the file"));
    }
    let entries = sorted_entries(path)?;
    let named = |test: fn(&str) -> bool| -> Vec<PathBuf> {
        let matches = |p: &&PathBuf| test(&file_name(p));
        entries.iter().filter(matches).cloned().collect()
    };
    let idx_files = named(idx::is_images);
    let cifar_files = named(cifar::is_batch);
    if !idx_files.is_empty() {
        return read_parts(&idx_files, idx::read, |n| n.starts_with("t10k"), "t10k");
    }
    if !cifar_files.is_empty() {
        return read_parts(&cifar_files, cifar::read, |n| n.contains("test"), "test");
    }
    if entries.iter().any(|p| p.is_dir()) {
        let images = folder::read(path)?;
        return Ok(divided(
            images.split_classes(),
            "every fifth file of a class",
        ));
    }
    bail!(
        "expected *-images-idx3-ubyte[.gz] with its labels, *_batch*.bin (CIFAR-10), or sub-folders of PNG or JPEG \
         files, one for each class; found none of these among {} files",
        entries.len()
    )
}

/// Several files: those `is_test` names are the test part; without both parts, all pictures are divided again.
fn read_parts(
    files: &[PathBuf],
    read: fn(&Path) -> Result<Images>,
    is_test: fn(&str) -> bool,
    test_name: &str,
) -> Result<Data> {
    let (mut train, mut test) = (Images::default(), Images::default());
    for file in files {
        let part = if is_test(&file_name(file)) {
            &mut test
        } else {
            &mut train
        };
        let images = read(file)?;
        part.append(images)
            .with_context(|| file.display().to_string())?;
    }
    match (train.len(), test.len()) {
        (0, _) => Ok(divided(
            test.split_tail(),
            &format!("the last fifth of the official {test_name} file"),
        )),
        (_, 0) => Ok(divided(train.split_tail(), "the last fifth of the files")),
        _ => {
            let (a, b) = ((train.channels, train.side), (test.channels, test.side));
            ensure!(
                a == b,
                "expected test pictures of (channels, side) {a:?} as in the training files, got {b:?}"
            );
            let note = format!(
                "official split: {} training and {} test pictures",
                train.len(),
                test.len()
            );
            Ok(Data { train, test, note })
        }
    }
}

fn divided((train, test): (Images, Images), what: &str) -> Data {
    let note = format!(
        "re-split: {} pictures train, {} test ({what}); not comparable with published accuracies",
        train.len(),
        test.len()
    );
    Data { train, test, note }
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
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}
