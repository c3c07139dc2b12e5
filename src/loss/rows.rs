//! What a block of similarities goes through on its way to probabilities, row by row.
//!
//! Two twins with equal results: a fused pass over rows on the CPU, and plain candle operations on every other device.
//! Each row is worked on by one thread in a fixed order, so the result does not depend on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{
    CpuStorage, CustomOp1, Device, InplaceOp1, Layout, Result, Shape, Tensor, WithDType, bail,
};
use num_traits::Float;
use rayon::prelude::*;

/// Which columns a row may see: those whose group is not its own.
#[derive(Clone, Copy)]
pub(super) struct Groups<'a> {
    pub(super) rows: &'a [u32],
    pub(super) cols: &'a [u32],
}

/// The largest visible entry of each row of `s` (R, C), as (R, 1); −∞ where a row sees nothing.
pub(super) fn max(s: &Tensor, groups: Groups) -> Result<Tensor> {
    match s.device().is_cpu() {
        true => s.apply_op1_no_bwd(&Max(groups)),
        false => portable::max(s, groups),
    }
}

/// `e = exp((s − top)·rate)`, 0 where a row may not look, and the sum of each row (R, 1).
///
/// Takes `s` (R, C) for its storage, which the CPU reuses. `top` (R, 1) is at least the largest visible entry.
pub(super) fn exp(s: Tensor, top: &Tensor, rate: f64, groups: Groups) -> Result<(Tensor, Tensor)> {
    if !s.device().is_cpu() {
        return portable::exp(&s, top, rate, groups);
    }
    let op = Exp {
        groups,
        top,
        rate,
        sums: RefCell::new(None),
    };
    s.inplace_op1(&op)?;
    let Some(sums) = op.sums.into_inner() else {
        bail!("the row sums were not written")
    };
    Ok((s, sums))
}

/// The same in candle operations, for any device.
mod portable {
    use super::*;

    fn visible(s: &Tensor, groups: Groups) -> Result<Tensor> {
        let rows = Tensor::from_slice(groups.rows, (groups.rows.len(), 1), s.device())?;
        let cols = Tensor::from_slice(groups.cols, (1, groups.cols.len()), s.device())?;
        rows.broadcast_ne(&cols)
    }

    fn hide(s: &Tensor, groups: Groups) -> Result<Tensor> {
        let hidden = Tensor::full(f32::NEG_INFINITY, (1, 1), s.device())?.to_dtype(s.dtype())?;
        visible(s, groups)?.where_cond(s, &hidden.broadcast_as(s.shape())?)
    }

    pub(super) fn max(s: &Tensor, groups: Groups) -> Result<Tensor> {
        hide(s, groups)?.max_keepdim(1)
    }

    pub(super) fn exp(
        s: &Tensor,
        top: &Tensor,
        rate: f64,
        groups: Groups,
    ) -> Result<(Tensor, Tensor)> {
        let e = (hide(s, groups)?.broadcast_sub(top)? * rate)?.exp()?;
        let sums = e.sum_keepdim(1)?;
        Ok((e, sums))
    }
}

/// Independent accumulators per row: enough for the widest registers, and a fixed order of summation.
const LANES: usize = 16;

trait Real: WithDType + Float {
    /// `eˣ` for `x ≤ 0`; NaN stays NaN.
    fn exp_nonpositive(self) -> Self;
}

impl Real for f64 {
    fn exp_nonpositive(self) -> f64 {
        self.exp()
    }
}

impl Real for f32 {
    /// Without branches, so that the compiler vectorises it; within 2 units in the last place.
    #[inline(always)]
    fn exp_nonpositive(self) -> f32 {
        // Below this eˣ is no normal number any more, and counts as 0.
        const LOWEST: f32 = -87.0;
        // Adding 1.5·2²³ rounds to an integer, which then stands in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts: the first has so few bits that its multiples are exact.
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;

        let x = if self < LOWEST { LOWEST } else { self };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * LN2_HI) - n * LN2_LO;
        // Minimax polynomial of eʳ on |r| ≤ ln2 / 2 (Cephes expf).
        let p = 1.987_569_2e-4;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let p = p * (r * r) + r + 1.0;
        let two_to_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
        if self < LOWEST { 0.0 } else { p * two_to_n }
    }
}

fn row_max<T: Real>(row: &[T], cols: &[u32], own: u32) -> T {
    let see = |v: T, col: u32| if col == own { T::neg_infinity() } else { v };
    let larger = |a: T, b: T| if b > a { b } else { a };
    let (chunks, tail) = row.as_chunks::<LANES>();
    let (col_chunks, col_tail) = cols.as_chunks::<LANES>();
    let mut lanes = [T::neg_infinity(); LANES];
    for (chunk, cols) in chunks.iter().zip(col_chunks) {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], see(chunk[i], cols[i]));
        }
    }
    let tail = tail.iter().zip(col_tail).map(|(&v, &col)| see(v, col));
    lanes
        .into_iter()
        .chain(tail)
        .fold(T::neg_infinity(), larger)
}

fn row_exp<T: Real>(row: &mut [T], cols: &[u32], own: u32, top: T, rate: T) -> T {
    let weigh = |v: &mut T, col: u32| {
        let e = ((*v - top) * rate).exp_nonpositive();
        *v = if col == own { T::zero() } else { e };
        *v
    };
    let (chunks, tail) = row.as_chunks_mut::<LANES>();
    let (col_chunks, col_tail) = cols.as_chunks::<LANES>();
    let mut lanes = [T::zero(); LANES];
    for (chunk, cols) in chunks.iter_mut().zip(col_chunks) {
        for i in 0..LANES {
            lanes[i] += weigh(&mut chunk[i], cols[i]);
        }
    }
    let tail = tail.iter_mut().zip(col_tail).map(|(v, &col)| weigh(v, col));
    lanes.into_iter().chain(tail).fold(T::zero(), |a, b| a + b)
}

fn block(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("a block of similarities is contiguous"),
    }
}

struct Max<'a>(Groups<'a>);

impl Max<'_> {
    fn rows<T: Real>(&self, s: &[T], layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Groups { rows, cols } = self.0;
        let max: Vec<T> = s[block(layout)?]
            .par_chunks_exact(cols.len())
            .zip(rows)
            .map(|(row, &own)| row_max(row, cols, own))
            .collect();
        Ok((T::to_cpu_storage_owned(max), (rows.len(), 1).into()))
    }
}

impl CustomOp1 for Max<'_> {
    fn name(&self) -> &'static str {
        "row-max"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match storage {
            CpuStorage::F32(s) => self.rows(s, layout),
            CpuStorage::F64(s) => self.rows(s, layout),
            _ => bail!("similarities are f32 or f64"),
        }
    }
}

struct Exp<'a> {
    groups: Groups<'a>,
    top: &'a Tensor,
    rate: f64,
    /// What an in-place operation cannot return.
    sums: RefCell<Option<Tensor>>,
}

impl Exp<'_> {
    fn rows<T: Real>(&self, s: &mut [T], layout: &Layout) -> Result<()> {
        let Groups { rows, cols } = self.groups;
        let rate = T::from_f64(self.rate);
        let top = self.top.flatten_all()?.to_vec1::<T>()?;
        let sums: Vec<T> = s[block(layout)?]
            .par_chunks_exact_mut(cols.len())
            .zip(rows)
            .zip(top)
            .map(|((row, &own), top)| row_exp(row, cols, own, top, rate))
            .collect();
        let sums = Tensor::from_vec(sums, (rows.len(), 1), &Device::Cpu)?;
        *self.sums.borrow_mut() = Some(sums);
        Ok(())
    }
}

impl InplaceOp1 for Exp<'_> {
    fn name(&self) -> &'static str {
        "row-exp"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match storage {
            CpuStorage::F32(s) => self.rows(s, layout),
            CpuStorage::F64(s) => self.rows(s, layout),
            _ => bail!("similarities are f32 or f64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn close(a: &Tensor, b: &Tensor, tol: f64) {
        assert_eq!(a.dims(), b.dims());
        let flat = |t: &Tensor| {
            t.to_dtype(DType::F64)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        for (a, b) in flat(a).into_iter().zip(flat(b)) {
            assert!(
                a == b || (a - b).abs() <= tol * b.abs().max(1e-30),
                "{a} and {b}"
            );
        }
    }

    #[test]
    fn exp_is_within_two_ulp_and_vanishes_far_below() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..200_000 {
            let x: f32 = -87.0 * rng.random::<f32>().powi(2);
            let (got, want) = (x.exp_nonpositive(), f64::from(x).exp());
            assert!(
                (f64::from(got) - want).abs() <= 2.4e-7 * want,
                "exp({x}) = {got}, not {want}"
            );
        }
        assert_eq!(0f32.exp_nonpositive(), 1.0);
        assert_eq!((-88f32).exp_nonpositive(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_nonpositive(), 0.0);
        assert!(f32::NAN.exp_nonpositive().is_nan());
    }

    #[test]
    fn the_two_twins_agree() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(2);
        for (dtype, tol) in [(DType::F32, 2e-6), (DType::F64, 1e-13)] {
            for (r, c) in [(1, 1), (1, 40), (5, 16), (7, 33), (64, 100)] {
                let s: Vec<f64> = (0..r * c).map(|_| rng.random_range(-1.0..1.0)).collect();
                let s = Tensor::from_vec(s, (r, c), &Device::Cpu)?.to_dtype(dtype)?;
                let rows: Vec<u32> = (0..r).map(|_| rng.random_range(0..3)).collect();
                let cols: Vec<u32> = (0..c).map(|_| rng.random_range(0..3)).collect();
                let groups = Groups {
                    rows: &rows,
                    cols: &cols,
                };
                let top = max(&s, groups)?;
                close(&top, &portable::max(&s, groups)?, 0.0);
                for rate in [1.0, 100.0] {
                    let top =
                        top.maximum(&Tensor::full(-2.0, (r, 1), &Device::Cpu)?.to_dtype(dtype)?)?;
                    let (e, sums) = exp(s.copy()?, &top, rate, groups)?;
                    let (e2, sums2) = portable::exp(&s, &top, rate, groups)?;
                    close(&e, &e2, tol * rate);
                    close(&sums, &sums2, tol * rate);
                }
            }
        }
        Ok(())
    }
}
