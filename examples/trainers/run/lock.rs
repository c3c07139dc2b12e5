//! The owner of a folder: of two programs that write into it, the second is refused.
//!
//! The operating system holds the lock and releases it when the process ends, however it ends. So a file that a killed
//! process has left locks nothing.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, bail};

/// The name of the file that is locked, and that names the owner.
const NAME: &str = ".lock";

/// How often the file may be gone when it is locked.
const TRIES: usize = 1000;

/// The sole right to write into a folder, until it is dropped.
pub struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Takes the folder that the option `flag` named.
    ///
    /// # Errors
    /// If another process has it: the process and its host. If nothing can be written into it.
    pub fn take(folder: &Path, flag: &str) -> Result<Self> {
        let path = folder.join(NAME);
        for _ in 0..TRIES {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(&path).with_context(|| {
                format!("{flag}: expected a folder to write into, got {}", folder.display())
            })?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "{flag}: expected a folder that no other program writes into, got {}, which {} uses now",
                    folder.display(),
                    owner(file)
                ),
                // Some network file systems have no locks.
                Err(TryLockError::Error(e)) => {
                    eprintln!("cannot lock {} ({e}): start no other program there", path.display());
                }
            }
            let lock = Self { path: path.clone(), file };
            // The owner before may have removed the file that was opened: another process may have a new one.
            if lock.is_in_place() {
                lock.write_owner().with_context(|| format!("cannot write {}", path.display()))?;
                return Ok(lock);
            }
        }
        bail!("{flag}: cannot lock {}, which other programs make and remove again", path.display())
    }

    fn write_owner(&self) -> io::Result<()> {
        self.file.set_len(0)?;
        write!(&self.file, "process {} on {}", std::process::id(), host())
    }

    #[cfg(unix)]
    fn is_in_place(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (held, named) = (self.file.metadata().map(id), fs::metadata(&self.path).map(id));
        matches!((held, named), (Ok(held), Ok(named)) if held == named)
    }

    /// Where the file is never removed it stays in its place.
    #[cfg(not(unix))]
    fn is_in_place(&self) -> bool {
        true
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock is released, so that nobody else holds it.
        if cfg!(unix) && self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The owner by its own words.
fn owner(mut file: File) -> String {
    // It may be about to write them. Where a locked file cannot be read it remains unnamed.
    for _ in 0..20 {
        let mut text = String::new();
        match file.read_to_string(&mut text) {
            Ok(0) => sleep(Duration::from_millis(5)),
            Ok(_) => return text,
            Err(_) => break,
        }
    }
    "another process".to_string()
}

#[cfg(unix)]
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "an unnamed host".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner() {
        let folder = tempfile::TempDir::new().unwrap();
        // What a killed process has left locks nothing.
        fs::write(folder.path().join(NAME), "process 1 on nowhere").unwrap();
        let lock = Lock::take(folder.path(), "--out").unwrap();
        let refused = Lock::take(folder.path(), "--out").err().unwrap().to_string();
        let me = format!("process {} on ", std::process::id());
        assert!(refused.starts_with("--out: ") && refused.contains(&me), "{refused}");
        assert!(!refused.contains("nowhere"), "{refused}");
        drop(lock);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), usize::from(!cfg!(unix)));
        drop(Lock::take(folder.path(), "--out").unwrap());
    }

    /// Many threads open the file and remove it again; never do two of them own it.
    #[test]
    fn owners_that_come_and_go_never_meet() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let folder = tempfile::TempDir::new().unwrap();
        let (inside, owned) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        if let Ok(lock) = Lock::take(folder.path(), "--out") {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            owned.fetch_add(1, Ordering::SeqCst);
                            std::thread::yield_now();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
        assert!(owned.into_inner() > 0);
    }
}
