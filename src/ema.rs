//! The momentum encoder: an exponential moving average of the weights of another encoder.

use std::sync::PoisonError;

use candle_core::DType;
use candle_nn::VarMap;

use crate::{Error, Result};

/// Moves each variable `t` of `target` towards the variable `o` of the same name in `online`: `t ← m·t + (1 − m)·o`.
///
/// `momentum` is `m`, within `[0, 1]`. With 0 the call copies, as before the first step. `online` may have variables that
/// `target` lacks, such as a predictor. The average is computed in f32, or in f64 for f64 variables. Source: MoCo
/// (arXiv 1911.05722).
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
/// use ser_reg::ema;
///
/// let (online, target) = (VarMap::new(), VarMap::new());
/// let one = online.get(2, "w", Init::Const(1.), DType::F32, &Device::Cpu)?;
/// let w = target.get(2, "w", Init::Const(9.), DType::F32, &Device::Cpu)?;
/// ema::update(&target, &online, 0.0)?; // a copy
/// assert_eq!(w.to_vec1::<f32>()?, one.to_vec1::<f32>()?);
/// ema::update(&target, &online, 0.99)?; // every step
/// # Ok::<(), ser_reg::Error>(())
/// ```
///
/// # Errors
/// If `momentum` is outside `[0, 1]`, `target` has no variable or is `online` itself, or a variable of `target` has no
/// counterpart of the same name, shape, type and device in `online`. Then no variable is changed.
pub fn update(target: &VarMap, online: &VarMap, momentum: f64) -> Result<()> {
    let op = "ema::update";
    if !(0.0..=1.0).contains(&momentum) {
        return Err(Error::config("momentum", "a value within [0, 1]", momentum));
    }
    if std::ptr::eq(target.data(), online.data()) {
        return Err(Error::input(op, "two maps of variables", "the same map twice"));
    }
    let targets = target.data().lock().unwrap_or_else(PoisonError::into_inner);
    let onlines = online.data().lock().unwrap_or_else(PoisonError::into_inner);
    if targets.is_empty() {
        return Err(Error::input(op, "a target with variables", "none"));
    }
    let mut names: Vec<&String> = targets.keys().collect();
    names.sort();
    let mut averages = Vec::with_capacity(names.len());
    for name in names {
        let t = targets[name].as_tensor();
        let Some(o) = onlines.get(name).map(|o| o.as_tensor()) else {
            let expected = format!("a variable `{name}` in the online map, as in the target");
            return Err(Error::input(op, expected, "none of this name"));
        };
        let same = t.dims() == o.dims() && t.dtype() == o.dtype();
        if !same || !t.device().same_device(o.device()) {
            let text = |x: &candle_core::Tensor| format!("{:?} of {:?}", x.dims(), x.dtype());
            let expected = format!("`{name}` alike in both maps, {} in the target", text(t));
            let got = format!("{} on {:?}", text(o), o.device().location());
            return Err(Error::input(op, expected, got));
        }
        let dtype = match t.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let (old, new) = (t.detach().to_dtype(dtype)?, o.detach().to_dtype(dtype)?);
        let average = match momentum {
            0.0 => new,
            m => ((old * m)? + (new * (1.0 - m))?)?,
        };
        averages.push((&targets[name], average.to_dtype(t.dtype())?));
    }
    for (var, average) in averages {
        var.set(&average)?;
    }
    Ok(())
}
