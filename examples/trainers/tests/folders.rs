//! Folders of images: classes or none, a division or none, recognized or refused, and what is said about them.

mod files;

use files::{assert_says, encoded, error, filled, folder, jpeg, load, name, png, ramp};
use image::ImageFormat;
use ser_reg_trainers::data::{self, Wanted};

#[test]
fn class_folders_are_read_in_order() {
    let mut files = filled(6, &[("blue", [0, 10, 200]), ("red", [200, 10, 0])]);
    files.push(("red/notes.txt".into(), b"not an image".to_vec()));
    let data = load(folder(&files).path());
    assert_eq!(data.bank.labels, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
    assert_eq!(data.test.labels, [0, 1]);
    assert_eq!((data.test.channels, data.test.side), (3, 32));
    let planes = |i: usize| [0, 1024, 2048].map(|at| data.test.get(i)[at]);
    assert_eq!((planes(0), planes(1)), ([0, 10, 200], [200, 10, 0]));
    assert_eq!(data.classes, ["blue", "red"]);
    let parts = ["re-split: 10 images train, 2 test", "2 classes: blue, red"];
    assert_says(&data.note, &[&parts[..], &["ignored 1 file: 1 .txt"]].concat());
}

#[test]
fn images_of_a_class_may_lie_deeper() {
    let files = filled(
        5,
        &[("a", [1; 3]), ("a/more", [2; 3]), ("a/more/most", [3; 3]), ("b/only/here", [4; 3])],
    );
    let data = load(folder(&files).path());
    assert_eq!(data.classes, ["a", "b"]);
    assert_eq!((data.train.len(), data.test.len()), (12 + 4, 3 + 1));
    let one = [filled(5, &[("a", [1; 3])]), vec![("b/x/1.png".into(), png(3, 3, [2; 3]))]].concat();
    assert_eq!(load(folder(&one).path()).bank.labels, [0, 0, 0, 0, 1]);
}

#[test]
fn a_division_is_known_by_its_names() {
    for (train, test) in [
        ("train", "val"),
        ("train", "valid"),
        ("train", "validation"),
        ("train", "test"),
        ("Train", "Test"),
        ("training", "testing"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
    ] {
        let (a, b, c) = (format!("{train}/a"), format!("{train}/b/deep"), format!("{test}/b"));
        let files = filled(5, &[(&a, [1; 3]), (&b, [2; 3]), (&c, [9; 3])]);
        let dir = folder(&files);
        for wanted in [Wanted::default(), Wanted::streamed(16)] {
            let data = data::load(dir.path(), &wanted).unwrap();
            assert_eq!((data.train.len(), data.test.len()), (10, 5), "{train} {test}");
            assert_eq!(data.test.labels, [1; 5]);
            assert_eq!((data.bank.get(9)[0], data.test.get(0)[0]), (2, 9));
            assert_says(&data.note, &["official split: 10 training and 5 test", "classes: a, b"]);
        }
    }
}

#[test]
fn a_third_part_is_not_read_and_named() {
    let classes =
        [("train/a", [1; 3]), ("train/b", [2; 3]), ("valid/a", [3; 3]), ("test/x", [4; 3])];
    let data = load(folder(&filled(5, &classes)).path());
    assert_eq!((data.train.len(), data.test.labels.len()), (10, 5));
    assert_eq!(data.test.get(0)[0], 3);
    assert_says(&data.note, &["official split", "test is not read"]);
    let two = [("train/a", [1; 3]), ("train/b", [2; 3]), ("valid/a", [3; 3]), ("val/a", [4; 3])];
    assert_says(&error(folder(&filled(5, &two)).path()), &["one folder for val, got val, valid"]);
}

#[test]
fn train_alone_is_divided() {
    let data = load(folder(&filled(5, &[("train/a", [1; 3]), ("train/b", [2; 3])])).path());
    assert_eq!((data.train.len(), data.test.labels), (8, vec![0, 1]));
    assert_eq!(data.classes, ["a", "b"]);
    // A class of vehicles.
    let vehicles = filled(5, &[("bus", [1; 3]), ("car", [2; 3]), ("train", [3; 3])]);
    assert_eq!(load(folder(&vehicles).path()).classes, ["bus", "car", "train"]);
}

#[test]
fn half_a_division_is_refused() {
    let refused = |folders: &[(&str, [u8; 3])], parts: &[&str]| {
        assert_says(&error(folder(&filled(5, folders)).path()), parts);
    };
    let c = [1; 3];
    refused(
        &[("train/a", c), ("train/b", c), ("val/cat", c)],
        &["val/cat", "2 classes of train", "got cat"],
    );
    refused(
        &[("train/a", c), ("train/b", c), ("val", c)],
        &["val: expected class folders", "got 5 images"],
    );
    refused(&[("train", c), ("val/a", c), ("val/b", c)], &["val: expected no classes", "got a, b"]);
    refused(
        &[("train/a", c), ("val/a", c), ("val/b", c)],
        &["val: expected no classes", "got a, b"],
    );
    refused(&[("train/a", c), ("train/b", c), ("holdout/a", c)], &["beside train, got holdout"]);
    refused(&[("train", c), ("dev", c)], &["beside train, got dev"]);
    refused(&[("val/a", c), ("test/a", c)], &["expected the folder train beside test, val"]);
    refused(&[("train", c), ("val", c), ("extra", c)], &["below train, val only", "extra"]);
    refused(
        &[("images/train/a", c), ("images/val/a", c)],
        &["holds train, val", "--data", "images)"],
    );
    let empty =
        [filled(5, &[("train/a", c), ("train/b", c)]), vec![("test/a.txt".into(), vec![1])]];
    assert_says(&error(folder(&empty.concat()).path()), &["test: expected images", "1 .txt"]);
}

#[test]
fn images_beside_class_folders_are_refused() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3])]);
    files.push(("sheet.png".into(), png(3, 3, [1; 3])));
    assert_says(&error(folder(&files).path()), &["got 1 images beside the folders a, b"]);
    let mut files = filled(5, &[("train/a", [1; 3]), ("train/b", [2; 3]), ("val/a", [2; 3])]);
    files.push(("train/sheet.png".into(), png(3, 3, [1; 3])));
    assert_says(&error(folder(&files).path()), &["train: expected", "got 1 images beside"]);
}

#[test]
fn images_without_classes_have_no_labels() {
    let c = [1; 3];
    for folders in [
        &[("", c)][..],
        &[("some/where", c)],
        &[("", c), ("more", c)],
        &[("photos/2020", c), ("photos/2021", c)],
        &[("train", c), ("val", c)],
        &[("train/all", c), ("test/all", c)],
        &[("train", c)],
    ] {
        let named = filled(5, folders).into_iter();
        let files: Vec<_> =
            named.map(|(n, b)| (n.trim_start_matches('/').to_string(), b)).collect();
        let dir = folder(&files);
        for wanted in [Wanted::default(), Wanted::streamed(16)] {
            let data =
                data::load(dir.path(), &wanted).unwrap_or_else(|e| panic!("{folders:?} {e:#}"));
            assert!(!data.is_labelled() && !data.bank.are_labelled(), "{folders:?}");
            assert_eq!(data.train.len() + data.test.len(), files.len(), "{folders:?}");
            assert_says(&data.note, &["no classes", "nearest neighbors", "probe", "skipped"]);
        }
    }
    let data = load(folder(&filled(5, &[("train", c), ("val", c)])).path());
    assert_says(&data.note, &["official split: 5 training and 5 test"]);
    let data = load(folder(&filled(5, &[("x/2020", c), ("x/2021", c)])).path());
    assert_says(&data.note, &["the one folder x; if 2020, 2021 are classes, give --data"]);
}

#[test]
fn empty_folders_are_named() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3])]);
    files.push(("c/notes.txt".into(), b"none".to_vec()));
    let data = load(folder(&files).path());
    assert_eq!((data.classes.len(), data.skipped.len()), (2, 1));
    assert_says(&data.skipped[0].1, &["no image was found"]);
    let one = [filled(5, &[("a", [1; 3])]), vec![("b/x.heic".into(), vec![7])]].concat();
    let parts =
        ["at least two sub-folders", "got 1, a", "no images in b", "1 .heic", "without labels"];
    assert_says(&error(folder(&one).path()), &parts);
    let none = [("a/x.txt", vec![7]), ("b/x.txt", vec![7])];
    assert_says(&error(folder(&none).path()), &["found none", "2 .txt"]);
    // A class that only the test images have.
    let mut files = filled(
        5,
        &[("train/a", [1; 3]), ("train/b", [2; 3]), ("val/a", [3; 3]), ("val/c", [4; 3])],
    );
    files.push(("train/c/notes.txt".into(), b"none".to_vec()));
    let data = load(folder(&files).path());
    assert_eq!(data.test.labels, [0; 5]);
    let skipped: Vec<String> = data.skipped.iter().map(|(p, _)| name(p)).collect();
    assert_eq!(skipped, ["train/c", "val/c"]);
}

#[test]
fn what_is_no_image_is_counted_by_kind() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3])]);
    for (name, bytes) in [
        ("README", "BMW models, in a text".as_bytes()),
        ("a/1.txt", b"P1 is a text"),
        ("a/2.heic", b"\0\0\0\x18ftypheic"),
        ("b/3.HEIC", b"\0\0\0\x18ftypheic"),
        ("b/.DS_Store", b"x"),
        ("b/4.png", b""),
    ] {
        files.retain(|(n, _)| n != name);
        files.push((name.into(), bytes.to_vec()));
    }
    // Without a suffix, and with one that says nothing.
    files.push(("a/image".into(), png(3, 3, [1; 3])));
    files.push(("b/image.jpeg_large".into(), jpeg(9, 9)));
    let data = load(folder(&files).path());
    assert_eq!((data.train.len() + data.test.len(), data.skipped.len()), (11, 0));
    let kinds = "ignored 6 files: 2 .heic, 1 .txt, 1 empty, 1 hidden, 1 without suffix";
    assert_says(&data.note, &[kinds]);
}

#[test]
fn unreadable_images_are_named_and_counted() {
    let ok = || png(4, 4, [1, 2, 3]);
    let cut = |mut bytes: Vec<u8>, by: usize| {
        bytes.truncate(bytes.len() - by);
        bytes
    };
    let mut files = filled(5, &[("val/a", [1; 3]), ("val/b", [2; 3])]);
    for (name, bytes) in [
        ("1.png", ok()),
        ("2.png", ok()[..30].to_vec()),
        ("3.png", b"no image".to_vec()),
        ("4.jpg", jpeg(40, 30)),
        ("5.jpg", cut(jpeg(40, 30), 60)),
        ("6.bmp", cut(encoded(ramp(9, 9, 1), ImageFormat::Bmp), 60)),
        ("7.tif", cut(encoded(ramp(9, 9, 1), ImageFormat::Tiff), 60)),
        ("8.webp", cut(encoded(ramp(40, 30, 1), ImageFormat::WebP), 60)),
        ("9.ppm", cut(encoded(ramp(9, 9, 1), ImageFormat::Pnm), 60)),
    ] {
        files.push((format!("train/a/{name}"), bytes));
    }
    files.push(("train/b/1.png".into(), ok()));
    let data = load(folder(&files).path());
    assert_eq!((&data.bank.labels[..], data.test.len()), (&[0, 0, 1][..], 10));
    assert_says(&data.note, &["3 training and 10 test", "7 skipped"]);
    let names: Vec<String> = data.skipped.iter().map(|(p, _)| name(p)).collect();
    let expected = ["2.png", "3.png", "5.jpg", "6.bmp", "7.tif", "8.webp", "9.ppm"];
    assert_eq!(names, expected.map(|n| format!("a/{n}")));
    for (path, why) in &data.skipped {
        match name(path) == "a/3.png" {
            true => assert_says(why, &["format could not be determined"]),
            false => assert_says(why, &["truncated or damaged"]),
        }
    }
}

#[test]
fn damaged_class_folders_are_refused() {
    let ok = || png(4, 4, [1, 2, 3]);
    let damaged = folder(&[("a/1.png", ok()), ("b/1.png", ok()[..30].to_vec())]);
    assert_says(
        &error(damaged.path()),
        &["at least two classes", "got 1", "b/1.png", "truncated or damaged"],
    );
    let all = folder(&[("a/1.png", vec![1]), ("b/1.png", vec![1])]);
    assert_says(&error(all.path()), &["none of 2", "a/1.png"]);
    let single = folder(&[("a/1.png", ok())]);
    assert_says(&error(single.path()), &["two training images", "got 1 and 0", "no classes"]);
    let few = folder(&[("a/1.png", ok()), ("b/1.png", ok())]);
    assert_says(&error(few.path()), &["--data", "a class of three", "got 2 and 0"]);
}

#[test]
fn a_class_of_which_nothing_can_be_read_is_left_out() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3]), ("c", [3; 3])]);
    for (name, bytes) in &mut files {
        if name.starts_with('b') {
            bytes.truncate(20);
        }
    }
    let data = load(folder(&files).path());
    assert_eq!(data.classes, ["a", "c"]);
    assert_eq!(data.bank.labels, [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(data.test.labels, [0, 1]);
    assert_eq!(data.test.get(1)[0], 3);
    // Five files and a class.
    assert_eq!(data.skipped.len(), 6);
}

#[test]
fn a_folder_can_stay_in_its_files() {
    let mut files = filled(4, &[("train/a", [1; 3]), ("train/b", [2; 3]), ("val/b", [3; 3])]);
    files[1].1.truncate(20);
    let dir = folder(&files);
    let wanted = Wanted { bank_limit: 6, test_limit: 1, ..Wanted::streamed(24) };
    let data = data::load(dir.path(), &wanted).unwrap();
    // Every file is one to train on until it is found damaged.
    assert_eq!(data.train.labels(), [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!((data.bank.side, data.test.side, data.test.len()), (24, 24, 1));
    let of = |class| data.bank.labels.iter().filter(|l| **l == class).count() as i32;
    assert!((2..=3).contains(&of(0)) && of(1) == 3, "{:?}", data.bank.labels);
    assert_says(&data.note, &["evaluated with", "and 1 of them, drawn by class"]);
    assert_eq!(data.train.picture(0).unwrap().size(), (9, 12));
    let why = data.train.picture(1).err().unwrap();
    assert_says(&format!("{why:#}"), &["truncated or damaged"]);
    assert_eq!(name(&data.train.path(1)), "a/1.png");
}

#[test]
fn images_of_one_color_are_named() {
    let mut files = filled(5, &[("a", [1; 3]), ("b", [2; 3])]);
    let all = load(folder(&files).path()).note;
    assert_says(&all, &["10 of 10 images are of one color each"]);
    for (_, bytes) in files.iter_mut().take(4) {
        *bytes = jpeg(20, 20);
    }
    assert_says(&load(folder(&files).path()).note, &["6 of 10 images are of one color"]);
    for (_, bytes) in files.iter_mut().take(5) {
        *bytes = jpeg(20, 20);
    }
    let half = load(folder(&files).path()).note;
    assert!(!half.contains("one color"), "{half}");
}

#[cfg(unix)]
mod unix {
    use std::{
        ffi::OsStr,
        fs,
        os::unix::{ffi::OsStrExt, fs::symlink},
    };

    use super::*;

    #[test]
    fn names_are_compared_as_bytes() {
        let dir = tempfile::tempdir().unwrap();
        for (part, count) in [("train", 4), ("val", 3)] {
            for (class, color) in [(&b"wald-\xe4"[..], 10), (b"wald-\xf6", 20)] {
                let class = dir.path().join(part).join(OsStr::from_bytes(class));
                fs::create_dir_all(&class).unwrap();
                for i in 0..count {
                    fs::write(class.join(format!("{i}.png")), png(3, 3, [color; 3])).unwrap();
                }
            }
        }
        let data = load(dir.path());
        assert_eq!(data.test.labels, [0, 0, 0, 1, 1, 1]);
        assert_eq!(data.classes, ["wald-\\xe4", "wald-\\xf6"]);
        for (i, label) in data.test.labels.iter().enumerate() {
            assert_eq!(u32::from(data.test.get(i)[0]), 10 * (label + 1));
        }
    }

    #[test]
    fn links_in_a_circle_end() {
        let dir = folder(&filled(5, &[("a", [1; 3]), ("b/deep", [2; 3])]));
        let at = |path: &str| dir.path().join(path);
        symlink(dir.path(), at("a/root")).unwrap();
        symlink(at("b"), at("b/deep/up")).unwrap();
        symlink(dir.path(), at("all")).unwrap();
        symlink(at("nowhere"), at("a/broken.png")).unwrap();
        symlink(at("deeper"), at("loop")).unwrap();
        symlink(at("loop"), at("deeper")).unwrap();
        let data = load(dir.path());
        assert_eq!(data.classes, ["a", "b"]);
        assert_eq!((data.train.len(), data.test.len()), (8, 2));
        assert_says(&data.note, &["3 broken link", "3 link to a folder above it"]);
        // Two classes that lead to each other: each reads both once.
        let dir = folder(&filled(5, &[("a", [1; 3]), ("b", [2; 3])]));
        symlink(dir.path().join("b"), dir.path().join("a/b")).unwrap();
        symlink(dir.path().join("a"), dir.path().join("b/a")).unwrap();
        let data = load(dir.path());
        assert_eq!(data.train.len() + data.test.len(), 20);
        // A class may lie elsewhere.
        let elsewhere = folder(&filled(5, &[("b", [2; 3])]));
        let dir = folder(&filled(5, &[("a", [1; 3])]));
        symlink(elsewhere.path(), dir.path().join("b")).unwrap();
        assert_eq!(load(dir.path()).bank.labels, [0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn a_pipe_is_no_image() {
        let dir = folder(&filled(5, &[("a", [1; 3]), ("b", [2; 3])]));
        let made = std::process::Command::new("mkfifo").arg(dir.path().join("a/x.png")).status();
        assert!(made.unwrap().success());
        assert_says(&load(dir.path()).note, &["1 no regular file"]);
    }
}
