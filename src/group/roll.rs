//! Cyclic translations.

use super::{D4, GroupAction, Point};
use crate::{Error, Result, TokenGrid};

/// A cyclic translation, like `torch.roll`: content that leaves the image on one side enters on the
/// other.
///
/// The plane is a torus, so every cell has a preimage. A shift by whole cells is a permutation. A
/// shift by fractions is a resampling and needs [`Padding::Periodic`](crate::Padding::Periodic).
/// With [`Filter::Fourier`](crate::Filter::Fourier) translations compose exactly on band-limited
/// maps. The translation without wrapping is [`Affine::translation`](super::Affine::translation).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{Filter, GridOperator, GroupAction, TokenGrid, group::Roll};
/// let grid = TokenGrid::new(1, 4)?;
/// let tokens = Tensor::new(&[[[0f32], [1.], [2.], [3.]]], &Device::Cpu)?;
/// let right = Roll::new(0.0, 0.25)?;
/// let rolled = GridOperator::new(&[right], grid, &Filter::Fourier.into())?.apply(&tokens)?;
/// assert_eq!(rolled.flatten_all()?.to_vec1::<f32>()?, [3., 0., 1., 2.]);
/// assert_eq!(right, Roll::from_cells(0, 5, grid)?); // five cells of four are one
/// assert_eq!(right.compose(&right.inverse()), Roll::identity());
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roll {
    /// Each within `[0, 1)`.
    shift: [f64; 2],
}

/// Fractions of the side this close to a whole number are that number.
const WHOLE: f64 = 1e-12;

fn wrap(x: f64) -> f64 {
    let part = x.rem_euclid(1.0);
    if (WHOLE..=1.0 - WHOLE).contains(&part) { part } else { 0.0 }
}

impl Roll {
    /// By `(dy, dx)` in units of the image's side, down and to the right.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn new(dy: f64, dx: f64) -> Result<Self> {
        if !(dy.is_finite() && dx.is_finite()) {
            return Err(Error::config(
                "Roll",
                "a finite shift (dy, dx)",
                format!("({dy:?}, {dx:?})"),
            ));
        }
        Ok(Self { shift: [wrap(dy), wrap(dx)] })
    }

    /// By whole cells of `grid`: a permutation of its tokens.
    ///
    /// # Errors
    /// None today.
    pub fn from_cells(dy: i64, dx: i64, grid: TokenGrid) -> Result<Self> {
        let part = |d: i64, n: usize| d.rem_euclid(n as i64) as f64 / n as f64;
        Self::new(part(dy, grid.rows()), part(dx, grid.cols()))
    }
}

impl GroupAction for Roll {
    fn d4_part(&self) -> Option<D4> {
        Some(D4::IDENTITY)
    }

    fn identity() -> Self {
        Self { shift: [0.0; 2] }
    }

    fn compose(&self, first: &Self) -> Self {
        Self { shift: [wrap(self.shift[0] + first.shift[0]), wrap(self.shift[1] + first.shift[1])] }
    }

    fn inverse(&self) -> Self {
        Self { shift: [wrap(-self.shift[0]), wrap(-self.shift[1])] }
    }

    fn source(&self, [y, x]: Point) -> Point {
        [wrap(y - self.shift[0]), wrap(x - self.shift[1])]
    }
}
