//! The equivariance scores: exact maps score 1, others do not, and every formula equals a slow reference.

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::softmax;
use common::random;
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::group::{Affine, D4, Element, Scale};
use ser_reg::metric::{Comparison, EqScore, Layer, Report, Scores, stride_aligned};
use ser_reg::{GridOperator, GroupAction, Layout, Resample, TokenGrid};

const CPU: &Device = &Device::Cpu;

fn rng() -> StdRng {
    StdRng::seed_from_u64(7)
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
    (poses.iter().fold(kernel.zeros_like().unwrap(), |sum, k| (sum + k).unwrap()) / 8.).unwrap()
}

fn assert_exact(s: &Scores, what: impl std::fmt::Debug) {
    for one in [s.cosine, s.centered, s.correlation] {
        assert!((one - 1.).abs() < 1e-12, "{what:?}: {s:?}");
    }
    assert!(s.relative_error < 1e-12 && s.max_abs < 1e-12, "{what:?}: {s:?}");
}

/// Scores fixed maps against each other under the identity: `a` for the upright images, `v` for the "moved" ones.
fn between(a: &Tensor, v: &Tensor) -> Comparison {
    let (images, n) = (a.dims()[0], a.dims()[1]);
    let mut maps = [a, v].into_iter();
    let score = EqScore::new(grid(1, n));
    let images = Tensor::zeros((images, 1, 1, n), DType::F64, CPU).unwrap();
    let next = |_: &Tensor| Ok(maps.next().unwrap().clone());
    score.measure(&images, &[D4::IDENTITY], &mut rng(), next).unwrap().mean
}

#[test]
fn a_symmetric_convolution_scores_one_under_all_of_d4() {
    let kernel = symmetrized(&random(&[5, 3, 3, 3], 1));
    let images = random(&[6, 3, 8, 12], 2);
    // ReLU: zero tokens and dead channels among them must not spoil it.
    let net = |x: &Tensor| x.conv2d(&kernel, 1, 1, 1, 1)?.relu()?.avg_pool2d(2);
    let report = EqScore::new(grid(4, 6)).measure(&images, &D4::ALL, &mut rng(), net).unwrap();
    assert_eq!(report.elements.iter().map(|e| e.0).collect::<Vec<_>>(), D4::ALL);
    for (g, c) in &report.elements {
        assert_exact(&c.score, g);
        for null in [c.shuffled_positions.unwrap(), c.shuffled_images.unwrap()] {
            assert!(null.centered < 0.3 && null.correlation < 0.3, "{g:?}: {null:?}");
            assert!(null.cosine < 0.95 && null.relative_error > 0.2, "{g:?}: {null:?}");
        }
    }
    assert_exact(&report.mean.score, "mean");
}

#[test]
fn an_asymmetric_kernel_does_not_and_symmetry_is_all_it_lacks() {
    let kernel = random(&[5, 3, 3, 3], 1);
    let images = random(&[6, 3, 8, 8], 2);
    let net = |x: &Tensor| x.conv2d(&kernel, 1, 1, 1, 1)?.gelu();
    let report = EqScore::new(grid(8, 8)).measure(&images, &D4::ALL, &mut rng(), net).unwrap();
    for (g, c) in &report.elements {
        if *g == D4::IDENTITY {
            assert_exact(&c.score, g);
        } else {
            assert!(c.score.centered < 0.9 && c.score.relative_error > 0.1, "{g:?}: {c:?}");
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
        Self { kernel, qkv, positions, cls: false }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.conv2d(&self.kernel, 0, self.kernel.dims()[2], 1, 1)?;
        let mut x = x.flatten_from(2)?.transpose(1, 2)?.broadcast_add(&self.positions)?;
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
        score.layers[0].layout.prefix = self.cls as usize;
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
fn scores_equal_a_slow_reference() -> Result<()> {
    let (a, v) = (random(&[3, 4, 5], 1), random(&[3, 4, 5], 2));
    let v = ((v * 0.7)? + &a)?.affine(1., 0.3)?;
    let scores = between(&a, &v).score;

    let number = |x: Result<Tensor>| x?.mean_all()?.to_scalar::<f64>();
    let cosine = |a: &Tensor, v: &Tensor, dim: usize| -> Result<f64> {
        let norms = (a.sqr()?.sum(dim)?.sqrt()? * v.sqr()?.sum(dim)?.sqrt()?)?;
        number((a * v)?.sum(dim)? / norms)
    };
    let (a, v) = (a.reshape((12, 5))?, v.reshape((12, 5))?);
    let (a0, v0) = (a.broadcast_sub(&a.mean_keepdim(0)?)?, v.broadcast_sub(&v.mean_keepdim(0)?)?);
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
    let a = Tensor::eye(4, DType::F64, CPU).unwrap().reshape((2, 2, 4)).unwrap();
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
        for score in [s.cosine, s.centered, s.correlation, s.relative_error, s.mse, s.max_abs] {
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
    let report = score.measure(&images, std::slice::from_ref(&down), &mut rng(), pool).unwrap();
    assert_exact(&report.mean.score, "valid rows");

    // That row would have been wrong: a map that differs in it alone scores the same.
    let noise = random(&[1, 3, 1, 4], 9);
    let mut call = 0;
    let first_row_broken = |x: &Tensor| -> Result<Tensor> {
        call += 1;
        let y = x.avg_pool2d(2)?;
        let broken = y.narrow(2, 0, 1)?.broadcast_add(&noise)?;
        if call == 1 { Ok(y) } else { Tensor::cat(&[&broken, &y.narrow(2, 1, 3)?], 2) }
    };
    let masked = score.measure(&images, &[down], &mut rng(), first_row_broken).unwrap();
    assert_eq!(masked, report);
}

#[test]
fn a_scaled_image_comes_on_its_own_grid() {
    // A smooth picture survives resampling; the map must be seen on 6x3 tokens of 2 pixels.
    let ramp = Tensor::arange(0f64, 64., CPU).unwrap().reshape((1, 1, 8, 8)).unwrap();
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
    let report = score.measure(&smooth, &[scale], &mut rng(), &mut pool).unwrap();
    assert_eq!(seen, [[2, 1, 8, 8], [2, 1, 12, 6]]);
    assert!(report.mean.score.cosine > 0.999, "{report:?}");
    assert!(report.mean.score.relative_error > 1e-6, "resampling is not exact");
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

    let centered: Vec<f64> = whole.elements.iter().map(|(_, c)| c.score.centered).collect();
    approx::assert_relative_eq!(whole.mean.score.centered, (centered[0] + centered[1]) / 2.);
    let max_abs = whole.elements.iter().map(|(_, c)| c.score.max_abs);
    assert_eq!(whole.mean.score.max_abs, max_abs.fold(0., f64::max));
}

#[test]
fn every_float_type_is_scored_in_f64() {
    let images = random(&[4, 1, 4, 4], 2);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        let images = images.to_dtype(dtype).unwrap();
        let net = |x: &Tensor| x.affine(3., 1.)?.sqr()?.sum_keepdim(2)?.broadcast_as((4, 1, 4, 4));
        let report = EqScore::new(grid(4, 4)).measure(&images, &[D4::HFLIP], &mut rng(), net);
        let score = report.unwrap().mean.score;
        assert!((score.centered - 1.).abs() < tolerance, "{dtype:?}: {score:?}");
    }
}

#[test]
fn bad_input_is_named() {
    let score = EqScore::new(grid(4, 4));
    let pool = |x: &Tensor| x.avg_pool2d(2);
    let run = |score: &EqScore, shape: &[usize], elements: &[Element]| {
        let result = score.measure(&random(shape, 1), elements, &mut rng(), pool);
        result.unwrap_err().to_string()
    };
    let turn = &[Element::from(D4::ROT90)][..];
    let larger = &[Element::from(Scale::new(1.5, 1.5).unwrap())][..];
    let away = &[Element::from(Affine::translation(2., 0.).unwrap())][..];
    let chunk = EqScore { chunk: 0, ..score.clone() };
    let layers = |n| EqScore { layers: vec![grid(4, 4).into(); n], ..score.clone() };
    let shape = &[2, 1, 8, 8][..];
    let several = |score: &EqScore, count: usize| {
        let map = |x: &Tensor| Ok(vec![pool(x)?; count]);
        let result = score.measure_layers(&random(shape, 1), turn, &mut rng(), map);
        result.unwrap_err().to_string()
    };
    for (text, parts) in [
        (run(&score, &[2, 8, 8], turn), ["images (B, C, H, W)", "[2, 8, 8]"]),
        (run(&score, &[0, 1, 8, 8], turn), ["empty side", "[0, 1, 8, 8]"]),
        (run(&score, &[2, 1, 0, 8], turn), ["empty side", "[2, 1, 0, 8]"]),
        (run(&score, &[2, 1, 9, 8], larger), ["multiples of the 4x4", "[2, 1, 9, 8]"]),
        (run(&score, &[2, 1, 8, 9], larger), ["multiples of the 4x4", "[2, 1, 8, 9]"]),
        (run(&score, shape, &[]), ["at least one element", "0"]),
        (run(&score, shape, away), ["preimage", "leaves none"]),
        // The closure's map does not fit the grid.
        (run(&score, &[2, 1, 16, 16], turn), ["(B, C, 4, 4)", "[2, 1, 8, 8]"]),
        (run(&score, &[2, 1, 11, 8], turn), ["(B, C, 4, 4)", "[2, 1, 5, 4]"]),
        (run(&chunk, shape, turn), ["in a chunk", "0"]),
        (run(&layers(2), shape, turn), ["one layer", "got 2"]),
        (run(&layers(0), shape, turn), ["one layer", "got 0"]),
        (several(&layers(0), 0), ["at least one layer", "none"]),
        (several(&layers(2), 1), ["2 maps", "got 1"]),
    ] {
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }

    let images = random(&[2, 1, 4, 4], 1);
    let mut channels = 0;
    let growing = |x: &Tensor| {
        channels += 1;
        x.repeat((1, channels, 1, 1))
    };
    let error = |result: ser_reg::Result<Report<Element>>| result.unwrap_err().to_string();
    let text = error(score.measure(&images, turn, &mut rng(), |x| x.narrow(0, 0, 1)));
    assert!(text.contains("2 images"), "{text}");
    let text = error(score.measure(&images, turn, &mut rng(), growing));
    assert!(text.contains("[2, 16, 2]"), "{text}");
    // The closure's own error comes out as it is.
    let mine = |_: &Tensor| -> Result<Tensor> { Err(candle_core::Error::msg("mine")) };
    // (A backtrace follows where one is asked for.)
    let text = error(score.measure(&images, turn, &mut rng(), mine));
    assert!(text.starts_with("mine"), "{text}");
}

/// A convolution or pooling with symmetric kernels is exact under D4 if its stride is aligned, and not
/// otherwise.
#[test]
fn a_symmetric_layer_is_exact_if_and_only_if_its_stride_is_aligned() {
    let (mut exact, mut broken) = (0, 0);
    for kernel in 1..=5usize {
        for stride in 1..=4usize {
            for padding in 0..=kernel / 2 {
                for side in 6..=11usize {
                    let weights = symmetrized(&random(&[4, 2, kernel, kernel], 1));
                    let images = random(&[3, 2, side, side], 2);
                    let layer = |x: &Tensor| x.conv2d(&weights, padding, stride, 1, 1);
                    let tokens = (side + 2 * padding - kernel) / stride + 1;
                    let what = format!("side {side} kernel {kernel} stride {stride} pad {padding}");
                    let score = EqScore::new(grid(tokens, tokens));
                    let report = score.measure(&images, &D4::ALL[1..], &mut rng(), layer).unwrap();
                    if stride_aligned(side, kernel, stride, padding).unwrap() {
                        assert_exact(&report.mean.score, what);
                        exact += 1;
                    } else {
                        assert!(report.mean.score.relative_error > 0.05, "{what}: {report:?}");
                        broken += 1;
                    }
                }
            }
        }
    }
    assert!(exact > 100 && broken > 100, "{exact} {broken}");
}

#[test]
fn an_impossible_layer_has_no_alignment() {
    let max = usize::MAX;
    for (layer, part) in [
        ([0, 3, 2, 1], "at least 1"),
        ([8, 0, 2, 0], "at least 1"),
        ([8, 3, 0, 1], "at least 1"),
        ([8, 3, 2, 3], "padding below the kernel"),
        ([8, 9, 2, 0], "fits into the padded side"),
        ([8, max, 2, max - 1], "fits into the padded side"),
        ([max, max, 2, 1], "fits into the padded side"),
    ] {
        let [side, kernel, stride, padding] = layer;
        let text = stride_aligned(side, kernel, stride, padding).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains(&kernel.to_string()), "{text}");
    }
    assert!(stride_aligned(max, 1, max - 1, 0).unwrap());
}

/// The grid of a padded layer does not divide the image; sides that differ, and several layers.
#[test]
fn images_need_not_be_multiples_of_the_grid() {
    let weights = symmetrized(&random(&[4, 2, 3, 3], 1));
    let strided = |x: &Tensor| x.conv2d(&weights, 1, 2, 1, 1);
    let images = random(&[3, 2, 9, 17], 2);
    let score = EqScore {
        layers: vec![grid(5, 9).into(), grid(9, 17).into(), grid(3, 5).into()],
        chunk: 2,
        ..EqScore::new(grid(5, 9))
    };
    let maps = |x: &Tensor| {
        let fine = strided(x)?;
        let coarse = fine.narrow(1, 0, 2)?.conv2d(&weights, 1, 2, 1, 1)?;
        Ok(vec![fine, x.sqr()?, coarse])
    };
    let reports = score.measure_layers(&images, &D4::ALL, &mut rng(), maps).unwrap();
    for report in &reports {
        report.elements.iter().for_each(|(g, c)| assert_exact(&c.score, g));
    }
    // A motion keeps the size of the image; what leaves it does not count.
    let shift = Affine::translation(2. / 9., 0.).unwrap();
    let score = EqScore::new(grid(9, 17));
    let report = score.measure(&images, &[shift], &mut rng(), Tensor::sqr).unwrap();
    assert_exact(&report.mean.score, "shift");
    // A quarter turn of a square image whose grid is not square.
    let images = random(&[3, 2, 9, 9], 2);
    let lines = |x: &Tensor| x.narrow(2, 0, 5);
    let report = EqScore::new(grid(5, 9)).measure(&images, &[D4::ROT90], &mut rng(), lines);
    assert!(report.unwrap().mean.score.relative_error > 0.1);
}

#[test]
fn scores_do_not_depend_on_the_scale_of_the_maps() {
    let (a, v) = (random(&[3, 4, 5], 1), random(&[3, 4, 5], 2));
    let v = ((v * 0.7).unwrap() + &a).unwrap();
    let plain = between(&a, &v);
    let near = |x: f64, y: f64| (x / y - 1.).abs() < 1e-9;
    for unit in [1e-300, 1e-200, 1e-82, 1e78, 1e200, 1e300] {
        let c = between(&(&a * unit).unwrap(), &(&v * unit).unwrap());
        for (s, expected) in
            [(c.score, plain.score), (c.shuffled_images.unwrap(), plain.shuffled_images.unwrap())]
        {
            assert!(near(s.cosine, expected.cosine), "{unit:e}: {s:?}");
            assert!(near(s.centered, expected.centered), "{unit:e}: {s:?}");
            assert!(near(s.correlation, expected.correlation), "{unit:e}: {s:?}");
            assert!(near(s.relative_error, expected.relative_error), "{unit:e}: {s:?}");
            assert!(near(s.max_abs / unit, expected.max_abs), "{unit:e}: {s:?}");
        }
        // Each map has a scale of its own in the cosines.
        let one = between(&a, &(&v * unit).unwrap()).score;
        assert!(near(one.cosine, plain.score.cosine), "{unit:e}: {one:?}");
        assert!(near(one.correlation, plain.score.correlation), "{unit:e}: {one:?}");
    }
    // A zero map against a tiny one is wrong by all of it.
    let tiny = (&v * 1e-200).unwrap();
    let s = between(&tiny.zeros_like().unwrap(), &tiny).score;
    approx::assert_relative_eq!(s.relative_error, 1., max_relative = 1e-12);
}

#[test]
fn decibels_are_their_formula_and_errors_are_averaged() {
    let (a, v) = (random(&[3, 4, 5], 1), random(&[3, 4, 5], 2));
    let s = between(&a, &v).score;
    let mse = (&a - &v).unwrap().sqr().unwrap().mean_all().unwrap();
    let mse = mse.to_scalar::<f64>().unwrap();
    approx::assert_relative_eq!(s.mse, mse, max_relative = 1e-12);
    let expected = 10. * (4. / mse).log10();
    approx::assert_relative_eq!(s.psnr(2.).unwrap(), expected, max_relative = 1e-12);
    assert_eq!(between(&a, &a).score.psnr(2.).unwrap(), f64::INFINITY);
    let nan = between(&a, &(&v * f64::NAN).unwrap()).score;
    assert!(nan.mse.is_nan() && nan.psnr(1.).unwrap().is_nan());
    for range in [0., -1., f64::NAN, f64::INFINITY] {
        let text = s.psnr(range).unwrap_err().to_string();
        assert!(text.contains("above 0") && text.contains(&range.to_string()), "{text}");
    }

    // EQ-T: shifts by one token down, up, right and left. What comes in over the border does not count.
    let x = random(&[3, 2, 8, 8], 1);
    let pool = |x: &Tensor| x.avg_pool2d(2);
    let shift = |dy, dx| Affine::translation(dy, dx).unwrap();
    let shifts = [shift(0.25, 0.), shift(-0.25, 0.), shift(0., 0.25), shift(0., -0.25)];
    let eq = EqScore::new(grid(4, 4));
    let decibels = |s: &Scores| s.psnr(2.).unwrap();
    let exact = eq.measure(&x, &shifts, &mut rng(), pool).unwrap();
    assert!(decibels(&exact.mean.score) > 250.);
    let turns = eq.measure(&x, &D4::ALL[1..4], &mut rng(), pool).unwrap();
    assert!(decibels(&turns.mean.score) > 250.);
    // A map that adds its row: down by one, every valid token is off by one.
    let rows = Tensor::arange(0f64, 4., CPU).unwrap().reshape((1, 1, 4, 1)).unwrap();
    let numbered = |x: &Tensor| pool(x)?.broadcast_add(&rows);
    let report = eq.measure(&x, &shifts, &mut rng(), numbered).unwrap();
    let each: Vec<f64> = report.elements.iter().map(|(_, c)| decibels(&c.score)).collect();
    let one_off = 10. * 4f64.log10();
    approx::assert_relative_eq!(each[0], one_off, max_relative = 1e-9);
    approx::assert_relative_eq!(each[1], one_off, max_relative = 1e-9);
    assert!(each[2] > 250. && each[3] > 250.);
    // Half of the elements have that error, half none: errors are averaged, not decibels.
    let mean = decibels(&report.mean.score);
    approx::assert_relative_eq!(mean, 10. * 8f64.log10(), max_relative = 1e-9);
}

#[test]
fn channels_may_come_last() {
    let images = random(&[3, 2, 4, 6], 1);
    let score = EqScore::new(Layer {
        grid: grid(4, 6),
        layout: Layout { channels: ser_reg::Channels::Last, ..Default::default() },
    });
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
        let score = EqScore { field, ..EqScore::new(grid) };
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
