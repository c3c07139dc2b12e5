//! Gradient balance: closed forms, extreme magnitudes, parameters of one loss only, and λ over
//! training.

mod common;
mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Init, VarMap};
use common::{cases, random};
use loss_common::{assert_close, assert_says, flat};
use proptest::prelude::*;
use ser_reg::{
    grad,
    grad::{GradientBalance, LambdaBalancer, LambdaConfig},
};

const CPU: &Device = &Device::Cpu;

/// `⟨w, a⟩`: a loss whose gradient is `a`.
fn linear(w: &Var, a: &Tensor) -> Tensor {
    (w.as_tensor() * a).unwrap().sum_all().unwrap()
}

fn balance(
    inv: &Tensor,
    equiv: &Tensor,
    vars: &[(&str, &Var)],
    prefixes: &[&str],
) -> GradientBalance {
    GradientBalance::of_losses(inv, equiv, vars.iter().copied(), prefixes).unwrap()
}

proptest! {
    #![proptest_config(cases(48))]

    /// Norms and cosines of the concatenated gradients, at magnitudes over the range of f64.
    #[test]
    fn groups_are_their_concatenated_gradients(seed: u64, up in -140i32..140, down in -140i32..140) {
        let (up, down) = (10f64.powi(up), 10f64.powi(down));
        let vars: Vec<Var> = (0..3).map(|i| Var::from_tensor(&random(&[4], i)).unwrap()).collect();
        let gradients = |seed: u64, scale: f64| -> Vec<Tensor> {
            (0..3).map(|i| (random(&[4], seed ^ i) * scale).unwrap()).collect()
        };
        let (a, b) = (gradients(seed, up), gradients(!seed, down));
        let total = |g: &[Tensor]| {
            let each: Vec<Tensor> = vars.iter().zip(g).map(|(w, g)| linear(w, g)).collect();
            Tensor::stack(&each, 0).unwrap().sum_all().unwrap()
        };
        let named = [("block.0.w", &vars[0]), ("block.1.w", &vars[1]), ("block.1.b", &vars[2])];
        let report = balance(&total(&a), &total(&b), &named, &["block.1", "block", "block.0.w"]);
        for (group, range) in [
            (&report.groups[0], 1..3), (&report.groups[1], 0..3), (&report.groups[2], 0..1),
            (&report.shared, 0..3), (&report.overall, 0..3),
        ] {
            // The division by the scale keeps plain sums finite.
            let cat = |g: &[Tensor], s: f64| g[range.clone()].iter().flat_map(flat).map(|v| v / s).collect::<Vec<_>>();
            let (x, y) = (cat(&a, up), cat(&b, down));
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            let (nx, ny) = (dot(&x, &x).sqrt(), dot(&y, &y).sqrt());
            assert_close(&[group.norm_inv / up, group.norm_equiv / down], &[nx, ny], 1e-13);
            assert_close(&[group.cosine], &[dot(&x, &y) / (nx * ny)], 1e-12);
            assert_close(&[group.ratio() / (down / up)], &[ny / nx], 1e-12);
        }
        // The suggested λ has the target ratio.
        let lambda = report.suggested_lambda(0.25).unwrap().unwrap();
        assert_close(&[lambda * report.shared.ratio()], &[0.25], 1e-12);
    }
}

#[test]
fn magnitudes_whose_squares_overflow_their_type() -> Result<()> {
    for (dtype, scale) in [
        (DType::F32, 3e30),
        (DType::F32, 3e-30),
        (DType::F64, 1e300),
        (DType::F64, 1e-300),
        (DType::F16, 1e4),
        (DType::BF16, 3e30),
    ] {
        let w = Var::zeros(2, dtype, CPU)?;
        let gradient =
            |x: [f64; 2]| -> Result<Tensor> { (Tensor::new(&x, CPU)? * scale)?.to_dtype(dtype) };
        let (a, b) = (linear(&w, &gradient([3., 4.])?), linear(&w, &gradient([4., -3.])?));
        let report = balance(&a, &b, &[("w", &w)], &["w"]);
        let group = &report.groups[0];
        assert_close(&[group.norm_inv / scale, group.norm_equiv / scale], &[5.; 2], 1e-2);
        let tolerance = if dtype == DType::F64 { 1e-14 } else { 1e-2 };
        assert!(
            (group.ratio() - 1.).abs() < tolerance && group.cosine.abs() < tolerance,
            "{report}"
        );
    }
    Ok(())
}

#[test]
fn parameters_that_one_loss_does_not_reach() -> Result<()> {
    let var = |x: f64| Var::new(&[x, 1.], CPU).unwrap();
    let (trunk, head, projector) = (var(1.), var(2.), var(3.));
    let inv = (trunk.as_tensor() * head.as_tensor())?.sum_all()?;
    let equiv = (trunk.as_tensor() * projector.as_tensor())?.sum_all()?;
    let vars = [("trunk", &trunk), ("head", &head), ("projector", &projector)];
    let report = balance(&inv, &equiv, &vars, &["trunk", "head", "projector"]);
    let [t, h, p] = &report.groups[..] else { panic!("three groups") };
    assert_eq!((t.norm_inv, t.norm_equiv), (5f64.sqrt(), 10f64.sqrt()));
    assert!(h.norm_inv > 0. && h.norm_equiv == 0. && h.ratio() == 0. && h.cosine.is_nan());
    assert!(
        p.norm_inv == 0. && p.norm_equiv > 0. && p.ratio() == f64::INFINITY && p.cosine.is_nan()
    );
    // λ depends on the trunk only.
    assert_eq!((report.shared.norm_inv, report.shared.norm_equiv), (t.norm_inv, t.norm_equiv));
    assert_close(&[report.suggested_lambda(1.)?.unwrap()], &[0.5f64.sqrt()], 1e-14);
    assert_close(&[report.overall.norm_inv], &[(5f64 + 2.).sqrt()], 1e-14);
    // Without a shared parameter there is no suggestion.
    let apart = balance(&inv, &linear(&projector, &Tensor::new(&[1., 1.], CPU)?), &vars, &[]);
    assert!(apart.shared.ratio().is_nan());
    assert_eq!(apart.suggested_lambda(1.)?, None);
    Ok(())
}

#[test]
fn agreement_and_conflict() -> Result<()> {
    let w = Var::from_tensor(&random(&[5], 1))?;
    let a = random(&[5], 2);
    for (scale, cosine) in [(2., 1.), (-0.5, -1.)] {
        let report = balance(&linear(&w, &a), &linear(&w, &(&a * scale)?), &[("w", &w)], &[]);
        assert_close(
            &[report.overall.cosine, report.overall.ratio()],
            &[cosine, f64::abs(scale)],
            1e-14,
        );
        assert!(report.overall.cosine.abs() <= 1.);
    }
    Ok(())
}

#[test]
fn gradients_that_are_not_finite_suggest_nothing() -> Result<()> {
    let (w, v) = (Var::new(&[0f32, 1.], CPU)?, Var::new(&[1f32], CPU)?);
    let broken = (w.sqrt()?.sum_all()? + v.sum_all()?)?; // the derivative at 0 is infinite
    let fine = (w.sum_all()? + v.sum_all()?)?;
    let vars = [("w", &w), ("v", &v)];
    let mut balancer = LambdaBalancer::new(LambdaConfig::default())?;
    for (inv, equiv) in [(&broken, &fine), (&fine, &broken)] {
        let report = balance(inv, equiv, &vars, &["w", "v"]);
        let [w, v] = &report.groups[..] else { panic!("two groups") };
        assert!(!w.norm_inv.is_finite() || !w.norm_equiv.is_finite());
        assert_eq!((v.norm_inv, v.norm_equiv), (1., 1.));
        assert_eq!(report.suggested_lambda(1.)?, None);
        assert_eq!(balancer.update(&report), 1.);
    }
    Ok(())
}

#[test]
fn prefixes_are_paths_and_gradient_stores_agree() -> Result<()> {
    let map = VarMap::new();
    for name in ["b.1.w", "b.1.norm.w", "b.10.w"] {
        map.get(2, name, Init::Const(1.), DType::F32, CPU)?;
    }
    let vars = grad::named(&map, "");
    let sum = |scale: f64| -> Result<Tensor> {
        let each: Vec<Tensor> = vars.iter().map(|(_, w)| w.as_tensor().clone()).collect();
        Tensor::cat(&each, 0)?.sum_all()? * scale
    };
    let (inv, equiv) = (sum(1.)?, sum(3.)?);
    let named = || vars.iter().map(|(n, v)| (n, v));
    let of_losses = GradientBalance::of_losses(&inv, &equiv, named(), &["b.1", "b.10.", ""])?;
    assert_eq!(
        of_losses.groups.iter().map(|g| g.norm_inv).collect::<Vec<_>>(),
        [2., 2f64.sqrt(), 6f64.sqrt()]
    );
    let of_grads = GradientBalance::of_grads(
        &inv.backward()?,
        &equiv.backward()?,
        named(),
        &["b.1", "b.10.", ""],
    )?;
    assert_eq!(of_losses, of_grads);
    let table = of_losses.to_string();
    for part in ["cosine", "b.10.", "shared", "overall", "3.000e0", "1.000"] {
        assert!(table.contains(part), "{table}");
    }
    assert_eq!(table.lines().count(), 6);
    Ok(())
}

fn config() -> LambdaConfig {
    LambdaConfig::default()
}

/// A report with this shared ratio.
fn ratio(ratio: f64) -> GradientBalance {
    let w = Var::new(1f64, CPU).unwrap();
    balance(&w, &(w.as_tensor() * ratio).unwrap(), &[("w", &w)], &[])
}

#[test]
fn lambda_follows_the_logarithm_of_the_ratio() -> Result<()> {
    let config = LambdaConfig { target_ratio: 0.5, momentum: 0.75, ..config() };
    let mut balancer = LambdaBalancer::new(config)?;
    assert_eq!(balancer.lambda(), 1.);
    let mut log: Option<f64> = None;
    for r in [0.5, 2., 8., 0.125, 1.] {
        let suggested = (0.5f64 / r).ln();
        let next = log.map_or(suggested, |old| 0.75 * old + 0.25 * suggested);
        log = Some(next);
        assert_close(&[balancer.update(&ratio(r))], &[next.exp()], 1e-13);
        assert_eq!(balancer.update(&ratio(0.)), balancer.lambda(), "without a suggestion λ stays");
    }
    // It converges to the target, and resumes from a checkpoint to the bit.
    for _ in 0..200 {
        balancer.update(&ratio(4.));
    }
    assert_close(&[balancer.lambda() * 4.], &[0.5], 1e-12);
    let mut resumed = LambdaBalancer::resume(config, balancer.lambda())?;
    assert_eq!(resumed.update(&ratio(3.)), balancer.update(&ratio(3.)));
    Ok(())
}

#[test]
fn lambda_stays_within_its_bounds() -> Result<()> {
    let mut balancer = LambdaBalancer::new(LambdaConfig { min: 0.1, max: 10., ..config() })?;
    assert_eq!(balancer.update(&ratio(1e-9)), 10.);
    for _ in 0..100 {
        balancer.update(&ratio(1e9));
    }
    assert_eq!(balancer.lambda(), 0.1);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let w = Var::ones(2, DType::F32, CPU)?;
    let loss = w.sum_all()?;
    let say = |inv: &Tensor, equiv: &Tensor, prefixes: &[&str], parts: &[&str]| {
        let got = GradientBalance::of_losses(inv, equiv, [("w", &w)], prefixes);
        assert_says(got, &[&["GradientBalance"], parts].concat());
    };
    say(&w, &loss, &[], &["scalar floating-point", "[2]"]);
    say(&loss, &Tensor::new(1u32, CPU)?, &[], &["scalar floating-point", "U32"]);
    say(&loss, &loss, &["w", "encoder"], &["cover at least one", "\"encoder\""]);
    let none: [(&str, &Var); 0] = [];
    assert_says(
        GradientBalance::of_losses(&loss, &loss, none, &[]),
        &["at least one variable", "none"],
    );
    for bad in [0., -1., f64::NAN, f64::INFINITY] {
        assert_says(
            ratio(1.).suggested_lambda(bad),
            &["target_ratio", "above 0", &bad.to_string()],
        );
        assert_says(LambdaBalancer::resume(config(), bad), &["lambda", "above 0"]);
        for (field, config) in [
            ("target_ratio", LambdaConfig { target_ratio: bad, ..config() }),
            ("initial", LambdaConfig { initial: bad, ..config() }),
            ("min", LambdaConfig { min: bad, ..config() }),
            ("max", LambdaConfig { max: bad, ..config() }),
        ] {
            assert_says(LambdaBalancer::new(config), &["LambdaConfig::", field, &bad.to_string()]);
        }
    }
    assert_says(
        LambdaBalancer::new(LambdaConfig { min: 2., max: 1., ..config() }),
        &["max", "at least min, 2", "got 1"],
    );
    for momentum in [1., -0.1, f64::NAN] {
        let bad = LambdaBalancer::new(LambdaConfig { momentum, ..config() });
        assert_says(bad, &["LambdaConfig::momentum", "[0, 1)", &momentum.to_string()]);
    }
    Ok(())
}

#[test]
fn lambda_starts_and_resumes_within_its_bounds() -> Result<()> {
    let bounds = |initial| LambdaConfig { initial, min: 0.1, max: 10., ..config() };
    for (outside, inside) in [(50., 10.), (0.01, 0.1), (2., 2.)] {
        assert_eq!(LambdaBalancer::new(bounds(outside))?.lambda(), inside);
        let mut resumed = LambdaBalancer::resume(bounds(1.), outside)?;
        assert_eq!(resumed.lambda(), inside);
        assert_eq!(
            resumed.update(&ratio(1.)),
            LambdaBalancer::resume(bounds(1.), inside)?.update(&ratio(1.))
        );
    }
    Ok(())
}

#[test]
fn tied_weights_count_once() -> Result<()> {
    let (w, v) = (Var::new(&[3f64, 4.], CPU)?, Var::new(&[1f64, 2.], CPU)?);
    let inv = (w.sqr()?.sum_all()? + v.sqr()?.sum_all()?)?;
    let equiv = (w.sum_all()? + v.sum_all()?)?;
    let once = balance(&inv, &equiv, &[("in.w", &w), ("v", &v)], &["in"]);
    let tied = [("in.w", &w), ("in.copy", &w), ("v", &v), ("out.w", &w)];
    let twice = balance(&inv, &equiv, &tied, &["in", "out"]);
    assert_eq!((&twice.shared, &twice.overall), (&once.shared, &once.overall));
    assert_eq!(twice.groups[0], once.groups[0]);
    assert_eq!(twice.groups[1].norm_inv, once.groups[0].norm_inv);
    Ok(())
}

#[cfg(feature = "serde")]
#[test]
fn settings_survive_json() {
    let config = LambdaConfig { target_ratio: 0.3, ..config() };
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<LambdaConfig>(&text).unwrap(), config);
}
