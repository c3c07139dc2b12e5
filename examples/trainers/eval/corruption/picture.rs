//! A square image in numbers from 0 to 1, and the resampling that corruptions need.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::data::Images;

/// Channel by channel, row by row; one channel or three.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub pixels: Vec<f32>,
    pub channels: usize,
    pub side: usize,
}

impl Picture {
    /// Image `i` of a set.
    pub fn of(images: &Images, i: usize) -> Self {
        Self {
            pixels: images.get(i).iter().map(|&p| f32::from(p) / 255.0).collect(),
            channels: images.channels,
            side: images.side,
        }
    }

    /// One channel of one value.
    pub fn plane(side: usize, value: f32) -> Self {
        Self { pixels: vec![value; side * side], channels: 1, side }
    }

    pub fn planes(&self) -> std::slice::ChunksExact<'_, f32> {
        self.pixels.chunks_exact(self.side * self.side)
    }

    pub fn planes_mut(&mut self) -> std::slice::ChunksExactMut<'_, f32> {
        self.pixels.chunks_exact_mut(self.side * self.side)
    }

    /// Brightness of each pixel: of three channels the usual sum, of others the mean.
    pub fn gray(&self) -> Vec<f32> {
        let weights = match self.channels {
            3 => vec![0.299, 0.587, 0.114],
            n => vec![1.0 / n as f32; n],
        };
        let mut gray = vec![0.0; self.side * self.side];
        for (plane, weight) in self.planes().zip(weights) {
            for (g, p) in gray.iter_mut().zip(plane) {
                *g += weight * p;
            }
        }
        gray
    }

    /// The image whose pixel `(row, col)` is the old one at `source(row, col)`, in pixels, bilinear; beyond the border
    /// lies what `edge` says.
    pub fn warp(&self, edge: Edge, source: impl Fn(f32, f32) -> (f32, f32)) -> Self {
        let side = self.side;
        let mut out = self.clone();
        for row in 0..side {
            for col in 0..side {
                let (y, x) = source(row as f32, col as f32);
                let (top, left) = (y.floor(), x.floor());
                let (down, across) = (y - top, x - left);
                let tap = |i: f32| {
                    let inside = edge != Edge::Black || (0.0..side as f32).contains(&i);
                    (edge.index(i as i64, side), f32::from(inside))
                };
                let (rows, cols) = ([tap(top), tap(top + 1.0)], [tap(left), tap(left + 1.0)]);
                let area = side * side;
                for (plane, old) in self.planes().enumerate() {
                    let at = |r: usize, c: usize| {
                        old[rows[r].0 * side + cols[c].0] * rows[r].1 * cols[c].1
                    };
                    let upper = at(0, 0) + across * (at(0, 1) - at(0, 0));
                    let lower = at(1, 0) + across * (at(1, 1) - at(1, 0));
                    out.pixels[plane * area + row * side + col] = upper + down * (lower - upper);
                }
            }
        }
        out
    }

    /// Magnified about the center.
    pub fn zoomed(&self, factor: f32, edge: Edge) -> Self {
        let center = (self.side as f32 - 1.0) / 2.0;
        let source = |p: f32| center + (p - center) / factor;
        self.warp(edge, |row, col| (source(row), source(col)))
    }

    /// A sum of shifted copies: each tap is `(down, right, weight)` of where a pixel looks.
    pub fn filtered(&self, taps: &[(i64, i64, f32)], edge: Edge) -> Self {
        let side = self.side;
        let reach = taps.iter().map(|t| t.0.abs().max(t.1.abs())).max().unwrap_or(0) as usize;
        // Indices of rows and columns, so that the border costs no branch.
        let index: Vec<usize> =
            (0..side + 2 * reach).map(|i| edge.index(i as i64 - reach as i64, side)).collect();
        let mut out = self.clone();
        for (old, new) in self.planes().zip(out.planes_mut()) {
            new.fill(0.0);
            for &(down, right, weight) in taps {
                let (down, right) = (reach as i64 + down, reach as i64 + right);
                let cols = &index[right as usize..right as usize + side];
                for (row, new) in new.chunks_exact_mut(side).enumerate() {
                    let old = &old[index[row + down as usize] * side..][..side];
                    for (new, &col) in new.iter_mut().zip(cols) {
                        *new += weight * old[col];
                    }
                }
            }
        }
        out
    }

    /// Blurred by a Gaussian that is cut off at `truncate` standard deviations.
    pub fn blurred(&self, sigma: f32, truncate: f32, edge: Edge) -> Self {
        let radius = (truncate * sigma + 0.5) as i64;
        if radius == 0 {
            return self.clone();
        }
        let weight = |i: i64| (-0.5 * (i as f32 / sigma).powi(2)).exp();
        let total: f32 = (-radius..=radius).map(weight).sum();
        let line: Vec<_> = (-radius..=radius).map(|i| (i, weight(i) / total)).collect();
        let rows: Vec<_> = line.iter().map(|&(i, w)| (i, 0, w)).collect();
        let cols: Vec<_> = line.iter().map(|&(i, w)| (0, i, w)).collect();
        self.filtered(&rows, edge).filtered(&cols, edge)
    }
}

/// What lies beyond the border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// The outermost pixel.
    Nearest,
    /// The mirror image, the outermost pixel twice.
    Reflect,
    /// The mirror image, the outermost pixel once.
    Mirror,
    /// Black, in a warp; elsewhere the outermost pixel.
    Black,
}

impl Edge {
    fn index(self, i: i64, side: usize) -> usize {
        let n = side as i64;
        let index = match self {
            Self::Nearest | Self::Black => i.clamp(0, n - 1),
            Self::Reflect => {
                let i = i.rem_euclid(2 * n);
                i.min(2 * n - 1 - i)
            }
            Self::Mirror if n == 1 => 0,
            Self::Mirror => {
                let i = i.rem_euclid(2 * n - 2);
                i.min(2 * n - 2 - i)
            }
        };
        index as usize
    }
}

/// Images as a batch `(B, C, S, S)`, each channel less its mean and over its standard deviation.
pub fn normalized(
    pictures: &[Picture],
    statistics: &[(f32, f32)],
    device: &Device,
) -> Result<Tensor> {
    let (channels, side) = pictures.first().map_or((0, 0), |p| (p.channels, p.side));
    let mut values = Vec::with_capacity(pictures.len() * channels * side * side);
    for picture in pictures {
        for (plane, (mean, std)) in picture.planes().zip(statistics) {
            values.extend(plane.iter().map(|p| (p - mean) / std));
        }
    }
    Ok(Tensor::from_vec(values, (pictures.len(), channels, side, side), device)?)
}
