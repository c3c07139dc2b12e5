//! All of SER in one file: a small network, a self-supervised base loss, and one more term. The printed score says how
//! equivariant the first block is. It is 1 if the token map moves exactly with the image.
//!
//! ```text
//! cargo run --release --example minimal          # Barlow Twins + SER: the score rises from 0.7 to about 0.98
//! cargo run --release --example minimal -- 0     # lambda 0, Barlow Twins alone: it falls to about 0.6
//! ```

use std::{
    env,
    io::{self, Write},
};

use candle_core::{D, DType, Device, Error, Module, Result, Tensor};
use candle_nn::{AdamW, Linear, Optimizer, VarBuilder, VarMap, linear, ops};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{Regularizer, SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler};
use ser_reg::{grad, group::D4, metric::EqScore, tap};

/// A transformer with two blocks of one attention head. A 28x28 image becomes 7x7 tokens of 4x4 pixels.
struct Net {
    patches: Linear,
    positions: Tensor,
    blocks: [[Linear; 2]; 2],
    head: Linear,
}

impl Net {
    fn new(vb: VarBuilder) -> Result<Self> {
        let block = |vb: VarBuilder| -> Result<[Linear; 2]> {
            Ok([linear(64, 192, vb.pp("qkv"))?, linear(64, 64, vb.pp("mlp"))?])
        };
        Ok(Self {
            patches: linear(16, 64, vb.pp("patches"))?,
            positions: vb.get((49, 64), "positions")?,
            blocks: [block(vb.pp("block0"))?, block(vb.pp("block1"))?],
            head: linear(64, 64, vb.pp("head"))?,
        })
    }

    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let x = images.reshape(((), 7, 4, 7, 4))?.transpose(2, 3)?.reshape(((), 49, 16))?;
        let mut x = self.patches.forward(&x)?.broadcast_add(&self.positions)?;
        for (i, [qkv, mlp]) in self.blocks.iter().enumerate() {
            let qkv = qkv.forward(&x)?.chunk(3, D::Minus1)?;
            let scores = (qkv[0].matmul(&qkv[1].t()?)? / 8.)?;
            x = (x + ops::softmax(&scores, D::Minus1)?.matmul(&qkv[2].contiguous()?)?)?;
            x = mlp.forward(&x.silu()?)?;
            tap::record(format_args!("block{i}"), &x)?; // SER: the one line in the model
        }
        self.head.forward(&x.mean(1)?)
    }
}

/// Barlow Twins (arXiv 2103.03230): the cross-correlation of two embeddings becomes the identity.
fn base_loss(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let normalize = |z: &Tensor| {
        let z = z.broadcast_sub(&z.mean_keepdim(0)?)?;
        z.broadcast_div(&(z.sqr()?.mean_keepdim(0)? + 1e-5)?.sqrt()?)
    };
    let correlation = (normalize(a)?.t()?.matmul(&normalize(b)?)? / a.dim(0)? as f64)?;
    let identity = Tensor::eye(a.dim(1)?, DType::F32, a.device())?;
    ((correlation - &identity)?.sqr()? * ((identity * 0.995)? + 0.005)?)?.sum(0)?.mean_all()
}

/// Random contrast and brightness, which the group does not contain: every view draws its own.
fn jitter(images: &Tensor, rng: &mut StdRng) -> Result<Tensor> {
    let mut uniform = |low: f32, high: f32| {
        let values: Vec<f32> = (0..images.dim(0)?).map(|_| rng.random_range(low..high)).collect();
        Tensor::from_vec(values, ((), 1, 1, 1), images.device())
    };
    images.broadcast_mul(&uniform(0.4, 1.6)?)?.broadcast_add(&uniform(-0.4, 0.4)?)
}

/// Prints a line. Where nobody reads on, as in `| head -1`, the program ends quietly.
macro_rules! println {
    ($($text:tt)*) => {
        match writeln!(io::stdout(), $($text)*) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            result => result.map_err(Error::wrap)?,
        }
    };
}

/// The weight of SER, the only argument; 1 without it.
fn lambda() -> ser_reg::Result<f64> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let number = match &args[..] {
        [] => Some(1.),
        [number] => number.to_str().and_then(|number| number.parse().ok()),
        _ => None,
    };
    number.ok_or_else(|| {
        ser_reg::Error::config("arguments", "one number, lambda", format!("{args:?}"))
    })
}

fn main() -> ser_reg::Result<()> {
    let lambda = lambda()?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model = Net::new(vb.pp("model"))?;
    let (images, held_out) = fashion_mnist()?;

    // SER: views, tap and loss. Without a head it compares the tokens themselves; Regularizer::new adds a head.
    let grid = TokenGrid::square(7)?;
    let loss = SerLoss::new(SerConfig { lambda, ..Default::default() })?;
    let views = ViewSampler::new(grid, ViewConfig::default())?;
    let ser = Regularizer::from_parts("block0", views, None, loss);
    let score = |when: &str| -> ser_reg::Result<()> {
        let map = |x: &Tensor| tap::capture_until("block0", || model.forward(x));
        let rng = &mut StdRng::seed_from_u64(0);
        let report = EqScore::new(grid).measure(&held_out, &D4::ALL[1..], rng, map)?;
        println!("{when}: equivariance score {:.3}", report.mean.score.centered);
        Ok(())
    };
    score("before")?;
    let (mut rng, mut noise) = (StdRng::seed_from_u64(0), StdRng::seed_from_u64(1));
    let mut adam = AdamW::new_lr(vars.all_vars(), 3e-3)?;
    for step in 0..=300 {
        let batch = images.narrow(0, step * 64 % 3840, 64)?;
        let mut embed = || model.forward(&jitter(&batch, &mut noise)?);
        let base = base_loss(&embed()?, &embed()?)?;

        // SER: 16 images, each in two rotated or flipped views; the model runs up to the tap.
        let own = &batch.narrow(0, 0, 16)?;
        let out = ser.forward(own, &mut rng, |view| model.forward(&jitter(view, &mut noise)?))?;
        if step == 0 {
            grad::assert_reaches(&out.unweighted, grad::named(&vars, "model.block0"))?;
        }
        if step % 50 == 0 {
            let (base, ser) = (base.to_vec0::<f32>()?, out.unweighted.to_vec0::<f32>()?);
            println!("step {step:3}: base loss {base:.2}, SER loss {ser:.2}");
        }
        adam.backward_step(&(base + &out.loss)?)?; // SER: one more term
    }
    score("after")
}

/// 3,840 images of Fashion-MNIST to train on, and 256 others.
fn fashion_mnist() -> Result<(Tensor, Tensor)> {
    let file: &[u8] = include_bytes!("data/fashion-mnist/t10k-images-idx3-ubyte.gz");
    let mut bytes = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(file), &mut bytes).map_err(Error::wrap)?;
    let pixels: Vec<f32> = bytes[16..].iter().map(|&p| f32::from(p) / 255.).collect();
    let all = Tensor::from_vec(pixels, (10_000, 1, 28, 28), &Device::Cpu)?;
    Ok((all.narrow(0, 0, 3840)?, all.narrow(0, 4000, 256)?))
}
