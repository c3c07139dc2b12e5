//! The examples' views and loader: colors against slow twins, and batches that follow from seed and step alone.

use std::{fs, path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use image::{Rgb, RgbImage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg_trainers::{
    augment::{Augment, CropRanges, Photometric, SmallCrop},
    data::{self, Images, Interpolation, Picture, Shaper, Source, Wanted},
    loader::{Drawn, Extras, Loader, LoaderConfig, Third},
};
use tempfile::TempDir;

const CPU: Device = Device::Cpu;

/// Random images of 12x12.
fn pictures(n: usize, channels: usize) -> Images {
    let mut rng = StdRng::seed_from_u64(3);
    Images {
        pixels: (0..n * channels * 144).map(|_| rng.random()).collect(),
        labels: (0..n as u32).map(|i| i % 3).collect(),
        channels,
        side: 12,
    }
}

fn memory(n: usize, channels: usize) -> Source {
    Source::Memory(Arc::new(pictures(n, channels)))
}

/// The whole image, unchanged.
fn whole(side: usize, channels: usize) -> Augment {
    Augment {
        side,
        crop: CropRanges { area: (1.0, 1.0), aspect: (1.0, 1.0) },
        flip: 0.0,
        interpolation: Interpolation::Bilinear,
        views: [Photometric::default(), Photometric::default()],
        statistics: vec![(0.0, 1.0); channels],
    }
}

fn config(batch: usize, steps: usize) -> LoaderConfig {
    LoaderConfig { batch, shared: 0, seed: 5, first_step: 0, steps, workers: 1, prefetch: 2 }
}

/// Both views of each batch that is left, and the images they show.
fn rest(loader: &mut Loader, steps: usize) -> Vec<(Vec<usize>, Vec<f32>, Vec<f32>)> {
    let batch = |_| {
        let batch = loader.next(&CPU).unwrap();
        (batch.indices, values(&batch.first), values(&batch.second))
    };
    (0..steps).map(batch).collect()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Both views of image 0.
fn views(augment: &Augment, images: &Images, shared: bool, seed: u64) -> [Vec<f32>; 2] {
    let size = images.channels * augment.side * augment.side;
    let mut views = [vec![0.0; size], vec![0.0; size]];
    let rng = &mut StdRng::seed_from_u64(seed);
    augment
        .views(
            &images.picture(0),
            shared,
            rng,
            &mut Shaper::default(),
            views.each_mut().map(|v| v.as_mut_slice()),
        )
        .unwrap();
    views
}

#[track_caller]
fn assert_near(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap <= tolerance, "expected a gap of {tolerance} at most, got {gap}");
}

#[test]
fn a_view_of_the_whole_picture_is_the_picture() {
    let images = pictures(1, 2);
    let same = Augment { statistics: images.statistics(), ..whole(12, 2) };
    let plain = values(&same.plain(&images, 0..1, &CPU).unwrap());
    assert_near(&views(&same, &images, false, 1)[0], &plain, 1e-5);
    // Mirrored: each row of twelve pixels backwards.
    let mirrored = Augment { flip: 1.0, ..same };
    let backwards: Vec<f32> = plain.chunks(12).flat_map(|row| row.iter().rev()).copied().collect();
    assert_near(&views(&mirrored, &images, false, 1)[1], &backwards, 1e-5);
}

#[test]
fn shared_views_have_one_crop() {
    let images = pictures(1, 3);
    let still = Augment {
        views: [Photometric::default(), Photometric::default()],
        ..Augment::small(12, images.statistics())
    };
    let [a, b] = views(&still, &images, true, 7);
    assert_eq!(a, b);
    let [a, b] = views(&still, &images, false, 7);
    assert_ne!(a, b);
    // Their colors are their own.
    let [a, b] = views(&Augment::small(12, images.statistics()), &images, true, 7);
    assert_ne!(a, b);
}

#[test]
fn windows_fit_and_have_the_asked_area_and_aspect() {
    let rng = &mut StdRng::seed_from_u64(1);
    let ranges = CropRanges { area: (0.2, 0.5), aspect: (0.75, 4.0 / 3.0) };
    let mut tops = 0;
    for _ in 0..500 {
        let w = ranges.draw((300, 400), rng);
        assert!(w.top + w.height <= 300 && w.left + w.width <= 400);
        let (area, aspect) = (w.height * w.width, w.width as f64 / w.height as f64);
        assert!((23_600..=60_400).contains(&area), "{w:?}");
        assert!((0.74..1.35).contains(&aspect), "{w:?}");
        tops += w.top;
    }
    assert!(tops > 500 * 20, "windows should not all be at the top");
    // Nothing of that aspect fits: the middle, as far as the range allows.
    for (size, expected) in [
        ((10, 400), (0, 193, 10, 13)),
        ((400, 10), (193, 0, 13, 10)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 400), (0, 199, 1, 1)),
    ] {
        let large = CropRanges { area: (0.9, 1.0), ..ranges };
        let w = large.draw(size, rng);
        assert_eq!((w.top, w.left, w.height, w.width), expected, "{size:?}");
    }
}

#[test]
fn shrinking_averages() {
    // A fine chessboard is gray from afar; taking single pixels would make it black or white.
    let board = RgbImage::from_fn(240, 240, |x, y| Rgb([((x + y) % 2 * 255) as u8; 3]));
    let picture = Picture::Rgb(board);
    for filter in [Interpolation::Bilinear, Interpolation::Bicubic] {
        let mut shaper = Shaper::default();
        shaper.filter = filter;
        let mut out = vec![0; 3 * 16 * 16];
        let window = picture.middle(0.5);
        assert_eq!((window.top, window.height), (60, 120));
        shaper.shape(&picture, window, 16, &mut out).unwrap();
        assert!(out.iter().all(|p| (124..=131).contains(p)), "{out:?}");
    }
}

/// What `photometric` makes of random colors, beside the colors.
fn changed(photometric: &Photometric, side: usize, channels: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rng = StdRng::seed_from_u64(9);
    let before: Vec<f32> = (0..channels * side * side).map(|_| rng.random()).collect();
    let mut after = before.clone();
    photometric.apply(&mut after, side, &mut rng);
    (before, after)
}

/// `f` of each pixel.
fn each_pixel(planes: &[f32], f: impl Fn([f32; 3]) -> [f32; 3]) -> Vec<f32> {
    let area = planes.len() / 3;
    let mut out = vec![0.0; planes.len()];
    for i in 0..area {
        let pixel = f([planes[i], planes[area + i], planes[2 * area + i]]);
        (0..3).for_each(|c| out[c * area + i] = pixel[c]);
    }
    out
}

fn luma([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

#[test]
fn factors_act_about_black_about_the_mean_and_about_gray() {
    let always = Photometric { jitter: 1.0, ..Default::default() };
    let (before, after) = changed(&Photometric { brightness: (1.3, 1.3), ..always.clone() }, 10, 3);
    let expected: Vec<f32> = before.iter().map(|p| (1.3 * p).min(1.0)).collect();
    assert_near(&after, &expected, 1e-6);

    let (before, after) = changed(&Photometric { contrast: (0.5, 0.5), ..always.clone() }, 10, 3);
    let gray = each_pixel(&before, |p| [luma(p); 3]);
    let mean = gray.iter().sum::<f32>() / gray.len() as f32;
    let expected: Vec<f32> = before.iter().map(|p| mean + 0.5 * (p - mean)).collect();
    assert_near(&after, &expected, 1e-5);

    let (before, after) = changed(&Photometric { saturation: (1.8, 1.8), ..always.clone() }, 10, 3);
    let expected =
        each_pixel(&before, |p| p.map(|c| (luma(p) + 1.8 * (c - luma(p))).clamp(0.0, 1.0)));
    assert_near(&after, &expected, 1e-6);

    let grayscale = Photometric { grayscale: 1.0, ..Default::default() };
    let (before, after) = changed(&grayscale, 10, 3);
    assert_near(&after, &each_pixel(&before, |p| [luma(p); 3]), 1e-6);
}

/// The hexagon of hues, case by case.
fn hue_turned([r, g, b]: [f32; 3], turn: f32) -> [f32; 3] {
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    let d = max - min;
    if d == 0.0 {
        return [r, g, b];
    }
    let h = if max == r {
        ((g - b) / d).rem_euclid(6.0)
    } else if max == g {
        (b - r) / d + 2.0
    } else {
        (r - g) / d + 4.0
    };
    let h = (h / 6.0 + turn).rem_euclid(1.0) * 6.0;
    let x = d * (1.0 - (h % 2.0 - 1.0).abs());
    let rgb = match h as usize {
        0 => [d, x, 0.0],
        1 => [x, d, 0.0],
        2 => [0.0, d, x],
        3 => [0.0, x, d],
        4 => [x, 0.0, d],
        _ => [d, 0.0, x],
    };
    rgb.map(|c| c + min)
}

#[test]
fn hue_turns_as_the_slow_twin_does() {
    for turn in [-0.5, -0.31, -0.1, 0.05, 1.0 / 3.0, 0.5] {
        let photometric = Photometric { jitter: 1.0, hue: (turn, turn), ..Default::default() };
        let (before, after) = changed(&photometric, 16, 3);
        assert_near(&after, &each_pixel(&before, |p| hue_turned(p, turn)), 1e-5);
    }
    // A third of a turn takes red to green; gray has no hue.
    let third = Photometric { jitter: 1.0, hue: (1.0 / 3.0, 1.0 / 3.0), ..Default::default() };
    let mut pixel = vec![1.0, 0.0, 0.0];
    third.apply(&mut pixel, 1, &mut StdRng::seed_from_u64(1));
    assert_near(&pixel, &[0.0, 1.0, 0.0], 1e-5);
    let mut pixel = vec![0.4; 3];
    third.apply(&mut pixel, 1, &mut StdRng::seed_from_u64(1));
    assert_near(&pixel, &[0.4; 3], 1e-6);
}

#[test]
fn blur_weighs_the_neighborhood() {
    let mirror = |i: isize, n: isize| {
        let mut i = i;
        while !(0..n).contains(&i) {
            i = if i < 0 { -i } else { 2 * (n - 1) - i };
        }
        i as usize
    };
    // Sides smaller than the kernel are mirrored more than once.
    for side in [11usize, 3] {
        let photometric = Photometric { blur: 1.0, sigma: (1.2, 1.2), ..Default::default() };
        let (before, after) = changed(&photometric, side, 2);
        let weight = |k: isize| (-0.5 * (k as f32 / 1.2).powi(2)).exp();
        let mut expected = Vec::new();
        for plane in before.chunks(side * side) {
            for y in 0..side as isize {
                for x in 0..side as isize {
                    let (mut sum, mut total) = (0.0, 0.0);
                    for (dy, dx) in (-4..=4).flat_map(|dy| (-4..=4).map(move |dx| (dy, dx))) {
                        let w = weight(dy) * weight(dx);
                        let at =
                            mirror(y + dy, side as isize) * side + mirror(x + dx, side as isize);
                        sum += w * plane[at];
                        total += w;
                    }
                    expected.push(sum / total);
                }
            }
        }
        assert_near(&after, &expected, 1e-5);
    }
}

#[test]
fn solarization_inverts_what_is_bright() {
    let photometric = Photometric { solarize: 1.0, ..Default::default() };
    let (before, after) = changed(&photometric, 9, 1);
    let expected: Vec<f32> = before.iter().map(|&p| if p >= 0.5 { 1.0 - p } else { p }).collect();
    assert_near(&after, &expected, 0.0);
}

#[test]
fn the_recipe_of_large_pictures_stays_in_range_and_is_applied_as_often_as_it_says() {
    let [first, second] = Augment::imagenet(0.08).views;
    let mut rng = StdRng::seed_from_u64(4);
    let before: Vec<f32> = (0..3 * 64).map(|_| rng.random()).collect();
    let gray = |p: &[f32]| p[..64] == p[64..128];
    let mut grays = [0, 0];
    for _ in 0..1000 {
        for (view, count) in [&first, &second].into_iter().zip(&mut grays) {
            let mut planes = before.clone();
            view.apply(&mut planes, 8, &mut rng);
            assert!(planes.iter().all(|p| (-1e-5..=1.0 + 1e-5).contains(p)));
            *count += usize::from(gray(&planes));
        }
    }
    // A fifth; four standard deviations of a binomial are 50.
    assert!(grays.iter().all(|n| (150..250).contains(n)), "{grays:?}");
}

#[test]
fn recipes_are_written_down_and_checked() {
    let recipe = Augment::imagenet(0.25);
    recipe.check().unwrap();
    let text = serde_json::to_string(&recipe).unwrap();
    assert_eq!(serde_json::from_str::<Augment>(&text).unwrap(), recipe);
    let bad = |change: fn(&mut Augment)| {
        let mut recipe = Augment::imagenet(0.25);
        change(&mut recipe);
        let loader = Loader::new(memory(4, 3), recipe, config(2, 1));
        format!("{:#}", loader.err().expect("the recipe should be refused"))
    };
    for (message, parts) in [
        (bad(|r| r.crop.area = (0.0, 1.0)), "positive ranges"),
        (bad(|r| r.crop.area = (0.5, 1.5)), "area: expected a range within 0 to 1"),
        (bad(|r| r.flip = f64::NAN), "flip: expected a probability, got NaN"),
        (bad(|r| r.views[1].hue = (0.2, 0.1)), "hue: expected a range"),
        (bad(|r| r.views[0].kernel = 8), "odd side, got 8"),
        (bad(|r| r.side = 0), "at least 1"),
        (bad(|r| r.statistics.truncate(1)), "3 channels"),
    ] {
        assert!(message.contains(parts), "expected `{parts}` in: {message}");
    }
}

#[test]
fn batches_follow_from_seed_and_step() {
    let load = |config: LoaderConfig| {
        let source = memory(10, 3);
        let augment = Augment {
            views: Augment::imagenet(0.3).views,
            ..Augment::small(12, vec![(0.5, 0.25); 3])
        };
        let steps = config.steps - config.first_step;
        rest(&mut Loader::new(source, augment, config).unwrap(), steps)
    };
    let base = LoaderConfig { shared: 1, ..config(3, 8) };
    let all = load(base);
    // Three whole batches make an epoch, in which no image comes twice; the next has another order.
    let mut seen: Vec<usize> = all[..3].iter().flat_map(|(i, ..)| i.clone()).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 9);
    let order = |steps: &[(Vec<usize>, Vec<f32>, Vec<f32>)]| {
        steps.iter().flat_map(|(i, ..)| i.clone()).collect::<Vec<_>>()
    };
    assert_ne!(order(&all[..3]), order(&all[3..6]));

    let other = |change: fn(&mut LoaderConfig)| {
        let mut config = base;
        change(&mut config);
        load(config)
    };
    assert_eq!(other(|c| (c.workers, c.prefetch) = (3, 0)), all);
    // A run that goes on, in the middle of an epoch and at its end.
    assert_eq!(other(|c| c.first_step = 3), all[3..]);
    assert_eq!(other(|c| c.first_step = 7), all[7..]);
    assert_eq!(other(|c| c.first_step = 8), []);
    let seeded = other(|c| c.seed = 6);
    assert!(seeded.iter().zip(&all).all(|(a, b)| a.1 != b.1));
    // One image, two steps: other views of it.
    let mut one =
        Loader::new(memory(1, 1), Augment::small(12, vec![(0.5, 0.25)]), config(1, 2)).unwrap();
    let steps = rest(&mut one, 2);
    assert_ne!(steps[0].1, steps[1].1);
    // The images that share a crop are the last, and no other image changes.
    let apart = other(|c| c.shared = 0);
    let view = 3 * 144;
    for (a, b) in all.iter().zip(&apart) {
        assert_eq!(a.1[..2 * view], b.1[..2 * view]);
        assert_eq!(a.2[..2 * view], b.2[..2 * view]);
        assert_ne!(a.2[2 * view..], b.2[2 * view..]);
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let refused = |config: LoaderConfig| {
        let loader = Loader::new(memory(4, 1), whole(12, 1), config);
        format!("{:#}", loader.err().expect("should be refused"))
    };
    let too_large = refused(config(5, 1));
    assert!(too_large.contains("1 to 4 images") && too_large.contains("got 5"), "{too_large}");
    assert!(refused(config(0, 1)).contains("got 0"));
    let shared = LoaderConfig { shared: 3, ..config(2, 1) };
    assert!(refused(shared).contains("at most 2"));
    let idle = LoaderConfig { workers: 0, ..config(2, 1) };
    assert!(refused(idle).contains("worker"));
    let mut loader = Loader::new(memory(4, 1), whole(12, 1), config(2, 1)).unwrap();
    loader.next(&CPU).unwrap();
    let error = loader.next(&CPU).err().unwrap().to_string();
    assert!(error.contains("at most 1 steps"), "{error}");
    // Left with batches that nobody takes: the threads end with it.
    drop(Loader::new(memory(4, 1), whole(12, 1), config(2, usize::MAX)).unwrap());
}

/// A ramp from left to right says where its window lies and whether it is mirrored; a factor, how bright it became.
#[test]
fn parameters_say_what_was_drawn() {
    let side = 48;
    let ramp = |at: usize| (at % side * 2) as u8;
    let images =
        Images { pixels: (0..side * side).map(ramp).collect(), labels: vec![0], channels: 1, side };
    let brighter = Photometric {
        jitter: 0.5,
        brightness: (0.5, 1.5),
        saturation: (0.5, 1.5),
        hue: (-0.1, 0.1),
        ..Photometric::default()
    };
    let augment = Augment {
        crop: CropRanges { area: (0.3, 0.6), aspect: (0.8, 1.2) },
        flip: 0.5,
        views: [brighter.clone(), brighter],
        ..whole(side, 1)
    };
    let mut mirrored = 0;
    for seed in 0..40 {
        let mut views = [vec![0.0; side * side], vec![0.0; side * side]];
        let rng = &mut StdRng::seed_from_u64(seed);
        let shaper = &mut Shaper::default();
        let out = views.each_mut().map(|v| v.as_mut_slice());
        let picture = images.picture(0);
        let drawn = augment.views(&picture, seed % 4 == 0, rng, shaper, out).unwrap();
        for (view, drawn) in views.iter().zip(&drawn) {
            let (crop, jitter) = (drawn.crop.unwrap(), drawn.jitter.unwrap());
            let mean = view.iter().sum::<f32>() / view.len() as f32;
            let center = (crop.left + crop.width / 2.0) * side as f32 - 0.5;
            let expected = jitter.brightness * 2.0 * center / 255.0;
            assert!((mean - expected).abs() < 0.01, "{mean} {expected} {drawn:?}");
            assert_eq!(view[0] > view[side - 1], drawn.flip.unwrap());
            assert_eq!(jitter.applied, jitter.brightness != 1.0);
            // Gray images have neither.
            assert_eq!((jitter.saturation, jitter.hue), (1.0, 0.0));
            assert_eq!((drawn.blur, drawn.solarize), (Some(0.0), Some(1.0)));
            mirrored += usize::from(drawn.flip.unwrap());
        }
        if seed % 4 == 0 {
            assert_eq!((drawn[0].crop, drawn[0].flip), (drawn[1].crop, drawn[1].flip));
        }
    }
    assert!((20..60).contains(&mirrored), "{mirrored}");
}

#[test]
fn extras_change_nothing_else() {
    let augment = Augment { side: 12, ..Augment::small(12, vec![(0.3, 0.2)]) };
    let config = LoaderConfig { shared: 2, ..config(8, 3) };
    let batches = |extras: Extras| -> Vec<(Vec<Vec<f32>>, Drawn)> {
        let loader = Loader::with_extras(memory(24, 1), augment.clone(), config, extras);
        let mut loader = loader.unwrap();
        (0..3)
            .map(|_| {
                let batch = loader.next(&CPU).unwrap();
                (vec![values(&batch.first), values(&batch.second)], batch.drawn)
            })
            .collect()
    };
    let plain = batches(Extras::default());
    assert!(plain.iter().all(|(_, drawn)| drawn.third.is_none()));
    assert!(plain.iter().all(|(_, drawn)| drawn.parameters[0].len() == 6));

    // A third view leaves the others as they are.
    let small = Third::Small(SmallCrop { side: 8, area: (0.2, 1.0) });
    for (third, side) in [(Third::Untouched, 12), (small, 8)] {
        let extras = Extras { third: Some(third), ..Extras::default() };
        for ((views, drawn), (expected, known)) in batches(extras).iter().zip(&plain) {
            assert!(views == expected);
            assert_eq!(drawn.parameters, known.parameters);
            let third = drawn.third.as_ref().unwrap();
            assert_eq!(third.dims(), [6, 1, side, side]);
        }
    }

    // Images alike: the first of each group draws as ever, the others as it does; the posed ones are left alone.
    let extras = Extras { alike: vec![0, 0, 2, 2, 4, 4], third: None };
    for ((views, drawn), (expected, known)) in batches(extras).iter().zip(&plain) {
        for view in 0..2 {
            let (drawn, known) = (&drawn.parameters[view], &known.parameters[view]);
            for i in 0..6 {
                assert_eq!(drawn[i], known[i / 2 * 2], "image {i}");
            }
            assert_ne!(known[0], known[1]);
            let picture = |i: usize| i * 144..(i + 1) * 144;
            for i in [0, 2, 4, 6, 7] {
                assert!(views[view][picture(i)] == expected[view][picture(i)], "image {i}");
            }
            assert!(views[view][picture(1)] != expected[view][picture(1)]);
        }
    }
    let beyond = Extras { alike: vec![0; 7], third: None };
    let error = Loader::with_extras(memory(24, 1), augment.clone(), config, beyond).err();
    assert!(error.unwrap().to_string().contains("at most 6 images"));
}

/// Images of different sizes that are to be augmented alike show the same part of themselves.
#[test]
fn a_crop_is_carried_to_another_size() {
    use ser_reg_trainers::{augment::Crop, data::Window};
    let crop = Crop { window: Window { top: 3, left: 0, height: 6, width: 12 }, flip: true };
    let carried = crop.carried((12, 12), (24, 36)).window;
    let Window { top, left, height, width } = carried;
    assert_eq!([top, left, height, width], [6, 0, 12, 36]);
    // A pixel at least, whatever the size.
    let carried = crop.carried((12, 12), (1, 1)).window;
    assert_eq!((carried.height, carried.width), (1, 1));
    assert!(carried.top == 0 && carried.left == 0);
}

/// Files of `count` images in two classes: discs and squares on changing colors.
fn generated(count: usize, size: (u32, u32), extensions: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..count {
        let class = dir.path().join(["disc", "square"][i % 2]);
        fs::create_dir_all(&class).unwrap();
        let (w, h) = (size.0 as f32, size.1 as f32);
        let picture = RgbImage::from_fn(size.0, size.1, |x, y| {
            let (x, y) = (x as f32 / w - 0.5, y as f32 / h - 0.5);
            let inside = match i % 2 {
                0 => x * x + y * y < 0.08,
                _ => x.abs().max(y.abs()) < 0.25,
            };
            let tint = (37 * i % 256) as u8;
            match inside {
                true => Rgb([255 - tint, tint, (255.0 * (x + 0.5)) as u8]),
                false => Rgb([tint, (255.0 * (y + 0.5)) as u8, 200]),
            }
        });
        let extension = extensions[i % extensions.len()];
        picture.save(class.join(format!("{i:04}.{extension}"))).unwrap();
    }
    dir
}

fn source(dir: &Path) -> Source {
    data::load(dir, &Wanted::streamed(16)).unwrap().train
}

#[test]
fn a_folder_is_streamed_whatever_some_of_its_files_hold() {
    let dir = generated(30, (40, 30), &["jpg", "jpg", "png"]);
    let train = source(dir.path());
    let damaged = [2, 3, 11].map(|i| train.path(i));
    let whole = fs::read(&damaged[0]).unwrap();
    fs::write(&damaged[0], &whole[..whole.len() - 40]).unwrap();
    fs::write(&damaged[1], "text").unwrap();
    fs::remove_file(&damaged[2]).unwrap();
    let load = |workers: usize, first_step: usize| {
        let config = LoaderConfig { workers, first_step, shared: 2, ..config(6, 12) };
        let augment = Augment { side: 20, ..Augment::imagenet(0.2) };
        Loader::new(train.clone(), augment, config).unwrap()
    };
    let mut loader = load(2, 0);
    let mut skipped = Vec::new();
    let mut batches = Vec::new();
    for _ in 0..12 {
        let batch = loader.next(&CPU).unwrap();
        assert_eq!(batch.first.dims(), [6, 3, 20, 20]);
        // Nothing damaged is shown, nothing twice.
        let mut indices = batch.indices.clone();
        assert!(indices.iter().all(|i| ![2, 3, 11].contains(i)), "{indices:?}");
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), 6);
        skipped.extend(batch.skipped);
        batches.push((batch.indices, values(&batch.first), values(&batch.second)));
    }
    // Three epochs, each of which meets the three or leaves them in its rest; each is named once.
    let mut names: Vec<_> = skipped.iter().map(|(path, _)| path.clone()).collect();
    names.sort();
    let mut expected = damaged.to_vec();
    expected.sort();
    assert_eq!(names, expected);
    assert!((6..=9).contains(&loader.replaced()), "{}", loader.replaced());
    assert!(loader.waiting().as_nanos() > 0);
    assert_eq!(rest(&mut load(1, 0), 12), batches);
    assert_eq!(rest(&mut load(1, 5), 7), batches[5..]);
}

#[test]
fn nothing_is_fatal_as_long_as_one_picture_can_be_read() {
    let dir = generated(12, (8, 8), &["png"]);
    let train = source(dir.path());
    let good = 4;
    for i in (0..train.len()).filter(|i| *i != good) {
        fs::write(train.path(i), "text").unwrap();
    }
    // All of them in one batch: the one that can be read stands in for all.
    let augment = || Augment { side: 8, ..Augment::imagenet(0.5) };
    let all = train.len();
    let mut loader = Loader::new(train.clone(), augment(), config(all, 3)).unwrap();
    let batch = loader.next(&CPU).unwrap();
    assert_eq!(batch.indices, vec![good; all]);
    assert_eq!(batch.skipped.len(), all - 1);
    // In batches of two, all but one are lost whole, and look for it among all others.
    let mut loader = Loader::new(train.clone(), augment(), config(2, 2 * all)).unwrap();
    let mut skipped = 0;
    for _ in 0..2 * all {
        let batch = loader.next(&CPU).unwrap();
        assert_eq!(batch.indices, [good; 2]);
        skipped += batch.skipped.len();
    }
    assert_eq!(skipped, all - 1, "each is named once");
    fs::remove_file(train.path(good)).unwrap();
    let mut loader = Loader::new(train.clone(), augment(), config(all, 3)).unwrap();
    let error = format!("{:#}", loader.next(&CPU).err().unwrap());
    for part in ["step 0", &format!("none of the {all} images"), ".png: "] {
        assert!(error.contains(part), "expected `{part}` in: {error}");
    }
    let error = format!("{:#}", loader.next(&CPU).err().unwrap());
    assert!(error.contains("stopped"), "{error}");
}

#[test]
#[ignore = "prints how many images the loader delivers in a second"]
fn speed() {
    let train = data::load(&data::embedded(), &Wanted::default()).unwrap();
    let run = |source: &Source, augment: &Augment, config: LoaderConfig| {
        let mut loader = Loader::new(source.clone(), augment.clone(), config).unwrap();
        loader.next(&CPU).unwrap();
        let clock = std::time::Instant::now();
        (1..config.steps).for_each(|_| drop(loader.next(&CPU).unwrap()));
        (config.steps - 1) as f64 * config.batch as f64 / clock.elapsed().as_secs_f64()
    };
    let small = Augment::small(28, train.bank.statistics());
    println!("28 px, one worker: {:.0} images/s", run(&train.train, &small, config(64, 1000)));
    let dir = generated(300, (400, 300), &["jpg"]);
    let large = source(dir.path());
    for workers in [1, 2] {
        let config = LoaderConfig { workers, ..config(32, 12) };
        println!(
            "224 px, {workers} workers: {:.0} images/s",
            run(&large, &Augment::imagenet(0.08), config)
        );
    }
}
