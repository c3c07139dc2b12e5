//! Interpolation filters in one dimension, with PyTorch's `align_corners = false` conventions.

use super::taps::Taps;

/// How values between cells are interpolated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Filter {
    /// One cell. On axis-aligned maps the one that holds the upper left corner of the target cell, as PyTorch's
    /// `nearest` does; on others the one that holds its centre.
    Nearest,
    /// Two taps per axis, a triangle of half-width one.
    Bilinear,
    /// Four taps per axis, Keys' cubic with `a = −0.75`, as PyTorch and the authors of SER do.
    #[default]
    Bicubic,
    /// A triangle widened by the reduction, weights normalised to one: PyTorch's `antialias = true`, PIL.
    BilinearAntialias,
    /// Keys' cubic with `a = −0.5` widened by the reduction, weights normalised to one: PyTorch's `antialias = true`.
    BicubicAntialias,
    /// The mean of all cells that the target cell touches, as PyTorch's `area` and adaptive average pooling do.
    Area,
}

impl Filter {
    /// Every filter.
    pub const ALL: [Self; 6] = [
        Self::Nearest,
        Self::Bilinear,
        Self::Bicubic,
        Self::BilinearAntialias,
        Self::BicubicAntialias,
        Self::Area,
    ];
}

/// What lies beyond the border of the grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Padding {
    /// Nothing: such taps weigh zero.
    Zeros,
    /// The outermost cell, repeated; what `interpolate` does.
    #[default]
    Border,
    /// The grid mirrored at its border (at −½ and n−½ in cell indices).
    Reflection,
}

/// Filter and padding together: how an element becomes an operator where it is no permutation.
///
/// The default is bicubic with a repeated border, as in the authors' code.
///
/// ```
/// use ser_reg::{Filter, Padding, Resample};
/// let bilinear = Resample::from(Filter::Bilinear);
/// assert_eq!(bilinear, Resample { filter: Filter::Bilinear, padding: Padding::Border });
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Resample {
    /// How values between cells are interpolated.
    pub filter: Filter,
    /// What lies beyond the border.
    pub padding: Padding,
}

impl From<Filter> for Resample {
    fn from(filter: Filter) -> Self {
        Self {
            filter,
            padding: Padding::default(),
        }
    }
}

/// Where a target cell lies on one axis of the source, in cells: cell `i` spans `[i, i + 1]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Footprint {
    pub centre: f64,
    /// Width of the target cell.
    pub width: f64,
}

/// Distances below this, in cells, are rounding: a target centre this close to a source centre is that cell.
pub(super) const SNAP: f64 = 1e-9;

impl Footprint {
    /// Whether the centre lies on an axis of `n` cells.
    pub(super) fn is_inside(&self, n: usize) -> bool {
        self.centre >= -SNAP && self.centre <= n as f64 + SNAP
    }
}

impl Padding {
    fn index(self, i: i64, n: usize) -> Option<usize> {
        let n = n as i64;
        let inside = match self {
            _ if (0..n).contains(&i) => i,
            Self::Zeros => return None,
            Self::Border => i.clamp(0, n - 1),
            Self::Reflection => {
                let r = i.rem_euclid(2 * n);
                r.min(2 * n - 1 - r)
            }
        };
        Some(inside as usize)
    }
}

impl Resample {
    /// Calls `tap(index, weight)` for each tap of the target cell at `at`; an index may repeat.
    pub(super) fn taps(&self, at: Footprint, n: usize, mut tap: impl FnMut(usize, f64)) {
        let mut put = |i: i64, w: f64| {
            if w != 0.0
                && let Some(i) = self.padding.index(i, n)
            {
                tap(i, w);
            }
        };
        // Far outside nothing but the padding is seen; the clamp keeps indices small and reflects wide windows rightly.
        let centre = at.centre.clamp(-1e9, 1e9);
        match self.filter {
            Filter::Nearest => put((centre - at.width / 2.0 + SNAP).floor() as i64, 1.0),
            Filter::Bilinear => {
                let (i, t) = split(centre);
                put(i, 1.0 - t);
                put(i + 1, t);
            }
            Filter::Bicubic => {
                let (i, t) = split(centre);
                for k in -1..=2 {
                    put(i + k, cubic(t - k as f64, -0.75));
                }
            }
            Filter::BilinearAntialias => {
                self.antialias(centre, at.width, n, 1.0, |x| (1.0 - x.abs()).max(0.0), put);
            }
            Filter::BicubicAntialias => {
                self.antialias(centre, at.width, n, 2.0, |x| cubic(x, -0.5), put);
            }
            Filter::Area => {
                let lo = (centre - at.width / 2.0 + SNAP).floor() as i64;
                let hi = ((centre + at.width / 2.0 - SNAP).ceil() as i64).max(lo + 1);
                for i in lo..hi {
                    put(i, 1.0 / (hi - lo) as f64);
                }
            }
        }
    }

    /// The kernel widened to the reduction, cut at the border and normalised; a centre beyond the border sees the padding.
    fn antialias(
        &self,
        centre: f64,
        width: f64,
        n: usize,
        radius: f64,
        kernel: impl Fn(f64) -> f64,
        mut put: impl FnMut(i64, f64),
    ) {
        let centre = match self.padding {
            Padding::Zeros if !(-SNAP..=n as f64 + SNAP).contains(&centre) => return,
            Padding::Reflection => {
                let r = centre.rem_euclid(2.0 * n as f64);
                r.min(2.0 * n as f64 - r)
            }
            _ => centre.clamp(0.0, n as f64),
        };
        let scale = if width <= 1.0 + SNAP { 1.0 } else { width };
        let lo = ((centre - radius * scale + 0.5) as i64).max(0);
        let hi = ((centre + radius * scale + 0.5) as i64).min(n as i64);
        let snapped = snap(centre - 0.5) + 0.5;
        let weight = |i: i64| kernel((i as f64 + 0.5 - snapped) / scale);
        let total: f64 = (lo..hi).map(weight).sum();
        for i in lo..hi {
            put(i, weight(i) / total);
        }
    }

    /// The sparse matrix that samples `n_in` cells at the given footprints.
    pub(super) fn matrix(&self, at: impl ExactSizeIterator<Item = Footprint>, n_in: usize) -> Taps {
        let mut taps = Taps::with_capacity(n_in, at.len());
        for footprint in at {
            self.taps(footprint, n_in, |i, w| taps.push(i, w));
            taps.end_row();
        }
        taps
    }
}

/// The cell whose centre lies at or before `centre`, and the distance from it in `[0, 1)`.
fn split(centre: f64) -> (i64, f64) {
    let s = snap(centre - 0.5);
    (s.floor() as i64, s - s.floor())
}

fn snap(s: f64) -> f64 {
    if (s - s.round()).abs() < SNAP {
        s.round()
    } else {
        s
    }
}

/// Keys' cubic convolution kernel.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}
