//! Strategies and helpers shared by the tests.
#![allow(dead_code, unused_imports)]

mod cases;
mod numbers;

pub use cases::cases;
pub use numbers::*;
use proptest::prelude::*;
use ser_reg::{
    Filter, Padding, TokenGrid,
    group::{Affine, D4, Element, Roll, Scale, Window},
};

/// The filters that accept any element. The Fourier filter needs one that keeps the period.
pub const LOCAL: [Filter; 6] = [
    Filter::Nearest,
    Filter::Bilinear,
    Filter::Bicubic,
    Filter::BilinearAntialias,
    Filter::BicubicAntialias,
    Filter::Area,
];

pub const PADDINGS: [Padding; 4] =
    [Padding::Zeros, Padding::Border, Padding::Reflection, Padding::Periodic];

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
    (-180.0f64..180.0, -0.5f64..0.5, -0.3f64..0.3, -0.3f64..0.3, 0.6f64..1.6).prop_map(
        |(turn, shear, y, x, zoom)| {
            use ser_reg::GroupAction;
            Affine::translation(y, x)
                .unwrap()
                .compose(&Affine::rotation(turn).unwrap())
                .compose(&Affine::shear(shear, 0.0).unwrap())
                .compose(&Affine::zoom(zoom, zoom).unwrap())
        },
    )
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
        links.iter().fold(Element::identity(), |g, next| g.then(*next))
    })
}
