//! The newest checkpoint of a run, and the one before it for as long as the newest is in doubt.
//!
//! A checkpoint holds the weights after an update, and only the loss of the next step shows whether they are finite.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

pub struct Saved {
    path: PathBuf,
    /// Steps made before the newest one, and before the one that is kept beside it.
    newest: Option<usize>,
    before: Option<usize>,
    /// Whether no finite loss of its weights was seen yet.
    doubtful: bool,
}

impl Saved {
    /// Checkpoints of the run in `folder`; nothing is touched yet.
    pub fn new(folder: &Path) -> Self {
        Self {
            path: folder.join("checkpoint.safetensors"),
            newest: None,
            before: None,
            doubtful: false,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that a run in `folder` may have left.
    pub fn files(folder: &Path) -> [PathBuf; 2] {
        let saved = Self::new(folder);
        [saved.kept(), saved.path]
    }

    fn kept(&self) -> PathBuf {
        self.path.with_file_name("checkpoint-before.safetensors")
    }

    /// The run goes on from the checkpoint of `step`.
    pub fn resume(&mut self, step: usize) {
        self.newest = Some(step);
    }

    /// Replaces the checkpoint by what `write` makes of its path, and keeps the old one beside it.
    pub fn replace(&mut self, step: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if let Some(newest) = self.newest.filter(|_| !self.doubtful) {
            let kept = self.kept();
            remove(&kept)?;
            // A second name costs nothing; not every file system has them.
            fs::hard_link(&self.path, &kept)
                .or_else(|_| fs::copy(&self.path, &kept).map(drop))
                .with_context(|| format!("cannot keep {}", self.path.display()))?;
            self.before = Some(newest);
        }
        write(&self.path)?;
        (self.newest, self.doubtful) = (Some(step), true);
        Ok(())
    }

    /// A finite loss was seen: the newest checkpoint is good, and the one before it of no more use.
    pub fn vouch(&mut self) -> Result<()> {
        if std::mem::take(&mut self.doubtful) {
            self.before = None;
            remove(&self.kept())?;
        }
        Ok(())
    }

    /// A loss was not finite: the checkpoint becomes the last good one again, if there is one.
    pub fn roll_back(&mut self) -> Result<()> {
        if std::mem::take(&mut self.doubtful) {
            match self.before {
                Some(_) => fs::rename(self.kept(), &self.path)
                    .with_context(|| format!("cannot restore {}", self.path.display()))?,
                None => remove(&self.path)?,
            }
            self.newest = self.before.take();
        }
        Ok(())
    }

    /// Where to go on from.
    pub fn last_good(&self) -> String {
        let step = match self.doubtful {
            true => self.before,
            false => self.newest,
        };
        match step {
            Some(step) => {
                format!("The last good checkpoint is of step {step}: {}", self.path.display())
            }
            None => "There is no good checkpoint yet".to_string(),
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkpoint_is_the_last_good_one() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut saved = Saved::new(folder.path());
        let write = |saved: &mut Saved, step: usize| {
            let text = step.to_string();
            saved.replace(step, |path| crate::run::file::write(path, text.as_bytes()))
        };
        let held = |saved: &Saved| fs::read_to_string(saved.path()).ok();
        assert!(saved.last_good().contains("no good checkpoint"));
        // The first one is bad.
        write(&mut saved, 1).unwrap();
        saved.roll_back().unwrap();
        assert_eq!(held(&saved), None);
        write(&mut saved, 2).unwrap();
        saved.vouch().unwrap();
        write(&mut saved, 4).unwrap();
        assert!(saved.last_good().contains("step 2"));
        assert_eq!(held(&saved).as_deref(), Some("4"), "what a kill would leave");
        saved.roll_back().unwrap();
        assert_eq!(held(&saved).as_deref(), Some("2"));
        // Two in doubt: the one before both stays.
        write(&mut saved, 5).unwrap();
        write(&mut saved, 6).unwrap();
        saved.roll_back().unwrap();
        assert_eq!(held(&saved).as_deref(), Some("2"));
        write(&mut saved, 7).unwrap();
        saved.vouch().unwrap();
        saved.roll_back().unwrap();
        assert_eq!(held(&saved).as_deref(), Some("7"));
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 1, "nothing is kept without need");
    }

    #[test]
    fn a_resumed_run_keeps_what_it_came_from() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut saved = Saved::new(folder.path());
        fs::write(saved.path(), "3").unwrap();
        saved.resume(3);
        saved.roll_back().unwrap();
        assert!(saved.path().exists());
        assert!(saved.last_good().contains("step 3"));
    }
}
