//! How the time of the regularizer grows with tokens, images and width: slopes on a log-log scale over a factor of 16.
//!
//! `cargo bench --bench scaling` prints a row for each size, then the slope of each series (least squares). A step is
//! `SerLoss` forward and backward on two maps of its own, MoCo-v3's head of 512 and 512 unless the width is what grows.
#![allow(missing_docs)] // of a program

mod workload;

use std::time::Instant;

use candle_core::{DType, Device, Var};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{
    MapPair, Projector, ProjectorConfig, SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler,
};
use ser_reg_trainers::weights::Weights;
use workload::random;

const ROUNDS: usize = 7;

#[derive(Clone, Copy)]
struct Size {
    images: usize,
    side: usize,
    width: usize,
}

/// Median milliseconds of one step.
fn step(Size { images, side, width }: Size) -> f64 {
    let grid = TokenGrid::square(side).unwrap();
    let head = ProjectorConfig { hidden: width, out: width, norm: true };
    let weights = Weights::seeded(0);
    let head = Projector::new(384, head, weights.builder(&Device::Cpu)).unwrap();
    let ser = SerLoss::new(SerConfig::default()).unwrap();
    let sampler = ViewSampler::new(grid, ViewConfig::default()).unwrap();
    let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), images);
    let relative = views.unwrap().relative();
    let map = |seed| Var::from_tensor(&random(&[images, grid.len(), 384], seed)).unwrap();
    let (first, second) = (map(1), map(2));
    assert_eq!(first.dtype(), DType::F32);
    let mut times: Vec<f64> = (0..ROUNDS + 2)
        .map(|_| {
            let start = Instant::now();
            let pair = MapPair::new([first.as_tensor(), second.as_tensor()], &relative).head(&head);
            let out = ser.forward(&pair).unwrap();
            out.loss.backward().unwrap();
            start.elapsed().as_secs_f64() * 1e3
        })
        .skip(2)
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

/// The slope of `log y` over `log x`.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let logs = points.iter().map(|(x, y)| (x.ln(), y.ln()));
    let (mx, my) = logs.clone().fold((0.0, 0.0), |m, (x, y)| (m.0 + x / n, m.1 + y / n));
    let (xy, xx) =
        logs.fold((0.0, 0.0), |s, (x, y)| (s.0 + (x - mx) * (y - my), s.1 + (x - mx) * (x - mx)));
    xy / xx
}

fn series(name: &str, sizes: &[(usize, Size)]) {
    let mut points = Vec::new();
    for &(x, size) in sizes {
        let ms = step(size);
        println!("{name} {x:>5} {ms:>10.2} ms");
        points.push((x as f64, ms));
    }
    let half = points.len() / 2;
    println!(
        "{name}: slope {:.2}, over the larger half {:.2}\n",
        slope(&points),
        slope(&points[half..])
    );
}

fn main() {
    let base = Size { images: 4, side: 14, width: 512 };
    // as the names of `cargo bench` filters do
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let wants = |name: &str| only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    if wants("tokens") {
        let sizes = [7, 10, 14, 20, 28].map(|side| (side * side, Size { side, ..base }));
        series("tokens of an image", &sizes);
    }
    if wants("images") {
        let sizes = [2, 4, 8, 16, 32].map(|images| (images, Size { images, ..base }));
        series("images", &sizes);
    }
    if wants("width") {
        let sizes = [32, 64, 128, 256, 512].map(|width| (width, Size { width, ..base }));
        series("width", &sizes);
    }
}
