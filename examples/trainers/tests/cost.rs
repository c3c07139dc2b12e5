//! The counts of multiply–adds, against the shapes of real weights and against formulas with all numbers written out.

use candle_core::{Device, Var};
use clap::Parser;
use ser_reg::loss::Negatives;
use ser_reg_trainers::{
    cli::Args,
    cost::{self, Cost, Keys, predicted},
    data::Images,
    method::{Head, dino::DinoHead, moco},
    settings::{Base, Method, Settings},
    vit::{Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;

fn settings(method: Method, more: &[&str]) -> Settings {
    let args = [&["trainer"], more].concat();
    Settings::new(method, &Args::parse_from(args)).unwrap()
}

fn counted(method: Method, more: &[&str]) -> (Settings, VitConfig, Cost) {
    let settings = settings(method, more);
    let images = Images { channels: 1, side: 28, ..Default::default() };
    let vit = settings.vit(&images).unwrap();
    let cost = predicted(&settings, &vit).unwrap().unwrap();
    (settings, vit, cost)
}

/// The number of weights in matrices, by the variables that modules asked for.
fn matrices(named: &[(String, Var)], prefix: &str) -> f64 {
    let is_matrix = |(name, var): &&(String, Var)| {
        name.starts_with(prefix) && name.ends_with("weight") && var.rank() == 2
    };
    let count = |(_, var): &(String, Var)| var.elem_count() as f64;
    named.iter().filter(is_matrix).map(count).sum()
}

/// Each token takes one multiply–add for each weight of a linear map; scores and mixing take `2·n²·d`.
#[test]
fn an_encoder_counts_as_its_weights_do() {
    let images = Images { channels: 2, side: 12, ..Default::default() };
    for (layer, early_cls) in [(1, false), (3, false), (4, false), (2, true)] {
        let config = VitConfig {
            mlp_ratio: 3,
            dim: 16,
            last_map: true,
            ..VitConfig::small(&images, layer, early_cls).unwrap()
        };
        let weights = Weights::seeded(0);
        let vit = Vit::new(&config, weights.builder(&CPU)).unwrap();
        let named = weights.named();
        let image = candle_core::Tensor::zeros((1, 2, 12, 12), candle_core::DType::F32, &CPU);
        let image = image.unwrap();
        let mut expected = matrices(&named, "patch.") * 9.0;
        for block in 1..=config.depth {
            // The tokens that the block puts out, prefix included.
            let name = format!("block{block}");
            let map = ser_reg::tap::capture_until(&name, || vit.forward(&image)).unwrap();
            let tokens = map.dim(1).unwrap() as f64;
            expected += tokens * matrices(&named, &format!("{name}."));
            expected += 2.0 * tokens * tokens * 16.0;
            assert_eq!(cost::forward(&config, block), expected, "{config:?}");
        }
        // Without the map of the last block, one token alone gives a query.
        let short = VitConfig { last_map: false, ..config.clone() };
        let saved = cost::forward(&config, 4) - cost::forward(&short, 4);
        let rest = (16. * 16. * 2. + 2. * 16. * 48.) * 9. + 2. * 10. * 9. * 16.;
        assert_eq!(saved, if config.cls_after == 4 { 0.0 } else { rest });
    }
}

/// ViT-S/16 has "4.6 GFLOPs" in papers, which count a multiply–add as one.
#[test]
fn the_small_transformer_of_the_paper() {
    let config = VitConfig { last_map: true, ..VitConfig::s16(3, true).unwrap() };
    let giga = cost::forward(&config, 12) / 1e9;
    assert!((giga - 4.6).abs() < 0.01, "{giga}");
}

#[test]
fn heads_count_as_their_weights_do() {
    for method in Method::ALL {
        let (settings, vit, cost) = counted(method, &[]);
        let weights = Weights::seeded(0);
        let vb = weights.builder(&CPU);
        let (batch, out);
        match &settings.base {
            Base::MocoV3(base) => {
                moco::projector(vit.dim, base.widths, vb.pp("projector")).unwrap();
                moco::predictor(base.widths, vb.pp("predictor")).unwrap();
                // Keys take no predictor. Two views have 64·64 cosines of 64 channels and their gradient.
                let [project, predict] =
                    ["projector", "predictor"].map(|name| matrices(&weights.named(), name));
                batch = 8.0 * project + 6.0 * predict;
                out = 2. * 2. * 64. * 64. * 64.;
            }
            Base::Dino(base) => {
                DinoHead::new(&base.mlp, base.prototypes, false, vb.pp("head")).unwrap();
                batch = 8.0 * matrices(&weights.named(), "head");
                out = 0.0;
            }
            Base::BarlowTwins(base) => {
                Head::new(&base.projector, vb.pp("projector")).unwrap();
                batch = 6.0 * matrices(&weights.named(), "projector");
                out = 3. * 64. * 256. * 256.;
            }
        }
        assert_eq!(cost.heads, 64.0 * batch + out, "{method:?}");
    }
}

/// The small preset: 8 of 64 images of 49 tokens with 64 channels, a head of 128 and 128.
#[test]
fn the_parts_of_the_regularizer() {
    let tokens = 8. * 49.;
    for (method, maps, products) in [
        (Method::MocoV3, 8.0, 10.0),
        (Method::Dino, 8.0, 10.0),
        // One encoder made both maps: the symmetric engine takes 4/3 of one direction.
        (Method::BarlowTwins, 6.0, 8.0),
    ] {
        let (_, vit, cost) = counted(method, &[]);
        assert_eq!(cost.ser_head, maps * tokens * (64. * 128. + 128. * 128.));
        assert_eq!(cost.contrast, products * tokens * tokens * 128.);
        // Rotations and flips only move values, and the views also serve the base method.
        assert_eq!((cost.alignment, cost.views, cost.ser_encoder), (0., 0., 0.));

        let (.., own) = counted(method, &["--ser-images", "own"]);
        assert_eq!(own.ser_encoder, 8. * maps * cost::forward(&vit, 2));
        assert_eq!((own.encoder, own.ser_head), (cost.encoder, cost.ser_head));

        // Bicubic: four values in either axis. Keys with a gradient are carried back too.
        let (.., scaled) = counted(method, &["--scale", "0.7,1.3"]);
        let directions = if method == Method::BarlowTwins { 4. } else { 2. };
        assert_eq!(scaled.alignment, directions * tokens * 128. * 8.);
        assert_eq!(scaled.views, 2. * 8. * 784. * 8.);
        let (.., turned) = counted(method, &["--rotation", "-30,30", "--filter", "bilinear"]);
        assert_eq!(turned.views, 2. * 8. * 784. * 4.);
    }
    let (.., cross) = counted(Method::MocoV3, &["--negatives", "other-view"]);
    assert_eq!(cross.contrast, 2. * 2. * tokens * tokens * 128.);
}

#[test]
fn products_of_both_directions() {
    for (negatives, keys, expected) in [
        // Cosines with anchors and keys, the anchors' gradient from both, the anchors' gradient as candidates.
        (Negatives::BothViews, Keys::Momentum, 2. * (2. + 2. + 1.)),
        (Negatives::BothViews, Keys::Trained, 2. * (2. + 2. + 2.)),
        (Negatives::OtherView, Keys::Momentum, 2. * (1. + 1.)),
        (Negatives::OtherView, Keys::Trained, 2. * (1. + 1. + 1.)),
        // Of the (2M)² cosines one triangle is made twice, and multiplied for rows and for columns.
        (Negatives::BothViews, Keys::TrainedAndPermuted, 2. * 2. + 2. * 2.),
        (Negatives::OtherView, Keys::TrainedAndPermuted, 1. + 1. + 1. + 1.),
    ] {
        assert_eq!(cost::products(negatives, keys), expected, "{keys:?}");
    }
    // Scales are no permutation of tokens.
    let tokens = 8. * 49.;
    let (.., scaled) = counted(Method::BarlowTwins, &["--scale", "0.7,1.3"]);
    assert_eq!(scaled.contrast, 12. * tokens * tokens * 128.);
}

#[test]
fn the_overhead_is_the_ratio_of_both_sums() {
    let (.., cost) = counted(Method::MocoV3, &["--ser-images", "own", "--scale", "0.7,1.3"]);
    let added = cost.ser_encoder + cost.ser_head + cost.alignment + cost.views + cost.contrast;
    assert!(cost.alignment > 0.0 && cost.views > 0.0);
    let expected = (cost.encoder + cost.heads + added) / (cost.encoder + cost.heads);
    assert!((cost.overhead() - expected).abs() < 1e-12);
}
