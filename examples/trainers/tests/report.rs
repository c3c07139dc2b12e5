//! The HTML pages of runs: they are well formed whatever the records hold, and their token maps show whether an encoder is
//! equivariant.

// Transforms index several tables at once.
#![allow(clippy::needless_range_loop)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use candle_core::{Device, Tensor};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{GridOperator, Resample, TokenGrid};
use ser_reg_trainers::{
    cli::Args,
    data::Images,
    encoder::{self, Card, Network},
    eval::POSES,
    records::{Balanced, BalancedLayer, Epoch, Record, Step},
    report::{
        Report,
        compare::Comparison,
        folder::Folder,
        kept,
        page::{Figure, Page, Table},
        panel::Panel,
        plots::{self, Axes, BLUE, Bars, Interval, Intervals, Line, ORANGE},
        scores::{self, Scores},
    },
    run::finish::{Outcome, Reference},
    settings::{Method, Settings},
    study::ledger,
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
    steps.chain((0..=epochs).map(|e| Record::Epoch(epoch(e)))).collect()
}

fn page(records: &[Record]) -> String {
    let row = |name: &str, value: &str| (name.to_string(), value.to_string());
    let report = Report {
        title: "a method, seed 0",
        scores: no_scores(),
        notes: &[],
        config: vec![row("seed", "0")],
        result: vec![row("accuracy", "80 %")],
        records,
        panel: None,
    };
    let html = report.html().unwrap();
    assert_well_formed(&html);
    html
}

fn no_scores() -> Table<'static> {
    scores::table("What SER changed", Some(2), &[])
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
    for absent in ["NaN", "inf\"", "inf,", "inf<", "<script", "https:", "@import", "url("] {
        assert!(!html.contains(absent), "{absent} in the page");
    }
    let namespace = "xmlns=\"http://www.w3.org/2000/svg\"";
    assert_eq!(html.matches("http:").count(), html.matches(namespace).count());
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
    for text in ["a method, seed 0", "300 steps", "3 epochs", "block 4", "antitr", "80 %"] {
        assert!(html.contains(text), "{text} is missing");
    }
}

#[test]
fn plots_without_values_are_left_out() {
    // A baseline without momentum, clipping or views.
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
            Record::Epoch(epoch) => Record::Epoch(Epoch { equivariance: vec![], ..epoch }),
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
    assert_eq!(plots_of(&page(&run(1, 0))), 11, "the untrained encoder has no speed");
    let steps_only = [Record::Step(step(0))];
    assert_eq!(plots_of(&page(&steps_only)), 7);
    let epochs_only = [Record::Epoch(epoch(1))];
    assert_eq!(plots_of(&page(&epochs_only)), 6);
    let unmeasured = [Record::Epoch(Epoch::default())];
    let html = page(&unmeasured);
    assert_eq!(plots_of(&html), 0, "an epoch that was not evaluated");
    assert!(!html.contains("Accuracy and equivariance by epoch"));
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
    let line = lines.iter().find(|line| line.len() == 3 && line[0].1 > line[2].1);
    let &[a, b, c] = line.unwrap().as_slice() else { unreachable!() };
    assert!((c.0 - b.0 - (b.0 - a.0)).abs() <= 1);
    assert!((a.1 - c.1 - 4 * (a.1 - b.1)).abs() <= 4, "{a:?} {b:?} {c:?}");
    // Up and down around an axis of its own, and never outside the plot.
    assert!(lines.iter().flatten().all(|(x, y)| (0..=1240).contains(x) && (0..=660).contains(y)));
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
        let (at, (_, y)) = raw.unwrap().into_iter().enumerate().min_by_key(|(_, p)| p.1).unwrap();
        (at, y)
    };
    if let Record::Step(step) = &mut records[77_777] {
        (step.equivariance, step.invariance, step.loss) = (Some(50.0), 50.0, 50.0);
    }
    let (at, y) = highest(&page(&records));
    assert!((1550..1560).contains(&at) && y < 120, "point {at} at height {y}");
}

#[test]
fn the_average_follows_a_noisy_series() {
    // 1 and 3 in turn: the average is 2 throughout.
    let points = (0..400).map(|x| (f64::from(x), f64::from(1 + 2 * (x % 2)))).collect();
    let svg = plots::lines(&Axes::default(), &[Line::new("noisy", BLUE, points).noisy()]);
    let long: Vec<_> =
        polylines(&svg.unwrap().unwrap()).into_iter().filter(|l| l.len() == 400).collect();
    let [raw, average] = long.as_slice() else {
        panic!("expected a series and its average, got {} lines", long.len())
    };
    let span = |line: &[(i32, i32)]| {
        let heights = || line.iter().map(|p| p.1);
        heights().max().unwrap() - heights().min().unwrap()
    };
    assert!(span(average) * 4 < span(raw), "{} {}", span(average), span(raw));
}

#[test]
fn the_later_of_two_lines_on_a_step_holds() {
    let mut records = run(300, 3);
    let once = page(&records);
    // A run that was taken up again at step 200.
    let mut interrupted = records.split_off(200);
    for s in 200..230 {
        records.push(Record::Step(Step { loss: 99.0, ..step(s) }));
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
        scores: no_scores(),
        notes: &[],
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
    let series = [bars("first", &[50.0, 100.0]), bars("second", &[25.0, f64::NAN])];
    let svg = plots::bars(&Axes::default(), &["a", "b"], &series).unwrap().unwrap();
    let heights = attributes(&svg, "rect", "height");
    let &[a, b, c] = heights.as_slice() else { panic!("expected three bars, got {heights:?}") };
    assert!((b - 2 * a).abs() <= 2 && (a - 2 * c).abs() <= 2, "{heights:?}");
    let none = [bars("none", &[f64::NAN])];
    assert!(plots::bars(&Axes::default(), &["a"], &none).unwrap().is_none());
    assert!(plots::bars(&Axes::default(), &[], &series).unwrap().is_none());
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
    let axes = Axes { y: "accuracy (%)", ..Default::default() };
    let svg = plots::interval_chart(&axes, &["upright", "turned"], &series).unwrap().unwrap();
    let means = attributes(&svg, "circle", "cy");
    let &[ten, fourteen, twelve] = means.as_slice() else {
        panic!("expected three means, got {means:?}")
    };
    assert!((ten - 2 * twelve + fourteen).abs() <= 2, "{means:?}");
    let upright = polylines(&svg).into_iter().filter(|l| l.len() == 2 && l[0].0 == l[1].0);
    let spans: Vec<i32> = upright.map(|l| (l[0].1 - l[1].1).abs()).collect();
    // The axis is one of the vertical lines.
    let unit = (ten - fourteen) as f64 / 4.0;
    for length in [2.0, 4.0] {
        let fits = |s: &&i32| (f64::from(**s) - length * unit).abs() < 3.0;
        assert_eq!(spans.iter().filter(fits).count(), 1, "{spans:?}, unit {unit}");
    }
    assert!(plots::interval_chart(&axes, &["a"], &[]).unwrap().is_none());
}

#[test]
fn a_page_is_built_from_parts() {
    let bars = [Bars { name: "one".to_string(), color: BLUE, values: vec![Some(1.0)] }];
    let mut page = Page::new("Study", "Five seeds.");
    page.section("Paired differences", "SER less its control.");
    page.figures(&[
        Figure {
            title: "Drawn",
            caption: "A caption.",
            svg: plots::bars(&Axes::default(), &["a"], &bars).unwrap(),
            wide: false,
        },
        Figure { title: "Left out", caption: "", svg: None, wide: true },
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
        pixels: (0..4 * channels * SIDE * SIDE).map(|_| rng.random()).collect(),
        labels: vec![0; 4],
        channels,
        side: SIDE,
    }
}

fn config(channels: usize, positions: Positions) -> VitConfig {
    let config = VitConfig::small(&images(channels), 2, false).unwrap();
    VitConfig { dim: 16, positions, symmetric_patches: true, ..config }
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
                assert!(distance(&row.aligned[p], &row.aligned[0]) <= 1, "{:?}", POSES[p]);
                assert!((row.cosine[p].unwrap() - 1.0).abs() < 1e-4);
            }
            assert_eq!(row.seen[0], row.aligned[0]);
            assert!(distance(&row.seen[4], &row.seen[0]) > 20, "a turn moves the map as seen");
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
        assert!(distance(&row.aligned[p], &row.aligned[0]) > 20, "{:?}", POSES[p]);
        assert!(row.cosine[p].unwrap() < 0.99);
    }
    assert!((row.cosine[0].unwrap() - 1.0).abs() < 1e-9);
}

#[test]
fn images_are_shown_under_each_transform() {
    let images = images(3);
    let panel = panel(3, Positions::SinCos, 1, &[3]).unwrap();
    let planes = Tensor::from_slice(images.get(3), (1, 3, SIDE, SIDE), &CPU).unwrap();
    for (p, (_, transform)) in POSES.into_iter().enumerate() {
        let grid = TokenGrid::square(SIDE).unwrap();
        let turn = GridOperator::new(&[transform], grid, &Resample::default()).unwrap();
        let rgb = turn.apply(&planes).unwrap().permute((0, 2, 3, 1)).unwrap();
        let expected: Vec<u8> = rgb.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(pixels(&panel.rows[0].image[p]), expected, "{transform:?}");
    }
}

#[test]
fn the_panel_is_on_the_page() {
    let report = Report {
        title: "maps",
        scores: no_scores(),
        notes: &[],
        config: vec![],
        result: vec![],
        records: &[],
        panel: Some(panel(1, Positions::SinCos, 2, &[0, 1, 2]).unwrap()),
    };
    let html = report.html().unwrap();
    assert_well_formed(&html);
    assert_eq!(html.matches("src=\"data:image/png;base64,").count(), 3 * 3 * 8);
    assert!(html.contains("image-rendering: pixelated"));
}

#[test]
fn the_panel_says_what_it_cannot_show() {
    let error = |layer, indices: &[usize]| {
        let panel = panel(1, Positions::SinCos, layer, indices);
        format!("{:#}", panel.err().expect("an error"))
    };
    assert!(error(2, &[]).contains("expected an image"));
    assert!(error(2, &[0, 4]).contains("expected images below 4, got 4"));
    assert!(error(0, &[0]).contains("got block 0"));
    assert!(error(5, &[0]).contains("got block 5"));
    assert!(error(4, &[0]).contains("block 4 keeps no map"));

    let (one, three) = (config(1, Positions::None), images(3));
    let vit = Vit::new(&one, Weights::seeded(1).builder(&CPU)).unwrap();
    let other = Panel::new(&vit, &three, &[0], &three.statistics(), 2, &CPU);
    assert!(other.err().unwrap().to_string().contains("got (3, 12)"));
    let images = images(1);
    let diverged = Panel::new(&vit, &images, &[0], &[(f32::NAN, 1.0)], 2, &CPU);
    assert!(diverged.err().unwrap().to_string().contains("expected finite tokens"));
}

#[test]
fn a_constant_map_has_one_color() {
    let images = Images { pixels: vec![7; SIDE * SIDE], labels: vec![0], channels: 1, side: SIDE };
    let vit = Vit::new(&config(1, Positions::None), Weights::seeded(1).builder(&CPU)).unwrap();
    let panel = Panel::new(&vit, &images, &[0], &images.statistics(), 2, &CPU).unwrap();
    let html = Report {
        title: "flat",
        scores: no_scores(),
        notes: &[],
        config: vec![],
        result: vec![],
        records: &[],
        panel: Some(panel),
    };
    assert_well_formed(&html.html().unwrap());
}

/// What a short run on the repository's images leaves in `folder`, without an encoder unless `trained`.
fn leave_run(folder: &Path, options: &[&str], finished: bool, trained: bool) {
    let args = ["test", "--epochs", "3"].iter().chain(options);
    let settings = Settings::new(Method::MocoV3, &Args::parse_from(args)).unwrap();
    fs::create_dir_all(folder).unwrap();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.join(name), bytes).unwrap();
    write("config.json", serde_json::to_vec(&settings).unwrap());
    let lines = run(40, 3);
    let lines = lines.iter().map(|record| serde_json::to_string(record).unwrap() + "\n");
    write("metrics.jsonl", lines.collect::<String>().into_bytes());
    if finished {
        write("result.json", serde_json::to_vec(&outcome(&settings)).unwrap());
    }
    if trained {
        let weights = Weights::seeded(settings.seed);
        let config = VitConfig::small(&images(1), settings.ser.layer, settings.baseline).unwrap();
        let config = VitConfig { side: 28, ..config };
        Vit::new(&config, weights.builder(&CPU)).unwrap();
        let card = Card {
            vit: config,
            statistics: vec![(0.3, 0.3)],
            layer: settings.ser.layer,
            method: settings.method.name().to_string(),
            mode: settings.mode().to_string(),
            seed: settings.seed,
            network: Network::Encoder,
        };
        let named = weights.named().into_iter();
        let tensors: Vec<_> = named.map(|(name, var)| (name, var.as_detached_tensor())).collect();
        write("encoder.safetensors", encoder::to_bytes(&tensors, &card).unwrap());
    }
}

fn outcome(settings: &Settings) -> Outcome {
    Outcome {
        method: settings.method.name().to_string(),
        mode: settings.mode().to_string(),
        network: Network::Encoder,
        seed: settings.seed,
        epochs: settings.epochs,
        steps: 40,
        first: None,
        last: None,
        lowest: None,
        knn: (0..8).map(|k| 71.3 - k as f64).collect(),
        knn_poses: Some(44.4),
        equivariance: vec![Some(0.55), Some(0.917), None, Some(0.5)],
        feature_std: 0.5,
        images_per_s: 200.0,
        waiting: 0.1,
        overhead_predicted: (settings.mode() == "ser").then_some(1.08),
        overhead_measured: None,
        seconds: 20.0,
        peak_mib: None,
        skipped: 0,
        note: format!("images of {:?}", settings.data),
        references: vec![Reference {
            name: "raw pixels".to_string(),
            equivariance: Vec::new(),
            knn: vec![78.0, 62.0, 44.0, 35.0, 2.0, 7.0, 8.0, 5.0],
        }],
    }
}

fn compared(paths: &[PathBuf]) -> (Comparison, String) {
    let comparison = Comparison::read(paths).unwrap();
    let html = comparison.html().unwrap();
    assert_well_formed(&html);
    (comparison, html)
}

#[test]
fn three_runs_stand_side_by_side() {
    let folder = tempfile::TempDir::new().unwrap();
    let variants: [(&str, &[&str]); 3] =
        [("a-baseline", &["--baseline"]), ("b-lambda0", &["--lambda", "0"]), ("c-ser", &[])];
    let paths = variants.map(|(name, options)| {
        let path = folder.path().join(name);
        leave_run(&path, options, true, true);
        path
    });
    let (comparison, html) = compared(&paths);
    assert_eq!(comparison.notes, [] as [String; 0]);
    for (name, _) in variants {
        // In the legend, in both tables, in each plot and at its token maps.
        assert!(html.matches(name).count() > 20, "{name}");
        assert!(html.contains(&format!("{name}, mapped back")), "{name}");
    }
    for text in ["0.917", "71.3", "44.4", "1.080x", "ser.loss.lambda", "Settings that differ"] {
        assert!(html.contains(text), "{text} is missing");
    }
    assert!(!html.contains("<td>fashion-tiny</td>"), "a setting that all runs share");
    // By transform and by block; three scores and the spread; two losses, matching, gradient, four schedules, speed, waiting.
    assert_eq!(plots_of(&html), 2 + 4 + 2 + 2 + 4 + 2);
    // Each image once, then two rows for each of three runs.
    assert_eq!(html.matches("data:image/png").count(), 2 * 8 * (1 + 2 * 3));
}

#[test]
fn runs_that_do_not_compare_are_named() {
    let folder = tempfile::TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    leave_run(&at("whole"), &[], true, false);
    leave_run(&at("copy"), &[], true, false);
    leave_run(&at("part"), &["--baseline"], false, false);
    leave_run(&at("other"), &["--data", "/no/such/data"], true, false);
    leave_run(&at("deep/whole"), &["--seed", "1"], true, false);
    fs::remove_file(at("part").join("metrics.jsonl")).unwrap();
    let twice = folder.path().join("deep/../whole");
    for (runs, shown, notes) in [
        (vec![at("whole")], 1, vec!["There is one run only"]),
        (vec![at("whole"), twice], 1, vec!["named twice", "one run only"]),
        (vec![at("whole"), at("copy")], 1, vec!["copy is a copy of", "one run only"]),
        (vec![at("whole"), at("part")], 2, vec!["part is unfinished"]),
        (vec![at("part")], 1, vec!["after 0 steps", "one run only"]),
        (vec![at("whole"), at("other")], 2, vec!["different data", "/no/such/data"]),
        (vec![at("whole"), at("deep/whole")], 2, vec![]),
    ] {
        let (comparison, html) = compared(&runs);
        assert_eq!(comparison.runs.len(), shown, "{runs:?}");
        let said = comparison.notes.join(" ");
        assert_eq!(comparison.notes.is_empty(), notes.is_empty(), "{said}");
        for part in notes {
            assert!(said.contains(part), "{part} in {said}");
            assert!(html.contains(part), "{part} on the page");
        }
        for run in &comparison.runs {
            assert!(html.contains(&run.name), "{}", run.name);
            // None of these folders has an encoder.
            assert!(html.contains(&format!("The token maps of {} are missing", run.name)));
        }
    }
    let (comparison, html) = compared(&[at("whole"), at("deep/whole")]);
    assert!(comparison.runs[0].name != comparison.runs[1].name, "two folders of one name");
    assert!(html.contains("Comparison of runs"));
    let table = Comparison::read(&[at("part")]).unwrap().table().text();
    assert!(table.contains("part (unfinished, 0 steps)"), "{table}");
}

#[test]
fn folders_that_hold_no_run_are_refused() {
    let folder = tempfile::TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    leave_run(&at("good"), &[], true, false);
    for (name, file, text) in [
        ("config", "config.json", "{}"),
        ("metrics", "metrics.jsonl", "nonsense\n"),
        ("result", "result.json", "[]"),
        ("evaluation", "evaluation.json", "{"),
    ] {
        leave_run(&at(name), &[], true, false);
        fs::write(at(name).join(file), text).unwrap();
    }
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("file"), "text").unwrap();
    for (name, parts) in [
        ("missing", ["expected the folder of a run", "no folder"]),
        ("file", ["expected the folder of a run", "no folder"]),
        ("empty", ["expected the folder of a run", "without config.json"]),
        ("config", ["config.json", "not written by this version"]),
        ("metrics", ["metrics.jsonl", "line 1"]),
        ("result", ["result.json", "not written by this version"]),
        ("evaluation", ["evaluation.json", "not written by this version"]),
    ] {
        let error = Comparison::read(&[at("good"), at(name)]).err();
        let error = format!("{:#}", error.expect(name));
        for part in parts.into_iter().chain([name]) {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}

#[test]
fn many_runs_have_a_color_each() {
    let folder = tempfile::TempDir::new().unwrap();
    let paths: Vec<PathBuf> = (0..9)
        .map(|seed| {
            let path = folder.path().join(format!("run{seed}"));
            leave_run(&path, &["--seed", &seed.to_string()], true, false);
            path
        })
        .collect();
    let (_, html) = compared(&paths);
    let legend = html.split("<p class=\"legend\">").nth(1).unwrap();
    let legend = legend.split("</p>").next().unwrap();
    let colors = legend.split("background: ").skip(1);
    let mut colors: Vec<&str> = colors.map(|c| c.split('"').next().unwrap()).collect();
    colors.sort_unstable();
    colors.dedup();
    assert_eq!(colors.len(), 9, "{colors:?}");
}

#[test]
fn kept_scores_are_the_ledger_s() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let entries = ledger::read(&root.join("docs/results/study.jsonl")).unwrap().entries;
    assert!(!entries.is_empty(), "the ledger is there");
    let file = fs::read_to_string(root.join(kept::PATH)).unwrap();
    assert_eq!(
        file,
        kept::json(&entries).unwrap(),
        "study --report --ledger docs/results/study.jsonl writes the kept scores anew"
    );
    assert_eq!(kept::all().unwrap(), kept::from_ledger(&entries).unwrap());
}

#[test]
fn kept_scores_are_shown_with_their_own_settings_only() {
    let beside = |method, options: &[&str]| {
        let args = Args::parse_from(["test"].iter().chain(options));
        kept::beside(&Settings::new(method, &args).unwrap()).unwrap()
    };
    let three: &[&str] = &["--epochs", "3"];
    for (more, names) in [
        (&["--seed", "7"] as &[&str], ["lambda = 0", "baseline"]),
        (&["--lambda", "0.3"], ["lambda = 0", "baseline"]),
        (&["--lambda", "0"], ["SER (", "baseline"]),
        (&["--baseline"], ["SER (", "lambda = 0"]),
    ] {
        for method in Method::ALL {
            let (rows, note) = beside(method, &[three, more].concat());
            assert_eq!(rows.len(), 2, "{more:?}");
            for (row, name) in rows.iter().zip(names) {
                assert!(row.name.starts_with(name), "{} for {more:?}", row.name);
                assert!(row.name.contains("(kept, mean of "), "{}", row.name);
                assert!(row.equivariance.is_some_and(|score| score > 0.3 && score < 1.0));
            }
            for part in ["Kept rows were not trained now", "seeds 0, 1, 2", "commit"] {
                assert!(note.contains(part), "{part} in {note}");
            }
        }
    }
    for more in [
        &["--epochs", "4"] as &[&str],
        &["--smoke"],
        &["--batch-size", "32"],
        &["--ratio", "0.25"],
        &["--layer", "3"],
        &["--data", "somewhere"],
        &["--learning-rate", "0.1"],
    ] {
        let (rows, note) = beside(Method::MocoV3, &[three, more].concat());
        assert_eq!(rows, [], "{more:?}");
        assert!(note.contains("no kept scores for these settings; --compare trains"), "{note}");
    }
}

#[test]
fn the_page_of_a_folder_begins_with_the_final_table() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("run");
    leave_run(&path, &[], true, false);
    let (table, _) = Folder::read(&path).unwrap().table().unwrap();
    let names: Vec<&str> = table.rows.iter().map(|row| row[0].as_str()).collect();
    assert!(names[0].starts_with("SER, lambda 1 (this run"), "{names:?}");
    assert!(names[1].starts_with("lambda = 0 (kept") && names[2].starts_with("baseline (kept"));
    assert_eq!(names[3..], ["raw pixels"]);
    assert!(table.header[1].starts_with("equivariance, block 2"), "{:?}", table.header);
    assert_eq!(table.rows[0][1], "0.917");
    assert_eq!(table.rows[3][1], "–", "pixels are no tokens");
    let html = Folder::read(&path).unwrap().page(None).unwrap();
    assert_well_formed(&html);
    assert!(html.contains("Kept rows were not trained now"));
    assert!(html.find("What SER changed").unwrap() < html.find("Configuration").unwrap());

    // What --compare has trained takes the place of kept scores.
    leave_run(&path.join("lambda0"), &["--lambda", "0"], true, false);
    leave_run(&path.join("baseline"), &["--baseline"], true, false);
    let html = Folder::read(&path).unwrap().page(None).unwrap();
    assert!(!html.contains("(kept"));
    assert!(html.contains("lambda = 0 (--compare)") && html.contains("baseline (--compare)"));
    // Not if it was trained with other settings.
    leave_run(&path.join("lambda0"), &["--lambda", "0", "--batch-size", "32"], true, false);
    leave_run(&path.join("baseline"), &["--baseline", "--seed", "3"], true, false);
    let html = Folder::read(&path).unwrap().page(None).unwrap();
    assert!(!html.contains("(--compare)") && html.contains("(kept"));
    // An unfinished run says so.
    fs::remove_file(path.join("result.json")).unwrap();
    let html = Folder::read(&path).unwrap().page(None).unwrap();
    assert_well_formed(&html);
    assert!(html.contains("The run is unfinished: its curves end after 40 steps."));
}

#[test]
fn a_table_is_aligned_and_has_no_empty_columns() {
    let row =
        |name: &str, upright| Scores { name: name.to_string(), upright, ..Default::default() };
    let rows = [row("λ = 0", Some(71.25)), row("baseline", None)];
    let table = scores::table("Scores", None, &rows);
    assert_eq!(table.header, ["", "20-NN upright %"]);
    let text = table.text();
    let lines: Vec<&str> = text.lines().skip(2).collect();
    assert_eq!(lines.len(), 3);
    let width = |line: &&str| line.chars().count();
    assert!(lines.iter().all(|line| width(line) == width(&lines[0])), "{text}");
    assert!(lines[1].ends_with("71.2") && lines[2].ends_with('–'), "{text}");
}

/// The program of an example; `cargo test` builds them all.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        program.exists(),
        "{} is missing: run `cargo build --examples` in the profile of the test",
        program.display()
    );
    Command::new(program)
}

/// 48 images of noise in two classes, as IDX files.
fn data_in(folder: &Path) -> PathBuf {
    let mut rng = StdRng::seed_from_u64(1);
    let (count, side) = (48u32, SIDE as u32);
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_be_bytes()).collect() };
    let mut pixels = words(&[0x803, count, side, side]);
    pixels.extend((0..count * side * side).map(|_| rng.random::<u8>()));
    let mut labels = words(&[0x801, count]);
    labels.extend((0..count).map(|i| (i % 2) as u8));
    let data = folder.join("data");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("train-images-idx3-ubyte"), pixels).unwrap();
    fs::write(data.join("train-labels-idx1-ubyte"), labels).unwrap();
    data
}

#[test]
fn compare_trains_the_variants_and_shows_all_three() {
    let folder = tempfile::TempDir::new().unwrap();
    let (data, out) = (data_in(folder.path()), folder.path().join("run"));
    let train = |more: &[&str]| {
        let mut command = program("moco_v3");
        command.args(["--epochs", "1", "--batch-size", "8", "--ratio", "0.25"]);
        command.arg("--compare").arg("--data").arg(&data);
        command.arg("--out").arg(&out).args(more);
        command.env("RAYON_NUM_THREADS", "1").output().unwrap()
    };
    for (options, part) in [
        (&["--baseline"] as &[&str], "expected a SER run"),
        (&["--lambda", "0"], "expected a SER run"),
        (&["--balance-target", "0.2"], "do not fit the variant lambda0"),
    ] {
        let output = train(options);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(part), "{said}");
        assert!(!out.exists(), "nothing is trained for options that do not fit");
    }
    for more in [&[] as &[&str], &["--resume"]] {
        let output = train(more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let said = String::from_utf8_lossy(&output.stdout);
        for part in ["--compare trains lambda0", "--compare trains baseline"] {
            assert!(said.contains(part), "{part} in {said}");
        }
        let table = said.rfind("What SER changed").unwrap();
        for row in [
            "SER, lambda 1 (this run, seed 0)",
            "lambda = 0 (--compare)",
            "baseline (--compare)",
            "untrained encoder",
            "raw pixels",
        ] {
            assert!(said[table..].contains(row), "{row} in {said}");
        }
        assert_eq!(said.matches("resumed after").count(), 3 * more.len());
        let html = fs::read_to_string(out.join("compare.html")).unwrap();
        assert_well_formed(&html);
        for name in ["baseline, mapped back", "lambda0, mapped back", "ser, mapped back"] {
            assert!(html.contains(name), "{name}");
        }
        let html = fs::read_to_string(out.join("report.html")).unwrap();
        assert!(html.contains("baseline (--compare)") && !html.contains("no kept scores"));
    }
    // The report program reads the same folders, and refuses others.
    let report = |args: &[&Path]| {
        let mut command = program("report");
        command.arg("--compare").args(args);
        command.arg("--out").arg(folder.path().join("page.html"));
        command.output().unwrap()
    };
    let output = report(&[&out, &out.join("lambda0"), &out.join("baseline")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(folder.path().join("page.html").exists());
    let output = report(&[&out, folder.path()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("without config.json"), "{said}");
}
