//! Golden cases of the token objectives, of the base losses, and of schedules.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};
use ser_reg::{
    loss::{self, Contrastive, Negatives, SameImage},
    schedule::Schedule,
};

use ser_reg_trainers::method::{
    barlow, dino, moco,
    objectives::{self, VicReg},
};

use crate::runner::{Case, close};

/// Loss and gradient tolerances by type, as the format's README suggests.
const TOLERANCES: [(DType, f64, f64); 2] = [(DType::F64, 1e-10, 1e-9), (DType::F32, 1e-5, 1e-4)];

/// The tolerance of values of the type of `x`.
fn loss_tolerance(x: &Tensor) -> f64 {
    let known = TOLERANCES.iter().find(|t| t.0 == x.dtype());
    // A type without a tolerance matches nothing.
    known.map_or(0.0, |t| t.1)
}

/// The reference has no eps; this one is below rounding and keeps zero tokens finite.
const EPS: f64 = 1e-30;

/// Checks `f` of the named inputs against `loss` and the gradients `grad_*` of all of them that the case has.
fn check_loss(
    case: &Case,
    names: &[&str],
    f: impl Fn(&HashMap<&str, Var>) -> Result<Tensor>,
) -> Result<()> {
    for (dtype, loss_tolerance, grad_tolerance) in TOLERANCES {
        let vars = names
            .iter()
            .map(|&n| Ok((n, Var::from_tensor(&case.input(n)?.to_dtype(dtype)?)?)))
            .collect::<Result<HashMap<_, _>>>()?;
        let loss = f(&vars)?;
        ensure!(loss.dtype() == dtype, "the loss is {:?}", loss.dtype());
        close(case.output("loss")?, &loss, loss_tolerance)
            .with_context(|| format!("loss, {dtype:?}"))?;
        let grads = loss.backward()?;
        let mut checked = 0;
        for (name, var) in &vars {
            let grad = format!("grad_{name}");
            match (case.output(&grad).ok(), grads.get(var)) {
                (Some(want), Some(got)) => {
                    close(want, got, grad_tolerance)
                        .with_context(|| format!("{grad}, {dtype:?}"))?;
                    checked += 1;
                }
                (Some(_), None) => bail!("{name} gets no gradient"),
                (None, Some(_)) => bail!("{name} must get no gradient"),
                (None, None) => {}
            }
        }
        ensure!(checked > 0, "no gradient to check");
    }
    Ok(())
}

fn contrastive(case: &Case, variant: &str) -> Result<Contrastive> {
    let (negatives, same_image) = match variant {
        "paper" => (Negatives::BothViews, SameImage::Exclude),
        "cross" => (Negatives::OtherView, SameImage::Exclude),
        "cross_all" => (Negatives::OtherView, SameImage::Keep),
        "ntxent_all" => (Negatives::BothViews, SameImage::Keep),
        other => bail!("unknown variant {other}"),
    };
    Ok(Contrastive {
        temperature: case.float("tau")?,
        negatives,
        same_image,
        eps: EPS,
        ..Contrastive::default()
    })
}

pub fn token_losses(case: &Case) -> Result<()> {
    let pair = |f: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
        check_loss(case, &["z", "zp"], |v| f(v["z"].as_tensor(), v["zp"].as_tensor()))
    };
    match case.op.as_str() {
        "token_ntxent" => {
            let config = contrastive(case, case.text("variant")?)?;
            let nt_xent = match case.flag("symmetric") {
                true => loss::nt_xent_symmetric,
                false => loss::nt_xent,
            };
            pair(&|z, zp| Ok(nt_xent(z, zp, &config)?.loss))?;
        }
        "token_ntxent_ragged" => {
            let config = contrastive(case, case.text("variant")?)?;
            let ids: Vec<u32> = case.indices("image_ids")?.iter().map(|&i| i as u32).collect();
            let one = |z: &Tensor, zp: &Tensor| -> Result<Tensor> {
                Ok(loss::nt_xent_ragged(z, zp, &ids, None, &config)?.loss)
            };
            match case.flag("symmetric") {
                true => pair(&|z, zp| Ok(((one(z, zp)? + one(zp, z)?)? * 0.5)?))?,
                false => pair(&one)?,
            }
        }
        "official_moco_dino" => {
            let config = contrastive(case, "cross")?;
            check_loss(case, &["q0", "k1_aligned", "q1", "k0_aligned"], |v| {
                let cross =
                    |q, k| Ok::<_, anyhow::Error>(loss::nt_xent(&v[q], &v[k], &config)?.loss);
                Ok(((cross("q1", "k0_aligned")? + cross("q0", "k1_aligned")?)? * 0.5)?)
            })?;
        }
        "token_mse" => pair(&|z, zp| Ok(loss::mse(z, zp, None)?))?,
        "token_mse_normalized" => pair(&|z, zp| Ok(loss::normalized_mse(z, zp, EPS, None)?))?,
        "token_cosine" => pair(&|z, zp| Ok(loss::cosine(z, zp, EPS, None)?))?,
        "token_l1" => pair(&|z, zp| Ok(loss::l1(z, zp, None)?))?,
        "token_smooth_l1" => {
            let beta = case.float("beta")?;
            pair(&|z, zp| Ok(loss::smooth_l1(z, zp, beta, None)?))?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

pub fn ssl_losses(case: &Case) -> Result<()> {
    match case.op.as_str() {
        "moco_v3" => {
            let tau = case.float("tau")?;
            check_loss(case, &["q1", "q2", "k1", "k2"], |v| {
                let term = |q, k| moco::contrast(&v[q], &v[k].detach(), 0, tau);
                Ok((term("q1", "k2")? + term("q2", "k1")?)?)
            })?;
        }
        "moco_v3_single_gathered" => {
            let (tau, offset) = (case.float("tau")?, case.int("label_offset")? as usize);
            check_loss(case, &["q", "k_all"], |v| {
                Ok(moco::contrast(&v["q"], &v["k_all"].detach(), offset, tau)?)
            })?;
        }
        "dino" => self::dino(case)?,
        "barlow_twins" => {
            let lambda = case.float("lambda")?;
            ensure!(case.float("bn_eps")? == 1e-5, "another eps");
            check_loss(case, &["z1", "z2"], |v| {
                let c = barlow::cross_correlation(&v["z1"], &v["z2"])?;
                close(case.output("c")?, &c, loss_tolerance(&c))?;
                // The factor as the trainer passes it.
                Ok((barlow::loss(&v["z1"], &v["z2"], lambda, 0.25)? * 4.0)?)
            })?;
        }
        "vicreg" => {
            let config = VicReg {
                invariance: case.float("sim")?,
                variance: case.float("std")?,
                covariance: case.float("cov")?,
                deviation: case.float("gamma")?,
                eps: case.float("eps")?,
            };
            check_loss(case, &["x", "y"], |v| {
                let terms = config.forward(&v["x"], &v["y"])?;
                for (name, term) in [
                    ("inv", &terms.invariance),
                    ("var", &terms.variance),
                    ("cov", &terms.covariance),
                ] {
                    case.check(name, term, loss_tolerance(term))?;
                }
                Ok(terms.loss)
            })?;
        }
        "simsiam" => predicted(case, objectives::simsiam)?,
        "byol" => predicted(case, objectives::byol)?,
        "simclr" => {
            let tau = case.float("tau")?;
            check_loss(case, &["z1", "z2"], |v| Ok(objectives::simclr(&v["z1"], &v["z2"], tau)?))?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

/// Losses of two predictions and of two embeddings that get no gradient.
fn predicted(
    case: &Case,
    loss: fn([&Tensor; 2], [&Tensor; 2]) -> candle_core::Result<Tensor>,
) -> Result<()> {
    check_loss(case, &["p1", "p2", "z1", "z2"], |v| {
        Ok(loss([&v["p1"], &v["p2"]], [&v["z1"], &v["z2"]])?)
    })
}

fn dino(case: &Case) -> Result<()> {
    let momentum = case.float("center_momentum")?;
    let (student_temperature, teacher_temperature) =
        (case.float("student_temp")?, case.float("teacher_temp")?);
    let crops = case.int("ncrops")? as usize;
    check_loss(case, &["student", "teacher", "center"], |v| {
        let (scores, center) = (&v["teacher"], &v["center"]);
        let updated = dino::updated_center(center, scores, momentum)?;
        case.check("center_new", &updated, loss_tolerance(&updated))?;
        let targets = dino::targets(scores, center, teacher_temperature)?;
        Ok(dino::loss(&v["student"].chunk(crops, 0)?, &targets.chunk(2, 0)?, student_temperature)?)
    })
}

pub fn schedules(case: &Case) -> Result<()> {
    let steps_per_epoch = case.int("iters_per_epoch")? as usize;
    let steps =
        |epochs: &str| -> Result<usize> { Ok(case.int(epochs)? as usize * steps_per_epoch) };
    let schedule = match case.op.as_str() {
        "moco_lr" => {
            let warm_up = steps("warmup")?;
            Schedule::cosine(case.float("peak")?, 0.0, steps("epochs")? - warm_up)?.warm_up(warm_up)
        }
        "moco_momentum" => Schedule::cosine(case.float("base")?, 1.0, steps("epochs")?)?,
        "dino_lr" | "dino_wd" | "dino_momentum" => {
            let warm_up = steps("warmup")?;
            let (from, to) = (case.float("base")?, case.float("final")?);
            Schedule::cosine(from, to, steps("epochs")? - warm_up)?.warm_up_inclusive(warm_up)
        }
        "barlow_lr" => {
            let warm_up = steps("warmup")?;
            let peak = case.float("weights_lr")? * case.float("batch")? / 256.0;
            Schedule::cosine(peak, 0.001 * peak, steps("epochs")? - warm_up)?.warm_up(warm_up)
        }
        op => bail!("unknown schedule {op}"),
    };
    let rows: Vec<(usize, f64)> = serde_json::from_value(case.params["rows"].clone())?;
    ensure!(!rows.is_empty(), "no rows");
    for (step, want) in rows {
        let got = schedule.at(step);
        ensure!((got - want).abs() <= 1e-12 * (1.0 + want.abs()), "step {step}: {got}, not {want}");
    }
    Ok(())
}
