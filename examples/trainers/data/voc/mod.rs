//! Folders in the layout of Pascal VOC: images with boxes, divided into sets by lists of names.

pub mod annotation;
mod sets;
mod windows;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use self::{annotation::Annotation, sets::Named};
pub(super) use self::{
    sets::{Sets, is_voc},
    windows::windows,
};
use super::{decode, note, walk::Skipped};

/// A set with boxes.
#[derive(Clone, Debug)]
pub struct Voc {
    /// Names of the classes, in order.
    pub classes: Vec<String>,
    pub train: Vec<Annotated>,
    pub test: Vec<Annotated>,
    pub counts: Counts,
    /// Images that were passed over, and why.
    pub skipped: Vec<Skipped>,
    /// One line on what was read, to stand beside every value.
    pub note: String,
}

/// An image with its boxes, which may be none.
#[derive(Clone, Debug, PartialEq)]
pub struct Annotated {
    pub image: PathBuf,
    /// In pixels.
    pub height: usize,
    /// In pixels.
    pub width: usize,
    pub objects: Vec<Object>,
}

/// A box inside its image.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Index of the class.
    pub class: u32,
    /// Edge in pixels, from the upper border of the image: `ymin - 1`.
    pub top: f64,
    /// Edge in pixels, from the left border of the image: `xmin - 1`.
    pub left: f64,
    /// Edge in pixels: `ymax`.
    pub bottom: f64,
    /// Edge in pixels: `xmax`.
    pub right: f64,
    /// Neither trained on nor counted in an average precision.
    pub difficult: bool,
    /// Whether the object goes on beyond the box.
    pub truncated: bool,
}

/// What the annotations needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Boxes that reached beyond their image; the part inside is kept.
    pub clipped: usize,
    /// Boxes whose last corner is not beyond the first: dropped. Two equal corners, one pixel, are no object either.
    pub without_extent: usize,
    /// Boxes wholly outside of their image: dropped.
    pub outside: usize,
    /// Images whose annotation has no box: kept, as background.
    pub without_boxes: usize,
}

impl Voc {
    /// Reads a folder with `JPEGImages`, `Annotations` and `ImageSets/Main`. Images are not decoded. An image is skipped if
    /// its annotation is missing, damaged, or for another size.
    ///
    /// # Errors
    /// If the folder names no training or no test images, or if no box of either can be read.
    pub fn read(root: &Path) -> Result<Self> {
        let mut sets = Sets::read(root)?;
        let test_file = sets.test_file.take().context(
            "ImageSets/Main: expected test.txt, or val.txt beside train.txt, which name the test images, got neither",
        )?;
        let mut reader = Reader { root, skipped: sets.skipped, ..Reader::new(root) };
        let train = reader.all(&sets.train);
        let test = reader.all(&sets.test);
        let skipped = reader.skipped;
        for (what, images) in [("training", &train), ("test", &test)] {
            let boxes = images.iter().flat_map(|i| &i.objects).filter(|o| !o.difficult).count();
            ensure!(
                boxes > 0,
                "{}: expected boxes that are not difficult on the {what} images, got none on {} images{}{}",
                root.join("Annotations").display(),
                images.len(),
                if skipped.is_empty() { "" } else { "; " },
                note::named(&skipped)
            );
        }
        // Labels by name, not by the order in which classes appear.
        let classes: Vec<String> = reader.classes.keys().cloned().collect();
        let mut label = vec![0; classes.len()];
        for (new, old) in reader.classes.values().enumerate() {
            label[*old as usize] = new as u32;
        }
        let relabelled = |mut images: Vec<Annotated>| {
            let objects = images.iter_mut().flat_map(|i| &mut i.objects);
            objects.for_each(|o| o.class = label[o.class as usize]);
            images
        };
        let (train, test) = (relabelled(train), relabelled(test));
        let boxes = |images: &[Annotated]| images.iter().map(|i| i.objects.len()).sum::<usize>();
        let untrained: Vec<&str> = (0..classes.len())
            .filter(|&c| !train.iter().flat_map(|i| &i.objects).any(|o| o.class == c as u32))
            .map(|c| classes[c].as_str())
            .collect();
        let counts = reader.counts;
        let counted = |n: usize, what: &str| match n {
            0 => String::new(),
            n => format!("{n} {what}"),
        };
        let read = [
            format!(
                "Pascal VOC: {} training images with {} boxes ({}), {} test images with {} boxes ({test_file})",
                train.len(),
                boxes(&train),
                sets.train_file,
                test.len(),
                boxes(&test)
            ),
            format!("{} classes: {}", classes.len(), classes.join(", ")),
            counted(counts.clipped, "boxes clipped to their image"),
            counted(counts.without_extent, "boxes without extent dropped"),
            counted(counts.outside, "boxes outside of their image dropped"),
            counted(counts.without_boxes, "images without boxes"),
            match untrained.is_empty() {
                true => String::new(),
                false => format!("no training image shows {}", untrained.join(", ")),
            },
        ];
        let after = [note::count(&skipped), note::named(&skipped)];
        let note = note::joined(read.into_iter().chain(sets.remarks).chain(after));
        Ok(Self { classes, train, test, counts, skipped, note })
    }
}

struct Reader<'a> {
    root: &'a Path,
    /// Label of each class, by first appearance.
    classes: BTreeMap<String, u32>,
    counts: Counts,
    skipped: Vec<Skipped>,
}

impl<'a> Reader<'a> {
    fn new(root: &'a Path) -> Self {
        Self { root, classes: BTreeMap::new(), counts: Counts::default(), skipped: Vec::new() }
    }

    fn all(&mut self, images: &[Named]) -> Vec<Annotated> {
        let mut read = Vec::new();
        for named in images {
            match self.one(named) {
                Ok(annotated) => read.push(annotated),
                Err(why) => self.skipped.push((named.image.clone(), format!("{why:#}"))),
            }
        }
        read
    }

    fn one(&mut self, named: &Named) -> Result<Annotated> {
        let file = self.root.join("Annotations").join(format!("{}.xml", named.name));
        ensure!(file.exists(), "expected the annotation {}.xml, got none", named.name);
        let annotation = annotation::read(&file)
            .with_context(|| format!("the annotation {}.xml", named.name))?;
        let (width, height) = decode::stored_size(&named.image)?;
        if let Some((w, h)) = annotation.size {
            ensure!(
                (w, h) == (width, height),
                "expected an image of {w}x{h} pixels as in its annotation, got {width}x{height}"
            );
        }
        Ok(self.annotated(named, annotation, height as usize, width as usize))
    }

    fn annotated(
        &mut self,
        named: &Named,
        annotation: Annotation,
        height: usize,
        width: usize,
    ) -> Annotated {
        let mut objects = Vec::new();
        for object in annotation.objects {
            let [xmin, ymin, xmax, ymax] = object.corners;
            if xmax <= xmin || ymax <= ymin {
                self.counts.without_extent += 1;
                continue;
            }
            let [top, left] = [ymin - 1.0, xmin - 1.0].map(|edge| edge.max(0.0));
            let (bottom, right) = (ymax.min(height as f64), xmax.min(width as f64));
            if bottom <= top || right <= left {
                self.counts.outside += 1;
                continue;
            }
            let whole = [ymin - 1.0, xmin - 1.0, ymax, xmax];
            self.counts.clipped += usize::from([top, left, bottom, right] != whole);
            let new = self.classes.len() as u32;
            let class = *self.classes.entry(object.name).or_insert(new);
            let (difficult, truncated) = (object.difficult, object.truncated);
            objects.push(Object { class, top, left, bottom, right, difficult, truncated });
        }
        self.counts.without_boxes += usize::from(objects.is_empty());
        Annotated { image: named.image.clone(), height, width, objects }
    }
}
