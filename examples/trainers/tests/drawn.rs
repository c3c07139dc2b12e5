//! Parts of a set: drawn by class, the same for all encoders, whatever the order of the images. And what fills the area that
//! a moved image leaves.

mod common;

use candle_core::Device;
use common::subject;
use indicatif::ProgressBar;
use ser_reg_trainers::{
    data::Images,
    eval::{
        self, Options, Part, Report, Subject,
        border::Border,
        corruption::{Picture, generator, picture::Edge},
        dense::{self, scene::Scene},
        perturbation::Perturbation,
    },
};

const CPU: Device = Device::Cpu;

/// Images of 12x12 whose brightness tells their class, in the order of the classes.
fn ordered(per_class: usize, classes: u32) -> Images {
    let mut images = Images { channels: 1, side: 12, ..Default::default() };
    for class in 0..classes {
        for i in 0..per_class {
            let pixel = |p: usize| (40 * class) as u8 + (p * (i + 3) % 17) as u8;
            images.pixels.extend((0..144).map(pixel));
            images.labels.push(class);
        }
    }
    images
}

fn evaluate(subject: &Subject, images: &Images, options: &Options) -> Report {
    eval::evaluate(subject, None, images, images, options, &ProgressBar::hidden()).unwrap()
}

/// Under identity-like conditions the accuracy of a part is the accuracy on the images that were drawn.
#[test]
fn parts_measure_the_images_that_are_drawn() {
    let images = ordered(40, 4);
    let subject = subject(&images);
    let options = Options {
        parts: vec![Part::Poses, Part::Corruptions, Part::Perturbations],
        posed: Some(10),
        corrupted: Some(8),
        sequences: 6,
        floors: false,
        seed: 3,
        ..Options::default()
    };
    let report = evaluate(&subject, &images, &options);
    assert_eq!(report.posed, Some(10));
    assert_eq!(report.corruptions.as_ref().unwrap().pictures, 8);
    assert_eq!(report.perturbations.as_ref().unwrap().sequences, 6);

    // What the probe of all images says of the drawn ones.
    let drawn = images.draw(10);
    let mut shares = [0; 4];
    drawn.labels.iter().for_each(|&l| shares[l as usize] += 1);
    shares.sort_unstable();
    assert_eq!(shares, [2, 2, 3, 3]);
    let encode = |images: &Images| {
        let statistics = &subject.card.statistics;
        eval::features::of(images, statistics, &CPU, None, |x| subject.encode(x)).unwrap()
    };
    let probe = eval::probe::Probe::fit(&encode(&images), &images.labels).unwrap();
    let accuracy = |images: &Images| {
        eval::probe::accuracy(&probe.predict(&encode(images)).unwrap(), &images.labels)
    };
    assert_eq!(report.poses[0].orbits[0].probe.accuracy[0], accuracy(&drawn));
    let clean = report.corruptions.as_ref().unwrap().clean_error;
    assert_eq!(clean, 100.0 - accuracy(&images.draw(8)));

    // Another seed draws other noise for the same images.
    let other = evaluate(&subject, &images, &Options { seed: 4, ..options });
    assert_eq!(other.poses, report.poses);
    assert_eq!(other.corruptions.as_ref().unwrap().clean_error, clean);
    assert_ne!(other.corruptions, report.corruptions);
}

/// An encoder is scored alike on the images of a set in any order of its classes.
#[test]
fn the_order_of_the_classes_does_not_matter() {
    let images = ordered(30, 4);
    let reversed: Vec<usize> = (0..4).rev().flat_map(|c| 30 * c..30 * (c + 1)).collect();
    for (count, each) in [(4, 1), (20, 5), (60, 15)] {
        for set in [images.clone(), images.pick(&reversed)] {
            let drawn = set.draw(count);
            for class in 0..4 {
                let of_class = drawn.labels.iter().filter(|&&l| l == class).count();
                assert_eq!(of_class, each, "{count}");
            }
        }
    }
}

#[test]
fn canvases_show_objects_of_every_class() {
    let images = ordered(200, 5);
    let subject = subject(&images);
    let options = dense::Options { train: 30, test: 10, side: Some(24), layer: None };
    let run = |seed| dense::measure(&[&subject], false, &images, &images, &options, seed, || ());
    assert_eq!(run(0).unwrap(), run(0).unwrap());
    let none = images.pick(&[]);
    let error = dense::measure(&[&subject], false, &none, &images, &options, 0, || ());
    assert!(error.unwrap_err().to_string().contains("got 0 and 1000"));
    // A scene takes its objects from its candidates.
    let candidates = [0, 250, 900];
    for i in 0..20 {
        let scene = Scene::draw(&images, candidates, 32, 4, &mut generator(0, 0, i));
        let classes: Vec<u32> = scene.objects.iter().map(|o| o.class).collect();
        assert!(!classes.is_empty() && [0, 1, 4].starts_with(&classes), "{classes:?}");
    }
}

// --- beyond the border ------------------------------------------------------------------------------------------------

/// The same image several times.
fn flat(border: u8, middle: u8) -> Images {
    let mut images = Images { channels: 3, side: 12, ..Default::default() };
    for label in 0..4 {
        let pixel = |p: usize| {
            let (row, col) = (p % 144 / 12, p % 12);
            let outermost = row == 0 || col == 0 || row == 11 || col == 11;
            if outermost { border } else { middle }
        };
        images.pixels.extend((0..3 * 144).map(pixel));
        images.labels.push(label % 2);
    }
    images
}

#[test]
fn black_continues_dark_borders_only() {
    assert_eq!(Border::of(&flat(0, 255)), Border::Black);
    assert_eq!(Border::of(&flat(25, 255)), Border::Black);
    assert_eq!(Border::of(&flat(26, 0)), Border::Reflection);
    assert_eq!(Border::of(&flat(255, 0)), Border::Reflection);
}

/// A plain image stays as it is under every element and in every frame: only black would mark it.
#[test]
fn moved_images_are_continued_by_their_mirror_image() {
    let x = Picture { pixels: vec![0.5; 2 * 28 * 28], channels: 2, side: 28 };
    let moves = [
        Perturbation::Translate,
        Perturbation::Rotate,
        Perturbation::Tilt,
        Perturbation::Scale,
        Perturbation::ZoomBlur,
    ];
    let span = |frames: &[Picture]| {
        let pixels = frames.iter().flat_map(|f| &f.pixels);
        pixels.fold((1f32, 0f32), |(low, high), &p| (low.min(p), high.max(p)))
    };
    for perturbation in moves {
        let frames = perturbation.frames(&x, Border::Reflection.edge(), 0, 0);
        let (low, high) = span(&frames);
        assert!(low > 0.4999 && high < 0.5001, "{perturbation:?}: {low} {high}");
        if perturbation != Perturbation::ZoomBlur {
            let black = span(&perturbation.frames(&x, Border::Black.edge(), 0, 0));
            assert!(black.0 < 0.01, "{perturbation:?}: {black:?}");
        }
    }
    assert_eq!(Border::Reflection.edge(), Edge::Reflect);
}

/// Poses of plain images of two shades: an encoder tells the shades as well under every element as upright, unless a black
/// border drowns them.
#[test]
fn poses_of_bright_images_do_not_measure_a_border() {
    let mut images = Images { channels: 1, side: 12, ..Default::default() };
    for i in 0..60usize {
        let class = i % 2;
        images.pixels.extend(vec![120 + 60 * class as u8 + (i / 2) as u8; 144]);
        images.labels.push(class as u32);
    }
    let subject = subject(&images);
    let options = Options { parts: vec![Part::Poses], floors: false, ..Options::default() };
    let report = evaluate(&subject, &images, &options);
    assert_eq!(report.border, Some(Border::Reflection));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["border"], "reflection");
    for orbit in &report.poses[0].orbits {
        // Every transform of a plain image is that image.
        assert_eq!(orbit.probe.consistency, 100.0, "{}: {:?}", orbit.name, orbit.probe);
        assert_eq!(orbit.knn.consistency, 100.0, "{}", orbit.name);
    }
    // Files of older versions, which knew black only.
    let mut old = json;
    let fields = old.as_object_mut().unwrap();
    fields.remove("border");
    fields.remove("posed");
    assert_eq!(serde_json::from_value::<Report>(old).unwrap().border, None);
}
