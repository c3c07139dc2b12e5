//! From group elements to the steps of an operator.

use super::{
    filter::{Filter, Footprint, Resample},
    permutation::Permutation,
    step::{Chain, Step},
    taps::Taps,
};
use crate::{
    TokenGrid,
    group::{Affine, D4, GroupAction},
};

/// Matrix entries below this are rounding.
const ZERO: f64 = 1e-12;

/// The steps by which `g` acts from `from` onto `to`, and which cells of `to` have a preimage (`None`: all).
pub(super) fn chain<G: GroupAction>(
    g: &G,
    from: TokenGrid,
    to: TokenGrid,
    resample: &Resample,
) -> (Chain, Option<Vec<bool>>) {
    let affine = g.affine();
    let (steps, valid) = match affine.and_then(|map| axis_aligned(&map)) {
        Some(map) => map.steps(from, to, resample),
        None => sparse(g, affine, from, to, resample),
    };
    (
        Chain::new(from, to, steps),
        valid.filter(|v| !v.iter().all(|&v| v)),
    )
}

/// A map that sends rows and columns to rows and columns: a D4 element, then a positive scale and shift per axis,
/// `s ↦ zoom·s + shift` from the result to the turned source, in units of the side and relative to the centre.
struct AxisAligned {
    turn: D4,
    zoom: [f64; 2],
    shift: [f64; 2],
}

fn axis_aligned(map: &Affine) -> Option<AxisAligned> {
    let (a, b) = map.source_map();
    let scale = a.iter().flatten().fold(0.0f64, |m, v| m.max(v.abs()));
    D4::ALL.into_iter().find_map(|turn| {
        // turned source = turn(source): the rows of `a` and `b` through the forward map of `turn`
        let forward = |v| turn.inverse().source_centred(v);
        let (u, v, shift) = (
            forward([a[0][0], a[1][0]]),
            forward([a[0][1], a[1][1]]),
            forward(b),
        );
        let diagonal =
            u[0] > 0.0 && v[1] > 0.0 && u[1].abs() <= ZERO * scale && v[0].abs() <= ZERO * scale;
        diagonal.then_some(AxisAligned {
            turn,
            zoom: [u[0], v[1]],
            shift,
        })
    })
}

impl AxisAligned {
    fn steps(
        &self,
        from: TokenGrid,
        to: TokenGrid,
        resample: &Resample,
    ) -> (Vec<Step>, Option<Vec<bool>>) {
        let middle = if self.turn.swaps_axes() {
            from.transposed()
        } else {
            from
        };
        let axis = |k: usize, n_in: usize, n_out: usize| {
            let start = (0.5 - self.zoom[k] / 2.0 + self.shift[k]) * n_in as f64;
            let width = self.zoom[k] * n_in as f64 / n_out as f64;
            (0..n_out).map(move |i| Footprint {
                centre: start + (i as f64 + 0.5) * width,
                width,
            })
        };
        let (rows, cols) = (
            axis(0, middle.rows(), to.rows()),
            axis(1, middle.cols(), to.cols()),
        );
        let inside = |axis: &dyn Fn() -> Vec<Footprint>, n| {
            axis().iter().map(|f| f.is_inside(n)).collect::<Vec<_>>()
        };
        let (valid_rows, valid_cols) = (
            inside(&|| rows.clone().collect(), middle.rows()),
            inside(&|| cols.clone().collect(), middle.cols()),
        );
        let valid = if valid_rows.iter().chain(&valid_cols).all(|&v| v) {
            None
        } else {
            let row = |&r: &bool| valid_cols.iter().map(move |&c| r && c);
            Some(valid_rows.iter().flat_map(row).collect())
        };
        let turn = (self.turn != D4::IDENTITY).then(|| {
            let source = self.turn.source_indices(from);
            Step::Permute(Permutation::new(source, from.len()))
        });
        let scale = Step::separable(
            resample.matrix(rows, middle.rows()),
            resample.matrix(cols, middle.cols()),
        );
        (turn.into_iter().chain(scale).collect(), valid)
    }
}

/// Any other map: sampled at the centre of every cell.
fn sparse<G: GroupAction>(
    g: &G,
    affine: Option<Affine>,
    from: TokenGrid,
    to: TokenGrid,
    resample: &Resample,
) -> (Vec<Step>, Option<Vec<bool>>) {
    let (h, w) = (from.rows() as f64, from.cols() as f64);
    // The extent of a target cell along the axes of the source, where the map is known to be affine.
    let [height, width] = match affine {
        Some(map) if resample.filter != Filter::Nearest => {
            let (a, _) = map.source_map();
            let extent = |k: usize, n: f64| {
                (a[k][0] / to.rows() as f64).hypot(a[k][1] / to.cols() as f64) * n
            };
            [extent(0, h), extent(1, w)]
        }
        _ if resample.filter == Filter::Area => [1.0, 1.0],
        _ => [0.0, 0.0],
    };
    let mut taps = Taps::with_capacity(from.len(), to.len());
    let mut valid = Vec::with_capacity(to.len());
    let mut cols: Vec<(usize, f64)> = Vec::new();
    for i in 0..to.rows() {
        for j in 0..to.cols() {
            let [y, x] = g.source(to.centre(i, j));
            let row = Footprint {
                centre: y * h,
                width: height,
            };
            let col = Footprint {
                centre: x * w,
                width,
            };
            cols.clear();
            resample.taps(col, from.cols(), |j, v| cols.push((j, v)));
            resample.taps(row, from.rows(), |i, u| {
                for &(j, v) in &cols {
                    taps.push(i * from.cols() + j, u * v);
                }
            });
            taps.end_row();
            valid.push(row.is_inside(from.rows()) && col.is_inside(from.cols()));
        }
    }
    let step = Step::sparse(taps);
    let identity = matches!(&step, Step::Permute(permutation) if permutation.is_identity());
    (if identity { vec![] } else { vec![step] }, Some(valid))
}
