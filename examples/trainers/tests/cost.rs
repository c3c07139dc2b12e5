//! The cost of the regularizer: the paper's figures, and twins that count while they compute.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{cases, rng};
use proptest::prelude::*;
use rand::Rng;
use ser_reg::{
    cost::{self, Cost, Gather, Keys, Regularizer, Training, Vit},
    loss::{self, Negatives, NtXent, SameImage},
    projector::ProjectorConfig,
    ser::{Depth, Objective, SerConfig, SerLayers, SerLoss, StopGradient},
};

const FORMS: [Negatives; 2] = [Negatives::BothViews, Negatives::OtherView];
const SIDES: [[bool; 2]; 4] = [[true, true], [true, false], [false, true], [false, false]];

#[track_caller]
fn near(got: f64, expected: f64, relative: f64) {
    let error = (got - expected).abs() / expected.abs();
    assert!(error <= relative, "{got}, not {expected}: off by {error:e}");
}

/// What METHODS 1.3 works out for MoCo-v3 with ViT-S/16 and 8 processes of 256 images, with the digits it gives.
#[test]
fn the_figures_of_the_paper() {
    let training = Training::paper().unwrap();
    near(Vit::s16().macs().unwrap(), 4.60e9, 1e-3);
    let cost = Regularizer::authors(0.01).cost(&training).unwrap();
    near(cost.base_macs(), 9.4e12, 1e-2);
    near(cost.contrast.work.macs, 68e9, 1e-3);
    assert_eq!(cost.contrast.work.macs, 6.0 * 4704f64.powi(2) * 512.0);
    assert_eq!(cost.projector.macs, 12.0 * 588.0 * 458_752.0); // "3 GMAC": 3.2
    for (fraction, digits, expected) in [
        (0.01, 4, "1.0075"),
        (0.01, 3, "1.008"),
        (0.02, 2, "1.02"),
        (0.05, 2, "1.14"),
        (0.1, 2, "1.54"),
        (0.5, 0, "14"),
    ] {
        let cost = Regularizer::authors(fraction).cost(&training).unwrap();
        let got = format!("{:.digits$}", cost.overhead());
        assert_eq!(got, expected, "fraction {fraction}");
    }
    // Encoder, heads and loss as written in the table of the module.
    let heads = 384. * 4096. + 4096. * 4096. + 4096. * 256.;
    let predictor = 2. * 256. * 4096.;
    assert_eq!(training.head_macs, heads + predictor);
    assert_eq!(training.key_head_macs, heads);
    assert_eq!(cost.encoder_macs, 256. * 8. * training.encoder_macs);
}

/// Products `(rows, inner, cols)`, as a model hands them to a library.
#[derive(Default)]
struct Products(Vec<[usize; 3]>);

impl Products {
    fn multiply(&mut self, rows: usize, inner: usize, cols: usize) {
        self.0.push([rows, inner, cols]);
    }

    /// A linear map on `tokens` rows, and its two products on the way back.
    fn linear(&mut self, tokens: usize, inputs: usize, outputs: usize, learns: bool) {
        self.multiply(tokens, inputs, outputs);
        if learns {
            self.multiply(inputs, tokens, outputs);
            self.multiply(tokens, outputs, inputs);
        }
    }

    fn macs(&self) -> f64 {
        let each = self.0.iter().map(|size| size.iter().product::<usize>());
        each.sum::<usize>() as f64
    }
}

/// A transformer, layer by layer and head by head.
fn walk(vit: &Vit, heads: usize) -> f64 {
    let mut products = Products::default();
    let (dim, head) = (vit.dim, vit.dim / heads);
    let mut tokens = (vit.side / vit.patch) * (vit.side / vit.patch);
    products.multiply(tokens, vit.channels * vit.patch * vit.patch, dim);
    for block in 1..=vit.depth {
        if block == vit.joins_after + 1 {
            tokens += vit.prefix;
        }
        let asking = match block == vit.depth && vit.first_token_last {
            true => 1,
            false => tokens,
        };
        products.multiply(asking, dim, dim); // queries
        products.multiply(tokens, dim, 2 * dim); // keys and values
        for _ in 0..heads {
            products.multiply(asking, head, tokens);
            products.multiply(asking, tokens, head);
        }
        products.multiply(asking, dim, dim);
        products.multiply(asking, dim, vit.mlp);
        products.multiply(asking, vit.mlp, dim);
    }
    products.macs()
}

#[test]
fn a_transformer_counts_as_its_products_do() {
    let small = Vit {
        side: 28,
        patch: 4,
        channels: 1,
        dim: 64,
        depth: 4,
        mlp: 128,
        prefix: 1,
        joins_after: 2,
        first_token_last: true,
    };
    for vit in [
        Vit::s16(),
        Vit {
            joins_after: 3,
            ..Vit::s16()
        },
        Vit {
            joins_after: 12,
            prefix: 5,
            ..Vit::s16()
        },
        small,
        Vit {
            first_token_last: false,
            ..small
        },
        Vit {
            depth: 1,
            joins_after: 0,
            ..small
        },
        Vit { prefix: 0, ..small },
    ] {
        assert_eq!(vit.macs().unwrap(), walk(&vit, 2), "{vit:?}");
    }
}

/// NT-Xent in plain loops over blocks of anchors, in f64, that counts the multiply–adds of each cosine and each gradient as
/// it makes them.
struct Twin {
    /// Unit tokens of both views, and the gradients with respect to them.
    units: [Vec<Vec<f64>>; 2],
    grads: [Vec<Vec<f64>>; 2],
    learns: [bool; 2],
    ids: Vec<u32>,
    rate: f64,
    loss: f64,
    macs: usize,
    exponentials: usize,
}

impl Twin {
    fn dot(&mut self, (s, i): (usize, usize), (t, j): (usize, usize)) -> f64 {
        let mut sum = 0.0;
        for (a, b) in self.units[s][i].iter().zip(&self.units[t][j]) {
            sum += a * b;
            self.macs += 1;
        }
        sum
    }

    /// Adds `weight` times one token to the gradient of another.
    fn pull(&mut self, (s, i): (usize, usize), (t, j): (usize, usize), weight: f64) {
        for (g, u) in self.grads[s][i].iter_mut().zip(&self.units[t][j]) {
            *g += weight * u;
            self.macs += 1;
        }
    }

    /// The positives, whose work is linear in the tokens and is not counted.
    fn uncounted<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.macs;
        let out = work(self);
        self.macs = before;
        out
    }

    fn directed(&mut self, anchors: usize, form: Negatives, share: f64, rows: usize) {
        let (count, positives) = (self.ids.len(), 1 - anchors);
        let sets = match form {
            Negatives::BothViews => vec![anchors, positives],
            Negatives::OtherView => vec![positives],
        };
        for start in (0..count).step_by(rows) {
            let block = start..count.min(start + rows);
            let mut weights = Vec::new();
            for i in block.clone() {
                let paired = self.uncounted(|t| t.dot((anchors, i), (positives, i)));
                let positive = (paired * self.rate).exp();
                let mut row = Vec::new();
                for &set in &sets {
                    for j in 0..count {
                        let cosine = self.dot((anchors, i), (set, j));
                        self.exponentials += 1;
                        let seen = self.ids[i] != self.ids[j];
                        row.push(if seen {
                            (cosine * self.rate).exp()
                        } else {
                            0.0
                        });
                    }
                }
                let negatives: f64 = row.iter().sum();
                let total = positive + negatives;
                self.loss += share * (total / positive).ln();
                let scale = share * self.rate / total;
                row.iter_mut().for_each(|e| *e *= scale);
                self.uncounted(|t| {
                    t.pull((anchors, i), (positives, i), -scale * negatives);
                    t.pull((positives, i), (anchors, i), -scale * negatives);
                });
                weights.push(row);
            }
            if self.learns[anchors] {
                for (i, row) in block.clone().zip(&weights) {
                    for (k, &weight) in row.iter().enumerate() {
                        self.pull((anchors, i), (sets[k / count], k % count), weight);
                    }
                }
            }
            for (k, &set) in sets
                .iter()
                .enumerate()
                .filter(|(_, s)| self.learns[**s])
                .collect::<Vec<_>>()
            {
                for (i, row) in block.clone().zip(&weights) {
                    for j in 0..count {
                        self.pull((set, j), (anchors, i), row[k * count + j]);
                    }
                }
            }
        }
    }

    /// Every pair of tokens that a block of rows meets: the square on the diagonal, what lies right of it, the other view.
    fn cells(&self, form: Negatives, rows: usize) -> Vec<([usize; 2], [usize; 2], bool)> {
        let count = self.ids.len();
        let mut cells = Vec::new();
        for side in [0, 1] {
            for i in 0..count {
                let start = i / rows * rows;
                if form == Negatives::BothViews {
                    for j in start..count {
                        cells.push(([side, i], [side, j], j < start + rows));
                    }
                }
                if side == 0 {
                    cells.extend((0..count).map(|j| ([0, i], [1, j], false)));
                }
            }
        }
        cells
    }

    fn symmetric(&mut self, form: Negatives, share: f64, rows: usize) {
        let count = self.ids.len();
        let cells = self.cells(form, rows);
        let mut negatives = [vec![0.0; count], vec![0.0; count]];
        for &([s, i], [t, j], square) in &cells {
            let cosine = self.dot((s, i), (t, j));
            self.exponentials += 1;
            if self.ids[i] != self.ids[j] {
                let e = (cosine * self.rate).exp();
                negatives[s][i] += e;
                if !square {
                    negatives[t][j] += e;
                }
            }
        }
        let mut scale = [vec![0.0; count], vec![0.0; count]];
        for side in [0, 1] {
            for i in 0..count {
                let paired = self.uncounted(|t| t.dot((0, i), (1, i)));
                let positive = (paired * self.rate).exp();
                let total = positive + negatives[side][i];
                self.loss += share * (total / positive).ln();
                scale[side][i] = share * self.rate / total;
                let pull = -scale[side][i] * negatives[side][i];
                self.uncounted(|t| {
                    t.pull((0, i), (1, i), pull);
                    t.pull((1, i), (0, i), pull);
                });
            }
        }
        for ([s, i], [t, j], square) in cells {
            if !(self.learns[s] || self.learns[t]) {
                continue;
            }
            // One block of rows across is found made, from the first pass.
            let cosine = match s != t && i < rows {
                true => self.uncounted(|twin| twin.dot((s, i), (t, j))),
                false => self.dot((s, i), (t, j)),
            };
            self.exponentials += 1;
            let e = match self.ids[i] == self.ids[j] {
                true => 0.0,
                false => (cosine * self.rate).exp(),
            };
            let weight = (scale[s][i] + scale[t][j]) * e;
            if self.learns[s] {
                self.pull((s, i), (t, j), weight);
            }
            if self.learns[t] && !square {
                self.pull((t, j), (s, i), weight);
            }
        }
    }
}

/// The count is that of loops whose value and gradient are those of the loss.
#[test]
fn the_contrast_counts_as_loops_that_compute_it() {
    let (images, tokens, width) = (3, 5, 7);
    let count = images * tokens;
    for (form, symmetric, learns) in FORMS
        .iter()
        .flat_map(|f| [false, true].map(|s| (f, s)))
        .flat_map(|(f, s)| SIDES.map(|l| (*f, s, l)))
    {
        for rows in [1, 4, 15] {
            let columns = match (symmetric, form) {
                (false, Negatives::BothViews) => 2 * count,
                _ => count,
            };
            let config = NtXent {
                form,
                symmetric,
                block_bytes: rows * columns * 4 + 3,
                ..Default::default()
            };
            let mut rng = rng(3);
            let mut draw = || -> Vec<Vec<f64>> {
                let row = |_| (0..width).map(|_| rng.random_range(-1.0..1.0)).collect();
                (0..count).map(row).collect()
            };
            let values = [draw(), draw()];
            let norms = values.each_ref().map(|set| -> Vec<f64> {
                let norm =
                    |x: &Vec<f64>| (x.iter().map(|v| v * v).sum::<f64>() + config.eps).sqrt();
                set.iter().map(norm).collect()
            });
            let unit = |s: usize| -> Vec<Vec<f64>> {
                let rows = values[s].iter().zip(&norms[s]);
                rows.map(|(x, n)| x.iter().map(|v| v / n).collect())
                    .collect()
            };
            let mut twin = Twin {
                units: [unit(0), unit(1)],
                grads: [0, 1].map(|_| vec![vec![0.0; width]; count]),
                learns,
                ids: (0..count).map(|i| (i / tokens) as u32).collect(),
                rate: 1.0 / config.temperature,
                loss: 0.0,
                macs: 0,
                exponentials: 0,
            };
            match symmetric {
                true => twin.symmetric(form, 0.5 / count as f64, rows),
                false => twin.directed(0, form, 1.0 / count as f64, rows),
            }

            let case = format!("{form:?}, symmetric {symmetric}, learns {learns:?}, {rows} rows");
            let cost = cost::nt_xent(count, width, &config, learns).unwrap();
            assert_eq!(cost.work.macs, twin.macs as f64, "{case}");
            assert_eq!(cost.exponentials, twin.exponentials as f64, "{case}");

            let shape = (images, tokens, width);
            let tensor =
                |s: usize| Tensor::from_vec(values[s].concat(), shape, &Device::Cpu).unwrap();
            let vars = [0, 1].map(|s| Var::from_tensor(&tensor(s)).unwrap());
            let input = |s: usize| match learns[s] {
                true => vars[s].as_tensor().clone(),
                false => tensor(s),
            };
            let out = loss::nt_xent(&input(0), &input(1), &config).unwrap();
            near(out.loss.to_scalar::<f64>().unwrap(), twin.loss, 1e-12);
            if learns == [false, false] {
                continue;
            }
            let grads = out.loss.backward().unwrap();
            for s in [0, 1].into_iter().filter(|&s| learns[s]) {
                let got = grads.get(&vars[s]).unwrap().flatten_all().unwrap();
                let got = got.to_vec1::<f64>().unwrap();
                for i in 0..count {
                    let (g, u) = (&twin.grads[s][i], &twin.units[s][i]);
                    let radial: f64 = g.iter().zip(u).map(|(g, u)| g * u).sum();
                    for d in 0..width {
                        let expected = (g[d] - radial * u[d]) / norms[s][i];
                        let error = (got[i * width + d] - expected).abs();
                        assert!(error < 1e-12, "{case}: {error:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn cold_temperatures_run_both_ways_one_by_one() {
    let config = NtXent {
        temperature: 0.02,
        ..Default::default()
    };
    let one = NtXent {
        symmetric: false,
        ..config
    };
    let (both, one) = (
        cost::nt_xent(30, 8, &config, [true, true]).unwrap(),
        cost::nt_xent(30, 8, &one, [true, true]).unwrap(),
    );
    assert_eq!(both.work.macs, 2.0 * one.work.macs);
    assert_eq!(both.gradient, one.gradient);
}

/// `tests/loss_memory.rs` measures 26 MiB at (16, 196, 512), and bounds four times the tokens by 80.
#[test]
fn memory_is_what_was_measured() {
    let config = NtXent {
        symmetric: false,
        ..Default::default()
    };
    let mib = |tokens| {
        let cost = cost::nt_xent(tokens, 512, &config, [true, true]).unwrap();
        cost.memory.total() / 1048576.0
    };
    near(mib(16 * 196), 26.0, 0.05);
    assert!(mib(4 * 16 * 196) < 64.0);
    // Linear in the tokens beside the block.
    let slope = (mib(64_000) / mib(4_000)).log2() / 16f64.log2();
    assert!(slope < 1.0, "{slope}");
}

fn small() -> Training {
    Training {
        encoder_macs: 1e6,
        head_macs: 1e4,
        key_head_macs: 5e3,
        loss_macs: 1e3,
        batch: 32,
        processes: 3,
        views: 2,
        key_views: 2,
    }
}

/// `SerLoss` and its relatives, one product after the other.
fn replay(regularizer: &Regularizer, training: &Training) -> [f64; 3] {
    let ser = &regularizer.ser;
    let images = (regularizer.fraction * training.batch as f64).round() as usize;
    let cells = images * regularizer.tokens;
    let stop = ser.stop_gradient;
    let directions: &[[usize; 2]] = match ser.symmetric {
        true => &[[1, 0], [0, 1]],
        false => &[[1, 0]],
    };
    let momentum = regularizer.keys != Keys::Trained;
    let key_learns = regularizer.keys != Keys::Momentum && stop != StopGradient::Keys;
    let anchor_learns = stop != StopGradient::Anchors;

    // Maps of views 0 and 1 out of the trained encoder, then of the momentum encoder: who gets a gradient from a direction?
    let mut learns = [false; 4];
    for &[anchor, key] in directions {
        learns[anchor] |= anchor_learns;
        learns[if momentum { 2 + key } else { key }] |= key_learns;
    }
    let mut projector = Products::default();
    let mut width = regularizer.channels;
    if let Some(head) = ser.projector {
        for &learns in &learns[..if momentum { 4 } else { 2 }] {
            projector.linear(cells, regularizer.channels, head.hidden, learns);
            projector.linear(cells, head.hidden, head.out, learns);
        }
        width = head.out;
    }
    let (mut alignment, mut contrast) = (Products::default(), Products::default());
    for _ in directions {
        alignment.multiply(cells, regularizer.token_taps, width);
        if key_learns {
            alignment.multiply(cells, regularizer.token_taps, width);
        }
        let anchors = ser.max_tokens.unwrap_or(usize::MAX).min(cells);
        let (anchors, foreign) = match regularizer.gather {
            Gather::Own => (anchors, 0),
            Gather::Candidates => (anchors, anchors * (training.processes - 1)),
            Gather::All => (anchors * training.processes, 0),
        };
        let Objective::NtXent { form, .. } = ser.objective else {
            contrast.multiply(anchors, 1, width);
            [anchor_learns, key_learns]
                .into_iter()
                .filter(|l| *l)
                .for_each(|_| contrast.multiply(anchors, 1, width));
            continue;
        };
        let keys = [(anchors, key_learns), (foreign, false)];
        let own = [(anchors, anchor_learns), (foreign, false)];
        let sets = match form {
            Negatives::BothViews => [own, keys].concat(),
            Negatives::OtherView => keys.to_vec(),
        };
        for (candidates, learns) in sets {
            contrast.multiply(anchors, width, candidates);
            if anchor_learns {
                contrast.multiply(anchors, candidates, width);
            }
            if learns {
                contrast.multiply(candidates, anchors, width);
            }
        }
    }
    [projector.macs(), alignment.macs(), contrast.macs()]
}

fn regularizer() -> impl Strategy<Value = Regularizer> {
    let objective = prop_oneof![
        Just(Negatives::BothViews).prop_map(|form| Objective::NtXent {
            form,
            same_image: SameImage::Exclude
        }),
        Just(Negatives::OtherView).prop_map(|form| Objective::NtXent {
            form,
            same_image: SameImage::Keep
        }),
        Just(Objective::Cosine),
        Just(Objective::Mse),
    ];
    let stop = prop_oneof![
        Just(StopGradient::None),
        Just(StopGradient::Keys),
        Just(StopGradient::Anchors)
    ];
    let keys = prop_oneof![
        Just(Keys::Trained),
        Just(Keys::Momentum),
        Just(Keys::SharedHead)
    ];
    let gather = prop_oneof![
        Just(Gather::Own),
        Just(Gather::Candidates),
        Just(Gather::All)
    ];
    let head = prop::option::of((1usize..9, 1usize..9, any::<bool>()));
    let sizes = (
        0.0625f64..1.0,
        1usize..9,
        1usize..9,
        0usize..9,
        prop::option::of(2usize..80),
    );
    (objective, stop, keys, gather, head, sizes, any::<bool>()).prop_map(
        |(objective, stop_gradient, keys, gather, head, sizes, symmetric)| {
            let (fraction, tokens, channels, taps, max_tokens) = sizes;
            Regularizer {
                fraction,
                tokens,
                channels,
                ser: SerConfig {
                    objective,
                    stop_gradient,
                    symmetric,
                    max_tokens,
                    projector: head.map(|(hidden, out, norm)| ProjectorConfig {
                        hidden,
                        out,
                        norm,
                    }),
                    ..Default::default()
                },
                keys,
                gather,
                token_taps: taps,
                image_taps: taps + 1,
                pixels: 12,
            }
        },
    )
}

fn parts(cost: &Cost) -> [f64; 3] {
    [
        cost.projector.macs,
        cost.alignment.macs,
        cost.contrast.work.macs,
    ]
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn the_loss_counts_as_its_products_do(regularizer in regularizer()) {
        let training = small();
        let cost = regularizer.cost(&training).unwrap();
        prop_assert_eq!(parts(&cost), replay(&regularizer, &training));
        let images = (regularizer.fraction * 32.0).round();
        prop_assert_eq!(cost.geometry.macs, 2.0 * images * 12.0 * regularizer.image_taps as f64);
        let sum = parts(&cost).iter().sum::<f64>() + cost.geometry.macs;
        prop_assert_eq!(cost.regularizer_macs(), sum);
        prop_assert_eq!(cost.regularizer_flops(), 2.0 * sum);
        prop_assert_eq!(cost.contrast.work.flops(), 2.0 * cost.contrast.work.macs);
        let base = 32.0 * (8.0 * 1e6 + 6.0 * 1e4 + 2.0 * 5e3) + 1e3;
        prop_assert_eq!(cost.base_macs(), base);
        prop_assert!((cost.overhead() - (base + sum) / base).abs() < 1e-12);
        prop_assert!(cost.regularizer_bytes().is_finite() && cost.regularizer_bytes() > 0.0);
    }

    /// More of anything costs no less.
    #[test]
    fn cost_is_monotone(regularizer in regularizer(), which in 0usize..8) {
        let mut training = small();
        let before = regularizer.cost(&training).unwrap();
        let mut more = regularizer;
        match which {
            0 => more.fraction = (more.fraction + 0.1).min(1.0),
            1 => more.tokens += 1,
            2 => more.channels += 1,
            3 => more.token_taps += 1,
            4 => more.ser.projector.iter_mut().for_each(|head| head.hidden += 1),
            5 => more.ser.projector.iter_mut().for_each(|head| head.out += 1),
            6 => training.processes += 1,
            _ => more.pixels += 1,
        }
        let after = more.cost(&training).unwrap();
        for (a, b) in parts(&before).iter().zip(parts(&after)) {
            prop_assert!(*a <= b, "{} after {}", b, a);
        }
        prop_assert!(before.regularizer_macs() <= after.regularizer_macs());
        prop_assert!(before.regularizer_bytes() <= after.regularizer_bytes());
    }
}

#[test]
fn what_grows_and_how() {
    let training = Training {
        batch: 4096,
        ..Training::paper().unwrap()
    };
    let base = Regularizer {
        fraction: 64.0 / 4096.0,
        ..Default::default()
    };
    let of = |r: Regularizer| r.cost(&training).unwrap();
    let grows = |r: Regularizer, projector: f64, contrast: f64| {
        let (a, b) = (of(base), of(r));
        assert_eq!(b.projector.macs / a.projector.macs, projector, "{r:?}");
        assert_eq!(
            b.contrast.work.macs / a.contrast.work.macs,
            contrast,
            "{r:?}"
        );
        assert_eq!(b.encoder_macs, a.encoder_macs);
    };
    grows(
        Regularizer {
            fraction: 16.0 * base.fraction,
            ..base
        },
        16.0,
        256.0,
    );
    grows(
        Regularizer {
            tokens: 4 * base.tokens,
            ..base
        },
        4.0,
        16.0,
    );
    let gather = Gather::All;
    grows(Regularizer { gather, ..base }, 1.0, 64.0);
    // Own anchors against the candidates of eight processes: 2 + 2 products of all, 1 of the own.
    let gather = Gather::Candidates;
    grows(Regularizer { gather, ..base }, 1.0, (4.0 * 8.0 + 1.0) / 5.0);
    let head = ProjectorConfig {
        out: 1024,
        ..Default::default()
    };
    let ser = SerConfig {
        projector: Some(head),
        ..base.ser
    };
    grows(
        Regularizer { ser, ..base },
        (384. + 1024.) / (384. + 512.),
        2.0,
    );
    // A cap bounds the contrast, and nothing else.
    let ser = SerConfig {
        max_tokens: Some(64 * 196 / 4),
        ..base.ser
    };
    grows(Regularizer { ser, ..base }, 1.0, 1.0 / 16.0);
    let (one, two) = (
        of(base),
        of(Regularizer {
            fraction: 2.0 * base.fraction,
            ..base
        }),
    );
    assert_eq!(one.anchors, 64.0 * 196.0);
    assert_eq!(
        two.contrast.memory.unit_rows,
        2.0 * one.contrast.memory.unit_rows
    );
    assert!(two.contrast.memory.block <= base.ser.block_bytes as f64);
    // With the base method the base only grows.
    let twice = Training {
        encoder_macs: 2.0 * training.encoder_macs,
        ..training
    };
    assert_eq!(
        base.cost(&twice).unwrap().encoder_macs,
        2.0 * one.encoder_macs
    );
}

#[test]
fn the_contrast_takes_over_where_it_is_said_to() {
    for (regularizer, batch) in [
        (Regularizer::default(), 256),
        (
            Regularizer {
                keys: Keys::Trained,
                ..Default::default()
            },
            2000,
        ),
        (
            Regularizer {
                tokens: 49,
                channels: 64,
                ..Default::default()
            },
            4096,
        ),
    ] {
        let training = Training {
            batch,
            ..Training::paper().unwrap()
        };
        let at = |images: f64| {
            let fraction = images / batch as f64;
            Regularizer {
                fraction,
                ..regularizer
            }
            .cost(&training)
            .unwrap()
        };
        let cost = at(2.0);
        let lead = cost.images_until_contrast_leads().unwrap();
        let linear = |c: &Cost| c.projector.macs + c.alignment.macs + c.geometry.macs;
        let (below, above) = (at(lead.floor()), at(lead.ceil()));
        assert!(below.contrast.work.macs < linear(&below), "{lead}");
        assert!(above.contrast.work.macs > linear(&above), "{lead}");
        let doubles = cost.images_until_contrast_doubles().unwrap();
        let (below, above) = (at(doubles.floor()), at(doubles.ceil()));
        assert!(below.contrast.work.macs < below.base_macs(), "{doubles}");
        assert!(above.contrast.work.macs > above.base_macs(), "{doubles}");
        // Whatever the fraction it was asked at, and whatever the cap.
        near(at(30.0).images_until_contrast_leads().unwrap(), lead, 1e-12);
        let ser = SerConfig {
            max_tokens: Some(100),
            ..regularizer.ser
        };
        let fraction = 40.0 / batch as f64;
        let capped = Regularizer {
            ser,
            fraction,
            ..regularizer
        }
        .cost(&training)
        .unwrap();
        near(capped.images_until_contrast_leads().unwrap(), lead, 1e-12);
    }
    let ser = SerConfig {
        objective: Objective::Cosine,
        ..Default::default()
    };
    let cost = Regularizer {
        ser,
        ..Default::default()
    }
    .cost(&Training::paper().unwrap())
    .unwrap();
    assert_eq!(cost.images_until_contrast_leads(), None);
    assert_eq!(cost.images_until_contrast_doubles(), None);
}

#[test]
fn lambda_zero_leaves_the_views() {
    let ser = SerConfig {
        lambda: 0.0,
        ..Default::default()
    };
    let cost = Regularizer {
        ser,
        ..Default::default()
    }
    .cost(&Training::paper().unwrap())
    .unwrap();
    assert_eq!(parts(&cost), [0.0; 3]);
    assert_eq!(cost.regularizer_macs(), cost.geometry.macs);
    assert!(cost.geometry.macs > 0.0 && cost.overhead() < 1.00001);
}

#[test]
fn bad_input_is_refused() {
    let training = Training::paper().unwrap();
    let refused = |r: Regularizer, t: Training, parts: &[&str]| {
        let said = r.cost(&t).unwrap_err().to_string();
        for part in parts {
            assert!(said.contains(part), "expected {part:?} in {said:?}");
        }
    };
    let good = Regularizer::default();
    for (fraction, got) in [
        (-0.1, "-0.1"),
        (1.5, "1.5"),
        (f64::NAN, "NaN"),
        (0.0, "leaves 0"),
        (0.005, "leaves 1"),
    ] {
        refused(
            Regularizer { fraction, ..good },
            training,
            &["Partition::ratio", "expected a fraction", got],
        );
    }
    refused(
        Regularizer { tokens: 0, ..good },
        training,
        &["Regularizer::tokens", "at least 1", "got 0"],
    );
    refused(
        Regularizer {
            channels: 0,
            ..good
        },
        training,
        &["Regularizer::channels"],
    );
    let ser = |ser| Regularizer { ser, ..good };
    let head = ProjectorConfig {
        hidden: 0,
        ..Default::default()
    };
    refused(
        ser(SerConfig {
            projector: Some(head),
            ..good.ser
        }),
        training,
        &["ProjectorConfig::hidden"],
    );
    let head = ProjectorConfig {
        out: 0,
        ..Default::default()
    };
    refused(
        ser(SerConfig {
            projector: Some(head),
            ..good.ser
        }),
        training,
        &["ProjectorConfig::out"],
    );
    refused(
        ser(SerConfig {
            temperature: 0.0,
            ..good.ser
        }),
        training,
        &["temperature"],
    );
    refused(
        ser(SerConfig {
            max_tokens: Some(1),
            ..good.ser
        }),
        training,
        &["max_tokens"],
    );
    refused(
        ser(SerConfig {
            block_bytes: 0,
            ..good.ser
        }),
        training,
        &["block_bytes"],
    );
    refused(
        good,
        Training {
            batch: 0,
            ..training
        },
        &["Training::batch"],
    );
    refused(
        good,
        Training {
            processes: 0,
            ..training
        },
        &["Training::processes"],
    );
    refused(
        good,
        Training {
            views: 0,
            ..training
        },
        &["Training::views"],
    );
    for encoder_macs in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(
            good,
            Training {
                encoder_macs,
                ..training
            },
            &["Training::encoder_macs", "multiply–adds"],
        );
    }
    refused(
        good,
        Training {
            head_macs: -1.0,
            ..training
        },
        &["Training::head_macs"],
    );
    refused(
        good,
        Training {
            key_head_macs: f64::NAN,
            ..training
        },
        &["Training::key_head_macs"],
    );
    refused(
        good,
        Training {
            loss_macs: -1.0,
            ..training
        },
        &["Training::loss_macs"],
    );

    let vit = |vit: Vit, part: &str| {
        let said = vit.macs().unwrap_err().to_string();
        assert!(said.contains(part), "expected {part:?} in {said:?}");
    };
    let s16 = Vit::s16();
    vit(
        Vit { side: 0, ..s16 },
        "Vit::side: expected a size of at least 1, got 0",
    );
    vit(Vit { patch: 0, ..s16 }, "Vit::patch");
    vit(Vit { channels: 0, ..s16 }, "Vit::channels");
    vit(Vit { dim: 0, ..s16 }, "Vit::dim");
    vit(Vit { depth: 0, ..s16 }, "Vit::depth");
    vit(Vit { mlp: 0, ..s16 }, "Vit::mlp");
    vit(
        Vit { side: 225, ..s16 },
        "a multiple of the patch size 16, got 225",
    );
    vit(
        Vit {
            joins_after: 13,
            ..s16
        },
        "at most the depth, 12, got 13",
    );

    let pair = |tokens, width, config: NtXent, part: &str| {
        let said = cost::nt_xent(tokens, width, &config, [true, true])
            .unwrap_err()
            .to_string();
        assert!(said.contains(part), "expected {part:?} in {said:?}");
    };
    pair(
        0,
        8,
        NtXent::default(),
        "tokens: expected a size of at least 1",
    );
    pair(8, 0, NtXent::default(), "width");
    pair(
        8,
        8,
        NtXent {
            temperature: -1.0,
            ..Default::default()
        },
        "temperature",
    );
    // Sizes that no machine holds are numbers all the same.
    let huge = cost::nt_xent(usize::MAX, usize::MAX, &NtXent::default(), [true, true]).unwrap();
    assert!(huge.work.macs.is_finite() && huge.memory.total().is_finite());
    assert!(
        Vit {
            side: 1 << 40,
            patch: 1,
            ..s16
        }
        .macs()
        .unwrap()
        .is_finite()
    );
}

/// Each layer costs what it would by itself; views are made once, and a layer that weighs nothing costs nothing.
#[test]
fn a_loss_at_several_layers() {
    let training = Training::paper().unwrap();
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let narrow = SerConfig {
        projector: None,
        symmetric: false,
        ..Default::default()
    };
    let loss = |config, channels, name| SerLoss::new(config, channels, vb.pp(name)).unwrap();
    let ser = SerLayers::from_losses([
        ("early", 1.0, loss(SerConfig::default(), 384, "early")),
        ("off", 0.0, loss(SerConfig::default(), 384, "off")),
        ("late", 0.5, loss(narrow, 96, "late")),
    ])
    .unwrap();
    let regularizer = Regularizer::default();
    let costs = regularizer
        .by_layer(&ser, &[196, 196, 49], &training)
        .unwrap();
    let names: Vec<&str> = costs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["early", "off", "late"]);
    assert_eq!(costs[0].1, regularizer.cost(&training).unwrap());
    assert_eq!(costs[1].1.regularizer_macs(), 0.0);
    let late = Regularizer {
        tokens: 49,
        channels: 96,
        ser: narrow,
        pixels: 0,
        ..regularizer
    };
    assert_eq!(costs[2].1, late.cost(&training).unwrap());
    assert!(costs[2].1.regularizer_macs() > 0.0);

    let same = [("a", 384), ("b", 384)];
    let same = SerLayers::new(SerConfig::default(), &same, Depth::Constant, vb.pp("same")).unwrap();
    let costs = regularizer.by_layer(&same, &[196], &training).unwrap();
    let views = costs[0].1.geometry.macs;
    assert!(views > 0.0 && costs[1].1.geometry.macs == 0.0);
    assert_eq!(
        costs[0].1.regularizer_macs() - views,
        costs[1].1.regularizer_macs()
    );
    let wrong = regularizer.by_layer(&ser, &[196, 49], &training);
    let said = wrong.unwrap_err().to_string();
    assert!(said.contains("tokens of 1 or 3 layers"), "{said}");
    let none = regularizer.by_layer(&same, &[0], &training).unwrap_err();
    assert!(none.to_string().contains("tokens"), "{none}");
}
