//! The examples' vision transformer: the gradients of its weights, and its response to rotations and flips.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    Layout, TokenGrid, grad,
    group::D4,
    metric::{EqScore, Layer},
    tap,
};
use ser_reg_trainers::{
    data::Images,
    vit::{Positions, Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;

fn config(layer: usize, early_cls: bool) -> VitConfig {
    let images = Images { channels: 2, side: 12, ..Default::default() };
    let config = VitConfig::small(&images, layer, early_cls).unwrap();
    VitConfig { dim: 16, ..config }
}

fn build(config: &VitConfig) -> (Vit, Weights) {
    let weights = Weights::seeded(7);
    (Vit::new(config, weights.builder(&CPU)).unwrap(), weights)
}

fn images(batch: usize) -> Tensor {
    let mut rng = StdRng::seed_from_u64(1);
    let values: Vec<f32> = (0..batch * 2 * 144).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, (batch, 2, 12, 12), &CPU).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let d = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    d.to_scalar().unwrap()
}

#[test]
fn the_output_reaches_every_weight() {
    for (layer, early_cls) in [(1, false), (2, false), (4, false), (2, true)] {
        let (vit, weights) = build(&config(layer, early_cls));
        let y = vit.forward(&images(3)).unwrap();
        assert_eq!(y.dims(), [3, 16]);
        let loss = (y.sqr().unwrap() * &y).unwrap().sum_all().unwrap();
        grad::assert_reaches(&loss, weights.named()).unwrap();
    }
}

#[test]
fn a_map_reaches_the_blocks_before_it_and_no_other() {
    let (vit, weights) = build(&config(2, false));
    let (_, map) = tap::capture("block2", || vit.forward(&images(3))).unwrap();
    assert_eq!(map.dims(), [3, 9, 16]);
    let loss = map.sqr().unwrap().sum_all().unwrap();
    let unreached = grad::unreached(&loss, weights.named()).unwrap();
    let later =
        |name: &String| !["patch.", "block1.", "block2."].iter().any(|p| name.starts_with(p));
    let names = weights.named().into_iter().map(|(name, _)| name);
    let mut expected: Vec<String> = names.filter(later).collect();
    expected.sort();
    let mut unreached: Vec<String> = unreached.into_iter().map(|n| n.to_string()).collect();
    unreached.sort();
    assert_eq!(unreached, expected);
}

#[test]
fn the_cls_token_joins_where_it_is_told_to() {
    for (layer, early_cls, tokens) in [(1, false, 9), (3, false, 9), (4, false, 10), (2, true, 10)]
    {
        let config = config(layer, early_cls);
        let (vit, _) = build(&config);
        let name = format!("block{layer}");
        let (_, map) = tap::capture(&name, || vit.forward(&images(2))).unwrap();
        assert_eq!(map.dims(), [2, tokens, 16], "layer {layer}");
        assert_eq!(config.prefix(layer), tokens - 9);
    }
}

#[test]
fn the_short_last_block_changes_no_output() {
    let short = config(2, false);
    let whole = VitConfig { last_map: true, ..short.clone() };
    let x = images(3);
    let run = |config: &VitConfig| {
        let (vit, weights) = build(config);
        let y = vit.forward(&x).unwrap();
        let grads = (y.sqr().unwrap() * &y).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> =
            weights.named().iter().map(|(_, v)| grads.get(v).unwrap().clone()).collect();
        (y, grads)
    };
    let ((y, grads), (y_whole, grads_whole)) = (run(&short), run(&whole));
    assert!(distance(&y, &y_whole) < 1e-5);
    for (a, b) in grads.iter().zip(&grads_whole) {
        let scale = b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(distance(a, b) < 1e-4 * scale.max(1.0));
    }
}

fn score(config: &VitConfig, layer: usize) -> f64 {
    let (vit, _) = build(config);
    let grid = TokenGrid::square(config.grid()).unwrap();
    let layout = Layout { prefix: config.prefix(layer), ..Default::default() };
    let score = EqScore::new(Layer { grid, layout });
    let map = |x: &Tensor| -> candle_core::Result<Tensor> {
        let (_, map) = tap::capture(&format!("block{layer}"), || vit.forward(x))?;
        map.to_dtype(DType::F64)
    };
    let rng = &mut StdRng::seed_from_u64(0);
    let report = score.measure(&images(8), &D4::ALL[1..], rng, map).unwrap();
    report.mean.score.centered
}

#[test]
fn symmetric_patches_without_positions_are_exactly_equivariant() {
    for layer in [1, 2, 3] {
        let plain = VitConfig { positions: Positions::None, ..config(layer, false) };
        let symmetric = VitConfig { symmetric_patches: true, ..plain.clone() };
        let exact = score(&symmetric, layer);
        assert!((exact - 1.0).abs() < 1e-6, "layer {layer}: {exact}");
        // Each of the two breaks it alone, so the score is not 1 for want of anything to measure.
        assert!(score(&plain, layer) < 0.9);
        let placed = VitConfig { positions: Positions::SinCos, ..symmetric };
        assert!(score(&placed, layer) < 0.9);
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let refused = |config: &VitConfig| {
        let vb = Weights::seeded(0).builder(&CPU);
        Vit::new(config, vb).expect_err("refused").to_string()
    };
    let base = config(2, false);
    let error = refused(&VitConfig { side: 13, ..base.clone() });
    assert!(error.contains("multiple of the patch size 4, got 13"), "{error}");
    let error = refused(&VitConfig { heads: 3, ..base.clone() });
    assert!(error.contains("3 heads") && error.contains("16"), "{error}");
    let error = refused(&VitConfig { cls_after: 9, ..base });
    assert!(error.contains("4 blocks") && error.contains('9'), "{error}");
    let images = Images { channels: 1, side: 12, ..Default::default() };
    let error = VitConfig::small(&images, 5, false).unwrap_err().to_string();
    assert!(error.contains("4 blocks") && error.contains("block 5"), "{error}");
}
