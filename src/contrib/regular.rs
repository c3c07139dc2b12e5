//! The regular representation of a finite group on vectors.

use candle_core::Tensor;

use super::check;
use crate::{
    Error, Result,
    fibre::FibreOperator,
    group::{D4, FieldType, Subgroup},
    loss,
};

/// The distance of two vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Distance {
    /// `(1/D) Σ_c (a_c − b_c)²`.
    Mse,
    /// `1 − ⟨a, b⟩ / (√(|a|² + eps) √(|b|² + eps))`. A zero vector has distance 1 to every vector.
    Cosine {
        /// Finite and at least 0. A value above 0 keeps the gradient at zero vectors finite.
        eps: f64,
    },
}

/// Copies of the regular representation of `group` on vectors of `D = m·|G|` channels.
///
/// The channels are `m` blocks of `|G|`, with one channel for each element `h` in the order of
/// [`Subgroup::elements`]. Channel `(i, h)` has the index `i·|G| + h`. An element permutes each
/// block as it permutes the group:
///
/// ```text
/// (ρ(g)z)[i, h] = z[i, g⁻¹h]          ρ(a)ρ(b) = ρ(a∘b),  ρ(g)ᵀ = ρ(g⁻¹)
/// L = mean_b d(ρ(g_b) z1_b, z2_b)      g_b = g₂∘g₁⁻¹ carries view 1 into view 2
/// ```
///
/// The loss has no parameters. It asks of the last embedding what SER asks of a map: a motion of
/// the image is a known permutation. Channels that are equal within each block (invariant channels)
/// also have zero loss. So combine it with a loss that rewards information. The mean of each block
/// is an invariant vector, which an invariance loss may read.
///
/// Source: arXiv 2506.08244. Its loss is the sum over channels; [`Distance::Mse`] is the mean.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{contrib::{Distance, RegularRep}, group::{D4, Subgroup}};
/// let rep = RegularRep::new(Subgroup::C4);
/// let z = Tensor::new(&[[1f32, 2., 3., 4.], [1., 2., 3., 4.]], &Device::Cpu)?;
/// // one element per sample
/// let turned = rep.apply(&[D4::ROT90, D4::ROT180], &z)?;
/// assert_eq!(turned.to_vec2::<f32>()?, [[4., 1., 2., 3.], [3., 4., 1., 2.]]);
/// let loss = rep.loss(&[D4::ROT90, D4::ROT180], &z, &turned, Distance::Mse)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 0.);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegularRep {
    group: Subgroup,
}

impl RegularRep {
    /// The representation of this group.
    pub const fn new(group: Subgroup) -> Self {
        Self { group }
    }

    /// The group.
    pub const fn group(&self) -> Subgroup {
        self.group
    }

    /// `ρ(g)z` for vectors `(B, D)`, with one element for all vectors or one per vector.
    ///
    /// It permutes channels, so it is exact in every floating-point type. It is differentiable.
    ///
    /// # Errors
    /// If `z` is not `(B, D)` of a floating-point type, or the order of the group does not divide
    /// `D`. If there is neither one element nor one per vector, or an element is not in the group.
    pub fn apply(&self, elements: &[D4], z: &Tensor) -> Result<Tensor> {
        let op = "RegularRep::apply";
        check::work_dtype(op, z)?;
        let order = self.group.order();
        let (batch, width) = match *z.dims() {
            [b, d] if b > 0 && d > 0 && d.is_multiple_of(order) => (b, d),
            _ => {
                let expected = format!(
                    "vectors (B, D) with D a multiple of {order}, the order of {:?}",
                    self.group
                );
                return Err(Error::input(op, expected, format!("{:?}", z.dims())));
            }
        };
        if elements.len() != 1 && elements.len() != batch {
            let expected = format!("one element, or one for each of {batch} vectors");
            return Err(Error::input(op, expected, elements.len()));
        }
        let group = self.group.elements();
        if let Some(g) = elements.iter().find(|g| !group.contains(g)) {
            let expected = format!("elements of {:?}", self.group);
            return Err(Error::input(op, expected, format!("{g:?}")));
        }
        let rho = FibreOperator::new(&FieldType::regular(self.group, width)?, elements)?;
        Ok(rho.apply(&z.unsqueeze(1)?)?.squeeze(1)?)
    }

    /// The mean distance between `ρ(g_b) z1_b` and `z2_b`, differentiable with respect to both.
    ///
    /// `ρ` is orthogonal, so `g` on `z1` has the same loss as `g⁻¹` on `z2`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply). If `z1` and `z2` differ in shape, type or device. If `eps` is
    /// negative or not finite.
    pub fn loss(
        &self,
        elements: &[D4],
        z1: &Tensor,
        z2: &Tensor,
        distance: Distance,
    ) -> Result<Tensor> {
        let op = "RegularRep::loss";
        check::pair(op, z1, z2)?;
        let turned = self.apply(elements, z1)?;
        match distance {
            Distance::Mse => loss::mse(&turned, z2, None),
            Distance::Cosine { eps } => {
                check::not_negative("Distance::Cosine::eps", eps)?;
                loss::cosine(&turned, z2, eps, None)
            }
        }
    }
}
