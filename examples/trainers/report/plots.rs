//! Line plots, bars and intervals as SVG text.
//!
//! A function returns `None` where there is nothing to draw. Values that are not finite are gaps.

use anyhow::Result;
use plotters::{
    coord::{
        Shift,
        ranged1d::{DefaultFormatting, KeyPointHint},
    },
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    scale::{Scale, extent, is_drawable, padded},
    series::{Point, pieces, smoothed, thinned},
};

pub const INK: RGBColor = RGBColor(31, 41, 55);
pub const BLUE: RGBColor = RGBColor(37, 99, 175);
pub const ORANGE: RGBColor = RGBColor(217, 106, 16);
pub const GREEN: RGBColor = RGBColor(22, 135, 96);
pub const PURPLE: RGBColor = RGBColor(126, 80, 186);
pub const RED: RGBColor = RGBColor(196, 56, 68);
pub const GREY: RGBColor = RGBColor(142, 151, 164);
/// Colors of series that have none of their own.
pub const PALETTE: [RGBColor; 6] = [BLUE, ORANGE, GREEN, PURPLE, RED, GREY];

const SOFT: RGBColor = RGBColor(86, 96, 112);
const GRID: RGBColor = RGBColor(231, 235, 240);

// Two units to a pixel of the page, since the backend draws at whole units.
const FONT: f64 = 26.0;
const HEIGHT: u32 = 660;
const COLUMN: u32 = 1240;
const PAGE: u32 = 2560;
const LEGEND_ROW: i32 = 44;
const SWATCH: i32 = 44;

/// What stands at the axes.
#[derive(Clone, Copy, Default)]
pub struct Axes<'a> {
    /// Name of the horizontal axis.
    pub x: &'a str,
    /// Name of the vertical axis, with its unit.
    pub y: &'a str,
    /// Values that the vertical axis reaches in any case.
    pub include: &'a [f64],
    /// Where a line is drawn across.
    pub reference: Option<f64>,
    /// Drawn for the width of the page instead of a column.
    pub wide: bool,
}

/// A line over steps or epochs.
#[derive(Clone, Debug)]
pub struct Line {
    pub name: String,
    pub color: RGBColor,
    pub points: Vec<Point>,
    /// Draws the series pale, and its moving average over it.
    pub noisy: bool,
}

impl Line {
    pub fn new(name: &str, color: RGBColor, points: Vec<Point>) -> Self {
        Self { name: name.to_string(), color, points, noisy: false }
    }

    pub fn noisy(self) -> Self {
        Self { noisy: true, ..self }
    }

    fn is_drawable(&self) -> bool {
        pieces(&self.points).next().is_some()
    }
}

/// Lines over whole numbers, the first one on top; those without a point are left out.
pub fn lines(axes: &Axes, lines: &[Line]) -> Result<Option<String>> {
    let drawn: Vec<&Line> = lines.iter().filter(|line| line.is_drawable()).collect();
    let points = || {
        let points = drawn.iter().flat_map(|line| &line.points);
        points.filter(|p| is_drawable(p.0) && is_drawable(p.1))
    };
    let (Some(xs), Some(ys)) = (
        extent(points().map(|p| p.0)),
        extent(points().map(|p| p.1).chain(axes.include.iter().copied())),
    ) else {
        return Ok(None);
    };
    let xs = if xs.0 < xs.1 { xs } else { (xs.0 - 0.5, xs.1 + 0.5) };
    let x = Scale::new(xs, if axes.wide { 12 } else { 6 }, true);
    let y = Scale::new(padded(ys), 6, false);
    let legend: Vec<_> = drawn.iter().map(|l| (l.name.as_str(), l.color)).collect();
    let svg = draw(axes, &legend, |area| {
        let mut chart = mesh(area, axes, &x, &y, &|v| x.label(v), true)?;
        // Pale series lie below all averages.
        let mut averages = Vec::new();
        for line in drawn.iter().rev() {
            let average = line.noisy.then(|| smoothed(&line.points)).flatten();
            let (style, width) = match average {
                Some(_) => (line.color.mix(0.22), 2),
                None => (line.color.mix(1.0), 4),
            };
            let points = thinned(&line.points);
            for piece in pieces(&points) {
                chart.draw_series(LineSeries::new(
                    piece.iter().copied(),
                    style.stroke_width(width),
                ))?;
            }
            // Few points are marked each, many only where a line would have no length.
            let marked = pieces(&points).filter(|piece| points.len() <= 40 || piece.len() == 1);
            let dot = |p: &Point| Circle::new(*p, 7, style.filled());
            chart.draw_series(marked.flatten().map(dot))?;
            averages.extend(average.map(|points| (line.color, points)));
        }
        for (color, points) in &averages {
            for piece in pieces(points) {
                chart.draw_series(LineSeries::new(piece.iter().copied(), color.stroke_width(4)))?;
            }
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

/// A value for each group; `None` or a value that is not finite leaves its bar out.
#[derive(Clone, Debug)]
pub struct Bars {
    pub name: String,
    pub color: RGBColor,
    pub values: Vec<Option<f64>>,
}

/// Bars from zero, side by side in each group, with their value.
pub fn bars(axes: &Axes, groups: &[&str], series: &[Bars]) -> Result<Option<String>> {
    let value = |bars: &Bars, group: usize| {
        let value = bars.values.get(group).copied().flatten();
        value.filter(|v| is_drawable(*v))
    };
    let cell = |bars| (0..groups.len()).filter_map(move |g| value(bars, g));
    let drawn: Vec<&Bars> = series.iter().filter(|b| cell(b).next().is_some()).collect();
    let values = drawn.iter().flat_map(|b| cell(b));
    if drawn.is_empty() {
        return Ok(None);
    }
    let ends = values.chain(axes.include.iter().copied()).chain([0.0]);
    let Some((low, high)) = extent(ends) else {
        return Ok(None);
    };
    let air = 0.09 * (high - low).max(1e-6);
    // Shares and scores need more digits than percentages.
    let digits = if high.max(-low) <= 2.0 { 2 } else { 1 };
    let low = if low < 0.0 { low - air } else { low };
    let y = Scale::new((low, high + air), 6, false);
    let legend: Vec<_> = drawn.iter().map(|b| (b.name.as_str(), b.color)).collect();
    let width = 0.76 / drawn.len() as f64;
    // Wide enough for a number of four digits.
    let numbered = f64::from(axes.width()) * width / groups.len() as f64 > 76.0;
    let svg = draw(axes, &legend, |area| {
        let mut chart = grouped(area, axes, groups, &y)?;
        for (i, bars) in drawn.iter().enumerate() {
            for group in 0..groups.len() {
                let Some(value) = value(bars, group) else {
                    continue;
                };
                let left = group as f64 - 0.38 + i as f64 * width;
                // A hair between neighbors.
                let corners = [(left + 0.04 * width, 0.0), (left + 0.96 * width, value)];
                chart.draw_series([Rectangle::new(corners, bars.color.filled())])?;
                if numbered {
                    let above = if value < 0.0 { VPos::Top } else { VPos::Bottom };
                    let style = text(FONT * 0.88, INK).pos(Pos::new(HPos::Center, above));
                    let middle = (left + width / 2.0, value);
                    chart.draw_series([Text::new(format!("{value:.digits$}"), middle, style)])?;
                }
            }
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

/// A mean with its interval.
#[derive(Clone, Debug, Default)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// The values behind it (one for each seed, say), drawn pale beside it; may be empty.
    pub samples: Vec<f64>,
}

/// An interval for each group.
#[derive(Clone, Debug)]
pub struct Intervals {
    pub name: String,
    pub color: RGBColor,
    pub values: Vec<Option<Interval>>,
}

/// Means as dots with their intervals as whiskers, series side by side in each group.
///
/// Nothing grows from zero here, so the vertical axis shows what there is; `axes.include` adds to it. A whisker with an
/// end that is not finite is left out and its dot stays.
pub fn interval_chart(
    axes: &Axes,
    groups: &[&str],
    series: &[Intervals],
) -> Result<Option<String>> {
    let shown = |s: &Intervals| {
        let values = s.values.iter().take(groups.len()).flatten();
        values.clone().any(|v| is_drawable(v.mean))
    };
    let drawn: Vec<&Intervals> = series.iter().filter(|s| shown(s)).collect();
    let values = drawn.iter().flat_map(|s| s.values.iter().take(groups.len()).flatten());
    let ends = values.flat_map(|v| [v.mean, v.low, v.high].into_iter().chain(v.samples.clone()));
    let ends = ends.chain(axes.include.iter().copied()).chain(axes.reference);
    let (false, Some(range)) = (drawn.is_empty(), extent(ends)) else {
        return Ok(None);
    };
    let y = Scale::new(padded(range), 6, false);
    let legend: Vec<_> = drawn.iter().map(|s| (s.name.as_str(), s.color)).collect();
    let width = (0.7 / drawn.len() as f64).min(0.24);
    let svg = draw(axes, &legend, |area| {
        let mut chart = grouped(area, axes, groups, &y)?;
        for (i, series) in drawn.iter().enumerate() {
            let offset = (i as f64 - (drawn.len() - 1) as f64 / 2.0) * width;
            for (group, value) in series.values.iter().take(groups.len()).enumerate() {
                let Some(value) = value else { continue };
                let x = group as f64 + offset;
                let samples = value.samples.iter().filter(|v| is_drawable(**v));
                let pale = series.color.mix(0.35).filled();
                let dot = |v: &f64| Circle::new((x + 0.26 * width, *v), 6, pale);
                chart.draw_series(samples.map(dot))?;
                let style = series.color.stroke_width(4);
                if is_drawable(value.low) && is_drawable(value.high) {
                    let cap = 0.12 * width;
                    let ends = [value.low, value.high];
                    let whisker = PathElement::new(ends.map(|v| (x, v)).to_vec(), style);
                    let caps =
                        ends.map(|v| PathElement::new(vec![(x - cap, v), (x + cap, v)], style));
                    chart.draw_series([whisker].into_iter().chain(caps))?;
                }
                if is_drawable(value.mean) {
                    let dot = Circle::new((x, value.mean), 11, series.color.filled());
                    chart.draw_series([dot])?;
                }
            }
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Scale, Scale>>;

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        start + (share * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.weight().allow_light_points() {
            true => Vec::new(),
            false => self.ticks.clone(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

impl Axes<'_> {
    fn width(&self) -> u32 {
        if self.wide { PAGE } else { COLUMN }
    }
}

fn text(size: f64, color: RGBColor) -> TextStyle<'static> {
    // The backend divides by this factor, so that a size is the height of a line.
    TextStyle { color: color.to_backend_color(), ..("sans-serif", size * 1.24).into_font().into() }
}

/// An SVG with the legend in rows of its own above what `plot` draws; one series needs no legend.
fn draw(
    axes: &Axes,
    legend: &[(&str, RGBColor)],
    plot: impl FnOnce(&Area) -> Result<()>,
) -> Result<String> {
    let places = match legend.len() {
        0 | 1 => Vec::new(),
        _ => legend_places(legend, axes.width() as i32 - 40),
    };
    let rows = places.last().map_or(0, |(_, row)| row + 1);
    let above = rows * LEGEND_ROW + 8 * i32::from(rows > 0);
    let mut svg = String::new();
    {
        let size = (axes.width(), HEIGHT + above as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let (top, below) = area.split_vertically(above);
        for ((name, color), (x, row)) in legend.iter().zip(&places) {
            let y = row * LEGEND_ROW + LEGEND_ROW / 2;
            let line = vec![(*x, y), (x + SWATCH, y)];
            top.draw(&PathElement::new(line, color.stroke_width(8)))?;
            let style = text(FONT, INK).pos(Pos::new(HPos::Left, VPos::Center));
            top.draw(&Text::new(name.to_string(), (x + SWATCH + 12, y), style))?;
        }
        plot(&below)?;
        area.present()?;
    }
    Ok(svg)
}

/// Where the entries stand: left end and row.
fn legend_places(legend: &[(&str, RGBColor)], width: i32) -> Vec<(i32, i32)> {
    let (mut x, mut row) = (20, 0);
    let mut places = Vec::with_capacity(legend.len());
    for (name, _) in legend {
        // Letters of the widest of the fonts in use are 0.6 of their size on average.
        let letters = (0.6 * FONT * name.chars().count() as f64) as i32;
        let entry = SWATCH + 12 + letters + 30;
        if x > 20 && x + entry > width {
            (x, row) = (20, row + 1);
        }
        places.push((x, row));
        x += entry;
    }
    places
}

/// Axes, grid lines and the reference; `columns`: grid lines at the ticks of the horizontal axis.
fn mesh<'a, 'b>(
    area: &'a Area<'b>,
    axes: &Axes,
    x: &Scale,
    y: &Scale,
    x_label: &dyn Fn(f64) -> String,
    columns: bool,
) -> Result<Chart<'a, 'b>> {
    let widest = y.ticks.iter().map(|v| y.label(*v).chars().count()).max();
    let numbers = 0.62 * FONT * widest.unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(18)
        .margin_right(56)
        .margin_bottom(6)
        .margin_left(8)
        .set_label_area_size(LabelAreaPosition::Left, numbers as i32 + 66)
        .set_label_area_size(LabelAreaPosition::Bottom, 96)
        .build_cartesian_2d(x.clone(), y.clone())?;
    let (format_x, format_y) = (|v: &f64| x_label(*v), |v: &f64| y.label(*v));
    let mut mesh = chart.configure_mesh();
    if !columns {
        mesh.disable_x_mesh();
    }
    mesh.bold_line_style(GRID.stroke_width(2))
        .light_line_style(TRANSPARENT)
        .axis_style(GREY.stroke_width(2))
        .label_style(text(FONT, SOFT))
        .axis_desc_style(text(FONT, INK))
        .x_label_formatter(&format_x)
        .y_label_formatter(&format_y)
        .x_desc(axes.x)
        .y_desc(axes.y)
        .set_all_tick_mark_size(8)
        .draw()?;
    if let Some(at) = axes.reference.filter(|v| (y.low..=y.high).contains(v)) {
        let across = vec![(x.low, at), (x.high, at)];
        chart.draw_series([PathElement::new(across, GREY.stroke_width(3))])?;
    }
    Ok(chart)
}

/// A mesh whose horizontal axis names groups.
fn grouped<'a, 'b>(
    area: &'a Area<'b>,
    axes: &Axes,
    groups: &[&str],
    y: &Scale,
) -> Result<Chart<'a, 'b>> {
    let mut x = Scale::new((-0.5, groups.len() as f64 - 0.5), 1, true);
    x.ticks = (0..groups.len()).map(|i| i as f64).collect();
    let name = |v: f64| groups.get(v as usize).unwrap_or(&"").to_string();
    mesh(area, axes, &x, y, &name, false)
}
