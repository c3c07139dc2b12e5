//! Points of a line: gaps, the mean of a noisy series, and fewer points where a screen could not show them.

use super::scale::is_drawable;

/// A point; a value that is not a number is a gap.
pub type Point = (f64, f64);

/// Points of a line, at most.
pub const LIMIT: usize = 2000;
/// A series of fewer points is not smoothed.
const FEW: usize = 50;

/// The same curve with at most [`LIMIT`] points: of each stretch the least and the largest value.
pub fn thinned(points: &[Point]) -> Vec<Point> {
    if points.len() <= LIMIT {
        return points.to_vec();
    }
    let mut out = Vec::with_capacity(LIMIT);
    for stretch in points.chunks(points.len().div_ceil(LIMIT / 2)) {
        let drawable = || stretch.iter().filter(|p| is_drawable(p.1));
        let least = drawable().min_by(|a, b| a.1.total_cmp(&b.1));
        let largest = drawable().max_by(|a, b| a.1.total_cmp(&b.1));
        match (least, largest) {
            (Some(a), Some(b)) if a.0 < b.0 => out.extend([*a, *b]),
            (Some(a), Some(b)) if a.0 > b.0 => out.extend([*b, *a]),
            (Some(a), _) => out.push(*a),
            _ => out.push((stretch[0].0, f64::NAN)),
        }
    }
    out
}

/// The mean over a window of a fiftieth of the series, centered so that it does not lag; `None` if there are too few
/// points for one. Gaps stay gaps and do not count in the means beside them.
pub fn smoothed(points: &[Point]) -> Option<Vec<Point>> {
    if points.len() < FEW {
        return None;
    }
    let reach = (points.len() / 100).max(2);
    let stretch = points.len().div_ceil(LIMIT / 2);
    let mean = |start: usize| {
        let end = (start + stretch).min(points.len());
        let middle = (start + end - 1) / 2;
        if !points[start..end].iter().any(|p| is_drawable(p.1)) {
            return (points[middle].0, f64::NAN);
        }
        // The window holds the stretch, so it has a value to take the mean of.
        let window = &points[middle.saturating_sub(reach)..points.len().min(middle + reach + 1)];
        let (mut sum, mut count) = (0.0, 0.0);
        for (_, value) in window.iter().filter(|p| is_drawable(p.1)) {
            sum += value;
            count += 1.0;
        }
        (points[middle].0, sum / count)
    };
    Some((0..points.len()).step_by(stretch).map(mean).collect())
}

/// The pieces between gaps.
pub fn pieces(points: &[Point]) -> impl Iterator<Item = &[Point]> {
    points.split(|p| !(is_drawable(p.0) && is_drawable(p.1))).filter(|piece| !piece.is_empty())
}
