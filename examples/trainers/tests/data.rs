//! The examples' loaders: what they read, and what they say of files that they cannot read.

use std::{fs, io::Write, path::Path, sync::Arc};

use ser_reg_trainers::data::{self, Source, Wanted};
use tempfile::TempDir;

/// An IDX file: the magic number, the dimensions, the bytes.
fn idx(magic: u32, dims: &[u32], body: &[u8]) -> Vec<u8> {
    let header = std::iter::once(magic).chain(dims.iter().copied());
    let mut bytes: Vec<u8> = header.flat_map(u32::to_be_bytes).collect();
    bytes.extend_from_slice(body);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A folder with these files.
fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

/// Ten images of 2x2 whose pixels count up, labelled 0 to 9.
fn ten() -> (Vec<u8>, Vec<u8>) {
    let pixels: Vec<u8> = (0..40).collect();
    let labels: Vec<u8> = (0..10).collect();
    (idx(0x0803, &[10, 2, 2], &pixels), idx(0x0801, &[10], &labels))
}

fn error(path: &Path) -> String {
    let error = data::load(path, &Wanted::default()).expect_err("the data should be refused");
    format!("{error:#}")
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
}

#[test]
fn embedded_pictures_are_divided_by_index() {
    let data = data::load(&data::embedded(), &Wanted::default()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (8000, 2000));
    assert_eq!((data.bank.channels, data.bank.side), (1, 28));
    assert_says(&data.note, &["re-split", "t10k", "not comparable"]);
    let (mean, std) = data.bank.statistics()[0];
    // The published statistics of the whole file are .2868 and .3524.
    assert!((mean - 0.2868).abs() < 1e-3 && (std - 0.3524).abs() < 1e-3);
    // The first labels of the official test file.
    assert_eq!(data.bank.labels[..6], [9, 2, 1, 1, 6, 1]);
}

#[test]
fn idx_is_read_plain_and_gzipped() {
    let (images, labels) = ten();
    for (images, labels, suffix) in
        [(images.clone(), labels.clone(), ""), (gzip(&images), gzip(&labels), ".gz")]
    {
        let names =
            [format!("t10k-images-idx3-ubyte{suffix}"), format!("t10k-labels-idx1-ubyte{suffix}")];
        let dir = folder(&[(&names[0], images), (&names[1], labels)]);
        for path in [dir.path().to_path_buf(), dir.path().join(&names[0])] {
            let data = data::load(&path, &Wanted::default()).unwrap();
            assert_eq!(data.bank.labels, [0, 1, 2, 3, 4, 5, 6, 7]);
            assert_eq!(data.test.labels, [8, 9]);
            assert_eq!(data.test.get(1), [36, 37, 38, 39]);
        }
    }
}

#[test]
fn a_file_that_lies_there_plain_and_gzipped_is_read_once() {
    let (images, labels) = ten();
    let dir = folder(&[
        ("t10k-images-idx3-ubyte", images.clone()),
        ("t10k-images-idx3-ubyte.gz", gzip(&images)),
        ("t10k-labels-idx1-ubyte", labels.clone()),
        ("t10k-labels-idx1-ubyte.gz", gzip(&labels)),
    ]);
    let data = data::load(dir.path(), &Wanted::default()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (8, 2));
}

#[test]
fn idx_keeps_an_official_split() {
    let (images, labels) = ten();
    let dir = folder(&[
        ("train-images-idx3-ubyte", images.clone()),
        ("train-labels-idx1-ubyte", labels.clone()),
        ("t10k-images-idx3-ubyte", images),
        ("t10k-labels-idx1-ubyte", labels),
    ]);
    let data = data::load(dir.path(), &Wanted::default()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (10, 10));
    assert_says(&data.note, &["official split"]);
}

#[test]
fn damaged_idx_is_refused_with_what_was_expected() {
    let (images, labels) = ten();
    let zipped = gzip(&images);
    let refused = |images: &[u8], labels: &[u8]| {
        let dir = folder(&[
            ("t10k-images-idx3-ubyte", images.to_vec()),
            ("t10k-labels-idx1-ubyte", labels.to_vec()),
        ]);
        error(dir.path())
    };
    let truncated = "expected 40 bytes after it, got 36";
    assert_says(&refused(&images[..52], &labels), &["t10k-images", truncated]);
    assert_says(&refused(&images[..6], &labels), &["truncated", "header", "6 bytes"]);
    assert_says(&refused(&[], &labels), &["truncated", "0 bytes"]);
    assert_says(&refused(&zipped[..zipped.len() / 2], &labels), &["gzip"]);
    assert_says(
        &refused(&idx(0x0d03, &[10, 2, 2], &[0; 40]), &labels),
        &["unknown layout of images", "0x00000803", "0x00000d03"],
    );
    assert_says(
        &refused(&images, &idx(0x0802, &[10, 1], &[0; 10])),
        &["t10k-labels", "unknown layout of labels", "0x00000801", "0x00000802"],
    );
    assert_says(&refused(&images, &idx(0x0801, &[9], &[0; 9])), &["expected 10 labels", "got 9"]);
    assert_says(&refused(&idx(0x0803, &[u32::MAX; 3], &[0; 8]), &labels), &["too many", "got 8"]);
    assert_says(&refused(&idx(0x0803, &[2, 2, 3], &[0; 12]), &labels), &["square", "2x3"]);
}

#[test]
fn missing_files_are_named() {
    let dir = folder(&[]);
    assert_says(&error(&dir.path().join("nowhere")), &["nowhere", "no such file"]);
    assert_says(&error(dir.path()), &["idx3-ubyte", "CIFAR-10", "sub-folders"]);
    let (images, _) = ten();
    let dir = folder(&[("t10k-images-idx3-ubyte", images.clone())]);
    assert_says(&error(dir.path()), &["t10k-labels-idx1-ubyte", "neither"]);
    let dir = folder(&[("images", images)]);
    assert_says(&error(&dir.path().join("images")), &["labels beside it", "labels.gz", "neither"]);
}

/// `count` records whose labels count up from `first`.
fn cifar(first: u8, count: u8) -> Vec<u8> {
    let record = |i: u8| {
        let mut record = vec![first + i];
        for channel in 0..3 {
            record.extend([10 * i + channel; 1024]);
        }
        record
    };
    (0..count).flat_map(record).collect()
}

#[test]
fn cifar_is_read_by_record() {
    let dir = folder(&[
        ("data_batch_1.bin", cifar(0, 4)),
        ("data_batch_2.bin", cifar(4, 3)),
        ("test_batch.bin", cifar(1, 2)),
        ("batches.meta.txt", b"cat\n".to_vec()),
    ]);
    let data = data::load(dir.path(), &Wanted::default()).unwrap();
    assert_eq!(data.bank.labels, [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(data.test.labels, [1, 2]);
    assert_eq!((data.bank.channels, data.bank.side), (3, 32));
    assert_eq!(data.bank.get(5)[1024..1026], [11, 11]);
}

#[test]
fn damaged_cifar_is_refused() {
    let whole = cifar(0, 5);
    let truncated = folder(&[("data_batch_1.bin", whole[..9000].to_vec())]);
    assert_says(&error(truncated.path()), &["truncated", "1 + 3072", "9000"]);
    let hundred = folder(&[("train_batch.bin", vec![0; 2 * 3074])]);
    assert_says(&error(hundred.path()), &["unknown label layout", "CIFAR-100"]);
    let labels = folder(&[("data_batch_1.bin", cifar(8, 5))]);
    assert_says(&error(labels.path()), &["0 to 9", "got 10 in record 2"]);
    let empty = folder(&[("data_batch_1.bin", vec![])]);
    assert_says(&error(empty.path()), &["1 + 3072", "0 bytes"]);
}

fn png(width: u32, height: u32, color: [u8; 3]) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(width, height, image::Rgb(color))
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

#[test]
fn class_folders_are_read_in_order() {
    let red = || png(40, 20, [200, 10, 0]);
    let blue = || png(8, 64, [0, 10, 200]);
    let names: Vec<String> = (0..6).map(|i| format!("{i}.png")).collect();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for name in &names {
        files.push((format!("blue/{name}"), blue()));
        files.push((format!("red/{name}"), red()));
    }
    files.push(("red/notes.txt".into(), b"not an image".to_vec()));
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    let data = data::load(folder(&files).path(), &Wanted::default()).unwrap();
    assert_eq!(data.bank.labels, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
    assert_eq!(data.test.labels, [0, 1]);
    assert_eq!((data.test.channels, data.test.side), (3, 32));
    let planes = |i: usize| [0, 1024, 2048].map(|at| data.test.get(i)[at]);
    assert_eq!((planes(0), planes(1)), ([0, 10, 200], [200, 10, 0]));
}

#[test]
fn unreadable_pictures_are_named_and_counted() {
    let ok = || png(4, 4, [1, 2, 3]);
    let listed = [
        ("a/1.png", ok()),
        ("a/2.png", ok()[..30].to_vec()),
        ("a/3.png", ok()),
        ("b/1.png", b"no image".to_vec()),
        ("b/2.jpg", jpeg(40, 30)),
        ("b/3.jpg", cut(&jpeg(40, 30))),
        ("b/4.png", vec![]),
        ("b/5.png", ok()),
    ];
    let dir = folder(&listed);
    let data = data::load(dir.path(), &Wanted::default()).unwrap();
    // The fifth file of a class is the test image, whatever can be read.
    assert_eq!(data.bank.labels, [0, 0, 1]);
    assert_eq!(data.test.labels, [1]);
    assert_says(&data.note, &["4 skipped"]);
    let names: Vec<String> = data.skipped.iter().map(|(p, _)| name(p)).collect();
    assert_eq!(names, ["a/2.png", "b/1.png", "b/3.jpg", "b/4.png"]);
    for ((path, why), expected) in data.skipped.iter().zip([
        "truncated or damaged",
        "format could not be determined",
        "the JPEG data do not end",
        "format could not be determined",
    ]) {
        assert!(why.contains(expected), "{}: {why}", path.display());
    }
}

/// The last two parts of a path.
fn name(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(2).collect();
    let parts: Vec<_> = parts.iter().rev().map(|p| p.to_string_lossy()).collect();
    parts.join("/")
}

fn jpeg(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([x as u8 * 5, y as u8 * 7, (x * y) as u8])
    })
    .write_to(&mut bytes, image::ImageFormat::Jpeg)
    .unwrap();
    bytes.into_inner()
}

/// The file without its second half of pixels.
fn cut(jpeg: &[u8]) -> Vec<u8> {
    jpeg[..jpeg.len() - 60].to_vec()
}

#[test]
fn the_end_of_a_thumbnail_is_not_the_end_of_a_picture() {
    // A segment of the header that holds the end of an image of its own.
    let whole = jpeg(40, 30);
    let mut nested = whole[..2].to_vec();
    nested.extend([0xff, 0xe1, 0, 6, 0xff, 0xd8, 0xff, 0xd9]);
    nested.extend(&whole[2..]);
    let load = |third: Vec<u8>| {
        let dir = folder(&[
            ("a/1.jpg", nested.clone()),
            ("a/2.jpg", third),
            ("b/1.jpg", whole.clone()),
            ("b/2.jpg", whole.clone()),
            ("b/3.jpg", whole.clone()),
            ("b/4.jpg", whole.clone()),
            ("b/5.jpg", whole.clone()),
        ]);
        data::load(dir.path(), &Wanted::default()).unwrap()
    };
    assert_eq!(load(nested.clone()).skipped, []);
    let skipped = load(cut(&nested)).skipped;
    assert_eq!(skipped.len(), 1);
    assert_says(&skipped[0].1, &["do not end"]);
}

#[test]
fn damaged_class_folders_are_refused() {
    let ok = || png(4, 4, [1, 2, 3]);
    let damaged = folder(&[("a/1.png", ok()), ("b/1.png", ok()[..30].to_vec())]);
    assert_says(
        &error(damaged.path()),
        &["at least two classes", "got 1", "b/1.png", "truncated or damaged"],
    );
    let all = folder(&[("a/1.png", vec![]), ("b/1.png", vec![])]);
    assert_says(&error(all.path()), &["none of 2", "a/1.png"]);
    let empty = folder(&[("a/1.png", ok()), ("b/notes.txt", vec![])]);
    assert_says(&error(empty.path()), &["got 1", "b: expected PNG or JPEG"]);
    let single = folder(&[("a/1.png", ok())]);
    assert_says(&error(single.path()), &["at least two sub-folders", "got 1"]);
    let few = folder(&[("a/1.png", ok()), ("b/1.png", ok())]);
    assert_says(&error(few.path()), &["one test image", "got 2 and 0"]);
    let (images, _) = ten();
    let one_label = folder(&[
        ("t10k-images-idx3-ubyte", images),
        ("t10k-labels-idx1-ubyte", idx(0x0801, &[10], &[4; 10])),
    ]);
    assert_says(&error(one_label.path()), &["at least two classes"]);
}

/// Five images of one color for each class.
fn five(classes: &[(&str, [u8; 3])]) -> Vec<(String, Vec<u8>)> {
    let files = classes.iter().flat_map(|(class, color)| {
        (0..5).map(move |i| (format!("{class}/{i}.png"), png(12, 9, *color)))
    });
    files.collect()
}

fn written(files: &[(String, Vec<u8>)]) -> TempDir {
    let files: Vec<_> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    folder(&files)
}

#[test]
fn a_class_of_which_nothing_can_be_read_is_left_out() {
    let mut files = five(&[("a", [1; 3]), ("b", [2; 3]), ("c", [3; 3])]);
    for (name, bytes) in &mut files {
        if name.starts_with('b') {
            bytes.truncate(20);
        }
    }
    files.push(("d/notes.txt".into(), vec![]));
    let data = data::load(written(&files).path(), &Wanted::default()).unwrap();
    assert_eq!(data.classes, ["a", "c"]);
    assert_eq!(data.bank.labels, [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(data.test.labels, [0, 1]);
    assert_eq!(data.test.get(1)[0], 3);
    // Five files and two classes.
    assert_eq!(data.skipped.len(), 7);
}

#[test]
fn train_and_val_are_an_official_split() {
    let classes = [("train/a", [1; 3]), ("train/b", [2; 3]), ("val/b", [9; 3])];
    for wanted in [Wanted::default(), Wanted::streamed(16)] {
        let data = data::load(written(&five(&classes)).path(), &wanted).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (10, 5));
        assert_eq!(data.test.labels, [1; 5]);
        assert_eq!((data.bank.get(9)[0], data.test.get(0)[0]), (2, 9));
        assert_says(&data.note, &["official split", "10 training and 5 test"]);
    }
    let unknown = [("train/a", [1; 3]), ("train/b", [2; 3]), ("val/cat", [9; 3])];
    assert_says(
        &error(written(&five(&unknown)).path()),
        &["val/cat", "expected one of the 2 classes of train", "got cat"],
    );
    // Two classes that happen to be called so.
    let data = data::load(
        written(&five(&[("train", [1; 3]), ("val", [2; 3])])).path(),
        &Wanted::default(),
    );
    assert_eq!(data.unwrap().classes, ["train", "val"]);
}

#[test]
fn a_folder_can_stay_in_its_files() {
    let mut files = five(&[("a", [1; 3]), ("b", [2; 3])]);
    files[1].1.truncate(20);
    let dir = written(&files);
    let wanted = Wanted { bank_limit: 4, test_limit: 1, ..Wanted::streamed(24) };
    let data = data::load(dir.path(), &wanted).unwrap();
    // Every file is one to train on until it is found damaged.
    assert_eq!(data.train.len(), 8);
    assert_eq!(data.train.labels(), [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!((data.bank.side, data.test.side, data.test.len()), (24, 24, 1));
    // At even distances: files 0, 2, 4 and 6.
    assert_eq!(data.bank.labels, [0, 0, 1, 1]);
    assert_eq!(data.train.picture(0).unwrap().size(), (9, 12));
    let why = data.train.picture(1).err().unwrap();
    assert_says(&format!("{why:#}"), &["truncated or damaged"]);
    assert_eq!(name(&data.train.path(1)), "a/1.png");
}

#[test]
fn pictures_of_any_depth_and_size_are_read() {
    let encode = |picture: image::DynamicImage| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let gray = image::GrayImage::from_pixel(5, 7, image::Luma([90]));
    let alpha = image::RgbaImage::from_pixel(7, 5, image::Rgba([10, 20, 30, 40]));
    let deep = image::ImageBuffer::from_pixel(6, 6, image::Rgb([0u16, 257 * 100, 65535]));
    let dir = folder(&[
        ("a/1.png", encode(gray.into())),
        ("a/2.png", encode(alpha.into())),
        ("a/3.png", encode(deep.into())),
        ("a/4.png", png(1, 1, [1, 2, 3])),
        ("a/5.png", png(400, 1, [4, 5, 6])),
        ("b/1.jpeg", png(3, 3, [7, 8, 9])),
    ]);
    for wanted in [Wanted::default(), Wanted::streamed(32)] {
        let data = data::load(dir.path(), &wanted).unwrap();
        assert_eq!(data.skipped, []);
        let color = |images: &data::Images, i: usize| [0, 1024, 2048].map(|at| images.get(i)[at]);
        assert_eq!(color(&data.bank, 0), [90, 90, 90]);
        assert_eq!(color(&data.bank, 1), [10, 20, 30]);
        assert_eq!(color(&data.bank, 2), [0, 100, 255]);
        assert_eq!(color(&data.bank, 3), [1, 2, 3]);
        // Its name says JPEG, its content PNG.
        assert_eq!(color(&data.bank, 4), [7, 8, 9]);
        assert_eq!(color(&data.test, 0), [4, 5, 6]);
    }
}

#[test]
fn evaluation_may_want_other_pictures_than_training() {
    let path = data::embedded();
    let as_they_are = data::load(&path, &Wanted::default()).unwrap();
    match &as_they_are.train {
        Source::Memory(train) => assert!(Arc::ptr_eq(train, &as_they_are.bank)),
        Source::Folder(_) => panic!("IDX files are read into memory"),
    }
    let few = data::load(&path, &Wanted::streamed(56)).unwrap();
    assert_eq!(few.train.len(), 8000);
    assert_eq!((few.bank.len(), few.bank.side), (5000, 56));
    assert_eq!((few.test.len(), few.test.side), (1000, 56));
    // Twice as large is not another image.
    let mean = |p: &[u8]| p.iter().map(|&p| f64::from(p)).sum::<f64>() / p.len() as f64;
    let (small, large) = (as_they_are.bank.get(0), few.bank.get(0));
    assert!((mean(small) - mean(large)).abs() < 1.0);

    let some = as_they_are.take(100, 10);
    assert_eq!((some.train.len(), some.bank.len(), some.test.len()), (100, 100, 10));
    assert!(matches!(&some.train, Source::Memory(train) if Arc::ptr_eq(train, &some.bank)));
}
