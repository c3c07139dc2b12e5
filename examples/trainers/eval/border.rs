//! What lies beyond the border of an image that is moved.

use anyhow::Result;
use candle_core::Tensor;
use ser_reg::{GridOperator, Padding};
use serde::{Deserialize, Serialize};

use super::corruption::picture::Edge;
use crate::data::Images;

/// What fills the area that a moved image leaves.
///
/// Black continues images of objects on a black ground. Around other images it would be a mark of its own, and the accuracy
/// would measure that mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Border {
    Black,
    /// The mirror image, with the outermost pixel twice.
    Reflection,
}

/// Mean value of the outermost pixels, of 1, below which images count as dark at the border.
const DARK: f64 = 0.1;

impl Border {
    /// The choice for such images: black if their outermost pixels are dark on average.
    pub fn of(images: &Images) -> Self {
        let last = images.side.saturating_sub(1);
        let outermost = |i: &usize| {
            let (row, col) = (i / images.side, i % images.side);
            row == 0 || col == 0 || row == last || col == last
        };
        let places: Vec<usize> = (0..images.side * images.side).filter(outermost).collect();
        let planes = images.pixels.chunks_exact((images.side * images.side).max(1));
        let (count, sum) = planes.fold((0, 0), |(count, sum), plane| {
            let plane: u64 = places.iter().map(|&i| u64::from(plane[i])).sum();
            (count + places.len(), sum + plane)
        });
        match sum as f64 <= DARK * 255.0 * count as f64 {
            true => Self::Black,
            false => Self::Reflection,
        }
    }

    /// What the name is in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Black => "black",
            Self::Reflection => "reflection",
        }
    }

    /// Normalized images `(n, C, S, S)` moved by `operator`, which has this [`Self::padding`].
    pub fn moved(
        self,
        operator: &GridOperator,
        x: &Tensor,
        statistics: &[(f32, f32)],
    ) -> Result<Tensor> {
        if self == Self::Reflection {
            return Ok(operator.apply(x)?);
        }
        // What a black pixel becomes: images are moved relative to it, since the operator adds zeros.
        let black: Vec<f32> = statistics.iter().map(|(mean, std)| -mean / std).collect();
        let black = Tensor::new(black, x.device())?.reshape((1, (), 1, 1))?;
        let moved = operator.apply(&x.broadcast_sub(&black)?)?;
        Ok(moved.broadcast_add(&black)?)
    }

    /// The same for operators on grids.
    pub fn padding(self) -> Padding {
        match self {
            Self::Black => Padding::Zeros,
            Self::Reflection => Padding::Reflection,
        }
    }

    /// The same for warps.
    pub fn edge(self) -> Edge {
        match self {
            Self::Black => Edge::Black,
            Self::Reflection => Edge::Reflect,
        }
    }
}
