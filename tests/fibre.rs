//! Channels that turn with the grid: laws of representations, the operator against a slow loop, bad
//! input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{assert_says, cases, d4, random, rng, scale, values, window};
use proptest::prelude::*;
use rand::Rng;
use ser_reg::{
    GridOperator, GroupAction, Resample, TokenGrid,
    fibre::FibreOperator,
    group::{Affine, D4, Element, FieldType, Representation, Subgroup},
};

type Done = ser_reg::Result<()>;

/// 3 trivial channels, two blocks of the group, one trivial channel more.
fn mixed(group: Subgroup) -> FieldType {
    FieldType::trivial(3)
        .and(FieldType::regular(group, 2 * group.order()).unwrap())
        .and(FieldType::trivial(1))
}

/// One element of the group per sample.
fn draw(group: Subgroup, batch: usize, seed: u64) -> Vec<D4> {
    let mut rng = rng(seed);
    let elements = group.elements();
    (0..batch).map(|_| elements[rng.random_range(0..elements.len())]).collect()
}

#[test]
fn representations_obey_the_laws_of_a_left_action() -> Done {
    for group in Subgroup::ALL {
        let field = mixed(group);
        let x = random(&[1, 2, field.channels()], 1);
        let act = |g: D4, x: &Tensor| FibreOperator::new(&field, &[g])?.apply(x);
        assert_eq!(values(&act(D4::IDENTITY, &x)?), values(&x), "identity");
        for &a in group.elements() {
            let there = act(a, &x)?;
            assert_eq!(values(&act(a.inverse(), &there)?), values(&x), "inverse");
            let undone = FibreOperator::new(&field, &[a])?.inverse().apply(&there)?;
            assert_eq!(values(&undone), values(&x), "inverse of the operator");
            for &b in group.elements() {
                let both = act(a, &act(b, &x)?)?;
                assert_eq!(values(&both), values(&act(a.compose(&b), &x)?), "{a:?} {b:?}");
                let composed = FibreOperator::new(&field, &[a])?
                    .compose(&FibreOperator::new(&field, &[b])?)?;
                assert_eq!(values(&composed.apply(&x)?), values(&both));
            }
        }
    }
    Ok(())
}

#[test]
fn a_regular_block_is_the_group_acting_on_itself() -> Done {
    for group in Subgroup::ALL {
        let elements = group.elements();
        for &g in elements {
            let source = Representation::Regular(group).source_indices(g)?;
            // what stands at h goes to g∘h
            for (i, h) in elements.iter().enumerate() {
                let to = elements.iter().position(|e| *e == g.compose(h)).unwrap();
                assert_eq!(source[to], i as u32);
            }
            // free: only the identity keeps a channel
            let kept = source.iter().enumerate().filter(|(i, s)| *i as u32 == **s);
            let expected = if g == D4::IDENTITY { group.order() } else { 0 };
            assert_eq!(kept.count(), expected);
        }
    }
    Ok(())
}

#[test]
fn every_sample_is_permuted_by_its_own_element() -> Done {
    for group in [Subgroup::C2, Subgroup::C4, Subgroup::D4] {
        let field = mixed(group);
        let channels = field.channels();
        let elements = draw(group, 6, 2);
        let operator = FibreOperator::new(&field, &elements)?;
        let tokens = random(&[6, 5, channels], 3);
        let x = values(&tokens);
        let mut slow = Vec::new();
        for (b, g) in elements.iter().enumerate() {
            let source = field.source_indices(*g)?;
            for n in 0..5 {
                slow.extend(source.iter().map(|&c| x[(b * 5 + n) * channels + c as usize]));
            }
        }
        assert_eq!(values(&operator.apply(&tokens)?), slow);
        // the same on channels-first maps, through views that are not contiguous
        let map = tokens.transpose(1, 2)?.reshape((6, channels, 1, 5))?;
        let turned = operator.apply(&map)?.squeeze(2)?.transpose(1, 2)?;
        assert_eq!(values(&turned), slow);
        assert_eq!(
            values(&operator.apply(&map.transpose(2, 3)?)?.squeeze(3)?.transpose(1, 2)?),
            slow
        );

        // the portable op is equal to the bit, for one element and for many
        for operator in [operator, FibreOperator::new(&field, &elements[..1])?] {
            for x in [&tokens, &map] {
                assert_eq!(values(&operator.apply(x)?), values(&operator.apply_portable(x)?));
            }
        }
    }
    Ok(())
}

#[test]
fn values_of_every_type_keep_their_bits() -> Done {
    let field = FieldType::regular(Subgroup::C4, 8)?;
    let operator = FibreOperator::new(&field, &[D4::ROT270])?;
    let x = (random(&[3, 2, 8], 4) * 100.0)?;
    let expected = values(&operator.apply(&x)?);
    use DType::*;
    for dtype in [U8, U32, I16, I32, I64, BF16, F16, F32, F64] {
        let cast = x.abs()?.to_dtype(dtype)?;
        let turned = operator.apply(&cast)?;
        assert_eq!(turned.dtype(), dtype);
        let of_cast = Tensor::from_vec(expected.clone(), x.shape(), &Device::Cpu)?;
        assert_eq!(values(&turned), values(&of_cast.abs()?.to_dtype(dtype)?));
    }
    Ok(())
}

#[test]
fn the_backward_pass_is_the_inverse() -> Done {
    let field = mixed(Subgroup::D4);
    for elements in [draw(Subgroup::D4, 4, 5), draw(Subgroup::D4, 1, 6)] {
        let operator = FibreOperator::new(&field, &elements)?;
        for shape in [vec![4, 3, field.channels()], vec![4, field.channels(), 2, 3]] {
            let x = Var::from_tensor(&random(&shape, 7))?;
            let y = random(&shape, 8);
            let product = |a: &Tensor, b: &Tensor| (a * b)?.sum_all()?.to_scalar::<f64>();
            let expected = operator.inverse().apply(&y)?;
            // ⟨ρx, y⟩ = ⟨x, ρ⁻¹y⟩
            let gap = product(&operator.apply(&x)?, &y)? - product(&x, &expected)?;
            assert!(gap.abs() < 1e-12, "{gap}");
            for turned in [operator.apply(&x)?, operator.apply_portable(&x)?] {
                let grads = (turned * &y)?.sum_all()?.backward()?;
                let grad = grads.get(&x).expect("a gradient");
                assert_eq!(values(grad), values(&expected));
            }
        }
    }
    Ok(())
}

#[test]
fn grid_and_fibre_together_are_an_action_on_fields() -> Done {
    let field = mixed(Subgroup::D4);
    let grid = TokenGrid::square(3)?;
    let x = random(&[1, field.channels(), 3, 3], 9);
    let act = |g: D4, x: &Tensor| {
        let moved = GridOperator::new(&[g], grid, &Resample::default())?.apply(x)?;
        FibreOperator::new(&field, &[g])?.apply(&moved)
    };
    for a in D4::ALL {
        for b in D4::ALL {
            let both = act(a, &act(b, &x)?)?;
            assert_eq!(values(&both), values(&act(a.compose(&b), &x)?));
        }
        // the two halves commute
        let fibre = FibreOperator::new(&field, &[a])?;
        let moved = GridOperator::new(&[a], grid, &Resample::default())?;
        let other = moved.apply(&fibre.apply(&x)?)?;
        assert_eq!(values(&act(a, &x)?), values(&other));
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(64))]

    /// Turns, scales and crops in any order: the D4 part is that of the turns alone.
    #[test]
    fn the_d4_part_is_a_homomorphism(
        links in prop::collection::vec((d4(), scale(), window()), 1..5),
    ) {
        let (mut element, mut turns) = (Element::identity(), D4::IDENTITY);
        for (turn, scale, window) in links {
            element = element.then(window).then(turn).then(scale);
            turns = turn.compose(&turns);
            prop_assert_eq!(element.d4_part(), Some(turns));
            prop_assert_eq!(element.inverse().d4_part(), Some(turns.inverse()));
            prop_assert_eq!(
                Element::relative(&element, &Element::from(D4::HFLIP)).d4_part(),
                Some(D4::HFLIP.compose(&turns.inverse()))
            );
        }
    }
}

#[test]
fn the_d4_part_is_found_up_to_rounding_and_nowhere_else() -> Done {
    for g in D4::ALL {
        assert_eq!(g.d4_part(), Some(g));
        assert_eq!(Affine::from(g).d4_part(), Some(g));
    }
    // a quarter turn through sines and cosines, on a grid that is not square too
    let third = Affine::rotation(30.0)?;
    let quarter = third.compose(&third).compose(&third);
    assert_eq!(quarter.d4_part(), Some(D4::ROT90));
    let (from, to) = (TokenGrid::new(2, 6)?, TokenGrid::new(6, 2)?);
    assert_eq!(Affine::rotation_on(90.0, from, to)?.d4_part(), Some(D4::ROT90));
    assert_eq!(Affine::translation(0.3, -7.0)?.d4_part(), Some(D4::IDENTITY));
    assert_eq!(Affine::zoom(-2.0, 0.5)?.d4_part(), Some(D4::VFLIP));
    for g in [
        Affine::rotation(30.0)?,
        Affine::rotation(45.0)?,
        Affine::rotation(90.0 + 1e-9)?,
        Affine::shear(0.0, 1e-9)?,
    ] {
        assert_eq!(g.d4_part(), None, "{g:?}");
    }
    Ok(())
}

/// An action that is not affine; it declares its D4 part, or has none.
#[derive(Clone, Debug, PartialEq)]
struct Wave(Option<D4>);

impl GroupAction for Wave {
    fn identity() -> Self {
        Self(None)
    }
    fn compose(&self, _: &Self) -> Self {
        self.clone()
    }
    fn inverse(&self) -> Self {
        self.clone()
    }
    fn source(&self, p: ser_reg::group::Point) -> ser_reg::group::Point {
        p
    }
    fn d4_part(&self) -> Option<D4> {
        self.0
    }
}

#[test]
fn neighbors_of_one_kind_are_one_part() -> Done {
    let field = mixed(Subgroup::C4);
    assert_eq!((field.channels(), field.parts().len()), (12, 3));
    assert!(!field.is_trivial() && FieldType::trivial(3).is_trivial());
    let joined = FieldType::regular(Subgroup::C4, 4)?.and(FieldType::regular(Subgroup::C4, 8)?);
    assert_eq!(joined, FieldType::regular(Subgroup::C4, 12)?);
    Ok(())
}

#[test]
fn bad_fields_are_refused() -> Done {
    let huge = FieldType::trivial(usize::MAX).and(FieldType::trivial(8));
    assert_eq!(huge.channels(), usize::MAX);
    let regular = |group, channels| FieldType::regular(group, channels).map(drop);
    let sources = |field: FieldType| field.source_indices(D4::IDENTITY).map(drop);
    let table: [(ser_reg::Result<()>, &[&str]); 4] = [
        (regular(Subgroup::D4, 20), &["8, the order of D4", "got 20", "FieldType::trivial"]),
        (regular(Subgroup::C4, 0), &["4, the order of C4", "got 0"]),
        (sources(huge.clone()), &["at most 2^24 channels"]),
        (sources(huge.and(FieldType::regular(Subgroup::C2, 2)?)), &["at most 2^24 channels"]),
    ];
    table.into_iter().for_each(|(result, parts)| assert_says(result, parts));
    Ok(())
}

#[test]
fn bad_elements_are_refused() -> Done {
    let field = mixed(Subgroup::C4);
    let turn = Affine::rotation(30.0)?;
    let table: [(ser_reg::Result<FibreOperator>, &[&str]); 6] = [
        (
            FibreOperator::new(&field, &[D4::ROT90, D4::HFLIP]),
            &["an element of C4", "got", "flip: true"],
        ),
        (
            FibreOperator::new(&field, &[turn]),
            &["quarter turn or a flip", "sample 0", "trivial field"],
        ),
        (FibreOperator::new(&field, &[Wave(None)]), &["quarter turn or a flip"]),
        (FibreOperator::new::<D4>(&field, &[]), &["one element", "0 elements"]),
        (FibreOperator::new(&FieldType::trivial(0), &[D4::ROT90]), &["0 channels"]),
        (
            FibreOperator::new(&FieldType::trivial(usize::MAX), &[D4::ROT90]),
            &["at most 2^24 channels"],
        ),
    ];
    table.into_iter().for_each(|(result, parts)| assert_says(result, parts));
    FibreOperator::new(&field, &[Wave(Some(D4::ROT90))])?;
    // A trivial field accepts every element.
    FibreOperator::new(&FieldType::trivial(4), &[turn])?;

    Ok(())
}

#[test]
fn bad_tensors_and_products_are_refused() -> Done {
    let field = mixed(Subgroup::C4);
    let operator = FibreOperator::new(&field, &[D4::ROT90, D4::ROT180])?;
    for shape in [&[2usize, 3, 8][..], &[3, 3, 12], &[2, 12], &[2, 0, 12], &[2, 8, 3, 3]] {
        let x = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        assert_says(operator.apply(&x), &["tokens (2, N, 12)", "map (2, 12, H, W)"]);
    }
    let eight = FieldType::regular(Subgroup::C4, 8)?;
    let other = FibreOperator::new(&eight, &[D4::ROT90])?;
    assert_says(operator.compose(&other), &["12 channels", "8 channels"]);
    let three = FibreOperator::new(&field, &[D4::ROT90; 3])?;
    assert_says(operator.compose(&three), &["1 or 2 samples", "for 3"]);
    Ok(())
}
