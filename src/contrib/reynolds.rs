//! The Reynolds projection of a weight and the penalty on its asymmetric part (arXiv 2601.05028).

use candle_core::Tensor;

use super::{
    check,
    orbit::{sum, turn},
};
use crate::{
    Error, Result, TokenGrid,
    group::{D4, FieldType, Representation, Subgroup},
};

/// The layout of a weight, which defines the action of the group on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightSpace {
    /// A convolution kernel or patch embedding `(O, I, kh, kw)`.
    Kernel {
        /// The representation of each block of output channels.
        output: Representation,
        /// The representation of each block of input channels.
        input: Representation,
    },
    /// A table of tokens `(…, prefix + N, C)`, such as a positional embedding `(1, N, C)`.
    Table {
        /// The grid of the `N` tokens.
        grid: TokenGrid,
        /// Leading rows that are not cells of the grid (CLS, registers). They are neither moved nor
        /// penalized.
        prefix: usize,
    },
}

impl Default for WeightSpace {
    /// A kernel with trivial representations.
    fn default() -> Self {
        Self::Kernel { output: Representation::Trivial, input: Representation::Trivial }
    }
}

/// A penalty on the part of a weight that is not symmetric.
///
/// ```text
/// (g·W)(p) = ρ_out(g) W(g⁻¹p) ρ_in(g)⁻¹      P W = 1/|G| Σ_g g·W      L = ‖W − P W‖²  [ / (‖W‖² + eps) ]
/// ```
///
/// `P` is the orthogonal projection on the weights that are invariant to `G`: it is idempotent and
/// self-adjoint. Hence `‖W‖² = ‖PW‖² + ‖W − PW‖²`, and the gradient of `‖W − PW‖²` is `2(W − PW)`.
///
/// A convolution commutes with `G` exactly if `W = PW`. With trivial representations a rotated
/// image then has the rotated map. With a regular output the channels of a block permute as well: a
/// lifting layer, or a group convolution if the input is also regular. The penalty needs no data
/// and costs a few passes over the weights.
///
/// The relative loss is the asymmetric fraction of the squared norm, between 0 and 1 for weights of
/// any scale. Its gradient does not shrink the weight as a whole. With trivial representations the
/// penalty asks every filter to be symmetric. Give it a small weight, or take a regular output,
/// which asks for rotated copies of filters.
///
/// Source: arXiv 2601.05028 (regularization by projection with the Reynolds operator). The
/// projection is classical.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{contrib::ReynoldsPenalty, group::Subgroup};
/// let flips = ReynoldsPenalty { group: Subgroup::HFlip, relative: false, ..Default::default() };
/// let w = Tensor::new(&[[[[3f32, 1.]]]], &Device::Cpu)?; // (1, 1, 1, 2)
/// assert_eq!(flips.project(&w)?.flatten_all()?.to_vec1::<f32>()?, [2., 2.]);
/// assert_eq!(flips.forward(&w)?.to_scalar::<f32>()?, 2.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReynoldsPenalty {
    /// The group. A group with odd quarter turns or diagonal flips needs square kernels and grids.
    pub group: Subgroup,
    /// The layout of the weight.
    pub space: WeightSpace,
    /// Whether the penalty is divided by `‖W‖² + eps`.
    pub relative: bool,
    /// Added to `‖W‖²` in the denominator; finite and at least 0. Above 0, a zero weight has
    /// penalty 0 and gradient 0.
    pub eps: f64,
}

impl Default for ReynoldsPenalty {
    /// D4 on a kernel with trivial representations, relative, `eps = 1e-12`.
    fn default() -> Self {
        Self { group: Subgroup::D4, space: WeightSpace::default(), relative: true, eps: 1e-12 }
    }
}

const OP: &str = "ReynoldsPenalty";

impl ReynoldsPenalty {
    /// `P W`, with the shape and type of `weight`; differentiable.
    ///
    /// # Errors
    /// If the shape does not fit the space, or the type is not a floating-point type. If the kernel
    /// or grid is not square and the group exchanges rows and columns. If the group of a regular
    /// representation does not contain `group`, or its order does not divide the channels.
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
    /// As [`project`](Self::project), and if `eps` is negative or not finite.
    pub fn forward(&self, weight: &Tensor) -> Result<Tensor> {
        check::not_negative("ReynoldsPenalty::eps", self.eps)?;
        let parts = self.parts(weight)?;
        let rest = (&parts.cells - self.average(&parts)?)?;
        let penalty = rest.sqr()?.sum_all()?;
        match self.relative {
            true => Ok((penalty / (parts.cells.sqr()?.sum_all()? + self.eps)?)?),
            false => Ok(penalty),
        }
    }

    /// The cells of a weight, in the type of the computation.
    fn parts(&self, weight: &Tensor) -> Result<Parts> {
        let dtype = check::work_dtype(OP, weight)?;
        let got = || format!("{:?}", weight.dims());
        match self.space {
            WeightSpace::Kernel { output, input } => {
                let [o, i, h, w] = *weight.dims() else {
                    return Err(Error::input(OP, "a kernel (O, I, kh, kw)", got()));
                };
                if weight.elem_count() == 0 {
                    return Err(Error::input(OP, "a kernel with at least one element", got()));
                }
                for (side, representation, channels) in [("output", output, o), ("input", input, i)]
                {
                    self.check_channels(side, representation, channels)?;
                }
                let grid = TokenGrid::new(h, w)?;
                check::grid(OP, self.group, grid)?;
                Ok(Parts {
                    prefix: None,
                    cells: weight.to_dtype(dtype)?.contiguous()?,
                    grid,
                    representations: [output, input],
                })
            }
            WeightSpace::Table { grid, prefix } => {
                check::grid(OP, self.group, grid)?;
                let (rows, n) = (prefix.saturating_add(grid.len()), grid.len());
                let width = match *weight.dims() {
                    [.., t, c] if t == rows && weight.elem_count() > 0 => c,
                    _ => {
                        let expected = format!(
                            "a table (…, {rows}, C): {prefix} prefix rows and {n} cells of the {grid} grid (set `prefix` \
                             to the number of other rows)"
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
                    representations: [Representation::Trivial; 2],
                })
            }
        }
    }

    /// A regular representation fits the group and the channels.
    fn check_channels(
        &self,
        side: &str,
        representation: Representation,
        channels: usize,
    ) -> Result<()> {
        let Representation::Regular(group) = representation else {
            return Ok(());
        };
        let order = group.order();
        if !channels.is_multiple_of(order) {
            let expected = format!("a multiple of {order} {side} channels, the order of {group:?}");
            return Err(Error::input(OP, expected, channels));
        }
        let elements = group.elements();
        if self.group.elements().iter().all(|g| elements.contains(g)) {
            return Ok(());
        }
        let expected = format!(
            "a regular representation on the {side} channels of a group that contains {:?}",
            self.group
        );
        Err(Error::input(OP, expected, format!("{group:?}")))
    }

    /// `1/|G| Σ_g g·W`.
    fn average(&self, parts: &Parts) -> Result<Tensor> {
        let mut orbit = Vec::with_capacity(self.group.order());
        for &g in self.group.elements() {
            let mut moved = turn(g, &parts.cells, parts.grid)?;
            for (axis, representation) in parts.representations.into_iter().enumerate() {
                if let Representation::Regular(group) = representation {
                    moved = permute(group, g, &moved, axis)?;
                }
            }
            orbit.push(moved);
        }
        Ok((sum(&orbit)? / self.group.order() as f64)?)
    }
}

/// `g` on the channels along `axis`, blocks of the regular representation of `group`.
fn permute(group: Subgroup, g: D4, x: &Tensor, axis: usize) -> Result<Tensor> {
    if g == D4::IDENTITY {
        return Ok(x.clone());
    }
    let field = FieldType::regular(group, x.dim(axis)?)?;
    let index = Tensor::new(field.source_indices(g)?.as_slice(), x.device())?;
    Ok(x.index_select(&index, axis)?)
}

/// A weight as tokens `(B, N, C)` or a map `(B, C, H, W)`.
struct Parts {
    prefix: Option<Tensor>,
    cells: Tensor,
    grid: TokenGrid,
    /// The representations on the first two axes.
    representations: [Representation; 2],
}
