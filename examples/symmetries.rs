//! How exactly each symmetry acts on a token grid: the laws of a group action, measured on a smooth map.
//!
//! ```text
//! cargo run --release --example symmetries             # 16 x 16 tokens
//! cargo run --release --example symmetries -- 14 14 2  # rows, columns, waves across the map
//! ```
//!
//! The map has values within [−1, 1]. The columns are the largest errors of `act(e, x) = x`, `act(g⁻¹, act(g, x)) = x` and
//! `act(a, act(b, x)) = act(a∘b, x)`, over the elements of a row and all pairs of them, on tokens that both sides find
//! valid; the last one is the fewest tokens that were compared. An error below 1e-10 is rounding. The small figures of
//! nearest are no merit: it moves tokens by up to half a cell, and back.

#[macro_use]
mod console;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{
    Filter, GroupAction, Padding, Resample, TokenGrid,
    group::{Affine, D4, Element, Roll, Scale, Window},
    testing,
};

/// Filters that serve any map, and the one that is exact where it serves.
const LOCAL: [Filter; 4] =
    [Filter::Nearest, Filter::Bilinear, Filter::Bicubic, Filter::BicubicAntialias];
const ALL: [Filter; 5] = [LOCAL[0], LOCAL[1], LOCAL[2], LOCAL[3], Filter::Fourier];

struct Table {
    grid: TokenGrid,
    map: Tensor,
}

impl Table {
    fn rows<G: GroupAction>(
        &self,
        name: &str,
        elements: &[G],
        filters: &[Filter],
        padding: Padding,
    ) -> Result<()> {
        println!();
        for (i, &filter) in filters.iter().enumerate() {
            let resample = match filter {
                Filter::Fourier => Resample::from(filter),
                _ => Resample { filter, padding },
            };
            let e = testing::action_errors(elements, &self.map, self.grid, &resample)
                .with_context(|| format!("{name}, {filter:?}"))?;
            let name = if i == 0 { name } else { "" };
            println!(
                "{name:<32} {:<18} {} {} {} {:>8}",
                format!("{filter:?}"),
                shown(e.identity),
                shown(e.inverse),
                shown(e.left_action),
                e.cells
            );
        }
        Ok(())
    }
}

fn shown(error: f64) -> String {
    match error {
        0.0 => format!("{:>12}", "exact"),
        e if e < 1e-4 => format!("{e:>12.0e}"),
        e => format!("{e:>12.4}"),
    }
}

fn main() -> Result<()> {
    let number = |arg: std::ffi::OsString| {
        let number = arg.to_str().and_then(|arg| arg.parse().ok());
        number.with_context(|| format!("expected three numbers, ROWS COLUMNS WAVES, got {arg:?}"))
    };
    let numbers: Vec<usize> = std::env::args_os().skip(1).map(number).collect::<Result<_>>()?;
    let (rows, cols, waves) = match numbers[..] {
        [] => (16, 16, 1),
        [rows, cols, waves] => (rows, cols, waves),
        _ => anyhow::bail!("expected three numbers, ROWS COLUMNS WAVES, got {numbers:?}"),
    };
    ensure!(rows.min(cols) > 1, "ROWS COLUMNS: expected at least 2, got {rows} and {cols}");
    let most = rows.min(cols) / 2; // a wave takes two tokens
    ensure!((1..=most).contains(&waves), "WAVES: expected 1 to {most}, got {waves}");
    let grid = TokenGrid::new(rows, cols)?;
    let map = testing::band_limited(grid, [waves, waves], &mut StdRng::seed_from_u64(0))?;
    println!("{grid} tokens, at most {waves} waves across them\n");
    println!(
        "{:<32} {:<18} {:>12} {:>12} {:>12} {:>8}",
        "symmetry", "filter", "identity", "inverse", "composition", "tokens"
    );
    let table = Table { grid, map };
    let border = Padding::Border;

    table.rows("quarter turns and flips", &D4::ALL, &ALL, border)?;

    let cells = [(1, 0), (0, 1), (3, -5)];
    let cells = cells.map(|(y, x)| Roll::from_cells(y, x, grid)).into_iter();
    let cells: Vec<Roll> = cells.collect::<ser_reg::Result<_>>()?;
    table.rows("cyclic shifts, whole cells", &cells, &ALL, Padding::Periodic)?;
    let parts = [Roll::new(0.1, 0.0)?, Roll::new(0.03, -0.3)?];
    table.rows("cyclic shifts, any", &parts, &ALL, Padding::Periodic)?;

    let scales = [Scale::new(1.25, 0.75)?, Scale::new(0.8, 1.0)?, Scale::new(1.0, 1.5)?];
    table.rows("scales of the whole map", &scales, &ALL, border)?;

    let crops = [Window::new(0.1, 0.2, 0.7, 0.75)?, Window::new(0.0, 0.0, 1.0, 0.6)?];
    table.rows("crops", &crops, &LOCAL, border)?;

    let turn = |degrees| Affine::rotation_on(degrees, grid, grid);
    table.rows("rotations by any angle", &[turn(10.0)?, turn(-37.0)?], &LOCAL, border)?;
    let shifts = [Affine::translation(0.1, -0.07)?, Affine::translation(0.0, 0.2)?];
    table.rows("translations with a border", &shifts, &LOCAL, border)?;
    let shears = [Affine::shear(0.2, 0.0)?, Affine::shear(0.0, -0.3)?];
    table.rows("shears", &shears, &LOCAL, border)?;
    let chain = [
        Element::from(crops[0]).then(turn(15.0)?).then(D4::HFLIP).then(Scale::new(1.4, 1.3)?),
        Element::from(shears[0]).then(Affine::zoom(1.2, 1.1)?),
    ];
    table.rows("crop, turn, flip, resize; zoom", &chain, &LOCAL, border)?;
    Ok(())
}
