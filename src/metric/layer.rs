//! Where the tokens of a layer are.

use crate::{Layout, TokenGrid};

/// The token grid of a layer, and how the layer's output becomes tokens.
///
/// ```
/// use ser_reg::{Layout, TokenGrid, metric::Layer};
/// let conv = Layer::from(TokenGrid::square(14)?); // a map (B, C, 14, 14)
/// let vit = Layer { grid: TokenGrid::square(7)?, layout: Layout { prefix: 1, ..Default::default() } };
/// assert_eq!(conv.layout, Layout::default());
/// assert_eq!(vit.grid.len(), 49);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its token grid for the images before they are transformed.
    pub grid: TokenGrid,
    /// How its output becomes tokens.
    pub layout: Layout,
}

impl From<TokenGrid> for Layer {
    /// No prefix tokens, channels first.
    fn from(grid: TokenGrid) -> Self {
        Self { grid, layout: Layout::default() }
    }
}
