//! Folders that divide images into training and test images, told by their names.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use super::walk::{self, Ignored, Level};

/// What the name of a folder says about its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Train,
    Validation,
    Test,
}

/// The folders of a division.
#[derive(Debug)]
pub struct Split {
    pub train: PathBuf,
    /// `None`: the folder `train` stands alone.
    pub test: Option<PathBuf>,
    /// The folder `test`, where images are tested on `val`.
    pub unread: Option<PathBuf>,
}

impl Split {
    /// The division that the folders of `level` stand for; `None` if they may be classes.
    ///
    /// # Errors
    /// If some of the names belong to a division and others do not.
    pub fn of(level: &Level, root: &Path) -> Result<Option<Self>> {
        let with = |role| -> Vec<&PathBuf> {
            level.folders.iter().filter(|f| role_of(f) == Some(role)).collect()
        };
        let [train, validation, test] = [Role::Train, Role::Validation, Role::Test].map(with);
        if train.is_empty() {
            ensure!(
                validation.is_empty() || test.is_empty(),
                "expected the folder train beside {}, got none",
                names(&level.folders)
            );
            return Ok(None);
        }
        let others: Vec<&PathBuf> =
            level.folders.iter().filter(|f| role_of(f).is_none() && holds_images(f)).collect();
        if validation.is_empty() && test.is_empty() {
            return Self::alone(&train, &others, level);
        }
        for (role, found) in [("train", &train), ("val", &validation), ("test", &test)] {
            ensure!(found.len() < 2, "expected one folder for {role}, got {}", names(found));
        }
        ensure!(
            others.is_empty() && level.images.is_empty(),
            "expected images below {} only, got others in {} (move them away)",
            names([train, validation, test].concat()),
            match others.is_empty() {
                true => root.display().to_string(),
                false => names(&others),
            }
        );
        let unread = test.first().filter(|_| !validation.is_empty()).map(|&t| t.clone());
        Ok(Some(Self {
            train: train[0].clone(),
            test: validation.first().or(test.first()).map(|&t| t.clone()),
            unread,
        }))
    }

    /// `train` without a partner: a division that is not there yet, or a class of vehicles.
    fn alone(train: &[&PathBuf], others: &[&PathBuf], level: &Level) -> Result<Option<Self>> {
        if let ([train], [], true) = (train, others, level.images.is_empty()) {
            return Ok(Some(Self { train: train.to_path_buf(), test: None, unread: None }));
        }
        let has_classes = |f: &&PathBuf| {
            Level::read(f, &mut Ignored::default())
                .is_ok_and(|l| l.folders.iter().any(holds_images))
        };
        if others.len() == 1 || train.iter().any(has_classes) {
            bail!(
                "expected val, valid, validation or test beside {}, got {} (rename the folder of the test images, or \
                 give --data the folder train alone)",
                names(train),
                names(others)
            );
        }
        Ok(None)
    }
}

/// `train`, `Training`, `train2017`, `train_images`: a word of a division, and no other word than one for images.
fn role_of(folder: &Path) -> Option<Role> {
    let name = folder.file_name()?.to_str()?.to_ascii_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphabetic()).filter(|w| !w.is_empty());
    let role = match words.next()? {
        "train" | "training" | "trainset" => Role::Train,
        "val" | "valid" | "validation" | "valset" => Role::Validation,
        "test" | "testing" | "testset" => Role::Test,
        _ => return None,
    };
    let fillers = ["image", "images", "img", "imgs", "set", "data"];
    (name.is_ascii() && words.all(|w| fillers.contains(&w))).then_some(role)
}

pub fn holds_images(folder: impl AsRef<Path>) -> bool {
    walk::images_below(folder.as_ref(), &mut Ignored::default()).is_ok_and(|i| !i.is_empty())
}

/// The names of folders, the first few.
pub fn names<P: AsRef<Path>>(folders: impl AsRef<[P]>) -> String {
    let folders = folders.as_ref();
    let name = |f: &P| f.as_ref().file_name().map(walk::shown).unwrap_or_default();
    let mut names: Vec<String> = folders.iter().take(5).map(name).collect();
    if folders.len() > names.len() {
        names.push("…".into());
    }
    names.join(", ")
}
