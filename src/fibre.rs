//! The operator by which group elements act on the channels of a [`FieldType`].
//!
//! A [`GridOperator`](crate::GridOperator) moves tokens and keeps their channels. A
//! [`FibreOperator`] permutes the channels of every token and keeps the tokens in place. The two
//! commute, and their product is the action on a field, `(g·F)(p) = ρ(g) F(g⁻¹p)`:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use ser_reg::{GridOperator, Resample, TokenGrid, fibre::FibreOperator, group::{D4, FieldType, Subgroup}};
//! let grid = TokenGrid::square(4)?;
//! let field = FieldType::regular(Subgroup::C4, 8)?; // two blocks of four channels
//! let elements = [D4::ROT90, D4::ROT180]; // one per sample
//! let tokens = Tensor::zeros((2, grid.len(), 8), DType::F32, &Device::Cpu)?;
//! let moved = GridOperator::new(&elements, grid, &Resample::default())?.apply(&tokens)?;
//! let turned = FibreOperator::new(&field, &elements)?.apply(&moved)?;
//! assert_eq!(turned.dims(), tokens.dims());
//! # Ok::<(), ser_reg::Error>(())
//! ```

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::{
    Error, Result,
    group::{D4, FieldType, GroupAction},
    storage::{self, Moves, is_movable},
};

const OP: &str = "fibre-operator";

/// A permutation of the channels of every token: one for the whole batch, or one per sample.
///
/// It is exact for any type of value. Its backward pass is the [`inverse`](Self::inverse), which is
/// also the adjoint.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{fibre::FibreOperator, group::{D4, FieldType, Subgroup}};
/// let field = FieldType::regular(Subgroup::C4, 4)?;
/// let token = Tensor::new(&[[[0f32, 1., 2., 3.]]], &Device::Cpu)?;
/// let turned = FibreOperator::new(&field, &[D4::ROT90])?.apply(&token)?;
/// assert_eq!(turned.flatten_all()?.to_vec1::<f32>()?, [3., 0., 1., 2.]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FibreOperator {
    channels: usize,
    samples: usize,
    /// The source of each channel, for each sample.
    sources: Arc<Vec<u32>>,
    identity: bool,
}

impl FibreOperator {
    /// The operator by which `elements` act on the channels of `field`: one element for the whole
    /// batch, or one per sample.
    ///
    /// The [`d4_part`](GroupAction::d4_part) of each element acts. A field of trivial blocks only
    /// accepts every element and does not change.
    ///
    /// # Errors
    /// If there is no element or no channel, if an element has no D4 part, or if its D4 part is not
    /// in the group of every regular representation; if there are more than 2^24 channels.
    pub fn new<G: GroupAction>(field: &FieldType, elements: &[G]) -> Result<Self> {
        let op = "FibreOperator::new";
        let channels = field.channels();
        if elements.is_empty() || channels == 0 {
            return Err(Error::input(
                op,
                "one element, or one per sample, and a field of at least one channel",
                format!("{} elements, {channels} channels", elements.len()),
            ));
        }
        if field.is_trivial() {
            let sources = field.source_indices(D4::IDENTITY)?;
            return Ok(Self::of(channels, 1, sources));
        }
        // D4 has eight elements, so a batch has at most eight distinct permutations.
        let mut known: Vec<Option<Vec<u32>>> = vec![None; 8];
        let mut sources = Vec::new();
        for (sample, g) in elements.iter().enumerate() {
            let Some(turn) = g.d4_part() else {
                return Err(Error::input(
                    op,
                    "elements whose linear part is a quarter turn or a flip, up to a scale: a regular representation \
                     has no action of others (draw such views, or take a trivial field)",
                    format!("{g:?} for sample {sample}"),
                ));
            };
            let source = match &mut known[turn.index()] {
                Some(source) => source,
                slot => slot.insert(field.source_indices(turn)?),
            };
            // Here the number of channels is known to be sane.
            sources.reserve(if sample == 0 { source.len() * elements.len() } else { 0 });
            sources.extend_from_slice(source);
        }
        Ok(Self::of(channels, elements.len(), sources))
    }

    fn of(channels: usize, samples: usize, sources: Vec<u32>) -> Self {
        let stays = |fibre: &[u32]| fibre.iter().enumerate().all(|(i, &s)| i as u32 == s);
        Self {
            channels,
            samples,
            identity: sources.chunks_exact(channels).all(stays),
            sources: Arc::new(sources),
        }
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The source of every channel of sample `b`.
    fn source(&self, b: usize) -> &[u32] {
        let b = if self.samples == 1 { 0 } else { b };
        &self.sources[b * self.channels..][..self.channels]
    }

    /// The inverse operator, which is also the adjoint.
    pub fn inverse(&self) -> Self {
        let mut sources = vec![0; self.sources.len()];
        let fibres = sources.chunks_exact_mut(self.channels);
        for (out, fibre) in fibres.zip(self.sources.chunks_exact(self.channels)) {
            for (i, &source) in fibre.iter().enumerate() {
                out[source as usize] = i as u32;
            }
        }
        Self::of(self.channels, self.samples, sources)
    }

    /// `self ∘ first`: `first` acts first.
    ///
    /// # Errors
    /// If the two differ in channels, or both are per sample with different numbers of samples.
    pub fn compose(&self, first: &Self) -> Result<Self> {
        let (a, b) = (self.samples, first.samples);
        if self.channels != first.channels || (a != b && a != 1 && b != 1) {
            return Err(Error::input(
                "FibreOperator::compose",
                format!("a first operator on {} channels, for 1 or {a} samples", self.channels),
                format!("one on {} channels, for {b}", first.channels),
            ));
        }
        let samples = a.max(b);
        let sources = (0..samples).flat_map(|b| {
            let before = first.source(b);
            self.source(b).iter().map(|&i| before[i as usize])
        });
        Ok(Self::of(self.channels, samples, sources.collect()))
    }

    /// Acts on tokens `(B, N, C)` or on a map `(B, C, H, W)`; differentiable.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, the number of channels differs from the field, or the batch
    /// is empty or does not fit the number of samples.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        if self.identity {
            return Ok(x.clone());
        }
        if matches!(x.device(), Device::Cpu) && is_movable(x.dtype()) {
            let (operator, dims) = (self.clone(), x.dims().to_vec());
            return Ok(x.contiguous()?.apply_op1(Apply { operator, dims })?);
        }
        self.apply_portable(x)
    }

    /// As [`apply`](Self::apply), made of plain candle ops only. Devices other than the CPU run it,
    /// and tests compare the fused op with it.
    #[doc(hidden)]
    pub fn apply_portable(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let axis = if x.rank() == 3 { 2 } else { 1 };
        let x = x.contiguous()?;
        if self.samples == 1 {
            let source = Tensor::new(self.source(0), x.device())?;
            return Ok(x.index_select(&source, axis)?);
        }
        let shape = match axis {
            2 => vec![self.samples, 1, self.channels],
            _ => vec![self.samples, self.channels, 1, 1],
        };
        let source = Tensor::new(self.sources.as_slice(), x.device())?.reshape(shape)?;
        let source = source.broadcast_as(x.shape())?.contiguous()?;
        Ok(x.gather(&source, axis)?)
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let channels = match *x.dims() {
            [_, _, c] | [_, c, _, _] => Some(c),
            _ => None,
        };
        let batch = x.dims().first().copied().unwrap_or(0);
        let fits = self.samples == 1 || self.samples == batch;
        if channels == Some(self.channels) && x.elem_count() > 0 && fits {
            return Ok(());
        }
        let c = self.channels;
        let batch = match self.samples {
            1 => "B".to_string(),
            samples => samples.to_string(),
        };
        Err(Error::input(
            "FibreOperator::apply",
            format!("tokens ({batch}, N, {c}), or a map ({batch}, {c}, H, W)"),
            format!("{:?}", x.dims()),
        ))
    }
}

/// One op for all samples on the CPU, in parallel. Its backward pass is the inverse.
struct Apply {
    operator: FibreOperator,
    /// Shape of the tensor, `(B, N, C)` or `(B, C, H, W)`.
    dims: Vec<usize>,
}

impl Moves for Apply {
    /// Each channel has `inner` contiguous values. A fibre is all channels with their values.
    fn moved<T: Copy + Default + Send + Sync>(&self, x: &[T]) -> Vec<T> {
        let dims = &self.dims;
        let inner = match dims.as_slice() {
            [_, _, h, w] => h * w,
            _ => 1,
        };
        let sample: usize = dims[1..].iter().product();
        let fibre = self.operator.channels * inner;
        let mut out = vec![T::default(); x.len()];
        out.par_chunks_exact_mut(sample).zip(x.par_chunks_exact(sample)).enumerate().for_each(
            |(b, (out, x))| {
                let source = self.operator.source(b);
                for (out, x) in out.chunks_exact_mut(fibre).zip(x.chunks_exact(fibre)) {
                    if inner == 1 {
                        for (out, &i) in out.iter_mut().zip(source) {
                            *out = x[i as usize];
                        }
                    } else {
                        for (out, &i) in out.chunks_exact_mut(inner).zip(source) {
                            out.copy_from_slice(&x[i as usize * inner..][..inner]);
                        }
                    }
                }
            },
        );
        out
    }
}

impl CustomOp1 for Apply {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = storage::map(OP, storage, layout, self)?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _arg: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.operator.inverse().apply(grad)?))
    }
}
