//! What the tests of the equivariance loss share: relative elements, seeded maps and heads.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use ser_reg::group::{D4, Element, FieldType, Scale, Window};
use ser_reg::loss::{Contrastive, Negatives, SameImage};
use ser_reg::view::Relative;
use ser_reg::{
    GroupAction, MapPair, Projector, ProjectorConfig, SerConfig, SerLoss, SerOutput, TokenGrid,
    grad, ser::Objective,
};

use crate::loss_common::{assert_close, differences, flat, rng, scalar, tokens};

pub const CHANNELS: usize = 5;

/// Every objective, with one temperature and one eps.
pub fn objectives(temperature: f64, eps: f64) -> [Objective; 7] {
    let paper = Contrastive { temperature, eps, ..Default::default() };
    let other =
        Contrastive { negatives: Negatives::OtherView, same_image: SameImage::Keep, ..paper };
    [
        Objective::NtXent(paper),
        Objective::NtXent(other),
        Objective::Mse,
        Objective::NormalizedMse { eps },
        Objective::Cosine { eps },
        Objective::L1,
        Objective::SmoothL1 { beta: 0.4 },
    ]
}

pub fn with_objective(objective: Objective) -> SerConfig {
    SerConfig { objective, ..Default::default() }
}

/// NT-Xent of the paper with another temperature.
pub fn nt_xent_at(temperature: f64) -> Objective {
    Objective::NtXent(Contrastive { temperature, ..Default::default() })
}

pub fn build(config: SerConfig) -> SerLoss {
    SerLoss::new(config).expect("a valid configuration")
}

pub fn small_head() -> ProjectorConfig {
    ProjectorConfig { hidden: 6, out: 4, norm: true }
}

/// A head with seeded variables.
pub fn seeded_head(
    field: FieldType,
    config: ProjectorConfig,
    dtype: DType,
    seed: u64,
) -> (Projector, VarMap) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let head = Projector::on_field(field, config, vb).expect("a valid configuration");
    reseed(&vars, seed);
    (head, vars)
}

/// Sets all variables to values that depend on `seed` and their names alone.
pub fn reseed(vars: &VarMap, seed: u64) {
    let rng = &mut rng(seed);
    for (_, var) in grad::named(vars, "") {
        let value = tokens(rng, var.shape().clone(), var.dtype()).unwrap();
        var.set(&value).unwrap();
    }
}

/// The maps of `batch` images on the grids of `relative`.
pub fn maps_of(
    seed: u64,
    batch: usize,
    relative: &Relative<Element>,
    channels: usize,
    dtype: DType,
) -> (Var, Var) {
    let rng = &mut rng(seed);
    let mut map = |grid: TokenGrid| tokens(rng, (batch, grid.len(), channels), dtype).unwrap();
    (map(relative.from_grid()), map(relative.to_grid()))
}

pub fn maps(seed: u64, batch: usize, relative: &Relative<Element>) -> (Var, Var) {
    maps_of(seed, batch, relative, CHANNELS, DType::F64)
}

/// The loss of two maps without a head.
pub fn forward<G: GroupAction>(
    ser: &SerLoss,
    map1: &Tensor,
    map2: &Tensor,
    relative: &Relative<G>,
) -> ser_reg::Result<SerOutput> {
    ser.forward(&MapPair::new([map1, map2], relative))
}

pub fn grid(rows: usize, cols: usize) -> TokenGrid {
    TokenGrid::new(rows, cols).unwrap()
}

/// One D4 element per image.
pub fn turns() -> Relative<Element> {
    let g = [D4::ROT90, D4::HFLIP, D4::ROT180].map(Element::from);
    Relative::new(g.to_vec(), grid(3, 3), grid(3, 3)).unwrap()
}

/// Two crops per image that overlap in part, the second pair not at all, each on a grid of its own.
pub fn crops() -> Relative<Element> {
    let window = |y, x| Element::from(Window::new(y, x, 0.5, 0.5).unwrap());
    let pairs = [
        (window(0.0, 0.0), window(0.25, 0.1).then(D4::HFLIP)),
        (window(0.0, 0.0), window(0.5, 0.5)),
        (window(0.2, 0.2), window(0.0, 0.1).then(D4::ROT90)),
    ];
    let relative = pairs.map(|(a, b)| Element::relative(&a, &b)).to_vec();
    Relative::new(relative, grid(4, 3), grid(3, 4)).unwrap()
}

/// Every token of both views counts, but none stays where it is.
pub fn scales() -> Relative<Element> {
    let g = Element::from(D4::ROT90).then(Scale::to_grid(grid(3, 2), grid(4, 3)));
    Relative::new(vec![g], grid(2, 3), grid(4, 3)).unwrap()
}

pub fn no_overlap() -> Relative<Element> {
    let window = |y| Element::from(Window::new(y, 0.0, 0.25, 0.25).unwrap());
    let g = Element::relative(&window(0.0), &window(0.5));
    Relative::new(vec![g], grid(3, 3), grid(3, 3)).unwrap()
}

/// Compares the gradient of `loss` at every variable with central differences.
#[track_caller]
pub fn assert_gradients(vars: &[Var], loss: impl Fn() -> Tensor) {
    let grads = loss().backward().unwrap();
    for var in vars {
        let at = |v: &[f64]| {
            let kept = var.as_tensor().copy().unwrap();
            let moved = Tensor::from_slice(v, var.shape(), &Device::Cpu).unwrap();
            var.set(&moved).unwrap();
            let value = scalar(&loss());
            var.set(&kept).unwrap();
            value
        };
        let grad = flat(grads.get(var).expect("every variable is reached"));
        assert_close(&grad, &differences(&flat(var), 1e-5, at), 2e-6);
    }
}
