//! Some images of a set, drawn at random in the proportions of its classes.
//!
//! The first images of an ordered set would be of one class, and images at even distances follow any period of its order.

use std::collections::BTreeMap;

use rand::{SeedableRng, rngs::StdRng, seq::index};

/// Draws `count` of the indices of `labels`, in increasing order; all of them if `count` is not smaller.
///
/// Each class gets its share by the method of largest remainders. If `count` is at least the number of classes, each class
/// gets at least one.
pub fn by_class(labels: &[u32], count: usize, seed: u64) -> Vec<usize> {
    if count >= labels.len() {
        return (0..labels.len()).collect();
    }
    let mut classes: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, &label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(i);
    }
    let classes: Vec<Vec<usize>> = classes.into_values().collect();
    let sizes: Vec<usize> = classes.iter().map(Vec::len).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut drawn: Vec<usize> = Vec::with_capacity(count);
    for (members, share) in classes.iter().zip(shares(&sizes, count)) {
        drawn.extend(index::sample(&mut rng, members.len(), share).iter().map(|i| members[i]));
    }
    drawn.sort_unstable();
    drawn
}

/// How many of each class: `count` in all, fewer than there are.
fn shares(sizes: &[usize], count: usize) -> Vec<usize> {
    let total: usize = sizes.iter().sum();
    let exact = |size: usize| size as u128 * count as u128;
    let mut shares: Vec<usize> =
        sizes.iter().map(|&size| (exact(size) / total as u128) as usize).collect();
    // The largest remainder first, and of equals the first class.
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&class| std::cmp::Reverse(exact(sizes[class]) % total as u128));
    let missing = count - shares.iter().sum::<usize>();
    order.into_iter().take(missing).for_each(|class| shares[class] += 1);
    if count >= sizes.len() {
        while let Some(empty) = shares.iter().position(|&share| share == 0) {
            // The largest share gives one. It is above 1, since the others sum to `count`.
            let largest =
                (0..shares.len()).rev().max_by_key(|&class| shares[class]).unwrap_or(empty);
            shares[largest] -= 1;
            shares[empty] += 1;
        }
    }
    shares
}
