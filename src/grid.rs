//! Token grids, and the layout of tokens in a tensor.

use candle_core::Tensor;

use crate::{Error, Result};

/// A grid of `rows × cols` cells over the unit square, y down, x right, row-major.
///
/// Cell `(i, j)` has the index `n = i·cols + j` and its center at `((i+½)/rows, (j+½)/cols)`. The
/// cells are tokens of a feature map or pixels of an image.
///
/// ```
/// use ser_reg::TokenGrid;
/// let grid = TokenGrid::new(7, 9)?;
/// assert_eq!((grid.rows(), grid.cols(), grid.len()), (7, 9, 63));
/// assert_eq!(grid.center(3, 4), [0.5, 0.5]);
/// assert!(TokenGrid::new(0, 9).is_err());
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenGrid {
    rows: usize,
    cols: usize,
}

impl std::fmt::Display for TokenGrid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.rows, self.cols)
    }
}

impl TokenGrid {
    /// A grid of `rows × cols` cells.
    ///
    /// # Errors
    /// If either is zero, or if there are more cells than a `u32` can index.
    pub fn new(rows: usize, cols: usize) -> Result<Self> {
        match rows.checked_mul(cols) {
            Some(n) if n > 0 && n < u32::MAX as usize => Ok(Self { rows, cols }),
            _ => Err(Error::config(
                "TokenGrid",
                "at least one row and one column, and fewer than 2^32 cells",
                format!("{rows}x{cols}"),
            )),
        }
    }

    /// A square grid of `side × side` cells.
    ///
    /// # Errors
    /// As [`TokenGrid::new`].
    pub fn square(side: usize) -> Result<Self> {
        Self::new(side, side)
    }

    /// Number of rows (along y).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (along x).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of cells, `rows · cols`; never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// The center `(y, x)` of the cell `(row, col)`, in units of the image's sides.
    pub fn center(&self, row: usize, col: usize) -> [f64; 2] {
        [(row as f64 + 0.5) / self.rows as f64, (col as f64 + 0.5) / self.cols as f64]
    }

    /// Whether `rows == cols`.
    pub fn is_square(&self) -> bool {
        self.rows == self.cols
    }

    /// The grid with its sides multiplied by `zoom`, `[rows, columns]`, and rounded to whole cells.
    pub(crate) fn zoomed(&self, zoom: [f64; 2]) -> Result<Self> {
        let side = |n: usize, z: f64| (n as f64 * z).round();
        let (rows, cols) = (side(self.rows, zoom[0]), side(self.cols, zoom[1]));
        if !(rows >= 1.0 && cols >= 1.0 && rows * cols < u32::MAX as f64) {
            return Err(Error::input(
                "out_grid",
                "a scale or crop that leaves at least one row and one column, and fewer than 2^32 cells",
                format!("{self} cells times {zoom:?}"),
            ));
        }
        Self::new(rows as usize, cols as usize)
    }

    /// The grid after a quarter turn: rows and columns change places.
    pub fn transposed(&self) -> Self {
        Self { rows: self.cols, cols: self.rows }
    }
}

/// Position of the channels in a rank-4 map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Channels {
    /// `(B, C, H, W)`: convolutional networks, ConvNeXt.
    #[default]
    First,
    /// `(B, H, W, C)`: Swin and other window transformers.
    Last,
}

/// The layout of an intermediate output, which [`tokens`](Self::tokens) reads as `(B, N, C)`.
///
/// A rank-3 output is `(B, prefix + N, C)`; a rank-4 output is a map with its channels at
/// `channels`. Prefix tokens (CLS, registers) lead the sequence. They are not part of the grid, and
/// no action moves them.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ser_reg::{Layout, TokenGrid};
/// let vit = Tensor::zeros((2, 1 + 12, 8), DType::F32, &Device::Cpu)?;
/// let conv = Tensor::zeros((2, 8, 3, 4), DType::F32, &Device::Cpu)?;
/// let grid = TokenGrid::new(3, 4)?;
/// let cls = Layout { prefix: 1, ..Default::default() };
/// assert_eq!(cls.tokens(&vit, grid)?.dims(), [2, 12, 8]);
/// assert_eq!(cls.tokens(&conv, grid)?.dims(), [2, 12, 8]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Layout {
    /// Number of leading tokens that are not grid cells (CLS, registers).
    pub prefix: usize,
    /// Position of the channels in a rank-4 map.
    pub channels: Channels,
}

impl Layout {
    /// The tokens of `x` on `grid`, `(B, N, C)` with `N = grid.len()`; differentiable.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, the batch is empty, or the number of tokens (or the height
    /// and width) does not fit `grid` and the prefix.
    pub fn tokens(&self, x: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        let op = "Layout::tokens";
        let (rows, cols, n) = (grid.rows(), grid.cols(), grid.len());
        let fail = |expected: String| Err(Error::input(op, expected, format!("{:?}", x.dims())));
        if x.dims().first() == Some(&0) {
            return fail("a batch of at least one sample".to_string());
        }
        let total = self.prefix.saturating_add(n);
        match (x.rank(), self.channels) {
            (3, _) if x.dims()[1] == total => Ok(x.narrow(1, self.prefix, n)?),
            (3, _) => fail(format!(
                "(B, {total}, C) = {} prefix tokens + {rows}x{cols} grid tokens (set Layout::prefix \
                 to the number of CLS and register tokens)",
                self.prefix
            )),
            (4, Channels::First) if x.dims()[2..] == [rows, cols] => {
                Ok(x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
            }
            (4, Channels::First) => fail(format!("(B, C, {rows}, {cols})")),
            (4, Channels::Last) if x.dims()[1..3] == [rows, cols] => Ok(x.flatten(1, 2)?),
            (4, Channels::Last) => fail(format!("(B, {rows}, {cols}, C)")),
            _ => fail("tokens of rank 3 or a map of rank 4".to_string()),
        }
    }
}
