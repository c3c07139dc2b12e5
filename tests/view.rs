//! Sampling of views, their application to images, partition and schedules.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{cases, max_gap, rng, values};
use proptest::prelude::*;
use rand::{RngCore, rngs::StdRng};
use ser_reg::{
    Filter, GroupAction, Resample, Result, TokenGrid,
    group::{Affine, D4, Element, Subgroup, Window},
    partition::Partition,
    schedule::Schedule,
    view::{AffineRange, CropRange, Pairing, Relative, ViewConfig, ViewPair, ViewSampler},
};

fn scaled(pairing: Pairing) -> ViewConfig {
    ViewConfig { pairing, ..ViewConfig::paper() }
}

fn unscaled(pairing: Pairing) -> ViewConfig {
    ViewConfig { pairing, ..ViewConfig::default() }
}

fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn relative_carries_the_first_view_into_the_second(
        rows in 2usize..=8, cols in 2usize..=8, complement: bool, batch in 1usize..=5, seed: u64,
    ) {
        let base = TokenGrid::new(rows, cols).unwrap();
        let pairing = if complement { Pairing::Complement } else { Pairing::Independent(Subgroup::D4) };
        let views = ViewSampler::new(base, unscaled(pairing)).unwrap().sample_pair(&mut rng(seed), batch).unwrap();
        let relative = views.relative();
        prop_assert_eq!(relative.from_grid(), views.first.grid());
        prop_assert_eq!(relative.to_grid(), views.second.grid());
        let x = common::random(&[batch, 2, 3 * rows, 3 * cols], seed);
        // Without scaling everything is a permutation, of tokens and of pixels. A map is pooled from pixels by patches.
        let pool = |x: &Tensor| x.avg_pool2d(3).unwrap();
        let (a, b) = (views.first.apply(&x).unwrap(), views.second.apply(&x).unwrap());
        let forward = relative.to_second(&Resample::default()).unwrap();
        let reverse = relative.to_first(&Resample::default()).unwrap();
        prop_assert!(max_gap(&forward.apply(&pool(&a)).unwrap(), &pool(&b)) < 1e-12);
        prop_assert!(max_gap(&reverse.apply(&pool(&b)).unwrap(), &pool(&a)) < 1e-12);
    }

    #[test]
    fn scaled_views_have_whole_tokens_within_the_ranges(complement: bool, seed: u64, rows in 4usize..=16, cols in 4usize..=16) {
        let base = TokenGrid::new(rows, cols).unwrap();
        let pairing = if complement { Pairing::Complement } else { Pairing::Independent(Subgroup::D4) };
        let views = ViewSampler::new(base, scaled(pairing)).unwrap().sample_pair(&mut rng(seed), 3).unwrap();
        let images = Tensor::zeros((3, 1, 4 * rows, 4 * cols), DType::F32, &Device::Cpu).unwrap();
        for view in [&views.first, &views.second] {
            let grid = view.grid();
            let acted = view.apply(&images).unwrap();
            prop_assert_eq!(acted.dims(), &[3, 1, 4 * grid.rows(), 4 * grid.cols()]);
            // rounding moves each side by at most half a token
            let (lo, hi) = ((rows as f64 * cols as f64 * 0.7).sqrt(), (rows as f64 * cols as f64 * 1.3).sqrt());
            let (r, c) = (grid.rows() as f64, grid.cols() as f64);
            prop_assert!((r + 0.5) * (c + 0.5) >= lo * lo && (r - 0.5) * (c - 0.5) <= hi * hi, "{}", grid);
            for g in view.elements() {
                prop_assert_eq!(g.out_grid(base).unwrap(), grid);
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_views(seed: u64, crop: bool) {
        let config = ViewConfig { crop: crop.then(CropRange::default), ..ViewConfig::paper() };
        let sampler = ViewSampler::new(TokenGrid::square(7).unwrap(), config).unwrap();
        let draw = |seed| {
            let views = sampler.sample_pair(&mut rng(seed), 4).unwrap();
            (views.first.elements().to_vec(), views.second.elements().to_vec())
        };
        prop_assert_eq!(draw(seed), draw(seed));
    }

    #[test]
    fn crops_stay_within_the_image_and_their_area(seed: u64) {
        let crop = CropRange { area: (0.2, 0.6), aspect: (0.5, 2.0) };
        let config = ViewConfig { crop: Some(crop), ..unscaled(Pairing::Independent(Subgroup::Trivial)) };
        let sampler = ViewSampler::new(TokenGrid::square(8).unwrap(), config).unwrap();
        for g in sampler.sample_pair(&mut rng(seed), 8).unwrap().first.elements() {
            let ([t, l], [b, r]) = (g.source([0.0, 0.0]), g.source([1.0, 1.0]));
            prop_assert!(t >= -1e-9 && l >= -1e-9 && b <= 1.0 + 1e-9 && r <= 1.0 + 1e-9);
            let area = (b - t) * (r - l);
            prop_assert!((0.2 - 1e-9..=0.6 + 1e-9).contains(&area), "{}", area);
        }
    }

    #[test]
    fn partitions_cover_the_batch(batch in 2usize..500, ratio in 0.0f64..=1.0) {
        let p = Partition::new(batch, ratio).unwrap();
        prop_assert_eq!(p.plain().end, p.regularized().start);
        prop_assert_eq!(p.regularized().end, batch);
        let share = (ratio * batch as f64).round() as usize;
        prop_assert_eq!(p.regularized().len(), share.max(2));
    }
}

#[test]
fn free_pairing_draws_all_relative_elements_alike() {
    let sampler = ViewSampler::new(
        TokenGrid::square(4).unwrap(),
        unscaled(Pairing::Independent(Subgroup::D4)),
    )
    .unwrap();
    let views = sampler.sample_pair(&mut rng(1), 8000).unwrap();
    for elements in [views.relative().elements(), views.first.elements(), views.second.elements()] {
        let mut counts = [0usize; 8];
        for g in elements {
            counts[g.as_d4().expect("no scale, no crop").index()] += 1;
        }
        // 1000 expected, standard deviation 30
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
    }
}

#[test]
fn complement_pairing_shares_one_reflection() {
    let sampler =
        ViewSampler::new(TokenGrid::square(4).unwrap(), unscaled(Pairing::Complement)).unwrap();
    let mut seen = [false; 8];
    for seed in 0..64 {
        let views = sampler.sample_pair(&mut rng(seed), 6).unwrap();
        let relative = views.relative();
        let first = relative.elements()[0].as_d4().unwrap();
        assert!(first.flip(), "{first:?} is no reflection");
        assert!(relative.elements().iter().all(|g| *g == Element::from(first)));
        seen[first.index()] = true;
    }
    assert_eq!(seen, [false, false, false, false, true, true, true, true]);
}

#[test]
fn a_non_square_base_keeps_one_parity_per_view() {
    let sampler = ViewSampler::new(
        TokenGrid::new(3, 5).unwrap(),
        unscaled(Pairing::Independent(Subgroup::D4)),
    )
    .unwrap();
    let mut turned = 0;
    for seed in 0..64 {
        let view = sampler.sample_pair(&mut rng(seed), 6).unwrap().first;
        let odd = |g: &Element| g.as_d4().unwrap().swaps_axes();
        assert!(view.elements().iter().all(|g| odd(g) == odd(&view.elements()[0])));
        turned += odd(&view.elements()[0]) as usize;
    }
    assert!((16..48).contains(&turned), "{turned} of 64 turned");
}

#[test]
fn a_bad_configuration_is_refused_when_built() {
    let default = ViewConfig::default();
    let crop = |area, aspect| ViewConfig { crop: Some(CropRange { area, aspect }), ..default };
    let none = AffineRange::default();
    let moved = |range: AffineRange| ViewConfig { affine: Some(range), ..default };
    let area = |area| ViewConfig { area, ..default };
    let aspect = |aspect| ViewConfig { aspect, ..default };
    let overlap = |min_overlap| ViewConfig { min_overlap, ..default };
    let rotation = |rotation| moved(AffineRange { rotation, ..none });
    let translation = |translation| moved(AffineRange { translation, ..none });
    let shear = |shear| moved(AffineRange { shear, ..none });
    let fourier = |config| ViewConfig { resample: Filter::Fourier.into(), ..config };
    let ratio = (0.75, 4.0 / 3.0);
    let cases: [(ViewConfig, [&str; 3]); 20] = [
        (area((0.0, 1.0)), ["ViewConfig::area", "0 < low", "(0, 1)"]),
        (area((1.3, 0.7)), ["ViewConfig::area", "low <= high", "1.3"]),
        (area((1.0, 1e30)), ["ViewConfig::area", "2^32 tokens", "1e30"]),
        (aspect((f64::NAN, 1.0)), ["ViewConfig::aspect", "finite", "NaN"]),
        (aspect((1e-5, 1.0)), ["ViewConfig::aspect", "0.0001 <= low", "0.00001"]),
        (aspect((1.0, 1e5)), ["ViewConfig::aspect", "high <= 10000", "100000"]),
        (crop((0.5, 1.5), ratio), ["CropRange::area", "<= 1", "1.5"]),
        (crop((1e-9, 1.0), ratio), ["CropRange::area", "0.000001 <= low", "1"]),
        (crop((0.5, 1.0), (1.0, 1e9)), ["CropRange::aspect", "<= 10000", "1000000000"]),
        (rotation((20.0, -20.0)), ["AffineRange::rotation", "low <= high", "(20, -20)"]),
        (rotation((f64::NAN, 0.0)), ["AffineRange::rotation", "<= 360", "NaN"]),
        (rotation((0.0, 400.0)), ["AffineRange::rotation", "<= 360", "400"]),
        (translation((0.0, 1.0)), ["AffineRange::translation", "< 1", "(0, 1)"]),
        (shear((-1.5, 0.0)), ["AffineRange::shear", "<= 0.999999", "-1.5"]),
        (shear((0.0, 1.0 - 1e-12)), ["AffineRange::shear", "<= 0.999999", "0.99"]),
        (overlap(-0.1), ["min_overlap", "[0, 1]", "-0.1"]),
        (overlap(1.5), ["min_overlap", "[0, 1]", "1.5"]),
        (overlap(f64::NAN), ["min_overlap", "[0, 1]", "NaN"]),
        (fourier(moved(none)), ["ViewConfig::resample", "Fourier", "whole images"]),
        (fourier(crop((0.5, 1.0), ratio)), ["ViewConfig::resample", "Fourier", "whole"]),
    ];
    let base = TokenGrid::square(400).unwrap();
    for (config, parts) in cases {
        let message = error(ViewSampler::new(base, config));
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
    assert!(ViewSampler::new(base, fourier(default)).is_ok());

    // Rotated views of a slender grid.
    let slender = ViewConfig { aspect: (1e-4, 1e4), ..rotation((0.0, 9.0)) };
    let message = error(ViewSampler::new(TokenGrid::new(1, 4000).unwrap(), slender));
    for part in ["ViewConfig::area", "rotated views", "factor of 1e5"] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn bad_input_is_named() {
    let base = TokenGrid::square(4).unwrap();
    let images = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let sampler = ViewSampler::new(base, ViewConfig::default()).unwrap();
    let larger = ViewConfig { area: (1.5, 1.5), ..ViewConfig::default() };
    let larger = ViewSampler::new(base, larger).unwrap();
    let apply = |sampler: &ViewSampler, batch: usize, shape: &[usize]| {
        let views = sampler.sample_pair(&mut rng(0), batch).unwrap();
        error(views.first.apply(&images(shape)))
    };
    let cases: [(String, &[&str]); 9] = [
        (error(sampler.sample_pair(&mut rng(0), 0)), &["at least one sample"]),
        (error(Relative::<D4>::new(vec![], base, base)), &["one element"]),
        (apply(&sampler, 2, &[2, 32, 32]), &["images (B, C, H, W)", "[2, 32, 32]"]),
        (apply(&sampler, 2, &[2, 3, 0, 32]), &["without an empty side", "0"]),
        (apply(&sampler, 2, &[3, 3, 32, 32]), &["2 samples", "for each batch", "[3, 3, 32, 32]"]),
        // A view of one sample is no view of three.
        (apply(&sampler, 1, &[3, 3, 32, 32]), &["1 samples", "sample_pair(&mut rng, batch)"]),
        (apply(&larger, 2, &[2, 3, 30, 32]), &["scaled view", "H a multiple of 4", "area (1, 1)"]),
        (
            apply(&sampler, 16, &[16, 3, 30, 33]),
            &["square images", "by a quarter", "[16, 3, 30, 33]"],
        ),
        (apply(&sampler, 16, &[16, 3, 32, 36]), &["square images", "[16, 3, 32, 36]"]),
    ];
    for (message, parts) in cases {
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
    for (batch, ratio, part) in [
        (64, -0.1, "[0, 1]"),
        (64, f64::NAN, "NaN"),
        (1, 1.0, "2 to 2^32 - 1 images, got 1"),
        (0, 0.5, "2 to 2^32 - 1 images, got 0"),
    ] {
        let message = error(Partition::new(batch, ratio));
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    let message = error(Partition::new(8, 0.5).unwrap().split(&images(&[3, 3, 32, 32])));
    assert!(message.contains("8 images") && message.contains("[3, 3, 32, 32]"), "{message}");
    assert!(error(Schedule::constant(f64::NAN)).contains("finite"));
    assert!(error(Schedule::cosine(1.0, 0.0, 0)).contains("at least one step"));
}

#[test]
fn visibility_is_the_share_that_both_views_see() {
    let grid = |rows, cols| TokenGrid::new(rows, cols).unwrap();
    let relative = |g: Vec<Element>, from, to| Relative::new(g, from, to).unwrap();
    let close = |got: &[f64], want: &[f64]| {
        assert!(
            got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12),
            "{got:?} {want:?}"
        );
    };
    // The second view is the right half of the first.
    let half = Element::from(Window::new(0.0, 0.5, 1.0, 0.5).unwrap());
    let pair = relative(vec![half, Element::identity()], grid(2, 4), grid(2, 2));
    assert_eq!(pair.pair_visibility().unwrap(), [[0.5, 1.0], [1.0, 1.0]]);
    let [first, second] = pair.visibility().unwrap();
    close(&first[..8], &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
    assert_eq!((&first[8..], second), (&[1.0; 8][..], vec![1.0; 8]));

    // A quarter of a cell: three quarters of the outermost token are inside, and it is still valid.
    let shift = Element::from(Affine::translation(0.0, 0.25 / 4.0).unwrap());
    let pair = relative(vec![shift], grid(1, 4), grid(1, 4));
    assert_eq!(pair.pair_visibility().unwrap(), [[1.0], [1.0]]);
    let [first, second] = pair.visibility().unwrap();
    close(&first, &[1.0, 1.0, 1.0, 0.75]);
    close(&second, &[0.75, 1.0, 1.0, 1.0]);

    // A square and the same square turned by 45° share 2(√2 − 1) of their area.
    let turn = Element::from(Affine::rotation(45.0).unwrap());
    let pair = relative(vec![turn], grid(16, 16), grid(16, 16));
    let area = 2.0 * (2f64.sqrt() - 1.0);
    for (seen, pair) in pair.visibility().unwrap().iter().zip(pair.pair_visibility().unwrap()) {
        let mean = seen.iter().sum::<f64>() / 256.0;
        assert!((mean - area).abs() < 0.005, "{mean}");
        assert!((pair[0] - area).abs() < 0.03, "{pair:?}");
        assert!(seen.iter().any(|v| 0.0 < *v && *v < 1.0));
    }

    // Neither view sees the other.
    let away = Element::from(Affine::translation(3.0, 0.0).unwrap());
    let pair = relative(vec![away], grid(2, 2), grid(2, 2));
    assert_eq!(pair.pair_visibility().unwrap(), [[0.0], [0.0]]);
    assert_eq!(pair.visibility().unwrap(), [vec![0.0; 4], vec![0.0; 4]]);
}

/// A range of small areas leaves no cell of a 1x16 grid; such a side keeps one cell.
#[test]
fn an_accepted_configuration_never_fails_at_a_draw() {
    let extreme = ViewConfig {
        area: (1e-300, 1.0),
        aspect: (1e-4, 1e4),
        crop: Some(CropRange { area: (1e-6, 1e-6), aspect: (1e-4, 1e4) }),
        affine: Some(AffineRange {
            rotation: (-360.0, 360.0),
            translation: (-0.999, 0.999),
            shear: (0.999_999, 0.999_999),
        }),
        min_overlap: 1.0,
        ..ViewConfig::default()
    };
    let thin = ViewConfig { area: (0.2, 1.0), ..ViewConfig::paper() };
    for (config, base, draws) in [
        (thin, TokenGrid::new(1, 16), 1000),
        (ViewConfig { area: (0.001, 1.0), ..thin }, TokenGrid::square(7), 1000),
        (extreme, TokenGrid::square(3), 20),
        (ViewConfig { pairing: Pairing::Complement, ..extreme }, TokenGrid::new(1, 16), 20),
    ] {
        let base = base.unwrap();
        let sampler = ViewSampler::new(base, config).unwrap();
        let rng = &mut rng(0);
        for _ in 0..draws {
            let views = sampler.sample_pair(rng, 2).unwrap();
            views.relative().visibility().unwrap();
            let images =
                Tensor::zeros((2, 1, 2 * base.rows(), 2 * base.cols()), DType::F32, &Device::Cpu);
            let images = images.unwrap();
            for view in [&views.first, &views.second] {
                let (rows, cols) = (view.grid().rows(), view.grid().cols());
                assert_eq!(view.apply(&images).unwrap().dims(), [2, 1, 2 * rows, 2 * cols]);
            }
        }
    }
}

/// A layer with padding has grids that do not divide the image: side 9, kernel 3, stride 2, padding 1
/// leads to 5 tokens. The turned image is known exactly, and so is the turned map.
#[test]
fn unscaled_views_take_any_side() {
    let kernel = Tensor::ones((2, 1, 3, 3), DType::F64, &Device::Cpu).unwrap();
    let layer = |x: &Tensor| x.conv2d(&kernel, 1, 2, 1, 1).unwrap();
    for (pixels, base) in [([9, 9], [5, 5]), ([9, 13], [5, 7]), ([5, 17], [3, 9])] {
        let base = TokenGrid::new(base[0], base[1]).unwrap();
        let x = common::random(&[6, 1, pixels[0], pixels[1]], 3);
        for pairing in [Pairing::Independent(Subgroup::D4), Pairing::Complement] {
            let sampler = ViewSampler::new(base, unscaled(pairing)).unwrap();
            for seed in 0..8 {
                let views = sampler.sample_pair(&mut rng(seed), 6).unwrap();
                let (a, b) = (views.first.apply(&x).unwrap(), views.second.apply(&x).unwrap());
                let forward = views.relative().to_second(&Resample::default()).unwrap();
                assert!(max_gap(&forward.apply(&layer(&a)).unwrap(), &layer(&b)) < 1e-12);
            }
        }
    }
    // Crops and motions keep the size of the image too.
    let config = ViewConfig {
        crop: Some(CropRange::default()),
        affine: Some(AffineRange { rotation: (-30.0, 30.0), ..AffineRange::default() }),
        ..ViewConfig::default()
    };
    let sampler = ViewSampler::new(TokenGrid::square(5).unwrap(), config).unwrap();
    let x = common::random(&[6, 1, 9, 9], 3);
    for seed in 0..8 {
        let view = sampler.sample_pair(&mut rng(seed), 6).unwrap().first;
        assert_eq!(view.apply(&x).unwrap().dims(), x.dims());
    }
}

#[test]
fn the_default_keeps_the_size_of_the_image_and_the_paper_scales_it() {
    let grids = |config: ViewConfig| -> Vec<TokenGrid> {
        let sampler = ViewSampler::new(TokenGrid::square(14).unwrap(), config).unwrap();
        let draw = |seed| sampler.sample_pair(&mut rng(seed), 2).unwrap().first.grid();
        (0..40).map(draw).collect()
    };
    assert!(grids(ViewConfig::default()).iter().all(|g| *g == TokenGrid::square(14).unwrap()));
    let mut scaled: Vec<_> =
        grids(ViewConfig::paper()).iter().map(|g| (g.rows(), g.cols())).collect();
    scaled.sort_unstable();
    scaled.dedup();
    assert!(scaled.len() > 10, "{scaled:?}");
}

#[cfg(feature = "serde")]
#[test]
fn a_configuration_survives_json() {
    let config = ViewConfig {
        pairing: Pairing::Complement,
        crop: Some(CropRange::default()),
        affine: Some(AffineRange { rotation: (-30.0, 45.5), ..AffineRange::default() }),
        min_overlap: 0.1,
        resample: Filter::Bilinear.into(),
        ..ViewConfig::paper()
    };
    for config in [config, ViewConfig::default()] {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ViewConfig>(&text).unwrap(), config, "{text}");
    }
}

/// A turn of such images swaps the sides of a patch too: the model would see another grid than the view's.
#[test]
fn turned_views_want_square_patches() {
    let base = TokenGrid::new(4, 2).unwrap();
    let images = Tensor::zeros((16, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let act = |subgroup| {
        let sampler = ViewSampler::new(base, unscaled(Pairing::Independent(subgroup))).unwrap();
        let views = (0..4).map(|seed| sampler.sample_pair(&mut rng(seed), 16).unwrap());
        let results: Vec<_> = views.map(|v| v.first.apply(&images)).collect();
        results.into_iter().collect::<Result<Vec<_>, _>>()
    };
    assert!(act(Subgroup::Flips).is_ok());
    let message = act(Subgroup::C4).unwrap_err().to_string();
    assert!(message.contains("square patches") && message.contains("2x4"), "{message}");
}

#[test]
fn a_crop_that_fits_nowhere_is_the_largest_of_the_nearest_aspect() {
    let window = |area, aspect| {
        let crop = Some(CropRange { area, aspect });
        let config = ViewConfig { crop, ..unscaled(Pairing::Independent(Subgroup::Trivial)) };
        let sampler = ViewSampler::new(TokenGrid::square(8).unwrap(), config).unwrap();
        let view = sampler.sample_pair(&mut rng(3), 1).unwrap().first;
        let ([t, l], [b, r]) = {
            let g = view.elements()[0];
            (g.source([0.0, 0.0]), g.source([1.0, 1.0]))
        };
        [t, l, b, r]
    };
    let near = |a: [f64; 4], b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
    // All of the image fits, and the aspect 1 is allowed.
    assert!(near(window((1.0, 1.0), (0.75, 4.0 / 3.0)), [0.0, 0.0, 1.0, 1.0]));
    // Twice as wide as high at least.
    assert!(near(window((1.0, 1.0), (2.0, 3.0)), [0.25, 0.0, 0.75, 1.0]));
}

/// A generator that remembers its last draw.
struct Recorded(StdRng, u64);

impl RngCore for Recorded {
    fn next_u32(&mut self) -> u32 {
        self.0.next_u32()
    }
    fn next_u64(&mut self) -> u64 {
        self.1 = self.0.next_u64();
        self.1
    }
    fn fill_bytes(&mut self, dst: &mut [u8]) {
        self.0.fill_bytes(dst);
    }
}

/// The values were recorded before continuous motions and smallest overlaps existed.
#[test]
fn the_stream_of_older_configurations_stays() {
    let crop = Some(CropRange::default());
    let default = ViewConfig::paper();
    for (config, hash, next) in [
        (default, 0xce75_5601_a992_cfca, 0x41fb_dd28_9a72_c803),
        (ViewConfig { crop, ..default }, 0xff90_d0a5_0eca_28b7, 0x83d9_9292_1c65_e26d),
        (
            ViewConfig { crop, ..scaled(Pairing::Complement) },
            0x0083_9f24_c5a5_675d,
            0xeb2d_1e1e_1a86_9f37,
        ),
        (
            scaled(Pairing::Independent(Subgroup::Flips)),
            0x70fe_a95b_5f51_a562,
            0x41fb_dd28_9a72_c803,
        ),
    ] {
        let rng = &mut Recorded(rng(11), 0);
        let mut seen = 0u64;
        let mut mix = |x: u64| seen = (seen ^ x).wrapping_mul(0x100_0000_01b3).rotate_left(23);
        for base in [TokenGrid::square(7), TokenGrid::new(4, 6)] {
            let sampler = ViewSampler::new(base.unwrap(), config).unwrap();
            for _ in 0..20 {
                let pair = sampler.sample_pair(rng, 5).unwrap();
                for view in [&pair.first, &pair.second] {
                    mix(view.grid().rows() as u64);
                    mix(view.grid().cols() as u64);
                    let points = [[0.13, 0.29], [0.71, 0.07]];
                    for g in view.elements() {
                        for c in points.map(|p| g.source(p)).as_flattened() {
                            mix(c.to_bits());
                        }
                    }
                }
                // The last draw of a pair was its seed; it now seeds the redraws of `min_overlap`.
                mix(rng.1);
            }
        }
        assert_eq!((seen, rng.next_u64()), (hash, next), "{config:?}");
    }
}

#[test]
fn poses_are_rigid_in_cells_and_within_their_ranges() {
    let base = TokenGrid::new(4, 6).unwrap();
    let only = |range| ViewConfig {
        affine: Some(range),
        ..unscaled(Pairing::Independent(Subgroup::Trivial))
    };
    let draw = |range| {
        let sampler = ViewSampler::new(base, only(range)).unwrap();
        let views = sampler.sample_pair(&mut rng(5), 200).unwrap();
        views.first.elements().to_vec()
    };
    // Of steps of one cell, the vector in cells of the source that each becomes.
    let steps = |g: &Element| {
        let cells = |[y, x]: [f64; 2]| [4.0 * y, 6.0 * x];
        let o = cells(g.source([0.5, 0.5]));
        let step = |p| {
            let q = cells(g.source(p));
            [q[0] - o[0], q[1] - o[1]]
        };
        (o, step([0.75, 0.5]), step([0.5, 0.5 + 1.0 / 6.0]))
    };
    let spread = |values: &[f64], (lo, hi): (f64, f64)| {
        let (low, high) = values.iter().fold((hi, lo), |(a, b), &v| (v.min(a), v.max(b)));
        let tenth = (hi - lo) / 10.0;
        assert!(low >= lo - 1e-9 && high <= hi + 1e-9, "{low} {high}");
        assert!(low < lo + tenth && high > hi - tenth, "{low} {high}");
    };
    let rotation = (-60.0, 100.0);
    let none = AffineRange::default();
    let mut angles = Vec::new();
    for g in draw(AffineRange { rotation, ..none }) {
        let (o, down, right) = steps(&g);
        assert!((o[0] - 2.0).abs() < 1e-12 && (o[1] - 3.0).abs() < 1e-12);
        // a rotation of the plane of cells, counter-clockwise: right comes from right and down
        assert!((down[0] - right[1]).abs() < 1e-12 && (down[1] + right[0]).abs() < 1e-12);
        assert!((down[0].hypot(down[1]) - 1.0).abs() < 1e-12);
        angles.push(right[0].atan2(right[1]).to_degrees());
    }
    spread(&angles, rotation);
    let (mut y, mut x) = (Vec::new(), Vec::new());
    let translation = (-0.3, 0.1);
    for g in draw(AffineRange { translation, ..none }) {
        let [v, u] = g.source([0.5, 0.5]);
        y.push(0.5 - v);
        x.push(0.5 - u);
    }
    spread(&y, translation);
    spread(&x, translation);
    assert_ne!(y, x);
    let (mut y, mut x) = (Vec::new(), Vec::new());
    let shear = (0.0, 0.4);
    for g in draw(AffineRange { shear, ..none }) {
        // the view's point `A·p`, of p = (½, 0) and (0, ½) from the center
        let back = g.inverse();
        y.push(2.0 * (back.source([0.5, 1.0])[0] - 0.5));
        x.push(2.0 * (back.source([1.0, 0.5])[1] - 0.5));
    }
    spread(&y, shear);
    spread(&x, shear);
    // No range, no motion.
    assert!(draw(none).iter().all(|g| g.as_d4().is_some()));
}

/// What SER relies on: the relative element carries one posed view into the other.
#[cfg(feature = "testing")]
#[test]
fn posed_crops_of_a_smooth_image_align() {
    let base = TokenGrid::square(24).unwrap();
    let config = ViewConfig {
        crop: Some(CropRange::default()),
        affine: Some(AffineRange {
            rotation: (-40.0, 40.0),
            translation: (-0.1, 0.1),
            shear: (-0.2, 0.2),
        }),
        min_overlap: 0.2,
        ..ViewConfig::paper()
    };
    let sampler = ViewSampler::new(base, config).unwrap();
    let mut compared = 0;
    for seed in 0..6 {
        let one = ser_reg::testing::smooth(base, &mut rng(seed)).unwrap();
        let image = one.transpose(1, 2).unwrap().reshape((1, 2, 24, 24)).unwrap();
        let images = Tensor::cat(&[&image, &image, &image], 0).unwrap();
        let views = sampler.sample_pair(&mut rng(seed), 3).unwrap();
        let relative = views.relative();
        let forward = relative.to_second(&Resample::default()).unwrap();
        let carried = forward.apply(&views.first.apply(&images).unwrap()).unwrap();
        let want = views.second.apply(&images).unwrap();
        let to = relative.to_grid();
        let gaps = values(&(carried - want).unwrap().abs().unwrap());
        for (at, gap) in gaps.iter().enumerate() {
            let (sample, cell) = (at / (2 * to.len()), at % to.len());
            let center = to.center(cell / to.cols(), cell % to.cols());
            let source = views.second.elements()[sample].source(center);
            let within = |p: [f64; 2]| p.iter().all(|c| (0.1..=0.9).contains(c));
            // away from the borders of the source and of the first view, where padding shows
            if within(source) && within(relative.elements()[sample].source(center)) {
                assert!(forward.valid(sample).unwrap().is_none_or(|v| v[cell]));
                assert!(*gap < 0.02, "seed {seed}, sample {sample}, cell {cell}: {gap}");
                compared += 1;
            }
        }
    }
    assert!(compared > 2000, "{compared}");
}

#[test]
fn every_pair_overlaps_where_that_is_asked_for() {
    let base = TokenGrid::square(7).unwrap();
    let crop = Some(CropRange { area: (0.02, 0.1), ..CropRange::default() });
    let affine = Some(AffineRange {
        rotation: (-180.0, 180.0),
        translation: (-0.9, 0.9),
        ..AffineRange::default()
    });
    for pairing in [Pairing::Independent(Subgroup::D4), Pairing::Complement] {
        for (crop, affine) in [(crop, None), (None, affine), (crop, affine)] {
            let draw = |min_overlap| -> (ViewPair, u64) {
                let config = ViewConfig { crop, affine, min_overlap, ..scaled(pairing) };
                let rng = &mut rng(3);
                let sampler = ViewSampler::new(base, config).unwrap();
                (sampler.sample_pair(rng, 60).unwrap(), rng.next_u64())
            };
            let (loose, after) = draw(0.0);
            let shares = loose.relative().overlap().unwrap();
            assert!(shares.contains(&0.0), "the test needs pairs apart");
            for min_overlap in [0.01, 0.3, 1.0] {
                let (pair, then) = draw(min_overlap);
                let overlap = pair.relative().overlap().unwrap();
                assert!(overlap.iter().all(|&s| s >= min_overlap), "{overlap:?}");
                // The caller's generator moves on as it would; what was good enough stays.
                assert_eq!(after, then);
                assert_eq!(loose.first.elements(), pair.first.elements());
                let kept = shares.iter().zip(loose.second.elements()).zip(pair.second.elements());
                for ((&share, before), now) in kept {
                    assert_eq!(share >= min_overlap, before == now);
                }
                // and both directions of the loss see tokens of every sample
                for operator in [
                    pair.relative().to_second(&Resample::default()).unwrap(),
                    pair.relative().to_first(&Resample::default()).unwrap(),
                ] {
                    let seen =
                        |b| operator.valid(b).unwrap().is_none_or(|v: &[bool]| v.contains(&true));
                    assert!((0..60).all(seen));
                }
            }
        }
    }
}

#[test]
fn partition_splits_in_order() {
    let x = Tensor::arange(0f64, 8.0, &Device::Cpu).unwrap();
    let (first, last) = Partition::new(8, 0.25).unwrap().split(&x).unwrap();
    assert_eq!(values(&first), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(values(&last), [6., 7.]);
}

#[test]
fn schedules_rise_hold_and_end() {
    let s = Schedule::linear(1.0, 0.5, 10).unwrap().warm_up(4).delay(2);
    let at: Vec<f64> = [0, 1, 2, 4, 6, 11, 16, 1000].map(|t| s.at(t)).to_vec();
    assert_eq!(at, [0.0, 0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.5]);
}
