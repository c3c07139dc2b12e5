//! The files of folders: which of them are images, and how many of which kind are not.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use image::ImageFormat;

/// A file, or a class, that was passed over, and why.
pub type Skipped = (PathBuf, String);

/// Suffixes of the formats that are read. A file with another one is an image if its content begins like one.
const SUFFIXES: [&str; 18] = [
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "tif", "tiff", "bmp", "dib", "gif", "pbm",
    "pgm", "ppm", "pnm", "tga", "qoi",
];

/// The number of files of each kind that are no images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignored(BTreeMap<String, usize>);

impl Ignored {
    fn add(&mut self, kind: String) {
        *self.0.entry(kind).or_default() += 1;
    }

    /// `ignored 3 files: 2 .txt, 1 hidden`; empty if there are none.
    pub fn text(&self) -> String {
        let kinds: Vec<String> = self.0.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        match self.0.values().sum::<usize>() {
            0 => String::new(),
            n => format!("ignored {n} file{}: {}", if n == 1 { "" } else { "s" }, kinds.join(", ")),
        }
    }

    /// The same after a semicolon, to end a message.
    pub fn then(&self) -> String {
        match self.text() {
            text if text.is_empty() => text,
            text => format!("; {text}"),
        }
    }
}

/// What lies directly in a folder, by name: the order must not depend on the file system.
#[derive(Debug, Default)]
pub struct Level {
    pub folders: Vec<PathBuf>,
    pub images: Vec<PathBuf>,
    /// All other files that are not hidden.
    pub others: Vec<PathBuf>,
}

impl Level {
    pub fn read(folder: &Path, ignored: &mut Ignored) -> Result<Self> {
        let listed = || format!("cannot list the folder {}", folder.display());
        let mut paths = Vec::new();
        for entry in folder.read_dir().with_context(listed)? {
            paths.push(entry.with_context(listed)?.path());
        }
        paths.sort();
        let mut level = Level::default();
        for path in paths {
            let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            match fs::metadata(&path) {
                _ if hidden => ignored.add("hidden".into()),
                Err(_) => ignored.add("broken link".into()),
                Ok(found) if found.is_dir() => match leads_up(&path, folder)? {
                    true => ignored.add("link to a folder above it".into()),
                    false => level.folders.push(path),
                },
                // To open a pipe would wait for its writer.
                Ok(found) if !found.is_file() => ignored.add("no regular file".into()),
                Ok(found) if found.len() == 0 => {
                    ignored.add("empty".into());
                    level.others.push(path);
                }
                Ok(_) if is_image(&path) => level.images.push(path),
                Ok(_) => {
                    ignored.add(kind(&path));
                    level.others.push(path);
                }
            }
        }
        Ok(level)
    }
}

/// The images in a folder and in the folders in it. A link to a folder is followed once, so that links in a circle end.
pub fn images_below(folder: &Path, ignored: &mut Ignored) -> Result<Vec<PathBuf>> {
    let mut seen = BTreeSet::from([resolved(folder)?]);
    let (mut images, mut open) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = open.pop() {
        let level = Level::read(&folder, ignored)?;
        images.extend(level.images);
        for folder in level.folders.into_iter().rev() {
            let new = seen.insert(resolved(&folder)?);
            match new || !folder.is_symlink() {
                true => open.push(folder),
                false => ignored.add("link to a folder that is read already".into()),
            }
        }
    }
    Ok(images)
}

/// The name for people to read; names are compared as they are.
pub fn shown(name: &OsStr) -> String {
    match name.to_str() {
        Some(name) => name.to_string(),
        None => name.as_encoded_bytes().escape_ascii().to_string(),
    }
}

fn leads_up(path: &Path, folder: &Path) -> Result<bool> {
    Ok(path.is_symlink() && resolved(folder)?.starts_with(resolved(path)?))
}

fn resolved(folder: &Path) -> Result<PathBuf> {
    folder.canonicalize().with_context(|| format!("cannot list the folder {}", folder.display()))
}

fn suffix(path: &Path) -> Option<String> {
    path.extension().map(|e| shown(e).to_ascii_lowercase())
}

fn kind(path: &Path) -> String {
    suffix(path).map_or("without suffix".into(), |suffix| format!(".{suffix}"))
}

/// A file with a known suffix is taken for an image until it is decoded: to open each would take long in large sets.
fn is_image(path: &Path) -> bool {
    if suffix(path).is_some_and(|s| SUFFIXES.contains(&s.as_str())) {
        return true;
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(16).read_to_end(&mut head));
    read.is_ok() && begins_like_an_image(&head)
}

fn begins_like_an_image(head: &[u8]) -> bool {
    let Ok(format) = image::guess_format(head) else {
        return false;
    };
    // Two letters alone may begin a text.
    let plausible = match format {
        ImageFormat::Bmp => head.get(6..10) == Some(&[0; 4]),
        ImageFormat::Pnm => {
            let digit = |c: u8| c.is_ascii_digit() || c.is_ascii_whitespace() || c == b'#';
            let header = |h: &[u8]| h[0].is_ascii_whitespace() && digit(h[1]);
            head.starts_with(b"P7\n") || head.get(2..4).is_some_and(header)
        }
        _ => true,
    };
    plausible && format.reading_enabled()
}
