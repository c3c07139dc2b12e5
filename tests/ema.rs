//! The momentum encoder: values, and updates that are refused without any change.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use ser_reg::{Error, ema};

/// Variables of two values each.
fn vars(values: &[(&str, DType, [f64; 2])]) -> VarMap {
    let vars = VarMap::new();
    for &(name, dtype, value) in values {
        let value = Tensor::new(&value, &Device::Cpu).unwrap();
        let var = Var::from_tensor(&value.to_dtype(dtype).unwrap()).unwrap();
        vars.data().lock().unwrap().insert(name.to_string(), var);
    }
    vars
}

fn values(vars: &VarMap, name: &str) -> Vec<f64> {
    let var = vars.data().lock().unwrap()[name].clone();
    let var = var.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    var.to_vec1().unwrap()
}

#[test]
fn each_variable_moves_by_the_average() -> ser_reg::Result<()> {
    for (momentum, expected) in
        [(0.0, [3.0, -1.0]), (0.25, [2.5, 0.0]), (0.5, [2.0, 1.0]), (1.0, [1.0, 3.0])]
    {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let target = vars(&[("a.w", dtype, [1.0, 3.0])]);
            let online = vars(&[("a.w", dtype, [3.0, -1.0]), ("head", dtype, [7.0, 7.0])]);
            let var = target.data().lock().unwrap()["a.w"].clone();
            ema::update(&target, &online, momentum)?;
            assert_eq!(values(&target, "a.w"), expected, "{momentum}, {dtype:?}");
            // The layer that holds the variable sees the new value.
            let seen = var.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert_eq!(seen, expected);
            assert_eq!(var.dtype(), dtype);
            // The online encoder stays, and its other variables do not come over.
            assert_eq!(values(&online, "a.w"), [3.0, -1.0]);
            assert_eq!(target.all_vars().len(), 1);
        }
    }
    Ok(())
}

#[test]
fn half_precision_is_averaged_in_f32() -> ser_reg::Result<()> {
    // In bf16, 0.99 is 0.98828. The average would be 118.5.
    let target = vars(&[("w", DType::BF16, [120.0, 0.0])]);
    let online = vars(&[("w", DType::BF16, [0.0, 8.0])]);
    ema::update(&target, &online, 0.99)?;
    let w = values(&target, "w");
    assert_eq!(w[0], 119.0);
    assert!((w[1] - 0.08).abs() < 0.08 / 256.0, "{w:?}");
    Ok(())
}

#[test]
fn a_copy_takes_values_that_an_average_cannot() -> ser_reg::Result<()> {
    // At momentum 0 the old value, here a NaN, must not enter.
    let target = vars(&[("w", DType::F32, [f64::NAN, f64::INFINITY])]);
    let online = vars(&[("w", DType::F32, [1.0, 2.0])]);
    ema::update(&target, &online, 0.0)?;
    assert_eq!(values(&target, "w"), [1.0, 2.0]);
    Ok(())
}

#[test]
fn the_target_does_not_follow_later_changes_of_the_online_encoder() -> ser_reg::Result<()> {
    let target = vars(&[("w", DType::F32, [0.0, 0.0])]);
    let online = vars(&[("w", DType::F32, [1.0, 2.0])]);
    ema::update(&target, &online, 0.0)?;
    let var = online.data().lock().unwrap()["w"].clone();
    var.set(&Tensor::new(&[5f32, 5.], &Device::Cpu)?)?;
    assert_eq!(values(&target, "w"), [1.0, 2.0]);
    Ok(())
}

#[test]
fn what_does_not_match_is_refused_without_any_change() {
    let single = DType::F32;
    let a = ("a", single, [1.0, 2.0]);
    let b = ("b", single, [3.0, 4.0]);
    let wide = VarMap::new();
    let long = Var::zeros(3, single, &Device::Cpu).unwrap();
    let same = vars(&[("a", single, [9.0, 9.0])]).data().lock().unwrap()["a"].clone();
    wide.data().lock().unwrap().insert("a".to_string(), same);
    wide.data().lock().unwrap().insert("b".to_string(), long);
    for (online, momentum, parts) in [
        (vars(&[("a", single, [9.0, 9.0])]), 0.5, &["variable `b`", "none of this name"][..]),
        (vars(&[a, ("b", DType::F64, [9.0, 9.0])]), 0.5, &["`b` alike", "F32", "F64"]),
        (wide, 0.5, &["`b` alike", "[2]", "[3]"]),
        (VarMap::new(), 0.5, &["variable `a`", "none of this name"]),
        (vars(&[a, b]), -0.1, &["momentum", "[0, 1]", "-0.1"]),
        (vars(&[a, b]), 1.1, &["momentum", "[0, 1]", "1.1"]),
        (vars(&[a, b]), f64::NAN, &["momentum", "[0, 1]", "NaN"]),
    ] {
        let target = vars(&[a, b]);
        let error = ema::update(&target, &online, momentum).unwrap_err();
        for part in parts {
            assert!(error.to_string().contains(part), "{error} lacks {part:?}");
        }
        assert_eq!(values(&target, "a"), [1.0, 2.0]);
        assert_eq!(values(&target, "b"), [3.0, 4.0]);
    }
}

#[test]
fn one_map_twice_and_an_empty_target_are_refused() {
    let target = vars(&[("w", DType::F32, [1.0, 2.0])]);
    let error = ema::update(&target, &target, 0.5).unwrap_err();
    assert!(matches!(error, Error::Input { .. }));
    assert!(error.to_string().contains("the same map twice"), "{error}");
    // A clone of a map holds the same variables.
    let error = ema::update(&target.clone(), &target, 0.5).unwrap_err();
    assert!(error.to_string().contains("the same map twice"), "{error}");
    let error = ema::update(&VarMap::new(), &target, 0.5).unwrap_err();
    assert!(error.to_string().contains("a target with variables"));
}
