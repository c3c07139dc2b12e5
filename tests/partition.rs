//! The part of a batch that takes part in the equivariance loss.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{cases, values};
use proptest::prelude::*;
use ser_reg::{Error, Partition};

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn both_parts_cover_the_batch(batch in 2usize..500, ratio in 0.0f64..=1.0) {
        let part = Partition::new(batch, ratio).unwrap();
        prop_assert_eq!(part.plain().start, 0);
        prop_assert_eq!(part.plain().end, part.regularized().start);
        prop_assert_eq!(part.regularized().end, batch);
        let rounded = (ratio * batch as f64).round() as usize;
        prop_assert_eq!(part.regularized().len(), rounded.max(2));
    }
}

#[test]
fn the_regularized_part_has_at_least_two_images() {
    for (batch, ratio, regularized) in [
        (64, 0.0, 2),
        (64, 0.01, 2),
        (64, 2.4 / 64.0, 2),
        (64, 2.6 / 64.0, 3),
        (64, 0.125, 8),
        (64, 1.0, 64),
        (2, 0.0, 2),
        (2, 1.0, 2),
        (3, 0.5, 2),
        (256, 0.01, 3),
        (u32::MAX as usize, 1.0, u32::MAX as usize),
    ] {
        let part = Partition::new(batch, ratio).unwrap();
        assert_eq!(part.regularized().len(), regularized, "{ratio} of {batch} images");
        assert_eq!(part.plain().len(), batch - regularized);
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let huge = u32::MAX as usize + 1;
    for (batch, ratio, parts) in [
        (64, -0.1, ["ratio", "within [0, 1]", "-0.1"]),
        (64, 1.1, ["ratio", "within [0, 1]", "1.1"]),
        (64, f64::NAN, ["ratio", "within [0, 1]", "NaN"]),
        (64, f64::INFINITY, ["ratio", "within [0, 1]", "inf"]),
        (1, 1.0, ["batch", "2 to 2^32 - 1 images", "got 1"]),
        (0, 0.5, ["batch", "2 to 2^32 - 1 images", "got 0"]),
        (huge, 0.5, ["batch", "2 to 2^32 - 1 images", "4294967296"]),
        (usize::MAX, 0.5, ["batch", "2 to 2^32 - 1 images", "18446744073709551615"]),
    ] {
        let error = Partition::new(batch, ratio).unwrap_err();
        assert!(matches!(error, Error::Config { .. }));
        for part in parts {
            assert!(error.to_string().contains(part), "{error} lacks {part:?}");
        }
    }
}

#[test]
fn split_keeps_the_order() {
    let x = Tensor::arange(0f64, 8.0, &Device::Cpu).unwrap();
    let (plain, regularized) = Partition::new(8, 0.25).unwrap().split(&x).unwrap();
    assert_eq!(values(&plain), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(values(&regularized), [6., 7.]);
    let (plain, regularized) = Partition::new(8, 1.0).unwrap().split(&x).unwrap();
    assert_eq!((plain.dims(), values(&regularized).len()), (&[0][..], 8));
}

#[test]
fn a_short_last_batch_is_an_error_with_its_cure() {
    let part = Partition::new(8, 0.5).unwrap();
    let short = Tensor::zeros((3, 3, 4, 4), DType::F32, &Device::Cpu).unwrap();
    let scalar = Tensor::new(1f32, &Device::Cpu).unwrap();
    for (x, got) in [(&short, "got [3, 3, 4, 4]"), (&scalar, "got []")] {
        let error = part.split(x).unwrap_err();
        assert!(matches!(error, Error::Input { .. }));
        for text in ["Partition::split", "8 images", "short last batch", got] {
            assert!(error.to_string().contains(text), "{error} lacks {text:?}");
        }
    }
}
