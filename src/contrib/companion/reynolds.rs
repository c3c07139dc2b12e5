//! The Reynolds projection of a weight, and the penalty on what it leaves out.

use candle_core::Tensor;

use super::{check_eps, check_grid, turn, work_dtype};
use crate::{
    Error, Result, TokenGrid,
    group::{D4, FieldType, Subgroup},
};

/// How an element acts on the channels of one side of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fibre {
    /// Channels are left alone.
    #[default]
    Trivial,
    /// Channels are blocks of `|G|` and permute as the elements do, as in [`RegularRep`](super::RegularRep).
    Regular,
}

/// How a weight is laid out, and so how an element acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightSpace {
    /// A convolution kernel or patch embedding `(O, I, kh, kw)`.
    Kernel {
        /// The action on output channels.
        output: Fibre,
        /// The action on input channels.
        input: Fibre,
    },
    /// A table of tokens `(…, prefix + N, C)`, such as a positional embedding `(1, N, C)`.
    Table {
        /// The grid of the `N` tokens.
        grid: TokenGrid,
        /// Leading rows that belong to no cell (CLS, registers): they are left alone and not penalized.
        prefix: usize,
    },
}

impl Default for WeightSpace {
    /// A kernel whose channels are left alone.
    fn default() -> Self {
        Self::Kernel {
            output: Fibre::Trivial,
            input: Fibre::Trivial,
        }
    }
}

/// The part of a weight that its average over a group leaves out.
///
/// ```text
/// (g·W)(p) = ρ_out(g) W(g⁻¹p) ρ_in(g)⁻¹      P W = 1/|G| Σ_g g·W      L = ‖W − P W‖²  [ / (‖W‖² + eps) ]
/// ```
///
/// `P` is the orthogonal projection on the weights that `G` leaves as they are: idempotent and self-adjoint, so that
/// `‖W‖² = ‖PW‖² + ‖W − PW‖²` and the gradient of `‖W − PW‖²` is `2(W − PW)`. A convolution commutes with `G` exactly if
/// `W = PW`: with trivial fibres a turned image gives the turned map; with a regular output the channels of a block
/// permute as well (a lifting layer, or a group convolution if the input is regular too). The penalty needs no data and
/// costs as much as a few passes over the weights.
///
/// Relative, the loss is the share of the weight's energy that is not symmetric, between 0 and 1, whatever the weight's
/// size, and its gradient cannot shrink the weight as a whole. A penalty on all of `W − PW` of a patch embedding with trivial
/// fibres asks every filter to be symmetric: keep it soft, or give the output a regular fibre, which asks for turned
/// copies instead.
///
/// Source: arXiv 2601.05028 (Reynolds operator, projection-based regularization); the projection itself is classical.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{contrib::companion::ReynoldsPenalty, group::Subgroup};
/// let flips = ReynoldsPenalty { group: Subgroup::HFlip, relative: false, ..Default::default() };
/// let w = Tensor::new(&[[[[3f32, 1.]]]], &Device::Cpu)?; // (1, 1, 1, 2)
/// assert_eq!(flips.project(&w)?.flatten_all()?.to_vec1::<f32>()?, [2., 2.]);
/// assert_eq!(flips.forward(&w)?.to_scalar::<f32>()?, 2.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReynoldsPenalty {
    /// The group; one with odd quarter turns needs square kernels and grids.
    pub group: Subgroup,
    /// How the weight is laid out.
    pub space: WeightSpace,
    /// Whether the penalty is divided by `‖W‖² + eps`.
    pub relative: bool,
    /// Beside `‖W‖²` in the denominator: a zero weight has penalty 0 and gradient 0.
    pub eps: f64,
}

impl Default for ReynoldsPenalty {
    /// D4 on a kernel, relative, 1e-12.
    fn default() -> Self {
        Self {
            group: Subgroup::D4,
            space: WeightSpace::default(),
            relative: true,
            eps: 1e-12,
        }
    }
}

const OP: &str = "ReynoldsPenalty";

impl ReynoldsPenalty {
    /// `P W`, of the shape and type of `weight`; differentiable.
    ///
    /// # Errors
    /// If the weight's shape does not fit the space, the kernel or grid is not square where the group exchanges rows and
    /// columns, the group's order does not divide the channels of a regular fibre, or the type is no floating point type.
    pub fn project(&self, weight: &Tensor) -> Result<Tensor> {
        let parts = self.parts(weight)?;
        let projected = self.average(&parts)?;
        let whole = match parts.prefix {
            Some(prefix) => Tensor::cat(&[&prefix, &projected], 1)?,
            None => projected,
        };
        Ok(whole.reshape(weight.shape())?.to_dtype(weight.dtype())?)
    }

    /// The penalty, a scalar of type f32 (f64 for f64).
    ///
    /// # Errors
    /// As [`project`](Self::project); if `eps` is negative or not finite.
    pub fn forward(&self, weight: &Tensor) -> Result<Tensor> {
        check_eps("ReynoldsPenalty::eps", self.eps)?;
        let parts = self.parts(weight)?;
        let rest = (&parts.cells - self.average(&parts)?)?;
        let penalty = rest.sqr()?.sum_all()?;
        match self.relative {
            true => Ok((penalty / (parts.cells.sqr()?.sum_all()? + self.eps)?)?),
            false => Ok(penalty),
        }
    }

    /// The cells of a weight, in the type that is computed in.
    fn parts(&self, weight: &Tensor) -> Result<Parts> {
        let dtype = work_dtype(OP, weight)?;
        let got = || format!("{:?}", weight.dims());
        match self.space {
            WeightSpace::Kernel { output, input } => {
                let [o, i, h, w] = *weight.dims() else {
                    return Err(Error::input(OP, "a kernel (O, I, kh, kw)", got()));
                };
                if weight.elem_count() == 0 {
                    return Err(Error::input(
                        OP,
                        "a kernel with at least one element",
                        got(),
                    ));
                }
                let order = self.group.order();
                for (side, fibre, channels) in [("output", output, o), ("input", input, i)] {
                    if fibre == Fibre::Regular && !channels.is_multiple_of(order) {
                        let expected = format!(
                            "a multiple of {order} {side} channels, the order of {:?}, for a regular fibre",
                            self.group
                        );
                        return Err(Error::input(OP, expected, channels));
                    }
                }
                let grid = TokenGrid::new(h, w)?;
                check_grid(OP, self.group, grid)?;
                Ok(Parts {
                    prefix: None,
                    cells: weight.to_dtype(dtype)?.contiguous()?,
                    grid,
                    fibres: [output, input],
                })
            }
            WeightSpace::Table { grid, prefix } => {
                check_grid(OP, self.group, grid)?;
                let (rows, n) = (prefix.saturating_add(grid.len()), grid.len());
                let width = match *weight.dims() {
                    [.., t, c] if t == rows && weight.elem_count() > 0 => c,
                    _ => {
                        let expected = format!(
                            "a table (…, {rows}, C): {prefix} prefix rows and {n} of the {grid} grid (set `prefix` to the \
                             rows that are no cell)"
                        );
                        return Err(Error::input(OP, expected, got()));
                    }
                };
                let table = weight.to_dtype(dtype)?.reshape(((), rows, width))?;
                let leading = match prefix {
                    0 => None,
                    prefix => Some(table.narrow(1, 0, prefix)?),
                };
                Ok(Parts {
                    prefix: leading,
                    cells: table.narrow(1, prefix, n)?.contiguous()?,
                    grid,
                    fibres: [Fibre::Trivial; 2],
                })
            }
        }
    }

    /// `1/|G| Σ_g g·W`.
    fn average(&self, parts: &Parts) -> Result<Tensor> {
        let mut sum = parts.cells.clone();
        // The identity is the first element.
        for &g in self.group.elements().iter().skip(1) {
            let mut moved = turn(g, &parts.cells, parts.grid)?;
            for (axis, fibre) in parts.fibres.into_iter().enumerate() {
                if fibre == Fibre::Regular {
                    moved = self.permute(g, &moved, axis)?;
                }
            }
            sum = (sum + moved)?;
        }
        Ok((sum / self.group.order() as f64)?)
    }

    /// The blocks of `|G|` channels along `axis`, permuted by `g`.
    fn permute(&self, g: D4, x: &Tensor, axis: usize) -> Result<Tensor> {
        let field = FieldType::regular(self.group, x.dim(axis)?)?;
        let index = Tensor::new(field.source_indices(g)?.as_slice(), x.device())?;
        Ok(x.index_select(&index, axis)?)
    }
}

/// A weight as tokens `(B, N, C)` or a map `(B, C, H, W)`.
struct Parts {
    prefix: Option<Tensor>,
    cells: Tensor,
    grid: TokenGrid,
    /// Of the first two axes.
    fibres: [Fibre; 2],
}
