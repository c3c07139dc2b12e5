//! AdamW with weight decay on matrices only.

use candle_core::{Result, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

/// candle's AdamW decays all that it is given, so matrices and vectors (biases, scales, shifts, CLS) get one each.
pub struct Decoupled {
    matrices: AdamW,
    vectors: AdamW,
}

impl Decoupled {
    pub fn new(named: &[(String, Var)], weight_decay: f64) -> Result<Self> {
        let is_matrix = |v: &&Var| v.dims().iter().filter(|&&d| d > 1).count() > 1;
        let vars = || named.iter().map(|(_, var)| var);
        let adam = |vars: Vec<Var>, weight_decay| {
            let config = ParamsAdamW {
                weight_decay,
                ..Default::default()
            };
            AdamW::new(vars, config)
        };
        Ok(Self {
            matrices: adam(vars().filter(is_matrix).cloned().collect(), weight_decay)?,
            vectors: adam(vars().filter(|v| !is_matrix(v)).cloned().collect(), 0.0)?,
        })
    }

    pub fn step(&mut self, grads: &GradStore, learning_rate: f64) -> Result<()> {
        for part in [&mut self.matrices, &mut self.vectors] {
            part.set_learning_rate(learning_rate);
            part.step(grads)?;
        }
        Ok(())
    }
}
