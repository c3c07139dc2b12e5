//! Group elements, without tensors: exact or `f64` algebra on points of the plane.
//!
//! The image covers the unit square, y down, x right; a [`Point`] is `(y, x)`. An element `g` moves
//! points, and acts on images from the left: `(g·x)(p) = x(g⁻¹ p)`.
//!
//! | type | what it is | on the plane |
//! |---|---|---|
//! | [`D4`] | quarter turns and flips | exact, finite, order 8 |
//! | [`Scale`] | resizing by `(sy, sx)` | the identity: only the grid changes |
//! | [`Window`] | a crop: the view is a sub-window of the source | axis-aligned, `f64` |
//! | [`Affine`] | any rotation, shear, translation | `f64` |
//! | [`Roll`] | a cyclic translation | `f64`, on the torus |
//! | [`Element`] | all of the above but [`Roll`], composed in any order | D4 stays exact |
//!
//! [`FieldType`] says how channels change when the grid turns.

mod affine;
mod d4;
mod element;
mod field;
mod roll;
mod scale;
mod subgroup;
mod window;

pub use affine::Affine;
pub use d4::D4;
pub use element::Element;
pub use field::{FieldType, Representation};
pub use roll::Roll;
pub use scale::Scale;
pub use subgroup::Subgroup;
pub use window::Window;

use crate::{Result, TokenGrid};

/// A point `(y, x)` of the plane; the image covers `[0, 1]²`, y down, x right.
pub type Point = [f64; 2];

/// An element of a group that acts on images and token maps by moving points of the plane.
///
/// - It is a left action: `act(a, act(b, x)) = act(a.compose(&b), x)`.
/// - `a.compose(&b)` is `a ∘ b`: `b` acts first. [`Element::then`] has the opposite order:
///   `b.then(a)` is `a ∘ b`.
///
/// Four methods define an element. Tokens, images, gradients, masks, per-sample batches and the law
/// suite `ser_reg::testing` follow from them. Equal elements of one call share one operator, so
/// `PartialEq` must compare everything that [`source`](Self::source) uses.
///
/// The laws cannot see a reversed direction: with [`source`](Self::source) inverted, a commutative
/// group still satisfies all of them. Assert one known result as well, as this example does:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ser_reg::{GridOperator, Resample, TokenGrid, group::{GroupAction, Point}};
///
/// /// A cyclic shift to the right, by a fraction of the image's width.
/// #[derive(Clone, Debug, PartialEq)]
/// struct Roll(f64);
///
/// impl GroupAction for Roll {
///     fn identity() -> Self {
///         Roll(0.0)
///     }
///     fn compose(&self, first: &Self) -> Self {
///         Roll((self.0 + first.0).rem_euclid(1.0))
///     }
///     fn inverse(&self) -> Self {
///         Roll((-self.0).rem_euclid(1.0))
///     }
///     fn source(&self, [y, x]: Point) -> Point {
///         [y, (x - self.0).rem_euclid(1.0)]
///     }
/// }
///
/// let grid = TokenGrid::new(1, 4)?;
/// let tokens = Tensor::new(&[[[0f32], [1.], [2.], [3.]]], &Device::Cpu)?;
/// let shifted = GridOperator::new(&[Roll(0.25)], grid, &Resample::default())?.apply(&tokens)?;
/// assert_eq!(shifted.flatten_all()?.to_vec1::<f32>()?, [3., 0., 1., 2.]);
///
/// // Images `(B, C, H, W)` are moved by an operator on the grid of their pixels.
/// let images = Tensor::rand(0f32, 1., (2, 3, 16, 64), &Device::Cpu)?;
/// let pixels = TokenGrid::new(16, 64)?;
/// let moved = GridOperator::new(&[Roll(0.25), Roll(0.5)], pixels, &Resample::default())?;
/// assert_eq!(moved.apply(&images)?.dims(), [2, 3, 16, 64]);
/// # Ok::<(), ser_reg::Error>(())
/// ```
pub trait GroupAction: Clone + PartialEq + std::fmt::Debug {
    /// The neutral element.
    fn identity() -> Self;

    /// The product `self ∘ first`: `first` acts first.
    fn compose(&self, first: &Self) -> Self;

    /// The element that undoes this one.
    fn inverse(&self) -> Self;

    /// Where the point `p` of the result comes from: `g⁻¹ p`.
    fn source(&self, p: Point) -> Point;

    /// `to ∘ from⁻¹`: it carries the view `from·x` into the frame of the view `to·x`.
    fn relative(from: &Self, to: &Self) -> Self {
        to.compose(&from.inverse())
    }

    /// The D4 element of the linear part, without scales and shifts. It acts on the channels of a
    /// [`FieldType`]. `None` if there is none, for example for a turn by 30° or a shear.
    ///
    /// It must be a homomorphism: `(a∘b).d4_part() = a.d4_part() ∘ b.d4_part()`. An action that is
    /// not affine but is used with a field returns here what it does to the axes. A cyclic shift
    /// returns [`D4::IDENTITY`].
    ///
    /// ```
    /// use ser_reg::group::{Affine, D4, Element, GroupAction, Scale, Window};
    /// let view = Element::from(Window::new(0.1, 0.2, 0.5, 0.5)?).then(D4::ROT90).then(Scale::new(2.0, 2.0)?);
    /// assert_eq!(view.d4_part(), Some(D4::ROT90));
    /// assert_eq!(Affine::rotation(30.0)?.d4_part(), None);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    fn d4_part(&self) -> Option<D4> {
        D4::part_of(&self.affine()?)
    }

    /// The grid on which the result of acting on `grid` is sampled. The default is `grid`. A
    /// quarter turn swaps rows and columns; a scale changes their number.
    ///
    /// # Errors
    /// If the result would have no cell, or too many.
    fn out_grid(&self, grid: TokenGrid) -> Result<TokenGrid> {
        Ok(grid)
    }

    /// The affine map by which this element moves points, if it is one. Operators of affine
    /// elements are permutations or separable where the map allows; others are sparse.
    fn affine(&self) -> Option<Affine> {
        None
    }
}
