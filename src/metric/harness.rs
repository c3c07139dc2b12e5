//! Runs a closure on images as they are and transformed, a chunk at a time, and takes its outputs
//! to the host in `f64`.

use candle_core::{DType, Device, Tensor};

use super::layer::Layer;
use crate::{Error, GridOperator, GroupAction, Resample, Result, TokenGrid};

/// What all metrics of a closure have in common.
pub(super) struct Harness<'a> {
    /// The public function, for errors.
    pub op: &'static str,
    /// The token grid of the images, of which an element says how it changes.
    pub grid: TokenGrid,
    pub resample: &'a Resample,
    /// Images per call of the closure.
    pub chunk: usize,
}

/// The grid of an image's pixels.
pub(super) fn pixels(images: &Tensor) -> Result<TokenGrid> {
    TokenGrid::new(images.dims()[2], images.dims()[3])
}

/// The pixels of a token, height and width, if the grid divides the image.
fn patch(pixels: TokenGrid, grid: TokenGrid) -> Option<[usize; 2]> {
    let (h, w) = (pixels.rows(), pixels.cols());
    let divides = h % grid.rows() == 0 && w % grid.cols() == 0;
    divides.then(|| [h / grid.rows(), w / grid.cols()])
}

impl Harness<'_> {
    /// Refuses an empty batch, no elements and an empty chunk.
    pub fn check(&self, images: &Tensor, elements: usize) -> Result<()> {
        if images.rank() != 4 || images.elem_count() == 0 {
            return Err(Error::input(
                self.op,
                "images (B, C, H, W) without an empty side",
                format!("{:?}", images.dims()),
            ));
        }
        if elements == 0 || self.chunk == 0 {
            let got = format!("{elements} and {}", self.chunk);
            let expected = "at least one element, and at least one image in a chunk";
            return Err(Error::input(self.op, expected, got));
        }
        Ok(())
    }

    /// The operator that transforms images by `g`.
    ///
    /// If the token grid divides the image, the result has whole tokens of the same patch.
    /// Otherwise `g` must keep the size of the image, but for a quarter turn.
    pub fn mover<G: GroupAction>(&self, images: &Tensor, g: &G) -> Result<GridOperator> {
        let (from, to) = (pixels(images)?, g.out_grid(self.grid)?);
        let out = match patch(from, self.grid) {
            Some([h, w]) => TokenGrid::new(to.rows() * h, to.cols() * w)?,
            None => {
                let out = g.out_grid(from)?;
                let kept = to == self.grid && out == from;
                let turned = to == self.grid.transposed() && out == from.transposed();
                if !kept && !turned {
                    return Err(Error::input(
                        self.op,
                        format!(
                            "for an element that scales, images with H and W multiples of the {} \
                             token grid",
                            self.grid
                        ),
                        format!("{:?} under {g:?}", images.dims()),
                    ));
                }
                out
            }
        };
        GridOperator::between(std::slice::from_ref(g), from, out, self.resample)
    }

    /// The grid of a layer's map of the transformed images.
    pub fn moved_grid(
        &self,
        images: &Tensor,
        layer: &Layer,
        mover: &GridOperator,
    ) -> Result<TokenGrid> {
        let (from, out) = (pixels(images)?, mover.out_grid());
        let fail = |expected: String| Err(Error::input(self.op, expected, format!("{out} pixels")));
        match patch(from, layer.grid) {
            Some([h, w]) if out.rows() % h == 0 && out.cols() % w == 0 => {
                TokenGrid::new(out.rows() / h, out.cols() / w)
            }
            Some([h, w]) => fail(format!(
                "transformed images whose sides are multiples of the {h}x{w} pixels a token of every \
                 layer"
            )),
            None if out == from => Ok(layer.grid),
            None if out == from.transposed() => Ok(layer.grid.transposed()),
            None => fail(format!(
                "transformed images of {from} pixels, since the {} token grid does not divide them",
                layer.grid
            )),
        }
    }

    /// Calls `map` on one chunk of images after another, transformed by `mover` if there is one,
    /// and concatenates what `read(i, x)` makes of its `count` outputs.
    pub fn outputs(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        count: usize,
        read: impl Fn(usize, &Tensor) -> Result<Tensor>,
        map: &mut impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let batch = images.dims()[0];
        let mut chunks = vec![Vec::new(); count];
        for start in (0..batch).step_by(self.chunk) {
            let size = self.chunk.min(batch - start);
            let mut chunk = images.narrow(0, start, size)?;
            if let Some(mover) = mover {
                chunk = mover.apply(&chunk)?;
            }
            let maps = map(&chunk)?;
            if maps.len() != count {
                let expected = format!("{count} maps from the closure, one for each layer");
                return Err(Error::input(self.op, expected, maps.len()));
            }
            for (i, (map, chunks)) in maps.iter().zip(&mut chunks).enumerate() {
                let out = read(i, map)?;
                if out.dims()[0] != size {
                    return Err(Error::input(
                        self.op,
                        format!("a map of {size} images from a closure that was given {size}"),
                        format!("{:?}", map.dims()),
                    ));
                }
                chunks.push(out);
            }
        }
        chunks.iter().map(|c| Ok(Tensor::cat(c, 0)?)).collect()
    }

    /// The tokens `(B, N, C)` of all images at each layer.
    pub fn tokens(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        layers: &[Layer],
        map: &mut impl FnMut(&Tensor) -> candle_core::Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let grids = layers.iter().map(|layer| match mover {
            Some(mover) => self.moved_grid(images, layer, mover),
            None => Ok(layer.grid),
        });
        let grids = grids.collect::<Result<Vec<_>>>()?;
        let read = |i: usize, x: &Tensor| host(&layers[i].layout.tokens(x, grids[i])?);
        self.outputs(images, mover, layers.len(), read, map)
    }

    /// The vectors `(B, D)` of all images; values that are not finite are an error.
    #[cfg(feature = "metrics")]
    pub fn vectors(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        map: &mut impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let read = |_: usize, x: &Tensor| {
            if x.rank() != 2 || x.elem_count() == 0 {
                return Err(Error::input(
                    self.op,
                    "vectors (B, D) from the closure; pool or flatten a map",
                    format!("{:?}", x.dims()),
                ));
            }
            finite_host(self.op, x)
        };
        let mut map = |x: &Tensor| map(x).map(|y| vec![y]);
        let mut all = self.outputs(images, mover, 1, read, &mut map)?;
        Ok(all.remove(0))
    }
}

/// In `f64` on the host, off the graph.
pub(super) fn host(x: &Tensor) -> Result<Tensor> {
    Ok(x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// [`host`], if all values are finite.
#[cfg(feature = "metrics")]
pub(super) fn finite_host(op: &'static str, x: &Tensor) -> Result<Tensor> {
    let x = host(x)?;
    match values(&x)?.iter().position(|v| !v.is_finite()) {
        None => Ok(x),
        Some(i) => Err(Error::input(
            op,
            "finite values",
            format!("a NaN or infinity at flat index {i} of {:?}", x.dims()),
        )),
    }
}

/// The values of an `f64` tensor in row-major order.
pub(super) fn values(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.contiguous()?.flatten_all()?.to_vec1::<f64>()?)
}
