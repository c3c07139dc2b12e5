//! The images that stand for a set where not all of it is measured.

use crate::data::{Images, draw};

/// The seed of every draw. It is no setting, so that all encoders are measured on the same images.
pub const SEED: u64 = 0x5e7;

/// Indices of `count` images, drawn by class; all if there are not more.
pub fn indices(images: &Images, count: usize) -> Vec<usize> {
    draw::by_class(&images.labels, count, SEED)
}

/// The images of these indices.
pub fn select(images: &Images, indices: &[usize]) -> Images {
    Images {
        pixels: indices.iter().flat_map(|&i| images.get(i)).copied().collect(),
        labels: indices.iter().map(|&i| images.labels[i]).collect(),
        channels: images.channels,
        side: images.side,
    }
}

/// `count` images, drawn by class.
pub fn of(images: &Images, count: usize) -> Images {
    select(images, &indices(images, count))
}
