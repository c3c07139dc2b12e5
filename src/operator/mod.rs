//! Grid operators: the linear maps by which group elements act on tokens.
//!
//! ```text
//! element (algebra)  ->  grid operator (permutation | separable | sparse) + mask  ->  tensor op
//! ```
//!
//! The backward pass of an operator is its adjoint. A batch in which every sample has its own
//! element is one operator and one application.

mod apply;
mod build;
mod chain;
mod cpu;
mod filter;
mod memory;
mod permutation;
mod portable;
mod step;
mod taps;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

pub use filter::{Filter, Padding, Resample};

use self::{
    chain::{Chain, Chains},
    step::Step,
};
use crate::{Error, Result, TokenGrid, group::GroupAction};

/// The most general form among the steps of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OperatorKind {
    /// Cells move and are not mixed: exact, for any type of value.
    Permutation,
    /// `R · X · Cᵀ`: rows and columns are resampled separately.
    Separable,
    /// Each output cell reads a few cells of the whole grid.
    Sparse,
}

/// Which output cells of a sample have a preimage; `None`: all.
type Valid = Option<Arc<[bool]>>;

/// A linear map from the tokens of one grid to the tokens of another: one for the whole batch, or
/// one per sample.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ser_reg::{GridOperator, Resample, TokenGrid, group::{D4, Element, Scale}};
/// let grid = TokenGrid::new(6, 4)?;
/// // one element per sample, one application
/// let turn = GridOperator::new(&[D4::HFLIP, D4::ROT180], grid, &Resample::default())?;
/// let tokens = Tensor::rand(0f32, 1., (2, grid.len(), 8), &Device::Cpu)?;
/// let turned = turn.apply(&tokens)?;
/// // the adjoint of a permutation is its inverse
/// let back = turn.adjoint().apply(&turned)?;
/// assert_eq!(back.to_vec3::<f32>()?, tokens.to_vec3::<f32>()?);
/// // images need an operator on the grid of their pixels
/// let image = Tensor::rand(0f32, 1., (2, 3, 6, 4), &Device::Cpu)?;
/// assert_eq!(turn.apply(&image)?.dims(), [2, 3, 6, 4]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GridOperator {
    chains: Chains,
    /// One mask per chain.
    valid: Arc<[Valid]>,
}

/// How many distinct elements [`GridOperator::between`] compares with the next one. The bound keeps
/// a batch of distinct elements linear.
const COMPARED: usize = 16;

impl GridOperator {
    /// The operator by which `elements` act on `grid`: one element for the whole batch, or one per
    /// sample.
    ///
    /// The result is sampled on the [`out_grid`](GroupAction::out_grid) of the elements, which must
    /// be the same for all of them. Equal elements share one operator.
    ///
    /// # Errors
    /// If there is no element, if the elements lead to different grids (for example an odd quarter
    /// turn among even ones on a non-square grid), or if [`Filter::Fourier`] meets a padding or an
    /// element that breaks the period.
    pub fn new<G: GroupAction>(
        elements: &[G],
        grid: TokenGrid,
        resample: &Resample,
    ) -> Result<Self> {
        let op = "GridOperator::new";
        let Some(first) = elements.first() else {
            return Err(Error::input(op, "one element, or one per sample", "none"));
        };
        let to = first.out_grid(grid)?;
        for (i, g) in elements.iter().enumerate() {
            let other = g.out_grid(grid)?;
            if other != to {
                return Err(Error::input(
                    op,
                    format!(
                        "elements that take the {grid} grid to one grid for all samples (on a \
                         non-square grid no odd quarter turn among even ones)"
                    ),
                    format!("{to} for sample 0, {other} for sample {i} ({g:?})"),
                ));
            }
        }
        Self::between(elements, grid, to, resample)
    }

    /// The operator by which `elements` act from the grid `from`, sampled on the grid `to`. Their
    /// [`out_grid`](GroupAction::out_grid) is ignored.
    ///
    /// # Errors
    /// If there is no element, or [`Filter::Fourier`] meets a padding or an element that breaks the
    /// period.
    pub fn between<G: GroupAction>(
        elements: &[G],
        from: TokenGrid,
        to: TokenGrid,
        resample: &Resample,
    ) -> Result<Self> {
        if elements.is_empty() {
            return Err(Error::input(
                "GridOperator::between",
                "one element, or one per sample",
                "none",
            ));
        }
        // Equal elements share one chain, and so one adjoint.
        let mut built: Vec<(&G, Arc<Chain>, Valid)> = Vec::new();
        let mut samples = Vec::with_capacity(elements.len());
        for g in elements {
            let recent = built.len().saturating_sub(COMPARED)..built.len();
            let known = recent.rev().find(|&i| built[i].0 == g);
            samples.push(known.unwrap_or(built.len()));
            if known.is_none() {
                let (chain, valid) = build::chain(g, from, to, resample)?;
                built.push((g, Arc::new(chain), valid.map(Arc::from)));
            }
        }
        let chains = samples.iter().map(|&i| built[i].1.clone());
        Ok(Self {
            chains: Chains::new(from, to, chains),
            valid: samples.iter().map(|&i| built[i].2.clone()).collect(),
        })
    }

    /// The grid of the tokens that go in.
    pub fn in_grid(&self) -> TokenGrid {
        self.chains.in_grid
    }

    /// The grid of the tokens that come out.
    pub fn out_grid(&self) -> TokenGrid {
        self.chains.out_grid
    }

    /// Number of samples with separate operators; 1 for an operator that serves any batch.
    pub fn samples(&self) -> usize {
        self.chains.len()
    }

    /// The most general form among the steps of all samples.
    pub fn kind(&self) -> OperatorKind {
        let kind = |s: &Step| match s {
            Step::Permute(_) => OperatorKind::Permutation,
            Step::Separable { .. } => OperatorKind::Separable,
            Step::Sparse(_) => OperatorKind::Sparse,
        };
        let steps = self.chains.iter().flat_map(|chain| &chain.steps);
        steps.map(kind).max().unwrap_or(OperatorKind::Permutation)
    }

    /// Whether cells only move: the operator is exact, and any type of value can be moved.
    pub fn is_exact(&self) -> bool {
        self.chains.is_permutation()
    }

    /// The adjoint `Aᵀ`, with `⟨A·x, y⟩ = ⟨x, Aᵀ·y⟩`: the backward pass. All its output is valid.
    ///
    /// It is computed once per distinct element.
    pub fn adjoint(&self) -> Self {
        Self { chains: self.chains.adjoint(), valid: vec![None; self.samples()].into() }
    }

    /// `self ∘ first`. A cell of the result is valid if it is valid in `self` and reads only cells
    /// that are valid in `first`.
    ///
    /// # Errors
    /// If `first` does not end on [`in_grid`](Self::in_grid), or both operators are per sample with
    /// different numbers of samples.
    pub fn compose(&self, first: &Self) -> Result<Self> {
        let op = "GridOperator::compose";
        if first.out_grid() != self.in_grid() {
            return Err(Error::input(
                op,
                format!("a first operator onto the {} grid", self.in_grid()),
                format!("one onto {}", first.out_grid()),
            ));
        }
        let (a, b) = (self.samples(), first.samples());
        if a != b && a != 1 && b != 1 {
            return Err(Error::input(
                op,
                format!("a first operator for 1 or {a} samples"),
                format!("one for {b}"),
            ));
        }
        let samples = 0..a.max(b);
        let chains = samples.clone().map(|i| {
            let chain = self.chains.get(i).after(first.chains.get(i));
            Arc::new(chain)
        });
        let valid = samples.clone().map(|i| {
            let own = self.cells(i);
            let Some(input) = first.cells(i) else {
                return own.map(Arc::from);
            };
            let mut cells = self.chains.get(i).valid(input.to_vec());
            if let Some(own) = own {
                cells.iter_mut().zip(own).for_each(|(c, &o)| *c &= o);
            }
            Some(cells.into())
        });
        Ok(Self {
            valid: valid.collect(),
            chains: Chains::new(first.in_grid(), self.out_grid(), chains),
        })
    }

    /// Which cells of sample `b` have a preimage, `out_grid().len()` values; `None`: all.
    ///
    /// A cell is valid if the source of its center lies within the unit square. An operator of one sample answers for any
    /// `b`, as it acts on batches of any size.
    ///
    /// # Errors
    /// If there is no sample `b`.
    pub fn valid(&self, b: usize) -> Result<Option<&[bool]>> {
        match self.samples() {
            n if n == 1 || b < n => Ok(self.cells(b)),
            n => Err(Error::input("GridOperator::valid", format!("a sample below {n}"), b)),
        }
    }

    /// [`valid`](Self::valid) of a sample that exists.
    pub(crate) fn cells(&self, b: usize) -> Option<&[bool]> {
        self.valid[if self.samples() == 1 { 0 } else { b }].as_deref()
    }

    /// Which cells of [`in_grid`](Self::in_grid) the output `cells` of sample `b` read.
    pub(crate) fn reads(&self, b: usize, cells: &[u32]) -> Vec<bool> {
        let mut set = vec![false; self.out_grid().len()];
        for &cell in cells {
            set[cell as usize] = true;
        }
        self.chains.get(b).reads(set)
    }

    /// The validity mask as a tensor `(samples, out_grid().len())`: 1 where a cell has a preimage,
    /// else 0. `None` if every cell of every sample is valid.
    ///
    /// # Errors
    /// Those of candle.
    pub fn mask(&self, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        if self.valid.iter().all(Option::is_none) {
            return Ok(None);
        }
        let n = self.out_grid().len();
        let cells: Vec<u8> = (0..self.samples())
            .flat_map(|b| (0..n).map(move |i| self.cells(b).is_none_or(|v| v[i]) as u8))
            .collect();
        let mask = Tensor::from_vec(cells, (self.samples(), n), device)?;
        Ok(Some(mask.to_dtype(dtype)?))
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::group::{D4, Window};

    fn operator<G: GroupAction>(elements: &[G]) -> GridOperator {
        GridOperator::new(elements, TokenGrid::square(9).unwrap(), &Resample::default()).unwrap()
    }

    #[test]
    fn equal_elements_of_one_call_share_a_chain_and_its_adjoint() {
        let turns: Vec<D4> = (0..64).map(|b| D4::ALL[b % 8]).collect();
        let operator = operator(&turns);
        let adjoints = [operator.adjoint(), operator.adjoint()];
        for b in 0..64 {
            for other in 0..64 {
                let is_shared = |a: &GridOperator, c: &GridOperator| {
                    ptr::eq(a.chains.get(b), c.chains.get(other))
                };
                let same = turns[b] == turns[other];
                assert_eq!(is_shared(&operator, &operator), same);
                assert_eq!(is_shared(&adjoints[0], &adjoints[1]), same);
            }
        }
    }

    #[test]
    fn elements_far_apart_are_built_again() {
        let windows: Vec<Window> = (0..=COMPARED)
            .map(|i| Window::new(0.0, 0.0, 1.0, 0.5 + i as f64 * 1e-6).unwrap())
            .collect();
        let shared = |elements: &[Window]| {
            let chains = operator(elements).chains;
            ptr::eq(chains.get(0), chains.get(elements.len() - 1))
        };
        let around = |n: usize| [&windows[..n], &windows[..1]].concat();
        assert!(shared(&around(COMPARED)));
        assert!(!shared(&around(COMPARED + 1)));
    }
}
