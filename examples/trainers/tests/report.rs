//! The HTML page of a run: well formed whatever the records hold, and its token maps tell equivariance from its lack.

// Poses index several tables at once.
#![allow(clippy::needless_range_loop)]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{GridOperator, Resample, TokenGrid};
use ser_reg_trainers::{
    data::Images,
    eval::POSES,
    records::{Balanced, BalancedLayer, Epoch, Record, Step},
    report::{
        Report,
        page::{Figure, Page, Table},
        panel::Panel,
        plots::{self, Axes, BLUE, Bars, Interval, Intervals, Line, ORANGE},
    },
    vit::{Positions, Vit, VitConfig},
    weights::Weights,
};

const CPU: Device = Device::Cpu;
const SIDE: usize = 12;

fn step(step: usize) -> Step {
    let t = 1.0 / (1.0 + step as f32);
    Step {
        step,
        loss: 4.0 + t,
        invariance: 3.0 + t,
        equivariance: Some(1.0 + t),
        matching: Some(0.5),
        learning_rate: 1e-3,
        weight_decay: 0.05,
        lambda: 1.0,
        momentum: Some(0.99),
        gradient: Some(2.0),
        addon: None,
    }
}

fn epoch(epoch: usize) -> Epoch {
    Epoch {
        epoch,
        step: 10 * epoch,
        feature_std: Some(0.5),
        equivariance: [0.5, 0.6, 0.7, 0.8].map(Some).to_vec(),
        accuracy: (0..8).map(|k| 80.0 - k as f64).collect(),
        images_per_s: 1000.0,
        waiting: 0.1,
        regularizer: Some(0.2),
        extra: BTreeMap::new(),
    }
}

/// A run of the method with everything.
fn run(steps: usize, epochs: usize) -> Vec<Record> {
    let steps = (0..steps).map(|s| Record::Step(step(s)));
    steps
        .chain((0..=epochs).map(|e| Record::Epoch(epoch(e))))
        .collect()
}

fn page(records: &[Record]) -> String {
    let row = |name: &str, value: &str| (name.to_string(), value.to_string());
    let report = Report {
        title: "a method, seed 0",
        config: vec![row("seed", "0")],
        result: vec![row("accuracy", "80 %")],
        records,
        panel: None,
    };
    let html = report.html().unwrap();
    assert_well_formed(&html);
    html
}

fn plots_of(html: &str) -> usize {
    html.matches("<svg ").count()
}

/// Every element is closed in order, no number failed to be one, and nothing is fetched or run.
fn assert_well_formed(html: &str) {
    let body = html.strip_prefix("<!doctype html>\n").unwrap();
    let mut open: Vec<&str> = Vec::new();
    for part in body.split('<').skip(1) {
        let (tag, text) = part.split_once('>').expect("a tag ends");
        assert!(tag == "style" || !text.contains('>'), "unescaped: {part}");
        if let Some(name) = tag.strip_suffix('/') {
            assert!(!name.is_empty());
        } else if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closes what is not open");
        } else {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    for absent in [
        "NaN", "inf\"", "inf,", "inf<", "<script", "https:", "@import", "url(",
    ] {
        assert!(!html.contains(absent), "{absent} in the page");
    }
    let namespace = "xmlns=\"http://www.w3.org/2000/svg\"";
    assert_eq!(
        html.matches("http:").count(),
        html.matches(namespace).count()
    );
}

/// The points of each polyline.
fn polylines(svg: &str) -> Vec<Vec<(i32, i32)>> {
    let points = |part: &str| {
        let (points, _) = part.split_once('"').unwrap();
        let point = |pair: &str| {
            let (x, y) = pair.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        points.split_whitespace().map(point).collect()
    };
    svg.split(" points=\"").skip(1).map(points).collect()
}

/// An attribute of every element of a kind.
fn attributes(svg: &str, element: &str, name: &str) -> Vec<i32> {
    let value = |part: &str| -> Option<i32> {
        let (_, value) = part.split_once('>')?.0.split_once(&format!(" {name}=\""))?;
        value.split_once('"')?.0.parse().ok()
    };
    let start = format!("<{element} ");
    svg.split(&start).skip(1).filter_map(value).collect()
}

#[test]
fn a_full_run_has_every_plot() {
    let html = page(&run(300, 3));
    // Accuracy twice, equivariance, spread; losses, matching, gradient; four schedules; speed and waiting.
    assert_eq!(plots_of(&html), 13);
    for text in [
        "a method, seed 0",
        "300 steps",
        "3 epochs",
        "block 4",
        "antitr",
        "80 %",
    ] {
        assert!(html.contains(text), "{text} is missing");
    }
}

#[test]
fn plots_without_values_are_left_out() {
    // A baseline without momentum, clipping or poses.
    let records: Vec<Record> = run(300, 3)
        .into_iter()
        .map(|record| match record {
            Record::Step(step) => Record::Step(Step {
                equivariance: None,
                matching: None,
                momentum: None,
                gradient: None,
                ..step
            }),
            Record::Epoch(epoch) => Record::Epoch(Epoch {
                equivariance: vec![],
                ..epoch
            }),
            other => other,
        })
        .collect();
    let html = page(&records);
    assert_eq!(plots_of(&html), 13 - 4);
    assert!(!html.contains("before lambda<") && !html.contains("Momentum"));
}

#[test]
fn short_runs_have_a_page() {
    assert_eq!(plots_of(&page(&[])), 0);
    assert_eq!(
        plots_of(&page(&run(1, 0))),
        11,
        "the untrained encoder has no speed"
    );
    let steps_only = [Record::Step(step(0))];
    assert_eq!(plots_of(&page(&steps_only)), 7);
    let epochs_only = [Record::Epoch(epoch(1))];
    assert_eq!(plots_of(&page(&epochs_only)), 6);
    let unmeasured = [Record::Epoch(Epoch::default())];
    let html = page(&unmeasured);
    assert_eq!(plots_of(&html), 0, "an epoch that was not evaluated");
    assert!(!html.contains("What the encoder has learnt"));
}

#[test]
fn values_that_are_no_numbers_are_gaps() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -1e300] {
        let mut records = run(400, 4);
        for record in records.iter_mut().skip(1).step_by(2) {
            match record {
                Record::Step(s) => {
                    let single = bad as f32;
                    (s.loss, s.invariance) = (single, single);
                    (s.equivariance, s.matching) = (Some(single), Some(single));
                    (s.learning_rate, s.lambda, s.weight_decay) = (bad, bad, bad);
                    (s.momentum, s.gradient) = (Some(bad), Some(bad));
                }
                Record::Epoch(e) => {
                    e.feature_std = Some(bad as f32);
                    (e.equivariance[1], e.accuracy[0], e.accuracy[7]) = (Some(bad), bad, bad);
                    (e.images_per_s, e.waiting) = (bad, bad);
                    e.extra.insert("entropy".to_string(), bad);
                }
                Record::Balance(_) => {}
            }
        }
        assert_eq!(plots_of(&page(&records)), 13, "{bad}");
        let nothing = [Line::new("bad", BLUE, vec![(0.0, bad), (1.0, bad)])];
        assert!(plots::lines(&Axes::default(), &nothing).unwrap().is_none());
    }
    let mut points: Vec<_> = (0..9).map(|x| (f64::from(x), 1.0)).collect();
    let whole = [Line::new("whole", BLUE, points.clone())];
    points[4].1 = f64::NAN;
    let broken = [Line::new("broken", BLUE, points)];
    let lengths = |lines| {
        let svg = plots::lines(&Axes::default(), lines).unwrap().unwrap();
        let lines = polylines(&svg).into_iter().map(|line| line.len());
        lines.filter(|n| *n > 3).collect::<Vec<_>>()
    };
    assert_eq!(lengths(&whole), [9]);
    assert_eq!(lengths(&broken), [4, 4]);
}

#[test]
fn the_balance_of_gradients_is_drawn_where_it_was_measured() {
    let layer = |name: &str, norm_equiv, cosine| BalancedLayer {
        name: name.to_string(),
        norm_inv: Some(2.0),
        norm_equiv,
        cosine,
    };
    for bad in [None, Some(f64::NAN), Some(f64::INFINITY), Some(1e300)] {
        let balance = |step| {
            Record::Balance(Balanced {
                step,
                lambda: 1.0,
                shared: layer("shared", Some(1.0), Some(0.5)),
                layers: vec![
                    layer("block1", Some(1.0 + step as f64), Some(0.5)),
                    layer("block2", Some(0.5), Some(-0.5)),
                    layer("block3", bad, bad),
                ],
            })
        };
        let mut records = run(30, 1);
        records.extend([0, 10, 20].map(balance));
        let html = page(&records);
        assert_eq!(plots_of(&html), 13 + 2, "{bad:?}");
        assert!(html.contains("Balance of the gradients") && html.contains("block1"));
    }
    assert!(!page(&run(30, 1)).contains("Balance of the gradients"));
}

#[test]
fn a_value_stands_at_its_height() {
    let axes = Axes::default();
    let points = [(0.0, 0.0), (1.0, 1.0), (2.0, 4.0)].to_vec();
    let svg = plots::lines(&axes, &[Line::new("squares", BLUE, points)]);
    let lines = polylines(&svg.unwrap().unwrap());
    let line = lines
        .iter()
        .find(|line| line.len() == 3 && line[0].1 > line[2].1);
    let &[a, b, c] = line.unwrap().as_slice() else {
        unreachable!()
    };
    assert!((c.0 - b.0 - (b.0 - a.0)).abs() <= 1);
    assert!(
        (a.1 - c.1 - 4 * (a.1 - b.1)).abs() <= 4,
        "{a:?} {b:?} {c:?}"
    );
    // Up and down around an axis of its own, and never outside the picture.
    assert!(
        lines
            .iter()
            .flatten()
            .all(|(x, y)| (0..=1240).contains(x) && (0..=660).contains(y))
    );
}

#[test]
fn ticks_are_round_numbers() {
    let labels = |last: f64, high: f64| -> Vec<String> {
        let points = vec![(0.0, 0.0), (last, high)];
        let svg = plots::lines(&Axes::default(), &[Line::new("", BLUE, points)]);
        let svg = svg.unwrap().unwrap();
        let label = |part: &str| {
            let (_, text) = part.split_once('>').unwrap();
            text.split('<').next().unwrap().trim().to_string()
        };
        svg.split("<text").skip(1).map(label).collect()
    };
    let small = labels(12_000.0, 2e-5);
    for tick in ["0", "2,000", "12,000", "0.5e-5", "2.0e-5"] {
        assert!(small.contains(&tick.to_string()), "{tick} in {small:?}");
    }
    let usual = labels(3.0, 1.0);
    for tick in ["0", "1", "2", "3", "0.0", "0.2", "1.0"] {
        assert!(usual.contains(&tick.to_string()), "{tick} in {usual:?}");
    }
    // Epochs are whole.
    assert!(!usual.contains(&"0.5".to_string()), "{usual:?}");
    assert!(labels(3.0, 5e8).contains(&"5e8".to_string()));
    assert!(labels(3.0, 0.0).contains(&"0.0".to_string()));
}

#[test]
fn a_long_run_is_thinned_and_keeps_its_peaks() {
    let mut records = run(100_000, 2);
    let quiet = page(&records);
    assert!(quiet.len() < 1_500_000, "{} bytes", quiet.len());
    for line in polylines(&quiet) {
        assert!(line.len() <= 2000, "{} points", line.len());
    }
    let highest = |html: &str| {
        let losses = html.split("<h3>Losses</h3>").nth(1).unwrap();
        let svg = losses.split("</svg>").next().unwrap();
        let raw = polylines(svg).into_iter().find(|line| line.len() > 1500);
        let (at, (_, y)) = raw
            .unwrap()
            .into_iter()
            .enumerate()
            .min_by_key(|(_, p)| p.1)
            .unwrap();
        (at, y)
    };
    if let Record::Step(step) = &mut records[77_777] {
        (step.equivariance, step.invariance, step.loss) = (Some(50.0), 50.0, 50.0);
    }
    let (at, y) = highest(&page(&records));
    assert!(
        (1550..1560).contains(&at) && y < 120,
        "point {at} at height {y}"
    );
}

#[test]
fn the_average_follows_a_noisy_series() {
    // 1 and 3 in turn: the average is 2 throughout.
    let points = (0..400)
        .map(|x| (f64::from(x), f64::from(1 + 2 * (x % 2))))
        .collect();
    let svg = plots::lines(
        &Axes::default(),
        &[Line::new("noisy", BLUE, points).noisy()],
    );
    let long: Vec<_> = polylines(&svg.unwrap().unwrap())
        .into_iter()
        .filter(|l| l.len() == 400)
        .collect();
    let [raw, average] = long.as_slice() else {
        panic!(
            "expected a series and its average, got {} lines",
            long.len()
        )
    };
    let span = |line: &[(i32, i32)]| {
        let heights = || line.iter().map(|p| p.1);
        heights().max().unwrap() - heights().min().unwrap()
    };
    assert!(
        span(average) * 4 < span(raw),
        "{} {}",
        span(average),
        span(raw)
    );
}

#[test]
fn the_later_of_two_lines_on_a_step_holds() {
    let mut records = run(300, 3);
    let once = page(&records);
    // A run that was taken up again at step 200.
    let mut interrupted = records.split_off(200);
    for s in 200..230 {
        records.push(Record::Step(Step {
            loss: 99.0,
            ..step(s)
        }));
    }
    records.append(&mut interrupted);
    assert_eq!(page(&records), once);
}

#[test]
fn texts_are_escaped() {
    let evil = "<script>alert(\"1\")</script> & 'more' \u{7}";
    let mut last = epoch(1);
    last.extra.insert(evil.to_string(), 1.0);
    let report = Report {
        title: evil,
        config: vec![(evil.to_string(), evil.to_string())],
        result: vec![(evil.to_string(), evil.to_string())],
        records: &[Record::Epoch(last)],
        panel: None,
    };
    let html = report.html().unwrap();
    let html = html.replace('\u{7}', "");
    assert_well_formed(&html);
    assert!(
        html.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;more&#39;")
    );
}

#[test]
fn bars_grow_from_zero() {
    let bars = |name: &str, values: &[f64]| Bars {
        name: name.to_string(),
        color: BLUE,
        values: values.iter().copied().map(Some).collect(),
    };
    let series = [
        bars("first", &[50.0, 100.0]),
        bars("second", &[25.0, f64::NAN]),
    ];
    let svg = plots::bars(&Axes::default(), &["a", "b"], &series)
        .unwrap()
        .unwrap();
    let heights = attributes(&svg, "rect", "height");
    let &[a, b, c] = heights.as_slice() else {
        panic!("expected three bars, got {heights:?}")
    };
    assert!(
        (b - 2 * a).abs() <= 2 && (a - 2 * c).abs() <= 2,
        "{heights:?}"
    );
    let none = [bars("none", &[f64::NAN])];
    assert!(
        plots::bars(&Axes::default(), &["a"], &none)
            .unwrap()
            .is_none()
    );
    assert!(
        plots::bars(&Axes::default(), &[], &series)
            .unwrap()
            .is_none()
    );
}

#[test]
fn whiskers_span_their_interval() {
    let interval = |mean: f64, half: f64| Interval {
        mean,
        low: mean - half,
        high: mean + half,
        samples: vec![],
    };
    let series = [
        Intervals {
            name: "lambda = 0".to_string(),
            color: BLUE,
            values: vec![Some(interval(10.0, 1.0)), Some(interval(14.0, 2.0))],
        },
        Intervals {
            name: "lambda = 1".to_string(),
            color: ORANGE,
            values: vec![None, Some(interval(12.0, f64::NAN))],
        },
    ];
    let axes = Axes {
        y: "accuracy (%)",
        ..Default::default()
    };
    let svg = plots::interval_chart(&axes, &["upright", "turned"], &series)
        .unwrap()
        .unwrap();
    let means = attributes(&svg, "circle", "cy");
    let &[ten, fourteen, twelve] = means.as_slice() else {
        panic!("expected three means, got {means:?}")
    };
    assert!((ten - 2 * twelve + fourteen).abs() <= 2, "{means:?}");
    let upright = polylines(&svg)
        .into_iter()
        .filter(|l| l.len() == 2 && l[0].0 == l[1].0);
    let spans: Vec<i32> = upright.map(|l| (l[0].1 - l[1].1).abs()).collect();
    // The axis is one of the vertical lines.
    let unit = (ten - fourteen) as f64 / 4.0;
    for length in [2.0, 4.0] {
        let fits = |s: &&i32| (f64::from(**s) - length * unit).abs() < 3.0;
        assert_eq!(
            spans.iter().filter(fits).count(),
            1,
            "{spans:?}, unit {unit}"
        );
    }
    assert!(plots::interval_chart(&axes, &["a"], &[]).unwrap().is_none());
}

#[test]
fn a_page_is_built_from_parts() {
    let bars = [Bars {
        name: "one".to_string(),
        color: BLUE,
        values: vec![Some(1.0)],
    }];
    let mut page = Page::new("Study", "Five seeds.");
    page.section("Paired differences", "SER less its control.");
    page.figures(&[
        Figure {
            title: "Drawn",
            caption: "A caption.",
            svg: plots::bars(&Axes::default(), &["a"], &bars).unwrap(),
            wide: false,
        },
        Figure {
            title: "Left out",
            caption: "",
            svg: None,
            wide: true,
        },
    ]);
    let cells = |row: &[&str]| row.iter().map(|c| c.to_string()).collect::<Vec<_>>();
    page.tables(&[Table {
        title: "Figures",
        header: cells(&["mode", "mean", "95 %"]),
        rows: vec![cells(&["ser", "1.0", "0.5 to 1.5"])],
    }]);
    let html = page.html();
    assert_well_formed(&html);
    assert_eq!(plots_of(&html), 1);
    assert!(html.contains("<td>0.5 to 1.5</td>") && !html.contains("Left out"));
}

fn images(channels: usize) -> Images {
    let mut rng = StdRng::seed_from_u64(3);
    Images {
        pixels: (0..4 * channels * SIDE * SIDE)
            .map(|_| rng.random())
            .collect(),
        labels: vec![0; 4],
        channels,
        side: SIDE,
    }
}

fn config(channels: usize, positions: Positions) -> VitConfig {
    let config = VitConfig::small(&images(channels), 2, false).unwrap();
    VitConfig {
        dim: 16,
        positions,
        symmetric_patches: true,
        ..config
    }
}

fn panel(
    channels: usize,
    positions: Positions,
    layer: usize,
    indices: &[usize],
) -> anyhow::Result<Panel> {
    let config = config(channels, positions);
    let vit = Vit::new(&config, Weights::seeded(1).builder(&CPU))?;
    let images = images(channels);
    Panel::new(&vit, &images, indices, &images.statistics(), layer, &CPU)
}

fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).unwrap().to_rgb8().into_raw()
}

/// The largest difference of two images of one size.
fn distance(a: &[u8], b: &[u8]) -> u8 {
    let (a, b) = (pixels(a), pixels(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn aligned_maps_of_an_equivariant_encoder_are_one_map() {
    for (channels, layer) in [(1, 2), (3, 1), (3, 3)] {
        let panel = panel(channels, Positions::None, layer, &[2, 0]).unwrap();
        assert_eq!(panel.rows.len(), 2);
        for row in &panel.rows {
            for p in 0..POSES.len() {
                // A level of rounding: sums run in another order.
                assert!(
                    distance(&row.aligned[p], &row.aligned[0]) <= 1,
                    "{:?}",
                    POSES[p]
                );
                assert!((row.cosine[p].unwrap() - 1.0).abs() < 1e-4);
            }
            assert_eq!(row.seen[0], row.aligned[0]);
            assert!(
                distance(&row.seen[4], &row.seen[0]) > 20,
                "a turn moves the map as seen"
            );
            let colors = pixels(&row.seen[0]);
            let (least, most) = (colors.iter().min().unwrap(), colors.iter().max().unwrap());
            assert!(most - least > 100, "a map of one color shows nothing");
        }
        assert!(distance(&panel.rows[0].seen[0], &panel.rows[1].seen[0]) > 20);
        assert!(panel.explained > 0.0 && panel.explained <= 1.0 + 1e-9);
    }
}

#[test]
fn aligned_maps_of_an_encoder_with_positions_differ() {
    let panel = panel(1, Positions::SinCos, 2, &[1]).unwrap();
    let row = &panel.rows[0];
    for p in 1..POSES.len() {
        assert!(
            distance(&row.aligned[p], &row.aligned[0]) > 20,
            "{:?}",
            POSES[p]
        );
        assert!(row.cosine[p].unwrap() < 0.99);
    }
    assert!((row.cosine[0].unwrap() - 1.0).abs() < 1e-9);
}

#[test]
fn pictures_stand_in_their_poses() {
    let images = images(3);
    let panel = panel(3, Positions::SinCos, 1, &[3]).unwrap();
    let planes = Tensor::from_slice(images.get(3), (1, 3, SIDE, SIDE), &CPU).unwrap();
    for (p, (_, pose)) in POSES.into_iter().enumerate() {
        let grid = TokenGrid::square(SIDE).unwrap();
        let turn = GridOperator::new(&[pose], grid, &Resample::default()).unwrap();
        let rgb = turn.apply(&planes).unwrap().permute((0, 2, 3, 1)).unwrap();
        let expected: Vec<u8> = rgb.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(pixels(&panel.rows[0].picture[p]), expected, "{pose:?}");
    }
}

#[test]
fn the_panel_is_on_the_page() {
    let report = Report {
        title: "maps",
        config: vec![],
        result: vec![],
        records: &[],
        panel: Some(panel(1, Positions::SinCos, 2, &[0, 1, 2]).unwrap()),
    };
    let html = report.html().unwrap();
    assert_well_formed(&html);
    assert_eq!(
        html.matches("src=\"data:image/png;base64,").count(),
        3 * 3 * 8
    );
    assert!(html.contains("image-rendering: pixelated"));
}

#[test]
fn the_panel_says_what_it_cannot_show() {
    let error = |layer, indices: &[usize]| {
        let panel = panel(1, Positions::SinCos, layer, indices);
        format!("{:#}", panel.err().expect("an error"))
    };
    assert!(error(2, &[]).contains("expected a picture"));
    assert!(error(2, &[0, 4]).contains("expected pictures below 4, got 4"));
    assert!(error(0, &[0]).contains("got block 0"));
    assert!(error(5, &[0]).contains("got block 5"));
    assert!(error(4, &[0]).contains("block 4 keeps no map"));

    let (one, three) = (config(1, Positions::None), images(3));
    let vit = Vit::new(&one, Weights::seeded(1).builder(&CPU)).unwrap();
    let other = Panel::new(&vit, &three, &[0], &three.statistics(), 2, &CPU);
    assert!(other.err().unwrap().to_string().contains("got (3, 12)"));
    let images = images(1);
    let diverged = Panel::new(&vit, &images, &[0], &[(f32::NAN, 1.0)], 2, &CPU);
    assert!(
        diverged
            .err()
            .unwrap()
            .to_string()
            .contains("expected finite tokens")
    );
}

#[test]
fn a_constant_map_has_one_color() {
    let images = Images {
        pixels: vec![7; SIDE * SIDE],
        labels: vec![0],
        channels: 1,
        side: SIDE,
    };
    let vit = Vit::new(
        &config(1, Positions::None),
        Weights::seeded(1).builder(&CPU),
    )
    .unwrap();
    let panel = Panel::new(&vit, &images, &[0], &images.statistics(), 2, &CPU).unwrap();
    let html = Report {
        title: "flat",
        config: vec![],
        result: vec![],
        records: &[],
        panel: Some(panel),
    };
    assert_well_formed(&html.html().unwrap());
}
