//! SER on a convolutional network: a map `(B, C, H, W)`, reached by a wrapper around one layer.
//!
//! The network learns to tell four textures apart while SER asks its middle map to turn with the image. Run with
//! `cargo run --release --example conv_net`; `-- --lambda 0` trains without.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{
    Activation, AdamW, Conv2dConfig, Linear, Module, Optimizer, Sequential, VarBuilder, VarMap,
    conv2d, linear, loss, seq,
};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    TokenGrid, grad,
    group::D4,
    metric::EqScore,
    projector::ProjectorConfig,
    ser::{SerConfig, SerLoss},
    tap::{self, Tapped},
    view::{ViewConfig, ViewSampler},
};

const SIDE: usize = 32;
const CLASSES: usize = 4;
const WIDTH: usize = 16;

#[derive(Parser)]
struct Args {
    /// Weight of the equivariance loss.
    #[arg(long, default_value_t = 1.)]
    lambda: f64,
    #[arg(long, default_value_t = 60)]
    steps: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

struct Net {
    trunk: Sequential,
    head: Linear,
}

impl Net {
    fn new(vb: VarBuilder) -> Result<Self> {
        let same = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let conv = |i: usize, o: usize, name: &str| conv2d(i, o, 3, same, vb.pp(name));
        let pool = |x: &Tensor| x.avg_pool2d(2);
        let trunk = seq()
            .add(conv(1, WIDTH, "conv1")?)
            .add(Activation::Silu)
            .add_fn(pool)
            .add(conv(WIDTH, WIDTH, "conv2")?)
            .add(Activation::Silu)
            .add(Tapped::new("stage2", pool)) // the map: 8x8 tokens of a 32x32 image
            .add(conv(WIDTH, WIDTH, "conv3")?)
            .add(Activation::Silu);
        let head = linear(WIDTH, CLASSES, vb.pp("head"))?;
        Ok(Self { trunk, head })
    }
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.trunk.forward(x)?.mean((2, 3))?;
        self.head.forward(&x)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = StdRng::seed_from_u64(args.seed);
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let net = Net::new(vb.pp("net"))?;
    let grid = TokenGrid::square(SIDE / 4)?;

    let config = SerConfig {
        lambda: args.lambda,
        projector: Some(ProjectorConfig {
            hidden: 64,
            out: 64,
            norm: true,
        }),
        ..Default::default()
    };
    let ser = SerLoss::new(config, WIDTH, vb.pp("ser"))?;
    let sampler = ViewSampler::new(grid, ViewConfig::default())?;
    seed_weights(&vars, &mut rng)?;
    let mut adam = AdamW::new_lr(vars.all_vars(), 3e-3)?;

    let (held_out, labels) = textures(64, &mut StdRng::seed_from_u64(99))?;
    let report = |when: &str| -> Result<()> {
        let map =
            |x: &Tensor| Ok::<_, candle_core::Error>(tap::capture("stage2", || net.forward(x))?.1);
        let shuffle = &mut StdRng::seed_from_u64(0);
        let score = EqScore::new(grid)
            .measure(&held_out, &D4::ALL[1..], shuffle, map)?
            .mean;
        let null = score.shuffled_positions.map_or(f64::NAN, |s| s.centered);
        let hits = net
            .forward(&held_out)?
            .argmax(1)?
            .eq(&labels)?
            .to_dtype(DType::F32)?;
        println!(
            "{when}: accuracy {:.2}, centered equivariance score {:.3} (positions shuffled: {null:.3})",
            hits.mean_all()?.to_scalar::<f32>()?,
            score.score.centered,
        );
        Ok(())
    };

    report("before")?;
    for step in 0..args.steps {
        let (x, y) = textures(16, &mut rng)?;
        let views = sampler.sample_pair(&mut rng, 16)?;
        let (x1, x2) = (views.first.apply(&x)?, views.second.apply(&x)?);
        let (logits, map1) = tap::capture("stage2", || net.forward(&x1))?;
        let (_, map2) = tap::capture("stage2", || net.forward(&x2))?;
        let out = ser.forward(&map1, &map2, &views.relative())?;
        if step == 0 && args.lambda > 0. {
            let before_the_tap = ["net.conv1", "net.conv2", "ser"];
            let vars = before_the_tap.iter().flat_map(|p| grad::named(&vars, p));
            grad::assert_reaches(&out.loss, vars)?;
        }
        let task = loss::cross_entropy(&logits, &y)?;
        adam.backward_step(&(&task + &out.loss)?)?;
        if step % 10 == 0 || step + 1 == args.steps {
            let (task, ser) = (
                task.to_scalar::<f32>()?,
                out.equivariance.to_scalar::<f32>()?,
            );
            println!("step {step:3}  cross-entropy {task:.3}  equivariance loss {ser:.3}");
        }
    }
    report("after")
}

/// Gratings of four frequencies, of any direction and phase, with noise: `(B, 1, 32, 32)` and labels.
fn textures(batch: usize, rng: &mut StdRng) -> Result<(Tensor, Tensor)> {
    let mut pixels = Vec::with_capacity(batch * SIDE * SIDE);
    let mut labels = Vec::with_capacity(batch);
    for _ in 0..batch {
        let class = rng.random_range(0..CLASSES as u32);
        let (angle, phase): (f32, f32) = (rng.random_range(0. ..6.3), rng.random_range(0. ..6.3));
        let frequency = 0.3 + 0.3 * class as f32;
        labels.push(class);
        for i in 0..SIDE * SIDE {
            let (y, x) = ((i / SIDE) as f32, (i % SIDE) as f32);
            let wave = (frequency * (y * angle.sin() + x * angle.cos()) + phase).sin();
            // A shade across the image, so that a position can be told from its mirror image.
            pixels.push(wave + x / SIDE as f32 + rng.random_range(-0.3..0.3));
        }
    }
    let images = Tensor::from_vec(pixels, (batch, 1, SIDE, SIDE), &Device::Cpu)?;
    Ok((images, Tensor::from_vec(labels, batch, &Device::Cpu)?))
}

/// candle's CPU generator cannot be seeded, so the start is drawn here: same seed, same run.
fn seed_weights(vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    for (name, var) in grad::named(vars, "") {
        if var.rank() > 1 {
            let bound = (3. * var.dims()[0] as f32 / var.elem_count() as f32).sqrt();
            let values = (0..var.elem_count()).map(|_| rng.random_range(-bound..bound));
            var.set(&Tensor::from_vec(
                values.collect::<Vec<f32>>(),
                var.shape(),
                &Device::Cpu,
            )?)?;
        } else if name.ends_with("bias") {
            var.set(&var.zeros_like()?)?;
        }
    }
    Ok(())
}
