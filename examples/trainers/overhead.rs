//! The time that the regularizer takes beside its base method. [`predicted`] counts it; [`time`] measures it within a run.

use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use rand::rngs::StdRng;
use ser_reg::{MapPair, Projector, Regularizer, tap};

pub use super::cost::predicted;
use super::{
    views::{Images, colored},
    vit::Vit,
};

/// Seconds of the regularizer by itself, forward and backward. The training does not depend on it.
///
/// For images of its own that is the whole term, with the blocks up to the tap. For images that it shares with the base method
/// it is the views, and on copies of the tapped maps the head, the alignment and the loss: the blocks run for both losses. The
/// optimizer's update of the head is left out.
pub fn time(
    ser: &Regularizer,
    images: &Images,
    encoder: &Vit,
    keys: Option<(&Vit, &Projector)>,
    rng: &mut StdRng,
) -> Result<f64> {
    let encode = |vit: &Vit, x: &Tensor| vit.forward(x);
    let model = |x: &Tensor| encode(encoder, x);
    match images {
        Images::Own(images) => {
            let device = images.device();
            device.synchronize()?;
            let start = Instant::now();
            let out = match keys {
                None => ser.forward(images, rng, model)?,
                Some((vit, head)) => ser.forward_with_keys(
                    images,
                    rng,
                    model,
                    |x: &Tensor| encode(vit, x),
                    Some(head),
                )?,
            };
            out.loss.backward()?;
            device.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        }
        Images::Shared(images) => shared(ser, images, encoder, keys, rng),
    }
}

fn shared(
    ser: &Regularizer,
    images: &Tensor,
    encoder: &Vit,
    keys: Option<(&Vit, &Projector)>,
    rng: &mut StdRng,
) -> Result<f64> {
    let device: &Device = images.device();
    device.synchronize()?;
    let start = Instant::now();
    let pair = ser.sampler().sample_pair(rng, images.dim(0)?)?;
    let views = [pair.first.apply(images)?, pair.second.apply(images)?];
    device.synchronize()?;
    let viewing = start.elapsed();

    let maps = |vit: &Vit| -> Result<[Var; 2]> {
        let model = colored(|x: &Tensor| vit.forward(x));
        let map = |view| tap::capture_until(ser.layer(), || model(view));
        let [first, second] = views.each_ref().map(map);
        Ok([Var::from_tensor(&first?.detach())?, Var::from_tensor(&second?.detach())?])
    };
    let anchors = maps(encoder)?;
    let keys = match keys {
        None => None,
        Some((vit, head)) => Some((maps(vit)?, head)),
    };
    let relative = pair.relative();
    device.synchronize()?;
    let start = Instant::now();
    let tensors = |maps: &'_ [Var; 2]| maps.each_ref().map(|var| var.as_tensor().clone());
    let [first, second] = tensors(&anchors);
    let mut compared = MapPair::new([&first, &second], &relative).head(ser.head());
    let key_maps = keys.as_ref().map(|(maps, head)| (tensors(maps), *head));
    if let Some(([first, second], head)) = &key_maps {
        compared = compared.keys([first, second], *head);
    }
    ser.loss().forward(&compared)?.loss.backward()?;
    device.synchronize()?;
    Ok((viewing + start.elapsed()).as_secs_f64())
}
