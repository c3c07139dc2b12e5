//! Matching of tokens between two poses: perfect tokens match all and tell the pose, shuffled ones match by chance.

mod common;

use candle_core::{Device, Tensor};
use common::subject;
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use ser_reg::{
    TokenGrid,
    group::{Affine, D4, GroupAction},
};
use ser_reg_trainers::{
    data::Images,
    eval::{
        self, Options, Part,
        border::Border,
        matching::{
            self, nearest,
            pairs::{Kind, Pair, apply, distance},
            registration, score,
        },
    },
};

const CPU: Device = Device::Cpu;

fn pairs(kind: Kind, n: usize) -> Vec<Pair> {
    let mut rng = StdRng::seed_from_u64(4);
    (0..n).map(|_| Pair::draw(kind, &mut rng).unwrap()).collect()
}

/// Tokens that code the place of the image that they show: directions on a sphere, so that near places have large cosines. An
/// image of its own for each pair, by an offset.
fn coded(elements: &[Affine], grid: TokenGrid) -> Tensor {
    let (rows, cols) = (grid.rows() as f64, grid.cols() as f64);
    let mut values = Vec::new();
    for g in elements {
        for token in 0..grid.len() {
            let center = [(token / grid.cols()) as f64 + 0.5, (token % grid.cols()) as f64 + 0.5];
            let [y, x] = g.source([center[0] / rows, center[1] / cols]);
            // Random Fourier features of a Gaussian kernel.
            let mut rng = StdRng::seed_from_u64(7);
            for _ in 0..256 {
                let mut draw = || -> f64 { rng.sample(StandardNormal) };
                let phase = 6.0 * (draw() * y + draw() * x);
                values.extend([phase.cos() as f32, phase.sin() as f32]);
            }
        }
    }
    Tensor::from_vec(values, (elements.len(), grid.len(), 512), &CPU).unwrap()
}

fn maps(pairs: &[Pair], grid: TokenGrid) -> [Tensor; 2] {
    let of =
        |element: fn(&Pair) -> Affine| coded(&pairs.iter().map(element).collect::<Vec<_>>(), grid);
    [of(|p| p.first), of(|p| p.second)]
}

#[test]
fn perfect_tokens_match_and_tell_the_pose() {
    let grid = TokenGrid::square(8).unwrap();
    for kind in [Kind::D4, Kind::Similarity] {
        let pairs = pairs(kind, 40);
        let [a, b] = maps(&pairs, grid);
        let perfect = score(kind, &pairs, [&a, &b], grid, 0).unwrap();
        assert_eq!((perfect.near, perfect.registered), (100.0, 100.0), "{kind:?} {perfect:?}");
        match kind {
            Kind::D4 => assert_eq!((perfect.exact, perfect.matched), (100.0, 100.0)),
            // Where a cell stands between two others, either may be nearest.
            Kind::Similarity => assert!(perfect.exact > 90.0 && perfect.matched > 60.0),
        }
        // Tokens of other places match no better than drawn ones: a cell in 64, and 4 to 5 near it.
        let order: Vec<u32> = (0..64).map(|i| (i * 27 + 11) % 64).collect();
        let shuffled = b.index_select(&Tensor::new(&order[..], &CPU).unwrap(), 1).unwrap();
        let chance = score(kind, &pairs, [&a, &shuffled], grid, 0).unwrap();
        assert!(chance.exact < 10.0 && chance.near < 20.0, "{kind:?} {chance:?}");
        assert!(chance.registered < 10.0, "{kind:?} {chance:?}");
        assert_eq!(chance, score(kind, &pairs, [&a, &shuffled], grid, 0).unwrap());
    }
    let pairs = pairs(Kind::D4, 3);
    let [a, b] = maps(&pairs, grid);
    let few = a.narrow(1, 0, 5).unwrap();
    let error = score(Kind::D4, &pairs, [&few, &few], grid, 0).unwrap_err().to_string();
    assert!(error.contains("(3, 64, d), got [3, 5, 512]"), "{error}");
    assert!(score(Kind::D4, &pairs[..2], [&a, &b], grid, 0).is_err());
}

#[test]
fn targets_are_where_the_relative_element_takes_a_place() {
    let grid = TokenGrid::square(6).unwrap();
    for pair in pairs(Kind::D4, 20) {
        let relative = (1..8).map(|i| D4::ALL[i]).find(|&g| Affine::from(g) == pair.relative());
        let from = relative.expect("an element of D4, not the identity").source_indices(grid);
        let targets = pair.targets(grid).unwrap();
        for (to, from) in from.into_iter().enumerate() {
            let expected = [(to / 6) as f64, (to % 6) as f64];
            assert!(distance(targets[from as usize].unwrap(), expected) < 1e-9);
        }
    }
    let mut hidden = 0;
    for pair in pairs(Kind::Similarity, 20) {
        for (token, target) in pair.targets(grid).unwrap().into_iter().enumerate() {
            let center = [(token / 6) as f64 + 0.5, (token % 6) as f64 + 0.5].map(|p| p / 6.0);
            let place = pair.first.source(center);
            let Some(target) = target else {
                hidden += 1;
                continue;
            };
            let shown = pair.second.source(target.map(|p| (p + 0.5) / 6.0));
            assert!(distance(shown, place) < 1e-9, "both show one place");
            assert!(target.iter().all(|p| (-0.5..=5.5).contains(p)));
        }
    }
    assert!(hidden > 0, "some places leave the second pose");
}

#[test]
fn matches_are_nearest_in_both_directions() {
    #[rustfmt::skip]
    let cosines = [
        0.9, 0.1, 0.2, // nearest to 0, and 0 to it
        0.8, 0.1, 0.3, // nearest to 0, which has a nearer one
        0.1, 0.7, 0.7, // of equals the first
    ];
    assert_eq!(nearest::mutual(&cosines, 3), [(0, 0), (2, 1)]);
    assert_eq!(nearest::mutual(&[], 0), []);
}

/// Half of the matches are wrong at random.
#[test]
fn a_pose_is_found_among_wrong_matches() {
    let grid = TokenGrid::square(12).unwrap();
    let mut rng = StdRng::seed_from_u64(9);
    let all: Vec<usize> = (0..grid.len()).collect();
    for pair in pairs(Kind::Similarity, 20) {
        let truth = pair.relative();
        let inside = |p: &[f64; 2]| p.iter().all(|v| (0.0..=11.0).contains(&v.round()));
        let mut matches: Vec<(usize, usize)> = Vec::new();
        for token in 0..grid.len() {
            let target = apply(&truth, token, grid);
            if inside(&target) {
                let right = target[0].round() as usize * 12 + target[1].round() as usize;
                let wrong = rng.random_range(0..144);
                matches.push((token, if token % 2 == 0 { right } else { wrong }));
            }
        }
        let found = registration::similarity(&matches, grid, &mut rng).unwrap().unwrap();
        let error = registration::error(&found, &truth, &all, grid);
        assert!(error < 0.5, "{error}");
    }
    for pair in pairs(Kind::D4, 20) {
        let truth = pair.relative();
        let target = |t: usize| {
            let [y, x] = apply(&truth, t, grid);
            y.round() as usize * 12 + x.round() as usize
        };
        let matches: Vec<(usize, usize)> = (0..grid.len())
            .map(|t| (t, if t % 2 == 0 { target(t) } else { rng.random_range(0..144) }))
            .collect();
        let found = registration::vote(&matches, grid).unwrap().unwrap();
        assert!(registration::error(&found, &truth, &all, grid) < 1e-9);
    }
    // What tells no pose.
    let none = |matches: &[(usize, usize)]| {
        registration::similarity(matches, grid, &mut StdRng::seed_from_u64(0)).unwrap().is_none()
    };
    assert!(none(&[]) && none(&[(3, 4)]) && none(&[(3, 4), (3, 7)]) && none(&[(3, 4), (5, 4)]));
    assert!(registration::vote(&[], grid).unwrap().is_none());
}

/// Noise of 16x16 in two classes of different brightness.
fn noise(n: usize) -> Images {
    let mut rng = StdRng::seed_from_u64(2);
    let mut images = Images { channels: 1, side: 16, ..Default::default() };
    for i in 0..n {
        let class = (i % 2) as u8;
        images.pixels.extend((0..256).map(|_| rng.random_range(0..150) + 100 * class));
        images.labels.push(class.into());
    }
    images
}

#[test]
fn matching_is_a_part_of_the_evaluation() {
    let images = noise(40);
    let subject = subject(&images);
    let options = Options {
        parts: vec![Part::Matching],
        matching: matching::Options { images: 12, layer: None },
        ..Options::default()
    };
    let bar = ProgressBar::hidden();
    let run = |options: &Options| {
        eval::evaluate(&subject, None, &images, &images, options, &bar).unwrap().matching.unwrap()
    };
    let matching = run(&options);
    assert_eq!(Some(bar.position()), bar.length());
    assert_eq!((matching.images, matching.layer, matching.grid), (12, 2, 4));
    let names: Vec<&str> = matching.rows.iter().map(|row| row.features.as_str()).collect();
    assert_eq!(names, ["encoder", "untrained encoder", "raw patches", "chance"]);
    for row in &matching.rows {
        for score in [row.d4, row.similarity] {
            assert!(score.near >= score.exact && score.exact >= 0.0 && score.near <= 100.0);
            assert!((0.0..=100.0).contains(&score.matched) && score.registered <= 100.0);
        }
    }
    let chance = matching.rows[3].d4;
    assert!(chance.exact < 25.0 && chance.registered < 40.0, "{chance:?}");
    assert_eq!(run(&options), matching);
    let alone = run(&Options { floors: false, ..options.clone() });
    assert_eq!(alone.rows, [matching.rows[0].clone(), alone.rows[1].clone()]);
    assert_eq!(alone.rows.len(), 2);

    let error = |options: &matching::Options| {
        let result =
            matching::measure(&[&subject], false, &images, Border::Reflection, options, 0, || ());
        result.unwrap_err().to_string()
    };
    let deep = matching::Options { layer: Some(5), ..matching::Options::default() };
    assert!(error(&deep).contains("--dense-layer: expected one of the 4 blocks, got 5"));
    let none = matching::Options { images: 0, layer: None };
    assert!(error(&none).contains("at least one test image to match, got 0 of 40"));
    let nothing = matching::measure(
        &[],
        false,
        &images,
        Border::Black,
        &matching::Options::default(),
        0,
        || (),
    );
    assert!(nothing.unwrap_err().to_string().contains("expected an encoder"));
}
