//! Row kernels in plain Rust, written so that the compiler can vectorize them.

/// `e^x` to about 1e-7 relative, without branches; clamped where the result would leave the normal numbers.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's series on |r| ≤ ln(2)/2.
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    // Multiplies by 2^n: adds n to the exponent.
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Lanes of the sums below: one running sum would wait for each addition.
const LANES: usize = 8;

#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let (chunks, rest) = a.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for a in chunks {
        for i in 0..LANES {
            lanes[i] += a[i];
        }
    }
    lanes.iter().chain(rest).sum()
}

#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    lanes.iter().sum::<f32>() + rest.sum::<f32>()
}

/// `total += row`
#[inline(always)]
pub fn accumulate(total: &mut [f32], row: &[f32]) {
    total.iter_mut().zip(row).for_each(|(t, r)| *t += r);
}

/// `out = (x − mean) / √(variance + eps)`; gives the factor `1 / √(variance + eps)`.
#[inline(always)]
pub fn standardize(x: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let count = x.len() as f32;
    let mean = sum(x) / count;
    out.iter_mut().zip(x).for_each(|(o, x)| *o = x - mean);
    let factor = 1.0 / (dot(out, out) / count + eps).sqrt();
    out.iter_mut().for_each(|o| *o *= factor);
    factor
}

/// Softmax of a row, in place.
#[inline]
pub fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|v| *v = exp(*v - max));
    let scale = 1.0 / sum(row);
    row.iter_mut().for_each(|v| *v *= scale);
}

/// `√(2/π)` and the cubic coefficient of the tanh form of GELU.
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

/// `σ(2u)` with `u` the argument of the tanh: GELU is `x·σ(2u)`.
#[inline(always)]
fn gelu_gate(x: f32) -> f32 {
    let u = GELU.0 * (x + GELU.1 * x * x * x);
    1.0 / (1.0 + exp(-2.0 * u))
}

#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    x * gelu_gate(x)
}

#[inline(always)]
pub fn gelu_slope(x: f32) -> f32 {
    let gate = gelu_gate(x);
    let slope = GELU.0 * (1.0 + 3.0 * GELU.1 * x * x);
    gate + x * gate * (1.0 - gate) * 2.0 * slope
}
