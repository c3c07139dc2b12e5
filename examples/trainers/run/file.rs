//! Files that are written as a whole or not at all.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

/// Replaces `path` by what `write` writes. Until all of it is on the disk the old file stays; after a failure nothing else
/// remains.
pub fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let folder = folder(path);
    let replace = || -> io::Result<()> {
        // In the same folder, since only within a file system a file can be renamed.
        let mut file = new_file(folder)?;
        write(&mut file)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        // The name, too, must outlive a power cut.
        #[cfg(unix)]
        fs::File::open(folder)?.sync_all()?;
        Ok(())
    };
    let kept = match path.exists() {
        true => "the file before it is untouched",
        false => "nothing was left behind",
    };
    replace().with_context(|| format!("cannot write {} ({kept})", path.display()))
}

/// The folder that a file is in: of a bare name the current one.
pub fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        // The root has no parent either; that it is no file is found where it is written.
        _ => Path::new("."),
    }
}

/// Checks that `path` can be written later, and changes nothing.
///
/// # Errors
/// If it names a folder, or no file can be made beside it: the `flag` that named it.
pub fn check_writable(path: &Path, flag: &str) -> Result<()> {
    let shown = path.display();
    let slash = path.to_string_lossy().ends_with(std::path::is_separator);
    ensure!(
        !path.is_dir() && path.file_name().is_some() && !slash,
        "{flag}: expected a file to write, got {shown:?}, a folder"
    );
    new_file(folder(path))
        .map(drop)
        .with_context(|| format!("{flag}: expected a file that can be written, got {shown}"))
}

/// Whether anything is at `path`, be it a link to nothing.
///
/// # Errors
/// If the system does not tell.
pub fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// How the names of files begin that are not whole yet.
const UNFINISHED: &str = ".unfinished-";

/// Whether `path` is what a killed program has left of a file.
pub fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(UNFINISHED)
}

fn new_file(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED);
    // As any new file: what the user's mask leaves of these.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

/// [`replace`] with these bytes.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.write_all(bytes))
}

/// The file's bytes.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
