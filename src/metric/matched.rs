//! The maps that are compared: of the image with its map transformed, of the transformed image.

use candle_core::{Device, Tensor};

use super::{harness::Harness, layer::Layer};
use crate::{Error, GridOperator, GroupAction, Result, fibre::FibreOperator, group::FieldType};

/// What one layer makes of images and of transformed images: `f64` tokens `(B, N, C)` on the host.
///
/// [`EqScore::matched_maps`](super::EqScore::matched_maps) makes it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MatchedMaps {
    /// `F(x)`: the map of the images as they are.
    #[cfg(feature = "metrics")]
    pub upright: Tensor,
    /// `ρ(g)F(x)`: the same map transformed, its channels too if the score has a field.
    pub aligned: Tensor,
    /// `F(g·x)`: the map of the transformed images.
    pub moved: Tensor,
    valid: Vec<u32>,
}

impl MatchedMaps {
    fn new<G: GroupAction>(
        op: &'static str,
        g: &G,
        field: Option<&FieldType>,
        action: &GridOperator,
        upright: &Tensor,
        moved: Tensor,
    ) -> Result<Self> {
        let valid: Vec<u32> = (0..action.out_grid().len() as u32)
            .filter(|&p| action.cells(0).is_none_or(|v| v[p as usize]))
            .collect();
        if valid.is_empty() {
            return Err(Error::input(
                op,
                "elements that leave some position a preimage",
                format!("{g:?}, which leaves none"),
            ));
        }
        let mut aligned = action.apply(upright)?;
        if let Some(field) = field {
            aligned = FibreOperator::new(field, std::slice::from_ref(g))?.apply(&aligned)?;
        }
        if aligned.dims() != moved.dims() {
            return Err(Error::input(
                op,
                format!("a map of {:?} for the transformed images too", aligned.dims()),
                format!("{:?}", moved.dims()),
            ));
        }
        Ok(Self {
            #[cfg(feature = "metrics")]
            upright: upright.clone(),
            aligned,
            moved,
            valid,
        })
    }

    /// `ρ(g)F(x)` and `F(g·x)` at the positions that have a preimage, `(B, N', C)` each. They are
    /// equal for an equivariant layer.
    ///
    /// # Errors
    /// Those of candle.
    pub fn matched(&self) -> Result<(Tensor, Tensor)> {
        let valid = Tensor::new(self.valid.as_slice(), &Device::Cpu)?;
        let at = |x: &Tensor| x.contiguous()?.index_select(&valid, 1);
        Ok((at(&self.aligned)?, at(&self.moved)?))
    }
}

impl Harness<'_> {
    /// Runs `map` on the images transformed by `g` and hands each layer's maps to `each` in turn.
    pub fn matched<G: GroupAction>(
        &self,
        images: &Tensor,
        g: &G,
        field: Option<&FieldType>,
        (layers, upright): (&[Layer], &[Tensor]),
        map: &mut impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
        mut each: impl FnMut(usize, MatchedMaps) -> Result<()>,
    ) -> Result<()> {
        let mover = self.mover(images, g)?;
        let moved = self.tokens(images, Some(&mover), layers, map)?;
        for (i, moved) in moved.into_iter().enumerate() {
            let to = self.moved_grid(images, &layers[i], &mover)?;
            let one = std::slice::from_ref(g);
            let action = GridOperator::between(one, layers[i].grid, to, self.resample)?;
            let maps = MatchedMaps::new(self.op, g, field, &action, &upright[i], moved)?;
            each(i, maps)?;
        }
        Ok(())
    }
}
