//! Lie derivatives, orbits and probes: closed forms, slow references, bad input.
#![cfg(feature = "metrics")]

mod common;

use approx::assert_relative_eq;
use candle_core::{D, DType, Device, Tensor};
use common::random;
use nalgebra::DMatrix;
use ser_reg::group::{Affine, D4, GroupAction, Scale, Subgroup};
use ser_reg::metric::{Generator, LieDerivative, LieReport, Orbit, PoseProbe, Ridge, parameter_r2};
use ser_reg::{Layout, Result, TokenGrid};

const CPU: &Device = &Device::Cpu;

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

/// One image `(1, 1, rows, cols)` of a function of the offset `(y, x)` from the center, in pixels.
fn picture(rows: usize, cols: usize, f: impl Fn(f64, f64) -> f64) -> Tensor {
    let offset = |i: usize, n: usize| i as f64 + 0.5 - n as f64 / 2.;
    let at = |i: usize| f(offset(i / cols, rows), offset(i % cols, cols));
    let values: Vec<f64> = (0..rows * cols).map(at).collect();
    Tensor::from_vec(values, (1, 1, rows, cols), CPU).unwrap()
}

fn text<T: std::fmt::Debug>(r: Result<T>) -> String {
    r.unwrap_err().to_string()
}

// ---- generators

#[test]
fn flows_are_the_named_affine_maps() {
    let (square, wide) = (grid(8, 8), grid(6, 9));
    let at = |g: Affine| [[0.1, 0.2], [0.9, 0.3]].map(|p| g.source(p)).concat();
    let t = 0.3f64;
    for (generator, px, expected) in [
        (Generator::ROTATION, square, Affine::rotation(t.to_degrees())),
        (Generator::ROTATION, wide, Affine::rotation_on(t.to_degrees(), wide, wide)),
        (Generator::TRANSLATION_Y, wide, Affine::translation(t, 0.)),
        (Generator::TRANSLATION_X, wide, Affine::translation(0., t)),
        (Generator::SCALE, wide, Affine::zoom(t.exp(), t.exp())),
        (Generator::STRETCH, wide, Affine::zoom(t.exp(), (-t).exp())),
        (Generator::SHEAR_Y, square, Affine::shear(t, 0.)),
        (Generator::SHEAR_X, square, Affine::shear(0., t)),
    ] {
        let flow = generator.flow(t, px).unwrap();
        for (a, b) in at(flow).into_iter().zip(at(expected.unwrap())) {
            assert!((a - b).abs() < 1e-12, "{generator:?}");
        }
    }
    // A one-parameter group, whatever the generator.
    let mixed = Generator { matrix: [[0.3, -1.], [0.5, 0.2]], shift: [0.4, -0.7] };
    let flow = |t| mixed.flow(t, wide).unwrap();
    for (a, b) in at(flow(0.2).compose(&flow(0.5))).into_iter().zip(at(flow(0.7))) {
        assert!((a - b).abs() < 1e-12);
    }
    assert!(text(Generator::SCALE.flow(f64::NAN, square)).contains("finite"));
}

// ---- Lie derivative

fn lie(
    lie: &LieDerivative,
    x: &Tensor,
    g: Generator,
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> LieReport {
    lie.measure(x, &[g], f).unwrap()[0]
}

/// A linear picture is interpolated exactly: the derivative of one pixel's value is that of `x(exp(−tX) p)`, `−∇x·X p`.
#[test]
fn the_derivative_of_a_linear_picture_has_its_closed_form() {
    let (rows, cols) = (10, 14);
    let (gy, gx) = (0.7, -0.4);
    let x = picture(rows, cols, |y, x| gy * y + gx * x + 2.);
    let (i, j) = (6, 4); // away from the border
    let (y0, x0) = (i as f64 + 0.5 - 5., j as f64 + 0.5 - 7.);
    let value = gy * y0 + gx * x0 + 2.;
    let pixel = |x: &Tensor| x.narrow(2, i, 1)?.narrow(3, j, 1)?.flatten_from(1);
    let vectors = LieDerivative::of_vectors();
    for (g, [dy, dx]) in [
        (Generator::ROTATION, [-x0, y0]),
        (Generator::TRANSLATION_Y, [rows as f64, 0.]),
        (Generator::TRANSLATION_X, [0., cols as f64]),
        (Generator::SCALE, [y0, x0]),
        (Generator::STRETCH, [y0, -x0]),
        (Generator::SHEAR_Y, [x0, 0.]),
        (Generator::SHEAR_X, [0., y0]),
        (Generator { matrix: [[0.5, 0.], [0., 0.]], shift: [0., 0.1] }, [0.5 * y0, 1.4]),
    ] {
        let expected = -(gy * dy + gx * dx);
        let report = lie(&vectors, &x, g, pixel);
        assert!((report.mean_abs - expected.abs()).abs() < 1e-4, "{g:?}: {report:?} {expected}");
        assert!((report.lee - expected * expected).abs() < 1e-3, "{g:?}: {report:?} {expected}");
        assert!((report.relative - (expected / value).abs()).abs() < 1e-4, "{g:?}");
        // The chain rule: of its square, of an exponential.
        let report = lie(&vectors, &x, g, |x| pixel(x)?.sqr());
        assert!((report.mean_abs - (2. * value * expected).abs()).abs() < 1e-3, "{g:?}");
        let report = lie(&vectors, &x, g, |x| pixel(x)?.exp());
        let slope = (value.exp() * expected).abs();
        assert!((report.mean_abs - slope).abs() < 1e-3 * (1. + slope), "{g:?}");
    }
}

/// At a pixel's center bilinear interpolation has a kink, and the central difference takes the mean of both sides. At
/// the border the picture is mirrored.
#[test]
fn the_derivative_of_any_row_is_its_central_difference() {
    let x = random(&[3, 1, 1, 9], 1);
    let report =
        lie(&LieDerivative::of_vectors(), &x, Generator::TRANSLATION_X, |x| x.flatten_from(1));
    let rows = x.flatten_from(1).unwrap().to_vec2::<f64>().unwrap();
    let (mut sum, mut square, mut norm) = (0., 0., 0.);
    for row in &rows {
        for j in 0..9 {
            let d = 9. * (row[(j + 1).min(8)] - row[j.max(1) - 1]) / 2.;
            sum += d.abs();
            square += d * d;
            norm += row[j] * row[j];
        }
    }
    assert_relative_eq!(report.mean_abs, sum / 27., max_relative = 1e-9);
    assert_relative_eq!(report.lee, square / 27., max_relative = 1e-9);
    assert_relative_eq!(report.relative, (square / norm).sqrt(), max_relative = 1e-9);
}

#[test]
fn equivariant_maps_and_invariant_vectors_have_none() {
    // Smooth, without a symmetry, and almost zero at the border, where the mirror would bend it.
    let x = picture(24, 24, |y, x| {
        (-(y - 1.).powi(2) / 20. - (x + 2.).powi(2) / 12. - 0.03 * x * y).exp()
    });
    for g in Generator::ALL {
        // An affine function of each pixel moves with it. Of its square interpolation knows the square of the mean, not
        // the mean of the squares: small beside how fast the picture changes.
        let maps = LieDerivative::of_maps(grid(24, 24));
        let report = lie(&maps, &x, g, |x| x.affine(3., 1.));
        let still = lie(&LieDerivative::of_vectors(), &x, g, |x| x.affine(3., 1.)?.flatten_from(1));
        assert!(report.relative < 0.01 * still.relative, "{g:?}: {report:?} {still:?}");
        let square = lie(&maps, &x, g, Tensor::sqr);
        let moving = lie(&LieDerivative::of_vectors(), &x, g, |x| x.sqr()?.flatten_from(1));
        assert!(square.relative < 0.1 * moving.relative, "{g:?}: {square:?} {moving:?}");
        // What a pooled map lacks is what the picture has of detail finer than a token.
        let pooled = lie(&LieDerivative::of_maps(grid(12, 12)), &x, g, |x| x.avg_pool2d(2));
        let moving = lie(&LieDerivative::of_vectors(), &x, g, |x| x.avg_pool2d(2)?.flatten_from(1));
        assert!(pooled.relative < 0.2 * moving.relative, "{g:?}: {pooled:?} {moving:?}");
        // Positions that stay when the picture moves are as bad as a map that is not carried back.
        let fixed = picture(12, 12, |y, x| 0.1 * y * x);
        let positions = lie(&LieDerivative::of_maps(grid(12, 12)), &x, g, |x| {
            x.avg_pool2d(2)?.broadcast_mul(&fixed)
        });
        assert!(positions.relative > 2. * pooled.relative, "{g:?}: {pooled:?} {positions:?}");
    }
    // The sum of a picture that is zero near the border does not change when it moves; nor does a constant.
    let bump = picture(24, 24, |y, x| (-(y * y + x * x) / 8.).exp());
    let sum = |x: &Tensor| x.sum((2, 3));
    let vectors = LieDerivative::of_vectors();
    for g in [Generator::ROTATION, Generator::TRANSLATION_X, Generator::SHEAR_Y, Generator::STRETCH]
    {
        assert!(lie(&vectors, &bump, g, sum).relative < 1e-3, "{g:?}");
        assert!(lie(&vectors, &bump, g, |x| x.sqr()?.sum((2, 3))?.affine(0., 1.)).lee == 0.);
    }
    // A magnification by e^t makes an area e^2t as large.
    assert!((lie(&vectors, &bump, Generator::SCALE, sum).relative - 2.).abs() < 0.01);
}

/// A constant picture is invariant; a map that adds its position is not carried back: the derivative is that of the
/// ramp.
#[test]
fn the_map_is_carried_back_by_the_inverse() {
    let flat = picture(12, 12, |_, _| 1.);
    let ramp = picture(12, 12, |_, x| x);
    let maps = LieDerivative::of_maps(grid(12, 12));
    let report = lie(&maps, &flat, Generator::TRANSLATION_X, |x| x.broadcast_add(&ramp));
    // Carried back by t·12 pixels to the left the ramp rises by t·12: 12 but at the border, where the mirror halves it.
    assert_relative_eq!(report.mean_abs, 12. * (10. + 1.) / 12., max_relative = 1e-6);
    // An equivariant map of a picture with a slope would double it if the map were carried the wrong way.
    let report = lie(&maps, &ramp, Generator::TRANSLATION_X, |x| x.affine(1., 0.));
    assert!(report.mean_abs < 0.05, "{report:?}");
    // Prefix tokens stay out of it.
    let mut with_cls = LieDerivative::of_maps(grid(12, 12));
    with_cls.output.as_mut().unwrap().layout = Layout { prefix: 1, ..Default::default() };
    let tokens = |x: &Tensor| {
        let tokens = x.flatten_from(2)?.transpose(1, 2)?;
        Tensor::cat(&[&(tokens.narrow(1, 0, 1)? * 100.)?, &tokens], 1)
    };
    assert_eq!(lie(&with_cls, &ramp, Generator::TRANSLATION_X, tokens), report);
}

#[test]
fn the_chunk_of_a_derivative_changes_nothing_and_f32_is_enough() {
    let x = random(&[5, 2, 8, 8], 1);
    let net = |x: &Tensor| x.cumsum(3)?.tanh()?.mean((2, 3));
    let mut vectors = LieDerivative::of_vectors();
    let whole: Vec<_> = Generator::ALL.map(|g| lie(&vectors, &x, g, net)).into();
    vectors.chunk = 2;
    let chunked = vectors.measure(&x, &Generator::ALL, net).unwrap();
    assert_eq!(whole, chunked);
    let single = x.to_dtype(DType::F32).unwrap();
    for (report, g) in whole.iter().zip(Generator::ALL) {
        let near = lie(&vectors, &single, g, net);
        assert!((near.relative / report.relative - 1.).abs() < 2e-3, "{g:?}: {near:?} {report:?}");
    }
}

#[test]
fn the_lie_derivative_names_bad_input() {
    let x = random(&[2, 1, 8, 8], 1);
    let maps = LieDerivative::of_maps(grid(4, 4));
    let vectors = LieDerivative::of_vectors();
    let all = &Generator::ALL[..];
    let run =
        |l: &LieDerivative,
         x: &Tensor,
         g: &[Generator],
         f: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| { text(l.measure(x, g, f)) };
    let pool = |x: &Tensor| x.avg_pool2d(2);
    let mean = |x: &Tensor| x.mean((2, 3));
    let zero = LieDerivative { step: 0., ..maps.clone() };
    let nan = LieDerivative { step: f64::NAN, ..maps.clone() };
    // Its exponential would never come to an end.
    let leap = LieDerivative { step: 1e40, ..maps.clone() };
    let wild = Generator { matrix: [[f64::NAN; 2]; 2], shift: [0.; 2] };
    for (text, part) in [
        (run(&zero, &x, all, &pool), "a step above 0"),
        (run(&nan, &x, all, &pool), "NaN"),
        (run(&maps, &x, &[], &pool), "at least one element"),
        (run(&maps, &x, &[wild], &pool), "finite"),
        (run(&leap, &x, all, &pool), "below 100"),
        (run(&maps, &random(&[2, 1, 11, 8], 1), all, &pool), "(B, C, 4, 4)"),
        (run(&maps, &x.narrow(0, 0, 1).unwrap().squeeze(0).unwrap(), all, &pool), "[1, 8, 8]"),
        (run(&maps, &x, all, &mean), "tokens of rank 3"),
        (run(&vectors, &x, all, &pool), "vectors (B, D)"),
        (run(&maps, &x, all, &|x| pool(x)? / 0.), "finite"),
        (run(&vectors, &x, all, &|x| mean(x)?.sqrt()), "finite"),
        (run(&LieDerivative { chunk: 0, ..maps.clone() }, &x, all, &pool), "in a chunk"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(lie(&vectors, &x, Generator::SCALE, |x| mean(x)? * 0.).relative.is_nan());
}

/// A step that moves no pixel by more than rounding would report an exact 0.
#[test]
fn a_step_below_the_resolution_of_the_type_is_refused() {
    let x = random(&[2, 1, 32, 32], 1);
    let corner = |x: &Tensor| x.narrow(2, 0, 4)?.flatten_from(1);
    let at = |dtype, step, g| {
        let lie = LieDerivative { step, ..LieDerivative::of_vectors() };
        lie.measure(&x.to_dtype(dtype).unwrap(), &[g], corner)
    };
    for (dtype, refused, accepted) in [
        (DType::F64, 1e-10, 1e-6),
        (DType::F32, 1e-10, 1e-5),
        (DType::F32, 1e-7, 1e-4),
        (DType::F16, 1e-3, 1e-2),
        (DType::BF16, 1e-3, 5e-2),
    ] {
        for g in Generator::ALL {
            let text = text(at(dtype, refused, g));
            assert!(text.contains("a step of at least") && text.contains("32x32"), "{text}");
            let report = at(dtype, accepted, g).unwrap()[0];
            assert!(report.relative > 0.5, "{dtype:?} {g:?}: {report:?}");
        }
    }
    // No motion at all has no smallest step.
    let none = Generator { matrix: [[0.; 2]; 2], shift: [0.; 2] };
    assert_eq!(at(DType::F32, 1e-3, none).unwrap()[0].lee, 0.);
}

#[test]
fn local_metrics_do_not_depend_on_the_scale_of_the_output() {
    let x = random(&[6, 1, 8, 8], 1);
    let weights = random(&[64, 3], 2);
    let f = |unit: f64| {
        let weights = &weights;
        move |x: &Tensor| x.flatten_from(1)?.matmul(weights)?.affine(unit, 0.)
    };
    let vectors = LieDerivative::of_vectors();
    let orbit = Orbit::new(grid(4, 4));
    let plain = lie(&vectors, &x, Generator::ROTATION, f(1.)).relative;
    let variance = orbit.measure(&x, &D4::ALL[1..], f(1.)).unwrap().variance;
    for unit in [1e-300, 1e-160, 1e-82, 1e78, 1e160, 1e300] {
        let report = lie(&vectors, &x, Generator::ROTATION, f(unit));
        assert_relative_eq!(report.relative, plain, max_relative = 1e-9);
        let report = orbit.measure(&x, &D4::ALL[1..], f(unit)).unwrap();
        assert_relative_eq!(report.variance, variance, max_relative = 1e-9);
    }
    // Features and targets of any size; the unit goes back into the prediction.
    let (x, y) = (random(&[20, 3], 1), random(&[20, 2], 2));
    let expected = Ridge::fit(&x, &y, 0.1).unwrap().predict(&x).unwrap();
    let expected = common::values(&expected);
    let r2 = parameter_r2((&x, &y), (&x, &y), 0.1).unwrap().mean;
    for unit in [1e-300, 1e-160, 1e-82, 1e78, 1e160, 1e280] {
        let (x, y) = ((&x * unit).unwrap(), (&y * unit).unwrap());
        let got = Ridge::fit(&x, &y, 0.1).unwrap().predict(&x).unwrap();
        for (a, b) in common::values(&got).into_iter().zip(&expected) {
            assert_relative_eq!(a / unit, *b, max_relative = 1e-9);
        }
        let mean = parameter_r2((&x, &y), (&x, &y), 0.1).unwrap().mean;
        assert_relative_eq!(mean, r2, max_relative = 1e-9);
    }
    let huge = (&x * 1e300).unwrap();
    for result in [Ridge::fit(&huge, &y, 0.1), Ridge::fit(&x, &(&y * 1e300).unwrap(), 0.1)] {
        assert!(text(result).contains("at most 1e290"));
    }
}

// ---- orbits

#[test]
fn the_orbit_variance_of_an_invariant_function_is_zero() {
    let x = random(&[6, 3, 8, 12], 1);
    let orbit = Orbit::new(grid(4, 6));
    let offset = |x: &Tensor| x.mean((2, 3))? + 1e6;
    let report = orbit.measure(&x, &D4::ALL[1..], offset).unwrap();
    assert!(report.variance < 1e-15, "{report:?}");
    assert_eq!((report.consistency, report.worst), (1., 1.));
    assert_eq!(report.elements.iter().map(|e| e.0).collect::<Vec<_>>(), D4::ALL[1..]);
}

#[test]
fn orbit_variance_and_consistency_equal_a_slow_reference() {
    let x = random(&[7, 1, 4, 4], 1);
    let weights = random(&[16, 3], 2);
    let f = |x: &Tensor| x.flatten_from(1)?.matmul(&weights);
    let mut orbit = Orbit::new(grid(4, 4));
    let report = orbit.measure(&x, &D4::ALL[1..], f).unwrap();

    // f[g][b][d], the group's elements as their indices have it; D4 as the operators move images is tested elsewhere.
    let outputs: Vec<Vec<Vec<f64>>> = D4::ALL
        .iter()
        .map(|g| {
            let operator =
                ser_reg::GridOperator::new(&[*g], grid(4, 4), &Default::default()).unwrap();
            f(&operator.apply(&x).unwrap()).unwrap().to_vec2().unwrap()
        })
        .collect();
    let variance = |v: Vec<f64>| {
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / v.len() as f64
    };
    let (mut within, mut between) = (0., 0.);
    for d in 0..3 {
        for b in 0..7 {
            within += variance(outputs.iter().map(|o| o[b][d]).collect()) / 7.;
        }
        between += variance((0..7).map(|b| outputs[0][b][d]).collect());
    }
    assert_relative_eq!(report.variance, within / between, max_relative = 1e-12);
    let class = |g: usize, b: usize| {
        (0..3).max_by(|&i, &j| outputs[g][b][i].total_cmp(&outputs[g][b][j])).unwrap()
    };
    let mut worst = 7;
    for b in 0..7 {
        worst -= (1..8).any(|g| class(g, b) != class(0, b)) as usize;
    }
    for (g, (_, part)) in report.elements.iter().enumerate() {
        let same = (0..7).filter(|&b| class(g + 1, b) == class(0, b)).count();
        assert_eq!(*part, same as f64 / 7.);
    }
    let mean = report.elements.iter().map(|e| e.1).sum::<f64>() / 7.;
    assert_relative_eq!(report.consistency, mean);
    assert!(report.worst < report.consistency && report.consistency < 1.);
    assert_eq!(report.worst, worst as f64 / 7.);

    orbit.chunk = 3;
    assert_eq!(orbit.measure(&x, &D4::ALL[1..], f).unwrap(), report);
}

#[test]
fn orbits_name_bad_input_and_collapse() {
    let orbit = Orbit::new(grid(4, 4));
    let x = random(&[3, 1, 8, 8], 1);
    let mean = |x: &Tensor| x.mean((2, 3));
    let run =
        |o: &Orbit, x: &Tensor, g: &[D4], f: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
            text(o.measure(x, g, f))
        };
    let turn = &[D4::ROT90][..];
    for (text, part) in [
        (run(&orbit, &x.narrow(0, 0, 1).unwrap(), turn, &mean), "at least two images"),
        (run(&orbit, &x, &[], &mean), "at least one element"),
        (run(&orbit, &x, turn, &|x| Ok(x.clone())), "vectors (B, D)"),
        (run(&orbit, &x, turn, &|x| mean(x)? / 0.), "finite"),
        (run(&orbit, &x, turn, &|x| mean(x)?.narrow(0, 0, 1)), "3 images"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    let wide = |x: &Tensor| x.mean(2)?.flatten_from(1);
    let larger = [Scale::new(1.25, 1.25).unwrap()];
    let odd = random(&[3, 1, 9, 8], 1);
    let error = text(orbit.measure(&odd, &larger, mean));
    assert!(error.contains("multiples of the 4x4"), "{error}");
    let any_side = orbit.measure(&odd, &D4::ALL[1..], mean).unwrap();
    assert!(any_side.variance < 1e-15, "{any_side:?}");
    let error = text(orbit.measure(&x, &larger, wide));
    assert!(error.contains("[3, 8]") && error.contains("[3, 10]"), "{error}");
    // Copies of one image differ by nothing, whatever the orbit does.
    let copies = x.narrow(0, 0, 1).unwrap().repeat((3, 1, 1, 1)).unwrap();
    let corner = |x: &Tensor| x.narrow(2, 0, 1)?.flatten_from(1);
    let report = orbit.measure(&copies, turn, corner).unwrap();
    assert!(report.variance.is_nan(), "{report:?}");
    // A collapsed model is invariant, and its variance undefined.
    let report = orbit.measure(&x, turn, |x| mean(x)?.affine(0., 0.1)).unwrap();
    assert!(report.variance.is_nan() && report.consistency == 1., "{report:?}");
}

// ---- probes

/// `(XᵀX + λnI)⁻¹Xᵀy` on standardised features, by an explicit inverse.
fn ridge_by_inverse(x: &Tensor, y: &Tensor, lambda: f64, at: &Tensor) -> DMatrix<f64> {
    let matrix = |x: &Tensor| {
        let (n, d) = x.dims2().unwrap();
        DMatrix::from_row_slice(n, d, &x.flatten_all().unwrap().to_vec1::<f64>().unwrap())
    };
    let (mut x, y, mut at) = (matrix(x), matrix(y), matrix(at));
    let n = x.nrows() as f64;
    for j in 0..x.ncols() {
        let mean = x.column(j).mean();
        let std = x.column(j).variance().sqrt();
        x.column_mut(j).apply(|v| *v = (*v - mean) / std);
        at.column_mut(j).apply(|v| *v = (*v - mean) / std);
    }
    let mean = y.row_mean();
    let centered = DMatrix::from_fn(y.nrows(), y.ncols(), |i, j| y[(i, j)] - mean[j]);
    let gram = x.transpose() * &x + DMatrix::identity(x.ncols(), x.ncols()) * (lambda * n);
    let mut out = at * gram.try_inverse().unwrap() * x.transpose() * centered;
    for mut row in out.row_iter_mut() {
        row += &mean;
    }
    out
}

#[test]
fn ridge_equals_its_closed_form_on_either_side() {
    for (n, d, lambda) in [(20, 5, 0.), (20, 5, 0.3), (5, 12, 0.3), (6, 6, 1e-2)] {
        let x = (random(&[n, d], 1) + 4.).unwrap();
        let y = (random(&[n, 2], 2) - 7.).unwrap();
        let at = random(&[3, d], 3);
        let expected = ridge_by_inverse(&x, &y, lambda, &at);
        let got = Ridge::fit(&x, &y, lambda).unwrap().predict(&at).unwrap();
        for (i, row) in got.to_vec2::<f64>().unwrap().iter().enumerate() {
            for (j, v) in row.iter().enumerate() {
                assert_relative_eq!(*v, expected[(i, j)], max_relative = 1e-8);
            }
        }
    }
}

#[test]
fn constant_features_weigh_nothing() {
    let (x, y) = (random(&[20, 3], 1), random(&[20, 2], 2));
    let constant = Tensor::full(0.1f64, (20, 1), CPU).unwrap();
    let wide = Tensor::cat(&[&x, &constant], 1).unwrap();
    for lambda in [0., 0.1] {
        let plain = Ridge::fit(&x, &y, lambda).unwrap().predict(&x).unwrap();
        let ridge = Ridge::fit(&wide, &y, lambda).unwrap();
        let other = Tensor::cat(&[&x, &(constant.clone() + 9.).unwrap()], 1).unwrap();
        let with = ridge.predict(&other).unwrap();
        let error = (plain - with).unwrap().abs().unwrap().max_all().unwrap();
        assert!(error.to_scalar::<f64>().unwrap() < 1e-12);
    }
    // All constant: the mean is predicted.
    let r2 = parameter_r2((&(&x * 0.).unwrap(), &y), (&(&x * 0.).unwrap(), &y), 0.1).unwrap();
    assert!(r2.mean.abs() < 1e-12, "{r2:?}");
}

#[test]
fn r2_is_one_zero_or_undefined_where_it_should_be() {
    let x = random(&[60, 4], 1);
    let noise = random(&[60, 1], 2);
    let linear = x.narrow(1, 0, 2).unwrap().sum_keepdim(1).unwrap();
    let constant = Tensor::ones((60, 1), DType::F64, CPU).unwrap();
    let y = Tensor::cat(&[&linear, &noise, &constant], 1).unwrap();
    let part = |x: &Tensor, start| x.narrow(0, start, 30).unwrap();
    let fit = |lambda| {
        let (train, test) = ((part(&x, 0), part(&y, 0)), (part(&x, 30), part(&y, 30)));
        parameter_r2((&train.0, &train.1), (&test.0, &test.1), lambda).unwrap()
    };
    let r2 = fit(1e-9);
    assert!((r2.parameters[0] - 1.).abs() < 1e-9 && r2.parameters[1] < 0.2, "{r2:?}");
    assert!(r2.parameters[2].is_nan());
    assert_relative_eq!(r2.mean, (r2.parameters[0] + r2.parameters[1]) / 2.);
    // With an endless penalty the training mean is all that is left.
    assert!(fit(1e12).parameters[0] < 1e-6);
    // By its definition.
    let (train, test) = ((part(&x, 0), part(&noise, 0)), (part(&x, 30), part(&noise, 30)));
    let predicted = ridge_by_inverse(&train.0, &train.1, 0.1, &test.0);
    let truth = test.1.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mean = truth.iter().sum::<f64>() / 30.;
    let sum = |f: &dyn Fn(usize) -> f64| (0..30).map(|i| f(i).powi(2)).sum::<f64>();
    let expected = 1. - sum(&|i| truth[i] - predicted[(i, 0)]) / sum(&|i| truth[i] - mean);
    let r2 = parameter_r2((&train.0, &train.1), (&test.0, &test.1), 0.1).unwrap();
    assert_relative_eq!(r2.mean, expected, max_relative = 1e-9);
}

#[test]
fn ridge_names_bad_input() {
    let (x, y) = (random(&[8, 3], 1), random(&[8, 1], 2));
    let fit = |x: &Tensor, y: &Tensor, lambda| text(Ridge::fit(x, y, lambda));
    let twice = Tensor::cat(&[&x, &x], 1).unwrap();
    let row = |x: &Tensor, n| x.narrow(0, 0, n).unwrap();
    let ridge = Ridge::fit(&x, &y, 0.1).unwrap();
    for (text, part) in [
        (fit(&x, &row(&y, 7), 0.1), "as many rows"),
        (fit(&row(&x, 1), &row(&y, 1), 0.1), "at least two"),
        (fit(&row(&x, 0), &row(&y, 0), 0.1), "none of them zero"),
        (fit(&x, &y, -1.), "at least 0"),
        (fit(&x, &y, f64::NAN), "NaN"),
        (fit(&twice, &y, 0.), "repeat one another"),
        (fit(&random(&[3, 9], 1), &row(&y, 3), 0.), "more than the rows"),
        (fit(&(&x / 0.).unwrap(), &y, 0.1), "finite"),
        (fit(&x, &(&y / 0.).unwrap(), 0.1), "finite"),
        (fit(&x, &y.squeeze(1).unwrap(), 0.1), "a matrix (n, d)"),
        (text(ridge.predict(&twice)), "3 features"),
        (text(ridge.predict(&(&x / 0.).unwrap())), "finite"),
        (text(parameter_r2((&x, &y), (&x, &row(&y, 7)), 0.1)), "[8, 1]"),
        (text(parameter_r2((&x, &y), (&row(&x, 1), &row(&y, 1)), 0.1)), "at least two rows"),
    ] {
        assert!(text.contains(part), "{text}");
    }
}

/// Pictures that are brighter towards the top and, less so, towards the left: all eight poses differ.
fn upright(n: usize, seed: u64) -> Tensor {
    let slope = picture(8, 8, |y, x| -0.3 * y - 0.1 * x);
    (random(&[n, 1, 8, 8], seed) * 0.5).unwrap().broadcast_add(&slope).unwrap()
}

#[test]
fn the_pose_probe_tells_poses_that_can_be_told() {
    let (train, test) = (upright(60, 1), upright(40, 2));
    let pixels = |x: &Tensor| x.avg_pool2d(4)?.flatten_from(1);
    let probe = PoseProbe::new(Subgroup::D4, grid(4, 4));
    let report = probe.measure(&train, &test, pixels).unwrap();
    assert!(report.accuracy > 0.9, "{report:?}");
    assert_eq!(report.chance, 1. / 8.);
    assert_eq!(report.poses.iter().map(|p| p.0).collect::<Vec<_>>(), Subgroup::D4.elements());
    let mean = report.poses.iter().map(|p| p.1).sum::<f64>() / 8.;
    assert_relative_eq!(report.accuracy, mean);
    // An invariant vector is at chance, exactly: it is one in all poses, and one of them is named.
    let invariant = probe.measure(&train, &test, |x| x.sqr()?.mean((2, 3))).unwrap();
    assert_relative_eq!(invariant.accuracy, 1. / 8., max_relative = 1e-12);
    // Invariant to flips sideways only: half the eight poses look alike in pairs.
    let flips = |x: &Tensor| pixels(&(x + x.flip(&[3])?)?);
    let half = probe.measure(&train, &test, flips).unwrap().accuracy;
    assert!(half <= 0.5 + 1e-12 && half > 0.2, "{half}");
    // Nothing to tell in pictures without an upright pose, though the training set can be learnt by heart.
    let (train, test) = (random(&[8, 1, 8, 8], 3), random(&[60, 1, 8, 8], 4));
    let report = probe.measure(&train, &test, |x| x.flatten_from(1)).unwrap();
    assert!(report.train_accuracy > 0.9 && report.accuracy < 0.3, "{report:?}");
}

#[test]
fn the_pose_probe_scores_each_pose_on_its_own() {
    // Told by a feature that is 1 in one pose only: that pose is always told, the others are one.
    let mark = picture(8, 8, |y, x| (y < -3. && x < -3.) as u8 as f64 * 4.);
    let train = (upright(30, 1) * 0.).unwrap().broadcast_add(&mark).unwrap();
    let corner = |x: &Tensor| x.narrow(2, 0, 1)?.narrow(3, 0, 1)?.flatten_from(1);
    let mut probe = PoseProbe::new(Subgroup::C4, grid(4, 4));
    let report = probe.measure(&train, &train, corner).unwrap();
    assert_eq!(report.poses[0], (D4::IDENTITY, 1.));
    assert_eq!(report.poses.iter().map(|p| p.1).sum::<f64>(), 2.);
    assert_eq!((report.accuracy, report.train_accuracy), (0.5, 0.5));
    probe.chunk = 7;
    assert_eq!(probe.measure(&train, &train, corner).unwrap(), report);
}

#[test]
fn the_pose_probe_names_bad_input() {
    let x = upright(4, 1);
    let probe = PoseProbe::new(Subgroup::C4, grid(4, 4));
    let oblong_probe = PoseProbe::new(Subgroup::C4, grid(4, 6));
    let mean = |x: &Tensor| x.mean((2, 3));
    let run = |p: &PoseProbe,
               train: &Tensor,
               test: &Tensor,
               f: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
        text(p.measure(train, test, f))
    };
    let one = Subgroup::ALL.into_iter().find(|g| g.order() == 1).unwrap();
    let none = x.narrow(0, 0, 0).unwrap();
    let oblong = random(&[4, 1, 8, 12], 1);
    for (text, part) in [
        (run(&PoseProbe::new(one, grid(4, 4)), &x, &x, &mean), "at least two poses"),
        (run(&probe, &none, &x, &mean), "empty side"),
        (run(&probe, &x, &none, &mean), "empty side"),
        (run(&probe, &x, &x, &|x| Ok(x.clone())), "vectors (B, D)"),
        (run(&probe, &x, &x, &|x| mean(x)? / 0.), "finite"),
        (
            run(&oblong_probe, &oblong, &oblong, &|x| x.mean(D::Minus1)?.flatten_from(1)),
            "in every pose",
        ),
        (run(&PoseProbe { lambda: -1., ..probe.clone() }, &x, &x, &mean), "at least 0"),
        (run(&PoseProbe { chunk: 0, ..probe.clone() }, &x, &x, &mean), "in a chunk"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    let wide = random(&[4, 1, 8, 8], 1);
    let mut call = 0;
    let growing = |x: &Tensor| {
        call += 1;
        x.mean((2, 3))?.repeat((1, 1 + call / 5))
    };
    assert!(text(probe.measure(&x, &wide, growing)).contains("1 features"));
}
