//! Mutual nearest neighbors.

/// A token of the first pose, and one of the second.
pub type Match = (usize, usize);

/// The pairs that are each other's nearest by `cosines`, a row for each of `count` tokens of the first pose. Of equals the first
/// is nearest.
pub fn mutual(cosines: &[f32], count: usize) -> Vec<Match> {
    let others = cosines.len() / count.max(1);
    let at = |i: usize, j: usize| cosines[i * others + j];
    let forward: Vec<usize> =
        (0..count).map(|i| first_largest((0..others).map(|j| at(i, j)))).collect();
    let back: Vec<usize> =
        (0..others).map(|j| first_largest((0..count).map(|i| at(i, j)))).collect();
    forward.into_iter().enumerate().filter(|&(i, j)| back[j] == i).collect()
}

fn first_largest(values: impl Iterator<Item = f32>) -> usize {
    let best = (0, f32::NEG_INFINITY);
    let larger = |a: (usize, f32), b: (usize, f32)| if b.1 > a.1 { b } else { a };
    values.enumerate().fold(best, larger).0
}
