//! Parts of a set of images: every class keeps its share, whatever the order of the set.

use ser_reg_trainers::data::draw;

fn counts(labels: &[u32], drawn: &[usize], classes: usize) -> Vec<usize> {
    let mut counts = vec![0; classes];
    drawn.iter().for_each(|&i| counts[labels[i] as usize] += 1);
    counts
}

#[test]
fn each_class_keeps_its_share_whatever_the_order() {
    let in_turn: Vec<u32> = (0..4000).map(|i| i % 10).collect();
    let sorted: Vec<u32> = (0..4000).map(|i| i / 400).collect();
    for labels in [&in_turn, &sorted] {
        for seed in 0..3 {
            let drawn = draw::by_class(labels, 2000, seed);
            assert_eq!(counts(labels, &drawn, 10), [200; 10]);
            assert!(drawn.is_sorted_by(|a, b| a < b), "increasing, so no image twice");
            assert_eq!(drawn, draw::by_class(labels, 2000, seed));
        }
        assert_ne!(draw::by_class(labels, 2000, 0), draw::by_class(labels, 2000, 1));
    }
}

#[test]
fn each_class_gives_as_many_as_it_has() {
    // Five of class 0, two of class 4, one of class 9.
    let labels = [0, 4, 0, 0, 9, 0, 4, 0];
    for seed in 0..20 {
        let drawn = draw::of_each_class(&labels, 2, seed);
        assert!(drawn.is_sorted_by(|a, b| a < b));
        let of = |label| drawn.iter().filter(|&&i| labels[i] == label).count();
        assert_eq!([of(0), of(4), of(9)], [2, 2, 1]);
    }
    let seeds: std::collections::BTreeSet<_> =
        (0..20).map(|seed| draw::of_each_class(&labels, 2, seed)).collect();
    assert!(seeds.len() > 1, "the draw depends on the seed");
    let mut order = draw::order(100, 0);
    assert_eq!(order, draw::order(100, 0));
    assert!(order != draw::order(100, 1) && !order.is_sorted());
    order.sort_unstable();
    assert!(order.into_iter().eq(0..100));
}

#[test]
fn unequal_classes_keep_their_shares_and_at_least_one() {
    // 900, 90, 9 and 1 images, the classes not numbered in a row.
    let sizes = [(0, 900), (3, 90), (7, 9), (8, 1)];
    let labels: Vec<u32> = sizes.iter().flat_map(|&(label, n)| vec![label; n]).collect();
    let of = |count| counts(&labels, &draw::by_class(&labels, count, 5), 9);
    assert_eq!(of(100), [89, 0, 0, 9, 0, 0, 0, 1, 1]);
    assert_eq!(of(4), [1, 0, 0, 1, 0, 0, 0, 1, 1]);
    assert_eq!(of(3).iter().sum::<usize>(), 3);
    assert_eq!(of(1000), [900, 0, 0, 90, 0, 0, 0, 9, 1]);
    assert_eq!(of(5000), of(1000));
    assert_eq!(of(0), [0; 9]);
    assert!(draw::by_class(&[], 7, 0).is_empty());
}

#[test]
fn a_draw_smaller_than_the_classes_does_not_prefer_the_first() {
    let labels: Vec<u32> = (0..1000).map(|i| i / 10).collect();
    let above: usize = (0..20)
        .flat_map(|seed| draw::by_class(&labels, 10, seed))
        .filter(|&i| labels[i] >= 50)
        .count();
    // Of 200 drawn, half are expected in the upper half of the classes.
    assert!((60..140).contains(&above), "{above}");
}

#[test]
fn the_split_takes_a_fifth_of_each_class() {
    let sizes = [100, 5, 4, 3, 2, 1];
    let labels: Vec<u32> = sizes.iter().zip(0..).flat_map(|(&n, l)| vec![l; n]).collect();
    let (train, test) = draw::split(&labels);
    assert_eq!(counts(&labels, &test, 6), [20, 1, 1, 1, 0, 0]);
    assert_eq!(counts(&labels, &train, 6), [80, 4, 3, 2, 2, 1]);
    let mut all = [train, test].concat();
    all.sort_unstable();
    assert_eq!(all, (0..labels.len()).collect::<Vec<_>>());
}
