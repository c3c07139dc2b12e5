//! What NT-Xent allocates: bytes above its inputs at the peak, counted by the allocator.

// A counting allocator cannot be written without: it forwards to the system's.
#![allow(unsafe_code)]

mod loss_common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{rng, tokens};
use ser_reg::group::D4;
use ser_reg::loss::{
    Contrastive, ContrastiveOutput, TokenSet, info_nce, nt_xent, nt_xent_ragged, nt_xent_symmetric,
};
use ser_reg::ser::Objective;
use ser_reg::view::Relative;
use ser_reg::{MapPair, Projector, ProjectorConfig, SerConfig, SerLoss, TokenGrid};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tests of this file measure one at a time.
static ONE: Mutex<()> = Mutex::new(());

const MIB: f64 = (1 << 20) as f64;

fn peak_of(f: impl FnOnce() -> ser_reg::Result<Tensor>) -> ser_reg::Result<f64> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let loss = f()?;
    loss.backward()?;
    Ok((PEAK.load(Relaxed) - before) as f64 / MIB)
}

type Run = fn(&Tensor, &Tensor, &Contrastive) -> ser_reg::Result<ContrastiveOutput>;

fn pair((b, n, d): (usize, usize, usize)) -> Result<(Var, Var)> {
    let rng = &mut rng(1);
    Ok((tokens(rng, (b, n, d), DType::F32)?, tokens(rng, (b, n, d), DType::F32)?))
}

#[test]
fn the_allocator_counts() -> ser_reg::Result<()> {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let (z, zp) = pair((1, 256, 64))?;
    let whole = peak_of(|| Ok(z.flatten(0, 1)?.matmul(&zp.flatten(0, 1)?.t()?)?.sum_all()?))?;
    assert!(whole > 256.0 * 256.0 * 4.0 / MIB, "{whole} MiB");
    Ok(())
}

#[test]
fn peak_is_small_at_the_papers_size_and_at_four_times_as_many_tokens() -> ser_reg::Result<()> {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for (images, forward_limit, limit) in [(16, 32.0, 32.0), (64, 64.0, 80.0)] {
        let (z, zp) = pair((images, 196, 512))?;
        let gradients = 2.0 * z.elem_count() as f64 * 4.0 / MIB;
        for (name, run) in [("one direction", nt_xent as Run), ("both", nt_xent_symmetric)] {
            let config = Contrastive::default();
            let mut forward = 0.0;
            let whole = peak_of(|| {
                let loss = run(&z, &zp, &config)?.loss;
                forward = (PEAK.load(Relaxed) - LIVE.load(Relaxed)) as f64 / MIB;
                Ok(loss)
            })? - gradients;
            println!(
                "{images}x196x512 f32, {name}: {forward:.1} MiB above inputs and gradients, {whole:.1} MiB with candle's backward"
            );
            assert!(forward <= forward_limit, "{forward} MiB");
            assert!(whole <= limit, "{whole} MiB");
        }
    }
    Ok(())
}

#[test]
fn memory_grows_with_the_tokens_and_not_with_their_square() -> ser_reg::Result<()> {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let config = Contrastive { block_bytes: 1 << 20, ..Default::default() };
    for run in [nt_xent as Run, nt_xent_symmetric] {
        let peak = |images: usize| {
            let (z, zp) = pair((images, 64, 32))?;
            peak_of(|| Ok(run(&z, &zp, &config)?.loss))
        };
        let (small, large) = (peak(16)?, peak(64)?);
        println!("1,024 tokens: {small:.1} MiB, 4,096 tokens: {large:.1} MiB");
        // Four times the tokens; the matrix would have 16 times the entries, 128 MiB.
        assert!(large <= 4.5 * small, "{small} MiB, then {large} MiB");
    }
    Ok(())
}

/// The peak without what threads that happen to work at the same moment hold besides.
fn least_peak_of(loss: impl Fn() -> ser_reg::Result<Tensor>) -> ser_reg::Result<f64> {
    let peaks = (0..5).map(|_| peak_of(&loss)).collect::<ser_reg::Result<Vec<_>>>()?;
    Ok(peaks.into_iter().fold(f64::INFINITY, f64::min))
}

#[test]
fn detached_keys_and_repeated_sets_cost_no_gradient_of_their_own() -> ser_reg::Result<()> {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    // Large beside what threads hold for their products, which comes and goes as they meet.
    let (z, zp) = pair((8, 128, 512))?;
    let set = z.elem_count() as f64 * 4.0 / MIB;
    let config = Contrastive { block_bytes: 1 << 18, ..Default::default() };
    let live = least_peak_of(|| Ok(nt_xent(&z, &zp, &config)?.loss))?;
    let detached = least_peak_of(|| Ok(nt_xent(&z, &zp.detach(), &config)?.loss))?;
    println!("{live:.2} MiB live, {detached:.2} detached");
    assert!(detached < live - set, "{live} MiB live, {detached} MiB detached, {set} MiB of tokens");

    let (a, p) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let labels: Vec<u32> = (0..1024).map(|i| i / 128).collect();
    let [anchors, keys] = [&a, &p].map(|tokens| TokenSet { tokens, labels: &labels });
    let pair = least_peak_of(|| Ok(nt_xent_ragged(&a, &p, &labels, None, &config)?.loss))?;
    let sets = least_peak_of(|| Ok(info_nce(anchors, &p, &[anchors, keys], None, &config)?.loss))?;
    println!("{pair:.2} MiB as a pair, {sets:.2} as sets");
    assert!(sets < pair + 0.1 * set, "{pair} MiB as a pair, {sets} MiB as sets");
    Ok(())
}

/// The equivariance loss with its head and the alignment.
#[test]
fn ser_loss_grows_with_the_tokens_and_not_with_their_square() -> ser_reg::Result<()> {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let shape = ProjectorConfig { hidden: 32, out: 32, norm: true };
    let head = Projector::new(32, shape, vb)?;
    let ser = SerLoss::new(SerConfig {
        objective: Objective::NtXent(Contrastive { block_bytes: 1 << 20, ..Default::default() }),
        ..Default::default()
    })?;
    let grid = TokenGrid::square(8)?;
    let peak = |images: usize| {
        let (map1, map2) = pair((images, 64, 32))?;
        let turns = D4::ALL.into_iter().cycle().take(images).collect();
        let relative = Relative::new(turns, grid, grid)?;
        least_peak_of(|| {
            Ok(ser.forward(&MapPair::new([&map1, &map2], &relative).head(&head))?.loss)
        })
    };
    let (small, large) = (peak(16)?, peak(64)?);
    println!("1,024 tokens: {small:.1} MiB, 4,096 tokens: {large:.1} MiB");
    // Four times the tokens.
    assert!(large <= 4.5 * small, "{small} MiB, then {large} MiB");
    let matrix = 4096.0 * 4096.0 * 4.0 / MIB;
    assert!(large < matrix, "{large} MiB; one matrix of similarities has {matrix}");
    Ok(())
}
