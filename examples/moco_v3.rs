//! probe
mod common;
use std::time::Instant;
use anyhow::Result;
use candle_core::{Device, Tensor};
use common::{augment::Augment, data, knn::{Bank, spread}, moco::{Head, contrast}, optimizer::Decoupled, vit::{Vit, VitConfig}, weights::Weights};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom, Rng};

fn encode(vit: &Vit, aug: &Augment, images: &data::Images, dev: &Device) -> Result<Tensor> {
    let mut out = vec![];
    for s in (0..images.len()).step_by(250) {
        out.push(vit.forward(&aug.plain(images, s..(s + 250).min(images.len()), dev)?)?.detach());
    }
    Ok(Tensor::cat(&out, 0)?)
}

fn main() -> Result<()> {
    common::environment::prepare()?;
    let dev = Device::Cpu;
    let d = data::load(&data::embedded())?;
    println!("{}", d.note);
    let seed = 0u64;
    let epochs: usize = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    let w = Weights::seeded(seed);
    let vb = w.builder(&dev);
    let cfg = VitConfig::small(1, 28, 0);
    let build = |w: &Weights| -> Result<(Vit, Head)> {
        let vb = w.builder(&dev);
        Ok((Vit::new(&cfg, vb.pp("encoder"))?, Head::projector(64, vb.pp("projector"))?))
    };
    let (vit, proj) = build(&w)?;
    let wm = w.momentum_copy();
    let (vit_m, proj_m) = build(&wm)?;
    let pred = Head::predictor(vb.pp("predictor"))?;
    let aug = Augment::new(&d.train);
    println!("{:?}", aug.statistics);
    let ev = |vit_m: &Vit| -> Result<f64> {
        let bank = Bank::new(&encode(vit_m, &aug, &d.train, &dev)?, &d.train.labels)?;
        bank.accuracy(&encode(vit_m, &aug, &d.test, &dev)?, &d.test.labels)
    };
    let t = Instant::now();
    println!("untrained knn {} {:?}", ev(&vit)?, t.elapsed());
    let mut opt = Decoupled::new(&w.named(), 0.05)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let b = 64;
    let per = d.train.len() / b;
    let total = per * epochs;
    let mut order: Vec<usize> = (0..d.train.len()).collect();
    let mut step = 0;
    let (mut ta, mut tf, mut tb, mut to, mut tt) = (0f64, 0f64, 0f64, 0f64, 0f64);
    for e in 0..epochs {
        order.shuffle(&mut rng);
        let t0 = Instant::now();
        let mut loss_sum = 0f32;
        for batch in order.chunks_exact(b) {
            let t = Instant::now();
            let warm = total / 10;
            let lr = if step < warm { 2e-3 * step as f64 / warm as f64 } else { 1e-3 * (1.0 + (std::f64::consts::PI * (step - warm) as f64 / (total - warm) as f64).cos()) };
            let m = 1.0 - 0.5 * 0.05 * (1.0 + (std::f64::consts::PI * step as f64 / total as f64).cos());
            let (x1, x2) = aug.pair(&d.train, batch, 0, rng.random(), &dev)?;
            let x = Tensor::cat(&[&x1, &x2], 0)?;
            ta += t.elapsed().as_secs_f64(); let t = Instant::now();
            wm.follow(&w, m)?;
            let k = vit_m.forward(&x)?;
            let (k1, k2) = (proj_m.forward(&k.narrow(0, 0, b)?)?, proj_m.forward(&k.narrow(0, b, b)?)?);
            tt += t.elapsed().as_secs_f64(); let t = Instant::now();
            let f = vit.forward(&x)?;
            let q1 = pred.forward(&proj.forward(&f.narrow(0, 0, b)?)?)?;
            let q2 = pred.forward(&proj.forward(&f.narrow(0, b, b)?)?)?;
            let loss = (contrast(&q1, &k2.detach(), 0.2)? + contrast(&q2, &k1.detach(), 0.2)?)?;
            loss_sum += loss.to_scalar::<f32>()?;
            tf += t.elapsed().as_secs_f64(); let t = Instant::now();
            let g = loss.backward()?;
            tb += t.elapsed().as_secs_f64(); let t = Instant::now();
            opt.step(&g, lr)?;
            to += t.elapsed().as_secs_f64();
            step += 1;
        }
        println!("epoch {e} loss {} {:.0} img/s; ms/step aug {:.1} teacher {:.1} fwd {:.1} bwd {:.1} opt {:.1}", loss_sum / per as f32, (per * b) as f64 / t0.elapsed().as_secs_f64(),
            1e3*ta/step as f64, 1e3*tt/step as f64, 1e3*tf/step as f64, 1e3*tb/step as f64, 1e3*to/step as f64);
    }
    println!("knn {} spread {}", ev(&vit)?, spread(&encode(&vit, &aug, &d.test, &dev)?)?);
    Ok(())
}
