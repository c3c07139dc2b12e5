//! The cost of a loss at several layers.

use super::{Cost, Regularizer, Training};
use crate::ser::{SerConfig, SerLayers};
use crate::{Error, Result};

impl Regularizer {
    /// What each layer of `ser` adds to `training`, by name, in the order of [`SerLayers::names`].
    ///
    /// `tokens` are those of an image at each layer; a single number is for all. They, the channels and the settings of the
    /// loss take the place of `self`'s; the loss of a layer of weight 0 is not computed and costs nothing. All layers share the
    /// views, which the first one, whatever its weight, has in its [`geometry`](Cost::geometry). The whole is the sum over
    /// layers:
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use ser_reg::cost::{Regularizer, Training};
    /// use ser_reg::ser::{Depth, SerConfig, SerLayers};
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let ser = SerLayers::new(SerConfig::default(), &[("block3", 384), ("block6", 384)], Depth::Constant, vb)?;
    /// let training = Training::paper()?;
    /// let costs = Regularizer::default().by_layer(&ser, &[196], &training)?;
    /// for (name, cost) in &costs {
    ///     println!("{name}: {:.4}x", cost.overhead());
    /// }
    /// let macs: f64 = costs.iter().map(|(_, cost)| cost.regularizer_macs()).sum();
    /// assert!(macs / costs[0].1.base_macs() < 0.001);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`cost`](Self::cost), and if `tokens` are neither one nor as many as the layers.
    pub fn by_layer(
        &self,
        ser: &SerLayers,
        tokens: &[usize],
        training: &Training,
    ) -> Result<Vec<(String, Cost)>> {
        let count = ser.iter().count();
        if tokens.len() != 1 && tokens.len() != count {
            return Err(Error::input(
                "Regularizer::by_layer",
                format!("tokens of 1 or {count} layers"),
                format!("{tokens:?}"),
            ));
        }
        let layers = ser.iter().zip(tokens.iter().cycle()).enumerate();
        let costs = layers.map(|(i, ((name, weight, loss), tokens))| {
            let config = *loss.config();
            let alone = Self {
                tokens: *tokens,
                channels: loss.field().channels(),
                ser: SerConfig {
                    lambda: if weight == 0.0 { 0.0 } else { config.lambda },
                    ..config
                },
                pixels: if i == 0 { self.pixels } else { 0 },
                ..*self
            };
            Ok((name.to_string(), alone.cost(training)?))
        });
        costs.collect()
    }
}
