//! Strategies and small helpers shared by the tests.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ser_reg::{
    Filter, Padding, TokenGrid,
    group::{Affine, D4, Element, Roll, Scale, Window},
};

/// Cases per property: `PROPTEST_CASES`, or few enough for every run of the suite.
pub fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|v| v.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// The filters that serve any map; Fourier wants one that keeps the period.
pub const LOCAL: [Filter; 6] = [
    Filter::Nearest,
    Filter::Bilinear,
    Filter::Bicubic,
    Filter::BilinearAntialias,
    Filter::BicubicAntialias,
    Filter::Area,
];

pub const PADDINGS: [Padding; 4] = [
    Padding::Zeros,
    Padding::Border,
    Padding::Reflection,
    Padding::Periodic,
];

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

pub fn grid() -> impl Strategy<Value = TokenGrid> {
    (1usize..=8, 1usize..=8).prop_map(|(r, c)| TokenGrid::new(r, c).unwrap())
}

pub fn d4() -> impl Strategy<Value = D4> {
    (0usize..8).prop_map(|i| D4::from_index(i).unwrap())
}

pub fn scale() -> impl Strategy<Value = Scale> {
    (0.5f64..2.0, 0.5f64..2.0).prop_map(|(y, x)| Scale::new(y, x).unwrap())
}

pub fn window() -> impl Strategy<Value = Window> {
    (-0.2f64..0.4, -0.2f64..0.4, 0.4f64..1.2, 0.4f64..1.2)
        .prop_map(|(t, l, h, w)| Window::new(t, l, h, w).unwrap())
}

pub fn roll() -> impl Strategy<Value = Roll> {
    (-2.0f64..2.0, -2.0f64..2.0).prop_map(|(y, x)| Roll::new(y, x).unwrap())
}

pub fn affine() -> impl Strategy<Value = Affine> {
    (
        -180.0f64..180.0,
        -0.5f64..0.5,
        -0.3f64..0.3,
        -0.3f64..0.3,
        0.6f64..1.6,
    )
        .prop_map(|(turn, shear, y, x, zoom)| {
            use ser_reg::GroupAction;
            Affine::translation(y, x)
                .unwrap()
                .compose(&Affine::rotation(turn).unwrap())
                .compose(&Affine::shear(shear, 0.0).unwrap())
                .compose(&Affine::zoom(zoom, zoom).unwrap())
        })
}

/// A chain of up to four elements of any kind.
pub fn element() -> impl Strategy<Value = Element> {
    let link = prop_oneof![
        d4().prop_map(Element::from),
        scale().prop_map(Element::from),
        window().prop_map(Element::from),
        affine().prop_map(Element::from),
    ];
    prop::collection::vec(link, 1..=4).prop_map(|links| {
        use ser_reg::GroupAction;
        links
            .iter()
            .fold(Element::identity(), |g, next| g.then(*next))
    })
}

pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = rng(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

pub fn max_gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let gaps = values(a)
        .into_iter()
        .zip(values(b))
        .map(|(a, b)| (a - b).abs());
    gaps.fold(0.0, |m, g| if g > m || g.is_nan() { g } else { m })
}
