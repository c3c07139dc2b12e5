//! An HTML page that needs nothing but itself: no script, no network.

use std::fmt::Write;

use plotters::style::RGBColor;

/// The text as it may stand in an element or an attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML has no way to write the other control characters.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A plot with its title and how to read it.
pub struct Figure<'a> {
    pub title: &'a str,
    pub caption: &'a str,
    /// What [`super::plots`] drew; `None` leaves the figure out.
    pub svg: Option<String>,
    /// Takes the width of the page instead of a column.
    pub wide: bool,
}

/// A page that is built from top to bottom. Every text is escaped.
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    pub fn new(title: &str, lead: &str) -> Self {
        let mut body = format!("<header>\n<h1>{}</h1>\n", escape(title));
        body += &paragraph("lead", lead);
        body.push_str("</header>\n");
        Self { title: escape(title), body }
    }

    /// A heading, and a sentence or two below it.
    pub fn section(&mut self, heading: &str, text: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(heading));
        self.body += &paragraph("lead", text);
    }

    /// Figures side by side where the page is wide enough; those without a plot are left out.
    pub fn figures(&mut self, figures: &[Figure]) {
        let drawn = figures.iter().filter_map(|figure| Some((figure, figure.svg.as_deref()?)));
        let cards: String = drawn.map(|(figure, svg)| figure.card(svg)).collect();
        if !cards.is_empty() {
            let _ = writeln!(self.body, "<div class=\"grid\">\n{cards}</div>");
        }
    }

    /// Tables side by side where the page is wide enough, each with a title; those without a row are left out.
    pub fn tables(&mut self, tables: &[Table]) {
        let cards: String = tables.iter().map(Table::card).collect();
        if !cards.is_empty() {
            let _ = writeln!(self.body, "<div class=\"grid\">\n{cards}</div>");
        }
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        self.body += &paragraph("lead", text);
    }

    /// What a reader must know, a paragraph each; nothing if there are none.
    pub fn notes(&mut self, notes: &[String]) {
        for note in notes {
            self.body += &paragraph("note", note);
        }
    }

    /// Names with the colors that stand for them on the whole page.
    pub fn legend(&mut self, names: &[(&str, RGBColor)]) {
        let entry = |(name, RGBColor(r, g, b)): &(&str, RGBColor)| {
            let style = format!("background: rgb({r}, {g}, {b})");
            format!("<span><i style=\"{style}\"></i>{}</span>\n", escape(name))
        };
        let entries: String = names.iter().map(entry).collect();
        let _ = writeln!(self.body, "<p class=\"legend\">\n{entries}</p>");
    }

    /// Markup from this folder, as it is.
    pub(super) fn markup(&mut self, html: &str) {
        self.body += html;
    }

    pub fn html(self) -> String {
        let Self { title, body } = self;
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n<style>\n{STYLE}</style>\n\
             </head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
        )
    }
}

impl Figure<'_> {
    fn card(&self, svg: &str) -> String {
        let class = if self.wide { "card wide" } else { "card" };
        let title = escape(self.title);
        let labelled = format!("<svg role=\"img\" aria-label=\"{title}\" ");
        let svg = svg.trim_end().replacen("<svg ", &labelled, 1);
        let caption = paragraph("caption", self.caption);
        format!(
            "<section class=\"{class}\">\n<h3>{title}</h3>\n<div class=\"plot\">\n{svg}\n</div>\n{caption}</section>\n"
        )
    }
}

/// Rows below a header, which may be empty; the first cell of a row names it.
pub struct Table<'a> {
    pub title: &'a str,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table<'_> {
    /// The table for a terminal: the first column is aligned left, the others right.
    pub fn text(&self) -> String {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = lines().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = format!("{}\n\n", self.title);
        for line in lines().filter(|line| !line.is_empty()) {
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                text += &match column {
                    0 => format!("{cell:<width$}"),
                    _ => format!("  {cell:>width$}"),
                };
            }
            text.push('\n');
        }
        text
    }

    fn card(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let row = |cells: &[String], tag: &str| -> String {
            let cells = cells.iter().enumerate().map(|(i, cell)| {
                let tag = if i == 0 { "th" } else { tag };
                format!("<{tag}>{}</{tag}>", escape(cell))
            });
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        let head = match self.header.is_empty() {
            true => String::new(),
            false => format!("<thead>\n{}</thead>\n", row(&self.header, "th")),
        };
        let rows: String = self.rows.iter().map(|cells| row(cells, "td")).collect();
        // More than a name and a value is a table of figures, and takes the width of the page.
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let class = if columns > 2 { "card wide" } else { "card" };
        format!(
            "<section class=\"{class}\">\n<h3>{}</h3>\n<div class=\"scroll\">\n<table>\n{head}<tbody>\n{rows}</tbody>\n\
             </table>\n</div>\n</section>\n",
            escape(self.title)
        )
    }
}

fn paragraph(class: &str, text: &str) -> String {
    match text.is_empty() {
        true => String::new(),
        false => format!("<p class=\"{class}\">{}</p>\n", escape(text)),
    }
}

const STYLE: &str = "\
:root { --ink: #1f2937; --soft: #566070; --line: #e3e7ec; --accent: #2563af; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 28px 20px 56px; }
header { border-bottom: 3px solid var(--accent); padding-bottom: 14px; margin-bottom: 22px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 38px 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 8px; font-weight: 650; }
.lead { color: var(--soft); margin: 6px 0 14px; max-width: 110ch; }
.note { background: #fff7e6; border: 1px solid #f0d9a8; border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 10px 0 16px; font-weight: 600; }
.legend i { display: inline-block; width: 22px; height: 8px; border-radius: 4px; margin-right: 8px; vertical-align: 2px; }
.caption { color: var(--soft); font-size: 13px; margin: 8px 0 0; max-width: 145ch; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.grid + .grid { margin-top: 16px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.plot, .scroll { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; min-width: 430px; }
.wide .plot svg { min-width: 760px; }
.plot text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif;
  font-variant-numeric: tabular-nums; }
.plot polyline { stroke-linejoin: round; stroke-linecap: round; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > th, tr:last-child > td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.panel { min-width: 720px; max-width: 1000px; margin: 0 auto; table-layout: fixed; }
.panel th, .panel td { border: 0; padding: 3px 4px; text-align: center; vertical-align: middle; }
.panel th:first-child { text-align: left; width: 104px; white-space: normal; overflow-wrap: anywhere;
  line-height: 1.25; font-size: 13px; }
.panel thead th { padding-bottom: 6px; }
.panel th:nth-child(2), .panel td:nth-child(2) { background: #eef3f9; }
.panel tbody tr:first-child > * { padding-top: 14px; border-top: 1px solid var(--line); }
.panel tbody tr:last-child > * { padding-bottom: 12px; }
.panel img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 3px; }
.panel small { display: block; color: var(--soft); font-size: 12px; line-height: 1.3; padding-top: 2px; }
@media print {
  body { background: #fff; }
  .card { break-inside: avoid; }
}
";
