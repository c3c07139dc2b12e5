//! Random generators that a resumed run finds again.
//!
//! Whatever a step draws follows from the seed of the run, from what it is for, and from the number of the step. So a
//! resumed run has no generator to restore, and no draw moves another.

use rand::{SeedableRng, rngs::StdRng};

/// What numbers are drawn for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    Order,
    Crops,
    Views,
    DropPath,
    /// Dropped branches of an add-on's own views.
    AddonDropPath,
    /// What an add-on's statistics are taken from.
    AddonStatistics,
    /// Parts of a set of images.
    Draw,
    /// Windows of images with boxes.
    Windows,
}

/// The seed for `purpose` at `index`, a step or an epoch.
pub fn seed(run: u64, purpose: Purpose, index: usize) -> u64 {
    // SplitMix64's finisher: neighboring inputs give unrelated seeds.
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let mut state = 0;
    for part in [run, purpose as u64, index as u64] {
        state = mix(state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    state
}

/// A generator seeded so.
pub fn generator(run: u64, purpose: Purpose, index: usize) -> StdRng {
    StdRng::seed_from_u64(seed(run, purpose, index))
}
