//! Whether the images are those of before.

use std::path::Path;

use crc32fast::Hasher;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Data, Folder, Images, Source};

/// Numbers of images and checksums of both parts. Equal images in equal order have equal fingerprints, on every machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub train: usize,
    pub test: usize,
    checksums: [String; 2],
}

impl Data {
    /// The fingerprint of images that were read from `root`: their pixels and labels; of files that are decoded when they are
    /// needed, the names below `root`, the sizes and the labels.
    pub fn fingerprint(&self, root: &Path) -> Fingerprint {
        let train = match &self.train {
            Source::Memory(images) => of_images(images),
            Source::Folder(folder) => of_files(folder, root),
        };
        Fingerprint {
            train: self.train.len(),
            test: self.test.len(),
            checksums: [train, of_images(&self.test)],
        }
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { train, test, checksums: [of_train, of_test] } = self;
        write!(
            f,
            "{train} training images (checksum {of_train}) and {test} test images (checksum {of_test})"
        )
    }
}

fn of_images(images: &Images) -> String {
    let mut hasher = Hasher::new();
    for number in [images.channels, images.side] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    labels(&mut hasher, &images.labels);
    hasher.update(&images.pixels);
    shown(hasher)
}

fn of_files(folder: &Folder, root: &Path) -> String {
    let size = |path: &std::path::PathBuf| {
        // A file that is gone is passed over when it is met.
        std::fs::metadata(path).map_or(u64::MAX, |metadata| metadata.len())
    };
    let sizes: Vec<u64> = folder.files.par_iter().map(size).collect();
    let mut hasher = Hasher::new();
    labels(&mut hasher, &folder.labels);
    for (path, size) in folder.files.iter().zip(sizes) {
        let name = path.strip_prefix(root).unwrap_or(path);
        for part in name.components() {
            hasher.update(part.as_os_str().as_encoded_bytes());
            hasher.update(b"/");
        }
        hasher.update(&size.to_le_bytes());
    }
    shown(hasher)
}

fn labels(hasher: &mut Hasher, labels: &[u32]) {
    hasher.update(&(labels.len() as u64).to_le_bytes());
    for label in labels {
        hasher.update(&label.to_le_bytes());
    }
}

fn shown(hasher: Hasher) -> String {
    format!("{:08x}", hasher.finalize())
}
