//! Canvases: a texture with scraps of images, and whole objects on it.

use rand::{Rng, rngs::StdRng};
use ser_reg::{GroupAction, group::D4};

use super::{
    super::corruption::{Picture, picture::Edge, plasma},
    boxes::Box,
};
use crate::data::Images;

/// A canvas, and the truth about its tokens.
pub struct Scene {
    pub canvas: Picture,
    pub objects: Vec<Object>,
    /// 0 for background, else one more than the class, for each token.
    pub labels: Vec<u32>,
    /// The object that a token belongs to.
    pub owners: Vec<Option<usize>>,
}

/// An object that was pasted.
#[derive(Clone, Copy, Debug)]
pub struct Object {
    pub class: u32,
    /// The box around it, in tokens.
    pub at: Box,
}

/// Scraps of images that belong to no object.
const SCRAPS: usize = 3;
/// How often a place is drawn before an object is given up.
const TRIES: usize = 30;

impl Scene {
    /// Draws a canvas of `side` pixels with one to three of the images `candidates`, labelled in patches of `patch` pixels.
    pub fn draw(
        images: &Images,
        candidates: [usize; 3],
        side: usize,
        patch: usize,
        rng: &mut StdRng,
    ) -> Self {
        let mut canvas = texture(images.channels, side, rng);
        let mut owner_of_pixel = vec![None; side * side];
        for _ in 0..SCRAPS {
            scrap(&mut canvas, images, rng);
        }
        let mut objects: Vec<Object> = Vec::new();
        let wanted = rng.random_range(1..=3);
        for &index in &candidates[..wanted] {
            let cutout = Cutout::draw(images, index, side, rng);
            let room = side.saturating_sub(cutout.side);
            for _ in 0..TRIES {
                let (top, left) = (rng.random_range(0..=room), rng.random_range(0..=room));
                let Some(at) = cutout.bounds(top, left) else {
                    break;
                };
                // A first object must be there; others keep clear of those before.
                if objects.iter().any(|o| o.at.iou(&at) > 0.05) {
                    continue;
                }
                cutout.paste(&mut canvas, top, left, |pixel| {
                    owner_of_pixel[pixel] = Some(objects.len());
                });
                let class = images.labels[index];
                objects.push(Object { class, at });
                break;
            }
        }
        for object in &mut objects {
            object.at = object.at.over(patch as f64);
        }
        let owners = owners(&owner_of_pixel, side, patch, objects.len());
        let label = |o: &Option<usize>| o.map_or(0, |o| objects[o].class + 1);
        Self { labels: owners.iter().map(label).collect(), canvas, objects, owners }
    }
}

/// The object that covers at least half of a token, for each token.
fn owners(
    of_pixel: &[Option<usize>],
    side: usize,
    patch: usize,
    objects: usize,
) -> Vec<Option<usize>> {
    let grid = side / patch;
    let owner = |token: usize| {
        let (top, left) = (token / grid * patch, token % grid * patch);
        let mut counts = vec![0; objects];
        for row in top..top + patch {
            for owner in of_pixel[row * side + left..][..patch].iter().flatten() {
                counts[*owner] += 1;
            }
        }
        (0..objects).find(|&o| 2 * counts[o] >= patch * patch)
    };
    (0..grid * grid).map(owner).collect()
}

/// Clouds of low brightness and contrast: objects are seen, but no threshold cuts them out.
fn texture(channels: usize, side: usize, rng: &mut StdRng) -> Picture {
    let decay = rng.random_range(1.2..2.0);
    let contrast = rng.random_range(0.1..0.3);
    let clouds = plasma(side, decay, rng);
    let mut pixels = Vec::with_capacity(channels * side * side);
    for _ in 0..channels {
        let offset = rng.random_range(0.0..0.2);
        pixels.extend(clouds.iter().map(|c| offset + contrast * c));
    }
    Picture { pixels, channels, side }
}

/// Pastes a small piece of some image.
fn scrap(canvas: &mut Picture, images: &Images, rng: &mut StdRng) {
    let from = Picture::of(images, rng.random_range(0..images.len()));
    let size = (from.side / 4).clamp(1, canvas.side / 4);
    let mut place = |side: usize| rng.random_range(0..=side - size);
    let (top, left) = (place(from.side), place(from.side));
    let (to_top, to_left) = (place(canvas.side), place(canvas.side));
    let side = canvas.side;
    for (from_plane, plane) in from.planes().zip(canvas.planes_mut()) {
        for row in 0..size {
            let source = &from_plane[(top + row) * from.side + left..][..size];
            plane[(to_top + row) * side + to_left..][..size].copy_from_slice(source);
        }
    }
}

/// An object, cut out of its image, rotated and scaled.
struct Cutout {
    picture: Picture,
    mask: Vec<bool>,
    side: usize,
}

impl Cutout {
    fn draw(images: &Images, index: usize, canvas: usize, rng: &mut StdRng) -> Self {
        let picture = Picture::of(images, index);
        let mask = mask(&picture);
        let pose = D4::ALL[rng.random_range(0..8)];
        let scale = rng.random_range(0.6..1.2);
        let natural = picture.side.min(canvas / 2) as f32;
        let side = ((natural * scale).round() as usize).clamp(1, canvas);
        let step = picture.side as f32 / side as f32;
        // Where pixel `(row, col)` of the cut-out comes from, in pixels of the image.
        let source = |row: f32, col: f32| {
            let center = |p: f32| f64::from((p + 0.5) / side as f32);
            let [y, x] = pose.source([center(row), center(col)]);
            (y as f32 * picture.side as f32 - 0.5, x as f32 * picture.side as f32 - 0.5)
        };
        // Reduced images are smoothed first, so that no line falls between samples.
        let smooth = match step > 1.0 {
            true => picture.blurred(0.4 * step, 2.0, Edge::Nearest),
            false => picture.clone(),
        };
        let mut resized = Picture {
            pixels: vec![0.0; picture.channels * side * side],
            channels: picture.channels,
            side,
        };
        let mut resized_mask = vec![false; side * side];
        for row in 0..side {
            for col in 0..side {
                let (y, x) = source(row as f32, col as f32);
                let last = picture.side - 1;
                let near = |p: f32| (p.round().max(0.0) as usize).min(last);
                resized_mask[row * side + col] = mask[near(y) * picture.side + near(x)];
                for (plane, old) in smooth.planes().enumerate() {
                    resized.pixels[plane * side * side + row * side + col] =
                        bilinear(old, picture.side, y, x);
                }
            }
        }
        Self { picture: resized, mask: resized_mask, side }
    }

    /// The box around the object when its image stands at `(top, left)`; `None` if nothing of it is left.
    fn bounds(&self, top: usize, left: usize) -> Option<Box> {
        let at = |i: usize| (i / self.side, i % self.side);
        let inside = || (0..self.mask.len()).filter(|&i| self.mask[i]).map(at);
        let (first_row, last_row) = (inside().map(|p| p.0).min()?, inside().map(|p| p.0).max()?);
        let (first_col, last_col) = (inside().map(|p| p.1).min()?, inside().map(|p| p.1).max()?);
        Some(Box {
            top: (top + first_row) as f64,
            left: (left + first_col) as f64,
            bottom: (top + last_row + 1) as f64,
            right: (left + last_col + 1) as f64,
        })
    }

    fn paste(&self, canvas: &mut Picture, top: usize, left: usize, mut own: impl FnMut(usize)) {
        let (side, area) = (canvas.side, canvas.side * canvas.side);
        for (i, _) in self.mask.iter().enumerate().filter(|(_, inside)| **inside) {
            let pixel = (top + i / self.side) * side + left + i % self.side;
            own(pixel);
            for (plane, new) in self.picture.planes().enumerate() {
                canvas.pixels[plane * area + pixel] = new[i];
            }
        }
    }
}

fn bilinear(plane: &[f32], side: usize, y: f32, x: f32) -> f32 {
    let last = (side - 1) as f32;
    let (y, x) = (y.clamp(0.0, last), x.clamp(0.0, last));
    let (top, left) = (y as usize, x as usize);
    let (bottom, right) = ((top + 1).min(side - 1), (left + 1).min(side - 1));
    let (down, across) = (y - top as f32, x - left as f32);
    let row = |r: usize| {
        let (a, b) = (plane[r * side + left], plane[r * side + right]);
        a + across * (b - a)
    };
    row(top) + down * (row(bottom) - row(top))
}

/// Which pixels belong to the object: where the four corners agree, those unlike them; else all.
fn mask(picture: &Picture) -> Vec<bool> {
    let (side, area) = (picture.side, picture.side * picture.side);
    let corners = [0, side - 1, area - side, area - 1];
    let distance = |a: usize, b: usize| {
        let differences = picture.planes().map(|p| (p[a] - p[b]).abs());
        differences.fold(0f32, f32::max)
    };
    let uniform = corners.iter().all(|&c| distance(c, 0) < 0.05);
    let mask: Vec<bool> = (0..area).map(|i| !uniform || distance(i, 0) > 0.1).collect();
    match mask.iter().any(|m| *m) {
        true => mask,
        false => vec![true; area],
    }
}
