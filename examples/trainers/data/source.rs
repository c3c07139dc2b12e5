//! What a data set consists of: images to train on, images to evaluate with, and what is known about them.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;

use super::{decode, draw, folder::Folder, images::Images, picture::Picture, walk::Skipped};

/// Training images: decoded, or to be decoded when they are needed.
#[derive(Clone, Debug)]
pub enum Source {
    Memory(Arc<Images>),
    Folder(Arc<Folder>),
}

impl Source {
    pub fn len(&self) -> usize {
        self.labels().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn labels(&self) -> &[u32] {
        match self {
            Source::Memory(images) => &images.labels,
            Source::Folder(folder) => &folder.labels,
        }
    }

    pub fn channels(&self) -> usize {
        match self {
            Source::Memory(images) => images.channels,
            Source::Folder(_) => 3,
        }
    }

    pub fn picture(&self, i: usize) -> Result<Picture<'_>> {
        Ok(match self {
            Source::Memory(images) => images.picture(i),
            Source::Folder(folder) => Picture::Rgb(decode::decode(&folder.files[i])?),
        })
    }

    /// Where image `i` comes from; images in memory have a number only.
    pub fn path(&self, i: usize) -> PathBuf {
        match self {
            Source::Memory(_) => format!("image {i}").into(),
            Source::Folder(folder) => folder.files[i].clone(),
        }
    }
}

/// A data set, and how it was divided.
#[derive(Debug)]
pub struct Data {
    pub train: Source,
    /// Training images as they are, for evaluation.
    pub bank: Arc<Images>,
    pub test: Images,
    /// Names of the labels; empty: the images have none.
    pub classes: Vec<String>,
    /// One line on what was read and where the division comes from, to stand beside every value.
    pub note: String,
    pub skipped: Vec<Skipped>,
}

impl Data {
    /// Whether the images have labels; without them only what needs none is measured.
    pub fn is_labelled(&self) -> bool {
        !self.classes.is_empty()
    }

    /// The data with at most `train` and `test` images, drawn by class.
    pub fn take(self, train: usize, test: usize) -> Self {
        let bank = Arc::new(self.bank.draw(train));
        Self {
            train: match &self.train {
                // Bank and training images stay one, unless the bank has another size.
                Source::Memory(images) if Arc::ptr_eq(images, &self.bank) => {
                    Source::Memory(bank.clone())
                }
                Source::Memory(images) => Source::Memory(Arc::new(images.draw(train))),
                Source::Folder(folder) => {
                    let drawn = draw::by_class(&folder.labels, train, draw::SEED);
                    Source::Folder(Arc::new(folder.pick(&drawn)))
                }
            },
            bank,
            test: self.test.draw(test),
            ..self
        }
    }
}

/// What a trainer needs of the images.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Side of the images for evaluation; `None`: as they come, and 32 for a folder of images.
    pub side: Option<usize>,
    /// Images of a folder stay in their files until they are needed, instead of being decoded once at a small size.
    pub stream: bool,
    /// The most training images, and test images, of the evaluation.
    pub bank_limit: usize,
    pub test_limit: usize,
}

impl Default for Wanted {
    /// Everything in memory.
    fn default() -> Self {
        Self { side: None, stream: false, bank_limit: usize::MAX, test_limit: usize::MAX }
    }
}

impl Wanted {
    /// Images of `side`, which may be more than memory holds.
    pub fn streamed(side: usize) -> Self {
        Self { side: Some(side), stream: true, bank_limit: 5000, test_limit: 1000 }
    }
}
