//! The multiply–adds of one training step: the base method beside the regularizer.
//!
//! One multiply–add is two FLOP; papers that give a ViT-S/16 "4.6 GFLOPs" count multiply–adds as one. The count has
//! products of matrices and resampling. It leaves out norms, activations and exponentials, which are linear in their
//! input. The backward pass of a linear map takes two products of the size of the forward one.
//!
//! With `n` images in the regularizer, `N` tokens of an image, `M = n·N`, `C` channels of the tapped map, and the widths
//! `H` and `D` of the head:
//!
//! | part | multiply–adds | grows |
//! |---|---|---|
//! | head | `M·(C·H + H·D)` for each map, and twice more if a gradient is wanted | linearly |
//! | alignment | `M·D·taps` in each direction, and again if the keys have a gradient | linearly |
//! | views | `2·n·pixels·taps` | linearly |
//! | contrast | `M²·D` for each product, see [`products`] | quadratically |
//! | encoder, for images of its own | `n·2·3` forward passes up to the tap, and two of the momentum encoder | linearly |

use anyhow::{Context, Result};
use ser_reg::{Filter, loss::Negatives, view::AffineRange};

use super::{
    method::moco::Widths,
    settings::{Base, Ser, SerImages, Settings},
    vit::VitConfig,
};

/// Multiply–adds of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// The base method's encoder passes, and its heads with its loss.
    pub encoder: f64,
    pub heads: f64,
    /// The parts that the regularizer adds.
    pub ser_encoder: f64,
    pub ser_head: f64,
    pub alignment: f64,
    pub views: f64,
    pub contrast: f64,
}

impl Cost {
    /// Multiply–adds of the base method alone.
    pub fn base(&self) -> f64 {
        self.encoder + self.heads
    }

    /// Multiply–adds that the regularizer adds.
    pub fn regularizer(&self) -> f64 {
        self.ser_encoder + self.ser_head + self.alignment + self.views + self.contrast
    }

    /// `(base + regularizer) / base`.
    pub fn overhead(&self) -> f64 {
        1.0 + self.regularizer() / self.base()
    }
}

/// The count of a step of these settings; `None` where no regularizer runs.
pub fn predicted(settings: &Settings, vit: &VitConfig) -> Result<Option<Cost>> {
    if settings.mode() != "ser" {
        return Ok(None);
    }
    let ser = &settings.ser;
    let momentum = settings.momentum.is_some();
    // Two views pass forward and backward through the encoder; two more forward through the momentum encoder.
    let passes = if momentum { 8.0 } else { 6.0 };
    let (batch, images) = (settings.batch_size as f64, settings.regularized()? as f64);
    let (head, key_head, loss) = heads(settings, vit)?;
    let tokens = images * (vit.grid() * vit.grid()) as f64;
    let width = ser.head.out as f64;
    let keys = match (momentum, taps(ser, vit.grid())) {
        (true, _) => Keys::Momentum,
        (false, 0) => Keys::TrainedAndPermuted,
        (false, _) => Keys::Trained,
    };
    let pixels = (vit.channels * vit.side * vit.side) as f64;
    Ok(Some(Cost {
        encoder: batch * passes * forward(vit, vit.depth),
        heads: batch * (6.0 * head + if momentum { 2.0 * key_head } else { 0.0 }) + loss,
        ser_encoder: match ser.images {
            SerImages::Own => images * passes * forward(vit, ser.layer),
            SerImages::Batch => 0.0,
        },
        ser_head: passes * tokens * mlp(&[vit.dim, ser.head.hidden, ser.head.out]),
        alignment: {
            let directions = if momentum { 2.0 } else { 4.0 };
            directions * tokens * width * taps(ser, vit.grid()) as f64
        },
        views: 2.0 * images * pixels * taps(ser, vit.side) as f64,
        contrast: products(ser.negatives()?, keys) * tokens * tokens * width,
    }))
}

/// The encoder that makes the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// A momentum encoder: keys have no gradient.
    Momentum,
    /// The trained encoder.
    Trained,
    /// The trained encoder, and all relative elements are permutations of tokens. Both directions share their cosines.
    TrainedAndPermuted,
}

/// Products of `M×D` by `D×M` in both directions of the contrast, gradient included.
///
/// In one direction the cosines of the anchors with each candidate set are one product, and the gradient of the anchors is
/// another one. A candidate set with a gradient takes a third. Both directions at once take 4/3 of one.
pub fn products(negatives: Negatives, keys: Keys) -> f64 {
    match (negatives, keys) {
        // Candidates are the anchors and the keys.
        (Negatives::BothViews, Keys::Momentum) => 2.0 * 5.0,
        (Negatives::BothViews, Keys::Trained) => 2.0 * 6.0,
        (Negatives::BothViews, Keys::TrainedAndPermuted) => 8.0,
        // Candidates are the keys.
        (Negatives::OtherView, Keys::Momentum) => 2.0 * 2.0,
        (Negatives::OtherView, Keys::Trained) => 2.0 * 3.0,
        (Negatives::OtherView, Keys::TrainedAndPermuted) => 4.0,
    }
}

/// Multiply–adds of linear maps one after the other: the sum of the products of neighboring widths.
pub fn mlp(widths: &[usize]) -> f64 {
    let pairs = widths.windows(2);
    pairs.map(|pair| pair[0] as f64 * pair[1] as f64).sum()
}

/// Multiply–adds of the forward pass of one image, up to block `last`, counted from 1.
///
/// With `n` tokens, width `d` and `h` hidden channels a block takes `n·(4d² + 2dh) + 2n²d`: queries, keys, values and
/// output, two linear maps, scores and mixing.
pub fn forward(vit: &VitConfig, last: usize) -> f64 {
    let grid = (vit.grid() * vit.grid()) as f64;
    let (dim, hidden) = (vit.dim as f64, (vit.dim * vit.mlp_ratio) as f64);
    let patch = (vit.channels * vit.patch * vit.patch) as f64;
    let linear = 4.0 * dim * dim + 2.0 * dim * hidden;
    let block = |i: usize| {
        let tokens = grid + vit.prefix(i) as f64;
        let cls_only = i == vit.depth && !vit.last_map && vit.cls_after < vit.depth;
        match cls_only {
            // All tokens give keys and values, and one gives a query.
            true => linear + (tokens - 1.0) * 2.0 * dim * dim + 2.0 * tokens * dim,
            false => tokens * linear + 2.0 * tokens * tokens * dim,
        }
    };
    grid * patch * dim + (1..=last).map(block).sum::<f64>()
}

/// Multiply–adds of the trained heads and of the momentum heads for one view of one image, and of the base loss for a batch.
fn heads(settings: &Settings, vit: &VitConfig) -> Result<(f64, f64, f64)> {
    let batch = settings.batch_size as f64;
    let last = |widths: &[usize]| widths.last().copied().context("expected widths of a head");
    Ok(match &settings.base {
        Base::MocoV3(base) => {
            let Widths { hidden, out } = base.widths;
            let projector = mlp(&[vit.dim, hidden, hidden, out]);
            // Cosines and the gradient of the queries, for either view.
            let loss = 4.0 * batch * batch * out as f64;
            (projector + mlp(&[out, hidden, out]), projector, loss)
        }
        Base::Dino(base) => {
            let widths = &base.mlp.widths;
            let head = mlp(widths) + mlp(&[last(widths)?, base.prototypes]);
            (head, head, 0.0)
        }
        Base::BarlowTwins(base) => {
            let widths = &base.projector.widths;
            // The correlations, and the gradient of both sides.
            let loss = 3.0 * batch * (last(widths)? as f64).powi(2);
            (mlp(widths), 0.0, loss)
        }
    })
}

/// Multiply–adds for each value that a view or an alignment makes, from a source with sides of `side` cells.
///
/// Rotations by 90° and flips only move values. Scales and crops resample one axis after the other; continuous rotations and
/// shears resample both at once.
fn taps(ser: &Ser, side: usize) -> usize {
    let (views, one) = (&ser.views, (1.0, 1.0));
    let moves = views.area == one && views.aspect == one && views.crop.is_none();
    if moves && views.affine.is_none() {
        return 0;
    }
    let axis = match views.resample.filter {
        Filter::Nearest => return 1,
        Filter::Bilinear | Filter::BilinearAntialias | Filter::Area => 2,
        Filter::Bicubic | Filter::BicubicAntialias => 4,
        Filter::Fourier => side,
    };
    let still = (0.0, 0.0);
    let is_sparse = |affine: AffineRange| affine.rotation != still || affine.shear != still;
    match views.affine.is_some_and(is_sparse) {
        true => axis * axis,
        false => 2 * axis,
    }
}
