//! Seeded draws by class: a part of a set that stands for all of it, and the division into training and test images.
//!
//! A draw follows from the labels, the count and the seed alone, so all variants of a run see the same images.

use std::{cmp::Reverse, collections::BTreeMap};

use crate::random::{self, Purpose};

/// Seed of the parts that evaluations and smoke runs look at. It is no setting, so that runs stay comparable.
pub const SEED: u64 = 0;
/// Seed of the division into training and test images.
const SPLIT: u64 = 1;

/// Draws `count` indices, or all when there are fewer, in increasing order. Each class keeps its share, and at least one
/// image where `count` allows it.
pub fn by_class(labels: &[u32], count: usize, seed: u64) -> Vec<usize> {
    let count = count.min(labels.len());
    let classes = members(labels);
    let sizes: Vec<usize> = classes.values().map(Vec::len).collect();
    let shares = shares(&sizes, count, seed);
    chosen(classes.into_values().zip(shares), seed)
}

/// Draws `count` indices of each class, or all of a class that has fewer, in increasing order.
pub fn of_each_class(labels: &[u32], count: usize, seed: u64) -> Vec<usize> {
    let classes = members(labels).into_values();
    let drawn = |class: Vec<usize>| {
        let count = count.min(class.len());
        (class, count)
    };
    chosen(classes.map(drawn), seed)
}

/// The training indices and the test indices, both in increasing order: of each class about a fifth is for testing, and
/// at least one image for training.
pub fn split(labels: &[u32]) -> (Vec<usize>, Vec<usize>) {
    let classes = members(labels).into_values();
    let fifth = |class: Vec<usize>| {
        let tested = (class.len() + 2) / 5;
        (class, tested)
    };
    let test = chosen(classes.map(fifth), SPLIT);
    let mut is_test = vec![false; labels.len()];
    test.iter().for_each(|&i| is_test[i] = true);
    ((0..labels.len()).filter(|&i| !is_test[i]).collect(), test)
}

/// The indices of each class.
fn members(labels: &[u32]) -> BTreeMap<u32, Vec<usize>> {
    let mut classes = BTreeMap::<u32, Vec<usize>>::new();
    for (i, &label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(i);
    }
    classes
}

/// So many of each class, by the order of their keys.
fn chosen(classes: impl Iterator<Item = (Vec<usize>, usize)>, seed: u64) -> Vec<usize> {
    let mut all = Vec::new();
    for (mut class, count) in classes {
        class.sort_by_cached_key(|&i| key(seed, i));
        all.extend(&class[..count]);
    }
    all.sort_unstable();
    all
}

/// Divides `count` among classes in proportion to their sizes: whole shares first, then the largest remainders.
fn shares(sizes: &[usize], count: usize, seed: u64) -> Vec<usize> {
    let total = sizes.iter().sum::<usize>().max(1) as u128;
    let exact = |size: usize| size as u128 * count as u128;
    let mut shares: Vec<usize> = sizes.iter().map(|&n| (exact(n) / total) as usize).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    // Equal remainders are served in a drawn order, because the first classes must not always win.
    order.sort_by_key(|&class| (Reverse(exact(sizes[class]) % total), key(seed, class)));
    let missing = count - shares.iter().sum::<usize>();
    for &class in &order[..missing] {
        shares[class] += 1;
    }
    // A class without a share takes one from the class with the most.
    for &class in &order {
        let most = (0..shares.len()).max_by_key(|&c| shares[c]);
        if let Some(most) = most.filter(|&most| shares[class] == 0 && shares[most] > 1) {
            shares[most] -= 1;
            shares[class] = 1;
        }
    }
    shares
}

/// The numbers below `count` in a drawn order.
pub fn order(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_cached_key(|&i| key(seed, i));
    order
}

fn key(seed: u64, index: usize) -> u64 {
    random::seed(seed, Purpose::Draw, index)
}
