//! Golden cases of actions, resampling, crops, affine maps and views.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use ser_reg::{
    Filter, GridOperator, GroupAction, Padding, Resample, TokenGrid,
    group::{Affine, D4, Element, Scale, Window},
};

use crate::runner::{Case, close};

/// Suggested for `f64` by the format's README; permutations must be exact.
const F64: f64 = 1e-10;
const EXACT: f64 = 0.0;

fn grid_of(x: &Tensor) -> Result<TokenGrid> {
    let (_, _, h, w) = x.dims4()?;
    Ok(TokenGrid::new(h, w)?)
}

fn filter(case: &Case) -> Result<Filter> {
    Ok(match (case.text("mode")?, case.flag("antialias")) {
        ("nearest", false) => Filter::Nearest,
        ("bilinear", false) => Filter::Bilinear,
        ("bicubic", false) => Filter::Bicubic,
        ("bilinear", true) => Filter::BilinearAntialias,
        ("bicubic", true) => Filter::BicubicAntialias,
        ("area", false) => Filter::Area,
        (mode, antialias) => bail!("unknown mode {mode} (antialias {antialias})"),
    })
}

fn padding(case: &Case) -> Result<Padding> {
    Ok(match case.text("padding")? {
        "zeros" => Padding::Zeros,
        "border" => Padding::Border,
        "reflection" => Padding::Reflection,
        other => bail!("unknown padding {other}"),
    })
}

fn out_grid(case: &Case) -> Result<TokenGrid> {
    let (rows, cols) = case.pair("out")?;
    Ok(TokenGrid::new(rows, cols)?)
}

fn elements(indices: &[i64]) -> Result<Vec<D4>> {
    indices.iter().map(|&e| Ok(D4::from_index(e as usize)?)).collect()
}

fn to_tokens(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
}

/// `f` of the case's map and tokens, in `f64`, in `f32`, and by the portable twin.
fn check_both(case: &Case, operator: &GridOperator) -> Result<()> {
    for (x, y) in [("x", "y"), ("tokens", "y_tokens")] {
        let x = case.input(x)?;
        case.check(y, &operator.apply(x)?, EXACT)?;
        case.check(y, &operator.apply_portable(x)?, EXACT)?;
        case.check(y, &operator.apply(&x.to_dtype(DType::F32)?)?, 1e-6)?;
    }
    Ok(())
}

pub fn actions(case: &Case) -> Result<()> {
    let any = Resample::default();
    let named = match case.op.as_str() {
        "hflip" => Some(D4::HFLIP),
        "vflip" => Some(D4::VFLIP),
        "transpose" => Some(D4::TRANSPOSE),
        "antitranspose" => Some(D4::ANTI_TRANSPOSE),
        op => match op.strip_prefix("rot90_k") {
            Some(k) => Some(D4::rot90(k.replace("minus", "-").parse()?)),
            None => None,
        },
    };
    if let Some(g) = named {
        check_both(case, &GridOperator::new(&[g], grid_of(case.input("x")?)?, &any)?)?;
        return Ok(());
    }
    match case.op.as_str() {
        "d4_tables" => {
            let cayley: Vec<Vec<i64>> = case.output("cayley")?.to_vec2()?;
            let inverse: Vec<i64> = case.output("inverse")?.to_vec1()?;
            for (b, second) in D4::ALL.iter().enumerate() {
                for (a, first) in D4::ALL.iter().enumerate() {
                    let ba = second.compose(first).index();
                    ensure!(cayley[b][a] == ba as i64, "cayley[{b}][{a}] = {ba}");
                }
                ensure!(inverse[b] == D4::ALL[b].inverse().index() as i64, "inverse[{b}]");
            }
        }
        "d4" => {
            let g = D4::from_index(case.int("element")? as usize)?;
            ensure!(g == D4::new(case.int("rot90_k")?, case.int("hflip_first")? == 1), "index");
            let grid = grid_of(case.input("x")?)?;
            let source: Vec<i64> = case.output("src_index")?.to_vec1()?;
            ensure!(source.iter().map(|&i| i as u32).eq(g.source_indices(grid)), "src_index");
            check_both(case, &GridOperator::new(&[g], grid, &any)?)?;
            // The general element and its sampled points lead to the same operator.
            check_both(case, &GridOperator::new(&[Element::from(g)], grid, &any)?)?;
        }
        "d4_per_sample" => {
            let elements = elements(&case.indices("elements")?)?;
            let operator = GridOperator::new(&elements, grid_of(case.input("x")?)?, &any)?;
            check_both(case, &operator)?;
            case.check_vjp("x", ("y", "grad_x"), EXACT, |x| Ok(operator.apply(x)?))?;
            case.check_vjp("x", ("y", "grad_x"), EXACT, |x| Ok(operator.apply_portable(x)?))?;
        }
        "relative_d4" => {
            let (g1, g2) = (elements(&case.indices("g1")?)?, elements(&case.indices("g2")?)?);
            let relative: Vec<D4> = g1.iter().zip(&g2).map(|(a, b)| D4::relative(a, b)).collect();
            let want: Vec<i64> = case.output("rel")?.to_vec1()?;
            ensure!(
                want.iter().eq(relative
                    .iter()
                    .map(|g| g.index() as i64)
                    .collect::<Vec<_>>()
                    .iter()),
                "rel"
            );
            let x = case.input("x")?;
            let act = |g: &[D4], x: &Tensor| -> Result<Tensor> {
                Ok(GridOperator::new(g, grid_of(x)?, &any)?.apply(x)?)
            };
            let (v1, v2) = (act(&g1, x)?, act(&g2, x)?);
            case.check("v1", &v1, EXACT)?;
            case.check("v2", &v2, EXACT)?;
            case.check("v2", &act(&relative, &v1)?, EXACT)?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

pub fn resample(case: &Case) -> Result<()> {
    match case.op.as_str() {
        "interpolate" => {
            ensure!(!case.flag("align_corners"), "align_corners");
            let (from, to) = (grid_of(case.input("x")?)?, out_grid(case)?);
            let operator =
                GridOperator::new(&[Scale::to_grid(from, to)], from, &filter(case)?.into())?;
            ensure!(operator.out_grid() == to, "out_grid {}", operator.out_grid());
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply(x)?))?;
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply_portable(x)?))?;
            let x = case.input("x")?;
            close(&to_tokens(case.output("y")?)?, &operator.apply(&to_tokens(x)?)?, F64)?;
            case.check("y", &operator.apply(&x.to_dtype(DType::F32)?)?, 1e-5)?;
        }
        "pos_embed_bicubic" => {
            let side = case.int("S")? as usize;
            let (from, to) = (
                TokenGrid::square(side)?,
                TokenGrid::new(case.int("h")? as usize, case.int("w")? as usize)?,
            );
            // With a scale factor the source step is 1/factor: a window slightly smaller than the whole.
            let [fy, fx]: [f64; 2] = serde_json::from_value(case.params["scale_factor"].clone())?;
            let size = |n: usize, factor: f64| n as f64 / (side as f64 * factor);
            let window = Window::new(0.0, 0.0, size(to.rows(), fy), size(to.cols(), fx))?;
            let operator = GridOperator::between(&[window], from, to, &Filter::Bicubic.into())?;
            case.check_vjp("pos", ("y", "grad_pos"), F64, |x| Ok(operator.apply(x)?))?;
            let plain = GridOperator::between(
                &[Scale::to_grid(from, to)],
                from,
                to,
                &Filter::Bicubic.into(),
            )?;
            case.check("y_size", &plain.apply(case.input("pos")?)?, F64)?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

pub fn crops(case: &Case) -> Result<()> {
    let grid = grid_of(case.input("x")?)?;
    let to = out_grid(case)?;
    match case.op.as_str() {
        "resized_crop" => {
            let window = Window::from_cells(
                case.int("top")?,
                case.int("left")?,
                case.int("height")? as usize,
                case.int("width")? as usize,
                grid,
            )?;
            let zeros = Resample { padding: Padding::Zeros, ..Resample::default() };
            let crop = GridOperator::new(&[window], grid, &zeros)?;
            ensure!(crop.is_exact(), "a crop of whole cells must be exact");
            let scale = Scale::to_grid(crop.out_grid(), to);
            let resize = GridOperator::new(&[scale], crop.out_grid(), &filter(case)?.into())?;
            let operator = resize.compose(&crop)?;
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply(x)?))?;
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply_portable(x)?))?;
        }
        "roi_bilinear" => {
            let (h, w) = (grid.rows() as f64, grid.cols() as f64);
            let boxes: Vec<Vec<f64>> = case.input("boxes")?.to_vec2()?;
            let element = |(b, flip): (&Vec<f64>, &i64)| -> Result<Element> {
                let [y0, x0, y1, x1] = b[..] else { bail!("no box") };
                let window = Window::new(y0 / h, x0 / w, (y1 - y0) / h, (x1 - x0) / w)?;
                Ok(Element::from(window).then(D4::new(0, *flip == 1)))
            };
            let flips = case.indices("hflip")?;
            let elements = boxes.iter().zip(&flips).map(element).collect::<Result<Vec<_>>>()?;
            let resample = Resample { filter: Filter::Bilinear, padding: padding(case)? };
            let operator = GridOperator::between(&elements, grid, to, &resample)?;
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply(x)?))?;
            case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply_portable(x)?))?;
            let samples = |axis: usize, n: usize, side: f64| -> Result<Tensor> {
                let at = |(i, g): (usize, &Element)| {
                    let mut p = [0.5, 0.5];
                    p[axis] = (i as f64 + 0.5) / n as f64;
                    g.source(p)[axis] * side
                };
                let all: Vec<f64> =
                    elements.iter().flat_map(|g| (0..n).map(move |i| at((i, g)))).collect();
                Ok(Tensor::from_vec(all, (elements.len(), n), &candle_core::Device::Cpu)?)
            };
            case.check("sample_y", &samples(0, to.rows(), h)?, F64)?;
            case.check("sample_x", &samples(1, to.cols(), w)?, F64)?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

pub fn affine(case: &Case) -> Result<()> {
    let from = grid_of(case.input("x")?)?;
    let to = out_grid(case)?;
    let thetas: Vec<Vec<Vec<f64>>> = case.input("theta")?.to_vec3()?;
    let maps = thetas
        .iter()
        .map(|t| {
            let rows: Vec<[f64; 3]> =
                t.iter().map(|r| r[..].try_into().context("theta")).collect::<Result<_>>()?;
            Ok(Affine::from_theta(rows[..].try_into().context("theta")?)?)
        })
        .collect::<Result<Vec<_>>>()?;
    let resample = Resample { filter: filter(case)?, padding: padding(case)? };
    let check = |maps: &[Affine]| -> Result<()> {
        let operator = GridOperator::between(maps, from, to, &resample)?;
        case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply(x)?))?;
        case.check_vjp("x", ("y", "grad_x"), F64, |x| Ok(operator.apply_portable(x)?))
    };
    check(&maps)?;
    match case.op.as_str() {
        "rotate" => check(&[Affine::rotation_on(case.float("angle_deg_ccw")?, from, to)?])?,
        "affine" => {
            let mut points = Vec::new();
            for map in &maps {
                for i in 0..to.rows() {
                    for j in 0..to.cols() {
                        let [y, x] = map.source(to.center(i, j));
                        points.extend([2.0 * x - 1.0, 2.0 * y - 1.0]);
                    }
                }
            }
            let shape = (maps.len(), to.rows(), to.cols(), 2);
            case.check("grid", &Tensor::from_vec(points, shape, &candle_core::Device::Cpu)?, F64)?;
        }
        op => bail!("unknown op {op}"),
    }
    Ok(())
}

pub fn ser_views(case: &Case) -> Result<()> {
    ensure!(case.op == "ser_views", "unknown op {}", case.op);
    let x = case.input("x")?;
    let base = grid_of(x)?;
    let resample = Resample::from(filter(case)?);
    let (turns, flips) = (case.indices("rot180_0")?, case.indices("hflip_0")?);
    let view = |k: i64, size: (usize, usize), complement: i64| -> Result<Vec<Element>> {
        let scale = Scale::to_grid(base, TokenGrid::new(size.0, size.1)?);
        let element = |(r, f): (&i64, &i64)| {
            Element::from(D4::rot90(2 * (r ^ complement)))
                .then(D4::new(0, (f ^ complement) == 1))
                .then(scale)
                .then(D4::rot90(k))
        };
        Ok(turns.iter().zip(&flips).map(element).collect())
    };
    let g0 = view(case.int("rot90_0")?, case.pair("size0")?, 0)?;
    let g1 = view(case.int("rot90_1")?, case.pair("size1")?, 1)?;
    let (op0, op1) =
        (GridOperator::new(&g0, base, &resample)?, GridOperator::new(&g1, base, &resample)?);
    let (v0, v1) = (op0.apply(x)?, op1.apply(x)?);
    case.check("v0", &v0, F64)?;
    case.check("v1", &v1, F64)?;
    let relative: Vec<Element> = g0.iter().zip(&g1).map(|(a, b)| Element::relative(a, b)).collect();
    let align = GridOperator::new(&relative, op0.out_grid(), &resample)?;
    ensure!(align.out_grid() == op1.out_grid(), "{}", align.out_grid());
    let v0 = candle_core::Var::from_tensor(case.output("v0")?)?;
    let aligned = align.apply(&v0)?;
    case.check("aligned01", &aligned, F64)?;
    let grads = (aligned * case.input("cotangent")?)?.sum_all()?.backward()?;
    case.check("grad_v0", grads.get(&v0).context("no gradient")?, F64)?;
    let back: Vec<Element> = relative.iter().map(Element::inverse).collect();
    let back = GridOperator::new(&back, op1.out_grid(), &resample)?;
    case.check("aligned10", &back.apply(case.output("v1")?)?, F64)?;
    Ok(())
}
