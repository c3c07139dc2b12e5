//! Scales values before they are squared, so that no square leaves the range of `f64`.

/// The power of two that brings the largest magnitude into `[1, 2)`, as far as it is a normal
/// number; 1 if a value is infinite. A product with it is exact, unless the result is subnormal.
pub(super) fn unit<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    let largest = values.into_iter().fold(0f64, |m, v| m.max(v.abs()));
    if largest.is_infinite() {
        return 1.0;
    }
    let exponent = ((largest.to_bits() >> 52) as i64 - 1023).clamp(-1022, 1022);
    f64::from_bits(((1023 - exponent) as u64) << 52)
}

/// The Euclidean norm.
#[cfg(feature = "metrics")]
pub(super) fn norm<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().copied().collect();
    let unit = unit(&values);
    let square = |v: &f64| (v * unit) * (v * unit);
    values.iter().map(square).sum::<f64>().sqrt() / unit
}

#[cfg(test)]
mod tests {
    use super::unit;

    #[test]
    fn the_unit_of_any_magnitude_is_a_finite_power_of_two() {
        for largest in [5e-324, 1e-310, 1e-200, 0.75, 1.0, 3.0, 1e200, f64::MAX] {
            let u = unit(&[0.0, -largest, largest / 3.0]);
            assert!(u.is_normal() && u.to_bits() << 12 == 0, "{largest:e}: {u:e}");
            let scaled = largest * u;
            // The scales of the subnormal numbers and of the largest ones would overflow.
            let within = (1.0..2.0).contains(&scaled);
            assert!(within || !(1e-300..1e300).contains(&largest), "{largest:e}: {scaled:e}");
            assert!(scaled * scaled < 1e10, "{largest:e}: {scaled:e}");
        }
        assert!(unit(&[0.0]).is_normal());
        assert_eq!(unit(&[f64::INFINITY, 1e300]), 1.0);
    }
}
