//! One data set in several files, IDX or CIFAR-10: which files belong together, and which of them are for testing.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{draw, images::Images, note::Division, walk::shown};

/// The files of one set.
#[derive(Debug, Default)]
pub struct Set {
    train: Vec<PathBuf>,
    test: Vec<PathBuf>,
}

impl Set {
    /// Sorts files into sets: the names of one set differ in `train` and `test` or `t10k` only, and in their number.
    pub fn all(files: Vec<PathBuf>) -> Vec<Self> {
        let mut sets = BTreeMap::<Vec<String>, Set>::new();
        for file in files {
            let name = file.file_name().map(shown).unwrap_or_default().to_ascii_lowercase();
            let (mut rest, mut is_test) = (Vec::new(), false);
            for word in name.split(['-', '_', '.']) {
                match word {
                    "test" | "t10k" => is_test = true,
                    // The same file may lie there plain and gzipped.
                    "train" | "data" | "gz" => {}
                    word => rest.push(word.to_string()),
                }
            }
            let numbered = rest.iter().any(|word| word == "batch");
            if numbered {
                rest.retain(|word| word.parse::<u32>().is_err());
            }
            let twin = |p: &PathBuf| p.with_extension("") == file || file.with_extension("") == *p;
            let known = sets.entry(rest.clone()).or_default().part(is_test);
            if known.iter().any(twin) {
                continue;
            }
            match numbered || known.is_empty() {
                true => known.push(file),
                // Only batches are parts of a part.
                false => {
                    rest.push(name);
                    sets.entry(rest).or_default().part(is_test).push(file);
                }
            }
        }
        sets.into_values().collect()
    }

    fn part(&mut self, is_test: bool) -> &mut Vec<PathBuf> {
        if is_test { &mut self.test } else { &mut self.train }
    }

    pub fn files(&self) -> Vec<&PathBuf> {
        self.train.iter().chain(&self.test).collect()
    }

    /// The training and the test images, and where the division comes from: the files, or a draw where one part is
    /// missing.
    pub fn read(&self, read: fn(&Path) -> Result<Images>) -> Result<((Images, Images), Division)> {
        let joined = |files: &[PathBuf]| -> Result<Images> {
            let mut all = Images::default();
            for file in files {
                all.append(read(file)?).with_context(|| file.display().to_string())?;
            }
            Ok(all)
        };
        let (train, test) = (joined(&self.train)?, joined(&self.test)?);
        if train.is_empty() || test.is_empty() {
            let of = match train.is_empty() {
                true => "the official test file",
                false => "the training files",
            };
            let all = if train.is_empty() { test } else { train };
            return Ok((divide(&all), Division::Drawn(of)));
        }
        let (a, b) = ((train.channels, train.side), (test.channels, test.side));
        ensure!(
            a == b,
            "expected test images of (channels, side) {a:?} as in the training files, got {b:?}"
        );
        Ok(((train, test), Division::Official))
    }
}

/// About a fifth of each class is for testing.
pub fn divide(all: &Images) -> (Images, Images) {
    let (train, test) = draw::split(&all.labels);
    (all.pick(&train), all.pick(&test))
}
