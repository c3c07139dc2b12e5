//! NT-Xent in the paper's form.

use candle_core::{D, Result, Tensor, Var};
use ser_reg::loss::{Contrastive, nt_xent, nt_xent_symmetric};

use super::random;

const TEMPERATURE: f64 = 0.3;

/// Two views of `images` × `tokens` × `width` that a gradient reaches.
pub struct Pair {
    pub z: Var,
    pub zp: Var,
}

impl Pair {
    pub fn new(shape: (usize, usize, usize)) -> Self {
        let (b, n, d) = shape;
        let var = |seed| Var::from_tensor(&random(&[b, n, d], seed)).unwrap();
        Self { z: var(1), zp: var(2) }
    }

    /// Ours, forward and backward.
    pub fn ours(&self, symmetric: bool) -> f32 {
        let config = Contrastive { temperature: TEMPERATURE, ..Default::default() };
        let out = match symmetric {
            true => nt_xent_symmetric(&self.z, &self.zp, &config),
            false => nt_xent(&self.z, &self.zp, &config),
        };
        step(out.unwrap().loss)
    }

    /// One direction as one would write it in candle, forward and backward.
    pub fn plain(&self) -> f32 {
        step(plain(&self.z, &self.zp).unwrap())
    }

    /// The three matrix products that no exact method of one direction avoids: M×D·D×2M, M×2M·2M×D, 2M×M·M×D.
    pub fn products(&self) -> Tensor {
        let flat = |x: &Var| x.as_detached_tensor().flatten(0, 1).unwrap();
        products(&flat(&self.z), &flat(&self.zp)).unwrap()
    }
}

fn step(loss: Tensor) -> f32 {
    loss.backward().unwrap();
    loss.to_scalar().unwrap()
}

fn products(z: &Tensor, zp: &Tensor) -> Result<Tensor> {
    let keys = Tensor::cat(&[z, zp], 0)?;
    let s = z.matmul(&keys.t()?)?;
    s.matmul(&keys)?;
    s.t()?.matmul(z)
}

/// The whole matrix, masked, through a log-sum-exp.
fn plain(z: &Tensor, zp: &Tensor) -> Result<Tensor> {
    let (b, n, d) = z.dims3()?;
    let unit = |x: &Tensor| {
        let x = x.reshape((b * n, d))?;
        let norm = (x.sqr()?.sum_keepdim(1)? + 1e-6)?.sqrt()?;
        x.broadcast_div(&norm)
    };
    let (z, zp) = (unit(z)?, unit(zp)?);
    let positive = ((&z * &zp)?.sum_keepdim(1)? / TEMPERATURE)?;
    let s = (z.matmul(&Tensor::cat(&[&z, &zp], 0)?.t()?)? / TEMPERATURE)?;
    let image: Vec<u32> = (0..(b * n) as u32).map(|i| i / n as u32).collect();
    let rows = Tensor::from_slice(&image, (b * n, 1), z.device())?;
    let both = [&image[..], &image[..]].concat();
    let cols = Tensor::from_slice(&both, (1, 2 * b * n), z.device())?;
    let hidden = Tensor::full(f32::NEG_INFINITY, s.shape(), z.device())?;
    let s = rows.broadcast_ne(&cols)?.where_cond(&s, &hidden)?;
    let logits = Tensor::cat(&[&positive, &s], 1)?;
    (logits.log_sum_exp(D::Minus1)?.unsqueeze(1)? - positive)?.mean_all()
}
