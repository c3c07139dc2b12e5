//! Soft Augmentation weights: the curve of the paper, weights of known overlaps, and refused input.

mod loss_common;

use loss_common::{assert_close, assert_says};
use ser_reg::{
    GroupAction, TokenGrid,
    contrib::{SoftWeight, WeightScope},
    group::{Affine, D4, Element, Window},
    view::Relative,
};

type Done = ser_reg::Result<()>;

fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

fn soft(p_min: f64, k: f64) -> SoftWeight {
    SoftWeight { p_min, k, ..Default::default() }
}

fn wide(weights: &[f32]) -> Vec<f64> {
    weights.iter().map(|&w| f64::from(w)).collect()
}

/// Crops that overlap in part, on two grids.
fn crops() -> Relative<Element> {
    let window = |y, x| Element::from(Window::new(y, x, 0.5, 0.5).unwrap());
    let pairs = [
        (window(0.0, 0.0), window(0.25, 0.1).then(D4::HFLIP)),
        (window(0.1, 0.3), window(0.1, 0.2)),
        (window(0.2, 0.2), window(0.0, 0.1).then(D4::ROT90)),
    ];
    let relative = pairs.map(|(a, b)| Element::relative(&a, &b)).to_vec();
    Relative::new(relative, grid(4, 3), grid(3, 4)).unwrap()
}

#[test]
fn the_curve_is_the_formula_of_the_paper() {
    for (p_min, k) in [(0.0, 1.0), (0.1, 2.0), (0.01, 4.0), (1.0, 2.0)] {
        let soft = soft(p_min, k);
        for v in [0.0, 0.2, 0.5, 0.9, 1.0] {
            let p = 1.0 - (1.0 - p_min) * f64::powf(1.0 - v, k);
            assert_close(&[soft.weight(v)], &[p], 1e-15);
        }
        assert_eq!((soft.weight(-3.0), soft.weight(7.0)), (p_min, 1.0));
    }
}

#[test]
fn weights_are_the_curve_of_the_visibility() -> Done {
    // The second view is the right half of the first.
    let half = Element::from(Window::new(0.0, 0.5, 1.0, 0.5)?);
    let relative = Relative::new(vec![half, Element::identity()], grid(2, 4), grid(2, 2))?;
    let (p, all) = (0.1 + 0.9 * 0.75, [1.0; 8]);
    let tokens = [0.1, 0.1, 1.0, 1.0, 0.1, 0.1, 1.0, 1.0];
    for (scope, first) in [
        (WeightScope::Pairs, [p; 8]),
        (WeightScope::Tokens, tokens),
        (WeightScope::Both, tokens.map(|t| t * p)),
    ] {
        let soft = SoftWeight { scope, ..soft(0.1, 2.0) };
        let [w1, w2] = soft.weights(&relative, 2)?;
        assert_close(&wide(&w1), &[first, all].concat(), 1e-7);
        assert_eq!(w2, [1.0; 8], "the first view sees all of the second");
    }

    // Three quarters of the outermost token are visible.
    let shift = Element::from(Affine::translation(0.0, 0.25 / 4.0)?);
    let relative = Relative::new(vec![shift], grid(1, 4), grid(1, 4))?;
    let soft = SoftWeight { scope: WeightScope::Tokens, ..soft(0.0, 2.0) };
    let [first, second] = soft.weights(&relative, 1)?;
    assert_close(&wide(&first), &[1.0, 1.0, 1.0, 1.0 - 0.0625], 1e-7);
    assert_close(&wide(&second), &[1.0 - 0.0625, 1.0, 1.0, 1.0], 1e-7);

    // Views without overlap have the smallest weight.
    let away = Element::from(Affine::translation(3.0, 0.0)?);
    let relative = Relative::new(vec![away], grid(2, 2), grid(2, 2))?;
    for (scope, weight) in
        [(WeightScope::Pairs, 0.25), (WeightScope::Tokens, 0.25), (WeightScope::Both, 0.0625)]
    {
        let soft = SoftWeight { p_min: 0.25, k: 2.0, scope };
        assert_eq!(soft.weights(&relative, 1)?, [vec![weight; 4], vec![weight; 4]]);
    }
    Ok(())
}

#[test]
fn partial_overlaps_have_the_weight_of_their_visibility() -> Done {
    let relative = crops();
    let (pairs, tokens) = (relative.pair_visibility()?, relative.visibility()?);
    for scope in [WeightScope::Pairs, WeightScope::Tokens, WeightScope::Both] {
        let soft = SoftWeight { scope, ..soft(0.05, 3.0) };
        let curve = |v: f64| 1.0 - 0.95 * (1.0 - v).powi(3);
        let weights = soft.weights(&relative, 3)?;
        for view in [0, 1] {
            let expected = tokens[view].iter().enumerate().map(|(i, &token)| {
                let pair = curve(pairs[view][i / 12]);
                match scope {
                    WeightScope::Pairs => pair,
                    WeightScope::Tokens => curve(token),
                    WeightScope::Both => pair * curve(token),
                }
            });
            let expected: Vec<f64> = expected.collect();
            assert_close(&wide(&weights[view]), &expected, 1e-6);
            assert!(expected.iter().any(|w| 0.05 < *w && *w < 0.99));
        }
    }
    Ok(())
}

#[test]
fn turns_and_flips_have_weights_of_one() -> Done {
    let turns = [D4::ROT90, D4::HFLIP, D4::ROT180].map(Element::from).to_vec();
    let relative = Relative::new(turns, grid(3, 3), grid(3, 3))?;
    let [first, second] = SoftWeight::default().weights(&relative, 3)?;
    assert_eq!((first, second), (vec![1.0; 27], vec![1.0; 27]));
    Ok(())
}

#[test]
fn one_element_serves_a_whole_batch() -> Done {
    let half = Element::from(Window::new(0.0, 0.5, 1.0, 0.5)?);
    let one = Relative::new(vec![half], grid(2, 4), grid(2, 2))?;
    let three = Relative::new(vec![half; 3], grid(2, 4), grid(2, 2))?;
    let soft = SoftWeight { scope: WeightScope::Both, ..Default::default() };
    assert_eq!(soft.weights(&one, 3)?, soft.weights(&three, 3)?);
    Ok(())
}

#[test]
fn bad_input_is_named() {
    let relative = crops();
    for (p_min, k, images, parts) in [
        (-0.1, 2.0, 3, ["SoftWeight::p_min", "-0.1"]),
        (1.1, 2.0, 3, ["SoftWeight::p_min", "1.1"]),
        (f64::NAN, 2.0, 3, ["SoftWeight::p_min", "NaN"]),
        (0.1, 0.0, 3, ["SoftWeight::k", "0"]),
        (0.1, f64::NAN, 3, ["SoftWeight::k", "NaN"]),
        (0.1, f64::INFINITY, 3, ["SoftWeight::k", "inf"]),
        (0.1, 2.0, 2, ["a batch of 3 images", "got 2"]),
        (0.1, 2.0, 0, ["a batch of 3 images", "got 0"]),
    ] {
        assert_says(soft(p_min, k).weights(&relative, images), &parts);
    }
}
