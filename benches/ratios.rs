//! Every speed that the crate promises, as a ratio of two sides measured by turns in one run.
//!
//! ```text
//! cargo bench --bench ratios                      # name  ours_ms  other_ms  ratio  goal
//! cargo bench --bench ratios -- --json            # the same as JSON lines
//! cargo bench --bench ratios -- --only nt_xent    # rows whose name holds this
//! ```
//!
//! Each row: three turns of warm-up (one where a turn is a training step), then both sides by turns, medians over the rounds;
//! the ratio is the median of the rounds' own ratios. f32, random values, all threads of the machine.
#![allow(missing_docs)] // of a program

#[path = "workload/training.rs"]
mod training;
mod workload;

use std::{hint::black_box, time::Instant};

use candle_core::{Tensor, Var};
use clap::{Parser, value_parser};
use ser_reg::Filter;
use serde_json::json;
use training::{Training, Variant};
use workload::{action, contrast::Pair, gap, random, resize};

#[derive(Parser)]
struct Args {
    /// Prints JSON lines.
    #[arg(long)]
    json: bool,
    /// Measures only rows whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
    /// Turns of each row after its warm-up.
    #[arg(long, default_value_t = 11, value_parser = value_parser!(u32).range(1..))]
    rounds: u32,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Bench(Args);

impl Bench {
    /// Whether any row of these names is wanted.
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.0.only)
    }

    /// Measures `ours` against `other` on what `prepare` makes, and prints the row.
    fn row<S, A, B>(
        &self,
        name: &str,
        goal: Option<f64>,
        prepare: impl FnOnce() -> S,
        ours: impl Fn(&S) -> A,
        other: impl Fn(&S) -> B,
    ) {
        if self.wants(name) {
            let subject = prepare();
            let mut sides: [&mut dyn FnMut(); 2] =
                [&mut || drop(black_box(ours(&subject))), &mut || drop(black_box(other(&subject)))];
            let times = self.by_turns(&mut sides, 3);
            self.print(name, goal, &times[0], &times[1]);
        }
    }

    /// Milliseconds of each side, round after round.
    fn by_turns(&self, sides: &mut [&mut dyn FnMut()], warm_up: usize) -> Vec<Vec<f64>> {
        let mut times = vec![Vec::new(); sides.len()];
        for round in 0..warm_up + self.0.rounds as usize {
            for (side, times) in sides.iter_mut().zip(&mut times) {
                let start = Instant::now();
                side();
                if round >= warm_up {
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
        times
    }

    fn print(&self, name: &str, goal: Option<f64>, ours: &[f64], other: &[f64]) {
        let ratio = median(ours.iter().zip(other).map(|(a, b)| a / b));
        let (ours, other) = (median(ours.iter().copied()), median(other.iter().copied()));
        if self.0.json {
            let row = json!({
                "name": name, "ours_ms": ours, "other_ms": other, "ratio": ratio, "goal": goal
            });
            println!("{row}");
        } else {
            let goal = goal.map_or("-".to_string(), |goal| format!("{goal:.2}"));
            println!("{name:<72} {ours:>10.2} {other:>10.2} {ratio:>7.3} {goal:>6}");
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let bench = Bench(Args::parse());
    if !bench.0.json {
        println!(
            "{:<72} {:>10} {:>10} {:>7} {:>6}",
            "name", "ours_ms", "other_ms", "ratio", "goal"
        );
    }
    // On a worker of the pool, so that no operation has to wake it from outside.
    rayon::scope(|_| {
        contrast(&bench);
        actions(&bench);
        resampling(&bench);
        price(&bench);
        step(&bench);
    });
}

/// Whether the processor has AVX-512, for which some goals are tighter.
fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn contrast(bench: &Bench) {
    // The wider the vector instructions, the more is gained on candle's own products.
    let wide = has_avx512();
    let (plain, products) = if wide { (0.22, 0.70) } else { (0.30, 1.05) };
    let sizes =
        [((16, 196, 512), plain, Some(products), Some(1.4)), ((64, 49, 128), 0.12, None, None)];
    for (shape @ (b, n, d), plain, products, symmetric) in sizes {
        let name = |other| format!("nt_xent ({b}, {n}, {d}), {other}");
        let pair = || Pair::new(shape);
        let one = |pair: &Pair| pair.ours(false);
        let prepare = || {
            let pair = pair();
            assert!((pair.ours(false) - pair.plain()).abs() < 1e-4);
            pair
        };
        bench.row(&name("plain candle"), Some(plain), prepare, one, Pair::plain);
        bench.row(&name("three products"), products, pair, one, Pair::products);
        let both = |pair: &Pair| pair.ours(true);
        bench.row(&name("both directions / one"), symmetric, pair, both, one);
    }
}

fn actions(bench: &Bench) {
    let name = |what| format!("D4 per sample on tokens (64, 14x14, 384), {what}");
    let copy = |x: &Tensor| x.copy().unwrap();
    let tokens = || {
        let x = random(&[action::BATCH, 196, 384], 0);
        let turned = action::operator(14).apply(&x).unwrap();
        assert_eq!(gap(&turned, &action::plain(&x, 14).unwrap()), 0.0);
        x
    };
    let forward = |x: &Tensor| action::operator(14).apply(x).unwrap();
    let backward = |x: &Tensor| action::operator(14).adjoint().apply(x).unwrap();
    bench.row(&name("forward / copy"), Some(1.3), tokens, forward, copy);
    bench.row(&name("backward / copy"), Some(1.5), tokens, backward, copy);
    let indices = action::indices(14);
    let gather = |x: &Tensor| action::gather(x, &indices).unwrap();
    let scatter = |x: &Tensor| action::scatter(x, &indices).unwrap();
    bench.row(&name("forward / index_select"), None, tokens, forward, gather);
    bench.row(&name("backward / index_add"), None, tokens, backward, scatter);

    bench.row(
        "D4 per sample on images (64, 3, 224, 224), forward / copy",
        Some(1.6),
        || random(&[action::BATCH, 3, 224, 224], 0),
        |x| action::operator(224).apply(x).unwrap(),
        copy,
    );
}

fn resampling(bench: &Bench) {
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        let name =
            |what| format!("{name} 14x14 to 12x16 of (64, 196, 384), forward + backward / {what}");
        let plain = resize::Plain::new(filter);
        let ours = |x: &Tensor| Ok(resize::operator(filter).apply(x)?);
        let prepare = || {
            let x = Var::from_tensor(&random(&resize::SHAPE, 0)).unwrap();
            assert!(gap(&ours(&x).unwrap(), &plain.apply(&x).unwrap()) < 1e-5);
            x
        };
        let work = |x: &Var| resize::forward_backward(x, ours);
        bench.row(&name("two products"), None, prepare, work, |x| {
            resize::forward_backward(x, |x| plain.apply(x))
        });
        bench.row(&name("copy"), None, prepare, work, |x| x.as_detached_tensor().copy().unwrap());
        // candle's backward pass around any operation: a tensor of ones, one of zeros, and their sum.
        bench.row(&name("x.affine(2, 0)"), Some(1.5), prepare, work, |x| {
            resize::forward_backward(x, |x| x.affine(2.0, 0.0))
        });
        bench.row(
            &name("copy").replace("forward + backward", "forward alone"),
            None,
            prepare,
            |x| ours(x.as_tensor()).unwrap(),
            |x| x.as_detached_tensor().copy().unwrap(),
        );
    }
}

/// What the regularizer adds to a training step of ViT-S/16, measured by itself: nothing else in the step changes, and whole
/// steps of many seconds cannot resolve one per cent.
fn price(bench: &Bench) {
    let name = |what| {
        format!("price of SER, ViT-S/16, 32 images, 2 of them in SER, {what}: 1 + part / step")
    };
    let names = [name("shared"), name("its own")];
    if !names.iter().any(|name| bench.wants(name)) {
        return;
    }
    let training = Training::new().unwrap();
    // A step takes a thousand times as long as its part.
    let steps = bench.by_turns(&mut [&mut || drop(black_box(training.step(Variant::Control)))], 1);
    let (low, step, high) = quartiles(steps[0][..].to_vec());
    for ((name, own), goal) in
        names.iter().zip([false, true]).zip([1.01, 1.0 + training.own_share() + 0.005])
    {
        let parts = (0..3 + 5 * bench.0.rounds).map(|_| training.regularizer(own).unwrap());
        let (least, part, most) = quartiles(parts.skip(3).collect());
        println!(
            "{name}: {part:.1} ms ({least:.1} to {most:.1}) of {step:.0} ms ({low:.0} to {high:.0}), ratio {:.4} \
             ({:.4} to {:.4}), goal {goal:.4}",
            1.0 + part / step,
            1.0 + least / high,
            1.0 + most / low,
        );
    }
}

/// The lower quartile, the median and the upper quartile.
fn quartiles(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |part: f64| values[(part * (values.len() - 1) as f64).round() as usize];
    (at(0.25), at(0.5), at(0.75))
}

/// A training step of ViT-S/16, three variants by turns.
fn step(bench: &Bench) {
    let name = |what| format!("step of ViT-S/16, 32 images, 2 turned or flipped: SER / {what}");
    let names = [name("λ = 0"), name("no partition")];
    if !names.iter().any(|name| bench.wants(name)) {
        return;
    }
    let training = Training::new().unwrap();
    let step = |variant| {
        black_box(training.step(variant).unwrap());
    };
    let mut sides: [&mut dyn FnMut(); 3] =
        [&mut || step(Variant::Ser), &mut || step(Variant::Control), &mut || step(Variant::Plain)];
    let times = bench.by_turns(&mut sides, 1);
    for ((name, goal), other) in names.iter().zip([1.01, 1.02]).zip(&times[1..]) {
        bench.print(name, Some(goal), &times[0], other);
    }
}
