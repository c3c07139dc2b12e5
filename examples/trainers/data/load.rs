//! Reads a data set, whatever of the layouts it has.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail, ensure};

use super::{
    cifar, draw,
    folder::Folder,
    idx,
    images::Images,
    layout::Listing,
    note::{self, Division},
    set::{self, Set},
    source::{Data, Source, Wanted},
    split, voc,
    walk::{Ignored, Level, Skipped, shown},
};

/// Reads `path`: an IDX file, a CIFAR-10 batch, or a folder of such files or of images; of a Pascal VOC folder
/// the training images, without labels.
///
/// # Errors
/// If there is nothing that can be read, if it can be read in two ways, or if it is too little to train and test on.
pub fn load(path: &Path, wanted: &Wanted) -> Result<Data> {
    let checked = || {
        let data = read(path, wanted)?;
        let (train, test) = (data.train.len(), data.test.len());
        ensure!(
            train >= 2 && test >= 1 && !data.bank.is_empty(),
            "expected at least two training images and one test image (a class of three images gives one), got {train} \
             and {test} ({})",
            data.note
        );
        Ok(data)
    };
    checked().with_context(|| format!("--data: cannot read {}", path.display()))
}

fn read(path: &Path, wanted: &Wanted) -> Result<Data> {
    ensure!(
        path.exists(),
        "no such file or folder; the published crate leaves the images out, so run the example in a clone of the \
         repository, or give --data a folder of IDX files, of CIFAR-10 binaries, or of images"
    );
    if path.is_file() {
        let is_bin = path.extension().is_some_and(|e| e == "bin");
        let images = if is_bin { cifar::read(path)? } else { idx::read(path)? };
        return numbered(set::divide(&images), Division::Drawn("the file"), wanted);
    }
    if voc::is_voc(path) {
        return windows(path, wanted);
    }
    let mut ignored = Ignored::default();
    let level = Level::read(path, &mut ignored)?;
    let files =
        |test: fn(&Path) -> bool| level.others.iter().filter(|p| test(p)).cloned().collect();
    let (idx_sets, cifar_sets) =
        (Set::all(files(idx::is_images)), Set::all(files(cifar::is_batch)));
    let sets: Vec<&Set> = idx_sets.iter().chain(&cifar_sets).collect();
    let has_images = || !level.images.is_empty() || level.folders.iter().any(split::holds_images);
    if let [set] = sets[..]
        && !has_images()
    {
        let read = if cifar_sets.is_empty() { idx::read } else { cifar::read };
        let (parts, division) = set.read(read)?;
        return numbered(parts, division, wanted);
    }
    if !sets.is_empty() {
        let name = |p: &Path| p.file_name().map(shown).unwrap_or_default();
        let mut found: Vec<String> = sets
            .iter()
            .map(|set| set.files().iter().map(|f| name(f)).collect::<Vec<_>>().join(" and "))
            .collect();
        if has_images() {
            found.push("image files".into());
        }
        bail!(
            "expected one data set, got {}: {} (give --data one of the files, or a folder with one of the sets)",
            found.len(),
            found.join("; ")
        );
    }
    ensure!(
        !level.images.is_empty() || !level.folders.is_empty(),
        "expected *-images-idx3-ubyte[.gz] with its labels, *_batch*.bin (CIFAR-10), or images, in sub-folders for \
         classes or without; found none of these{}",
        ignored.then()
    );
    let listing = Listing::read(path)?;
    match wanted.stream {
        true => streamed(listing, wanted),
        false => decoded(listing, wanted),
    }
}

/// Images whose labels are numbers.
fn numbered(parts: (Images, Images), division: Division, wanted: &Wanted) -> Result<Data> {
    let (train, test) = &parts;
    ensure!(train.are_labelled(), "expected at least two classes, got images of one");
    let unknown: Vec<u32> =
        test.labels.iter().copied().filter(|label| !train.labels.contains(label)).collect();
    ensure!(
        unknown.len() < test.len() || test.is_empty(),
        "expected test images of the classes of the training images, got none"
    );
    let labels = train.labels.iter().chain(&test.labels);
    let classes = labels.max().map_or(0, |&last| last + 1);
    let classes: Vec<String> = (0..classes).map(|c| c.to_string()).collect();
    let remark = match unknown.len() {
        0 => String::new(),
        n => {
            let mut labels = unknown;
            labels.sort_unstable();
            labels.dedup();
            format!(
                "{n} test images are of classes without training images, {labels:?}, and always count as errors"
            )
        }
    };
    let note =
        [division.text(train.len(), test.len()), format!("{} classes", classes.len()), remark];
    in_memory(parts, classes, note::joined(note), wanted)
}

/// Images that are decoded already: only evaluation may want them larger or fewer.
fn in_memory(
    (train, test): (Images, Images),
    classes: Vec<String>,
    note: String,
    wanted: &Wanted,
) -> Result<Data> {
    let scaled = |images: &Images, limit: usize| -> Result<Images> {
        let some = images.draw(limit);
        match wanted.side {
            Some(side) if side != some.side => some.scaled(side),
            _ => Ok(some),
        }
    };
    let as_it_is = wanted.bank_limit >= train.len() && wanted.side.is_none_or(|s| s == train.side);
    let constant = note::constant(train.constant() + test.constant(), train.len() + test.len());
    let train = Arc::new(train);
    Ok(Data {
        bank: match as_it_is {
            true => train.clone(),
            false => Arc::new(scaled(&train, wanted.bank_limit)?),
        },
        train: Source::Memory(train),
        test: scaled(&test, wanted.test_limit)?,
        classes,
        note: note::joined([note, constant]),
        skipped: Vec::new(),
    })
}

/// Side of the images of a folder in memory.
const SIDE: usize = 32;
/// What evaluation sees of a large image: 224 of 256 pixels of its shorter side.
const MIDDLE: f64 = 224.0 / 256.0;

/// A folder, all of it decoded; classes of which nothing can be read are left out.
fn decoded(listing: Listing, wanted: &Wanted) -> Result<Data> {
    let side = wanted.side.unwrap_or(SIDE);
    let mut skipped = listing.skipped.clone();
    let mut decode = |part: &Folder, what| part.decode(side, 1.0, what, &mut skipped);
    let mut train = decode(&listing.train, "training")?;
    let mut test = decode(&listing.test, "test")?;
    ensure_some(&skipped, train.len(), listing.train.len())?;
    let mut classes = Vec::new();
    if !listing.classes.is_empty() {
        // The new label of each class, where it keeps one.
        let mut labels = Vec::new();
        for (label, class) in listing.classes.iter().enumerate() {
            let kept = train.labels.contains(&(label as u32));
            labels.push(kept.then_some(classes.len() as u32));
            match kept {
                true => classes.push(shown(class)),
                false => skipped.push((class.into(), "no training image of it can be read".into())),
            }
        }
        ensure!(
            classes.len() >= 2,
            "expected at least two classes whose images can be read, got {}; {}",
            classes.len(),
            note::named(&skipped)
        );
        train.relabel(&labels);
        test.relabel(&labels);
    }
    let text = division(&listing).text(train.len(), test.len());
    let note = describe(&listing, text, &classes, &skipped);
    Ok(Data { skipped, ..in_memory((train, test), classes, note, wanted)? })
}

/// The training images of a Pascal VOC folder, without labels: windows, or whole images where they are streamed. A seeded fifth
/// of the training images takes the place of test images, because those of the folder must not be seen.
fn windows(root: &Path, wanted: &Wanted) -> Result<Data> {
    let sets = voc::Sets::read(root)?;
    let files: Vec<_> = sets.train.into_iter().map(|named| named.image).collect();
    let (train, test) = draw::split(&vec![0; files.len()]);
    let remark = format!(
        "Pascal VOC: the images are the {} of {}, a seeded fifth of them tests; no other image is read",
        files.len(),
        sets.train_file
    );
    let part = |indices: &[usize]| indices.iter().map(|&i| files[i].clone()).collect::<Vec<_>>();
    let (train, test) = (part(&train), part(&test));
    let mut skipped = sets.skipped;
    if wanted.stream {
        let folder = |files: Vec<_>| Folder { labels: vec![0; files.len()], files };
        let remarks = [vec![remark], sets.remarks].concat();
        let (train, test) = (folder(train), folder(test));
        return streamed(Listing { train, test, skipped, remarks, ..Default::default() }, wanted);
    }
    let side = wanted.side.unwrap_or(SIDE);
    let files = train.len();
    let train = voc::windows(&train, side, &mut skipped)?;
    let test = voc::windows(&test, side, &mut skipped)?;
    ensure_some(&skipped, train.len(), files)?;
    let text = format!("{} windows train, {} test", train.len(), test.len());
    let note = [text, remark, note::classes(&[])].into_iter().chain(sets.remarks);
    let note = note::joined(note.chain([note::count(&skipped)]));
    Ok(Data { skipped, ..in_memory((train, test), Vec::new(), note, wanted)? })
}

/// A folder whose images are decoded when they are needed; those of the evaluation are, now.
fn streamed(listing: Listing, wanted: &Wanted) -> Result<Data> {
    let side = wanted.side.unwrap_or(SIDE);
    let mut skipped = listing.skipped.clone();
    let drawn = |part: &Folder, limit| part.pick(&draw::by_class(&part.labels, limit, draw::SEED));
    let bank = drawn(&listing.train, wanted.bank_limit);
    let test = drawn(&listing.test, wanted.test_limit);
    let mut decode = |part: &Folder, what| part.decode(side, MIDDLE, what, &mut skipped);
    let bank_images = decode(&bank, "training")?;
    let test = decode(&test, "test")?;
    ensure_some(&skipped, bank_images.len(), bank.len())?;
    let text = format!(
        "{}; evaluated with {} and {} of them, drawn by class",
        division(&listing).text(listing.train.len(), listing.test.len()),
        bank_images.len(),
        test.len()
    );
    let classes: Vec<String> = listing.classes.iter().map(|class| shown(class)).collect();
    let constant = bank_images.constant() + test.constant();
    let note = describe(&listing, text, &classes, &skipped);
    Ok(Data {
        note: note::joined([note, note::constant(constant, bank_images.len() + test.len())]),
        train: Source::Folder(Arc::new(listing.train)),
        bank: Arc::new(bank_images),
        test,
        classes,
        skipped,
    })
}

fn division(listing: &Listing) -> Division {
    match (listing.official, listing.classes.is_empty()) {
        (true, _) => Division::Official,
        (false, false) => Division::Drawn("the folder"),
        (false, true) => Division::Unlabelled,
    }
}

fn describe(listing: &Listing, text: String, classes: &[String], skipped: &[Skipped]) -> String {
    let before = [text, note::classes(classes)].into_iter();
    let after = [listing.ignored.text(), note::count(skipped)];
    note::joined(before.chain(listing.remarks.clone()).chain(after))
}

fn ensure_some(skipped: &[Skipped], read: usize, files: usize) -> Result<()> {
    ensure!(read > 0, "none of {files} training images can be read; {}", note::named(skipped));
    Ok(())
}
