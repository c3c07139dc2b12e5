//! InfoNCE and NT-Xent against loops over tokens, and the properties that hold for any tokens.

mod loss_common;

use candle_core::{DType, Device, Result, Tensor, Var};
use loss_common::{
    assert_close, assert_finite, assert_says, differences, flat, rng, scalar, tokens,
};
use proptest::prelude::*;
use rand::Rng;
use ser_reg::loss::{
    ContrastiveOutput, InfoNce, Negatives, NtXent, SameImage, TokenSet, info_nce, nt_xent,
    nt_xent_portable, nt_xent_ragged,
};

const FORMS: [(Negatives, SameImage); 4] = [
    (Negatives::BothViews, SameImage::Exclude),
    (Negatives::BothViews, SameImage::Keep),
    (Negatives::OtherView, SameImage::Exclude),
    (Negatives::OtherView, SameImage::Keep),
];

/// The slow, obvious twin: (loss, accuracy) of rows of width `d`.
struct Loops<'a> {
    d: usize,
    groups: &'a [u32],
    candidate_groups: &'a [&'a [u32]],
    weights: Option<&'a [f32]>,
    temperature: f64,
    eps: f64,
}

impl Loops<'_> {
    fn info_nce(&self, anchors: &[f64], positives: &[f64], candidates: &[&[f64]]) -> (f64, f64) {
        let s = |a: &[f64], b: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let norm = |a: &[f64]| (dot(a, a) + self.eps).sqrt();
            dot(a, b) / (norm(a) * norm(b)) / self.temperature
        };
        let (mut loss, mut accuracy, mut total) = (0.0, 0.0, 0.0);
        for (i, (a, p)) in anchors
            .chunks(self.d)
            .zip(positives.chunks(self.d))
            .enumerate()
        {
            let positive = s(a, p);
            let mut terms = vec![positive];
            for (set, groups) in candidates.iter().zip(self.candidate_groups) {
                for (c, group) in set.chunks(self.d).zip(*groups) {
                    if *group != self.groups[i] {
                        terms.push(s(a, c));
                    }
                }
            }
            let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let denominator: f64 = terms.iter().map(|t| (t - top).exp()).sum();
            let w = self.weights.map_or(1.0, |w| f64::from(w[i]));
            loss += w * (top + denominator.ln() - positive);
            let lead = 8.0 * f64::EPSILON * (self.d as f64).sqrt() / self.temperature;
            accuracy += w * f64::from(terms[1..].iter().all(|t| positive > *t + lead));
            total += w;
        }
        (loss / total, accuracy / total)
    }
}

proptest! {
    #![proptest_config(loss_common::cases(48))]

    #[test]
    fn matches_the_obvious_loops(
        seed in any::<u64>(), m in 1usize..=8, d in 1usize..=5,
        extra in prop::collection::vec(1usize..=8, 0..=2), with_own: bool, weighted: bool,
        temperature in prop::sample::select(vec![0.05, 0.3, 2.0]), block_bytes in prop::sample::select(vec![1, 300, 1 << 20]),
    ) {
        let rng = &mut rng(seed);
        let groups = |n: usize, rng: &mut rand::rngs::StdRng| (0..n).map(|_| rng.random_range(0..3)).collect::<Vec<u32>>();
        let own = groups(m, rng);
        let (z, zp) = (tokens(rng, (m, d), DType::F64)?, tokens(rng, (m, d), DType::F64)?);
        let weights: Vec<f32> = (0..m).map(|i| if i == 1 { 0.0 } else { rng.random_range(0.1..2.0) }).collect();
        let weights = weighted.then_some(&weights[..]);
        let extra: Vec<(Var, Vec<u32>)> =
            extra.iter().map(|&n| Ok((tokens(rng, (n, d), DType::F64)?, groups(n, rng)))).collect::<Result<_>>()?;
        let mut sets: Vec<TokenSet> = extra.iter().map(|(t, g)| TokenSet { tokens: t, labels: g }).collect();
        if with_own || sets.is_empty() {
            sets.push(TokenSet { tokens: &z, labels: &own });
            sets.push(TokenSet { tokens: &zp, labels: &own });
        }
        let config = InfoNce { temperature, eps: 1e-6, block_bytes };
        let ContrastiveOutput { loss, accuracy } = info_nce(TokenSet { tokens: &z, labels: &own }, &zp, &sets, weights, &config)?;

        let candidate_groups: Vec<&[u32]> = sets.iter().map(|s| s.labels).collect();
        let twin = Loops { d, groups: &own, candidate_groups: &candidate_groups, weights, temperature, eps: 1e-6 };
        // One flat vector of all distinct tensors, so that a tensor in several parts moves in all of them.
        let mut vars = vec![&z, &zp];
        vars.extend(extra.iter().map(|(t, _)| t));
        let all: Vec<f64> = vars.iter().flat_map(|v| flat(v)).collect();
        let run = |all: &[f64]| {
            let (z, rest) = all.split_at(m * d);
            let (zp, mut rest) = rest.split_at(m * d);
            let mut candidates = Vec::new();
            for (_, groups) in &extra {
                let (set, after) = rest.split_at(groups.len() * d);
                candidates.push(set);
                rest = after;
            }
            if candidates.len() < sets.len() {
                candidates.extend([z, zp]);
            }
            twin.info_nce(z, zp, &candidates)
        };
        let expected = run(&all);
        assert_close(&[scalar(&loss), scalar(&accuracy)], &[expected.0, expected.1], 1e-12);

        let grads = loss.backward()?;
        let grad: Vec<f64> = vars
            .iter()
            .flat_map(|v| grads.get(v).map_or_else(|| vec![0.0; v.elem_count()], flat))
            .collect();
        assert_close(&grad, &differences(&all, 1e-5, |x| run(x).0), 1e-6);
    }

    #[test]
    fn ragged_images_match_the_loops(seed in any::<u64>(), m in 1usize..=8, symmetric: bool, form in 0usize..4) {
        let rng = &mut rng(seed);
        let d = 3;
        let (z, zp) = (tokens(rng, (m, d), DType::F64)?, tokens(rng, (m, d), DType::F64)?);
        let ids: Vec<u32> = (0..m).map(|_| rng.random_range(5..8)).collect();
        let weights: Vec<f32> = (0..m).map(|_| rng.random_range(0.1..2.0)).collect();
        let (form, same_image) = FORMS[form];
        let config = NtXent { form, same_image, symmetric, temperature: 0.2, ..Default::default() };
        let out = nt_xent_ragged(&z, &zp, &ids, Some(&weights), &config)?;

        let each: Vec<u32> = (0..m as u32).collect();
        let groups = if same_image == SameImage::Keep { &each } else { &ids };
        let candidate_groups = [&groups[..], &groups[..]];
        let twin = Loops {
            d, groups, candidate_groups: &candidate_groups, weights: Some(&weights), temperature: 0.2, eps: config.eps,
        };
        let (z, zp) = (flat(&z), flat(&zp));
        let one_way = |z: &[f64], zp: &[f64]| {
            let candidates = if form == Negatives::BothViews { vec![z, zp] } else { vec![zp] };
            twin.info_nce(z, zp, &candidates)
        };
        let (there, back) = (one_way(&z, &zp), one_way(&zp, &z));
        let expected = if symmetric { [(there.0 + back.0) / 2.0, (there.1 + back.1) / 2.0] } else { [there.0, there.1] };
        assert_close(&[scalar(&out.loss), scalar(&out.accuracy)], &expected, 1e-12);
    }

    /// Sizes below, at and above the tiles of the fast path, blocks of one row and of all, in both of its types.
    #[test]
    fn the_two_twins_agree(
        seed in any::<u64>(), m in prop_oneof![1usize..=9, 100usize..=700], d in 1usize..=40, images in 1u32..=40,
        symmetric: bool, weighted: bool, same: bool, live in prop::sample::select(vec![[true, true], [true, false], [false, true]]),
        temperature in prop::sample::select(vec![0.01, 0.05, 0.3, 2.0]),
        block_bytes in prop::sample::select(vec![1, 100_000, 12 << 20]), form in 0usize..4, double: bool,
    ) {
        let rng = &mut rng(seed);
        let (dtype, tol) = if double { (DType::F64, 1e-11) } else { (DType::F32, 2e-5) };
        let (z, zp) = (tokens(rng, (m, d), dtype)?, tokens(rng, (m, d), dtype)?);
        let zp = if same { z.clone() } else { zp };
        let ids: Vec<u32> = (0..m).map(|_| rng.random_range(0..images)).collect();
        let weights: Vec<f32> = (0..m).map(|i| if i == 1 { 0.0 } else { rng.random_range(0.1..2.0) }).collect();
        let weights = weighted.then_some(&weights[..]);
        let (form, same_image) = FORMS[form];
        // One row to a block takes quadratically many calls.
        let block_bytes = if m > 200 { block_bytes.max(100_000) } else { block_bytes };
        let config = NtXent { form, same_image, symmetric, temperature, block_bytes, ..Default::default() };
        let side = |v: &Var, live: bool| if live { v.as_tensor().clone() } else { v.detach() };
        let (a, b) = (side(&z, live[0]), side(&zp, live[1]));
        let fast = nt_xent_ragged(&a, &b, &ids, weights, &config)?;
        let slow = nt_xent_portable(&a, &b, &ids, weights, &config)?;
        prop_assert_eq!(fast.loss.dtype(), slow.loss.dtype());
        assert_close(&[scalar(&fast.loss)], &[scalar(&slow.loss)], tol);
        // In f32 one anchor may sit on the fence, and many do where one channel has no direction or tokens meet themselves.
        let fence = if double { 0.0 } else { 2.0 / m as f64 };
        if double || (!same && d > 1) {
            assert_close(&[scalar(&fast.accuracy)], &[scalar(&slow.accuracy)], 1e-6 + fence);
        }
        // The radial part of a gradient is taken out, and one channel has no other: what eps leaves is rounding of terms of about
        // share/(τ·|x|), with tokens at least 0.2 long.
        let epsilon = if double { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let total: f32 = weights.map_or(1.0, |w| w.iter().sum());
        let share = weights.map_or(1.0 / m as f64, |w| f64::from(w.iter().copied().fold(0.0, f32::max) / total));
        let rounding = if d == 1 { 8.0 * epsilon * share / (temperature * 0.2) } else { 1e-30 };
        let (fast, slow) = (fast.loss.backward()?, slow.loss.backward()?);
        for v in [&z, &zp] {
            match (fast.get(v), slow.get(v)) {
                (Some(fast), Some(slow)) => {
                    let (fast, slow) = (flat(fast), flat(slow));
                    let size = slow.iter().fold(0f64, |a, b| a.max(b.abs()));
                    for (i, (a, b)) in fast.iter().zip(&slow).enumerate() {
                        prop_assert!((a - b).abs() <= tol * size / temperature.min(1.0) + rounding, "element {i}: {a}, expected {b}");
                    }
                }
                (fast, slow) => prop_assert_eq!(fast.is_some(), slow.is_some()),
            }
        }
    }
}

fn pair(seed: u64, shape: (usize, usize, usize), dtype: DType) -> Result<(Var, Var)> {
    let rng = &mut rng(seed);
    Ok((tokens(rng, shape, dtype)?, tokens(rng, shape, dtype)?))
}

/// Loss, and the gradients of `z` and `zp`.
fn evaluate(z: &Var, zp: &Var, config: &NtXent) -> Result<(Tensor, Tensor, Tensor)> {
    let out = nt_xent(z, zp, config)?;
    let grads = out.loss.backward()?;
    let grad = |v: &Var| grads.get(v).cloned().expect("a gradient");
    Ok((out.loss, grad(z), grad(zp)))
}

#[test]
fn equal_embeddings_give_the_log_of_the_count() -> Result<()> {
    let (b, n) = (4, 9);
    let z = Var::ones((b, n, 8), DType::F64, &Device::Cpu)?;
    let m = b * n;
    for ((form, same_image), count) in
        FORMS
            .into_iter()
            .zip([1 + 2 * (m - n), 1 + 2 * (m - 1), 1 + m - n, m])
    {
        let config = NtXent {
            form,
            same_image,
            temperature: 0.05,
            ..Default::default()
        };
        let (loss, grad, _) = evaluate(&z, &Var::from_tensor(&z)?, &config)?;
        assert_close(&[scalar(&loss)], &[(count as f64).ln()], 1e-12);
        assert_close(&flat(&grad), &vec![0.0; m * 8], 1e-12);
    }
    Ok(())
}

#[test]
fn swapping_the_views_keeps_the_symmetric_loss_only() -> Result<()> {
    let (z, zp) = pair(3, (3, 5, 8), DType::F64)?;
    for (form, same_image) in FORMS {
        for symmetric in [true, false] {
            let config = NtXent {
                form,
                same_image,
                symmetric,
                ..Default::default()
            };
            let (there, back) = (nt_xent(&z, &zp, &config)?, nt_xent(&zp, &z, &config)?);
            let gap = (scalar(&there.loss) - scalar(&back.loss)).abs();
            assert_eq!(gap < 1e-12, symmetric, "{config:?}: {gap}");
        }
    }
    Ok(())
}

#[test]
fn the_block_size_does_not_change_the_result() -> Result<()> {
    let (z, zp) = pair(4, (3, 7, 8), DType::F64)?;
    let config = NtXent::default();
    let whole = evaluate(&z, &zp, &config)?;
    // 42 candidates of 8 bytes: blocks of 1, 1, 2, 5 and all 21 rows.
    for block_bytes in [1, 42 * 8, 42 * 8 * 2, 42 * 8 * 5 + 3, 1 << 30] {
        let blocks = evaluate(
            &z,
            &zp,
            &NtXent {
                block_bytes,
                ..config
            },
        )?;
        assert_close(&[scalar(&blocks.0)], &[scalar(&whole.0)], 1e-14);
        assert_close(&flat(&blocks.1), &flat(&whole.1), 1e-14);
        assert_close(&flat(&blocks.2), &flat(&whole.2), 1e-14);
    }
    Ok(())
}

#[test]
fn accuracy_counts_the_matched_anchors() -> Result<()> {
    // Three images of one token; the third positive is the second token, so it is nearer to the second anchor.
    let z = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;
    let zp = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 1., 0.1]], &Device::Cpu)?;
    let config = NtXent {
        symmetric: false,
        form: Negatives::OtherView,
        ..Default::default()
    };
    let accuracy = |weights| {
        Ok::<_, ser_reg::Error>(scalar(
            &nt_xent_ragged(&z, &zp, &[0, 1, 2], weights, &config)?.accuracy,
        ))
    };
    assert_close(&[accuracy(None)?], &[1.0], 1e-6);
    let swapped = zp.index_select(&Tensor::new(&[0u32, 2, 1], &Device::Cpu)?, 0)?;
    let out = nt_xent_ragged(&z, &swapped, &[0, 1, 2], None, &config)?;
    assert_close(&[scalar(&out.accuracy)], &[1.0 / 3.0], 1e-6);
    let out = nt_xent_ragged(&z, &swapped, &[0, 1, 2], Some(&[1., 0., 0.]), &config)?;
    assert_close(&[scalar(&out.accuracy)], &[1.0], 1e-6);
    assert!(!out.accuracy.track_op());
    Ok(())
}

/// Two kernels make the cosines of the positive and of negatives; where all tokens are equal only rounding tells them apart.
#[test]
fn a_collapsed_encoder_matches_nothing() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for d in [1, 3, 8, 16, 128, 512] {
            let token = tokens(&mut rng(d as u64), (1, d), dtype)?;
            let z = token.as_tensor().repeat((300, 1))?;
            let ids: Vec<u32> = (0..300).map(|i| i / 10).collect();
            for symmetric in [true, false] {
                let config = NtXent {
                    symmetric,
                    ..Default::default()
                };
                for run in [nt_xent_ragged, nt_xent_portable] {
                    let out = run(&z, &z.copy()?, &ids, None, &config)?;
                    assert_eq!(scalar(&out.accuracy), 0.0, "{dtype:?}, width {d}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_too_long_for_its_type_is_no_zero_token() -> Result<()> {
    let (z, zp) = pair(3, (3, 4, 8), DType::F32)?;
    let long = Var::from_tensor(&(z.as_tensor() * 1e25)?)?;
    let ids: Vec<u32> = (0..12).map(|i| i / 4).collect();
    let flat = |v: &Var| v.flatten(0, 1);
    for symmetric in [true, false] {
        let config = NtXent {
            symmetric,
            ..Default::default()
        };
        for run in [nt_xent_ragged, nt_xent_portable] {
            let out = run(&flat(&long)?, &flat(&zp)?, &ids, None, &config)?;
            assert!(scalar(&out.loss).is_nan(), "a diverged model must show");
        }
    }
    Ok(())
}

/// Just above the temperature below which the two directions run one by one, all tokens opposite: weights of 1/Z add up.
#[test]
fn opposite_tokens_at_the_coldest_common_temperature_are_finite() -> Result<()> {
    for temperature in [0.0229, 0.02305, 0.0231, 0.0232, 0.0249, 0.02501, 0.0252] {
        for d in [1, 4] {
            let z = Var::ones((2, 1, d), DType::F32, &Device::Cpu)?;
            let zp = Var::from_tensor(&z.neg()?)?;
            let config = NtXent {
                form: Negatives::OtherView,
                temperature,
                ..Default::default()
            };
            let (loss, gz, gzp) = evaluate(&z, &zp, &config)?;
            assert_close(&[scalar(&loss)], &[2f64.ln()], 1e-5);
            for x in [&gz, &gzp] {
                assert_finite(x);
            }
        }
    }
    Ok(())
}

#[test]
fn cold_temperatures_stay_right_in_f32() -> Result<()> {
    // Tokens near their positives and near opposite: exponents from −200 to 200.
    for noise in [0.02, 1.0] {
        let (z, other) = pair(5, (4, 6, 8), DType::F64)?;
        let zp = Var::from_tensor(&((z.as_tensor() * 0.7)? + (other.as_tensor() * noise)?)?)?;
        let config = NtXent {
            temperature: 0.01,
            ..Default::default()
        };
        let exact = evaluate(&z, &zp, &config)?;
        let single = |v: &Var| Var::from_tensor(&v.to_dtype(DType::F32)?);
        let got = evaluate(&single(&z)?, &single(&zp)?, &config)?;
        assert_close(&[scalar(&got.0)], &[scalar(&exact.0)], 1e-5);
        assert_close(&flat(&got.1), &flat(&exact.1), 1e-4);
        assert_close(&flat(&got.2), &flat(&exact.2), 1e-4);
    }
    Ok(())
}

#[test]
fn the_rarest_inputs_are_finite() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for shape in [(1, 1, 4), (1, 9, 4), (5, 1, 4), (2, 3, 1), (3, 4, 8)] {
            for (form, same_image) in FORMS {
                let config = NtXent {
                    form,
                    same_image,
                    temperature: 0.01,
                    ..Default::default()
                };
                let (z, zp) = pair(6, shape, dtype)?;
                let zero = Var::from_tensor(&z.zeros_like()?)?;
                for (z, zp) in [
                    (&z, &zp),
                    (&zero, &zp),
                    (&z, &zero),
                    (&zero, &zero),
                    (&z, &z),
                ] {
                    let (loss, gz, gzp) = evaluate(z, zp, &config)?;
                    let wide = if dtype == DType::F64 {
                        DType::F64
                    } else {
                        DType::F32
                    };
                    assert_eq!(
                        (loss.dtype(), gz.dtype(), gz.dims()),
                        (wide, dtype, z.dims())
                    );
                    for x in [&loss, &gz, &gzp] {
                        assert_finite(x);
                    }
                    // One image sees no negative when its own tokens are left out.
                    if shape.0 == 1 && same_image == SameImage::Exclude {
                        assert_eq!(scalar(&loss), 0.0);
                        assert!(flat(&gz).iter().all(|g| *g == 0.0));
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_stays_near_f32() -> Result<()> {
    for (dtype, tol) in [(DType::F16, 1e-3), (DType::BF16, 1e-2)] {
        let (z, zp) = pair(7, (3, 5, 16), dtype)?;
        let wide = |v: &Var| Var::from_tensor(&v.to_dtype(DType::F32)?);
        let exact = evaluate(&wide(&z)?, &wide(&zp)?, &NtXent::default())?;
        let got = evaluate(&z, &zp, &NtXent::default())?;
        // The values are worked on in f32; only the gradient is rounded.
        assert_close(&[scalar(&got.0)], &[scalar(&exact.0)], 1e-6);
        for (got, exact) in [(&got.1, &exact.1), (&got.2, &exact.2)] {
            let largest = flat(exact)
                .into_iter()
                .fold(0.0, |a: f64, b| a.max(b.abs()));
            let error = flat(&(got.to_dtype(DType::F32)? - exact)?)
                .into_iter()
                .fold(0.0, |a: f64, b| a.max(b.abs()));
            assert!(error <= tol * largest, "{error} of {largest}");
        }
    }
    Ok(())
}

#[test]
fn nan_tokens_show_in_the_loss() -> Result<()> {
    let (z, zp) = pair(8, (2, 3, 4), DType::F32)?;
    let mut values = flat(&zp);
    values[5] = f64::NAN;
    let zp = Tensor::from_vec(values, zp.dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
    assert!(scalar(&nt_xent(&z, &zp, &NtXent::default())?.loss).is_nan());
    Ok(())
}

#[test]
fn gradient_stops_where_a_side_is_detached() -> Result<()> {
    let (z, zp) = pair(9, (3, 4, 8), DType::F64)?;
    let config = NtXent {
        symmetric: false,
        form: Negatives::OtherView,
        ..Default::default()
    };
    let (_, both_z, both_zp) = evaluate(&z, &zp, &config)?;
    let grads = nt_xent(&z, &zp.detach(), &config)?.loss.backward()?;
    assert!(grads.get(&zp).is_none());
    assert_close(
        &flat(grads.get(&z).expect("a gradient")),
        &flat(&both_z),
        1e-14,
    );
    let grads = nt_xent(&z.detach(), &zp, &config)?.loss.backward()?;
    assert!(grads.get(&z).is_none());
    assert_close(
        &flat(grads.get(&zp).expect("a gradient")),
        &flat(&both_zp),
        1e-14,
    );
    assert!(!nt_xent(&z.detach(), &zp.detach(), &config)?.loss.track_op());
    Ok(())
}

#[test]
fn the_chain_rule_goes_on_through_the_loss() -> Result<()> {
    let rng = &mut rng(10);
    let w = tokens(rng, (4, 6), DType::F64)?;
    let (x, y) = (
        tokens(rng, (2, 3, 4), DType::F64)?,
        tokens(rng, (2, 3, 4), DType::F64)?,
    );
    let f = |w: &Tensor| -> ser_reg::Result<Tensor> {
        let map = |x: &Var| x.broadcast_matmul(w)?.tanh();
        Ok((nt_xent(&map(&x)?, &map(&y)?, &NtXent::default())?
            .loss
            .sqr()?
            * 3.0)?)
    };
    let grads = f(&w)?.backward()?;
    let at = |v: &[f64]| scalar(&f(&Tensor::from_slice(v, (4, 6), &Device::Cpu).unwrap()).unwrap());
    assert_close(
        &flat(grads.get(&w).expect("a gradient")),
        &differences(&flat(&w), 1e-5, at),
        1e-7,
    );
    Ok(())
}

#[test]
fn strided_tokens_are_read_as_they_stand() -> Result<()> {
    let (z, zp) = pair(11, (3, 4, 5), DType::F64)?;
    let (zt, zpt) = (z.transpose(1, 2)?, zp.transpose(1, 2)?);
    let strided = nt_xent(&zt, &zpt, &NtXent::default())?.loss;
    let packed = nt_xent(&zt.contiguous()?, &zpt.contiguous()?, &NtXent::default())?.loss;
    assert_eq!(scalar(&strided), scalar(&packed));
    let (a, b) = (strided.backward()?, packed.backward()?);
    assert_close(
        &flat(a.get(&z).expect("a gradient")),
        &flat(b.get(&z).expect("a gradient")),
        1e-15,
    );
    Ok(())
}

#[test]
fn each_process_finds_its_part_of_the_whole_gradient() -> Result<()> {
    let (images, n, d, world) = (6, 4, 8, 3);
    let (z, zp) = pair(12, (images, n, d), DType::F64)?;
    for (form, same_image) in FORMS {
        let config = NtXent {
            form,
            same_image,
            temperature: 0.2,
            ..Default::default()
        };
        let (loss, gz, gzp) = evaluate(&z, &zp, &config)?;
        for rank in 0..world {
            let (first, count) = (rank * images / world, images / world);
            // What a gather without gradient returns, with the local slice put back live.
            let gathered = |v: &Var| -> Result<(Var, Tensor)> {
                let local = Var::from_tensor(&v.narrow(0, first, count)?)?;
                let before = v.narrow(0, 0, first)?.detach();
                let after = v.narrow(0, first + count, images - first - count)?.detach();
                let all = Tensor::cat(&[&before, local.as_tensor(), &after], 0)?;
                Ok((local, all))
            };
            let ((local, all), (local_p, all_p)) = (gathered(&z)?, gathered(&zp)?);
            let out = nt_xent(&all, &all_p, &config)?;
            assert_close(&[scalar(&out.loss)], &[scalar(&loss)], 1e-14);
            let grads = out.loss.backward()?;
            for (local, whole) in [(local, &gz), (local_p, &gzp)] {
                let whole = whole.narrow(0, first, count)?;
                assert_close(
                    &flat(grads.get(&local).expect("a gradient")),
                    &flat(&whole),
                    1e-13,
                );
            }
        }
    }
    Ok(())
}

#[test]
fn anchors_split_over_processes_add_up_to_the_whole() -> Result<()> {
    let (m, d) = (8, 5);
    let rng = &mut rng(13);
    let (z, zp) = (
        tokens(rng, (m, d), DType::F64)?,
        tokens(rng, (m, d), DType::F64)?,
    );
    let ids = [0, 0, 0, 1, 1, 2, 2, 3];
    let config = InfoNce {
        temperature: 0.2,
        ..Default::default()
    };
    let sets = [
        TokenSet {
            tokens: &z,
            groups: &ids,
        },
        TokenSet {
            tokens: &zp,
            groups: &ids,
        },
    ];
    let whole = info_nce(sets[0], &zp, &sets, None, &config)?.loss;
    let parts = [(0, 3), (3, 5)]
        .into_iter()
        .map(|(first, count)| {
            let (a, p) = (z.narrow(0, first, count)?, zp.narrow(0, first, count)?);
            let anchors = TokenSet {
                tokens: &a,
                groups: &ids[first..first + count],
            };
            let part = info_nce(anchors, &p, &sets, None, &config)?.loss;
            Ok((part * (count as f64 / m as f64))?)
        })
        .collect::<ser_reg::Result<Vec<_>>>()?;
    let sum = (&parts[0] + &parts[1])?;
    assert_close(&[scalar(&sum)], &[scalar(&whole)], 1e-14);
    let (sum, whole) = (sum.backward()?, whole.backward()?);
    for v in [&z, &zp] {
        assert_close(
            &flat(sum.get(v).expect("a gradient")),
            &flat(whole.get(v).expect("a gradient")),
            1e-14,
        );
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let (z, zp) = pair(14, (2, 3, 4), DType::F32)?;
    let ok = NtXent::default();
    for temperature in [0.0, -0.1, f64::NAN, f64::INFINITY] {
        let got = temperature.to_string();
        assert_says(
            nt_xent(&z, &zp, &NtXent { temperature, ..ok }),
            &["temperature", "above 0", &got],
        );
    }
    assert_says(
        nt_xent(&z, &zp, &NtXent { eps: -1.0, ..ok }),
        &["eps", "at least 0", "-1"],
    );
    assert_says(
        nt_xent(
            &z,
            &zp,
            &NtXent {
                block_bytes: 0,
                ..ok
            },
        ),
        &["block_bytes", "at least 1", "got 0"],
    );
    let other = Tensor::zeros((2, 4, 4), DType::F32, &Device::Cpu)?;
    assert_says(
        nt_xent(&z, &other, &ok),
        &["nt_xent", "one shape", "[2, 3, 4]", "[2, 4, 4]"],
    );
    assert_says(
        nt_xent(&z.flatten(0, 1)?, &zp.flatten(0, 1)?, &ok),
        &["rank 3", "nt_xent_ragged", "[6, 4]"],
    );
    assert_says(
        nt_xent(&z, &zp.to_dtype(DType::F64)?, &ok),
        &["one type", "f32", "f64"],
    );
    let ints = Tensor::zeros((2, 3, 4), DType::U32, &Device::Cpu)?;
    assert_says(
        nt_xent(&ints, &ints, &ok),
        &["f16, bf16, f32 or f64", "u32"],
    );
    let empty = Tensor::zeros((0, 3, 4), DType::F32, &Device::Cpu)?;
    assert_says(
        nt_xent(&empty, &empty, &ok),
        &["at least one token", "[0, 3, 4]"],
    );

    let (f, fp) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let ids = [0, 0, 0, 1, 1, 1];
    let ragged = |ids: &[u32], weights: Option<&[f32]>| nt_xent_ragged(&f, &fp, ids, weights, &ok);
    assert!(ragged(&ids, None).is_ok());
    assert_says(
        nt_xent_ragged(&z, &zp, &ids, None, &ok),
        &["rank 2", "[2, 3, 4]"],
    );
    assert_says(
        ragged(&ids[..5], None),
        &["one image id per token, 6", "got 5"],
    );
    assert_says(
        ragged(&ids, Some(&[1.0; 5])),
        &["one weight per token, 6", "got 5"],
    );
    assert_says(
        ragged(&ids, Some(&[1., 1., 1., -1., 1., 1.])),
        &["weights", "at least 0", "-1"],
    );
    assert_says(
        ragged(&ids, Some(&[1., f32::NAN, 1., 1., 1., 1.])),
        &["finite weights", "NaN"],
    );
    assert_says(
        ragged(&ids, Some(&[0.0; 6])),
        &["one weight above 0", "all 0"],
    );

    let set = TokenSet {
        tokens: &f,
        groups: &ids,
    };
    let with = |sets: &[TokenSet]| info_nce(set, &fp, sets, None, &InfoNce::default());
    assert!(with(&[set]).is_ok());
    assert_says(with(&[]), &["at least one set of candidates", "none"]);
    assert_says(
        with(&[TokenSet {
            groups: &ids[1..],
            ..set
        }]),
        &["one group per token, 6", "got 5"],
    );
    let narrow = f.narrow(1, 0, 3)?;
    assert_says(
        with(&[
            set,
            TokenSet {
                tokens: &narrow,
                ..set
            },
        ]),
        &["(M, 4)", "[6, 3]"],
    );
    let double = f.to_dtype(DType::F64)?;
    assert_says(
        with(&[TokenSet {
            tokens: &double,
            ..set
        }]),
        &["one type", "f32", "f64"],
    );
    assert_says(
        info_nce(
            TokenSet { tokens: &z, ..set },
            &zp,
            &[set],
            None,
            &InfoNce::default(),
        ),
        &["rank 2", "[2, 3, 4]"],
    );
    Ok(())
}
