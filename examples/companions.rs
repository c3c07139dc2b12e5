//! The companions of `docs/companions.md` on one small network.
//!
//! `cargo run --release --features contrib --example companions` takes a few seconds. A patch
//! embedding learns to classify gratings of four frequencies. It trains on nearly upright gratings;
//! the test also rotates them. The Reynolds penalty asks the filters to be rotated copies of each
//! other, without data. The balance of gradients sets its weight. The other companions measure the
//! two trained networks.

#[macro_use]
mod console;

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    AdamW, Conv2d, Conv2dConfig, Linear, Module, Optimizer, VarBuilder, VarMap, conv2d_no_bias,
    linear, loss,
};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    GridOperator, Resample, TokenGrid,
    contrib::{
        Distance, EqSim, InvariantIntegration, Monomial, OrbitPool, Pool, RegularRep,
        ReynoldsPenalty, WeightSpace, mean_pairwise_symmetric_kl,
    },
    grad::{self, GradientBalance, LambdaBalancer, LambdaConfig},
    group::{D4, Representation, Subgroup},
};

const SIDE: usize = 24;
const PATCH: usize = 8;
const CLASSES: usize = 4;
const BLOCKS: usize = 6;
const GROUP: Subgroup = Subgroup::D4;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Norm of the penalty's gradient divided by the norm of the cross-entropy's gradient.
    #[arg(long, default_value_t = 0.5)]
    target_ratio: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A patch embedding with blocks of |G| channels and ReLU. The mean over tokens and over each block
/// goes to a linear map.
struct Net {
    embed: Conv2d,
    head: Linear,
}

impl Net {
    fn new(vb: VarBuilder) -> Result<Self> {
        let patch = Conv2dConfig { stride: PATCH, ..Default::default() };
        let channels = BLOCKS * GROUP.order();
        Ok(Self {
            embed: conv2d_no_bias(1, channels, PATCH, patch, vb.pp("embed"))?,
            head: linear(BLOCKS, CLASSES, vb.pp("head"))?,
        })
    }

    /// `(B, C, H, W)`.
    fn map(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.embed.forward(x)?.relu()
    }

    /// `(B, D)`, with the regular representation on its channels if the kernel has it on its
    /// output.
    fn embedding(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.map(x)?.mean((2, 3))
    }

    fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let z = self.embedding(x)?;
        let blocks = z.reshape((z.dim(0)?, BLOCKS, GROUP.order()))?;
        self.head.forward(&blocks.mean(D::Minus1)?)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.target_ratio > 0.0 && args.target_ratio.is_finite(),
        "--target-ratio: expected a finite number above 0, got {}",
        args.target_ratio
    );
    println!("== training, without the Reynolds penalty and with it");
    let (plain, _) = train(&args, false)?;
    let (soft, penalty) = train(&args, true)?;

    let (upright, labels) = gratings(400, &mut StdRng::seed_from_u64(99))?;
    let turned = turn(D4::ROT90, &upright)?;
    println!("\n== results                    plain    with penalty");
    let both = |what: &str, f: &dyn Fn(&Net) -> Result<f64>| -> Result<()> {
        println!("{what:28}  {:>7.4}  {:>7.4}", f(&plain)?, f(&soft)?);
        Ok(())
    };
    let accuracy = |logits: Tensor| -> Result<f64> {
        let hits = logits.argmax(1)?.eq(&labels)?.to_dtype(DType::F64)?;
        Ok(hits.mean_all()?.to_scalar()?)
    };
    both("asymmetric part of kernel", &|net| number(&penalty.forward(net.embed.weight())?))?;
    both("accuracy, upright", &|net| accuracy(net.logits(&upright)?))?;
    both("accuracy, a quarter turn", &|net| accuracy(net.logits(&turned)?))?;
    // The mean over the orbit of the image is exactly invariant, for eight forward passes.
    let orbit = OrbitPool::new(GROUP, Pool::Mean);
    both("  the same, orbit averaged", &|net| accuracy(orbit.images(&turned, |x| net.logits(x))?))?;
    both("KL of predictions over turns", &|net| {
        let views = [D4::IDENTITY, D4::ROT90, D4::ROT180, D4::ROT270];
        let views = views.map(|g| Ok(net.logits(&turn(g, &upright)?)?));
        let views = views.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(mean_pairwise_symmetric_kl(&Tensor::stack(&views, 0)?)?)
    })?;
    // The loss is 0 if a quarter turn of the image permutes the channels of each block.
    let rep = RegularRep::new(GROUP);
    both("regular representation, 1−cos", &|net| {
        let (z1, z2) = (net.embedding(&upright)?, net.embedding(&turned)?);
        let loss = rep.loss(&[D4::ROT90], &z1, &z2, Distance::Cosine { eps: 1e-6 })?;
        number(&loss)
    })?;
    both("  the same, one element off", &|net| {
        let (z1, z2) = (net.embedding(&upright)?, net.embedding(&turned)?);
        let loss = rep.loss(&[D4::HFLIP], &z1, &z2, Distance::Cosine { eps: 1e-6 })?;
        number(&loss)
    })?;
    // Scores of 32 images and their rotated copies.
    both("EqSim of upright × turned", &|net| {
        let unit = |x: &Tensor| -> Result<Tensor> {
            let z = net.embedding(&x.narrow(0, 0, 32)?)?;
            Ok(z.broadcast_div(&(z.sqr()?.sum_keepdim(1)? + 1e-6)?.sqrt()?)?)
        };
        let scores = unit(&upright)?.matmul(&rep.apply(&[D4::ROT270], &unit(&turned)?)?.t()?)?;
        number(&EqSim::default().forward(&scores)?.loss)
    })?;

    println!("\n== invariant integration: three maps of two bright tokens out of four");
    let monomials = vec![Monomial::power(1), Monomial::product([0, 1])];
    let integration = InvariantIntegration::new(GROUP, monomials)?;
    for (name, map) in [
        ("beside each other", [1f32, 1., 0., 0.]),
        ("above each other ", [1., 0., 1., 0.]),
        ("across           ", [1., 0., 0., 1.]),
    ] {
        let map = Tensor::from_slice(&map, (1, 4, 1), &Device::Cpu)?;
        let invariants = integration.forward(&map, TokenGrid::square(2)?)?;
        let invariants = invariants.flatten_all()?.to_vec1::<f32>()?;
        println!("{name}  mean {:.2}  neighbors {:.2}", invariants[0], invariants[1]);
    }
    Ok(())
}

/// Trains on upright gratings. The weight of the penalty follows the balance of gradients.
fn train(args: &Args, penalized: bool) -> Result<(Net, ReynoldsPenalty)> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let vars = VarMap::new();
    let net = Net::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    seed_weights(&vars, &mut rng)?;
    let penalty = ReynoldsPenalty {
        group: GROUP,
        space: WeightSpace::Kernel {
            output: Representation::Regular(GROUP),
            input: Representation::Trivial,
        },
        ..Default::default()
    };
    let mut balancer = LambdaBalancer::new(LambdaConfig {
        target_ratio: args.target_ratio,
        momentum: 0.7,
        ..Default::default()
    })?;
    let mut adam = AdamW::new_lr(vars.all_vars(), 1e-2)?;
    for step in 0..args.steps {
        let (x, y) = gratings(32, &mut rng)?;
        let task = loss::cross_entropy(&net.logits(&x)?, &y)?;
        let share = penalty.forward(net.embed.weight())?;
        let last = step + 1 == args.steps;
        if penalized && (step % 10 == 0 || last) {
            let named = grad::named(&vars, "");
            let balance = GradientBalance::of_losses(&task, &share, named, &["embed", "head"])?;
            balancer.update(&balance);
            if last {
                println!("{balance}");
            }
        }
        let lambda = if penalized { balancer.lambda() } else { 0. };
        adam.backward_step(&(&task + (&share * lambda)?)?)?;
        if step % (args.steps / 4).max(1) == 0 || last {
            let (task, share) = (number(&task)?, number(&share)?);
            println!(
                "step {step:3}  cross-entropy {task:.3}  asymmetric share {share:.3}  λ {lambda:.3}"
            );
        }
    }
    Ok((net, penalty))
}

fn number(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.to_scalar()?)
}

fn turn(g: D4, x: &Tensor) -> Result<Tensor> {
    let grid = TokenGrid::square(SIDE)?;
    Ok(GridOperator::new(&[g], grid, &Resample::default())?.apply(x)?)
}

/// Noisy, slightly tilted gratings of four frequencies and random phase, `(B, 1, 24, 24)`, with
/// labels.
fn gratings(batch: usize, rng: &mut StdRng) -> Result<(Tensor, Tensor)> {
    let mut pixels = Vec::with_capacity(batch * SIDE * SIDE);
    let mut labels = Vec::with_capacity(batch);
    for _ in 0..batch {
        let class = rng.random_range(0..CLASSES as u32);
        let (angle, phase) = (rng.random_range(-0.3f32..0.3), rng.random_range(0f32..6.3));
        let frequency = 0.5 + 0.4 * class as f32;
        labels.push(class);
        for i in 0..SIDE * SIDE {
            let (y, x) = ((i / SIDE) as f32, (i % SIDE) as f32);
            let wave = (frequency * (x * angle.cos() + y * angle.sin()) + phase).sin();
            pixels.push(wave + rng.random_range(-0.5..0.5));
        }
    }
    let images = Tensor::from_vec(pixels, (batch, 1, SIDE, SIDE), &Device::Cpu)?;
    Ok((images, Tensor::from_vec(labels, batch, &Device::Cpu)?))
}

/// Draws the initial weights. candle's CPU generator cannot be seeded, so the run would not be
/// reproducible.
fn seed_weights(vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    for (_, var) in grad::named(vars, "") {
        let bound = match var.rank() {
            1 => 0.,
            _ => (3. * var.dims()[0] as f32 / var.elem_count() as f32).sqrt(),
        };
        let values = (0..var.elem_count()).map(|_| bound * rng.random_range(-1f32..1.));
        let values = Tensor::from_vec(values.collect(), var.shape(), &Device::Cpu)?;
        var.set(&values)?;
    }
    Ok(())
}
