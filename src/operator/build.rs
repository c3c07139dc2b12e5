//! From group elements to the steps of an operator.

use super::{
    chain::Chain,
    filter::{Filter, Footprint, Resample, SNAP},
    permutation::Permutation,
    step::Step,
    taps::Taps,
};
use crate::{
    Error, Result, TokenGrid,
    group::{Affine, D4, GroupAction, Point},
};

/// Matrix entries below this are rounding.
const ZERO: f64 = 1e-12;

/// Steps, and which cells of the target have a preimage (`None`: all).
type Built = (Vec<Step>, Option<Vec<bool>>);

/// The steps by which `g` acts from `from` onto `to`, and which cells of `to` have a preimage
/// (`None`: all).
pub(super) fn chain<G: GroupAction>(
    g: &G,
    from: TokenGrid,
    to: TokenGrid,
    resample: &Resample,
) -> Result<(Chain, Option<Vec<bool>>)> {
    resample.check()?;
    let affine = g.affine();
    let (steps, valid) = match affine.map(|map| (map, axis_aligned(&map))) {
        Some((_, Some(map))) => {
            let keeps_period = map.zoom.iter().all(|z| (z - 1.0).abs() <= SNAP);
            fits(resample, g, keeps_period)?;
            map.steps(from, to, resample)
        }
        Some((map, None)) => {
            fits(resample, g, false)?;
            sparse(&Sources::of(g, to), Some(map), from, to, resample)
        }
        None => {
            let sources = Sources::of(g, to);
            match sources.axes() {
                Some(axes) => {
                    let keeps_period = axes.iter().all(|axis| keeps_period(axis));
                    fits(resample, g, keeps_period)?;
                    separable(axes, from, resample)
                }
                None => {
                    fits(resample, g, false)?;
                    sparse(&sources, None, from, to, resample)
                }
            }
        }
    };
    Ok((Chain::new(from, to, steps), valid.filter(|v| !v.iter().all(|&v| v))))
}

/// [`Filter::Fourier`] resamples whole periods only.
fn fits<G: GroupAction>(resample: &Resample, g: &G, keeps_period: bool) -> Result<()> {
    if resample.filter != Filter::Fourier || keeps_period {
        return Ok(());
    }
    Err(Error::input(
        "GridOperator",
        "turns, flips, scales of the whole image or shifts with Filter::Fourier, which keep the \
         period of the map (for crops, zooms, rotations and shears take Filter::Bicubic)",
        format!("{g:?}"),
    ))
}

/// The sources of the centers of all cells of a grid.
struct Sources {
    grid: TokenGrid,
    points: Vec<Point>,
}

impl Sources {
    fn of<G: GroupAction>(g: &G, grid: TokenGrid) -> Self {
        let center = |i: usize| grid.center(i / grid.cols(), i % grid.cols());
        Self { grid, points: (0..grid.len()).map(|i| g.source(center(i))).collect() }
    }

    /// The sources of rows and of columns, if rows come from rows and columns come from columns.
    fn axes(&self) -> Option<[Vec<f64>; 2]> {
        let cols = self.grid.cols();
        let first = self.points.get(..cols)?;
        let mut rows = Vec::with_capacity(self.grid.rows());
        for line in self.points.chunks_exact(cols) {
            let y = line[0][0];
            let aligned =
                |(p, q): (&Point, &Point)| (p[0] - y).abs() <= ZERO && (p[1] - q[1]).abs() <= ZERO;
            if !line.iter().zip(first).all(aligned) {
                return None;
            }
            rows.push(y);
        }
        Some([rows, first.iter().map(|p| p[1]).collect()])
    }
}

/// Whether the sources are equally spaced over exactly one period.
fn keeps_period(axis: &[f64]) -> bool {
    let Some(first) = axis.first() else {
        return false;
    };
    let step = 1.0 / axis.len() as f64;
    axis.iter().enumerate().all(|(i, p)| {
        let d = p - first - i as f64 * step;
        (d - d.round()).abs() <= SNAP
    })
}

/// A map that is not affine but sends rows to rows and columns to columns, for example a cyclic
/// shift.
fn separable(axes: [Vec<f64>; 2], from: TokenGrid, resample: &Resample) -> Built {
    let footprints = |axis: &[f64], n: usize| {
        let width = match resample.filter {
            Filter::Nearest => 0.0,
            _ if keeps_period(axis) => n as f64 / axis.len() as f64,
            Filter::Area => 1.0,
            _ => 0.0,
        };
        let at = |p: &f64| Footprint { center: p * n as f64, width };
        axis.iter().map(at).collect::<Vec<_>>()
    };
    let [rows, cols] = axes;
    let (rows, cols) = (footprints(&rows, from.rows()), footprints(&cols, from.cols()));
    let inside = |axis: &[Footprint], n| axis.iter().map(|f| f.is_inside(n)).collect::<Vec<_>>();
    let valid = outer(&inside(&rows, from.rows()), &inside(&cols, from.cols()));
    let step = Step::separable(
        resample.matrix(rows.into_iter(), from.rows()),
        resample.matrix(cols.into_iter(), from.cols()),
    );
    (step.into_iter().collect(), Some(valid))
}

/// Cells of which both the row and the column are marked.
fn outer(rows: &[bool], cols: &[bool]) -> Vec<bool> {
    let row = |&r: &bool| cols.iter().map(move |&c| r && c);
    rows.iter().flat_map(row).collect()
}

/// A map that sends rows and columns to rows and columns: a D4 element, then a positive scale and
/// shift per axis. `s ↦ zoom·s + shift` leads from the result to the turned source, in units of the
/// side and relative to the center.
struct AxisAligned {
    turn: D4,
    zoom: [f64; 2],
    shift: [f64; 2],
}

fn axis_aligned(map: &Affine) -> Option<AxisAligned> {
    let turn = map.d4_part()?;
    let (a, b) = map.source_map();
    // The turned source is turn(source): the forward map of `turn` acts on the columns of `a` and
    // on `b`.
    let forward = |v| turn.inverse().source_centered(v);
    let (u, v) = (forward([a[0][0], a[1][0]]), forward([a[0][1], a[1][1]]));
    Some(AxisAligned { turn, zoom: [u[0], v[1]], shift: forward(b) })
}

impl AxisAligned {
    fn steps(&self, from: TokenGrid, to: TokenGrid, resample: &Resample) -> Built {
        let middle = if self.turn.swaps_axes() { from.transposed() } else { from };
        let axis = |k: usize, n_in: usize, n_out: usize| {
            let start = (0.5 - self.zoom[k] / 2.0 + self.shift[k]) * n_in as f64;
            let width = self.zoom[k] * n_in as f64 / n_out as f64;
            (0..n_out).map(move |i| Footprint { center: start + (i as f64 + 0.5) * width, width })
        };
        let (rows, cols) = (axis(0, middle.rows(), to.rows()), axis(1, middle.cols(), to.cols()));
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
            Some(outer(&valid_rows, &valid_cols))
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

/// Any other map, sampled at the center of every cell.
fn sparse(
    sources: &Sources,
    affine: Option<Affine>,
    from: TokenGrid,
    to: TokenGrid,
    resample: &Resample,
) -> Built {
    let (h, w) = (from.rows() as f64, from.cols() as f64);
    // The extent of a target cell along the axes of the source, if the map is affine.
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
    for &[y, x] in &sources.points {
        let row = Footprint { center: y * h, width: height };
        let col = Footprint { center: x * w, width };
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
    let step = Step::sparse(taps);
    let identity = matches!(&step, Step::Permute(permutation) if permutation.is_identity());
    (if identity { vec![] } else { vec![step] }, Some(valid))
}
