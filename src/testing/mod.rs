//! The law suite: checks of the laws that every [`GroupAction`](crate::GroupAction) must satisfy
//! (feature `testing`).
//!
//! A broken law is a [`Violation`] that names the law and the elements. The laws hold for a
//! reversed action of a commutative group as well, so assert one known result beside them:
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use rand::{SeedableRng, rngs::StdRng};
//! use ser_reg::{GridOperator, Resample, TokenGrid, group::D4, testing};
//!
//! let mut rng = StdRng::seed_from_u64(0);
//! testing::check_group_laws(&D4::ALL, testing::POINTS)?;
//! testing::check_closure(&[D4::ROT90, D4::HFLIP], &D4::ALL, testing::POINTS)?;
//! let (grid, resample) = (TokenGrid::new(3, 5)?, Resample::default());
//! testing::check_action_laws(&D4::ALL, grid, &resample, testing::EXACT, &mut rng)?;
//!
//! // The direction: a quarter turn counter-clockwise moves the last column to the first row.
//! let tokens = Tensor::new(&[[[0f32], [1.], [2.], [3.]]], &Device::Cpu)?; // 0 1
//! let turn = GridOperator::new(&[D4::ROT90], TokenGrid::square(2)?, &resample)?; // 2 3
//! assert_eq!(turn.apply(&tokens)?.flatten_all()?.to_vec1::<f32>()?, [1., 3., 0., 2.]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod action;
mod group;
mod maps;

use candle_core::DType;

pub use self::{
    action::{check_action_laws, check_adjoint},
    group::{check_closure, check_group_laws},
    maps::{ActionErrors, action_errors, band_limited, smooth},
};
use crate::Error;

/// Tolerance of the algebra on points of the unit square. It allows the rounding of a few `f64`
/// operations.
pub const POINTS: f64 = 1e-9;

/// Tolerance of permutations: none.
pub const EXACT: f64 = 0.0;

/// Tolerance of adjoints and gradients, which are exact up to rounding for every operator in `f64`.
pub const ADJOINT: f64 = 1e-10;

/// Absolute plus relative tolerance suited to values computed in `dtype`.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-10,
        DType::F32 => 1e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
        _ => 0.0,
    }
}

/// A law of groups or of their actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Law {
    /// `e∘g = g = g∘e`
    Identity,
    /// `g⁻¹∘g = e = g∘g⁻¹`
    Inverse,
    /// `(a∘b)∘c = a∘(b∘c)`
    Associativity,
    /// `relative(a, b)∘a = b`
    Relative,
    /// Points compose: `(a∘b)⁻¹p = b⁻¹(a⁻¹p)`
    Source,
    /// The affine map, if there is one, moves points like the element
    Affine,
    /// The products of the generators are the elements
    Closure,
    /// `act(e, x) = x`
    ActIdentity,
    /// `act(a, act(b, x)) = act(a∘b, x)` where both are valid
    LeftAction,
    /// `act(g⁻¹, act(g, x)) = x` where both are valid
    ActInverse,
    /// `⟨A·x, y⟩ = ⟨x, Aᵀ·y⟩`
    Adjoint,
    /// The gradient of `⟨A·x, y⟩` is `Aᵀ·y`
    Gradient,
    /// A batch of elements acts as each element on its own sample
    PerSample,
    /// The action on maps equals the action on tokens
    Map,
    /// A cell is valid if and only if the source of its center lies within the image
    Mask,
    /// Constant maps stay constant where valid
    Constant,
    /// The fused operator equals the operator made of plain candle ops
    Portable,
}

/// A law that does not hold, or a check that could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The law does not hold for these elements.
    #[error("{law:?} does not hold: {detail}")]
    Law {
        /// Which law.
        law: Law,
        /// The elements and values that break it.
        detail: String,
    },
    /// The check itself failed.
    #[error(transparent)]
    Error(#[from] Error),
}

impl Violation {
    /// The law that does not hold; `None` if the check failed.
    pub fn law(&self) -> Option<Law> {
        match self {
            Self::Law { law, .. } => Some(*law),
            Self::Error(_) => None,
        }
    }
}

impl From<candle_core::Error> for Violation {
    fn from(e: candle_core::Error) -> Self {
        Self::Error(e.into())
    }
}

type Checked = Result<(), Violation>;

/// Refuses a check of nothing, which would always pass.
fn some<G>(op: &'static str, elements: &[G]) -> Checked {
    match elements {
        [] => Err(Error::input(op, "at least one element", "none").into()),
        _ => Ok(()),
    }
}

fn require(holds: bool, law: Law, detail: impl FnOnce() -> String) -> Checked {
    if holds {
        return Ok(());
    }
    Err(Violation::Law { law, detail: detail() })
}
