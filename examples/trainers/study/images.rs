//! The images of each set: the study chooses a part of a large set, the same for all runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::plan::Set;
use crate::{
    data::{
        draw,
        walk::{Ignored, Level},
    },
    run::file,
};

/// Images of each class to train on and to test with.
pub const TRAIN: usize = 800;
pub const TEST: usize = 200;

/// A set that runs can read.
#[derive(Clone, Debug, PartialEq)]
pub struct Ready {
    pub path: PathBuf,
    /// CRC-32 of the list of images, if the study chose them.
    pub list: Option<String>,
}

/// The folders that `--data NAME=PATH` gives, by name.
pub fn given(words: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let known: BTreeSet<&str> = Set::ALL.into_iter().filter_map(Set::given_as).collect();
    let mut given = BTreeMap::new();
    for words in words {
        let parts = words.split_once('=');
        let (name, path) =
            parts.with_context(|| format!("--data: expected NAME=PATH, got {words}"))?;
        ensure!(
            known.contains(name),
            "--data: expected one of the names {}, got {name}",
            known.iter().copied().collect::<Vec<_>>().join(", ")
        );
        ensure!(Path::new(path).is_dir(), "--data {name}: expected a folder, got {path}");
        ensure!(
            given.insert(name.to_string(), PathBuf::from(path)).is_none(),
            "--data: expected one folder of {name}, got two"
        );
    }
    Ok(given)
}

/// Makes the set ready from the folder that `--data` gives; a chosen part is copied below `out`.
pub fn ready(set: Set, given: &Path, out: &Path) -> Result<Ready> {
    let flag = || format!("--data {}={}", set.given_as().unwrap_or(set.name()), given.display());
    ensure!(given.is_dir(), "{}: expected a folder, got none", flag());
    if !matches!(set, Set::Eurosat | Set::Cifar10) {
        return Ok(Ready { path: given.to_path_buf(), list: None });
    }
    let chosen = choose(given, TRAIN, TEST).with_context(flag)?;
    let path = out.join("data").join(set.name());
    let list = copy(given, &chosen, &path).with_context(flag)?;
    Ok(Ready { path, list: Some(list) })
}

/// An image of the set, relative to its folder, and its place in the chosen part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    pub place: PathBuf,
    pub image: PathBuf,
}

/// Chooses `train` and `test` images of each class of a folder `CLASS/IMAGE`, or `train/CLASS/IMAGE` and `test/CLASS/IMAGE`:
/// the first ones of a drawn order of the names.
pub fn choose(folder: &Path, train: usize, test: usize) -> Result<Vec<Choice>> {
    let divided = folder.join("train").is_dir() && folder.join("test").is_dir();
    let mut all = Vec::new();
    let parts = match divided {
        true => vec![("train", vec![("train", train)]), ("test", vec![("test", test)])],
        false => vec![("", vec![("train", train), ("test", test)])],
    };
    for (from, wanted) in parts {
        let from = if from.is_empty() { folder.to_path_buf() } else { folder.join(from) };
        let classes = Level::read(&from, &mut Ignored::default())?.folders;
        ensure!(
            classes.len() > 1,
            "expected a folder for each class in {}, got {}",
            from.display(),
            classes.len()
        );
        for class in classes {
            let images = Level::read(&class, &mut Ignored::default())?.images;
            let needed: usize = wanted.iter().map(|(_, count)| count).sum();
            ensure!(
                images.len() >= needed,
                "expected at least {needed} images in {}, got {}",
                class.display(),
                images.len()
            );
            let mut order = draw::order(images.len(), draw::SEED).into_iter();
            for (part, count) in &wanted {
                for i in order.by_ref().take(*count) {
                    let image = images[i].strip_prefix(folder)?.to_path_buf();
                    let below = images[i].strip_prefix(&from)?;
                    all.push(Choice { place: Path::new(part).join(below), image });
                }
            }
        }
    }
    all.sort();
    Ok(all)
}

/// Copies the chosen images to `to` and writes their list beside it; gives its CRC-32.
fn copy(folder: &Path, chosen: &[Choice], to: &Path) -> Result<String> {
    let line = |c: &Choice| format!("{}\t{}\n", c.place.display(), c.image.display());
    let list: String = chosen.iter().map(line).collect();
    let crc = format!("{:08x}", crc32fast::hash(list.as_bytes()));
    let file = to.with_extension("txt");
    if file::exists(&file)? {
        let old = file::read(&file)?;
        ensure!(
            old == list.as_bytes(),
            "expected the images of earlier runs, listed in {}, got others (give another --out)",
            file.display()
        );
        return Ok(crc);
    }
    // The list is written last: without it a copy is not whole.
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    for choice in chosen {
        let place = to.join(&choice.place);
        fs::create_dir_all(file::folder(&place))?;
        let from = folder.join(&choice.image);
        fs::copy(&from, &place).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    file::write(&file, list.as_bytes())?;
    Ok(crc)
}
