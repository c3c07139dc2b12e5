//! The values of the presets.

use ser_reg::{ProjectorConfig, SerConfig, ViewConfig, loss::Contrastive, ser::Objective};

use super::{BarlowTwins, Base, Dino, Method, MocoV3, Optimizer, Preset, Ser, SerImages, Settings};
use crate::method::{barlow, dino::DinoHead, moco};

/// The paper's objective with this weight and temperature.
fn nt_xent(lambda: f64, temperature: f64) -> SerConfig {
    SerConfig {
        lambda,
        objective: Objective::NtXent(Contrastive { temperature, ..Contrastive::default() }),
        ..SerConfig::default()
    }
}

/// `views` with an overlap of a tenth at least, so that crops from the command line leave tokens to compare.
fn overlapping(views: ViewConfig) -> ViewConfig {
    ViewConfig { min_overlap: 0.1, ..views }
}

impl Settings {
    /// Values that work in minutes; docs/results.md has the accuracy.
    pub(super) fn fashion_tiny(method: Method) -> Self {
        Self {
            method,
            preset: Preset::FashionTiny,
            baseline: false,
            smoke: false,
            seed: 0,
            data: None,
            epochs: 3,
            batch_size: 64,
            crop_min: 0.3,
            // A memory of twenty to thirty steps: a run has a thousand, not a hundred thousand.
            momentum: match method {
                Method::MocoV3 => Some(0.95),
                Method::Dino => Some(0.97),
                Method::BarlowTwins => None,
            },
            drop_path: 0.0,
            base: match method {
                Method::MocoV3 => {
                    Base::MocoV3(MocoV3 { temperature: 0.2, widths: moco::Widths::SMALL })
                }
                Method::Dino => Base::Dino(Dino {
                    mlp: DinoHead::small(64),
                    prototypes: 256,
                    student_temperature: 0.1,
                    teacher_temperature: (0.05, 0.05),
                    teacher_warm_up: 0.0,
                    center_momentum: 0.9,
                    freeze_prototypes: 0.0,
                    learned_lengths: false,
                }),
                // The scale brings 256 dimensions' loss to the size of the other methods'.
                Method::BarlowTwins => Base::BarlowTwins(BarlowTwins {
                    projector: barlow::small(64),
                    redundancy: 0.02,
                    scale: 10.0 / 256.0,
                }),
            },
            ser: Ser {
                images: SerImages::Batch,
                layer: 2,
                ratio: 0.125,
                loss: nt_xent(1.0, 0.3),
                head: ProjectorConfig { hidden: 128, out: 128, ..Default::default() },
                views: overlapping(ViewConfig::default()),
                balance: None,
                final_lambda: None,
            },
            optimizer: Optimizer {
                learning_rate: 2e-3,
                final_learning_rate: 0.0,
                warm_up: 0.1,
                weight_decay: 0.05,
                final_weight_decay: 0.05,
                warm_up_inclusive: false,
                clip: (method == Method::Dino).then_some(1.0),
                clip_each: false,
            },
            addon: None,
            init: None,
        }
    }

    /// The hyper-parameters of arXiv 2603.06693. Its sources differ in layer (3; 12 by default in the scripts), λ (1.0, 0.5,
    /// DINO 0.3), τ (0.3; 0.5 or 0.4), ratio (0.01; DINO 0.02) and the negatives (both views; the other one). All of these
    /// are options.
    ///
    /// This preset differs from the authors' code in three ways. No method has weight decay on vectors; in their code DINO
    /// alone has none. The keys of the regularizer come from a momentum copy of its head for DINO too; in their code they
    /// come from the student's head. The loss has a gradient.
    pub(super) fn imagenet_vit_s16(method: Method, batch_size: Option<usize>) -> Self {
        let batch_size = batch_size.unwrap_or(2048);
        let linear = |rate: f64| rate * batch_size as f64 / 256.0;
        Self {
            method,
            preset: Preset::ImagenetVitS16,
            baseline: false,
            smoke: false,
            seed: 0,
            data: None,
            epochs: 100,
            batch_size,
            crop_min: match method {
                Method::Dino => 0.25,
                _ => 0.08,
            },
            momentum: match method {
                Method::MocoV3 => Some(0.99),
                Method::Dino => Some(0.982),
                Method::BarlowTwins => None,
            },
            drop_path: if method == Method::Dino { 0.1 } else { 0.0 },
            base: match method {
                Method::MocoV3 => {
                    Base::MocoV3(MocoV3 { temperature: 0.2, widths: moco::Widths::PAPER })
                }
                Method::Dino => Base::Dino(Dino {
                    mlp: DinoHead::paper(384),
                    prototypes: 65536,
                    student_temperature: 0.1,
                    teacher_temperature: (0.04, 0.07),
                    teacher_warm_up: 0.1,
                    center_momentum: 0.9,
                    freeze_prototypes: 0.01,
                    learned_lengths: true,
                }),
                Method::BarlowTwins => Base::BarlowTwins(BarlowTwins {
                    projector: barlow::paper(384),
                    redundancy: 0.0051,
                    scale: 1.0,
                }),
            },
            ser: Ser {
                images: SerImages::Batch,
                layer: 3,
                ratio: 0.01,
                loss: match method {
                    Method::Dino => nt_xent(0.3, 0.5),
                    _ => nt_xent(1.0, 0.3),
                },
                head: ProjectorConfig::default(),
                views: overlapping(ViewConfig::paper()),
                balance: None,
                final_lambda: None,
            },
            optimizer: Optimizer {
                learning_rate: linear(match method {
                    Method::MocoV3 => 3e-4,
                    _ => 1e-4,
                }),
                final_learning_rate: match method {
                    Method::MocoV3 => 0.0,
                    Method::Dino => 1e-5,
                    Method::BarlowTwins => 0.001 * linear(1e-4),
                },
                warm_up: 0.1,
                weight_decay: if method == Method::Dino { 0.04 } else { 0.1 },
                final_weight_decay: if method == Method::Dino { 0.4 } else { 0.1 },
                warm_up_inclusive: method == Method::Dino,
                clip: (method != Method::MocoV3).then_some(0.3),
                clip_each: true,
            },
            addon: None,
            init: None,
        }
    }
}
