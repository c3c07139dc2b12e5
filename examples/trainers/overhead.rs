//! What the regularizer costs beside its base method: counted from the settings, and timed within the run.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use ser_reg::ser::SerOutput;

use super::{
    cost::{self, Cost, Gather, Keys, Regularizer, Training, mlp_macs},
    method::moco::Widths,
    settings::{Base, FilterName, Ser, Settings},
    views::Posed,
    vit::VitConfig,
};

/// The count of a step, by [`crate::cost`]; `None` where no regularizer runs.
pub fn predicted(settings: &Settings, vit: &VitConfig) -> Result<Option<Cost>> {
    if settings.mode() != "ser" {
        return Ok(None);
    }
    let encoder = cost::Vit {
        side: vit.side,
        patch: vit.patch,
        channels: vit.channels,
        dim: vit.dim,
        depth: vit.depth,
        mlp: vit.dim * vit.mlp_ratio,
        prefix: 1,
        joins_after: vit.cls_after,
        first_token_last: !vit.last_map && vit.cls_after < vit.depth,
    };
    let batch = settings.batch_size as f64;
    let last = |widths: &[usize]| widths.last().copied().context("a head has widths");
    let (head, key_head, loss) = match &settings.base {
        Base::MocoV3(base) => {
            let Widths { hidden, out } = base.widths;
            let projector = mlp_macs(&[vit.dim, hidden, hidden, out]);
            // Cosines and the gradient of the queries, for either view.
            let loss = 4.0 * batch * batch * out as f64;
            let predictor = mlp_macs(&[out, hidden, out]);
            (projector + predictor, projector, loss)
        }
        Base::Dino(base) => {
            let widths = &base.mlp.widths;
            let head = mlp_macs(widths) + mlp_macs(&[last(widths)?, base.prototypes]);
            (head, head, 0.0)
        }
        Base::BarlowTwins(base) => {
            let widths = &base.projector.widths;
            // The correlations, and the gradient of both sides.
            let loss = 3.0 * batch * (last(widths)? as f64).powi(2);
            (mlp_macs(widths), 0.0, loss)
        }
    };
    let momentum = settings.momentum.is_some();
    let training = Training {
        encoder_macs: encoder.macs()?,
        head_macs: head,
        key_head_macs: key_head,
        loss_macs: loss,
        batch: settings.batch_size,
        processes: 1,
        views: 2,
        key_views: if momentum { 2 } else { 0 },
    };
    let ser = &settings.ser;
    let regularizer = Regularizer {
        fraction: ser.ratio,
        tokens: encoder.tokens()?,
        channels: vit.dim,
        ser: ser.loss(vit.prefix(ser.layer)),
        keys: if momentum {
            Keys::Momentum
        } else {
            Keys::Trained
        },
        gather: Gather::Own,
        token_taps: taps(ser, vit.grid()),
        image_taps: taps(ser, vit.side),
        pixels: vit.channels * vit.side * vit.side,
    };
    Ok(Some(regularizer.cost(&training)?))
}

/// Multiply–adds for each value that a view or an alignment makes, of a source with sides of `side` cells: turns and flips
/// only move values, scales and crops resample one axis after the other, other poses both at once.
fn taps(ser: &Ser, side: usize) -> usize {
    let one = (1.0, 1.0);
    let is_sparse = ser.rotation.is_some() || ser.shear.is_some();
    let moves = ser.scale == one && ser.aspect == one && ser.crops.is_none();
    if moves && ser.translation.is_none() && !is_sparse {
        return 0;
    }
    let axis = match ser.filter {
        FilterName::Nearest => return 1,
        FilterName::Bilinear | FilterName::BilinearAntialias | FilterName::Area => 2,
        FilterName::Bicubic | FilterName::BicubicAntialias => 4,
        FilterName::Fourier => side,
    };
    if is_sparse { axis * axis } else { 2 * axis }
}

/// Seconds of the regularizer by itself: posing the pictures, which was timed before, then projector, alignment and loss
/// forward and backward, on copies of the tapped maps. Nothing of it is kept: training does not notice.
///
/// Blocks before the tap are left out, since their backward pass serves both losses at once, and so are the optimizer's
/// update of the projector and the sum of both gradients at the tap.
pub fn time(
    posed: &Posed,
    loss: impl FnOnce([&Tensor; 2]) -> ser_reg::Result<SerOutput>,
    device: &Device,
) -> Result<f64> {
    let [first, second] = posed.maps().map(|map| Var::from_tensor(&map.detach()));
    let maps = [first?, second?];
    device.synchronize()?;
    let start = Instant::now();
    let out = loss(maps.each_ref().map(Var::as_tensor))?;
    out.loss.backward()?;
    device.synchronize()?;
    Ok((start.elapsed() + posed.posing).as_secs_f64())
}
