//! The two types the loss is computed in, with an exponential that vectorizes.

use candle_core::WithDType;
use faer::traits::RealField;
use num_traits::Float;

pub(super) trait Real: WithDType + Float + RealField {
    /// Below this `x` both `e^(−x)` and `e^x` are far from the ends of the type: weights `share·e^x/τ` add up.
    const LOWEST_EXPONENT: f64;

    /// The value as an `f64`.
    fn widen(self) -> f64;

    /// `eˣ` for `x ≤ 0` (and a rounding above); NaN stays NaN.
    fn exp_nonpositive(self) -> Self;
}

impl Real for f64 {
    const LOWEST_EXPONENT: f64 = 690.0;

    fn widen(self) -> f64 {
        self
    }

    #[inline(always)]
    fn exp_nonpositive(self) -> f64 {
        self.exp()
    }
}

impl Real for f32 {
    const LOWEST_EXPONENT: f64 = 80.0;

    fn widen(self) -> f64 {
        self.into()
    }

    /// Without branches, so that the compiler vectorizes it; within 2 units in the last place.
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn exp_is_within_two_ulp_and_vanishes_far_below() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..200_000 {
            let x: f32 = -87.0 * rng.random::<f32>().powi(2);
            let (got, want) = (x.exp_nonpositive(), f64::from(x).exp());
            assert!((f64::from(got) - want).abs() <= 2.4e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(0f32.exp_nonpositive(), 1.0);
        assert_eq!((-88f32).exp_nonpositive(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_nonpositive(), 0.0);
        assert!(f32::NAN.exp_nonpositive().is_nan());
    }
}
