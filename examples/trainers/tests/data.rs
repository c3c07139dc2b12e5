//! IDX files and CIFAR-10 batches: what is read, how it is divided, and what is said of files that cannot be read.

mod files;

#[cfg(unix)]
use std::fs;
use std::{io::Write, sync::Arc};

use files::{assert_says, error, folder, load, png};
use ser_reg_trainers::data::{self, Images, Source, Wanted};

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

/// Ten images of 2x2 whose pixels count up, sorted by label: five of 0, five of 1.
fn ten() -> (Vec<u8>, Vec<u8>) {
    let pixels: Vec<u8> = (0..40).collect();
    let labels: Vec<u8> = (0..10).map(|i| i / 5).collect();
    (idx(0x0803, &[10, 2, 2], &pixels), idx(0x0801, &[10], &labels))
}

#[test]
fn embedded_images_are_divided_by_class() {
    let data = data::load(&data::embedded(), &Wanted::default()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (8000, 2000));
    assert_eq!((data.bank.channels, data.bank.side), (1, 28));
    assert_says(&data.note, &["re-split", "official test file", "not comparable"]);
    let (mean, std) = data.bank.statistics()[0];
    // The published statistics of the whole file are .2868 and .3524.
    assert!((mean - 0.2868).abs() < 2e-3 && (std - 0.3524).abs() < 2e-3);
    let of = |images: &Images, class| images.labels.iter().filter(|l| **l == class).count();
    for class in 0..10 {
        assert_eq!((of(&data.bank, class), of(&data.test, class)), (800, 200));
    }
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
            assert_eq!(data.bank.labels, [0, 0, 0, 0, 1, 1, 1, 1]);
            assert_eq!(data.test.labels, [0, 1]);
            // The first pixel of image i is 4 i, and its label i / 5.
            let mut seen = Vec::new();
            for images in [&*data.bank, &data.test] {
                for i in 0..images.len() {
                    let first = images.get(i)[0];
                    assert_eq!(u32::from(first / 20), images.labels[i]);
                    assert_eq!(images.get(i)[3], first + 3);
                    seen.push(first);
                }
            }
            seen.sort();
            assert_eq!(seen, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]);
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
    let dir = folder::<&str>(&[]);
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
    let one_label = folder(&[
        ("t10k-images-idx3-ubyte", ten().0),
        ("t10k-labels-idx1-ubyte", idx(0x0801, &[10], &[4; 10])),
    ]);
    assert_says(&error(one_label.path()), &["at least two classes"]);
}

#[test]
fn a_file_sorted_by_label_is_divided_by_class() {
    let labels: Vec<u8> = (0..100).map(|i| i / 10).collect();
    let pixels: Vec<u8> = (0..400).map(|i| (i / 4) as u8).collect();
    let dir = folder(&[
        ("train-images-idx3-ubyte", idx(0x0803, &[100, 2, 2], &pixels)),
        ("train-labels-idx1-ubyte", idx(0x0801, &[100], &labels)),
    ]);
    let first = load(dir.path());
    let each = |n: u32| -> Vec<u32> { (0..10).flat_map(|c| vec![c; n as usize]).collect() };
    assert_eq!(first.bank.labels, each(8));
    assert_eq!(first.test.labels, each(2));
    // The same for every run.
    assert_eq!(first.test.pixels, load(dir.path()).test.pixels);
    assert_says(&first.note, &["re-split: 80 images train, 20 test", "seeded fifth", "10 classes"]);
}

#[test]
fn test_classes_without_training_images_are_named() {
    let pixels = [0; 40];
    let pair = |part: &str, labels: Vec<u8>| {
        [
            (format!("{part}-images-idx3-ubyte"), idx(0x0803, &[10, 2, 2], &pixels)),
            (format!("{part}-labels-idx1-ubyte"), idx(0x0801, &[10], &labels)),
        ]
    };
    let train = pair("train", (0..10).map(|i| i % 2).collect());
    let some = pair("t10k", vec![0, 1, 7, 7, 7, 1, 0, 8, 0, 1]);
    let data = load(folder(&[train.clone(), some].concat()).path());
    assert_says(&data.note, &["4 test images are of classes without training images, [7, 8]"]);
    let none = pair("t10k", vec![5; 10]);
    let message = error(folder(&[train, none].concat()).path());
    assert_says(
        &message,
        &["expected test images of the classes of the training images, got none"],
    );
}

#[test]
fn several_sets_in_one_folder_are_refused() {
    let (images, labels) = ten();
    let pair = |set: &str| {
        [
            (format!("{set}-images-idx3-ubyte"), images.clone()),
            (format!("{set}-labels-idx1-ubyte"), labels.clone()),
        ]
    };
    let refused = |files: Vec<(String, Vec<u8>)>, parts: &[&str]| {
        let dir = folder(&files);
        assert_says(&error(dir.path()), &[&["expected one data set, got"], parts].concat());
        dir
    };
    let two = [pair("letters-train"), pair("letters-t10k"), pair("digits-train")].concat();
    let letters = "letters-train-images-idx3-ubyte and letters-t10k-images-idx3-ubyte";
    let dir = refused(two, &["got 2", letters, "digits-train-images", "--data one of the files"]);
    // One of the files alone is a set.
    let one = load(&dir.path().join("digits-train-images-idx3-ubyte"));
    assert_eq!((one.train.len(), one.test.len()), (8, 2));
    refused([pair("test"), pair("t10k"), pair("train")].concat(), &["got 2"]);
    refused([pair("a"), pair("b")].concat(), &["got 2"]);
    let mixed = [pair("train").to_vec(), vec![("data_batch_1.bin".into(), cifar(0, 4))]].concat();
    refused(mixed, &["train-images-idx3-ubyte", "data_batch_1.bin"]);
    let samples = [pair("train").to_vec(), vec![("samples/1.png".into(), png(4, 4, [1; 3]))]];
    refused(samples.concat(), &["got 2", "image files"]);
    let batches = vec![
        ("data_batch_1.bin".to_string(), cifar(0, 4)),
        ("old_data_batch_1.bin".to_string(), cifar(0, 4)),
    ];
    refused(batches, &["data_batch_1.bin; old_data_batch_1.bin"]);
}

#[cfg(unix)]
#[test]
fn labels_are_found_beside_a_name_that_is_no_text() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let (images, labels) = ten();
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in
        [(&b"m\xe4r-images-idx3-ubyte"[..], images), (b"m\xe4r-labels-idx1-ubyte", labels)]
    {
        fs::write(dir.path().join(OsStr::from_bytes(name)), bytes).unwrap();
    }
    assert_eq!(load(dir.path()).train.len(), 8);
}

#[test]
fn a_part_of_an_ordered_set_keeps_all_classes() {
    let labels: Vec<u8> = (0..200).map(|i| i % 10).collect();
    let dir = folder(&[
        ("train-images-idx3-ubyte", idx(0x0803, &[200, 1, 1], &[7; 200])),
        ("train-labels-idx1-ubyte", idx(0x0801, &[200], &labels)),
    ]);
    let of = |images: &Images, class| images.labels.iter().filter(|l| **l == class).count();
    // Every second image would be of an even class.
    let data = load(dir.path()).take(80, 20);
    let some = data.take(40, 10);
    for class in 0..10 {
        assert_eq!((of(&some.bank, class), of(&some.test, class)), (4, 1));
    }
    let limited = Wanted { bank_limit: 80, test_limit: 10, ..Wanted::default() };
    let limited = data::load(dir.path(), &limited).unwrap();
    for class in 0..10 {
        assert_eq!((of(&limited.bank, class), of(&limited.test, class)), (8, 1));
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
    let of = |images: &Images, class| images.labels.iter().filter(|l| **l == class).count();
    for class in 0..10 {
        assert_eq!((of(&few.bank, class), of(&few.test, class)), (500, 100));
    }
    // Twice as large is not another image.
    let all = Wanted { bank_limit: usize::MAX, ..Wanted::streamed(56) };
    let large = data::load(&path, &all).unwrap().bank;
    let mean = |p: &[u8]| p.iter().map(|&p| f64::from(p)).sum::<f64>() / p.len() as f64;
    assert!((mean(as_they_are.bank.get(0)) - mean(large.get(0))).abs() < 1.0);

    let some = as_they_are.take(100, 10);
    assert_eq!((some.train.len(), some.bank.len(), some.test.len()), (100, 100, 10));
    assert!(matches!(&some.train, Source::Memory(train) if Arc::ptr_eq(train, &some.bank)));
}
