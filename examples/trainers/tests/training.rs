//! The examples' training parts: the same seed gives the same run, whatever the number of threads.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    TokenGrid,
    partition::Partition,
    projector::ProjectorConfig,
    ser::{SerConfig, SerLoss},
    tap,
    view::{ViewConfig, ViewSampler},
};
use ser_reg_trainers::{
    augment::Augment,
    data::{Images, Source},
    knn::{Bank, spread},
    loader::{Loader, LoaderConfig},
    method::moco::{self, Widths, contrast},
    optimizer::AdamW,
    vit::{Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;

/// Random pictures of 12x12.
fn pictures(n: usize, channels: usize) -> Images {
    let mut rng = StdRng::seed_from_u64(3);
    Images {
        pixels: (0..n * channels * 144).map(|_| rng.random()).collect(),
        labels: (0..n as u32).map(|i| i % 3).collect(),
        channels,
        side: 12,
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Losses of a few steps of MoCo-v3 with SER; `None`: the same partition, and no `SerLoss` at all.
fn train(lambda: Option<f64>, seed: u64) -> Vec<f32> {
    let images = pictures(8, 1);
    let mut loader = Loader::new(
        Source::Memory(Arc::new(images.clone())),
        Augment::small(images.side, images.statistics()),
        LoaderConfig {
            batch: 8,
            shared: 2,
            seed,
            first_step: 0,
            steps: 100,
            workers: 1,
            prefetch: 2,
        },
    )
    .unwrap();
    let config = VitConfig {
        dim: 16,
        depth: 3,
        ..VitConfig::small(&images, 2, false).unwrap()
    };
    let online = Weights::seeded(seed);
    let ser_config = SerConfig {
        lambda: lambda.unwrap_or(0.0),
        projector: Some(ProjectorConfig {
            hidden: 8,
            out: 8,
            norm: true,
        }),
        ..Default::default()
    };
    let build = |weights: &Weights| {
        let vb = weights.builder(&CPU);
        let vit = Vit::new(&config, vb.pp("encoder")).unwrap();
        let head = moco::projector(16, Widths::SMALL, vb.pp("projector")).unwrap();
        (
            vit,
            head,
            SerLoss::new(ser_config, 16, vb.pp("ser")).unwrap(),
        )
    };
    let (vit, projector, ser) = build(&online);
    let predictor = moco::predictor(Widths::SMALL, online.builder(&CPU).pp("predictor")).unwrap();
    let momentum = online.momentum_copy();
    let (key_vit, key_projector, key_ser) = build(&momentum);
    let mut optimizer = AdamW::new(&online.named(), (0.9, 0.999), 1e-8).unwrap();
    let still = ViewConfig {
        area: (1.0, 1.0),
        aspect: (1.0, 1.0),
        ..Default::default()
    };
    let sampler = ViewSampler::new(TokenGrid::square(3).unwrap(), still).unwrap();
    let part = Partition::new(8, 0.25).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let step = |_| {
        let batch = loader.next(&CPU).unwrap();
        let (x1, x2) = (batch.first, batch.second);
        let views = sampler.sample_pair(&mut rng, 2).unwrap();
        let turn = |x: &Tensor, view: &ser_reg::view::View| {
            let (plain, shared) = part.split(x).unwrap();
            Tensor::cat(&[&plain, &view.apply(&shared).unwrap()], 0).unwrap()
        };
        let (x1, x2) = (turn(&x1, &views.first), turn(&x2, &views.second));
        momentum.follow(&online, 0.9).unwrap();
        let query = |x| tap::capture("block2", || vit.forward(x)).unwrap();
        let key = |x| tap::capture("block2", || key_vit.forward(x)).unwrap();
        let ((f1, m1), (f2, m2)) = (query(&x1), query(&x2));
        let ((g1, n1), (g2, n2)) = (key(&x1), key(&x2));
        let q = |f| predictor.forward(&projector.forward(f).unwrap()).unwrap();
        let k = |f| key_projector.forward(f).unwrap();
        let mut loss = (contrast(&q(&f1), &k(&g2), 0, 0.2).unwrap()
            + contrast(&q(&f2), &k(&g1), 0, 0.2).unwrap())
        .unwrap();
        if lambda.is_some() {
            let [m1, m2, n1, n2] = [m1, m2, n1, n2].map(|m| part.split(&m).unwrap().1);
            let relative = views.relative();
            let out = ser.forward_with_keys([&m1, &m2], [&n1, &n2], &key_ser, &relative);
            loss = (loss + out.unwrap().loss).unwrap();
        }
        optimizer
            .step(&loss.backward().unwrap(), 1e-2, 0.05)
            .unwrap();
        loss.to_scalar::<f32>().unwrap()
    };
    (0..4).map(step).collect()
}

#[test]
fn one_seed_gives_one_run() {
    let run = train(Some(1.0), 0);
    assert_eq!(run, train(Some(1.0), 0));
    assert_ne!(run, train(Some(1.0), 1));
}

#[test]
fn lambda_zero_is_the_plain_trainer_on_the_same_partition() {
    assert_eq!(train(Some(0.0), 0), train(None, 0));
    assert_ne!(train(Some(1.0), 0), train(None, 0));
}

#[test]
fn momentum_weights_follow_outside_the_graph() {
    let online = Weights::seeded(0);
    let images = pictures(2, 1);
    let config = VitConfig {
        dim: 16,
        ..VitConfig::small(&images, 2, false).unwrap()
    };
    let vit = Vit::new(&config, online.builder(&CPU)).unwrap();
    let momentum = online.momentum_copy();
    let copy = Vit::new(&config, momentum.builder(&CPU)).unwrap();
    let x = images.normalized(0..2, &images.statistics(), &CPU).unwrap();
    assert_eq!(
        values(&vit.forward(&x).unwrap()),
        values(&copy.forward(&x).unwrap())
    );
    assert!(!copy.forward(&x).unwrap().track_op());

    let first = |weights: &Weights| values(weights.named()[0].1.as_tensor());
    let before = first(&online);
    let (_, var) = &online.named()[0];
    var.set(&(var.as_detached_tensor() + 1.0).unwrap()).unwrap();
    assert_eq!(first(&momentum), before);
    momentum.follow(&online, 0.75).unwrap();
    let moved = before.iter().map(|w| w + 0.25);
    assert!(
        first(&momentum)
            .iter()
            .zip(moved)
            .all(|(a, b)| (a - b).abs() < 1e-6)
    );
    assert_ne!(
        values(&vit.forward(&x).unwrap()),
        values(&copy.forward(&x).unwrap())
    );
}

#[test]
fn a_name_is_given_once() {
    let weights = Weights::seeded(0);
    let vb = weights.builder(&CPU);
    vb.get(3, "w").unwrap();
    let error = vb.get(3, "w").unwrap_err().to_string();
    assert!(error.contains("w is asked for twice"), "{error}");
    let copy = weights.momentum_copy();
    let error = copy.builder(&CPU).get(4, "w").unwrap_err().to_string();
    assert!(error.contains("expected [4], got [3]"), "{error}");
}

#[test]
fn neighbors_vote_as_in_the_naive_loop() {
    let mut rng = StdRng::seed_from_u64(0);
    let mut features = |n: usize| -> Vec<[f32; 5]> {
        (0..n)
            .map(|_| std::array::from_fn(|_| rng.random_range(-1.0..1.0)))
            .collect()
    };
    // More queries than one chunk, more neighbors than the vote takes.
    let (bank, queries) = (features(60), features(503));
    let bank_labels: Vec<u32> = (0..60).map(|i| i % 4).collect();
    let query_labels: Vec<u32> = (0..503).map(|i| i % 4).collect();

    let mean: [f32; 5] = std::array::from_fn(|d| bank.iter().map(|f| f[d]).sum::<f32>() / 60.0);
    let unit = |f: &[f32; 5]| -> [f32; 5] {
        let centered: [f32; 5] = std::array::from_fn(|d| f[d] - mean[d]);
        let length = centered.iter().map(|v| v * v).sum::<f32>().sqrt();
        centered.map(|v| v / length)
    };
    let mut right = 0;
    for (query, label) in queries.iter().zip(&query_labels) {
        let query = unit(query);
        let cosine = |f: &[f32; 5]| unit(f).iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
        let mut near: Vec<(f32, u32)> = bank.iter().map(cosine).zip(bank_labels.clone()).collect();
        near.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut votes = [0f32; 4];
        for (cosine, label) in &near[..20] {
            votes[*label as usize] += (cosine / 0.07).exp();
        }
        let best = (0..4)
            .max_by(|&a, &b| votes[a].total_cmp(&votes[b]))
            .unwrap();
        right += usize::from(best as u32 == *label);
    }
    let tensor = |f: &[[f32; 5]]| Tensor::from_vec(f.concat(), (f.len(), 5), &CPU).unwrap();
    let bank = Bank::new(&tensor(&bank), &bank_labels).unwrap();
    let accuracy = bank.accuracy(&tensor(&queries), &query_labels).unwrap();
    assert!((accuracy - 100.0 * right as f64 / 503.0).abs() < 1e-9);

    let error = bank
        .accuracy(&tensor(&queries), &[0])
        .unwrap_err()
        .to_string();
    assert!(error.contains("503 queries, got 1"), "{error}");
}

#[test]
fn spread_tells_collapse() {
    let point = Tensor::ones((10, 4), candle_core::DType::F32, &CPU).unwrap();
    assert!(spread(&point).unwrap() < 1e-3);
    let axes = [[1f32, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]];
    let full = spread(&Tensor::new(&axes, &CPU).unwrap()).unwrap();
    assert!((full - 1.0).abs() < 1e-5, "{full}");
}
