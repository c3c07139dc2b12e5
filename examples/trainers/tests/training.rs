//! The examples' training parts: the same seed gives the same run, whatever the number of threads.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    Partition, Projector, ProjectorConfig, Regularizer, SerConfig, SerLoss, TokenGrid, ViewConfig,
    ViewSampler,
};
use ser_reg_trainers::{
    augment::Augment,
    data::{self, Source},
    knn::{Bank, spread},
    loader::{Loader, LoaderConfig},
    method::moco::{self, Widths, contrast},
    nn,
    optimizer::AdamW,
    records,
    views::{self, Images, colored, encode, join},
    vit::{Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;

/// Random images of 12x12.
fn pictures(n: usize, channels: usize) -> data::Images {
    let mut rng = StdRng::seed_from_u64(3);
    data::Images {
        pixels: (0..n * channels * 144).map(|_| rng.random()).collect(),
        labels: (0..n as u32).map(|i| i % 3).collect(),
        channels,
        side: 12,
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Losses of a few steps of MoCo-v3 with SER; `None`: the same partition and views, without a `Regularizer`.
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
    let config = VitConfig { dim: 16, depth: 3, ..VitConfig::small(&images, 2, false).unwrap() };
    let online = Weights::seeded(seed);
    let head = ProjectorConfig { hidden: 8, out: 8, norm: true };
    let build = |weights: &Weights| {
        let vb = weights.builder(&CPU);
        let vit = Vit::new(&config, vb.pp("encoder")).unwrap();
        let projector = moco::projector(16, Widths::SMALL, vb.pp("projector")).unwrap();
        let head = Projector::new(16, head, vb.pp("ser")).unwrap();
        (vit, projector, head)
    };
    let (vit, projector, head) = build(&online);
    let predictor = moco::predictor(Widths::SMALL, online.builder(&CPU).pp("predictor")).unwrap();
    let momentum = online.momentum_copy();
    let (key_vit, key_projector, key_head) = build(&momentum);
    let mut optimizer = AdamW::new(&online.named(), (0.9, 0.999), 1e-8).unwrap();
    let grid = TokenGrid::square(3).unwrap();
    let sampler = ViewSampler::new(grid, ViewConfig::default()).unwrap();
    let loss =
        SerLoss::new(SerConfig { lambda: lambda.unwrap_or(0.0), ..Default::default() }).unwrap();
    let ser = Regularizer::from_parts("block2", sampler, Some(head), loss);
    let part = Partition::new(8, 0.25).unwrap();
    let step = |step| {
        let batch = loader.next(&CPU).unwrap();
        let mut rng = StdRng::seed_from_u64(seed + step);
        let (crops, shared) = views::shared(&part, &[batch.first, batch.second]).unwrap();
        let Some(Images::Shared(shared)) = shared else {
            unreachable!("images that both losses share");
        };
        momentum.follow(&online, 0.9).unwrap();
        let model = |x: &Tensor| vit.forward(x);
        let keys = |x: &Tensor| key_vit.forward(x);
        let (query, key) = (colored(model), colored(keys));
        let mut term = None;
        let (outputs, key_outputs) = match lambda {
            Some(_) => {
                let out =
                    ser.forward_with_outputs_and_keys(&shared, &mut rng, query, key, &key_head);
                let out = out.unwrap();
                term = Some(out.loss);
                (out.outputs, out.key_outputs)
            }
            None => {
                let pair = sampler.sample_pair(&mut rng, 2).unwrap();
                let views = [pair.first, pair.second].map(|view| view.apply(&shared).unwrap());
                let of = |model: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
                    views.each_ref().map(|view| model(view).unwrap())
                };
                (of(&query), of(&key))
            }
        };
        let q = join(encode(&crops, model).unwrap(), Some(outputs)).unwrap();
        let k = join(encode(&crops, keys).unwrap(), Some(key_outputs)).unwrap();
        assert_eq!(q[0].dims(), [8, 16]);
        let [q1, q2] = q.map(|f| predictor.forward(&projector.forward(&f).unwrap()).unwrap());
        let [k1, k2] = k.map(|f| key_projector.forward(&f).unwrap());
        let mut loss =
            (contrast(&q1, &k2, 0, 0.2).unwrap() + contrast(&q2, &k1, 0, 0.2).unwrap()).unwrap();
        if let Some(term) = term {
            loss = (loss + term).unwrap();
        }
        optimizer.step(&loss.backward().unwrap(), 1e-2, 0.05).unwrap();
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
    let config = VitConfig { dim: 16, ..VitConfig::small(&images, 2, false).unwrap() };
    let vit = Vit::new(&config, online.builder(&CPU)).unwrap();
    let momentum = online.momentum_copy();
    let copy = Vit::new(&config, momentum.builder(&CPU)).unwrap();
    let x = images.normalized(0..2, &images.statistics(), &CPU).unwrap();
    assert_eq!(values(&vit.forward(&x).unwrap()), values(&copy.forward(&x).unwrap()));
    assert!(!copy.forward(&x).unwrap().track_op());

    let first = |weights: &Weights| values(weights.named()[0].1.as_tensor());
    let before = first(&online);
    let (_, var) = &online.named()[0];
    var.set(&(var.as_detached_tensor() + 1.0).unwrap()).unwrap();
    assert_eq!(first(&momentum), before);
    momentum.follow(&online, 0.75).unwrap();
    let moved = before.iter().map(|w| w + 0.25);
    assert!(first(&momentum).iter().zip(moved).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_ne!(values(&vit.forward(&x).unwrap()), values(&copy.forward(&x).unwrap()));
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
        (0..n).map(|_| std::array::from_fn(|_| rng.random_range(-1.0..1.0))).collect()
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
        let best = (0..4).max_by(|&a, &b| votes[a].total_cmp(&votes[b])).unwrap();
        right += usize::from(best as u32 == *label);
    }
    let tensor = |f: &[[f32; 5]]| Tensor::from_vec(f.concat(), (f.len(), 5), &CPU).unwrap();
    let bank = Bank::new(&tensor(&bank), &bank_labels).unwrap();
    let accuracy = bank.accuracy(&tensor(&queries), &query_labels).unwrap();
    assert!((accuracy - 100.0 * right as f64 / 503.0).abs() < 1e-9);

    let error = bank.accuracy(&tensor(&queries), &[0]).unwrap_err().to_string();
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

/// The first view has the colors of the first crop, the second view those of the second, in one spatial transformation.
#[test]
fn shared_images_keep_the_colors_of_both_views() {
    let crop = |offset: f32| {
        let x = Tensor::arange(0f32, 4. * 12., &CPU).unwrap();
        (x.reshape((4, 3, 2, 2)).unwrap() + f64::from(offset)).unwrap()
    };
    let crops = [crop(0.), crop(1000.)];
    let part = Partition::new(4, 0.5).unwrap();
    let (plain, shared) = views::shared(&part, &crops).unwrap();
    assert_eq!(plain[1].dims(), [2, 3, 2, 2]);
    let Some(Images::Shared(shared)) = shared else {
        panic!("expected images that both losses share");
    };
    let same = colored(|x| Ok(x.clone()));
    for crop in &crops {
        let expected = crop.narrow(0, 2, 2).unwrap();
        assert_eq!(values(&same(&shared).unwrap()), values(&expected));
    }
}

#[test]
fn weights_are_taken_over_by_name_and_shape() {
    let build = |seed| {
        let weights = Weights::seeded(seed);
        let config = VitConfig { dim: 16, ..VitConfig::small(&pictures(2, 1), 2, false).unwrap() };
        let vit = Vit::new(&config, weights.builder(&CPU).pp("encoder")).unwrap();
        (weights, vit)
    };
    let ((from, teacher), (to, vit)) = (build(0), build(1));
    let file = |weights: &Weights| -> std::collections::HashMap<String, Tensor> {
        let named = weights.named().into_iter();
        let name = |(name, var): (String, candle_core::Var)| {
            (name["encoder.".len()..].to_string(), var.as_detached_tensor())
        };
        named.map(name).collect()
    };
    let x = Tensor::ones((2, 1, 12, 12), candle_core::DType::F32, &CPU).unwrap();
    let [expected, before] = [&teacher, &vit].map(|vit| values(&vit.forward(&x).unwrap()));
    assert_ne!(expected, before);
    // Nothing changes if one name is missing, one is unknown and one shape differs.
    let mut broken = file(&from);
    let cls = broken.remove("cls").unwrap();
    broken.insert("clx".to_string(), cls);
    broken
        .insert("norm.scale".to_string(), Tensor::ones(3, candle_core::DType::F32, &CPU).unwrap());
    let error = to.load("encoder.", &broken).unwrap_err().to_string();
    for part in ["cls is missing", "clx is not in", "norm.scale: expected [16], got [3]"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(values(&vit.forward(&x).unwrap()), before);
    to.load("encoder.", &file(&from)).unwrap();
    assert_eq!(values(&vit.forward(&x).unwrap()), expected);
}

/// In f32 a sum over many values forgets what it adds: the mean of a million losses would be off in the fourth digit.
#[test]
fn means_over_many_values_keep_their_digits() {
    let value = |i: usize| 5.2441 + (i % 7) as f32 * 1e-3;
    let all = || (0..1_000_000).map(value);
    let exact = all().map(f64::from).sum::<f64>() / 1e6;
    let naive = f64::from(all().sum::<f32>() / 1e6);
    assert!((naive - exact).abs() > 1e-4, "the values must tell: {naive} {exact}");
    assert!((records::mean(all()).unwrap() - exact).abs() < 1e-9);
    assert_eq!(records::mean(std::iter::empty()), None);
    let column = Tensor::from_iter(all(), &CPU).unwrap().reshape((1_000_000, 1)).unwrap();
    let mean = values(&nn::mean_row(&column).unwrap());
    assert!((f64::from(mean[0]) - exact).abs() < 1e-6, "{mean:?} {exact}");
}
