//! SER on stock models of candle-transformers, with random weights. It prints whether the
//! gradient reaches every parameter, and repairs a model in which it does not.
//!
//! Run with `cargo run --release -p stock-models`. Nothing is downloaded.

#[macro_use]
#[path = "../../console.rs"]
mod console;
mod dinov2;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_transformers::models::{convnext, dinov2 as stock, vit};
use dinov2::DinoV2;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    Layout, MapPair, Projector, ProjectorConfig, SerConfig, SerLoss, TokenGrid, ViewConfig,
    ViewSampler, grad,
    tap::{self, Tapped},
    view::ViewPair,
};

const DIM: usize = 32;
const HEADS: usize = 2;
const CPU: &Device = &Device::Cpu;

fn main() -> Result<()> {
    let extra = std::env::args_os().nth(1);
    ensure!(extra.is_none(), "expected no arguments, got {extra:?}");
    dino()?;
    vit_encoder()?;
    convnext_pooled()
}

/// The model hands out its map. LayerNorm cuts the graph; a copy of the model with another norm and the same parameters
/// repairs it.
fn dino() -> Result<()> {
    println!("DINOv2, the map of block 1 out of get_intermediate_layers");
    let (depth, layer) = (3, 1);
    let vars = VarMap::new();
    let stock = stock::DinoVisionTransformer::new(builder(&vars), depth, DIM, HEADS)?;
    randomize(&vars)?;
    let copy = DinoV2::new(builder(&vars), depth, DIM, HEADS)?; // the same variables
    let early = ["patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1"];
    let trunk: Vec<_> = early.iter().flat_map(|p| grad::named(&vars, p)).collect();

    for side in [dinov2::IMAGE, 4 * dinov2::PATCH] {
        let pair = Pair::new(side, dinov2::PATCH, 0)?;
        // The stock CLS token is not broadcast, so the images go in one by one. (1, 1, N, C) come out, without CLS.
        let [map, other] = pair.maps(|images| {
            let map = |image: &Tensor| {
                stock.get_intermediate_layers(image, &[layer], false, false, false)
            };
            let maps: Vec<Tensor> = (0..images.dims()[0])
                .map(|i| map(&images.narrow(0, i, 1)?)?.squeeze(0))
                .collect::<candle_core::Result<_>>()?;
            Ok(Tensor::cat(&maps, 0)?)
        })?;
        let loss = pair.loss(&map, &other)?;
        check(&format!("stock, {side} px"), &loss, &trunk);

        let with_cls = Layout { prefix: 1, ..Default::default() };
        let [copy_map, other] = pair.maps(|images| {
            let map = tap::capture_until(&format!("block{layer}"), || copy.forward(images))?;
            Ok(with_cls.tokens(&map, pair.grid)?)
        })?;
        let difference = scalar(&(map - &copy_map)?.abs()?.max_all()?)?;
        println!("  copy, {side} px: its map differs by {difference:.0e}");
        ensure!(difference < 1e-4, "expected the copy to be the same model");
        let copy_loss = pair.loss(&copy_map, &other)?;
        let cured = check(&format!("copy, {side} px"), &copy_loss, &trunk);
        ensure!(cured, "expected the gradient to reach all of the copy");
        if side == dinov2::IMAGE {
            // In the stock model the gradient passes the skip connections only, so it is a wrong one.
            let cosine = gradient_cosine(&loss, &copy_loss, &trunk)?;
            println!("  cosine of the stock gradient with the true one: {cosine:.2}");
        }
    }
    Ok(())
}

/// Over all of `vars` that both reach.
fn gradient_cosine(a: &Tensor, b: &Tensor, vars: &[(String, Var)]) -> Result<f32> {
    let (a, b) = (a.backward()?, b.backward()?);
    let (mut aa, mut bb, mut ab) = (0., 0., 0.);
    for (_, var) in vars {
        if let (Some(a), Some(b)) = (a.get(var), b.get(var)) {
            let dot = |a: &Tensor, b: &Tensor| scalar(&(a * b)?.sum_all()?);
            aa += dot(a, a)?;
            bb += dot(b, b)?;
            ab += dot(a, b)?;
        }
    }
    Ok(ab / (aa * bb).sqrt())
}

/// A layer that can be wrapped: the encoder of the stock ViT up to the tapped block.
fn vit_encoder() -> Result<()> {
    println!("ViT, embeddings and the first two layers, wrapped");
    let config = vit::Config {
        hidden_size: DIM,
        num_hidden_layers: 2,
        num_attention_heads: HEADS,
        intermediate_size: 4 * DIM,
        image_size: 32,
        patch_size: 8,
        ..vit::Config::vit_base_patch16_224()
    };
    let vars = VarMap::new();
    let vb = builder(&vars);
    let embeddings = vit::Embeddings::new(&config, false, vb.pp("embeddings"))?;
    let encoder = Tapped::new("layer2", vit::Encoder::new(&config, vb.pp("encoder"))?);
    randomize(&vars)?;
    // After the tap a second encoder would follow, over the later layers, and the head.
    let pair = Pair::new(config.image_size, config.patch_size, 1)?;
    let [map1, map2] = pair.maps(|images| {
        let forward = || embeddings.forward(images, None, false)?.apply(&encoder);
        Ok(tap::capture_until("layer2", forward)?)
    })?;
    check("stock", &pair.loss(&map1, &map2)?, &grad::named(&vars, ""));
    println!(
        "  cure: a copy of vit.rs with layer_norm_slow, and softmax in place of softmax_last_dim"
    );
    Ok(())
}

/// The model hands out no map. Its norms see permuted input, which is not contiguous, and have a backward pass then.
fn convnext_pooled() -> Result<()> {
    println!(
        "ConvNeXt (atto), pooled features; it hands out no map, so SER needs a tap line in a copy of convnext.rs"
    );
    let vars = VarMap::new();
    let model = convnext::convnext_no_final_layer(&convnext::Config::atto(), builder(&vars))?;
    randomize(&vars)?;
    for side in [64, 32] {
        let features = model.forward(&images(2, side)?)?;
        let what = format!("stock, {side} px (last map {0}x{0})", side / 32);
        check(&what, &features.sqr()?.mean_all()?, &grad::named(&vars, ""));
    }
    let vars = VarMap::new();
    let model = convnext::convnext(&convnext::Config::atto(), 10, builder(&vars))?;
    randomize(&vars)?;
    let logits = model.forward(&images(2, 64)?)?;
    check("stock, 64 px, with its head", &logits.sqr()?.mean_all()?, &grad::named(&vars, ""));
    Ok(())
}

/// Two views of two images, and a SER loss for their maps.
struct Pair {
    views: ViewPair,
    images: [Tensor; 2],
    grid: TokenGrid,
    head: Projector,
    ser: SerLoss,
}

impl Pair {
    fn new(side: usize, patch: usize, prefix: usize) -> Result<Self> {
        let grid = TokenGrid::square(side / patch)?;
        // Rotations and flips only: the stock models take square images of one size.
        let sampler = ViewSampler::new(grid, ViewConfig::default())?;
        let views = sampler.sample_pair(&mut rng(1), 2)?;
        let source = images(2, side)?;
        let vars = VarMap::new();
        let narrow = ProjectorConfig { hidden: 32, out: 32, norm: true };
        let head = Projector::new(DIM, narrow, builder(&vars))?;
        randomize(&vars)?;
        let ser = SerLoss::new(SerConfig {
            layout: Layout { prefix, ..Default::default() },
            max_tokens: Some(256),
            ..Default::default()
        })?;
        Ok(Self {
            images: [views.first.apply(&source)?, views.second.apply(&source)?],
            views,
            grid,
            head,
            ser,
        })
    }

    fn maps(&self, map: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[Tensor; 2]> {
        let [x1, x2] = &self.images;
        Ok([map(x1)?, map(x2)?])
    }

    fn loss(&self, map1: &Tensor, map2: &Tensor) -> Result<Tensor> {
        let relative = self.views.relative();
        let pair = MapPair::new([map1, map2], &relative).head(&self.head);
        Ok(self.ser.forward(&pair)?.loss)
    }
}

/// The check of step 0. A trainer would stop where it fails.
fn check(what: &str, loss: &Tensor, vars: &[(String, Var)]) -> bool {
    match grad::assert_reaches(loss, vars.iter().cloned()) {
        Ok(()) => println!("  {what}: the gradient reaches all of {} parameters", vars.len()),
        Err(e) => {
            // A candle error has a backtrace, and the list of names is long.
            let text = e.to_string();
            let short: String = text.lines().take(1).flat_map(str::chars).take(230).collect();
            println!("  {what}: {short} …");
            return false;
        }
    }
    true
}

fn builder(vars: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, DType::F32, CPU)
}

fn images(batch: usize, side: usize) -> Result<Tensor> {
    let mut rng = rng(2);
    let values: Vec<f32> =
        (0..batch * 3 * side * side).map(|_| rng.random_range(-1. ..1.)).collect();
    Ok(Tensor::from_vec(values, (batch, 3, side, side), CPU)?)
}

/// Random weights. The initial values of candle have zeros (positions, layer scales), which hide a missing gradient.
fn randomize(vars: &VarMap) -> Result<()> {
    let mut rng = rng(3);
    for (name, var) in grad::named(vars, "") {
        let scale = var.rank() == 1 && (name.ends_with("weight") || name.ends_with("gamma"));
        let is_matrix = var.rank() > 1 && name.ends_with("weight");
        let fan_in = if is_matrix { var.elem_count() / var.dims()[0] } else { 100 };
        let (mean, spread) = (f32::from(scale), (3. / fan_in as f32).sqrt());
        let values = (0..var.elem_count()).map(|_| mean + spread * rng.random_range(-1. ..1.));
        var.set(&Tensor::from_vec(values.collect::<Vec<f32>>(), var.shape(), CPU)?)?;
    }
    Ok(())
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

fn scalar(x: &Tensor) -> Result<f32> {
    Ok(x.to_scalar()?)
}
