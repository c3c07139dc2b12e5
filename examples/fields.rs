//! Channels that turn with the grid: a group convolution made by hand, compared under the trivial and under the regular
//! representation of its channels. Run with `cargo run --release --example fields`.
//!
//! A lifting convolution sees the image through one kernel in every pose of the group, one channel per pose. Turn the
//! image, and each channel's map turns and moves on to another channel. Under the regular representation, which permutes
//! the channels so, the layer is equivariant and costs nothing; to the trivial one, which leaves channels where they are,
//! it looks like any layer.

#[macro_use]
mod console;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    GridOperator, MapPair, Resample, TokenGrid,
    group::{FieldType, Subgroup},
    metric::EqScore,
    ser::{Objective, SerConfig, SerLoss},
    view::{Pairing, ViewConfig, ViewSampler},
};

const SIDE: usize = 16;
const KERNELS: usize = 4;

/// The kernels `(out, C, 3, 3)` in every pose: `(out·order, C, 3, 3)`, the poses varying fastest.
fn poses(group: Subgroup, kernels: &Tensor) -> Result<Tensor> {
    let side = TokenGrid::square(3)?;
    let pose = |h| GridOperator::new(&[h], side, &Resample::default())?.apply(kernels);
    let poses = group.elements().iter().map(|h| pose(*h));
    let poses = poses.collect::<ser_reg::Result<Vec<_>>>()?;
    Ok(Tensor::stack(&poses, 1)?.flatten(0, 1)?)
}

fn random(rng: &mut StdRng, shape: &[usize]) -> Result<Tensor> {
    let values = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.));
    Ok(Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu)?)
}

fn main() -> Result<()> {
    let extra = std::env::args_os().nth(1);
    ensure!(extra.is_none(), "expected no arguments, got {extra:?}");
    let rng = &mut StdRng::seed_from_u64(0);
    let images = random(rng, &[16, 3, SIDE, SIDE])?;
    let kernels = random(rng, &[KERNELS, 3, 3, 3])?;
    let grid = TokenGrid::square(SIDE)?;

    println!("mean squared error and centered equivariance score of a lifting convolution");
    println!("group  representation of the channels  loss       score");
    for group in [Subgroup::C2, Subgroup::C4, Subgroup::D4] {
        let kernels = poses(group, &kernels)?;
        let layer = |x: &Tensor| x.conv2d(&kernels, 1, 1, 1, 1)?.relu();

        // Turns and flips of the group; no scales, which no finite grid shows exactly.
        let config = ViewConfig {
            pairing: Pairing::Independent(group),
            area: (1., 1.),
            aspect: (1., 1.),
            ..Default::default()
        };
        let views = ViewSampler::new(grid, config)?.sample_pair(rng, 16)?;
        let map1 = layer(&views.first.apply(&images)?)?;
        let map2 = layer(&views.second.apply(&images)?)?;

        let channels = KERNELS * group.order();
        let mut losses = Vec::new();
        for (name, field) in [
            ("trivial", FieldType::trivial(channels)),
            ("regular", FieldType::regular(group, channels)?),
        ] {
            let score = EqScore { field: Some(field.clone()), ..EqScore::new(grid) };
            let others = &group.elements()[1..]; // all but the identity
            let score = score.measure(&images, others, rng, layer)?.mean.score.centered;
            let config = SerConfig { objective: Objective::Mse, ..Default::default() };
            let relative = views.relative();
            let pair = MapPair::new([&map1, &map2], &relative).field(&field);
            let loss = SerLoss::new(config)?.forward(&pair)?.loss;
            let loss = loss.to_scalar::<f32>()?;
            println!("{:<6} {name:<31} {loss:<10.2e} {score:.4}", format!("{group:?}"));
            losses.push(loss);
        }
        ensure!(losses[1] < 1e-10 && losses[0] > 0.1, "not as it should be");
    }
    Ok(())
}
