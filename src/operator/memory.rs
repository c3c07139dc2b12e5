//! How the values of one sample lie in memory.

/// How values lie in memory around the grid axes of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// `(N, C)`: each cell holds `C` contiguous values.
    Tokens(usize),
    /// `(C, H, W)`: each of `C` planes holds the grid.
    Planes(usize),
}

impl Memory {
    /// Number of values per cell, `C`.
    pub fn channels(self) -> usize {
        match self {
            Self::Tokens(c) | Self::Planes(c) => c,
        }
    }
}
