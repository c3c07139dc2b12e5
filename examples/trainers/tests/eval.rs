//! The evaluation of a frozen encoder: each value against slow loops or a table made by hand.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use indicatif::ProgressBar;
use nalgebra::{DMatrix, DVector};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{GridOperator, Resample, TokenGrid};
use ser_reg_trainers::{
    data::{Images, draw},
    encoder::{self, Card, Network},
    eval::{
        self, Options, POSES, Part, Report, Subject,
        border::Border,
        corruption::{Corruption, Picture, SEVERITIES, generator, picture::Edge},
        dense::{
            self,
            boxes::{self, Box, Detection, Regression},
            correspondence,
            scene::Scene,
        },
        features, matching,
        perturbation::Perturbation,
        pose::Robustness,
        probe::{self, Probe},
        stability::{self, Classifier, CorruptionErrors},
    },
    knn::Bank,
    random::{self, Purpose},
    vit::{Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;

/// Images of 12x12 in three classes: a bright bar at the top, in the middle, at the bottom.
fn bars(n: usize, channels: usize, seed: u64) -> Images {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut images = Images { channels, side: 12, ..Default::default() };
    for i in 0..n {
        let class = i % 3;
        for _ in 0..channels {
            for pixel in 0..144 {
                let bright = pixel / 48 == class && (1..11).contains(&(pixel % 12));
                let noise = rng.random_range(0..40);
                images.pixels.push(if bright { 180 + noise } else { noise });
            }
        }
        images.labels.push(class as u32);
    }
    images
}

/// An image of blobs, in `channels`.
fn blobs(side: usize, channels: usize, index: usize) -> Picture {
    let mut rng = StdRng::seed_from_u64(index as u64);
    let (y, x) = (rng.random_range(0.3..0.7), rng.random_range(0.3..0.7));
    let mut pixels = Vec::new();
    for channel in 0..channels {
        for i in 0..side * side {
            let at = |p: usize| (p as f32 + 0.5) / side as f32;
            let (dy, dx) = (at(i / side) - y, at(i % side) - x);
            let stripes = 0.1 * (12.0 * at(i % side) + channel as f32).sin();
            let inside = dy * dy + dx * dx < 0.06;
            pixels.push((if inside { 0.7 } else { 0.15 }) + stripes);
        }
    }
    Picture { pixels, channels, side }
}

fn card(images: &Images) -> Card {
    let vit = VitConfig { dim: 16, depth: 3, ..VitConfig::small(images, 2, false).unwrap() };
    Card {
        vit,
        statistics: images.statistics(),
        layer: 2,
        method: "moco_v3".to_string(),
        mode: "ser".to_string(),
        seed: 5,
        network: Network::Encoder,
    }
}

/// The weights of an encoder that was never trained.
fn weights(card: &Card, seed: u64) -> Vec<(String, Tensor)> {
    let weights = Weights::seeded(seed);
    Vit::new(&card.vit, weights.builder(&CPU)).unwrap();
    let named = weights.named().into_iter();
    named.map(|(n, v)| (n, v.as_detached_tensor())).collect()
}

fn subject(card: &Card, seed: u64) -> Subject {
    Subject::new("encoder", weights(card, seed), card, &CPU).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn random(rows: usize, cols: usize, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, (rows, cols), &CPU).unwrap()
}

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(f)
}

fn near(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance, "{a} and {b}");
}

// --- linear probe and nearest neighbors ------------------------------------------------------------------------------

/// Labels that features tell with some noise.
fn noisy_labels(x: &Tensor, classes: u32, noise: f32, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let rows = x.to_vec2::<f32>().unwrap();
    let label = |row: &Vec<f32>| {
        let score = row[0] + 0.5 * row[1] + rng.random_range(-noise..noise);
        (((score + 1.5) / 3.0 * classes as f32) as u32).min(classes - 1)
    };
    rows.iter().map(label).collect()
}

#[test]
fn the_probe_finds_the_optimum_that_newton_finds() {
    let (n, d, k, l2) = (150, 4, 3, 1e-2);
    let x = random(n, d, 1);
    let labels = noisy_labels(&x, k as u32, 0.6, 2);
    let probe = Probe::with_l2(&x, &labels, l2).unwrap();

    // Newton's method on all parameters, in f64, on features standardised in the obvious way.
    let rows = x.to_vec2::<f32>().unwrap();
    let column = |c: usize| rows.iter().map(move |r| f64::from(r[c]));
    let mean: Vec<f64> = (0..d).map(|c| column(c).sum::<f64>() / n as f64).collect();
    let std: Vec<f64> = (0..d)
        .map(|c| (column(c).map(|v| (v - mean[c]).powi(2)).sum::<f64>() / n as f64).sqrt())
        .collect();
    let sample = |i: usize| {
        DVector::from_fn(d + 1, |c, _| match c < d {
            true => (f64::from(rows[i][c]) - mean[c]) / std[c],
            false => 1.0,
        })
    };
    let size = (d + 1) * k;
    let mut theta = DVector::<f64>::zeros(size);
    let probabilities = |theta: &DVector<f64>, i: usize| {
        let x = sample(i);
        let logits: Vec<f64> = (0..k).map(|c| theta.rows(c * (d + 1), d + 1).dot(&x)).collect();
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        logits.iter().map(|l| l.exp() / total).collect::<Vec<f64>>()
    };
    for _ in 0..30 {
        let mut gradient = DVector::<f64>::zeros(size);
        let mut hessian = DMatrix::<f64>::zeros(size, size);
        #[allow(clippy::needless_range_loop)] // the index stands in other tables too
        for i in 0..n {
            let (x, p) = (sample(i), probabilities(&theta, i));
            for a in 0..k {
                let residual = p[a] - f64::from(labels[i] as usize == a);
                let mut part = gradient.rows_mut(a * (d + 1), d + 1);
                part += &x * (residual / n as f64);
                for b in 0..k {
                    let curvature = p[a] * (f64::from(a == b) - p[b]) / n as f64;
                    let mut part = hessian.view_mut((a * (d + 1), b * (d + 1)), (d + 1, d + 1));
                    part += &x * x.transpose() * curvature;
                }
            }
        }
        for a in 0..k {
            for c in 0..d {
                let i = a * (d + 1) + c;
                gradient[i] += l2 * theta[i];
                hessian[(i, i)] += l2;
            }
        }
        // A common shift of all biases changes nothing: any of them is the optimum.
        for i in 0..size {
            hessian[(i, i)] += 1e-9;
        }
        theta -= hessian.lu().solve(&gradient).unwrap();
    }
    let mut largest = 0f64;
    for (i, row) in probe.probabilities(&x).unwrap().iter().enumerate() {
        for (a, b) in row.iter().zip(probabilities(&theta, i)) {
            largest = largest.max((f64::from(*a) - b).abs());
        }
    }
    assert!(largest < 1e-3, "{largest}");
    let right = probe.predict(&x).unwrap();
    assert!(probe::accuracy(&right, &labels) > 60.0);
}

#[test]
fn minimize_finds_the_minimum_of_a_narrow_valley() {
    // A quadratic whose curvatures differ by 10^4.
    let f = |x: &[f64]| {
        let (a, b) = (x[0] - 3.0, x[1] + 1.0);
        Some((0.5 * (1e3 * a * a + 0.1 * b * b), vec![1e3 * a, 0.1 * b]))
    };
    let x = probe::minimize(vec![0.0, 0.0], f);
    assert!((x[0] - 3.0).abs() < 1e-3 && (x[1] + 1.0).abs() < 1e-2, "{x:?}");
    // What cannot be evaluated ends the search where it is.
    assert_eq!(probe::minimize(vec![1.0], |_| None), [1.0]);
}

#[test]
fn the_strength_is_the_best_of_the_grid_on_a_held_out_tenth() {
    let x = random(200, 60, 3);
    let labels = noisy_labels(&x, 2, 2.0, 4);
    let probe = Probe::fit(&x, &labels).unwrap();
    let rows = |held: bool| -> (Tensor, Vec<u32>) {
        let mut seen = [0; 2];
        let is_held = |i: &u32| {
            let seen = &mut seen[labels[*i as usize] as usize];
            *seen += 1;
            (*seen % 10 == 0) == held
        };
        let chosen: Vec<u32> = (0..200).filter(is_held).collect();
        let part = x.index_select(&Tensor::new(&chosen[..], &CPU).unwrap(), 0);
        let labels = chosen.iter().map(|&i| labels[i as usize]).collect();
        (part.unwrap(), labels)
    };
    let ((train, train_labels), (test, test_labels)) = (rows(false), rows(true));
    let score = |l2: f64| {
        let probe = Probe::with_l2(&train, &train_labels, l2).unwrap();
        probe::accuracy(&probe.predict(&test).unwrap(), &test_labels)
    };
    let scores: Vec<(f64, f64)> = probe::GRID.iter().map(|&l2| (l2, score(l2))).collect();
    let best = scores.iter().map(|s| s.1).fold(0.0, f64::max);
    assert_eq!(probe.held_out, Some(best), "{scores:?}");
    let first = scores.iter().find(|s| s.1 == best).unwrap().0;
    assert_eq!(probe.l2, first, "{scores:?}");
    assert!(scores.iter().any(|s| s.1 < best), "{scores:?}");
}

#[test]
fn the_held_out_tenth_has_every_class() {
    // Classes in turn, one after the other, and too few of each to hold any out.
    let turns: Vec<u32> = (0..200).map(|i| i % 10).collect();
    let blocks: Vec<u32> = (0..200).map(|i| i / 20).collect();
    for labels in [&turns, &blocks] {
        let mut x = vec![0f32; 200 * 10];
        for (row, &label) in x.chunks_exact_mut(10).zip(labels) {
            row[label as usize] = 1.0;
        }
        let x = Tensor::from_vec(x, (200, 10), &CPU).unwrap();
        let probe = Probe::fit(&x, labels).unwrap();
        assert_eq!(probe.held_out, Some(100.0));
    }
    let few: Vec<u32> = (0..27).map(|i| i % 3).collect();
    let probe = Probe::fit(&random(27, 4, 1), &few).unwrap();
    assert_eq!(probe.held_out, None);
}

#[test]
fn separable_features_are_told_apart() {
    let labels: Vec<u32> = (0..90).map(|i| i % 3).collect();
    let noise = random(90, 5, 7).to_vec2::<f32>().unwrap();
    let corners = [[3.0, 0.0], [-3.0, 2.0], [0.0, -3.0f32]];
    let rows = noise.iter().zip(&labels).flat_map(|(noise, &l)| {
        let corner = corners[l as usize];
        (0..5).map(move |c| noise[c] * 0.3 + corner.get(c).copied().unwrap_or(0.0))
    });
    let x = Tensor::from_vec(rows.collect::<Vec<f32>>(), (90, 5), &CPU).unwrap();
    let probe = Probe::fit(&x, &labels).unwrap();
    assert_eq!(probe::accuracy(&probe.predict(&x).unwrap(), &labels), 100.0);
    let bank = Bank::new(&x, &labels).unwrap();
    assert_eq!(bank.predict(&x).unwrap(), labels);
    assert_eq!(bank.accuracy(&x, &labels).unwrap(), 100.0);
    // A constant feature changes nothing, though its deviation is zero.
    let constant = Tensor::ones((90, 1), DType::F32, &CPU).unwrap();
    let x = Tensor::cat(&[&x, &constant], 1).unwrap();
    let probe = Probe::fit(&x, &labels).unwrap();
    assert_eq!(probe::accuracy(&probe.predict(&x).unwrap(), &labels), 100.0);
}

#[test]
fn a_probe_needs_two_classes_and_a_label_each() {
    let x = random(30, 3, 0);
    let error = |labels: &[u32]| format!("{:#}", Probe::fit(&x, labels).err().unwrap());
    assert!(error(&[4; 30]).contains("at least two classes, got only class 4"));
    assert!(error(&[0, 1]).contains("30 features, got 2"));
}

// --- poses ------------------------------------------------------------------------------------------------------------

#[test]
fn robustness_of_a_table_made_by_hand() {
    let labels = [0, 1, 2, 0];
    let predictions = [
        vec![0, 1, 2, 1], // 3 of 4
        vec![0, 1, 0, 0], // 3 of 4, agrees in 2
        vec![0, 2, 0, 1], // 1 of 4, agrees in 2
    ];
    let r = Robustness::of(&predictions, &labels);
    assert_eq!(r.accuracy, [75.0, 75.0, 25.0]);
    near(r.mean, 175.0 / 3.0, 1e-9);
    assert_eq!(r.moved, 50.0);
    assert_eq!(r.worst_element, 25.0);
    assert_eq!(r.worst_case, 25.0);
    assert_eq!(r.consistency, 50.0);
}

// --- corruptions ------------------------------------------------------------------------------------------------------

fn distance(a: &Picture, b: &Picture) -> f64 {
    let pairs = a.pixels.iter().zip(&b.pixels);
    let total: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (total / a.pixels.len() as f64).sqrt()
}

#[test]
fn corruptions_stay_in_range_and_grow_with_severity() {
    for (side, channels) in [(28, 1), (32, 3), (64, 3)] {
        let mut overall = [0.0; SEVERITIES];
        for corruption in Corruption::ALL {
            let mut means = [0.0; SEVERITIES];
            for index in 0..12 {
                let x = blobs(side, channels, index);
                for (level, mean) in means.iter_mut().enumerate() {
                    let y = corruption.of(&x, level + 1, 3, index);
                    assert_eq!((y.channels, y.side), (channels, side));
                    let name = corruption.name();
                    let inside = y.pixels.iter().all(|p| (0.0..=1.0).contains(p));
                    assert!(inside, "{name} at {}", level + 1);
                    *mean += distance(&x, &y) / 12.0;
                }
            }
            let name = corruption.name();
            assert!(means.iter().all(|m| *m > 1e-3), "{name}: {means:?}");
            // The official levels of these trade one parameter for another.
            let mixed = [
                Corruption::GlassBlur,
                Corruption::Elastic,
                Corruption::Snow,
                Corruption::FrostLike,
            ];
            if mixed.contains(&corruption) {
                assert!(means[4] > 0.5 * means[0], "{name}: {means:?}");
            } else {
                // Levels 3 and 4 of motion blur differ in a tail of the kernel that no pixel feels.
                let grows = means.windows(2).all(|m| m[1] >= m[0]) && means[4] > 1.2 * means[0];
                assert!(grows, "{name} at {side}: {means:?}");
            }
            for (total, mean) in overall.iter_mut().zip(means) {
                *total += mean;
            }
        }
        assert!(overall.windows(2).all(|m| m[1] > m[0]), "{overall:?}");
    }
}

#[test]
fn corruptions_follow_from_the_seed() {
    use rayon::prelude::*;
    let run = |threads: usize, seed: u64| -> Vec<Picture> {
        with_threads(threads, || {
            let all: Vec<_> =
                Corruption::ALL.iter().flat_map(|c| (0..4).map(move |i| (c, i))).collect();
            let corrupt = |&(c, i): &(&Corruption, usize)| c.of(&blobs(28, 1, i), 3, seed, i);
            all.par_iter().map(corrupt).collect()
        })
    };
    assert_eq!(run(1, 0), run(3, 0));
    let differ = run(1, 0).iter().zip(run(1, 1)).filter(|(a, b)| *a != b).count();
    // Nine of the fifteen draw something.
    assert_eq!(differ, 9 * 4);
    // One image twice, at two places of a set, is corrupted differently.
    let x = blobs(28, 1, 0);
    let noise = |i| Corruption::GaussianNoise.of(&x, 3, 0, i);
    assert_ne!(noise(0), noise(1));
}

#[test]
fn a_plain_picture_has_nothing_to_blur_or_bend() {
    let still = [
        Corruption::DefocusBlur,
        Corruption::GlassBlur,
        Corruption::MotionBlur,
        Corruption::ZoomBlur,
        Corruption::Contrast,
        Corruption::Elastic,
        Corruption::Pixelate,
        Corruption::Jpeg,
    ];
    for side in [28, 64] {
        for corruption in still {
            for severity in 1..=SEVERITIES {
                let x = Picture::plane(side, 128.0 / 255.0);
                let d = distance(&x, &corruption.of(&x, severity, 0, 0));
                assert!(d < 5e-3, "{}: {d}", corruption.name());
            }
        }
    }
}

#[test]
fn brightness_keeps_the_hue_and_noise_the_mean() {
    let mut x = Picture::plane(2, 0.0);
    x.channels = 3;
    // Pixels black, red, dark orange, white.
    x.pixels = vec![
        0.0, 0.6, 0.4, 1.0, //
        0.0, 0.0, 0.2, 1.0, //
        0.0, 0.0, 0.0, 1.0,
    ];
    let y = Corruption::Brightness.of(&x, 4, 0, 0);
    let expected = [
        0.2, 0.8, 0.6, 1.0, //
        0.2, 0.0, 0.3, 1.0, //
        0.2, 0.0, 0.0, 1.0f32,
    ];
    for (a, b) in y.pixels.iter().zip(expected) {
        assert!((a - b).abs() < 1e-6, "{:?}", y.pixels);
    }
    let x = Picture::plane(32, 0.5);
    for (corruption, std) in [
        (Corruption::GaussianNoise, 0.1),
        (Corruption::ShotNoise, (0.5 / 50.0f64).sqrt()),
        (Corruption::ImpulseNoise, 0.5 * 0.07f64.sqrt()),
    ] {
        let (mut mean, mut square) = (0.0, 0.0);
        for i in 0..20 {
            for p in corruption.of(&x, 5, 0, i).pixels {
                mean += f64::from(p - 0.5) / 20480.0;
                square += f64::from(p - 0.5).powi(2) / 20480.0;
            }
        }
        assert!(mean.abs() < 4e-3, "{}: {mean}", corruption.name());
        near(square.sqrt(), std, 0.06 * std);
    }
}

#[test]
fn an_encoder_relative_to_itself_has_an_mce_and_a_flip_rate_of_a_hundred() {
    let (train, test) = (bars(60, 1, 0), bars(24, 1, 1));
    let subject = subject(&card(&train), 1);
    let twin = Subject::new("twin", weights(&subject.card, 1), &subject.card, &CPU).unwrap();
    let features =
        eval::features::of(&train, &subject.card.statistics, &CPU, None, |x| subject.encode(x));
    let probe = Probe::fit(&features.unwrap(), &train.labels).unwrap();
    let classify = |subject| Classifier { subject, probe: &probe };
    let (own, other) = (classify(&subject), classify(&twin));
    let c = stability::corruptions(&own, &other, &test, 24, 0, || ()).unwrap();
    assert_eq!(c.reference, "twin");
    near(c.mce.unwrap(), 100.0, 1e-9);
    assert!(c.relative_mce.is_none_or(|m| (m - 100.0).abs() < 1e-9));
    assert_eq!(c.each.len(), 15);
    assert!(c.each.iter().all(|e| e.errors == e.errors_of_reference));
    let p = stability::perturbations(&own, &other, &test, Border::Black, 5, 0, || ());
    let p = p.unwrap();
    assert!(p.mfr.is_none_or(|m| (m - 100.0).abs() < 1e-9), "{p:?}");
    assert_eq!(p.each.len(), 9);
}

#[test]
fn corruption_errors_by_hand() {
    let of = |own: [f64; 2], reference: [f64; 2], clean| {
        CorruptionErrors::new("x", own.to_vec(), reference.to_vec(), clean)
    };
    let e = of([10.0, 30.0], [20.0, 60.0], [5.0, 15.0]);
    assert_eq!(e.ce, Some(50.0));
    near(e.relative_ce.unwrap(), 100.0 * 30.0 / 50.0, 1e-9);
    // A reference that makes no error, or gets no worse, is nothing to compare with.
    assert_eq!(of([10.0, 30.0], [0.0, 0.0], [0.0, 0.0]).ce, None);
    assert_eq!(of([10.0, 30.0], [5.0, 5.0], [0.0, 5.0]).relative_ce, None);
}

// --- perturbations ----------------------------------------------------------------------------------------------------

#[test]
fn flips_are_counted_frame_by_frame() {
    let constant: &[u32] = &[3; 31];
    let flips = stability::flip_probability;
    assert_eq!(flips(&[constant, constant], false), 0.0);
    assert_eq!(flips(&[constant], true), 0.0);
    let once: &[u32] = &[1, 1, 2, 2, 2];
    assert_eq!(flips(&[once], false), 0.25);
    assert_eq!(flips(&[once], true), 0.75);
    assert_eq!(flips(&[once, constant], false), 0.125);
    let to_and_fro: &[u32] = &[1, 2, 1];
    assert_eq!(flips(&[to_and_fro], false), 1.0);
    assert_eq!(flips(&[to_and_fro], true), 0.5);
}

#[test]
fn sequences_pass_through_the_picture_itself() {
    let x = blobs(28, 3, 1);
    for perturbation in Perturbation::ALL {
        let frames = perturbation.frames(&x, Edge::Black, 0, 0);
        let name = perturbation.name();
        assert_eq!(frames.len(), perturbation.length(), "{name}");
        assert_eq!(frames, perturbation.frames(&x, Edge::Black, 0, 0), "{name}");
        let inside = |f: &Picture| f.pixels.iter().all(|p| (0.0..=1.0).contains(p));
        assert!(frames.iter().all(inside), "{name}");
        let itself = match perturbation {
            Perturbation::MotionBlur => continue,
            Perturbation::Translate => 7,
            Perturbation::GaussianNoise | Perturbation::ShotNoise | Perturbation::ZoomBlur => 0,
            _ => 15,
        };
        let d = distance(&frames[itself], &x);
        assert!(d < 1e-5, "{name}: {d}");
        let d = distance(&frames[frames.len() - 1], &x);
        assert!(d > 1e-3, "{name}: {d}");
    }
    // One pixel to the right with each frame.
    let frames = Perturbation::Translate.frames(&x, Edge::Black, 0, 0);
    assert_eq!(frames[8].pixels[1..28], x.pixels[..27]);
    assert_eq!(frames[8].pixels[0], 0.0);
}

// --- dense ------------------------------------------------------------------------------------------------------------

fn rectangle(top: f64, left: f64, bottom: f64, right: f64) -> Box {
    Box { top, left, bottom, right }
}

#[test]
fn overlaps_by_hand() {
    let a = rectangle(0.0, 0.0, 4.0, 4.0);
    assert_eq!(a.iou(&a), 1.0);
    near(a.iou(&rectangle(0.0, 2.0, 4.0, 6.0)), 8.0 / 24.0, 1e-12);
    assert_eq!(a.iou(&rectangle(5.0, 5.0, 6.0, 6.0)), 0.0);
    // Apart in one direction only, and of negative size.
    assert_eq!(a.iou(&rectangle(0.0, 5.0, 4.0, 6.0)), 0.0);
    assert_eq!(a.iou(&rectangle(4.0, 4.0, 0.0, 0.0)), 0.0);
}

#[test]
fn mean_iou_by_hand() {
    //                 class 0: 2 of 4, class 1: 1 of 2, class 3: 0 of 1
    let (predicted, labels) = ([0, 0, 0, 1, 1], [0, 0, 3, 1, 0]);
    // Class 0: 2 in both, 4 in either; class 1: 1 and 2; class 3: 0 and 1; class 2 is not named.
    near(boxes::mean_iou(&predicted, &labels), (0.5 + 0.5 + 0.0) / 3.0, 1e-12);
    assert_eq!(boxes::mean_iou(&labels, &labels), 1.0);
}

fn detection(canvas: usize, class: u32, score: f32, at: Box) -> Detection {
    Detection { canvas, class, score, at }
}

#[test]
fn suppression_keeps_the_best_of_each_heap() {
    let a = rectangle(0.0, 0.0, 4.0, 4.0);
    let close = rectangle(0.0, 0.5, 4.0, 4.5);
    let far = rectangle(0.0, 3.0, 4.0, 7.0);
    let kept = boxes::suppress(vec![
        detection(0, 1, 0.5, close),
        detection(0, 1, 0.9, a),
        detection(0, 1, 0.4, far),
        detection(0, 2, 0.3, a),
        detection(1, 1, 0.2, a),
    ]);
    let scores: Vec<f32> = kept.iter().map(|d| d.score).collect();
    assert_eq!(scores, [0.9, 0.4, 0.3, 0.2]);
}

#[test]
fn average_precision_by_hand() {
    let (a, b) = (rectangle(0.0, 0.0, 4.0, 4.0), rectangle(8.0, 8.0, 12.0, 12.0));
    let truth = [(0, 1, a), (0, 1, b), (1, 2, a)];
    let ap = |d: &[Detection]| boxes::mean_average_precision(d, &truth);
    let perfect = [detection(0, 1, 0.9, a), detection(0, 1, 0.8, b), detection(1, 2, 0.1, a)];
    assert_eq!(ap(&perfect), 1.0);
    // Class 1: right, wrong (found already), right: precision 1 to recall one half, 2/3 to recall one. Class 2: nothing.
    let partly = [detection(0, 1, 0.9, a), detection(0, 1, 0.8, a), detection(0, 1, 0.7, b)];
    near(ap(&partly), (0.5 * 1.0 + 0.5 * 2.0 / 3.0) / 2.0, 1e-12);
    // The other canvas has no such box, and a class of its own has none at all.
    let wrong = [detection(1, 1, 0.9, a), detection(0, 7, 0.9, a)];
    assert_eq!(ap(&wrong), 0.0);
    assert_eq!(ap(&[]), 0.0);
}

#[test]
fn boxes_are_read_from_tokens_that_tell_them() {
    let grid = 6;
    let mut rng = StdRng::seed_from_u64(0);
    let (mut rows, mut owners) = (Vec::new(), Vec::new());
    for i in 0..2 * grid * grid {
        let place = i % (grid * grid);
        let (y, x) = ((place / grid) as f64 + 0.5, (place % grid) as f64 + 0.5);
        let (down, right) = (rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0));
        let (h, w) = (rng.random_range(1.0..3.0), rng.random_range(1.0..3.0));
        owners.push((i % 3 > 0).then(|| {
            let (y, x) = (y + down, x + right);
            rectangle(y - h / 2.0, x - w / 2.0, y + h / 2.0, x + w / 2.0)
        }));
        // Mixed, so that no feature is a target.
        rows.extend([down + h, right - w, h, w + down, rng.random()].map(|v: f64| v as f32));
    }
    let tokens = Tensor::from_vec(rows, (2 * grid * grid, 5), &CPU).unwrap();
    let regression = Regression::fit(&tokens, &owners, grid, 1e-9).unwrap();
    let read = regression.boxes(&tokens, grid).unwrap();
    for (owner, read) in owners.iter().zip(&read) {
        if let Some(owner) = owner {
            assert!(owner.iou(read) > 0.999, "{owner:?} {read:?}");
        }
    }
    assert!(Regression::fit(&tokens, &[None; 72], grid, 1e-9).is_err());
}

/// The sorted pixels of each patch: as a patch turns, they stay the same.
fn sorted_patches(x: &Tensor, patch: usize) -> Tensor {
    let (batch, channels, side, _) = x.dims4().unwrap();
    let grid = side / patch;
    let values = values(x);
    let mut tokens = Vec::new();
    for b in 0..batch {
        for token in 0..grid * grid {
            let (top, left) = (token / grid * patch, token % grid * patch);
            let mut pixels: Vec<f32> = (0..channels * patch * patch)
                .map(|i| {
                    let (c, p) = (i / (patch * patch), i % (patch * patch));
                    let (row, col) = (top + p / patch, left + p % patch);
                    values[((b * channels + c) * side + row) * side + col]
                })
                .collect();
            pixels.sort_by(f32::total_cmp);
            tokens.extend(pixels);
        }
    }
    Tensor::from_vec(tokens, (batch, grid * grid, channels * patch * patch), &CPU).unwrap()
}

#[test]
fn an_equivariant_map_finds_all_tokens_again_and_a_shuffled_one_few() {
    let grid = 8;
    let mut rng = StdRng::seed_from_u64(2);
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|_| rng.random()).collect();
    let images = Tensor::from_vec(pixels, (3, 1, 32, 32), &CPU).unwrap();
    let asked: Vec<bool> = (0..3 * 64).map(|i| i % 3 == 0).collect();
    let exact =
        correspondence::measure(&images, &asked, grid, |x| Ok(sorted_patches(x, 4))).unwrap();
    assert_eq!((exact.pck1, exact.exact), (100.0, 100.0));
    assert_eq!(exact.poses.len(), 7);
    // A token has 2 to 4 neighbors and itself.
    assert!((100.0 * 3.0 / 64.0..=100.0 * 5.0 / 64.0).contains(&exact.chance));
    let order: Vec<u32> = (0..64).map(|i| i * 27 % 64).collect();
    let order = Tensor::new(&order[..], &CPU).unwrap();
    let shuffled = |x: &Tensor| Ok(sorted_patches(x, 4).index_select(&order, 1)?);
    let shuffled = correspondence::measure(&images, &asked, grid, shuffled).unwrap();
    assert!(shuffled.pck1 < 30.0, "{shuffled:?}");
    let error = correspondence::measure(&images, &[false; 192], grid, |x| Ok(x.clone()));
    assert!(error.unwrap_err().to_string().contains("got 0 of 192"));
}

#[test]
fn scenes_say_where_their_objects_are() {
    let images = bars(30, 1, 0);
    let draw = |i| {
        let mut rng = generator(1, 2, i);
        let candidates = [(); 3].map(|()| rng.random_range(0..30));
        Scene::draw(&images, candidates, 32, 4, &mut rng)
    };
    let mut counts = BTreeMap::new();
    for i in 0..60 {
        let scene = draw(i);
        assert_eq!(scene.canvas.side, 32);
        assert!(scene.canvas.pixels.iter().all(|p| (0.0..=1.0).contains(p)));
        assert_eq!((scene.labels.len(), scene.owners.len()), (64, 64));
        *counts.entry(scene.objects.len()).or_insert(0) += 1;
        for (token, (label, owner)) in scene.labels.iter().zip(&scene.owners).enumerate() {
            let Some(owner) = owner else {
                assert_eq!(*label, 0);
                continue;
            };
            let object = scene.objects[*owner];
            assert_eq!(*label, object.class + 1);
            let cell = rectangle(
                (token / 8) as f64,
                (token % 8) as f64,
                (token / 8 + 1) as f64,
                (token % 8 + 1) as f64,
            );
            assert!(cell.iou(&object.at) > 0.0);
        }
        for object in &scene.objects {
            let Box { top, left, bottom, right } = object.at;
            assert!(0.0 <= top && top < bottom && bottom <= 8.0);
            assert!(0.0 <= left && left < right && right <= 8.0);
        }
        assert_eq!(scene.canvas, draw(i).canvas);
    }
    assert!(counts.keys().all(|n| (1..=3).contains(n)), "{counts:?}");
    assert_eq!(counts.len(), 3, "{counts:?}");
}

// --- encoders and the whole -------------------------------------------------------------------------------------------

#[test]
fn an_encoder_comes_back_from_its_file_or_folder() {
    let images = bars(6, 2, 0);
    let card = card(&images);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("encoder.safetensors");
    std::fs::write(&file, encoder::to_bytes(&weights(&card, 9), &card).unwrap()).unwrap();
    let x = images.normalized(0..6, &card.statistics, &CPU).unwrap();
    let expected = values(&subject(&card, 9).encode(&x).unwrap());
    for path in [folder.path(), &file] {
        let subject = Subject::load(path, &CPU).unwrap();
        assert_eq!(values(&subject.encode(&x).unwrap()), expected);
        // Built again for its own side it is the same, but for the tokens of the last block.
        let again = subject.at_side(12).unwrap().forward(&x).unwrap();
        for (a, b) in values(&again).iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5);
        }
        assert_eq!(subject.at_side(32).unwrap().config().grid(), 8);
    }
    let before = Subject::untrained(&card, &CPU).unwrap();
    let online = Weights::seeded(card.seed);
    let vit = Vit::new(&card.vit, online.builder(&CPU).pp("encoder")).unwrap();
    assert_eq!(values(&before.encode(&x).unwrap()), values(&vit.forward(&x).unwrap()));
    assert!(!before.encode(&x).unwrap().track_op());
}

#[test]
fn files_that_are_no_encoders_are_refused() {
    let card = card(&bars(3, 1, 0));
    let bytes = encoder::to_bytes(&weights(&card, 0), &card).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("encoder.safetensors");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        format!("{:#}", Subject::load(folder.path(), &CPU).err().unwrap())
    };
    assert!(error(&bytes[..bytes.len() / 2]).contains("truncated"));
    assert!(error(b"").contains("truncated"));
    let foreign = [("w", Tensor::zeros(3, DType::F32, &CPU).unwrap())];
    let foreign = safetensors::serialize(foreign, None).unwrap();
    assert!(error(&foreign).contains("written by a trainer"));
    let partial = encoder::to_bytes(&weights(&card, 0)[1..], &card).unwrap();
    assert!(error(&partial).contains("cannot load the encoder"));
    std::fs::remove_file(&path).unwrap();
    let missing = Subject::load(folder.path(), &CPU).err().unwrap();
    assert!(format!("{missing:#}").contains("encoder.safetensors"));
}

fn quick() -> Options {
    Options {
        corrupted: Some(9),
        sequences: 3,
        dense: dense::Options { train: 12, test: 6, side: Some(24), layer: None },
        matching: matching::Options { images: 4, layer: None },
        ..Options::default()
    }
}

fn evaluate(
    subject: &Subject,
    train: &Images,
    test: &Images,
    options: &Options,
) -> anyhow::Result<Report> {
    eval::evaluate(subject, None, train, test, options, &ProgressBar::hidden())
}

/// Fails unless both hold the same; numbers may differ in their last digit, which reading rounds.
fn same_json(a: &serde_json::Value, b: &serde_json::Value) {
    use serde_json::Value::{Array, Number, Object};
    match (a, b) {
        (Array(a), Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).for_each(|(a, b)| same_json(a, b));
        }
        (Object(a), Object(b)) if a.len() == b.len() => {
            a.iter().for_each(|(name, a)| same_json(a, &b[name]));
        }
        (Number(a), Number(b)) => near(a.as_f64().unwrap(), b.as_f64().unwrap(), 1e-9),
        _ => assert_eq!(a, b),
    }
}

/// Against the same draws, fitted and counted here.
#[test]
fn few_labels_are_drawn_by_class() {
    let (train, test) = (bars(60, 1, 0), bars(21, 1, 1));
    let subject = subject(&card(&train), 1);
    let options = Options {
        parts: vec![Part::Probe],
        few: vec![1, 4],
        posed: Some(9),
        floors: false,
        ..quick()
    };
    let report = evaluate(&subject, &train, &test, &options).unwrap();
    let of = |images: &Images, pose: Option<&GridOperator>| {
        let statistics = &subject.card.statistics;
        features::of(images, statistics, &CPU, pose, |x| subject.encode(x)).unwrap()
    };
    let (upright, queries) = (of(&train, None), of(&test, None));
    let shown = test.pick(&test.drawn(9));
    let moved: Vec<Tensor> = POSES
        .into_iter()
        .map(|(_, g)| {
            let grid = TokenGrid::square(12).unwrap();
            // A permutation of pixels, whatever the border.
            of(&shown, Some(&GridOperator::new(&[g], grid, &Resample::default()).unwrap()))
        })
        .collect();
    assert_eq!(report.few.len(), 2);
    for row in &report.few {
        let (mut on_upright, mut over_d4) = (Vec::new(), Vec::new());
        for i in 0..20 {
            let seed = random::seed(options.seed, Purpose::Draw, i);
            let drawn = draw::of_each_class(&train.labels, row.labels_per_class, seed);
            assert_eq!(drawn.len(), 3 * row.labels_per_class);
            let labels: Vec<u32> = drawn.iter().map(|&i| train.labels[i]).collect();
            let rows: Vec<u32> = drawn.iter().map(|&i| i as u32).collect();
            let rows = Tensor::new(rows, &CPU).unwrap();
            let probe = Probe::fit(&upright.index_select(&rows, 0).unwrap(), &labels).unwrap();
            let right = |x: &Tensor, images: &Images| {
                probe::accuracy(&probe.predict(x).unwrap(), &images.labels)
            };
            on_upright.push(right(&queries, &test));
            over_d4.extend(moved.iter().map(|x| right(x, &shown)));
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        near(row.upright, mean(&on_upright), 1e-9);
        near(row.d4, mean(&over_d4), 1e-9);
        assert_eq!(row.draws, 20);
    }
    // Twenty of each class are there.
    let many = Options { few: vec![21], ..options.clone() };
    let error = evaluate(&subject, &train, &test, &many).unwrap_err();
    assert!(format!("{error:#}").contains("expected 1 to 20"), "{error:#}");
}

#[test]
fn the_whole_is_one_json_that_reads_back_and_does_not_depend_on_threads() {
    let (train, test) = (bars(60, 1, 0), bars(21, 1, 1));
    let subject = subject(&card(&train), 1);
    let run =
        |threads| with_threads(threads, || evaluate(&subject, &train, &test, &quick()).unwrap());
    let report = run(1);
    assert_eq!(report, run(2));
    let json = serde_json::to_string_pretty(&report).unwrap();
    let back = serde_json::to_value(serde_json::from_str::<Report>(&json).unwrap()).unwrap();
    same_json(&back, &serde_json::to_value(&report).unwrap());

    let names = ["encoder", "untrained encoder", "raw pixels"];
    let rows: Vec<&str> = report.probe.iter().map(|r| r.features.as_str()).collect();
    assert_eq!(rows, names);
    let rows: Vec<&str> = report.knn.iter().map(|r| r.features.as_str()).collect();
    assert_eq!(rows, names);
    // Bars are told by their pixels.
    assert_eq!((report.probe[2].accuracy, report.knn[2].accuracy), (100.0, 100.0));
    assert_eq!(report.poses.len(), 2);
    let d4 = &report.poses[0].orbits[0];
    assert_eq!((d4.name.as_str(), d4.elements.len()), ("d4", 8));
    // The first element of either orbit is the image as it is.
    assert_eq!(d4.probe.accuracy[0], report.probe[0].accuracy);
    assert_eq!(d4.knn.accuracy[0], report.knn[0].accuracy);
    let corruptions = report.corruptions.as_ref().unwrap();
    assert_eq!((corruptions.pictures, corruptions.reference.as_str()), (9, "untrained encoder"));
    assert_eq!(report.perturbations.as_ref().unwrap().sequences, 3);
    let dense = report.dense.as_ref().unwrap();
    assert_eq!((dense.grid, dense.layer, dense.rows.len()), (6, 2, 3));
    let percent = |v: f64| (0.0..=100.0).contains(&v);
    for row in &dense.rows {
        let c = &row.correspondence;
        assert!(
            [row.miou, row.token_accuracy, row.box_iou, row.ap50, c.pck1, c.exact].map(percent)
                == [true; 6]
        );
        assert!(c.pck1 >= c.exact);
    }
}

#[test]
fn only_what_is_asked_for_is_measured() {
    let (train, test) = (bars(30, 1, 0), bars(9, 1, 1));
    let subject = subject(&card(&train), 1);
    let options = Options { parts: vec![Part::Knn], floors: false, ..quick() };
    let bar = ProgressBar::hidden();
    let report = eval::evaluate(&subject, None, &train, &test, &options, &bar).unwrap();
    assert_eq!((report.knn.len(), report.probe.len()), (1, 0));
    assert!(report.poses.is_empty() && report.dense.is_none());
    assert!(report.corruptions.is_none() && report.perturbations.is_none());
    assert_eq!(report.reference, None);
    let few = Options { parts: vec![Part::Poses], posed: Some(3), floors: false, ..quick() };
    let poses = evaluate(&subject, &train, &test, &few).unwrap().poses;
    assert_eq!(poses.len(), 1);
    // Of three images, accuracies are thirds.
    let thirds = |a: &f64| (3.0 * a / 100.0 - (3.0 * a / 100.0).round()).abs() < 1e-9;
    assert!(poses[0].orbits.iter().all(|o| o.probe.accuracy.iter().all(thirds)));
    // The bar ends where it said it would.
    assert_eq!(Some(bar.position()), bar.length());
    for parts in Part::ALL.map(|p| vec![p]).into_iter().chain([Part::ALL.to_vec()]) {
        for floors in [true, false] {
            let options = Options { parts: parts.clone(), floors, ..quick() };
            let bar = ProgressBar::hidden();
            eval::evaluate(&subject, None, &train, &test, &options, &bar).unwrap();
            assert_eq!(Some(bar.position()), bar.length(), "{parts:?} {floors}");
        }
    }
}

#[test]
fn pictures_and_parts_that_do_not_fit_are_refused() {
    let (train, test) = (bars(30, 1, 0), bars(9, 1, 1));
    let subject = subject(&card(&train), 1);
    let error = |train: &Images, test: &Images, options: &Options| {
        format!("{:#}", evaluate(&subject, train, test, options).unwrap_err())
    };
    let color = bars(30, 3, 0);
    let message = error(&color, &color, &quick());
    assert!(
        message.contains("(channels, side) (1, 12)") && message.contains("(3, 12)"),
        "{message}"
    );
    let mut wide = test.clone();
    wide.side = 24;
    wide.pixels = vec![0; 9 * 24 * 24];
    assert!(error(&train, &wide, &quick()).contains("got (1, 24)"));
    let mut one = train.clone();
    one.labels.fill(4);
    assert!(error(&one, &test, &quick()).contains("at least two classes"));
    let none = Options { parts: Vec::new(), ..quick() };
    assert!(error(&train, &test, &none).contains("at least one part"));
    let deep = Options {
        dense: dense::Options { layer: Some(4), ..quick().dense },
        parts: vec![Part::Dense],
        ..quick()
    };
    assert!(error(&train, &test, &deep).contains("one of the 3 blocks, got 4"));
    let odd = Options {
        dense: dense::Options { side: Some(30), ..quick().dense },
        parts: vec![Part::Dense],
        ..quick()
    };
    assert!(error(&train, &test, &odd).contains("multiple of the patch size 4, got 30"));

    assert_eq!("dense".parse::<Part>().unwrap(), Part::Dense);
    for name in ["", "Probe", "knn,probe"] {
        let message = name.parse::<Part>().unwrap_err().to_string();
        assert!(message.contains("expected some of probe, knn"), "{message}");
    }
    // An encoder of another shape is no reference either.
    let other_card = card(&color);
    let other = Subject::new("color", weights(&other_card, 0), &other_card, &CPU).unwrap();
    let bar = ProgressBar::hidden();
    let message = eval::evaluate(&subject, Some(&other), &train, &test, &quick(), &bar);
    assert!(format!("{:#}", message.unwrap_err()).contains("the color: expected"));
}
