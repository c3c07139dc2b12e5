//! Interpolation filters in one dimension, with PyTorch's `align_corners = false` conventions.

use std::f64::consts::PI;

use super::taps::Taps;
use crate::{Error, Result};

/// How values between cells are interpolated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Filter {
    /// One cell. On axis-aligned maps it is the cell of the target cell's upper left corner, like
    /// PyTorch's `nearest`; on other maps it is the cell of the target cell's center.
    Nearest,
    /// Two taps per axis, a triangle of half-width one.
    Bilinear,
    /// Four taps per axis, Keys' cubic with `a = −0.75`, like PyTorch and the authors of SER.
    #[default]
    Bicubic,
    /// A triangle widened by the reduction, weights normalized to one: PyTorch's `antialias =
    /// true`, PIL.
    BilinearAntialias,
    /// Keys' cubic with `a = −0.5` widened by the reduction, weights normalized to one: PyTorch's
    /// `antialias = true`.
    BicubicAntialias,
    /// The mean of all cells that the target cell touches, like PyTorch's `area` and adaptive
    /// average pooling.
    Area,
    /// Fourier interpolation of the periodic map: its spectrum is cut or padded with zeros, and
    /// evaluated at the centers of the target cells. On maps that are band-limited below the
    /// smallest grid of a chain, scales and cyclic shifts compose exactly.
    ///
    /// It reads every cell of a line and is defined for elements that keep the period: turns,
    /// flips, scales of the whole image and shifts. Crops, zooms, rotations and shears are errors,
    /// and so is any padding but [`Padding::Periodic`].
    ///
    /// An axis has `n` cells `x_j` at `(j+½)/n`, the target has `m` cells, and `b = min(n, m)`. The
    /// value at `p` is
    ///
    /// ```text
    /// y(p) = 1/n Σ_j x_j D(p − (j+½)/n),    D(d) = Σ_{|k| < b/2} cos(2πkd) + c·cos(πbd)
    /// ```
    ///
    /// The last term is the Nyquist frequency and exists for even `b` only. If the target has at
    /// least as many cells, `c = 1`: the coefficient is split between `+b/2` and `−b/2`. If it has
    /// fewer, `c = 2`: both coefficients are kept. So enlarging and shrinking back is the identity
    /// on all maps, for even sizes too. A shift by a fraction of a cell damps the Nyquist frequency
    /// of an even size; all lower frequencies keep their amplitude. The kernel is even and measured
    /// between centers, so flips and turns commute with it. Scaling with an ideal band limit is
    /// described in [arXiv 2311.02922](https://arxiv.org/abs/2311.02922).
    Fourier,
}

impl Filter {
    /// Every filter.
    pub const ALL: [Self; 7] = [
        Self::Nearest,
        Self::Bilinear,
        Self::Bicubic,
        Self::BilinearAntialias,
        Self::BicubicAntialias,
        Self::Area,
        Self::Fourier,
    ];
}

/// The values beyond the border of the grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Padding {
    /// Zeros.
    Zeros,
    /// The outermost cell, repeated, like PyTorch's `interpolate`.
    #[default]
    Border,
    /// The grid, mirrored at its border (at −½ and n−½ in cell indices).
    Reflection,
    /// The grid, repeated: a torus.
    Periodic,
}

/// Filter and padding of operators that resample. Permutations ignore both.
///
/// The default is bicubic with a repeated border, like the authors' code. `Resample::from(filter)`
/// has [`Padding::Border`], and [`Padding::Periodic`] for [`Filter::Fourier`], which needs it.
///
/// Views resample pixels and losses resample tokens: each has its setting, and the two may differ.
///
/// ```
/// use ser_reg::{Filter, Padding, Resample};
/// let bilinear = Resample::from(Filter::Bilinear);
/// assert_eq!(bilinear, Resample { filter: Filter::Bilinear, padding: Padding::Border });
/// assert_eq!(Resample::from(Filter::Fourier).padding, Padding::Periodic);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Resample {
    /// How values between cells are interpolated.
    pub filter: Filter,
    /// The values beyond the border.
    pub padding: Padding,
}

impl From<Filter> for Resample {
    fn from(filter: Filter) -> Self {
        Self {
            filter,
            padding: match filter {
                Filter::Fourier => Padding::Periodic,
                _ => Padding::default(),
            },
        }
    }
}

/// The position of a target cell on one axis of the source, in cells: cell `i` spans `[i, i + 1]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Footprint {
    pub center: f64,
    /// Width of the target cell.
    pub width: f64,
}

/// Distances below this, in cells, are rounding: a target center this close to a source center
/// coincides with it.
pub(super) const SNAP: f64 = 1e-9;

impl Footprint {
    /// Whether the center lies on an axis of `n` cells.
    pub(super) fn is_inside(&self, n: usize) -> bool {
        self.center >= -SNAP && self.center <= n as f64 + SNAP
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
            Self::Periodic => i.rem_euclid(n),
        };
        Some(inside as usize)
    }
}

impl Resample {
    /// Whether filter and padding fit each other.
    pub(crate) fn check(&self) -> Result<()> {
        if self.filter == Filter::Fourier && self.padding != Padding::Periodic {
            return Err(Error::config(
                "Resample::padding",
                "Padding::Periodic with Filter::Fourier (Resample::from(Filter::Fourier) has it)",
                format!("{:?}", self.padding),
            ));
        }
        Ok(())
    }

    /// Calls `tap(index, weight)` for each tap of the target cell at `at`; an index may repeat.
    pub(super) fn taps(&self, at: Footprint, n: usize, mut tap: impl FnMut(usize, f64)) {
        let mut put = |i: i64, w: f64| {
            if w != 0.0
                && let Some(i) = self.padding.index(i, n)
            {
                tap(i, w);
            }
        };
        // Far outside only the padding is visible. The clamp keeps indices small.
        let center = at.center.clamp(-1e9, 1e9);
        match self.filter {
            Filter::Nearest => put((center - at.width / 2.0 + SNAP).floor() as i64, 1.0),
            Filter::Bilinear => {
                let (i, t) = split(center);
                put(i, 1.0 - t);
                put(i + 1, t);
            }
            Filter::Bicubic => {
                let (i, t) = split(center);
                for k in -1..=2 {
                    put(i + k, cubic(t - k as f64, -0.75));
                }
            }
            Filter::BilinearAntialias => {
                self.antialias(center, at.width, n, 1.0, |x| (1.0 - x.abs()).max(0.0), put);
            }
            Filter::BicubicAntialias => {
                self.antialias(center, at.width, n, 2.0, |x| cubic(x, -0.5), put);
            }
            Filter::Area => {
                let lo = (center - at.width / 2.0 + SNAP).floor() as i64;
                let hi = ((center + at.width / 2.0 - SNAP).ceil() as i64).max(lo + 1);
                for i in lo..hi {
                    put(i, 1.0 / (hi - lo) as f64);
                }
            }
            // The element keeps the period, so the width of a target cell gives their number.
            Filter::Fourier => fourier(center, n, (n as f64 / at.width).round() as usize, put),
        }
    }

    /// The kernel, widened by the reduction, cut at the border and normalized. A center beyond the
    /// border reads the padding.
    fn antialias(
        &self,
        center: f64,
        width: f64,
        n: usize,
        radius: f64,
        kernel: impl Fn(f64) -> f64,
        mut put: impl FnMut(i64, f64),
    ) {
        let center = match self.padding {
            Padding::Zeros if !(-SNAP..=n as f64 + SNAP).contains(&center) => return,
            Padding::Reflection => {
                let r = center.rem_euclid(2.0 * n as f64);
                r.min(2.0 * n as f64 - r)
            }
            Padding::Periodic => center.rem_euclid(n as f64),
            _ => center.clamp(0.0, n as f64),
        };
        let scale = if width <= 1.0 + SNAP { 1.0 } else { width };
        let (lo, hi) = (center - radius * scale + 0.5, center + radius * scale + 0.5);
        let (lo, hi) = match self.padding {
            // A torus has no border to cut at.
            Padding::Periodic => (lo.floor() as i64, hi.floor() as i64),
            _ => ((lo as i64).max(0), (hi as i64).min(n as i64)),
        };
        let snapped = snap(center - 0.5) + 0.5;
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

/// The cell whose center lies at or before `center`, and the distance from it in `[0, 1)`.
fn split(center: f64) -> (i64, f64) {
    let s = snap(center - 0.5);
    (s.floor() as i64, s - s.floor())
}

fn snap(s: f64) -> f64 {
    if (s - s.round()).abs() < SNAP { s.round() } else { s }
}

/// Fourier interpolation of `n` cells at `center`, in cells, for a target of `m` cells.
fn fourier(center: f64, n: usize, m: usize, mut put: impl FnMut(i64, f64)) {
    // Without a reduction the kernel is 1 at the center of its cell and 0 at all other centers.
    let (i, t) = split(center);
    if m >= n && t == 0.0 {
        return put(i, 1.0);
    }
    let band = n.min(m);
    // The frequencies below Nyquist sum to sin(π·terms·d) / sin(πd).
    let terms = (2 * ((band.max(1) - 1) / 2) + 1) as f64;
    let nyquist = match (band.is_multiple_of(2), m < n) {
        (false, _) => 0.0,
        (true, false) => 1.0,
        (true, true) => 2.0,
    };
    for j in 0..n {
        let d = (center - j as f64 - 0.5) / n as f64;
        let d = d - d.round();
        let below = if d == 0.0 { terms } else { (PI * terms * d).sin() / (PI * d).sin() };
        put(j as i64, (below + nyquist * (PI * band as f64 * d).cos()) / n as f64);
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
