//! Runs a closure on images as they come and as an element moves them, a few at a time, and takes what it returns to
//! the host in `f64`.

use candle_core::{DType, Device, Tensor};

use super::Layer;
use crate::group::FieldType;
use crate::{Error, GridOperator, GroupAction, Resample, Result, TokenGrid};

/// What all closure metrics have in common.
pub(super) struct Run<'a> {
    /// The public function, for errors.
    pub op: &'static str,
    /// The token grid of an image as it comes.
    pub grid: TokenGrid,
    pub resample: &'a Resample,
    pub chunk: usize,
    /// How the channels of every layer turn; `None`: not at all.
    pub field: Option<&'a FieldType>,
}

/// How many pixels a token spans.
#[derive(Clone, Copy)]
pub(super) struct Patch {
    height: usize,
    width: usize,
}

impl Patch {
    fn pixels(&self, grid: TokenGrid) -> Result<TokenGrid> {
        TokenGrid::new(grid.rows() * self.height, grid.cols() * self.width)
    }
}

/// The grid of an image's pixels.
pub(super) fn pixels(images: &Tensor) -> Result<TokenGrid> {
    TokenGrid::new(images.dims()[2], images.dims()[3])
}

impl Run<'_> {
    /// The patch of a token on `grid`, for images as they come.
    pub fn patch(&self, images: &Tensor, grid: TokenGrid) -> Result<Patch> {
        let (rows, cols) = (grid.rows(), grid.cols());
        match *images.dims() {
            [b, _, h, w] if b > 0 && h > 0 && w > 0 && h % rows == 0 && w % cols == 0 => {
                Ok(Patch {
                    height: h / rows,
                    width: w / cols,
                })
            }
            _ => Err(Error::input(
                self.op,
                format!(
                    "images (B, C, H, W), B > 0, H and W multiples of the {rows}x{cols} token grid"
                ),
                format!("{:?}", images.dims()),
            )),
        }
    }

    /// That there are images, elements and a chunk.
    pub fn check(&self, images: &Tensor, elements: usize) -> Result<()> {
        self.patch(images, self.grid)?;
        if elements == 0 || self.chunk == 0 {
            let got = format!("{elements} and {}", self.chunk);
            let expected = "at least one element, and at least one image in a chunk";
            return Err(Error::input(self.op, expected, got));
        }
        Ok(())
    }

    /// The operator that moves images by `g`, onto `g`'s own token grid times the patch.
    pub fn mover<G: GroupAction>(&self, images: &Tensor, g: &G) -> Result<GridOperator> {
        let patch = self.patch(images, self.grid)?;
        let to = patch.pixels(g.out_grid(self.grid)?)?;
        GridOperator::between(std::slice::from_ref(g), pixels(images)?, to, self.resample)
    }

    /// The grid of a layer's map of the moved images.
    pub fn moved_grid(
        &self,
        images: &Tensor,
        layer: &Layer,
        mover: &GridOperator,
    ) -> Result<TokenGrid> {
        let (patch, px) = (self.patch(images, layer.grid)?, mover.out_grid());
        if px.rows() % patch.height != 0 || px.cols() % patch.width != 0 {
            return Err(Error::input(
                self.op,
                format!(
                    "moved images whose sides are multiples of the layer's {}x{} pixels a token: the coarsest layer's \
                     grid to say how images move",
                    patch.height, patch.width
                ),
                format!("{px} pixels"),
            ));
        }
        TokenGrid::new(px.rows() / patch.height, px.cols() / patch.width)
    }

    /// Calls `map` on a chunk of images after another, moved by `mover` if there is one, and joins what `read(i, x)`
    /// makes of its `count` outputs.
    pub fn outputs<E: From<Error>>(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        count: usize,
        read: impl Fn(usize, &Tensor) -> Result<Tensor>,
        map: &mut impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Tensor>, E> {
        let batch = images.dims()[0];
        let mut chunks = vec![Vec::new(); count];
        for start in (0..batch).step_by(self.chunk) {
            let size = self.chunk.min(batch - start);
            let mut chunk = images.narrow(0, start, size).map_err(Error::from)?;
            if let Some(mover) = mover {
                chunk = mover.apply(&chunk)?;
            }
            let maps = map(&chunk)?;
            if maps.len() != count {
                let expected = format!("{count} maps from the closure, one for each layer");
                return Err(Error::input(self.op, expected, maps.len()).into());
            }
            for (i, (map, chunks)) in maps.iter().zip(&mut chunks).enumerate() {
                let out = read(i, map)?;
                if out.dims()[0] != size {
                    return Err(Error::input(
                        self.op,
                        format!("a map of {size} images from a closure that was given as many"),
                        format!("{:?}", map.dims()),
                    )
                    .into());
                }
                chunks.push(out);
            }
        }
        let join = |c: &Vec<Tensor>| Ok(Tensor::cat(c, 0).map_err(Error::from)?);
        chunks.iter().map(join).collect()
    }

    /// The tokens `(B, N, C)` of all images at each layer.
    pub fn tokens<E: From<Error>>(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        layers: &[Layer],
        map: &mut impl FnMut(&Tensor) -> Result<Vec<Tensor>, E>,
    ) -> Result<Vec<Tensor>, E> {
        let moved = layers.iter().map(|layer| match mover {
            Some(mover) => self.moved_grid(images, layer, mover),
            None => {
                self.patch(images, layer.grid)?;
                Ok(layer.grid)
            }
        });
        let grids = moved.collect::<Result<Vec<_>>>()?;
        let read = |i: usize, x: &Tensor| host(&layers[i].layout.tokens(x, grids[i])?);
        self.outputs(images, mover, layers.len(), read, map)
    }

    /// The vectors `(B, D)` of all images; values that are not finite are an error.
    pub fn vectors<E: From<Error>>(
        &self,
        images: &Tensor,
        mover: Option<&GridOperator>,
        map: &mut impl FnMut(&Tensor) -> Result<Tensor, E>,
    ) -> Result<Tensor, E> {
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
