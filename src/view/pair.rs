//! Two views of one batch, applied to images.

use candle_core::Tensor;

use super::relative::Relative;
use crate::{
    Error, GridOperator, Resample, Result, TokenGrid,
    group::{Element, GroupAction},
};

/// One geometric view of a batch: an element per sample and the token grid that the view has.
#[derive(Clone, Debug)]
pub struct View {
    pub(super) elements: Vec<Element>,
    pub(super) base: TokenGrid,
    pub(super) grid: TokenGrid,
    /// Whether the grid is another than the base grid and its transpose.
    pub(super) scaled: bool,
    pub(super) resample: Resample,
}

impl View {
    /// The element of each sample: source to view.
    pub fn elements(&self) -> &[Element] {
        &self.elements
    }

    /// The token grid of the view.
    pub fn grid(&self) -> TokenGrid {
        self.grid
    }

    /// The view of images `(B, C, H, W)`, or of token maps on the base grid.
    ///
    /// A view that is not scaled has the pixels of its images, `(W, H)` after a quarter turn; `H`
    /// and `W` may be any. A scaled view needs `H` and `W` that are whole multiples `P` of the base
    /// grid's sides. It has `P·rows × P·cols` pixels, with the rows and columns of its
    /// [`grid`](Self::grid).
    ///
    /// # Errors
    /// If the tensor is no image, its batch differs from the drawn one, a scaled view meets sides
    /// that are no multiples of the base grid, or a quarter turn meets patches that are not square.
    pub fn apply(&self, images: &Tensor) -> Result<Tensor> {
        let fail = |expected: String| {
            let got = format!("{:?}", images.dims());
            Err(Error::input("View::apply", expected, got))
        };
        let [batch, channels, height, width] = *images.dims() else {
            return fail("images (B, C, H, W)".to_string());
        };
        if channels == 0 || height == 0 || width == 0 {
            return fail("images (B, C, H, W) without an empty side".to_string());
        }
        let drawn = self.elements.len();
        if batch != drawn {
            // An operator of one element serves any batch; the view of one sample must not.
            return fail(format!(
                "{drawn} samples, as many as were drawn: draw views for each batch, the last and \
                 shorter one too (sample_pair(&mut rng, batch))"
            ));
        }
        let (rows, cols) = (self.base.rows(), self.base.cols());
        let patch =
            (height % rows == 0 && width % cols == 0).then(|| (height / rows, width / cols));
        if self.scaled && patch.is_none() {
            return fail(format!(
                "for a scaled view images with H a multiple of {rows} and W a multiple of {cols}, \
                 the base token grid (area (1, 1) and aspect (1, 1) take any H and W)"
            ));
        }
        let pixels = TokenGrid::new(height, width)?;
        let out = self.elements[0].out_grid(pixels)?;
        for g in &self.elements {
            if g.out_grid(pixels)? != out {
                return fail(
                    "square images, since this view turns some samples by a quarter and some not \
                     (on a square base grid)"
                        .to_string(),
                );
            }
        }
        if let Some((h, w)) = patch
            && (out.rows() != self.grid.rows() * h || out.cols() != self.grid.cols() * w)
        {
            return fail(format!(
                "images of square patches, since a quarter turn swaps the sides of a patch too \
                 (the base token grid {} has patches of {h}x{w} pixels)",
                self.base
            ));
        }
        GridOperator::between(&self.elements, pixels, out, &self.resample)?.apply(images)
    }
}

/// Two views of one batch.
#[derive(Clone, Debug)]
pub struct ViewPair {
    /// The first view.
    pub first: View,
    /// The second view.
    pub second: View,
}

impl ViewPair {
    /// The relative elements `g₂ ∘ g₁⁻¹`, which carry token maps of the first view into the
    /// second's frame.
    pub fn relative(&self) -> Relative<Element> {
        let pairs = self.first.elements.iter().zip(&self.second.elements);
        Relative {
            elements: pairs.map(|(a, b)| Element::relative(a, b)).collect(),
            from: self.first.grid,
            to: self.second.grid,
        }
    }
}
