//! Pooling over the orbit of a token map or of images.

use candle_core::{Shape, Tensor};
use candle_nn::{Init, VarBuilder};

use super::{
    autograd::with_gradient_of,
    check,
    orbit::{sum, turn},
};
use crate::{Error, Result, TokenGrid, group::Subgroup};

/// The pooling of the members `y_g` of an orbit.
#[derive(Clone, Debug)]
pub enum Pool {
    /// `1/|G| Σ_g y_g`.
    Mean,
    /// The element-wise maximum. Equal maxima share the gradient.
    Max,
    /// `Σ_g a_g y_g` with `a = softmax_g ⟨v, y_g⟩`, for a learned template `v`.
    ///
    /// The template has the shape of one member without the batch. The weights depend on the
    /// members; weights that depend on the group elements would break the invariance.
    Attention(Tensor),
}

impl Pool {
    /// Attention whose template is the variable `template` of `vb`. It starts at zero, which is the
    /// mean.
    ///
    /// # Errors
    /// If the shape has no element, or `vb` fails to return the variable.
    pub fn attention(shape: impl Into<Shape>, vb: VarBuilder) -> Result<Self> {
        let shape = shape.into();
        if shape.rank() == 0 || shape.elem_count() == 0 {
            let expected = "the shape of one orbit member without the batch, such as (N, C)";
            return Err(Error::config("Pool::attention", expected, format!("{:?}", shape.dims())));
        }
        let template = vb.get_with_hints(shape, "template", Init::Const(0.0))?;
        Ok(Self::Attention(template))
    }
}

/// Exactly invariant features: a pooled orbit of the input.
///
/// ```text
/// map        A(F) = pool_g ρ(g)F          A(ρ(h)F) = A(F) for every h in G
/// images     A(x) = pool_g f(g·x)         for any f, whether equivariant or not
/// ```
///
/// `ρ(h)F` has the same orbit as `F`, in another order. So the maximum is invariant exactly, the
/// mean and attention up to the rounding of a sum of `|G|` terms.
///
/// A pooled map is constant on the orbits of cells. The mean over tokens of a mean-pooled map is
/// the mean over tokens of `F`. So use it as a map, or take the maximum, attention or
/// [`InvariantIntegration`](super::InvariantIntegration). Pooling over images is averaging at test
/// time; it also works in training.
///
/// Source: arXiv 2202.03967 (group averages; its weights are learned too, and act on neighboring
/// cells).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{TokenGrid, contrib::{OrbitPool, Pool}, group::Subgroup};
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
    /// Pooling over the orbits of `group`.
    pub fn new(group: Subgroup, pool: Pool) -> Self {
        Self { group, pool }
    }

    /// The pooled map `(B, N, C)` of tokens `(B, N, C)` on `grid`, without prefix tokens;
    /// differentiable.
    ///
    /// # Errors
    /// If the tokens do not fit the grid, are empty, or are not of a floating-point type. If the
    /// grid is not square and the group exchanges rows and columns. If the template of attention is
    /// not `(N, C)`.
    pub fn tokens(&self, tokens: &Tensor, grid: TokenGrid) -> Result<Tensor> {
        let op = "OrbitPool::tokens";
        check::tokens(op, tokens, grid)?;
        check::grid(op, self.group, grid)?;
        let dtype = check::work_dtype(op, tokens)?;
        let tokens = tokens.contiguous()?;
        let mut orbit = Vec::with_capacity(self.group.order());
        for &g in self.group.elements() {
            orbit.push(turn(g, &tokens, grid)?.to_dtype(dtype)?);
        }
        Ok(self.pool(op, &orbit)?.to_dtype(tokens.dtype())?)
    }

    /// The pooled outputs of `f` on images `(B, C, H, W)`; differentiable if `f` is.
    ///
    /// `f` runs once for each group element, on all images. It returns vectors or logits `(B, D)`,
    /// or `(B, D, …)`. A returned map is not transformed back.
    ///
    /// # Errors
    /// The errors of `f`. If `images` has another shape, or is not square and the group exchanges
    /// rows and columns. If the outputs are not floats `(B, D, …)` of one shape, or the template of
    /// attention does not fit them.
    pub fn images<E: From<Error>>(
        &self,
        images: &Tensor,
        mut f: impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<Tensor, E> {
        let op = "OrbitPool::images";
        let grid = match *images.dims() {
            [b, c, h, w] if b > 0 && c > 0 && h > 0 && w > 0 => TokenGrid::new(h, w)?,
            _ => {
                let expected = "nonempty images (B, C, H, W)";
                return Err(Error::input(op, expected, format!("{:?}", images.dims())).into());
            }
        };
        check::grid(op, self.group, grid)?;
        let candle = |e: candle_core::Error| E::from(Error::from(e));
        let images = images.contiguous().map_err(candle)?;
        let mut orbit: Vec<Tensor> = Vec::with_capacity(self.group.order());
        let mut own = None;
        for &g in self.group.elements() {
            let y = f(&turn(g, &images, grid)?)?;
            let dtype = check::work_dtype(op, &y)?;
            own.get_or_insert(y.dtype());
            let fits = match (orbit.first(), y.dims()) {
                (Some(first), dims) => dims == first.dims(),
                (None, [b, _, ..]) => *b == images.dims()[0] && y.elem_count() > 0,
                (None, _) => false,
            };
            if !fits {
                let expected = format!(
                    "a closure that returns one shape (B, D) or (B, D, …) for every group element, B = {}",
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
            Pool::Mean => Ok((sum(orbit)? / orbit.len() as f64)?),
            Pool::Max => Ok(max(orbit)?),
            Pool::Attention(template) => {
                let all = Tensor::stack(orbit, 0)?;
                let (order, batch) = (all.dim(0)?, all.dim(1)?);
                if all.dims().get(2..) != Some(template.dims()) {
                    let expected =
                        format!("a template {:?}, the shape of one member", &all.dims()[2..]);
                    return Err(Error::input(op, expected, format!("{:?}", template.dims())));
                }
                check::work_dtype(op, template)?;
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

/// The element-wise maximum of an orbit.
///
/// A cell that a group element maps to itself occurs several times. candle's maximum would pass the
/// full gradient to each copy; here the copies share it. Infinite values are allowed; a NaN gives
/// NaN.
fn max(orbit: &[Tensor]) -> candle_core::Result<Tensor> {
    let fixed: Vec<Tensor> = orbit.iter().map(Tensor::detach).collect();
    debug_assert!(!fixed.is_empty(), "an orbit has at least one member");
    let mut top = fixed[0].clone();
    for y in &fixed[1..] {
        // candle's maximum ignores a NaN on its right.
        top = y.ne(y)?.where_cond(y, &top.maximum(y)?)?;
    }
    let mut largest = Vec::with_capacity(orbit.len());
    let mut counts = Vec::with_capacity(orbit.len());
    for y in &fixed {
        let is_top = y.eq(&top)?;
        counts.push(is_top.to_dtype(y.dtype())?);
        largest.push(is_top);
    }
    let share = sum(&counts)?.recip()?;
    let zero = top.zeros_like()?;
    let mut carried = Vec::with_capacity(orbit.len());
    for (y, largest) in orbit.iter().zip(&largest) {
        // Selected: a product of an infinite value with 0 would be NaN. Divided before the sum,
        // which could overflow.
        carried.push((largest.where_cond(y, &zero)? * &share)?);
    }
    let carrier = sum(&carried)?;
    // At infinite maxima the difference of the carrier to itself is NaN, but the carrier has the
    // right value.
    let finite = top.abs()?.lt(f64::INFINITY)?;
    finite.where_cond(&with_gradient_of(&top, &carrier)?, &carrier)
}
