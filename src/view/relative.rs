//! What aligns the token maps of two views, and how much of each view the other one sees.

use crate::{Error, Filter, GridOperator, GroupAction, Resample, Result, TokenGrid};

/// The elements that carry token maps of a first view into the frame of a second, with both token
/// grids.
///
/// A [`ViewSampler`](super::ViewSampler) draws it. It can also be built from any elements:
///
/// ```
/// use ser_reg::{TokenGrid, group::D4, view::Relative};
/// let grid = TokenGrid::square(7)?;
/// let relative = Relative::new(vec![D4::ROT90, D4::HFLIP], grid, grid)?; // two samples
/// assert_eq!(relative.len(), 2);
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Relative<G> {
    pub(super) elements: Vec<G>,
    pub(super) from: TokenGrid,
    pub(super) to: TokenGrid,
}

impl<G: GroupAction> Relative<G> {
    /// One relative element per sample, or one for the whole batch; `from` and `to` are the token
    /// grids of the first and of the second view.
    ///
    /// # Errors
    /// If there is no element.
    pub fn new(elements: Vec<G>, from: TokenGrid, to: TokenGrid) -> Result<Self> {
        if elements.is_empty() {
            return Err(Error::input("Relative::new", "one element, or one per sample", "none"));
        }
        Ok(Self { elements, from, to })
    }

    /// The same elements between the grids of another layer.
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::D4, view::Relative};
    /// let early = TokenGrid::square(8)?;
    /// let relative = Relative::new(vec![D4::ROT90], early, early)?;
    /// let late = TokenGrid::square(4)?;
    /// assert_eq!(relative.on(late, late).from_grid(), late);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    pub fn on(&self, from: TokenGrid, to: TokenGrid) -> Self {
        Self { elements: self.elements.clone(), from, to }
    }

    /// The elements, one per sample or one for all.
    pub fn elements(&self) -> &[G] {
        &self.elements
    }

    /// Number of elements, never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// The first view's token grid.
    pub fn from_grid(&self) -> TokenGrid {
        self.from
    }

    /// The second view's token grid.
    pub fn to_grid(&self) -> TokenGrid {
        self.to
    }

    /// The operator from the first view's tokens to the second's frame.
    ///
    /// # Errors
    /// If `resample` has [`Filter::Fourier`] and an element or the padding breaks the period.
    pub fn to_second(&self, resample: &Resample) -> Result<GridOperator> {
        GridOperator::between(&self.elements, self.from, self.to, resample)
    }

    /// The operator from the second view's tokens to the first's frame.
    ///
    /// # Errors
    /// If `resample` has [`Filter::Fourier`] and an element or the padding breaks the period.
    pub fn to_first(&self, resample: &Resample) -> Result<GridOperator> {
        let inverse: Vec<G> = self.elements.iter().map(G::inverse).collect();
        GridOperator::between(&inverse, self.to, self.from, resample)
    }

    /// For each element, the share of a view's tokens that the other view sees too; the smaller
    /// share of the two views. 1 is a full overlap. At 0 the sample takes no part in a
    /// [`SerLoss`](crate::SerLoss).
    ///
    /// A token counts as seen if its center lies within the other view.
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::Window, view::Relative};
    /// let grid = TokenGrid::square(4)?;
    /// let shift = |cells| Window::from_cells(0, cells, 4, 4, grid);
    /// let relative = Relative::new(vec![shift(1)?, shift(4)?], grid, grid)?;
    /// assert_eq!(relative.overlap()?, [0.75, 0.0]);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// None today; operators may come to reject elements.
    pub fn overlap(&self) -> Result<Vec<f64>> {
        let share = |g: &G| overlap(g, self.from, self.to);
        self.elements.iter().map(share).collect()
    }

    /// The visibility of each pair: for each element the share of the first view's tokens that the
    /// second view sees, and the share of the second view's tokens that the first view sees.
    ///
    /// [`overlap`](Self::overlap) is the smaller of the two.
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::{Element, Window}, view::Relative};
    /// let left_half = Element::from(Window::new(0.0, 0.0, 1.0, 0.5)?);
    /// let relative = Relative::new(vec![left_half], TokenGrid::square(4)?, TokenGrid::new(4, 2)?)?;
    /// assert_eq!(relative.pair_visibility()?, [[0.5], [1.0]]);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// None today; operators may come to reject elements.
    pub fn pair_visibility(&self) -> Result<[Vec<f64>; 2]> {
        let shares = self.elements.iter().map(|g| shares(g, self.from, self.to));
        let shares = shares.collect::<Result<Vec<_>>>()?;
        Ok([0, 1].map(|view| shares.iter().map(|s| s[view]).collect()))
    }

    /// The visibility of each token, `N` values in row-major order for each element: of the first
    /// view's tokens in the second view, and of the second view's tokens in the first.
    ///
    /// It is the share of the token's area that lies within the other view, taken at 4×4 points of
    /// the token. The mask of an operator takes the token's center alone.
    ///
    /// ```
    /// use ser_reg::{TokenGrid, group::Affine, view::Relative};
    /// let grid = TokenGrid::new(1, 4)?;
    /// let shift = Affine::translation(0.0, 0.125)?; // half a token to the right
    /// let [first, second] = Relative::new(vec![shift], grid, grid)?.visibility()?;
    /// assert_eq!((first, second), (vec![1.0, 1.0, 1.0, 0.5], vec![0.5, 1.0, 1.0, 1.0]));
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// If a grid of four times the rows and columns has too many cells.
    pub fn visibility(&self) -> Result<[Vec<f64>; 2]> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for g in &self.elements {
            token_shares(&g.inverse(), self.to, self.from, &mut first)?;
            token_shares(g, self.from, self.to, &mut second)?;
        }
        Ok([first, second])
    }
}

/// Points along each side of a token at which its visibility is sampled.
const POINTS: usize = 4;

/// The operator of one element for its mask alone, which does not depend on the filter. Nothing is
/// cached: the element of a drawn pair does not come again.
fn mask<G: GroupAction>(g: &G, from: TokenGrid, to: TokenGrid) -> Result<GridOperator> {
    GridOperator::between(std::slice::from_ref(g), from, to, &Filter::Nearest.into())
}

/// The smaller share of the tokens that the other view sees.
pub(super) fn overlap<G: GroupAction>(g: &G, from: TokenGrid, to: TokenGrid) -> Result<f64> {
    let [first, second] = shares(g, from, to)?;
    Ok(first.min(second))
}

/// The share of the first and of the second view's tokens that the other view sees.
fn shares<G: GroupAction>(g: &G, from: TokenGrid, to: TokenGrid) -> Result<[f64; 2]> {
    let share = |g: &G, from, to: TokenGrid| -> Result<f64> {
        let operator = mask(g, from, to)?;
        let counted = operator.cells(0).map(|v| v.iter().filter(|&&v| v).count());
        Ok(counted.unwrap_or(to.len()) as f64 / to.len() as f64)
    };
    Ok([share(&g.inverse(), to, from)?, share(g, from, to)?])
}

/// Appends the visible share of each token of `to`, in the view whose grid is `from`.
fn token_shares<G: GroupAction>(
    g: &G,
    from: TokenGrid,
    to: TokenGrid,
    out: &mut Vec<f64>,
) -> Result<()> {
    let side = |n: usize| n.saturating_mul(POINTS);
    let fine = TokenGrid::new(side(to.rows()), side(to.cols()))?;
    let operator = mask(g, from, fine)?;
    let Some(valid) = operator.cells(0) else {
        out.extend(std::iter::repeat_n(1.0, to.len()));
        return Ok(());
    };
    for lines in valid.chunks_exact(POINTS * fine.cols()) {
        let mut counts = vec![0; to.cols()];
        for line in lines.chunks_exact(fine.cols()) {
            for (count, points) in counts.iter_mut().zip(line.chunks_exact(POINTS)) {
                *count += points.iter().filter(|&&p| p).count();
            }
        }
        let share = |count| count as f64 / (POINTS * POINTS) as f64;
        out.extend(counts.into_iter().map(share));
    }
    Ok(())
}
