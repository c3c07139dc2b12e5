//! Square images of one size in memory.

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

use super::{
    draw,
    picture::{Picture, Shaper},
};

/// Square images with labels, `(n, channels, side, side)` bytes.
#[derive(Clone, Debug, Default)]
pub struct Images {
    pub pixels: Vec<u8>,
    pub labels: Vec<u32>,
    pub channels: usize,
    pub side: usize,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes per image.
    pub fn stride(&self) -> usize {
        self.channels * self.side * self.side
    }

    /// Image `i`, channel by channel.
    pub fn get(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.stride()..(i + 1) * self.stride()]
    }

    pub fn picture(&self, i: usize) -> Picture<'_> {
        Picture::Planes { pixels: self.get(i), channels: self.channels, side: self.side }
    }

    /// The images of these numbers.
    pub fn pick(&self, indices: &[usize]) -> Self {
        let mut some = self.empty();
        for &i in indices {
            some.push(self.get(i), self.labels[i]);
        }
        some
    }

    /// `n` images that stand for all of them, or all when there are fewer: a draw by class, the same for every run.
    pub fn draw(&self, n: usize) -> Self {
        self.pick(&self.drawn(n))
    }

    /// The indices of [`draw`](Self::draw), in increasing order.
    pub fn drawn(&self, n: usize) -> Vec<usize> {
        draw::by_class(&self.labels, n, draw::SEED)
    }

    /// Whether the images have labels of at least two classes.
    pub fn are_labelled(&self) -> bool {
        self.labels.iter().any(|l| *l != self.labels[0])
    }

    /// The number of images that are of one color each.
    pub fn constant(&self) -> usize {
        let plain = |plane: &[u8]| plane.iter().all(|p| *p == plane[0]);
        let planes = |i| self.get(i).chunks_exact(self.side * self.side);
        (0..self.len()).filter(|&i| planes(i).all(plain)).count()
    }

    /// The middles of the images at another size.
    pub fn scaled(&self, side: usize) -> Result<Self> {
        let mut scaled = Images { side, ..self.empty() };
        let mut shaper = Shaper::default();
        let mut pixels = vec![0; scaled.stride()];
        for (i, &label) in self.labels.iter().enumerate() {
            let picture = self.picture(i);
            shaper.shape(&picture, picture.middle(1.0), side, &mut pixels)?;
            scaled.push(&pixels, label);
        }
        Ok(scaled)
    }

    /// Mean and standard deviation of each channel, pixels in `[0, 1]`.
    pub fn statistics(&self) -> Vec<(f32, f32)> {
        let area = self.side * self.side;
        let count = (self.len() * area) as f64;
        let mut sums = vec![(0f64, 0f64); self.channels];
        for (plane, pixels) in self.pixels.chunks_exact(area).enumerate() {
            let (sum, squares) = &mut sums[plane % self.channels];
            for &p in pixels {
                let p = f64::from(p) / 255.0;
                *sum += p;
                *squares += p * p;
            }
        }
        let moments = |(sum, squares): (f64, f64)| {
            let mean = sum / count;
            let variance = (squares / count - mean * mean).max(0.0);
            // One constant channel must not divide by zero.
            (mean as f32, variance.sqrt().max(1e-3) as f32)
        };
        sums.into_iter().map(moments).collect()
    }

    /// The images of `batch`, `(B, C, S, S)`. Each channel has its mean subtracted and is divided by its standard deviation.
    pub fn normalized(
        &self,
        batch: Range<usize>,
        statistics: &[(f32, f32)],
        device: &Device,
    ) -> Result<Tensor> {
        self.gather(&batch.collect::<Vec<_>>(), statistics, device)
    }

    /// The images of these numbers, as [`Self::normalized`].
    pub fn gather(
        &self,
        indices: &[usize],
        statistics: &[(f32, f32)],
        device: &Device,
    ) -> Result<Tensor> {
        let shape = (indices.len(), self.channels, self.side, self.side);
        let mut pixels = Vec::with_capacity(indices.len() * self.stride());
        for &i in indices {
            let planes = self.get(i).chunks_exact(self.side * self.side);
            for (plane, (mean, std)) in planes.zip(statistics) {
                pixels.extend(plane.iter().map(|&p| (f32::from(p) / 255.0 - mean) / std));
            }
        }
        Ok(Tensor::from_vec(pixels, shape, device)?)
    }

    /// Appends images of the same shape; the first batch decides the shape.
    pub(super) fn append(&mut self, more: Images) -> Result<()> {
        if self.labels.is_empty() {
            *self = more;
            return Ok(());
        }
        let shape = |i: &Images| (i.channels, i.side);
        let (expected, got) = (shape(self), shape(&more));
        ensure!(
            expected == got,
            "expected images of (channels, side) {expected:?} as in the files before, got {got:?}"
        );
        self.pixels.extend(more.pixels);
        self.labels.extend(more.labels);
        Ok(())
    }

    pub(super) fn push(&mut self, pixels: &[u8], label: u32) {
        self.pixels.extend_from_slice(pixels);
        self.labels.push(label);
    }

    /// Gives each image the new label of its own; those whose label has none go.
    pub(super) fn relabel(&mut self, new: &[Option<u32>]) {
        let mut kept = self.empty();
        for (i, &label) in self.labels.iter().enumerate() {
            if let Some(label) = new[label as usize] {
                kept.push(self.get(i), label);
            }
        }
        *self = kept;
    }

    fn empty(&self) -> Images {
        Images { channels: self.channels, side: self.side, ..Default::default() }
    }
}
