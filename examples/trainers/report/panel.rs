//! Images in eight rotations and flips with their token maps in colors, as they are and mapped back upright.

use std::io::Cursor;

use anyhow::{Context, Result, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use candle_core::{DType, Device, Tensor};
use image::{ImageFormat, Rgb, RgbImage};
use nalgebra::{DMatrix, SymmetricEigen};
use ser_reg::{GridOperator, GroupAction, Layout, Resample, TokenGrid, tap};

use super::{
    super::{data::Images, eval::POSES, vit::Vit},
    page::{Page, escape},
};

/// What each color shows: a principal component.
const COMPONENTS: usize = 3;
/// Sweeps of the eigenvalue iteration; it takes a handful.
const SWEEPS: usize = 10_000;

/// Token maps of some images under the eight rotations and flips.
pub struct Panel {
    /// The block whose output is shown, counted from 1.
    pub layer: usize,
    /// Share of the tokens' variance that the colors show.
    pub explained: f64,
    pub rows: Vec<Row>,
}

/// One image; every list has an entry for each of [`POSES`], every entry is a PNG file.
pub struct Row {
    pub image: Vec<Vec<u8>>,
    /// The token map as it comes.
    pub seen: Vec<Vec<u8>>,
    /// The token map in the upright frame: the inverse transform is applied to it.
    pub aligned: Vec<Vec<u8>>,
    /// Mean cosine of the aligned tokens with the upright tokens, each less their mean token; `None` where it has no value.
    pub cosine: Vec<Option<f64>>,
}

impl Panel {
    /// The maps of block `layer` for the images `indices`, colored by one basis for all of them.
    pub fn new(
        vit: &Vit,
        images: &Images,
        indices: &[usize],
        statistics: &[(f32, f32)],
        layer: usize,
        device: &Device,
    ) -> Result<Self> {
        let config = vit.config();
        ensure!(!indices.is_empty(), "expected an image to show, got none");
        if let Some(index) = indices.iter().find(|i| **i >= images.len()) {
            anyhow::bail!("expected images below {}, got {index}", images.len());
        }
        ensure!(
            (1..=config.depth).contains(&layer),
            "expected one of the {} blocks, got block {layer}",
            config.depth
        );
        ensure!(
            (images.channels, images.side) == (config.channels, config.side),
            "expected images of (channels, side) {:?}, as the encoder takes them, got {:?}",
            (config.channels, config.side),
            (images.channels, images.side)
        );
        let (pixels, grid) = (TokenGrid::square(images.side)?, TokenGrid::square(config.grid())?);
        let layout = Layout { prefix: config.prefix(layer), ..Default::default() };
        let normalized = indices
            .iter()
            .map(|&i| images.normalized(i..i + 1, statistics, device))
            .collect::<Result<Vec<_>>>()?;
        let normalized = Tensor::cat(&normalized, 0)?;
        let bytes: Vec<u8> = indices.iter().flat_map(|&i| images.get(i).to_vec()).collect();
        let shape = (indices.len(), images.channels, images.side, images.side);
        let raw = Tensor::from_vec(bytes, shape, &Device::Cpu)?;

        let (mut shown, mut seen, mut aligned) = (Vec::new(), Vec::new(), Vec::new());
        for (_, transform) in POSES {
            let turn = GridOperator::new(&[transform], pixels, &Resample::default())?;
            let moved = turn.apply(&normalized)?;
            let (_, map) = tap::capture(&format!("block{layer}"), || vit.forward(&moved))?;
            let map = layout.tokens(&map, grid).with_context(|| {
                format!("block {layer} keeps no map of its tokens (is it the last one?)")
            })?;
            let back = GridOperator::new(&[transform.inverse()], grid, &Resample::default())?;
            aligned.push(Maps::new(&back.apply(&map)?)?);
            seen.push(Maps::new(&map)?);
            let planes = turn.apply(&raw)?.flatten_all()?.to_vec1::<u8>()?;
            shown.push(planes);
        }
        let colors = Colors::fit(&seen)?;
        let means: Vec<Vec<f64>> = aligned.iter().map(Maps::mean).collect();
        let row = |i: usize| -> Result<Row> {
            let image = shown.iter().map(|planes| {
                let planes = &planes[i * images.stride()..(i + 1) * images.stride()];
                png(&rgb(planes, images.channels, images.side))
            });
            let paint = |maps: &Vec<Maps>| -> Result<Vec<_>> {
                let map = |maps: &Maps| png(&colors.paint(maps.get(i), config.grid()));
                maps.iter().map(map).collect()
            };
            let upright = (aligned[0].get(i), means[0].as_slice());
            let each = aligned.iter().zip(&means);
            let cosine = each.map(|(maps, mean)| cosine(upright, (maps.get(i), mean)));
            Ok(Row {
                image: image.collect::<Result<_>>()?,
                seen: paint(&seen)?,
                aligned: paint(&aligned)?,
                cosine: cosine.collect(),
            })
        };
        Ok(Self {
            layer,
            explained: colors.explained,
            rows: (0..indices.len()).map(row).collect::<Result<_>>()?,
        })
    }
}

/// Adds the panels of some runs to a page, under one heading. Of one run the name is not shown.
pub fn write(panels: &[(&str, &Panel)], page: &mut Page) {
    page.section("Token maps of rotated and flipped images", &caption(panels));
    page.markup("<section class=\"card\">\n");
    page.markup(&html(panels));
    page.markup("</section>\n");
}

/// How to read the panels.
fn caption(panels: &[(&str, &Panel)]) -> String {
    let each = |(name, panel): &(&str, &Panel)| {
        let of = if panels.len() > 1 { format!("{name}: ") } else { String::new() };
        let share = 100.0 * panel.explained;
        format!("{of}block {}, {share:.0} % of the variance", panel.layer)
    };
    let shown: Vec<String> = panels.iter().map(each).collect();
    let basis = match panels.len() {
        1 => "They are fitted once to all tokens shown.",
        _ => "They are fitted for each run by itself, so colors do not compare between runs.",
    };
    format!(
        "Red, green and blue show the first three principal components of the tokens ({}). {basis} Tokens of like colors \
         are alike. The map of an equivariant encoder rotates and flips with its image. The inverse transform maps it back \
         to the upright map in the shaded column. The number below is the mean cosine with the upright tokens, each less \
         their mean token; 1 is exact.",
        shown.join("; ")
    )
}

/// A table: transforms across; image, map and map taken back down.
fn html(panels: &[(&str, &Panel)]) -> String {
    let names = POSES.map(|(name, _)| format!("<th>{}</th>", escape(name)));
    let mut html = format!(
        "<div class=\"scroll\">\n<table class=\"panel\">\n<thead>\n<tr><th></th>{}</tr>\n</thead>\n",
        names.concat()
    );
    let count = panels.iter().map(|(_, panel)| panel.rows.len()).max();
    for i in 0..count.unwrap_or(0) {
        html += "<tbody>\n";
        let mut shown: Option<&Row> = None;
        for (name, panel) in panels {
            let Some(row) = panel.rows.get(i) else {
                continue;
            };
            // Runs on the same images show each image once.
            if shown.is_none_or(|shown| shown.image != row.image) {
                html += &line("image", i, &row.image, None);
            }
            shown = Some(row);
            let name = if panels.len() > 1 { format!("{name}, ") } else { String::new() };
            html += &line(&format!("{name}tokens"), i, &row.seen, None);
            html += &line(&format!("{name}mapped back"), i, &row.aligned, Some(&row.cosine));
        }
        html += "</tbody>\n";
    }
    html + "</table>\n</div>\n"
}

/// One PNG file for each transform, and a number below it.
fn line(name: &str, image: usize, files: &[Vec<u8>], cosines: Option<&[Option<f64>]>) -> String {
    let name = escape(name);
    let cell = |(p, png): (usize, &Vec<u8>)| {
        let number = cosines.map_or(String::new(), |cosines| match cosines[p] {
            Some(cosine) => format!("<small>{cosine:.2}</small>"),
            None => "<small>–</small>".to_string(),
        });
        format!(
            "<td><img alt=\"{name}, image {}, {}\" src=\"data:image/png;base64,{}\"/>{number}</td>",
            image + 1,
            POSES[p].0,
            BASE64_STANDARD.encode(png)
        )
    };
    let cells: String = files.iter().enumerate().map(cell).collect();
    format!("<tr><th>{name}</th>{cells}</tr>\n")
}

/// Token maps `(n, tokens, dim)` under one transform.
struct Maps {
    values: Vec<f64>,
    stride: usize,
    dim: usize,
}

impl Maps {
    fn new(maps: &Tensor) -> Result<Self> {
        let (_, tokens, dim) = maps.dims3()?;
        let values = maps.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        ensure!(
            values.iter().all(|v| v.is_finite()),
            "expected finite tokens to show; did the run diverge?"
        );
        Ok(Self { values, stride: tokens * dim, dim })
    }

    fn tokens(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.dim)
    }

    fn get(&self, i: usize) -> &[f64] {
        &self.values[i * self.stride..(i + 1) * self.stride]
    }

    fn mean(&self) -> Vec<f64> {
        mean(self.tokens(), self.dim)
    }
}

fn mean<'a>(tokens: impl Iterator<Item = &'a [f64]>, dim: usize) -> Vec<f64> {
    let (mut sum, mut count) = (vec![0.0; dim], 0.0);
    for token in tokens {
        sum.iter_mut().zip(token).for_each(|(s, v)| *s += v);
        count += 1.0;
    }
    sum.iter().map(|s| s / count).collect()
}

/// Mean cosine of the tokens of two maps, each less its mean token.
fn cosine(a: (&[f64], &[f64]), b: (&[f64], &[f64])) -> Option<f64> {
    let dim = a.1.len();
    let pairs = a.0.chunks_exact(dim).zip(b.0.chunks_exact(dim));
    let (mut sum, mut count) = (0.0, 0.0);
    for (x, y) in pairs {
        let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
        for c in 0..dim {
            let (x, y) = (x[c] - a.1[c], y[c] - b.1[c]);
            (xy, xx, yy) = (xy + x * y, xx + x * x, yy + y * y);
        }
        sum += xy / (xx * yy).sqrt();
        count += 1.0;
    }
    let cosine: f64 = sum / count;
    cosine.is_finite().then_some(cosine)
}

/// From tokens to colors: principal components, each stretched over the range of its values.
struct Colors {
    mean: Vec<f64>,
    axes: Vec<Vec<f64>>,
    /// First and 99th percentile along each axis.
    ranges: Vec<(f64, f64)>,
    explained: f64,
}

impl Colors {
    /// Fits the components to all tokens of all maps.
    fn fit(maps: &[Maps]) -> Result<Self> {
        let dim = maps.first().context("expected maps, got none")?.dim;
        let tokens = || maps.iter().flat_map(Maps::tokens);
        let mean = mean(tokens(), dim);
        let rows: Vec<f64> =
            tokens().flat_map(|token| token.iter().zip(&mean).map(|(v, m)| v - m)).collect();
        let centered = DMatrix::from_row_slice(rows.len() / dim, dim, &rows);
        let covariance = centered.transpose() * &centered / centered.nrows() as f64;
        let total = covariance.trace();
        let eigen = SymmetricEigen::try_new(covariance, f64::EPSILON, SWEEPS)
            .context("the principal components of the tokens did not converge")?;
        let mut order: Vec<usize> = (0..dim).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        order.truncate(COMPONENTS);
        let explained: f64 = order.iter().map(|&k| eigen.eigenvalues[k]).sum();
        let mut colors = Self {
            mean,
            axes: Vec::new(),
            ranges: Vec::new(),
            explained: if total > 0.0 { explained / total } else { 1.0 },
        };
        for k in order {
            let mut axis: Vec<f64> = eigen.eigenvectors.column(k).iter().copied().collect();
            // An eigenvector has no sign of its own: its largest entry is made positive.
            let largest = axis.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
            if largest.is_some_and(|v| v < 0.0) {
                axis.iter_mut().for_each(|v| *v = -*v);
            }
            let mut values: Vec<f64> = tokens().map(|t| colors.project(t, &axis)).collect();
            values.sort_by(f64::total_cmp);
            let last = values.len() - 1;
            colors.ranges.push((values[last / 100], values[last - last / 100]));
            colors.axes.push(axis);
        }
        Ok(colors)
    }

    fn project(&self, token: &[f64], axis: &[f64]) -> f64 {
        let centered = token.iter().zip(&self.mean).map(|(v, m)| v - m);
        centered.zip(axis).map(|(v, a)| v * a).sum()
    }

    fn paint(&self, tokens: &[f64], side: usize) -> RgbImage {
        let dim = self.mean.len();
        RgbImage::from_fn(side as u32, side as u32, |x, y| {
            let token = &tokens[(y as usize * side + x as usize) * dim..][..dim];
            // Fewer channels than colors leave the others gray.
            let mut color = [128; COMPONENTS];
            for (k, (axis, (low, high))) in self.axes.iter().zip(&self.ranges).enumerate() {
                // The first component spans the widest range; what is rounding beside it has no color.
                if high - low > 1e-9 * (self.ranges[0].1 - self.ranges[0].0) {
                    let share = (self.project(token, axis) - low) / (high - low);
                    color[k] = (255.0 * share.clamp(0.0, 1.0)).round() as u8;
                }
            }
            Rgb(color)
        })
    }
}

/// Three planes as RGB; of any other number, the first plane in gray.
fn rgb(planes: &[u8], channels: usize, side: usize) -> RgbImage {
    RgbImage::from_fn(side as u32, side as u32, |x, y| {
        let at = |c: usize| planes[(c * side + y as usize) * side + x as usize];
        match channels {
            3 => Rgb([at(0), at(1), at(2)]),
            _ => Rgb([at(0); 3]),
        }
    })
}

fn png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}
