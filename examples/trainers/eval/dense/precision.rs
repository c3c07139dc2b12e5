//! Average precision at an overlap of a half, over all points of the curve of precision and recall.

use super::boxes::{Box, Detection};

/// The overlap from which a detection finds a box.
pub const OVERLAP: f64 = 0.5;

/// A box to find.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truth {
    pub canvas: usize,
    pub class: u32,
    pub at: Box,
    /// Need not be found, and a detection of it counts neither as right nor as wrong.
    pub difficult: bool,
}

/// How the boxes of one class are found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Average precision, from 0 to 1.
    pub precision: f64,
    /// Intersection over union of each box that was found with its detection.
    pub overlaps: Vec<f64>,
    /// The boxes to find: those that are not difficult.
    pub wanted: usize,
}

/// Judges the detections of `class`; `None` if there is no box to find. As in Pascal VOC, a detection is compared with the box
/// that it overlaps most. Each box is found once, and a second detection of it is wrong.
pub fn judge(detections: &[Detection], truth: &[Truth], class: u32) -> Option<Found> {
    let truth: Vec<&Truth> = truth.iter().filter(|t| t.class == class).collect();
    let wanted = truth.iter().filter(|t| !t.difficult).count();
    if wanted == 0 {
        return None;
    }
    let mut detections: Vec<&Detection> = detections.iter().filter(|d| d.class == class).collect();
    // Stable: equals keep their order.
    detections.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut found = vec![false; truth.len()];
    let (mut hits, mut overlaps) = (Vec::with_capacity(detections.len()), Vec::new());
    for detection in detections {
        let shown = truth.iter().enumerate().filter(|(_, t)| t.canvas == detection.canvas);
        let best = shown
            .map(|(i, t)| (i, t.at.iou(&detection.at)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .filter(|(_, overlap)| *overlap >= OVERLAP);
        match best {
            Some((i, _)) if truth[i].difficult => {}
            Some((i, overlap)) if !found[i] => {
                found[i] = true;
                overlaps.push(overlap);
                hits.push(true);
            }
            _ => hits.push(false),
        }
    }
    // From the last detection back: precision there or beyond, and the recall that each hit adds.
    let mut right = overlaps.len();
    let (mut area, mut precision) = (0.0, 0f64);
    for (i, hit) in hits.iter().enumerate().rev() {
        precision = precision.max(right as f64 / (i + 1) as f64);
        if *hit {
            area += precision / wanted as f64;
            right -= 1;
        }
    }
    Some(Found { precision: area, overlaps, wanted })
}

/// Average precision, the mean over the classes of which there is a box to find.
pub fn mean(detections: &[Detection], truth: &[Truth]) -> f64 {
    let mut classes: Vec<u32> = truth.iter().map(|t| t.class).collect();
    classes.sort_unstable();
    classes.dedup();
    let found: Vec<Found> =
        classes.into_iter().filter_map(|class| judge(detections, truth, class)).collect();
    found.iter().map(|f| f.precision).sum::<f64>() / found.len().max(1) as f64
}
