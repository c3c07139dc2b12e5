//! The equivariance scores: exact maps score 1, others do not, and every formula equals a slow twin.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::softmax;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::group::{Affine, D4, Scale};
use ser_reg::metric::{Comparison, EqScore, Scores};
use ser_reg::{Error, GridOperator, GroupAction, Layout, Resample, TokenGrid};

const CPU: &Device = &Device::Cpu;

fn rng() -> StdRng {
    StdRng::seed_from_u64(7)
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, CPU).unwrap()
}

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

/// The mean of a kernel `(.., P, P)` over its eight poses.
fn symmetrized(kernel: &Tensor) -> Tensor {
    let flip = |k: &Tensor| k.contiguous().unwrap().flip(&[3]).unwrap();
    let turn = |k: &Tensor| flip(&k.transpose(2, 3).unwrap());
    let mut poses = vec![kernel.clone(), flip(kernel)];
    for i in 0..6 {
        poses.push(turn(&poses[i]));
    }
    (poses
        .iter()
        .fold(kernel.zeros_like().unwrap(), |sum, k| (sum + k).unwrap())
        / 8.)
        .unwrap()
}

fn assert_exact(s: &Scores, what: impl std::fmt::Debug) {
    for one in [s.cosine, s.centered, s.correlation] {
        assert!((one - 1.).abs() < 1e-12, "{what:?}: {s:?}");
    }
    assert!(
        s.relative_error < 1e-12 && s.max_abs < 1e-12,
        "{what:?}: {s:?}"
    );
}

/// Scores fixed maps against each other under the identity: `a` for the upright images, `v` for the "moved" ones.
fn between(a: &Tensor, v: &Tensor) -> Comparison {
    let (images, n) = (a.dims()[0], a.dims()[1]);
    let mut maps = [a, v].into_iter();
    let score = EqScore::new(grid(1, n));
    let images = Tensor::zeros((images, 1, 1, n), DType::F64, CPU).unwrap();
    let next = |_: &Tensor| Ok::<_, Error>(maps.next().unwrap().clone());
    score
        .measure(&images, &[D4::IDENTITY], &mut rng(), next)
        .unwrap()
        .mean
}

#[test]
fn a_symmetric_convolution_scores_one_under_all_of_d4() {
    let kernel = symmetrized(&random(&[5, 3, 3, 3], 1));
    let images = random(&[6, 3, 8, 12], 2);
    // ReLU: zero tokens and dead channels among them must not spoil it.
    let net = |x: &Tensor| x.conv2d(&kernel, 1, 1, 1, 1)?.relu()?.avg_pool2d(2);
    let report = EqScore::new(grid(4, 6))
        .measure(&images, &D4::ALL, &mut rng(), net)
        .unwrap();
    assert_eq!(
        report.elements.iter().map(|e| e.0).collect::<Vec<_>>(),
        D4::ALL
    );
    for (g, c) in &report.elements {
        assert_exact(&c.score, g);
        for null in [c.shuffled_positions.unwrap(), c.shuffled_images.unwrap()] {
            assert!(
                null.centered < 0.3 && null.correlation < 0.3,
                "{g:?}: {null:?}"
            );
            assert!(
                null.cosine < 0.95 && null.relative_error > 0.2,
                "{g:?}: {null:?}"
            );
        }
    }
    assert_exact(&report.mean.score, "mean");
}

#[test]
fn an_asymmetric_kernel_does_not_and_symmetry_is_all_it_lacks() {
    let kernel = random(&[5, 3, 3, 3], 1);
    let images = random(&[6, 3, 8, 8], 2);
    let net = |x: &Tensor| x.conv2d(&kernel, 1, 1, 1, 1)?.gelu();
    let report = EqScore::new(grid(8, 8))
        .measure(&images, &D4::ALL, &mut rng(), net)
        .unwrap();
    for (g, c) in &report.elements {
        if *g == D4::IDENTITY {
            assert_exact(&c.score, g);
        } else {
            assert!(
                c.score.centered < 0.9 && c.score.relative_error > 0.1,
                "{g:?}: {c:?}"
            );
        }
    }
}

/// Patch embedding, positions and one attention block with a residual; a CLS token leads if `cls`.
struct Vit {
    kernel: Tensor,
    qkv: [Tensor; 3],
    positions: Tensor,
    cls: bool,
}

impl Vit {
    const DIM: usize = 16;

    fn new(kernel: Tensor, positions: f64) -> Self {
        let qkv = [10, 11, 12].map(|seed| random(&[Self::DIM, Self::DIM], seed));
        let positions = (random(&[1, 49, Self::DIM], 20) * positions).unwrap();
        Self {
            kernel,
            qkv,
            positions,
            cls: false,
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.conv2d(&self.kernel, 0, self.kernel.dims()[2], 1, 1)?;
        let mut x = x
            .flatten_from(2)?
            .transpose(1, 2)?
            .broadcast_add(&self.positions)?;
        if self.cls {
            let cls = Tensor::ones((x.dims()[0], 1, Self::DIM), DType::F64, CPU)?;
            x = Tensor::cat(&[&cls, &x], 1)?;
        }
        let [q, k, v] = [0, 1, 2].map(|i| x.contiguous()?.broadcast_matmul(&self.qkv[i]));
        let attention = softmax(&(q?.matmul(&k?.t()?)? / 4.)?, D::Minus1)?;
        x + attention.matmul(&v?)?
    }

    fn score(&self) -> Scores {
        let images = random(&[8, 1, 28, 28], 3);
        let mut score = EqScore::new(grid(7, 7));
        score.layout.prefix = self.cls as usize;
        let report = score.measure(&images, &D4::ALL[1..], &mut rng(), |x| self.forward(x));
        report.unwrap().mean.score
    }
}

#[test]
fn an_untrained_vit_without_positions_and_with_a_symmetric_patch_kernel_scores_one() {
    let kernel = random(&[Vit::DIM, 1, 4, 4], 1);
    let mut vit = Vit::new(symmetrized(&kernel), 0.);
    assert_exact(&vit.score(), "none");
    vit.cls = true;
    assert_exact(&vit.score(), "none, with CLS");

    let positions = Vit::new(symmetrized(&kernel), 0.5).score();
    assert!(positions.centered < 0.9, "{positions:?}");
    let plain_kernel = Vit::new(kernel, 0.).score();
    assert!(plain_kernel.centered < 0.9, "{plain_kernel:?}");
}

#[test]
fn scores_equal_a_slow_twin() -> Result<()> {
    let (a, v) = (random(&[3, 4, 5], 1), random(&[3, 4, 5], 2));
    let v = ((v * 0.7)? + &a)?.affine(1., 0.3)?;
    let scores = between(&a, &v).score;

    let number = |x: Result<Tensor>| x?.mean_all()?.to_scalar::<f64>();
    let cosine = |a: &Tensor, v: &Tensor, dim: usize| -> Result<f64> {
        let norms = (a.sqr()?.sum(dim)?.sqrt()? * v.sqr()?.sum(dim)?.sqrt()?)?;
        number((a * v)?.sum(dim)? / norms)
    };
    let (a, v) = (a.reshape((12, 5))?, v.reshape((12, 5))?);
    let (a0, v0) = (
        a.broadcast_sub(&a.mean_keepdim(0)?)?,
        v.broadcast_sub(&v.mean_keepdim(0)?)?,
    );
    let d = (&a - &v)?;
    let error = d.sqr()?.sum_all()?.to_scalar::<f64>()? / v.sqr()?.sum_all()?.to_scalar::<f64>()?;
    for (got, expected) in [
        (scores.cosine, cosine(&a, &v, 1)?),
        (scores.centered, cosine(&a0, &v0, 1)?),
        (scores.correlation, cosine(&a0, &v0, 0)?),
        (scores.relative_error, error.sqrt()),
        (scores.max_abs, d.abs()?.max_all()?.to_scalar()?),
    ] {
        approx::assert_relative_eq!(got, expected, max_relative = 1e-12);
    }
    Ok(())
}

#[test]
fn offset_and_scale_cost_the_plain_cosine_and_the_error_only() {
    let a = random(&[3, 4, 5], 1);
    let offset = random(&[1, 1, 5], 2);
    let s = between(&a, &(&a * 2.).unwrap().broadcast_add(&offset).unwrap()).score;
    approx::assert_relative_eq!(s.centered, 1., max_relative = 1e-12);
    approx::assert_relative_eq!(s.correlation, 1., max_relative = 1e-12);
    assert!(s.cosine < 0.99 && s.relative_error > 0.1, "{s:?}");
}

#[test]
fn with_two_of_a_kind_the_null_is_the_other_one() {
    // Two images, two positions; every token orthogonal to all others.
    let a = Tensor::eye(4, DType::F64, CPU)
        .unwrap()
        .reshape((2, 2, 4))
        .unwrap();
    let c = between(&a, &a);
    assert_exact(&c.score, "self");
    // Nothing stays in its place, so nothing of the score is left. (Less the mean, unequal ones have cosine -1/3.)
    for null in [c.shuffled_positions.unwrap(), c.shuffled_images.unwrap()] {
        assert_eq!(null.cosine, 0.);
        approx::assert_relative_eq!(null.centered, -1. / 3., max_relative = 1e-12);
        approx::assert_relative_eq!(null.relative_error, 2f64.sqrt(), max_relative = 1e-12);
    }
    // Positions are shuffled within the image: where its tokens are equal, that null keeps the whole score.
    let by_image = Tensor::new(&[[[1f64, 0.], [1., 0.]], [[0., 1.], [0., 1.]]], CPU).unwrap();
    let c = between(&by_image, &by_image);
    assert_eq!(c.shuffled_positions.unwrap().cosine, 1.);
    assert_eq!(c.shuffled_images.unwrap().cosine, 0.);
    // Images keep their positions: where all images are equal, the other null does.
    let by_position = by_image.transpose(0, 1).unwrap();
    let c = between(&by_position, &by_position);
    assert_eq!(c.shuffled_positions.unwrap().cosine, 0.);
    assert_eq!(c.shuffled_images.unwrap().cosine, 1.);
}

#[test]
fn a_null_of_one_does_not_exist() {
    let one_image = between(&random(&[1, 4, 3], 1), &random(&[1, 4, 3], 2));
    assert!(one_image.shuffled_images.is_none() && one_image.shuffled_positions.is_some());
    let one_position = between(&random(&[4, 1, 3], 1), &random(&[4, 1, 3], 2));
    assert!(one_position.shuffled_positions.is_none() && one_position.shuffled_images.is_some());
}

#[test]
fn what_is_undefined_is_left_out_and_nan_is_not_hidden() {
    // The second token is zero in one map, the third in both.
    let a = Tensor::new(&[[[1f64, 1.], [0., 0.], [0., 0.]]], CPU).unwrap();
    let v = Tensor::new(&[[[2f64, 2.], [3., 0.], [0., 0.]]], CPU).unwrap();
    approx::assert_relative_eq!(between(&a, &v).score.cosine, 1., max_relative = 1e-12);
    // A constant map agrees with itself, but not after its mean is gone. (0.1: the mean rounds.)
    let constant = Tensor::full(0.1f64, (3, 7, 2), CPU).unwrap();
    let s = between(&constant, &constant).score;
    approx::assert_relative_eq!(s.cosine, 1., max_relative = 1e-12);
    assert!(s.centered.is_nan() && s.correlation.is_nan(), "{s:?}");
    // One NaN in a map is a NaN in every score.
    let mut values = vec![1f64; 8];
    values[3] = f64::NAN;
    let broken = Tensor::from_vec(values, (2, 2, 2), CPU).unwrap();
    let c = between(&broken, &random(&[2, 2, 2], 1));
    for s in [c.score, c.shuffled_positions.unwrap()] {
        for score in [
            s.cosine,
            s.centered,
            s.correlation,
            s.relative_error,
            s.max_abs,
        ] {
            assert!(score.is_nan(), "{s:?}");
        }
    }
}

#[test]
fn only_positions_with_a_preimage_count() {
    // One token down: the first row comes from outside the image.
    let down = Affine::translation(0.25, 0.).unwrap();
    let images = random(&[4, 3, 8, 8], 2);
    let pool = |x: &Tensor| x.avg_pool2d(2);
    let score = EqScore::new(grid(4, 4));
    let report = score
        .measure(&images, std::slice::from_ref(&down), &mut rng(), pool)
        .unwrap();
    assert_exact(&report.mean.score, "valid rows");

    // That row would have been wrong: a map that differs in it alone scores the same.
    let noise = random(&[1, 3, 1, 4], 9);
    let mut call = 0;
    let first_row_broken = |x: &Tensor| -> Result<Tensor> {
        call += 1;
        let y = x.avg_pool2d(2)?;
        let broken = y.narrow(2, 0, 1)?.broadcast_add(&noise)?;
        if call == 1 {
            Ok(y)
        } else {
            Tensor::cat(&[&broken, &y.narrow(2, 1, 3)?], 2)
        }
    };
    let masked = score
        .measure(&images, &[down], &mut rng(), first_row_broken)
        .unwrap();
    assert_eq!(masked, report);

    let away = Affine::translation(2., 0.).unwrap();
    let error = score
        .measure(&images, &[away], &mut rng(), pool)
        .unwrap_err();
    assert!(error.to_string().contains("preimage"), "{error}");
}

#[test]
fn a_scaled_image_comes_on_its_own_grid() {
    // A smooth picture survives resampling; the map must be seen on 6x3 tokens of 2 pixels.
    let ramp = Tensor::arange(0f64, 64., CPU)
        .unwrap()
        .reshape((1, 1, 8, 8))
        .unwrap();
    let images = Tensor::cat(&[&ramp, &ramp.t().unwrap(), &ramp.cos().unwrap()], 0).unwrap();
    let mut seen = Vec::new();
    let mut pool = |x: &Tensor| {
        seen.push(x.dims().to_vec());
        x.avg_pool2d(2)
    };
    let scale = Scale::new(1.5, 0.75).unwrap();
    let mut score = EqScore::new(grid(4, 4));
    score.chunk = 2;
    let smooth = images.narrow(0, 0, 2).unwrap();
    let report = score
        .measure(&smooth, &[scale], &mut rng(), &mut pool)
        .unwrap();
    assert_eq!(seen, [[2, 1, 8, 8], [2, 1, 12, 6]]);
    assert!(report.mean.score.cosine > 0.999, "{report:?}");
    assert!(
        report.mean.score.relative_error > 1e-6,
        "resampling is not exact"
    );
}

#[test]
fn the_chunk_changes_nothing_but_the_calls() {
    let images = random(&[5, 1, 4, 4], 2);
    let turns = [D4::ROT90, D4::HFLIP];
    let measure = |chunk| {
        let mut score = EqScore::new(grid(4, 4));
        score.chunk = chunk;
        let mut calls = Vec::new();
        let report = score.measure(&images, &turns, &mut rng(), |x| {
            calls.push(x.dims()[0]);
            x.cumsum(3) // depends on where it is
        });
        (report.unwrap(), calls)
    };
    let (whole, calls) = measure(64);
    assert_eq!(calls, [5; 3]);
    let (chunked, calls) = measure(2);
    assert_eq!(calls, [2, 2, 1].repeat(3));
    assert_eq!(whole, chunked);

    let centered: Vec<f64> = whole
        .elements
        .iter()
        .map(|(_, c)| c.score.centered)
        .collect();
    approx::assert_relative_eq!(whole.mean.score.centered, (centered[0] + centered[1]) / 2.);
    let max_abs = whole.elements.iter().map(|(_, c)| c.score.max_abs);
    assert_eq!(whole.mean.score.max_abs, max_abs.fold(0., f64::max));
}

#[test]
fn every_float_type_is_scored_in_f64() {
    let images = random(&[4, 1, 4, 4], 2);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        let images = images.to_dtype(dtype).unwrap();
        let net = |x: &Tensor| {
            x.affine(3., 1.)?
                .sqr()?
                .sum_keepdim(2)?
                .broadcast_as((4, 1, 4, 4))
        };
        let report = EqScore::new(grid(4, 4)).measure(&images, &[D4::HFLIP], &mut rng(), net);
        let score = report.unwrap().mean.score;
        assert!(
            (score.centered - 1.).abs() < tolerance,
            "{dtype:?}: {score:?}"
        );
    }
}

#[test]
fn bad_input_is_named() {
    let score = EqScore::new(grid(4, 4));
    let run = |score: &EqScore, shape: &[usize], elements: &[D4]| {
        let pool = |x: &Tensor| x.avg_pool2d(2);
        let result = score.measure(&random(shape, 1), elements, &mut rng(), pool);
        result.unwrap_err().to_string()
    };
    let turn = &[D4::ROT90][..];
    let cases = [
        (
            run(&score, &[2, 8, 8], turn),
            ["4x4 token grid", "[2, 8, 8]"],
        ),
        (
            run(&score, &[2, 1, 9, 8], turn),
            ["multiples", "[2, 1, 9, 8]"],
        ),
        (
            run(&score, &[2, 1, 8, 9], turn),
            ["multiples", "[2, 1, 8, 9]"],
        ),
        (run(&score, &[0, 1, 8, 8], turn), ["B > 0", "[0, 1, 8, 8]"]),
        (
            run(&score, &[2, 1, 8, 8], &[]),
            ["at least one element", "0"],
        ),
        // The closure's map does not fit the grid.
        (
            run(&score, &[2, 1, 16, 16], turn),
            ["(B, C, 4, 4)", "[2, 1, 8, 8]"],
        ),
        (
            run(
                &EqScore {
                    chunk: 0,
                    ..score.clone()
                },
                &[2, 1, 8, 8],
                turn,
            ),
            ["in a chunk", "0"],
        ),
    ];
    for (text, parts) in cases {
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }

    let images = random(&[2, 1, 4, 4], 1);
    let first_only = |x: &Tensor| x.narrow(0, 0, 1);
    let error = score
        .measure(&images, turn, &mut rng(), first_only)
        .unwrap_err();
    assert!(error.to_string().contains("2 images"), "{error}");
    let mut channels = 0;
    let growing = |x: &Tensor| {
        channels += 1;
        x.repeat((1, channels, 1, 1))
    };
    let error = score
        .measure(&images, turn, &mut rng(), growing)
        .unwrap_err();
    assert!(error.to_string().contains("[2, 16, 2]"), "{error}");
    // The closure's own error comes out as it is.
    let mine = |_: &Tensor| -> anyhow::Result<Tensor> { anyhow::bail!("mine") };
    let error = score.measure(&images, turn, &mut rng(), mine).unwrap_err();
    assert_eq!(error.to_string(), "mine");
}

#[test]
fn channels_may_come_last() {
    let images = random(&[3, 2, 4, 6], 1);
    let mut score = EqScore::new(grid(4, 6));
    score.layout = Layout {
        channels: ser_reg::Channels::Last,
        ..Default::default()
    };
    let net = |x: &Tensor| x.sqr()?.permute((0, 2, 3, 1));
    let report = score.measure(&images, &[D4::TRANSPOSE, D4::identity()], &mut rng(), net);
    assert_exact(&report.unwrap().mean.score, "channels last");
}

#[test]
fn a_field_says_how_channels_turn() {
    use ser_reg::group::{FieldType, Subgroup};
    // The lifting of an image to C4: one channel per quarter turn, each the image differentiated that way.
    let images = random(&[6, 1, 6, 6], 41);
    let grid = TokenGrid::square(6).unwrap();
    let kernel = random(&[1, 1, 3, 3], 42);
    let side = TokenGrid::square(3).unwrap();
    let poses = Subgroup::C4.elements().iter().map(|h| {
        let turn = GridOperator::new(&[*h], side, &Resample::default());
        turn.unwrap().apply(&kernel).unwrap()
    });
    let kernels = Tensor::cat(&poses.collect::<Vec<_>>(), 0).unwrap();
    let layer = |x: &Tensor| x.conv2d(&kernels, 1, 1, 1, 1);
    let score = |field: Option<FieldType>| {
        let score = EqScore {
            field,
            ..EqScore::new(grid)
        };
        let turns = &Subgroup::C4.elements()[1..];
        score.measure(&images, turns, &mut StdRng::seed_from_u64(0), layer)
    };
    let regular = score(Some(FieldType::regular(Subgroup::C4, 4).unwrap())).unwrap();
    assert!((regular.mean.score.cosine - 1.0).abs() < 1e-12);
    assert!(regular.mean.score.relative_error < 1e-12);
    let plain = score(None).unwrap();
    assert!(plain.mean.score.centered < 0.6, "{plain:?}");
    assert_eq!(score(Some(FieldType::trivial(4))).unwrap(), plain);
    let message = score(Some(FieldType::trivial(5))).unwrap_err().to_string();
    assert!(message.contains("(B, N, 5)"), "{message}");
}
