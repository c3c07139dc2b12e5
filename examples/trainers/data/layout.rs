//! What a folder of images holds: classes, or none, and a division into training and test images, or none.
//!
//! A layout is recognized or refused. A class is a folder directly below the root or below `train` and `val`; its images
//! may lie deeper. Images without class folders have no labels.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail, ensure};

use super::{
    draw,
    folder::Folder,
    split::{self, Split, names},
    voc,
    walk::{self, Ignored, Level, Skipped},
};

/// The images of a folder, before anything is decoded.
#[derive(Debug, Default)]
pub struct Listing {
    /// Names of the labels as the system has them; empty: the images have no labels.
    pub classes: Vec<OsString>,
    pub train: Folder,
    pub test: Folder,
    /// Whether the division is the folder's own.
    pub official: bool,
    /// Classes without files.
    pub skipped: Vec<Skipped>,
    pub ignored: Ignored,
    /// More to say about what was read.
    pub remarks: Vec<String>,
}

/// The images below one folder.
struct Part {
    /// Name and images of each class.
    classes: Vec<(PathBuf, Vec<PathBuf>)>,
    /// Images without a class.
    images: Vec<PathBuf>,
    /// Folders where classes were expected, without images.
    empty: Vec<PathBuf>,
}

impl Listing {
    pub fn read(root: &Path) -> Result<Self> {
        let mut listing = Listing::default();
        let level = Level::read(root, &mut listing.ignored)?;
        let Some(split) = Split::of(&level, root)? else {
            let part = listing.part(level, root)?;
            listing.divide(part);
            return Ok(listing);
        };
        let inner = Level::read(&split.train, &mut listing.ignored)?;
        let train = listing.part(inner, &split.train)?;
        let Some(test) = &split.test else {
            listing.divide(train);
            return Ok(listing);
        };
        let inner = Level::read(test, &mut listing.ignored)?;
        listing.official(train, inner, test)?;
        if let Some(unread) = &split.unread {
            listing.remarks.push(format!("{} is not read", names([unread])));
        }
        Ok(listing)
    }

    /// Sorts what lies directly in `folder` into classes, or into images without one.
    fn part(&mut self, level: Level, folder: &Path) -> Result<Part> {
        let mut part = Part { classes: Vec::new(), images: level.images, empty: Vec::new() };
        for class in level.folders {
            // Its test images would be trained on.
            ensure!(
                !voc::is_voc(&class),
                "expected images or class folders, got {}, which has the layout of Pascal VOC (give --data {})",
                names([&class]),
                class.display()
            );
            let images = walk::images_below(&class, &mut self.ignored)?;
            match images.is_empty() {
                true => part.empty.push(class),
                false => part.classes.push((class, images)),
            }
        }
        let found: Vec<&PathBuf> = part.classes.iter().map(|(class, _)| class).collect();
        match (found.len(), part.images.len()) {
            (0, 0) => bail!(
                "{}: expected images, in sub-folders for classes or without, found none{}",
                folder.display(),
                self.ignored.then()
            ),
            (0, _) => {}
            (1, 0) if part.empty.is_empty() => {
                self.no_class(found[0])?;
                part.images = part.classes.remove(0).1;
            }
            (1, 0) => bail!(
                "expected at least two sub-folders of images, one for each class, got 1, {}; found no images in {}{} (to \
                 train without labels give --data {})",
                names(&found),
                names(&part.empty),
                self.ignored.then(),
                found[0].display()
            ),
            (1, _) => part.images.extend(part.classes.remove(0).1),
            (_, 0) => {}
            (_, n) => bail!(
                "{}: expected images in class folders, or no folders at all; got {n} images beside the folders {} (move \
                 them into a class folder, or away)",
                folder.display(),
                names(&found)
            ),
        }
        Ok(part)
    }

    /// A single folder is no class: there is nothing to tell it from.
    fn no_class(&mut self, folder: &Path) -> Result<()> {
        let level = Level::read(folder, &mut Ignored::default())?;
        let inside = Split::of(&level, folder)?.is_some_and(|split| split.test.is_some());
        ensure!(
            !inside,
            "expected class folders, got one folder that holds {} (give --data {})",
            names(&level.folders),
            folder.display()
        );
        let inner: Vec<&PathBuf> =
            level.folders.iter().filter(|f| split::holds_images(f)).collect();
        self.remarks.push(match inner.len() {
            0 | 1 => format!("all images lie in the one folder {}", names([folder])),
            _ => format!(
                "all images lie in the one folder {}; if {} are classes, give --data {}",
                names([folder]),
                names(&inner),
                folder.display()
            ),
        });
        Ok(())
    }

    /// Images without a division of their own: about a fifth of each class is for testing.
    fn divide(&mut self, part: Part) {
        let all = self.labelled(part);
        let (train, test) = draw::split(&all.labels);
        (self.train, self.test) = (all.pick(&train), all.pick(&test));
    }

    /// Images that come divided: the classes are those of `train`.
    fn official(&mut self, train: Part, level: Level, folder: &Path) -> Result<()> {
        self.official = true;
        let unlabelled = train.classes.is_empty();
        let empty = train.empty.clone();
        self.train = self.labelled(train);
        let mut outside = level.images;
        if unlabelled {
            let folders: Vec<&PathBuf> =
                level.folders.iter().filter(|f| split::holds_images(f)).collect();
            ensure!(
                folders.len() < 2,
                "{}: expected no classes, as in train, got {}",
                folder.display(),
                names(&folders)
            );
        }
        for class in level.folders {
            let images = walk::images_below(&class, &mut self.ignored)?;
            if images.is_empty() || unlabelled {
                outside.extend(images);
                continue;
            }
            let name = class.file_name();
            let Some(label) = self.classes.iter().position(|c| Some(c.as_os_str()) == name) else {
                ensure!(
                    empty.iter().any(|e| e.file_name() == name),
                    "{}: expected one of the {} classes of train, got {}",
                    class.display(),
                    self.classes.len(),
                    names([&class])
                );
                self.skipped.push((class, "no training image of this class was found".into()));
                continue;
            };
            images.into_iter().for_each(|image| self.test.push(image, label as u32));
        }
        let shown = folder.display();
        if unlabelled {
            outside.into_iter().for_each(|image| self.test.push(image, 0));
        } else if !outside.is_empty() {
            bail!(
                "{shown}: expected class folders as in train, got {} images outside of them (sort them into classes, or \
                 give --data the folder train alone)",
                outside.len()
            );
        }
        ensure!(
            self.test.len() > 0,
            "{shown}: expected images of the classes of train, found none{}",
            self.ignored.then()
        );
        Ok(())
    }

    /// The images of a part with their labels; it names the classes.
    fn labelled(&mut self, part: Part) -> Folder {
        let mut all = Folder::default();
        part.images.into_iter().for_each(|image| all.push(image, 0));
        for (class, images) in part.classes {
            let label = self.classes.len() as u32;
            self.classes.extend(class.file_name().map(OsString::from));
            images.into_iter().for_each(|image| all.push(image, label));
        }
        let why = "no image was found in this class";
        self.skipped.extend(part.empty.into_iter().map(|class| (class, why.into())));
        all
    }
}
