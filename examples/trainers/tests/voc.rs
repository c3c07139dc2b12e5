//! Folders in the layout of Pascal VOC: what is read, dropped, skipped and refused.

mod files;

use std::path::Path;

use files::{assert_says, error, folder, load, png, ramp};
use image::ImageFormat;
use ser_reg_trainers::data::{
    Voc,
    voc::{Counts, annotation},
};
use tempfile::TempDir;

type Files = Vec<(String, Vec<u8>)>;

/// An object with these corners; more tags in `more`.
fn object(name: &str, [a, b, c, d]: [&str; 4], more: &str) -> String {
    format!(
        "<object><name>{name}</name>{more}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
    )
}

fn xml(width: u32, height: u32, objects: &str) -> Vec<u8> {
    let size = format!("<size><width>{width}</width><height>{height}</height></size>");
    format!("<?xml version=\"1.0\"?>\n<annotation>{size}{objects}</annotation>\n").into_bytes()
}

/// An image of 40x30 pixels with these objects.
fn image(name: &str, objects: &str) -> Files {
    vec![
        (format!("JPEGImages/{name}.png"), files::encoded(ramp(40, 30, 9), ImageFormat::Png)),
        (format!("Annotations/{name}.xml"), xml(40, 30, objects)),
    ]
}

fn list(name: &str, names: &[&str]) -> (String, Vec<u8>) {
    (format!("ImageSets/Main/{name}.txt"), names.join("\n").into_bytes())
}

/// Two training images `a` and `b` and a test image `t`, each with a box; then `more`.
fn set(more: Files) -> TempDir {
    let cell = object("cell", ["11", "6", "20", "15"], "");
    let mut files = [image("a", &cell), image("b", &cell), image("t", &cell)].concat();
    files.extend([list("trainval", &["a", "b"]), list("test", &["t"])]);
    for (name, bytes) in more {
        files.retain(|f| f.0 != name);
        files.push((name, bytes));
    }
    folder(&files)
}

#[track_caller]
fn read(root: &Path) -> Voc {
    Voc::read(root).unwrap_or_else(|e| panic!("{e:#}"))
}

#[track_caller]
fn refused(root: &Path) -> String {
    format!("{:#}", Voc::read(root).expect_err("the folder should be refused"))
}

#[test]
fn classes_boxes_and_marks_are_read() {
    let objects = [
        object("dog", ["1", "2", "40", "30"], "<difficult>1</difficult><truncated>0</truncated>"),
        object("ant", [" 11.5 ", "6", "20", "15"], "<truncated>1</truncated>"),
        // A part of an object is no object, whatever its name.
        object("cell", ["3", "4", "5", "6"], "").replace(
            "</object>",
            "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>",
        ),
    ];
    let data = set(image("b", &objects.concat()));
    let voc = read(data.path());
    assert_eq!(voc.classes, ["ant", "cell", "dog"]);
    let b = &voc.train[1];
    assert_eq!((b.height, b.width), (30, 40));
    let seen: Vec<_> = b
        .objects
        .iter()
        .map(|o| (o.class, [o.top, o.left, o.bottom, o.right], o.difficult, o.truncated))
        .collect();
    // Corners are pixels counted from 1, both inside: edges lie one before the first.
    let expected = [
        (2, [1.0, 0.0, 30.0, 40.0], true, false),
        (0, [5.0, 10.5, 15.0, 20.0], false, true),
        (1, [3.0, 2.0, 6.0, 5.0], false, false),
    ];
    assert_eq!(seen, expected);
    assert_eq!(voc.counts, Counts::default());
    assert_says(&voc.note, &["2 training images with 4 boxes (trainval.txt)", "3 classes: ant"]);
    assert_says(&voc.note, &["no training image shows"].map(|_| "1 test images with 1 boxes"));
}

#[test]
fn degenerate_boxes_are_clipped_or_dropped_and_counted() {
    let cases = [
        (["5", "5", "5", "5"], None, 1),       // equal corners, as in BCCD
        (["5", "5", "5", "9"], None, 1),       // no width
        (["9", "5", "5", "9"], None, 1),       // reversed columns
        (["5", "9", "9", "5"], None, 1),       // reversed rows
        (["41", "5", "50", "9"], None, 2),     // right of the image
        (["5", "31", "9", "90"], None, 2),     // below
        (["-9", "5", "0", "9"], None, 2),      // left of it
        (["5", "-1e300", "9", "-1"], None, 2), // above
        (["0", "5", "9", "9"], Some([4.0, 0.0, 9.0, 9.0]), 3),
        (["30", "20", "1e300", "99"], Some([19.0, 29.0, 30.0, 40.0]), 3),
        (["40", "5", "41", "9"], Some([4.0, 39.0, 9.0, 40.0]), 3),
    ];
    for (corners, kept, count) in cases {
        let data = set(image("b", &object("cell", corners, "")));
        let voc = read(data.path());
        let edges: Vec<_> =
            voc.train[1].objects.iter().map(|o| [o.top, o.left, o.bottom, o.right]).collect();
        assert_eq!(edges, kept.into_iter().collect::<Vec<_>>(), "{corners:?}");
        let c = voc.counts;
        let counts = [c.without_extent, c.outside, c.clipped];
        assert_eq!(counts, std::array::from_fn(|i| usize::from(i + 1 == count)), "{corners:?}");
        assert_eq!(c.without_boxes, usize::from(kept.is_none()));
        let said =
            ["1 boxes without extent dropped", "1 boxes outside of their", "1 boxes clipped"];
        assert_says(&voc.note, &said[count - 1..count]);
    }
}

#[test]
fn an_image_without_boxes_is_background() {
    let data = set(image("b", ""));
    let voc = read(data.path());
    assert_eq!((voc.train.len(), voc.train[1].objects.len()), (2, 0));
    assert_eq!(voc.counts.without_boxes, 1);
    assert!(voc.skipped.is_empty());
    assert_says(&voc.note, &["1 images without boxes"]);
}

#[test]
fn what_does_not_fit_together_is_skipped_and_named() {
    let bad = |xml: &[u8]| vec![("Annotations/b.xml".to_string(), xml.to_vec())];
    let object = |inner: &str| xml(40, 30, &format!("<object>{inner}</object>"));
    let corners = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>";
    let deep = "<a>".repeat(100_000);
    let cases: [(Files, &str); 17] = [
        (bad(b""), "expected an annotation in XML"),
        (bad(b"<annotation><object>"), "expected an annotation in XML"),
        (bad(deep.as_bytes()), "expected an annotation in XML"),
        (bad(b"<annotation>\xff</annotation>"), "in UTF-8"),
        (bad(b"<html/>"), "root is <annotation>, got <html>"),
        (bad(b"<!DOCTYPE a [<!ENTITY b \"c\">]><annotation>&b;</annotation>"), "in XML"),
        (bad(&xml(30, 40, "")), "image of 30x40 pixels as in its annotation, got 40x30"),
        (bad(&xml(0, 0, "")), "image of 0x0 pixels"),
        (bad(b"<annotation><size><width>-4</width></size></annotation>"), "in <width>, got \"-4\""),
        (bad(&object("<name>a</name>")), "object 1: expected <bndbox>, got none"),
        (bad(&object("<bndbox/>")), "expected <name>, got none"),
        (bad(&object("<name> </name>")), "expected a class in <name>"),
        (bad(&object(&format!("<name>a</name>{corners}</bndbox>"))), "expected <ymax>, got none"),
        (
            bad(&object(&format!("<name>a</name>{corners}<ymax>NaN</ymax></bndbox>"))),
            "a number in <ymax>, got \"NaN\"",
        ),
        (
            bad(&object(&format!(
                "<name>a</name><difficult>2</difficult>{corners}<ymax>9</ymax></bndbox>"
            ))),
            "0 or 1 in <difficult>, got \"2\"",
        ),
        (vec![("JPEGImages/b.png".into(), b"no image".to_vec())], "truncated or damaged"),
        (vec![("JPEGImages/b.jpg".into(), png(40, 30, [1; 3]))], "2 images have this name"),
    ];
    for (files, why) in cases {
        let data = set(files);
        let voc = read(data.path());
        assert_eq!((voc.train.len(), voc.test.len(), voc.skipped.len()), (1, 1, 1), "{why}");
        assert_says(&voc.note, &["1 skipped", why]);
    }
    // Without an annotation, without an image.
    let data = set(vec![]);
    std::fs::remove_file(data.path().join("Annotations/b.xml")).unwrap();
    let voc = read(data.path());
    assert_eq!((voc.train.len(), voc.skipped.len()), (1, 1));
    assert_says(&voc.note, &["expected the annotation b.xml, got none"]);
    for name in ["lost", "../Annotations/a", "/etc/passwd", "é"] {
        let voc = read(set(vec![list("trainval", &["a", name, "b"])]).path());
        assert_eq!((voc.train.len(), voc.skipped.len()), (2, 1), "{name}");
        assert_says(&voc.note, &["no such image, though trainval.txt names it"]);
    }
}

#[test]
fn sets_follow_their_lists() {
    let more = |lists: &[(&str, &[&str])]| {
        let data = set(image("c", &object("cell", ["1", "1", "9", "9"], "")));
        for (name, _) in [("trainval", 0), ("test", 0)] {
            std::fs::remove_file(data.path().join(format!("ImageSets/Main/{name}.txt"))).unwrap();
        }
        for (name, names) in lists {
            let (path, bytes) = list(name, names);
            std::fs::write(data.path().join(path), bytes).unwrap();
        }

        data
    };
    let counts = |lists: &[(&str, &[&str])]| {
        let voc = read(more(lists).path());
        (voc.train.len(), voc.test.len(), voc.note)
    };
    let (train, test, note) = counts(&[("train", &["a"]), ("val", &["b", "c"]), ("test", &["t"])]);
    assert_eq!((train, test), (3, 1));
    assert_says(&note, &["train.txt and val.txt", "test.txt"]);
    let (train, test, note) = counts(&[("train", &["a", "b"]), ("val", &["c"])]);
    assert_eq!((train, test), (2, 1));
    assert_says(&note, &["(train.txt)", "(val.txt)"]);
    // An image in both sets tests only, and repeated names are read once.
    let (train, test, note) = counts(&[("trainval", &["a", "t", "a", "b.png"]), ("test", &["t"])]);
    assert_eq!((train, test), (2, 1));
    assert_says(&note, &["1 names of trainval.txt are in test.txt too and only test"]);
    assert_says(&note, &["1 repeated names of trainval.txt"]);

    let says = |lists: &[(&str, &[&str])], parts: &[&str]| {
        assert_says(&refused(more(lists).path()), parts);
    };
    says(&[("test", &["t"])], &["expected train.txt or trainval.txt", "got neither"]);
    says(&[("trainval", &["a"])], &["expected test.txt, or val.txt beside train.txt"]);
    says(&[("trainval", &[]), ("test", &["t"])], &["trainval.txt", "one a line, got none"]);
    says(&[("trainval", &["x"]), ("test", &["t"])], &["that trainval.txt names, got none"]);
    says(&[("trainval", &["t"]), ("test", &["t"])], &["got none of them"]);
    let empty = tempfile::tempdir().unwrap();
    assert_says(&refused(empty.path()), &["expected a Pascal VOC folder with JPEGImages"]);
    let difficult = object("cell", ["1", "1", "9", "9"], "<difficult>1</difficult>");
    for boxes in ["", &difficult] {
        let message = refused(set(image("t", boxes)).path());
        assert_says(&message, &["boxes that are not difficult on the test images, got none on 1"]);
    }
}

#[test]
fn an_annotation_without_a_size_takes_the_image() {
    let text = "\u{feff}<annotation><object><name>a&amp;b</name><bndbox><ymax>4</ymax><xmax>3</xmax>\
                <ymin>2</ymin><xmin>1</xmin></bndbox></object></annotation>";
    let read = annotation::parse(text).unwrap();
    assert_eq!(read.size, None);
    assert_eq!(
        (read.objects[0].name.as_str(), read.objects[0].corners),
        ("a&b", [1.0, 2.0, 3.0, 4.0])
    );
}

/// Training images are red, those of the test set and of no set are blue.
fn colored() -> TempDir {
    let mut files: Files = Vec::new();
    let names: Vec<String> = (0..10).map(|i| format!("r{i}")).collect();
    let pixels = |red: bool, i: u32| {
        let own = |x: u32, y: u32| 100 + ((x * 7 + y * 3 + i) % 100) as u8;
        image::RgbImage::from_fn(160, 120, move |x, y| {
            image::Rgb(if red { [own(x, y), 0, 0] } else { [0, 0, own(x, y)] })
        })
    };
    for (i, name) in names.iter().map(String::as_str).chain(["t", "unnamed"]).enumerate() {
        let image = files::encoded(pixels(i < 10, i as u32), ImageFormat::Png);
        files.push((format!("JPEGImages/{name}.png"), image));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    files.extend([list("trainval", &names), list("test", &["t"])]);
    folder(&files)
}

#[test]
fn windows_come_from_training_images_only_and_need_no_annotations() {
    let root = colored();
    let data = load(root.path());
    assert_eq!((data.train.len(), data.test.len()), (8 * 16, 2 * 16));
    assert!(!data.is_labelled());
    assert_says(
        &data.note,
        &["128 windows train, 32 test", "the 10 of trainval.txt", "no classes"],
    );
    for images in [&*data.bank, &data.test] {
        assert_eq!((images.side, images.channels), (32, 3));
        for i in 0..images.len() {
            let planes: Vec<&[u8]> = images.get(i).chunks_exact(32 * 32).collect();
            assert!(planes[0].iter().all(|p| *p >= 100) && planes[2].iter().all(|p| *p == 0));
        }
    }
    // Seeded, and no two windows of an image are one.
    assert_eq!(load(root.path()).bank.pixels, data.bank.pixels);
    assert_ne!(data.bank.get(0), data.bank.get(1));
    let streamed =
        ser_reg_trainers::data::load(root.path(), &ser_reg_trainers::data::Wanted::streamed(48));
    let streamed = streamed.unwrap();
    assert_eq!((streamed.train.len(), streamed.test.len()), (8, 2));
    assert!(streamed.test.get(0)[2 * 48 * 48..].iter().all(|p| *p == 0));
}

#[test]
fn a_voc_folder_inside_of_the_folder_is_named() {
    let inner = colored();
    let outer = tempfile::tempdir().unwrap();
    std::fs::rename(inner.path(), outer.path().join("VOC2007")).unwrap();
    let message = error(outer.path());
    assert_says(
        &message,
        &["VOC2007, which has the layout of Pascal VOC (give --data", "VOC2007)"],
    );
}
