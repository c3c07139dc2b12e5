//! Laws of groups, on points of the plane.

use super::{Checked, Law, require, some};
use crate::group::GroupAction;

/// Points on which elements are compared: no symmetry of the square maps one to another.
const PROBES: [[f64; 2]; 4] = [[0.13, 0.29], [0.71, 0.07], [0.46, 0.83], [0.97, 0.61]];

/// The largest distance between the sources of two elements over the probe points, relative to
/// their size.
fn distance<G: GroupAction>(a: &G, b: &G) -> f64 {
    let gap = |p| {
        let ([y, x], [v, u]) = (a.source(p), b.source(p));
        (y - v).abs().max((x - u).abs()) / (1.0 + y.abs().max(x.abs()))
    };
    PROBES.into_iter().map(gap).fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// Checks identity, inverse, associativity, `relative` and the composition of points on all pairs
/// and triples of `elements`, to `tolerance` in units of the image's side.
///
/// # Errors
/// The first law that does not hold.
pub fn check_group_laws<G: GroupAction>(elements: &[G], tolerance: f64) -> Checked {
    some("check_group_laws", elements)?;
    let same = |a: &G, b: &G| distance(a, b) <= tolerance;
    let near = |p: [f64; 2], q: [f64; 2]| {
        let size = 1.0 + p[0].abs().max(p[1].abs());
        (p[0] - q[0]).abs().max((p[1] - q[1]).abs()) <= tolerance * size
    };
    let e = G::identity();
    for g in elements {
        let neutral = same(&e.compose(g), g) && same(&g.compose(&e), g);
        require(neutral, Law::Identity, || format!("g = {g:?}"))?;
        let inverse = g.inverse();
        let undone = same(&inverse.compose(g), &e) && same(&g.compose(&inverse), &e);
        require(undone, Law::Inverse, || format!("g = {g:?}, inverse = {inverse:?}"))?;
        if let Some(map) = g.affine() {
            let agrees = PROBES.into_iter().all(|p| near(g.source(p), map.source(p)));
            require(agrees, Law::Affine, || format!("g = {g:?}, affine = {map:?}"))?;
        }
    }
    for a in elements {
        for b in elements {
            for c in elements {
                let associative = same(&a.compose(b).compose(c), &a.compose(&b.compose(c)));
                require(associative, Law::Associativity, || {
                    format!("a = {a:?}, b = {b:?}, c = {c:?}")
                })?;
            }
        }
    }
    for a in elements {
        for b in elements {
            let product = a.compose(b);
            for p in PROBES {
                let (once, twice) = (product.source(p), b.source(a.source(p)));
                require(near(once, twice), Law::Source, || {
                    format!("a = {a:?}, b = {b:?}, p = {p:?}: {once:?}, {twice:?}")
                })?;
            }
            let carried = same(&G::relative(a, b).compose(a), b);
            require(carried, Law::Relative, || format!("a = {a:?}, b = {b:?}"))?;
        }
    }
    Ok(())
}

/// Checks that the products of `generators` are exactly `elements`: a finite group.
///
/// # Errors
/// If a product is missing, or an element is never reached.
pub fn check_closure<G: GroupAction>(generators: &[G], elements: &[G], tolerance: f64) -> Checked {
    some("check_closure", elements)?;
    let find = |list: &[G], g: &G| list.iter().any(|h| distance(g, h) <= tolerance);
    let mut reached = vec![G::identity()];
    let mut next = 0;
    while next < reached.len() {
        for g in generators {
            let product = g.compose(&reached[next]);
            require(find(elements, &product), Law::Closure, || {
                format!("{product:?} is no element")
            })?;
            if !find(&reached, &product) {
                reached.push(product);
            }
        }
        next += 1;
    }
    for g in elements {
        require(find(&reached, g), Law::Closure, || format!("{g:?} is no product"))?;
    }
    Ok(())
}
