//! The HTML page of a run.

use ser_reg_examples::records::{Epoch, Record, Step};
use ser_reg_examples::report::Report;

#[test]
#[ignore]
fn look() {
    let (records, panel) = sample();
    let row = |k: &str, v: &str| (k.to_string(), v.to_string());
    let report = Report {
        title: "MoCo-v3 + SER, seed 0",
        config: vec![
            row("method", "moco_v3"),
            row("mode", "ser"),
            row("seed", "0"),
            row("data", "Fashion-MNIST, 8,000 + 2,000 pictures"),
            row("epochs", "12"),
            row("batch size", "64"),
            row("layer", "2 of 4"),
            row("lambda", "1"),
            row("ratio", "0.125"),
            row("temperature", "0.3"),
        ],
        result: vec![
            row("20-NN upright", "82.4 %"),
            row("20-NN, mean of 7 poses", "61.0 %"),
            row("equivariance, block 2", "0.71"),
            row("feature std", "0.43"),
            row("pictures per second", "1,203"),
            row("seconds", "412"),
        ],
        records: &records,
        panel: Some(panel),
    };
    std::fs::write("/tmp/w-report/report.html", report.html().unwrap()).unwrap();
}

fn sample() -> (Vec<Record>, ser_reg_examples::report::panel::Panel) {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let mut rng = StdRng::seed_from_u64(0);
    let mut records = Vec::new();
    for step in 0..1500 {
        let t = step as f64 / 1500.0;
        let noise = rng.random_range(-0.3..0.3f64);
        let inv = 3.0 + 1.2 * (-4.0 * t).exp() + noise * 0.5;
        let eq = 2.0 + 2.2 * (-3.0 * t).exp() + rng.random_range(-0.3..0.3f64);
        records.push(Record::Step(Step {
            step,
            loss: (inv + eq) as f32,
            invariance: inv as f32,
            equivariance: Some(eq as f32),
            matching: Some((0.1 + 0.7 * t + 0.3 * noise).clamp(0.0, 1.0) as f32),
            learning_rate: 2e-3
                * if t < 0.1 {
                    t * 10.0
                } else {
                    0.5 + 0.5 * ((t - 0.1) / 0.9 * 3.1416).cos()
                },
            weight_decay: 0.05,
            lambda: 1.0,
            momentum: Some(1.0 - 0.05 * (0.5 + 0.5 * (t * 3.1416).cos())),
            gradient: Some(0.5 + 0.4 * (-3.0 * t).exp() + 0.5 * noise.abs()),
        }));
    }
    for epoch in 0..=12 {
        let t = epoch as f64 / 12.0;
        records.push(Record::Epoch(Epoch {
            epoch,
            step: epoch * 125,
            feature_std: (0.2 + 0.4 * t.sqrt()) as f32,
            equivariance: (0..4)
                .map(|k| 0.2 + 0.1 * k as f64 + (0.6 - 0.1 * k as f64) * t.sqrt())
                .collect(),
            accuracy: (0..8)
                .map(|k| {
                    20.0 + 55.0 * t.sqrt() * (1.0 - 0.05 * k as f64) + 10.0 * f64::from(k == 0)
                })
                .collect(),
            images_per_s: if epoch == 0 {
                0.0
            } else {
                1200.0 + 30.0 * (t * 20.0).sin()
            },
            waiting: 0.02,
            extra: Default::default(),
        }));
    }
    let data = ser_reg_examples::data::load(&common::data::embedded()).unwrap();
    let config = ser_reg_examples::vit::VitConfig::small(&data.test, 2, false).unwrap();
    let cpu = candle_core::Device::Cpu;
    let vit = ser_reg_examples::vit::Vit::new(
        &config,
        ser_reg_examples::weights::Weights::seeded(0).builder(&cpu),
    )
    .unwrap();
    let panel = ser_reg_examples::report::panel::Panel::new(
        &vit,
        &data.test,
        &[0, 1, 5, 8],
        &data.train.statistics(),
        2,
        &cpu,
    )
    .unwrap();
    (records, panel)
}
