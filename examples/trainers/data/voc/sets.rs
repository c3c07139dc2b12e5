//! Which images of a Pascal VOC folder are for training and which for testing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::data::walk::{Ignored, Level, Skipped, shown};

/// An image that a set names.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub image: PathBuf,
}

/// The images by their sets.
#[derive(Debug, Default)]
pub struct Sets {
    pub train: Vec<Named>,
    pub test: Vec<Named>,
    /// The file, or files, that name the training images.
    pub train_file: String,
    /// The same of the test images; `None`: the folder names none.
    pub test_file: Option<String>,
    /// Names without an image.
    pub skipped: Vec<Skipped>,
    /// More to say about the sets.
    pub remarks: Vec<String>,
}

/// Whether a folder has the layout of Pascal VOC.
pub fn is_voc(root: &Path) -> bool {
    root.join("JPEGImages").is_dir() && root.join("ImageSets").is_dir()
}

impl Sets {
    /// Reads `ImageSets/Main`. Where there is `test.txt`, all others train: `trainval.txt`, or `train.txt` with `val.txt`.
    /// Where there is none, `train.txt` trains and `val.txt` tests. An image in both sets tests only.
    ///
    /// # Errors
    /// If there is no list of training images, if a list cannot be read or is empty, or if no named image is there.
    pub fn read(root: &Path) -> Result<Self> {
        let folder = root.join("JPEGImages");
        ensure!(
            is_voc(root),
            "{}: expected a Pascal VOC folder with JPEGImages, Annotations and ImageSets/Main",
            root.display()
        );
        let main = root.join("ImageSets/Main");
        let list = |name: &str| names(&main.join(name));
        let [train, val, trainval, test] =
            [list("train.txt")?, list("val.txt")?, list("trainval.txt")?, list("test.txt")?];
        let (lists, test) = match (train, val, trainval, test) {
            (_, _, Some(all), Some(test)) => {
                (vec![("trainval.txt", all)], Some(("test.txt", test)))
            }
            (Some(train), Some(val), None, Some(test)) => {
                (vec![("train.txt", train), ("val.txt", val)], Some(("test.txt", test)))
            }
            (Some(train), None, None, Some(test)) => {
                (vec![("train.txt", train)], Some(("test.txt", test)))
            }
            (Some(train), Some(val), _, None) => {
                (vec![("train.txt", train)], Some(("val.txt", val)))
            }
            (_, None, Some(all), None) => (vec![("trainval.txt", all)], None),
            (Some(train), None, None, None) => (vec![("train.txt", train)], None),
            _ => anyhow::bail!(
                "{}: expected train.txt or trainval.txt, which name the training images, got neither",
                main.display()
            ),
        };
        let mut sets = Self {
            train_file: lists.iter().map(|l| l.0).collect::<Vec<_>>().join(" and "),
            test_file: test.as_ref().map(|t| t.0.to_string()),
            ..Self::default()
        };
        let mut ignored = Ignored::default();
        let images = Images::of(Level::read(&folder, &mut ignored)?.images);
        let mut seen = BTreeSet::new();
        // The test images first: an image in both sets must not train.
        if let Some((file, names)) = test {
            sets.test = sets.found(names, &images, &folder, file, &mut seen);
        }
        let tested = seen.clone();
        for (file, names) in lists {
            let (both, only): (Vec<_>, Vec<_>) =
                names.into_iter().partition(|name| tested.contains(name));
            if let (n @ 1.., Some(test)) = (both.len(), &sets.test_file) {
                sets.remarks.push(format!("{n} names of {file} are in {test} too and only test"));
            }
            let found = sets.found(only, &images, &folder, file, &mut seen);
            sets.train.extend(found);
        }
        ensure!(
            !sets.train.is_empty(),
            "{}: expected training images that {} names, got none of them",
            folder.display(),
            sets.train_file
        );
        sets.remarks.extend(Some(ignored.text()).filter(|text| !text.is_empty()));
        Ok(sets)
    }

    /// The images of these names, each once; names without one image are skipped.
    fn found(
        &mut self,
        names: Vec<String>,
        images: &Images,
        folder: &Path,
        file: &str,
        seen: &mut BTreeSet<String>,
    ) -> Vec<Named> {
        let mut found = Vec::new();
        let mut repeated = 0;
        for name in names {
            if !seen.insert(name.clone()) {
                repeated += 1;
                continue;
            }
            match images.get(&name) {
                [image] => found.push(Named { name: stem(image), image: image.clone() }),
                [] => {
                    let why = format!("no such image, though {file} names it");
                    self.skipped.push((folder.join(name), why));
                }
                several => {
                    let why =
                        format!("{} images have this name, which {file} names", several.len());
                    self.skipped.push((folder.join(name), why));
                }
            }
        }
        if repeated > 0 {
            self.remarks.push(format!("{repeated} repeated names of {file} are read once"));
        }
        found
    }
}

/// Image files by their name, with and without the suffix.
struct Images(BTreeMap<String, Vec<PathBuf>>);

impl Images {
    fn of(files: Vec<PathBuf>) -> Self {
        let mut images = BTreeMap::<String, Vec<PathBuf>>::new();
        for file in files {
            let full = file.file_name().map(shown).unwrap_or_default();
            for name in BTreeSet::from([stem(&file), full]) {
                images.entry(name).or_default().push(file.clone());
            }
        }
        Self(images)
    }

    fn get(&self, name: &str) -> &[PathBuf] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }
}

fn stem(file: &Path) -> String {
    file.file_stem().map(shown).unwrap_or_default()
}

/// The names in a list, one a line; `None` without the file.
fn names(file: &Path) -> Result<Option<Vec<String>>> {
    if !file.exists() {
        return Ok(None);
    }
    let read = || -> Result<Vec<String>> {
        let text = fs::read_to_string(file).context("expected names of images in UTF-8")?;
        let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
        let names: Vec<String> = lines.filter(|l| !l.is_empty()).map(String::from).collect();
        ensure!(!names.is_empty(), "expected names of images, one a line, got none");
        Ok(names)
    };
    Ok(Some(read().with_context(|| file.display().to_string())?))
}
