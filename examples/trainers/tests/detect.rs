//! Boxes found on images: the score by hand, the moves by brute force, and images on which color tells all.

mod files;

use candle_core::{Device, Tensor};
use files::{encoded, folder};
use image::{ImageFormat, Rgb, RgbImage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{TokenGrid, group::D4};
use ser_reg_trainers::{
    data::voc::{self, Annotated},
    eval::{
        dense::{
            boxes::{Box, Detection},
            precision::{self, Truth},
        },
        detect::{
            self, Reading,
            scene::{self, Object, Scene, Target},
        },
        features::patches,
    },
};

fn at(top: f64, left: f64, bottom: f64, right: f64) -> Box {
    Box { top, left, bottom, right }
}

fn truth(canvas: usize, at: Box, difficult: bool) -> Truth {
    Truth { canvas, class: 0, at, difficult }
}

fn detection(canvas: usize, score: f32, at: Box) -> Detection {
    Detection { canvas, class: 0, score, at }
}

#[track_caller]
fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} and {b}");
}

#[test]
fn average_precision_of_worked_examples() {
    let (a, b) = (at(0.0, 0.0, 4.0, 4.0), at(8.0, 8.0, 12.0, 12.0));
    let ap = |d: &[Detection], t: &[Truth]| precision::judge(d, t, 0).unwrap().precision;
    let both = [truth(0, a, false), truth(1, b, false)];
    near(ap(&[detection(0, 0.2, a), detection(1, 0.9, b)], &both), 1.0);
    near(ap(&[], &both), 0.0);
    // The box of the other image.
    near(ap(&[detection(1, 0.9, a)], &both), 0.0);
    // Found again before the second is found: right, wrong, right.
    let twice = [detection(0, 0.9, a), detection(0, 0.8, a), detection(1, 0.7, b)];
    near(ap(&twice, &both), 0.5 + 0.5 * 2.0 / 3.0);
    // The envelope: precision 1/2 at recall 1/2 rises to the 2/3 that comes later.
    let late = [detection(0, 0.9, b), detection(0, 0.8, a), detection(1, 0.7, b)];
    near(ap(&late, &both), 2.0 / 3.0);
    // A difficult box is neither wanted nor is its detection wrong, however often.
    let hard = [truth(0, a, true), truth(1, b, false)];
    let found = [detection(0, 0.9, a), detection(0, 0.8, a), detection(1, 0.7, b)];
    near(ap(&found, &hard), 1.0);
    assert_eq!(precision::judge(&found, &hard, 0).unwrap().wanted, 1);
    // A class of difficult boxes only has no score, and no part in the mean.
    assert_eq!(precision::judge(&found, &[truth(0, a, true)], 0), None);
    let other = Truth { class: 1, ..truth(0, a, true) };
    near(precision::mean(&found, &[truth(0, a, false), other]), 1.0);
    // An overlap of exactly one half finds, and less does not.
    let (half, less) = (at(0.0, 0.0, 4.0, 2.0), at(0.0, 0.0, 4.0, 1.9));
    near(ap(&[detection(0, 0.9, half)], &[truth(0, a, false)]), 1.0);
    near(ap(&[detection(0, 0.9, less)], &[truth(0, a, false)]), 0.0);
    assert_eq!(precision::judge(&[detection(0, 1.0, half)], &both, 0).unwrap().overlaps, [0.5]);
}

#[test]
fn boxes_move_as_their_pixels_do() {
    let (rows, cols) = (5usize, 8usize);
    let grid = TokenGrid::new(rows, cols).unwrap();
    for (t, l, b, r) in [(0, 0, 1, 1), (1, 2, 4, 7), (0, 3, 5, 4), (2, 0, 3, 8), (4, 7, 5, 8)] {
        let inside = |i: usize| (t..b).contains(&(i / cols)) && (l..r).contains(&(i % cols));
        for g in D4::ALL {
            let width = if g.swaps_axes() { rows } else { cols };
            let mask: Vec<bool> =
                g.source_indices(grid).iter().map(|&i| inside(i as usize)).collect();
            let set = || (0..mask.len()).filter(|&i| mask[i]).map(|i| (i / width, i % width));
            let expected = at(
                set().map(|p| p.0).min().unwrap() as f64,
                set().map(|p| p.1).min().unwrap() as f64,
                set().map(|p| p.0 + 1).max().unwrap() as f64,
                set().map(|p| p.1 + 1).max().unwrap() as f64,
            );
            let moved = scene::moved(
                g,
                at(t as f64, l as f64, b as f64, r as f64),
                [rows as f64, cols as f64],
            );
            assert_eq!(moved, expected, "{g:?}");
        }
    }
}

/// Gray images with one or two discs of one of two colors, bright in the middle: 84x60 pixels, windows of 24.
fn discs(count: usize, seed: u64) -> (tempfile::TempDir, Vec<Annotated>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut images, mut files) = (Vec::new(), Vec::new());
    for i in 0..count {
        let objects: Vec<(f64, f64, u32)> = (0..rng.random_range(1..3))
            .map(|k| {
                let x = rng.random_range(14.0..28.0) + 42.0 * f64::from(k);
                (rng.random_range(14.0..46.0), x, rng.random_range(0..2))
            })
            .collect();
        let image = RgbImage::from_fn(84, 60, |x, y| {
            let mut color = [60, 60, 60];
            for &(row, col, class) in &objects {
                let away = (f64::from(y) + 0.5 - row).hypot(f64::from(x) + 0.5 - col);
                if away < 12.0 {
                    let value = (255.0 - 12.0 * away) as u8;
                    color = if class == 0 { [value, 0, 0] } else { [0, 0, value] };
                }
            }
            Rgb(color)
        });
        files.push((format!("{i}.png"), encoded(image, ImageFormat::Png)));
        let objects = objects.iter().map(|&(row, col, class)| voc::Object {
            class,
            top: row - 12.0,
            left: col - 12.0,
            bottom: row + 12.0,
            right: col + 12.0,
            difficult: false,
            truncated: false,
        });
        let objects = objects.collect();
        images.push(Annotated { image: format!("{i}.png").into(), height: 60, width: 84, objects });
    }
    let dir = folder(&files);
    images.iter_mut().for_each(|i| i.image = dir.path().join(&i.image));
    (dir, images)
}

fn scenes(images: &[Annotated], scale: f64) -> Vec<Scene> {
    images.iter().map(|i| Scene::read(i, scale, 24).unwrap()).collect()
}

#[test]
fn whole_windows_cover_the_image_and_turn_with_it() {
    let (_dir, images) = discs(1, 5);
    let scene = &scenes(&images, 1.0)[0];
    assert_eq!((scene.rows, scene.cols), (72, 96));
    assert_eq!(scene.image, at(6.0, 6.0, 66.0, 90.0));
    let original = image::open(&images[0].image).unwrap().into_rgb8();
    // Mirrored beyond the border, the outermost pixel twice.
    let pixel = |row: usize, col: usize| scene.pixels[row * 96 + col];
    assert_eq!(pixel(6 + 20, 6 + 30), original.get_pixel(30, 20)[0]);
    assert_eq!(pixel(5, 40), pixel(6, 40));
    assert_eq!(pixel(71, 40), pixel(60, 40));
    assert_eq!(pixel(30, 91), pixel(30, 88));
    let object = &images[0].objects[0];
    assert_eq!(scene.objects[0].at.top, object.top + 6.0);
    let half = &scenes(&images, 0.5)[0];
    assert_eq!((half.rows, half.cols), (48, 48));
    assert_eq!(half.image, at(9.0, 3.0, 39.0, 45.0));
    assert_eq!(half.objects[0].at.left, 3.0 + object.left / 2.0);
    // Tokens of the moved scene stand where they came from.
    let statistics = [(0.0, 1.0); 3];
    for g in D4::ALL {
        let moved = scene.moved(g).unwrap();
        let windows = moved.windows(24, &statistics, &Device::Cpu).unwrap();
        assert_eq!(windows.dims(), [12, 3, 24, 24]);
        let tokens = patches(&windows, 4).unwrap().flatten_to(1).unwrap();
        let tokens = tokens.to_vec2::<f32>().unwrap();
        for (token, [y, x]) in tokens.iter().zip(moved.centers(24, 4)) {
            // The upper left pixel of the token, red.
            let i = (y as usize - 2) * moved.cols + x as usize - 2;
            assert_eq!((token[0] * 255.0).round() as u8, moved.pixels[i]);
        }
        let back = moved.moved(ser_reg::group::GroupAction::inverse(&g)).unwrap();
        assert!(back.pixels == scene.pixels && back.image == scene.image, "{g:?}");
        let (a, b) = (back.objects[0].at, scene.objects[0].at);
        near(a.top + 2.0 * a.left + 3.0 * a.right, b.top + 2.0 * b.left + 3.0 * b.right);
    }
}

#[test]
fn tokens_learn_the_smallest_object_in_whose_middle_they_lie() {
    let object = |at, difficult| Object { class: 0, at, difficult };
    let scene = Scene {
        pixels: vec![0; 3 * 24 * 24],
        rows: 24,
        cols: 24,
        image: at(0.0, 0.0, 24.0, 20.0),
        objects: vec![
            object(at(0.0, 0.0, 16.0, 16.0), false),
            object(at(1.0, 1.0, 3.0, 3.0), false),
            object(at(16.0, 0.0, 24.0, 8.0), true),
        ],
    };
    let targets = scene.targets(&scene.centers(24, 4), 4);
    let shown: Vec<String> = targets
        .chunks_exact(6)
        .map(|row| {
            row.iter()
                .map(|t| match t {
                    Target::Ignored => '-'.to_string(),
                    Target::Background => '.'.to_string(),
                    Target::Object(i) => i.to_string(),
                })
                .collect()
        })
        .collect();
    assert_eq!(shown, ["1---.-", "-00-.-", "-00-.-", "----.-", "--...-", "--...-"]);
}

#[test]
fn color_finds_discs_in_all_elements_and_noise_finds_none() {
    let ((_a, train), (_b, test)) = (discs(40, 1), discs(12, 2));
    let (train, test) = (scenes(&train, 1.0), scenes(&test, 1.0));
    let reading = Reading {
        window: 24,
        patch: 4,
        statistics: vec![(0.0, 1.0); 3],
        device: Device::Cpu,
        classes: 2,
        tokens: 5000,
        seed: 0,
    };
    // The mean color of a token and its square: equivariant, because it has no direction.
    let color = |x: &Tensor| {
        let (n, tokens) = (x.dim(0)?, patches(x, 4)?);
        let mean = tokens.reshape((n, 36, 3, 16))?.mean(3)?;
        Ok(Tensor::cat(&[&mean, &mean.sqr()?], 2)?)
    };
    let mut steps = 0;
    let row = detect::row("color", &train, &test, &reading, color, || steps += 1).unwrap();
    assert_eq!((steps, row.poses.len()), (detect::STEPS, 8));
    let upright = &row.poses[0];
    assert!(upright.ap50 > 90.0 && upright.miou.unwrap() > 65.0, "{upright:?}");
    for pose in &row.poses {
        assert!((pose.ap50 - upright.ap50).abs() < 5.0, "{pose:?} {upright:?}");
        assert!(pose.recall > 90.0 && pose.classes.iter().all(|c| c.unwrap() > 85.0), "{pose:?}");
    }
    let seven = row.poses[1..].iter().map(|p| p.ap50).sum::<f64>() / 7.0;
    assert!((row.moved.ap50 - seven).abs() < 1e-9);
    // The same call, the same values.
    assert_eq!(detect::row("color", &train, &test, &reading, color, || {}).unwrap(), row);
    // The position in the window tells nothing of the discs.
    let place = |x: &Tensor| {
        let values = Tensor::arange(0f32, 36.0, x.device())?.reshape((1, 36, 1))?;
        Ok(values.broadcast_as((x.dim(0)?, 36, 1))?.contiguous()?)
    };
    let blind = detect::row("place", &train, &test, &reading, place, || {}).unwrap();
    assert!(blind.poses[0].ap50 < 20.0, "{:?}", blind.poses[0]);
}
