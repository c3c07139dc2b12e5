//! Images from disk: IDX files, CIFAR-10 binaries, or a folder of image files, with classes or without.

mod cifar;
mod decode;
pub mod draw;
mod fingerprint;
mod folder;
mod idx;
mod images;
mod layout;
mod load;
mod note;
mod picture;
mod set;
mod source;
mod split;
pub(crate) mod walk;

use std::path::{Path, PathBuf};

pub use fingerprint::Fingerprint;
pub use folder::Folder;
pub use images::Images;
pub use load::load;
pub use picture::{Interpolation, Picture, Shaper, Window};
pub use source::{Data, Source, Wanted};
pub use walk::Skipped;

/// The images that programs take without `--data`.
pub fn embedded() -> PathBuf {
    fashion_mnist()
}

/// 10,000 images of Fashion-MNIST (its official test file) that come with the repository.
pub fn fashion_mnist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/fashion-mnist")
}
