//! An image with boxes at the scale at which it is read, in any element of D4.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use ser_reg::{TokenGrid, group::D4};

use crate::{
    data::{self, voc::Annotated},
    eval::dense::boxes::Box,
};

/// A box with its class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Object {
    pub class: u32,
    /// In pixels of the scene.
    pub at: Box,
    pub difficult: bool,
}

/// An image that whole windows cover. It stands in the middle, and its mirror image fills the rest: so the windows of the
/// turned scene are the turned windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// Channel by channel, row by row.
    pub pixels: Vec<u8>,
    pub rows: usize,
    pub cols: usize,
    /// Where the image itself is.
    pub image: Box,
    pub objects: Vec<Object>,
}

/// What a token learns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Nothing: it lies at the rim of an object, in a difficult one, or outside of the image.
    Ignored,
    Background,
    /// The object of this number.
    Object(usize),
}

impl Scene {
    /// The image `scale` times as large, to be read in windows of `window` pixels.
    ///
    /// # Errors
    /// If the file cannot be read, or has another size than its annotation.
    pub fn read(annotated: &Annotated, scale: f64, window: usize) -> Result<Self> {
        let image = data::stored(&annotated.image)?;
        let size = (image.height() as usize, image.width() as usize);
        ensure!(
            size == (annotated.height, annotated.width),
            "expected an image of {}x{} pixels, got {}x{}",
            annotated.width,
            annotated.height,
            size.1,
            size.0
        );
        let ((height, rows), (width, cols)) =
            (fit(size.0, scale, window), fit(size.1, scale, window));
        let image = data::resized(&image, height, width)?;
        let (top, left) = ((rows - height) / 2, (cols - width) / 2);
        let source = |at: usize, before: usize, length: usize| {
            let at = (at as i64 - before as i64).rem_euclid(2 * length as i64) as usize;
            at.min(2 * length - 1 - at) as u32
        };
        let mut pixels = Vec::with_capacity(3 * rows * cols);
        for channel in 0..3 {
            for row in 0..rows {
                let y = source(row, top, height);
                let at = (0..cols).map(|col| image.get_pixel(source(col, left, width), y)[channel]);
                pixels.extend(at);
            }
        }
        let (down, across) = (height as f64 / size.0 as f64, width as f64 / size.1 as f64);
        let (top, left) = (top as f64, left as f64);
        let objects = annotated.objects.iter().map(|o| Object {
            class: o.class,
            at: Box {
                top: top + o.top * down,
                left: left + o.left * across,
                bottom: top + o.bottom * down,
                right: left + o.right * across,
            },
            difficult: o.difficult,
        });
        let (bottom, right) = (top + height as f64, left + width as f64);
        let image = Box { top, left, bottom, right };
        Ok(Self { pixels, rows, cols, image, objects: objects.collect() })
    }

    /// The scene under an element of D4. Pixels move exactly, and boxes up to the rounding of a subtraction.
    pub fn moved(&self, g: D4) -> Result<Self> {
        let grid = TokenGrid::new(self.rows, self.cols)?;
        let source = g.source_indices(grid);
        let planes = self.pixels.chunks_exact(self.rows * self.cols);
        let pixels = planes.flat_map(|plane| source.iter().map(|&i| plane[i as usize])).collect();
        let (rows, cols) = match g.swaps_axes() {
            true => (self.cols, self.rows),
            false => (self.rows, self.cols),
        };
        let size = [self.rows as f64, self.cols as f64];
        let moved = |object: &Object| Object { at: moved(g, object.at, size), ..*object };
        let objects = self.objects.iter().map(moved).collect();
        Ok(Self { pixels, rows, cols, image: self::moved(g, self.image, size), objects })
    }

    /// The windows `(n, 3, window, window)`, row by row, normalized.
    pub fn windows(
        &self,
        window: usize,
        statistics: &[(f32, f32)],
        device: &Device,
    ) -> Result<Tensor> {
        let (down, across) = (self.rows / window, self.cols / window);
        let mut values = Vec::with_capacity(self.pixels.len());
        for tile in 0..down * across {
            let (top, left) = (tile / across * window, tile % across * window);
            let planes = self.pixels.chunks_exact(self.rows * self.cols);
            for (plane, (mean, std)) in planes.zip(statistics) {
                for row in top..top + window {
                    let line = &plane[row * self.cols + left..][..window];
                    values.extend(line.iter().map(|&p| (f32::from(p) / 255.0 - mean) / std));
                }
            }
        }
        Ok(Tensor::from_vec(values, (down * across, 3, window, window), device)?)
    }

    /// The center of each token of each window, `(row, col)` in pixels, in the order of [`Self::windows`].
    pub fn centers(&self, window: usize, patch: usize) -> Vec<[f64; 2]> {
        let (grid, across) = (window / patch, self.cols / window);
        let tiles = self.rows / window * across;
        let center = |i: usize| {
            let (tile, token) = (i / (grid * grid), i % (grid * grid));
            let at = |window_at: usize, token_at: usize| {
                (window_at * window + token_at * patch) as f64 + patch as f64 / 2.0
            };
            [at(tile / across, token / grid), at(tile % across, token % grid)]
        };
        (0..tiles * grid * grid).map(center).collect()
    }

    /// What the tokens around these centers learn. An object owns the tokens of its middle, half of it along each side, and
    /// the one nearest to its center; of several objects the smallest does.
    pub fn targets(&self, centers: &[[f64; 2]], patch: usize) -> Vec<Target> {
        let inside = |b: &Box, [y, x]: [f64; 2]| {
            (b.top..b.bottom).contains(&y) && (b.left..b.right).contains(&x)
        };
        let mut targets: Vec<Target> = centers
            .iter()
            .map(|&c| if inside(&self.image, c) { Target::Background } else { Target::Ignored })
            .collect();
        let mut order: Vec<usize> = (0..self.objects.len()).collect();
        let area = |i: usize| self.objects[i].at.area();
        order.sort_by(|&a, &b| area(b).total_cmp(&area(a)));
        for i in order {
            let Object { at, difficult, .. } = self.objects[i];
            let [row, col, height, width] = at.seen_from([0.0, 0.0]);
            for (target, &[y, x]) in targets.iter_mut().zip(centers) {
                let (down, across) = ((y - row).abs(), (x - col).abs());
                let half = patch as f64 / 2.0;
                let nearest = down <= half && across <= half;
                let middle = down <= height / 4.0 && across <= width / 4.0;
                if !inside(&self.image, [y, x]) {
                    continue;
                }
                if (nearest || middle) && !difficult {
                    *target = Target::Object(i);
                } else if nearest || inside(&at, [y, x]) {
                    *target = Target::Ignored;
                }
            }
        }
        targets
    }
}

/// The length of one side of the image when scaled, and of the whole windows that cover it; both ends are filled alike.
fn fit(length: usize, scale: f64, window: usize) -> (usize, usize) {
    let scaled = (length as f64 * scale).round().max(2.0) as usize;
    let whole = scaled.next_multiple_of(window);
    (scaled - (whole - scaled) % 2, whole)
}

/// The box under `g`, in a scene of so many rows and columns: the flip first, then the quarter turns.
pub fn moved(g: D4, b: Box, [rows, cols]: [f64; 2]) -> Box {
    let flipped = match g.flip() {
        true => Box { left: cols - b.right, right: cols - b.left, ..b },
        false => b,
    };
    let turn = |(b, [rows, cols]): (Box, [f64; 2])| {
        let turned =
            Box { top: cols - b.right, left: b.top, bottom: cols - b.left, right: b.bottom };
        (turned, [cols, rows])
    };
    (0..g.turns()).fold((flipped, [rows, cols]), |turned, _| turn(turned)).0
}
