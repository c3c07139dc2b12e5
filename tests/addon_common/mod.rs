//! The add-ons in plain candle operations on named weights.
#![allow(dead_code)]

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarMap;
use rand::{Rng, rngs::StdRng};
use ser_reg::contrib::{AugmentationParameters, CropParameters, JitterParameters};

pub type Weights = HashMap<String, Tensor>;

/// The variables of a map as tensors with gradients.
pub fn weights(vars: &VarMap) -> Weights {
    let data = vars.data().lock().expect("no test panics while it holds the map");
    let tensor =
        |(name, var): (&String, &candle_core::Var)| (name.clone(), var.as_tensor().clone());
    data.iter().map(tensor).collect()
}

/// Random parameters of one view.
pub fn drawn(rng: &mut StdRng) -> AugmentationParameters {
    let mut order = [0, 1, 2, 3];
    rand::seq::SliceRandom::shuffle(&mut order[..], rng);
    let (height, width) = (rng.random_range(0.3..0.6), rng.random_range(0.3..0.6));
    let mut factor = || rng.random_range(0.6..1.4);
    let (brightness, contrast, saturation) = (factor(), factor(), factor());
    AugmentationParameters {
        crop: Some(CropParameters {
            top: rng.random_range(0.0..0.4),
            left: rng.random_range(0.0..0.4),
            height,
            width,
        }),
        flip: Some(rng.random()),
        jitter: Some(JitterParameters {
            applied: true,
            order,
            brightness,
            contrast,
            saturation,
            hue: rng.random_range(-0.1..0.1),
        }),
        grayscale: Some(rng.random()),
        blur: Some(if rng.random() { rng.random_range(0.1..2.0) } else { 0.0 }),
        solarize: Some(if rng.random() { 0.5 } else { 1.0 }),
        rotation: Some(rng.random_range(0..4)),
    }
}

/// The mean over the normalized tokens after the first `prefix`.
pub fn pooled(w: &Weights, x: &Tensor, prefix: usize) -> Result<Tensor> {
    let x = x.narrow(1, prefix, x.dim(1)? - prefix)?;
    layer_norm(w, "norm", &x)?.mean(1)
}

pub fn layer_norm(w: &Weights, name: &str, x: &Tensor) -> Result<Tensor> {
    let mean = x.mean_keepdim(D::Minus1)?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_sub(&mean)?
        .broadcast_div(&(variance + 1e-6)?.sqrt()?)?
        .broadcast_mul(&w[&format!("{name}.weight")])?
        .broadcast_add(&w[&format!("{name}.bias")])
}

/// Batch normalization, with scale and shift if there are weights of that name.
pub fn batch_norm(w: &Weights, name: &str, x: &Tensor) -> Result<Tensor> {
    let mean = x.mean_keepdim(0)?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean_keepdim(0)?;
    let x = x.broadcast_sub(&mean)?.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
    match w.get(&format!("{name}.weight")) {
        Some(weight) => x.broadcast_mul(weight)?.broadcast_add(&w[&format!("{name}.bias")]),
        None => Ok(x),
    }
}

pub fn linear(w: &Weights, name: &str, x: &Tensor) -> Result<Tensor> {
    let x = x.matmul(&w[&format!("{name}.weight")].t()?)?;
    match w.get(&format!("{name}.bias")) {
        Some(bias) => x.broadcast_add(bias),
        None => Ok(x),
    }
}

/// `maps` linear maps with batch normalization and ReLU between them.
pub fn mlp(w: &Weights, name: &str, maps: usize, x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for i in 1..=maps {
        x = linear(w, &format!("{name}.layer{i}"), &x)?;
        if i < maps {
            x = batch_norm(w, &format!("{name}.layer{i}.norm"), &x)?.relu()?;
        }
    }
    Ok(x)
}

pub fn unit(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(1)? + 1e-6)?.sqrt()?)
}

/// Each row of `a` and `b` must find its partner among all other rows of both.
pub fn nt_xent(a: &Tensor, b: &Tensor, temperature: f64) -> Result<Tensor> {
    let n = a.dim(0)?;
    let z = unit(&Tensor::cat(&[a, b], 0)?)?;
    let own: Vec<f64> =
        (0..4 * n * n).map(|at| if at % (2 * n + 1) == 0 { -1e9 } else { 0.0 }).collect();
    let own = Tensor::from_vec(own, (2 * n, 2 * n), &Device::Cpu)?.to_dtype(a.dtype())?;
    let logits = ((z.matmul(&z.t()?)? / temperature)? + own)?;
    let partners: Vec<u32> = (0..2 * n).map(|i| ((i + n) % (2 * n)) as u32).collect();
    cross_entropy(&logits, &partners)
}

pub fn cross_entropy(logits: &Tensor, classes: &[u32]) -> Result<Tensor> {
    let at = Tensor::new(classes, &Device::Cpu)?.unsqueeze(1)?;
    let own = logits.gather(&at, 1)?.squeeze(1)?;
    (logits.log_sum_exp(1)? - own)?.mean_all()
}

/// EquiMod on features. `views` are the unaugmented image, view 1 and view 2; `numbers` are the
/// parameter vectors of views 1 and 2.
pub fn equi_mod(
    w: &Weights,
    views: [&Tensor; 3],
    numbers: &[Vec<f64>],
    tau: f64,
) -> Result<Tensor> {
    let [_, seen, predicted] = equi_mod_embeddings(w, views, numbers)?;
    nt_xent(&seen, &predicted, tau)
}

/// The embeddings of the unaugmented images, of the views, and the predictions, for both views.
pub fn equi_mod_embeddings(
    w: &Weights,
    views: [&Tensor; 3],
    numbers: &[Vec<f64>],
) -> Result<[Tensor; 3]> {
    let b = views[0].dim(0)?;
    let y = mlp(w, "project", 3, &Tensor::cat(&views, 0)?)?;
    let y = batch_norm(w, "project.none", &y)?;
    let y0 = y.narrow(0, 0, b)?;
    let origin = Tensor::cat(&[&y0, &y0], 0)?;
    let p = Tensor::new(numbers.to_vec(), &Device::Cpu)?.to_dtype(y.dtype())?;
    let phi = batch_norm(w, "describe.norm", &linear(w, "describe", &p)?)?;
    let input = Tensor::cat(&[&origin, &phi], 1)?;
    let predicted = batch_norm(w, "predict.none", &linear(w, "predict", &input)?)?;
    Ok([origin, y.narrow(0, b, 2 * b)?, predicted])
}

/// The differences of views 1 and 2: crop, color, blur, threshold.
pub fn differences(
    a: &AugmentationParameters,
    b: &AugmentationParameters,
    widths: [f64; 4],
) -> [Vec<f64>; 4] {
    let center = |p: &AugmentationParameters| {
        let crop = p.crop.unwrap();
        let x = f64::from(crop.left) + f64::from(crop.width) / 2.0;
        let x = if a.flip.unwrap() { 1.0 - x } else { x };
        let y = f64::from(crop.top) + f64::from(crop.height) / 2.0;
        [y, x, f64::from(crop.height), f64::from(crop.width)]
    };
    let colors = |p: &AugmentationParameters| {
        let j = p.jitter.unwrap();
        let all = [j.brightness, j.contrast, j.saturation, j.hue];
        [0, 1, 2, 3].map(|k| f64::from(all[k]) / widths[k])
    };
    let minus = |x: [f64; 4], y: [f64; 4]| (0..4).map(|k| x[k] - y[k]).collect::<Vec<_>>();
    [
        minus(center(a), center(b)),
        minus(colors(a), colors(b)),
        vec![f64::from(a.blur.unwrap()) - f64::from(b.blur.unwrap())],
        vec![f64::from(a.solarize.unwrap()) - f64::from(b.solarize.unwrap())],
    ]
}

/// AugSelf on features. `weigh` has the weights of crop, color, blur, solarize, flip and rotation.
pub fn aug_self(
    w: &Weights,
    [h1, h2]: [&Tensor; 2],
    [p1, p2]: [&[AugmentationParameters]; 2],
    widths: [f64; 4],
    weigh: [f64; 6],
) -> Result<Tensor> {
    let input = Tensor::cat(&[Tensor::cat(&[h1, h2], 1)?, Tensor::cat(&[h2, h1], 1)?], 0)?;
    let pairs: Vec<_> = p1.iter().zip(p2).chain(p2.iter().zip(p1)).collect();
    let mut total = Tensor::zeros((), h1.dtype(), &Device::Cpu)?;
    for (k, name) in ["crop", "color", "blur", "solarize"].iter().enumerate() {
        if weigh[k] > 0.0 {
            let d = pairs.iter().map(|(a, b)| differences(a, b, widths)[k].clone());
            let d = Tensor::new(d.collect::<Vec<_>>(), &Device::Cpu)?.to_dtype(h1.dtype())?;
            let error = (mlp(w, name, 3, &input)?.tanh()? - d)?.sqr()?.mean_all()?;
            total = (total + error * weigh[k])?;
        }
    }
    if weigh[4] > 0.0 {
        // −log σ(x) where the flips agree, −log σ(−x) where not.
        let sign = pairs.iter().map(|(a, b)| if a.flip == b.flip { 1.0 } else { -1.0 });
        let sign = Tensor::from_vec(sign.collect::<Vec<f64>>(), (pairs.len(), 1), &Device::Cpu)?;
        let x = (mlp(w, "flip", 3, &input)? * sign.to_dtype(h1.dtype())?)?;
        let loss = ((x.neg()?.exp()? + 1.0)?.log()?.mean_all()? * weigh[4])?;
        total = (total + loss)?;
    }
    if weigh[5] > 0.0 {
        let turn = |(a, b): &(&AugmentationParameters, &AugmentationParameters)| {
            (4 + a.rotation.unwrap() - b.rotation.unwrap()) % 4
        };
        let turns: Vec<u32> = pairs.iter().map(turn).collect();
        let loss = cross_entropy(&mlp(w, "rotation", 3, &input)?, &turns)?;
        total = (total + loss * weigh[5])?;
    }
    Ok(total)
}

/// E-SSL on features.
pub fn essl(w: &Weights, h: &Tensor, turns: &[u32]) -> Result<Tensor> {
    let mut x = h.clone();
    for layer in ["head.layer1", "head.layer2", "head.layer3"] {
        x = layer_norm(w, &format!("{layer}.norm"), &linear(w, layer, &x)?)?;
        if layer != "head.layer3" {
            x = x.relu()?;
        }
    }
    cross_entropy(&linear(w, "head.layer4", &x)?, turns)
}

/// The three terms of STL on features, image by image.
pub fn stl(w: &Weights, [h1, h2]: [&Tensor; 2], tau: f64) -> Result<[Tensor; 3]> {
    let (b, d) = h1.dims2()?;
    let t12 = mlp(w, "transformation", 2, &Tensor::cat(&[h1, h2], 1)?)?;
    let t21 = mlp(w, "transformation", 2, &Tensor::cat(&[h2, h1], 1)?)?;
    let transform = |t: &Tensor, h: &Tensor| -> Result<Tensor> {
        let mut rows = Vec::new();
        for i in 0..b {
            let partner = if i % 2 == 0 { i + 1 } else { i - 1 };
            let map =
                w["hypernetwork.weight"].matmul(&t.get(partner)?.unsqueeze(1)?)?.reshape((d, d))?;
            rows.push(map.matmul(&h.get(i)?.unsqueeze(1)?)?.squeeze(1)?);
        }
        Tensor::stack(&rows, 0)
    };
    let rows = |t: &Tensor, member: usize| -> Result<Vec<Tensor>> {
        (0..b / 2).map(|i| t.get(2 * i + member)).collect()
    };
    let both = |member: usize| -> Result<Tensor> {
        let all = [rows(&t12, member)?, rows(&t21, member)?].concat();
        mlp(w, "projected", 2, &Tensor::stack(&all, 0)?)
    };
    let project = |name: &str, h: &Tensor| mlp(w, name, 2, h);
    let moved = [transform(&t21, h2)?, transform(&t12, h1)?];
    let seen = [project("equivariant", h1)?, project("equivariant", h2)?];
    let predicted = [project("equivariant", &moved[0])?, project("equivariant", &moved[1])?];
    Ok([
        nt_xent(&project("invariant", h1)?, &project("invariant", h2)?, tau)?,
        nt_xent(&Tensor::cat(&seen, 0)?, &Tensor::cat(&predicted, 0)?, tau)?,
        nt_xent(&both(0)?, &both(1)?, tau)?,
    ])
}

/// CARE on features: the sum over the pairs of chunks of `n`.
pub fn care(h1: &Tensor, h2: &Tensor, n: usize) -> Result<Tensor> {
    let (z1, z2) = (unit(h1)?, unit(h2)?);
    let mut sum = Tensor::zeros((), h1.dtype(), &Device::Cpu)?;
    for i in 0..h1.dim(0)? {
        for j in (0..h1.dim(0)?).filter(|&j| j != i && j / n == i / n) {
            let product = |z: &Tensor| -> Result<Tensor> { (z.get(i)? * z.get(j)?)?.sum_all() };
            sum = (sum + (product(&z1)? - product(&z2)?)?.sqr()?)?;
        }
    }
    Ok(sum)
}

/// Random features, f32 or f64.
pub fn features(rng: &mut StdRng, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0));
    Tensor::from_vec(values.collect::<Vec<f64>>(), shape, &Device::Cpu)?.to_dtype(dtype)
}
