//! One annotation file: the XML of Pascal VOC.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use roxmltree::{Document, Node};

/// What a file says, unchecked against its image.
#[derive(Clone, Debug, PartialEq)]
pub struct Annotation {
    /// Width and height in pixels; `None` if the file does not say them.
    pub size: Option<(u32, u32)>,
    pub objects: Vec<Object>,
}

/// A named box.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    pub name: String,
    /// `xmin`, `ymin`, `xmax`, `ymax`: the first and the last pixel, counted from 1.
    pub corners: [f64; 4],
    pub difficult: bool,
    pub truncated: bool,
}

/// Reads a file.
///
/// # Errors
/// If it is no UTF-8, no XML, or no annotation, or if an object lacks its name or its corners.
pub fn read(path: &Path) -> Result<Annotation> {
    let bytes = fs::read(path).context("cannot read the annotation")?;
    let text = std::str::from_utf8(&bytes).context("expected an annotation in UTF-8")?;
    parse(text)
}

/// Reads the text of a file.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str) -> Result<Annotation> {
    let document = Document::parse(text).context("expected an annotation in XML")?;
    let root = document.root_element();
    ensure!(
        root.has_tag_name("annotation"),
        "expected an XML file whose root is <annotation>, got <{}>",
        root.tag_name().name()
    );
    let size = match child(root, "size") {
        Some(size) => Some((pixels(size, "width")?, pixels(size, "height")?)),
        None => None,
    };
    let objects = root.children().filter(|n| n.has_tag_name("object")).enumerate();
    let object = |(i, node)| object(node).with_context(|| format!("object {}", i + 1));
    Ok(Annotation { size, objects: objects.map(object).collect::<Result<_>>()? })
}

fn object(node: Node) -> Result<Object> {
    let name = text(node, "name")?.to_string();
    ensure!(!name.is_empty(), "expected a class in <name>, got none");
    let corners = child(node, "bndbox").context("expected <bndbox>, got none")?;
    let corner = |tag| number(corners, tag);
    Ok(Object {
        name,
        corners: [corner("xmin")?, corner("ymin")?, corner("xmax")?, corner("ymax")?],
        difficult: flag(node, "difficult")?,
        truncated: flag(node, "truncated")?,
    })
}

/// The first direct child: parts of an object have names and boxes of their own.
fn child<'a>(node: Node<'a, 'a>, tag: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|n| n.has_tag_name(tag))
}

fn text<'a>(node: Node<'a, 'a>, tag: &str) -> Result<&'a str> {
    let child = child(node, tag).with_context(|| format!("expected <{tag}>, got none"))?;
    Ok(child.text().unwrap_or_default().trim())
}

fn number(node: Node, tag: &str) -> Result<f64> {
    let text = text(node, tag)?;
    let number = text.parse().ok().filter(|n: &f64| n.is_finite());
    number.with_context(|| format!("expected a number in <{tag}>, got {text:?}"))
}

fn pixels(node: Node, tag: &str) -> Result<u32> {
    let text = text(node, tag)?;
    text.parse().with_context(|| format!("expected a number of pixels in <{tag}>, got {text:?}"))
}

/// A mark that may be left out.
fn flag(node: Node, tag: &str) -> Result<bool> {
    let text = child(node, tag).and_then(|n| n.text()).unwrap_or_default().trim();
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" => Ok(true),
        "0" | "false" | "" | "unspecified" => Ok(false),
        _ => bail!("expected 0 or 1 in <{tag}>, got {text:?}"),
    }
}
