//! Pooling over the orbit of a token map or a batch of images.

use candle_core::{Shape, Tensor};
use candle_nn::{Init, VarBuilder};

use super::{check_grid, check_tokens, sum, turn, work_dtype};
use crate::{Error, Result, TokenGrid, group::Subgroup};

/// What becomes of the members `y_g` of an orbit.
#[derive(Clone, Debug)]
pub enum Pool {
    /// `1/|G| Σ_g y_g`.
    Mean,
    /// The largest of each element; the gradient is shared where several are largest.
    Max,
    /// `Σ_g a_g y_g` with `a = softmax_g ⟨v, y_g⟩`: learned weights. `v` is a template of one member's shape without the
    /// batch; what fits it best counts most.
    ///
    /// Weights that belong to the elements themselves would break the invariance; these belong to what is seen.
    Attention(Tensor),
}

impl Pool {
    /// Attention whose template is the variable `template` of `vb`, zero at first: it starts as the mean.
    ///
    /// # Errors
    /// If the shape has no element, or `vb` cannot hand out the variable.
    pub fn attention(shape: impl Into<Shape>, vb: VarBuilder) -> Result<Self> {
        let shape = shape.into();
        if shape.rank() == 0 || shape.elem_count() == 0 {
            let expected = "the shape of one orbit member without the batch, such as (N, C)";
            return Err(Error::config(
                "Pool::attention",
                expected,
                format!("{:?}", shape.dims()),
            ));
        }
        let template = vb.get_with_hints(shape, "template", Init::Const(0.0))?;
        Ok(Self::Attention(template))
    }
}

/// Features that are exactly invariant to a group: the orbit of the input is pooled.
///
/// ```text
/// map        A(F) = pool_g ρ(g)F          A(ρ(h)F) = A(F) for every h in G
/// images     A(x) = pool_g f(g·x)         for any f, whether equivariant or not
/// ```
///
/// The orbit of `ρ(h)F` is that of `F` in another order, so the result is the same, for the mean and attention up to the
/// rounding of a sum of `|G|` terms, for the maximum to the bit. A pooled map is constant on the orbits of cells; its
/// mean over tokens is no more than the mean over tokens of `F`, so read it as a map, or take the maximum, attention or
/// [`InvariantIntegration`](super::InvariantIntegration), which do see more. For images this is averaging at test time,
/// and it can be trained through.
///
/// Source: arXiv 2202.03967 (group averages; there the weights are learned too, and act on neighboring cells).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, contrib::companion::{OrbitPool, Pool}, group::Subgroup};
/// let grid = TokenGrid::new(1, 3)?;
/// let pool = OrbitPool::new(Subgroup::HFlip, Pool::Max);
/// let map = Tensor::new(&[[[1f32], [5.], [2.]]], &Device::Cpu)?;
/// assert_eq!(pool.tokens(&map, grid)?.flatten_all()?.to_vec1::<f32>()?, [2., 5., 2.]);
///
/// let image = Tensor::new(&[[[[1f32, 5., 2.]]]], &Device::Cpu)?;
/// let pool = OrbitPool::new(Subgroup::HFlip, Pool::Mean);
/// let first_pixel = pool.images(&image, |x| x.narrow(3, 0, 1)?.flatten_from(1))?;
/// assert_eq!(first_pixel.to_vec2::<f32>()?, [[1.5]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OrbitPool {
    group: Subgroup,
    pool: Pool,
}

impl OrbitPool {
    /// Pools over the orbits of `group`.
    pub fn new(group: Subgroup, pool: Pool) -> Self {
        Self { group, pool }
    }

    /// The pooled map, `(B, N, C)` from tokens `(B, N, C)` on `grid`, without prefix tokens; differentiable.
    ///
    /// # Errors
    /// If the tokens do not fit the grid, are empty or not of a floating point type, the grid is not square where the
    /// group exchanges rows and columns, or the template of attention is not `(N, C)`.
    pub fn tokens(&self, tokens: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        let op = "OrbitPool::tokens";
        check_tokens(op, tokens, grid)?;
        check_grid(op, self.group, grid)?;
        let dtype = work_dtype(op, tokens)?;
        let tokens = tokens.contiguous()?;
        let mut orbit = Vec::with_capacity(self.group.order());
        for &g in self.group.elements() {
            orbit.push(turn(g, &tokens, grid)?.to_dtype(dtype)?);
        }
        Ok(self.pool(op, &orbit)?.to_dtype(tokens.dtype())?)
    }

    /// The pooled results of `f` on images `(B, C, H, W)`; differentiable as far as `f` is.
    ///
    /// `f` runs once for each element of the group, on all images, and returns `(B, D)` (vectors, logits) or `(B, D, …)`.
    /// A map that it returns is not turned back.
    ///
    /// # Errors
    /// Those of `f`. If these are no images, they are not square where the group exchanges rows and columns, `f` returns
    /// something other than floats `(B, D, …)` of one shape, or the template of attention has another.
    pub fn images<E: From<Error>>(
        &self,
        images: &Tensor,
        mut f: impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<Tensor, E> {
        let op = "OrbitPool::images";
        let grid = match *images.dims() {
            [b, c, h, w] if b > 0 && c > 0 && h > 0 && w > 0 => TokenGrid::new(h, w)?,
            _ => {
                let expected = "images (B, C, H, W), none of them empty";
                return Err(Error::input(op, expected, format!("{:?}", images.dims())).into());
            }
        };
        check_grid(op, self.group, grid)?;
        let candle = |e: candle_core::Error| E::from(Error::from(e));
        let images = images.contiguous().map_err(candle)?;
        let mut orbit: Vec<Tensor> = Vec::with_capacity(self.group.order());
        let mut own = None;
        for &g in self.group.elements() {
            let y = f(&turn(g, &images, grid)?)?;
            let dtype = work_dtype(op, &y)?;
            own.get_or_insert(y.dtype());
            let fits = match (orbit.first(), y.dims()) {
                (Some(first), dims) => dims == first.dims(),
                (None, [b, _, ..]) => *b == images.dims()[0] && y.elem_count() > 0,
                (None, _) => false,
            };
            if !fits {
                let expected = format!(
                    "a closure that returns one shape (B, D) or (B, D, …) for every turned batch, B = {}",
                    images.dims()[0]
                );
                return Err(Error::input(op, expected, format!("{:?}", y.dims())).into());
            }
            orbit.push(y.to_dtype(dtype).map_err(candle)?);
        }
        let pooled = self.pool(op, &orbit)?;
        let own = own.unwrap_or(pooled.dtype());
        pooled.to_dtype(own).map_err(candle)
    }

    /// Pools members `(B, …)` of one shape and type.
    fn pool(&self, op: &'static str, orbit: &[Tensor]) -> Result<Tensor> {
        match &self.pool {
            Pool::Mean => Ok((sum(op, orbit)? / orbit.len() as f64)?),
            Pool::Max => max(op, orbit),
            Pool::Attention(template) => {
                let all = Tensor::stack(orbit, 0)?;
                let (order, batch) = (all.dim(0)?, all.dim(1)?);
                if all.dims().get(2..) != Some(template.dims()) {
                    let expected = format!("a template {:?}, one member's shape", &all.dims()[2..]);
                    return Err(Error::input(op, expected, format!("{:?}", template.dims())));
                }
                work_dtype(op, template)?;
                let template = template.to_dtype(all.dtype())?;
                let scores = all.broadcast_mul(&template)?.flatten_from(2)?.sum(2)?;
                let top = scores.max_keepdim(0)?.detach();
                let scores = scores.broadcast_sub(&top)?.exp()?;
                let weights = scores.broadcast_div(&scores.sum_keepdim(0)?)?;
                let mut shape = vec![order, batch];
                shape.resize(all.rank(), 1);
                Ok(all.broadcast_mul(&weights.reshape(shape)?)?.sum(0)?)
            }
        }
    }
}

/// The maximum of an orbit. Cells that a group element leaves where they are appear several times in it, and candle's own
/// gradient would count each of them in full: here it is shared. Infinite values are values like others; one NaN makes NaN.
fn max(op: &'static str, orbit: &[Tensor]) -> Result<Tensor> {
    let fixed: Vec<Tensor> = orbit.iter().map(Tensor::detach).collect();
    let [first, others @ ..] = &fixed[..] else {
        return Err(Error::input(op, "an orbit of at least one member", 0));
    };
    let mut top = first.clone();
    for y in others {
        // A maximum passes over a NaN on its right.
        top = y.ne(y)?.where_cond(y, &top.maximum(y)?)?;
    }
    let mut largest = Vec::with_capacity(orbit.len());
    let mut counts = Vec::with_capacity(orbit.len());
    for y in &fixed {
        let is_top = y.eq(&top)?;
        counts.push(is_top.to_dtype(y.dtype())?);
        largest.push(is_top);
    }
    let share = sum(op, &counts)?.recip()?;
    let zero = top.zeros_like()?;
    let mut carried = Vec::with_capacity(orbit.len());
    for (y, largest) in orbit.iter().zip(&largest) {
        // Chosen, not multiplied by 0, which an infinite value would turn into NaN; shared before the sum, which could
        // overflow.
        carried.push((largest.where_cond(y, &zero)? * &share)?);
    }
    let carrier = sum(op, &carried)?;
    // Where it is finite, a term of value 0 carries the gradient, so that the value is the maximum to the bit.
    let finite = top.abs()?.lt(f64::INFINITY)?;
    let exact = (top + (&carrier - carrier.detach())?)?;
    Ok(finite.where_cond(&exact, &carrier)?)
}
