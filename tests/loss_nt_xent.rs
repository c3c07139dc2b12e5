//! InfoNCE and NT-Xent against loops over tokens, and the properties that hold for any tokens.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{assert_close, assert_finite, assert_says, differences, flat, rng, scalar, tokens};
use proptest::prelude::*;
use rand::Rng;
use ser_reg::loss::{
    Contrastive, ContrastiveOutput, Negatives, SameImage, TokenSet, info_nce, nt_xent,
    nt_xent_portable, nt_xent_ragged, nt_xent_symmetric,
};
use ser_reg::ser::{Objective, Weights};
use ser_reg::{MapPair, SerConfig, SerLoss, TokenGrid, group::D4, view::Relative};

/// One direction, and the mean of both.
const DIRECTIONS: [Run; 2] = [nt_xent, nt_xent_symmetric];

type Run = fn(&Tensor, &Tensor, &Contrastive) -> ser_reg::Result<ContrastiveOutput>;

const FORMS: [(Negatives, SameImage); 4] = [
    (Negatives::BothViews, SameImage::Exclude),
    (Negatives::BothViews, SameImage::Keep),
    (Negatives::OtherView, SameImage::Exclude),
    (Negatives::OtherView, SameImage::Keep),
];

/// Loops over tokens as the reference: (loss, accuracy) of rows of width `d`.
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
        for (i, (a, p)) in anchors.chunks(self.d).zip(positives.chunks(self.d)).enumerate() {
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

/// NT-Xent of both directions on the CPU, one weight per image; `z` and `zp` are (B, N, D).
fn symmetric_by_images(
    z: &Tensor,
    zp: &Tensor,
    weights: Option<&[f32]>,
    config: &Contrastive,
) -> ser_reg::Result<ContrastiveOutput> {
    if weights.is_none() {
        return nt_xent_symmetric(z, zp, config);
    }
    let ser =
        SerLoss::new(SerConfig { objective: Objective::NtXent(*config), ..Default::default() })?;
    let grid = TokenGrid::new(1, z.dims()[1])?;
    let still = Relative::new(vec![D4::IDENTITY], grid, grid)?;
    let weights = Weights { samples: weights, ..Default::default() };
    let out = ser.forward(&MapPair::new([z, zp], &still).weights(&weights))?;
    Ok(ContrastiveOutput { loss: out.loss, accuracy: out.accuracy.expect("NT-Xent") })
}

proptest! {
    #![proptest_config(common::cases(48))]

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
        let config = Contrastive { temperature, eps: 1e-6, block_bytes, ..Default::default() };
        let ContrastiveOutput { loss, accuracy } = info_nce(TokenSet { tokens: &z, labels: &own }, &zp, &sets, weights, &config)?;

        let candidate_groups: Vec<&[u32]> = sets.iter().map(|s| s.labels).collect();
        let loops = Loops { d, groups: &own, candidate_groups: &candidate_groups, weights, temperature, eps: 1e-6 };
        // One flat vector of all distinct tensors, so that a tensor in several parts moves in all
        // of them.
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
            loops.info_nce(z, zp, &candidates)
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
        let config = Contrastive { negatives: form, same_image, temperature: 0.2, ..Default::default() };
        let out = match symmetric {
            true => nt_xent_portable(&z, &zp, &ids, Some(&weights), &config, true)?,
            false => nt_xent_ragged(&z, &zp, &ids, Some(&weights), &config)?,
        };

        let each: Vec<u32> = (0..m as u32).collect();
        let groups = if same_image == SameImage::Keep { &each } else { &ids };
        let candidate_groups = [&groups[..], &groups[..]];
        let loops = Loops {
            d, groups, candidate_groups: &candidate_groups, weights: Some(&weights), temperature: 0.2, eps: config.eps,
        };
        let (z, zp) = (flat(&z), flat(&zp));
        let one_way = |z: &[f64], zp: &[f64]| {
            let candidates = if form == Negatives::BothViews { vec![z, zp] } else { vec![zp] };
            loops.info_nce(z, zp, &candidates)
        };
        let (there, back) = (one_way(&z, &zp), one_way(&zp, &z));
        let expected = if symmetric { [(there.0 + back.0) / 2.0, (there.1 + back.1) / 2.0] } else { [there.0, there.1] };
        assert_close(&[scalar(&out.loss), scalar(&out.accuracy)], &expected, 1e-12);
    }

    /// Sizes below, at and above the tiles of the fast path, blocks of one row and of all, in both
    /// of its types.
    #[test]
    fn both_engines_agree(
        seed in any::<u64>(), m in prop_oneof![1usize..=9, 100usize..=700], d in 1usize..=40, images in 1u32..=40,
        symmetric: bool, weighted: bool, same: bool, live in prop::sample::select(vec![[true, true], [true, false], [false, true]]),
        temperature in prop::sample::select(vec![0.01, 0.05, 0.3, 2.0]),
        block_bytes in prop::sample::select(vec![1, 100_000, 12 << 20]), form in 0usize..4, double: bool,
    ) {
        let rng = &mut rng(seed);
        let (dtype, tol) = if double { (DType::F64, 1e-11) } else { (DType::F32, 2e-5) };
        let (z, zp) = (tokens(rng, (m, d), dtype)?, tokens(rng, (m, d), dtype)?);
        let zp = if same { z.clone() } else { zp };
        let (form, same_image) = FORMS[form];
        // Both directions on the CPU take images of one size, with a weight each. Powers of two do
        // not round.
        let b = (images as usize).min(m);
        let n = m / b;
        let m = if symmetric { b * n } else { m };
        let of_images: Vec<f32> = (0..b).map(|_| [0.25, 0.5, 1.0][rng.random_range(0..3)]).collect();
        let weighted = weighted && (!symmetric || b > 1);
        let (ids, weights): (Vec<u32>, Vec<f32>) = match symmetric {
            true => (0..m).map(|i| ((i / n) as u32, of_images[i / n])).unzip(),
            false => {
                let weight = |i, rng: &mut rand::rngs::StdRng| if i == 1 { 0.0 } else { rng.random_range(0.1..2.0) };
                (0..m).map(|i| (rng.random_range(0..images), weight(i, rng))).unzip()
            }
        };
        let weights = weighted.then_some(&weights[..]);
        // One row to a block takes quadratically many calls.
        let block_bytes = if m > 200 { block_bytes.max(100_000) } else { block_bytes };
        let config = Contrastive { negatives: form, same_image, temperature, block_bytes, ..Default::default() };
        let side = |v: &Var, live: bool| if live { v.as_tensor().clone() } else { v.detach() };
        let (left, right) = (side(&z, live[0]).narrow(0, 0, m)?, side(&zp, live[1]).narrow(0, 0, m)?);
        let fast = match symmetric {
            true => {
                let (left, right) = (left.reshape((b, n, d))?, right.reshape((b, n, d))?);
                symmetric_by_images(&left, &right, weighted.then_some(&of_images[..]), &config)?
            }
            false => nt_xent_ragged(&left, &right, &ids, weights, &config)?,
        };
        let slow = nt_xent_portable(&left, &right, &ids, weights, &config, symmetric)?;
        prop_assert_eq!(fast.loss.dtype(), slow.loss.dtype());
        assert_close(&[scalar(&fast.loss)], &[scalar(&slow.loss)], tol);
        // In f32 rounding decides for an anchor whose best two cosines are equal, as many are with
        // one channel or equal tokens.
        let fence = if double { 0.0 } else { 2.0 / m as f64 };
        if double || (!same && d > 1) {
            assert_close(&[scalar(&fast.accuracy)], &[scalar(&slow.accuracy)], 1e-6 + fence);
        }
        // The radial part of a gradient is taken out, and one channel has no other: what eps leaves
        // is rounding of terms of about share/(τ·|x|), with tokens at least 0.2 long.
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
fn evaluate(run: Run, z: &Var, zp: &Var, config: &Contrastive) -> Result<(Tensor, Tensor, Tensor)> {
    let out = run(z, zp, config)?;
    let grads = out.loss.backward()?;
    let grad = |v: &Var| grads.get(v).cloned().expect("a gradient");
    Ok((out.loss, grad(z), grad(zp)))
}

#[test]
fn equal_embeddings_give_the_log_of_the_count() -> Result<()> {
    let (b, n) = (4, 9);
    let z = Var::ones((b, n, 8), DType::F64, &Device::Cpu)?;
    let m = b * n;
    for ((negatives, same_image), count) in
        FORMS.into_iter().zip([1 + 2 * (m - n), 1 + 2 * (m - 1), 1 + m - n, m])
    {
        for run in DIRECTIONS {
            let config =
                Contrastive { negatives, same_image, temperature: 0.05, ..Default::default() };
            let (loss, grad, _) = evaluate(run, &z, &Var::from_tensor(&z)?, &config)?;
            assert_close(&[scalar(&loss)], &[(count as f64).ln()], 1e-12);
            assert_close(&flat(&grad), &vec![0.0; m * 8], 1e-12);
        }
    }
    Ok(())
}

#[test]
fn swapping_the_views_keeps_the_symmetric_loss_only() -> Result<()> {
    let (z, zp) = pair(3, (3, 5, 8), DType::F64)?;
    for (negatives, same_image) in FORMS {
        let config = Contrastive { negatives, same_image, ..Default::default() };
        let [one_way, both] = DIRECTIONS.map(|run| {
            let (there, back) = (run(&z, &zp, &config), run(&zp, &z, &config));
            [there, back].map(|out| scalar(&out.expect("a loss").loss))
        });
        assert!((both[0] - both[1]).abs() < 1e-12, "{config:?}: {both:?}");
        assert!((one_way[0] - one_way[1]).abs() > 1e-12, "{config:?}");
        assert_close(&[both[0]], &[(one_way[0] + one_way[1]) / 2.0], 1e-13);
    }
    Ok(())
}

#[test]
fn the_block_size_does_not_change_the_result() -> Result<()> {
    let (z, zp) = pair(4, (3, 7, 8), DType::F64)?;
    let config = Contrastive::default();
    for run in DIRECTIONS {
        let whole = evaluate(run, &z, &zp, &config)?;
        // 42 candidates of 8 bytes: blocks of 1, 1, 2, 5 and all 21 rows.
        for block_bytes in [1, 42 * 8, 42 * 8 * 2, 42 * 8 * 5 + 3, 1 << 30] {
            let config = Contrastive { block_bytes, ..config };
            let blocks = evaluate(run, &z, &zp, &config)?;
            assert_close(&[scalar(&blocks.0)], &[scalar(&whole.0)], 1e-14);
            assert_close(&flat(&blocks.1), &flat(&whole.1), 1e-14);
            assert_close(&flat(&blocks.2), &flat(&whole.2), 1e-14);
        }
    }
    Ok(())
}

#[test]
fn accuracy_counts_the_matched_anchors() -> Result<()> {
    // Three images of one token; the third positive is the second token, so it is nearer to the
    // second anchor.
    let z = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;
    let zp = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 1., 0.1]], &Device::Cpu)?;
    let config = Contrastive { negatives: Negatives::OtherView, ..Default::default() };
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

/// Two kernels make the cosines of the positive and of negatives. Where all tokens are equal only
/// rounding differs.
#[test]
fn a_collapsed_encoder_matches_nothing() -> Result<()> {
    let config = Contrastive::default();
    for dtype in [DType::F32, DType::F64] {
        for d in [1, 3, 8, 16, 128, 512] {
            let token = tokens(&mut rng(d as u64), (1, d), dtype)?;
            let z = token.as_tensor().repeat((300, 1))?;
            let ids: Vec<u32> = (0..300).map(|i| i / 10).collect();
            let (other, images) = (z.copy()?, z.reshape((30, 10, d))?);
            for out in [
                nt_xent_ragged(&z, &other, &ids, None, &config)?,
                nt_xent_symmetric(&images, &images.copy()?, &config)?,
                nt_xent_portable(&z, &other, &ids, None, &config, false)?,
                nt_xent_portable(&z, &other, &ids, None, &config, true)?,
            ] {
                assert_eq!(scalar(&out.accuracy), 0.0, "{dtype:?}, width {d}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_too_long_for_its_type_is_no_zero_token() -> Result<()> {
    let (z, zp) = pair(3, (3, 4, 8), DType::F32)?;
    let long = (z.as_tensor() * 1e25)?;
    let ids: Vec<u32> = (0..12).map(|i| i / 4).collect();
    let (flat_long, flat_zp) = (long.flatten(0, 1)?, zp.flatten(0, 1)?);
    let config = Contrastive::default();
    for out in [
        nt_xent(&long, &zp, &config)?,
        nt_xent_symmetric(&long, &zp, &config)?,
        nt_xent_portable(&flat_long, &flat_zp, &ids, None, &config, false)?,
        nt_xent_portable(&flat_long, &flat_zp, &ids, None, &config, true)?,
    ] {
        assert!(scalar(&out.loss).is_nan(), "a diverged model must show");
    }
    Ok(())
}

/// Just above the temperature below which the two directions run one by one, all tokens opposite:
/// weights of 1/Z add up.
#[test]
fn opposite_tokens_at_the_coldest_common_temperature_are_finite() -> Result<()> {
    for temperature in [0.0229, 0.02305, 0.0231, 0.0232, 0.0249, 0.02501, 0.0252] {
        for d in [1, 4] {
            let z = Var::ones((2, 1, d), DType::F32, &Device::Cpu)?;
            let zp = Var::from_tensor(&z.neg()?)?;
            let config =
                Contrastive { negatives: Negatives::OtherView, temperature, ..Default::default() };
            let (loss, gz, gzp) = evaluate(nt_xent_symmetric, &z, &zp, &config)?;
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
        let config = Contrastive { temperature: 0.01, ..Default::default() };
        for run in DIRECTIONS {
            let exact = evaluate(run, &z, &zp, &config)?;
            let single = |v: &Var| Var::from_tensor(&v.to_dtype(DType::F32)?);
            let got = evaluate(run, &single(&z)?, &single(&zp)?, &config)?;
            assert_close(&[scalar(&got.0)], &[scalar(&exact.0)], 1e-5);
            assert_close(&flat(&got.1), &flat(&exact.1), 1e-4);
            assert_close(&flat(&got.2), &flat(&exact.2), 1e-4);
        }
    }
    Ok(())
}

/// That every combination of zero and other tokens has a finite loss and finite gradients.
fn check_rare(run: Run, shape: (usize, usize, usize), config: &Contrastive) -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let wide = match dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let (z, zp) = pair(6, shape, dtype)?;
        let zero = Var::from_tensor(&z.zeros_like()?)?;
        for (z, zp) in [(&z, &zp), (&zero, &zp), (&z, &zero), (&zero, &zero), (&z, &z)] {
            let (loss, gz, gzp) = evaluate(run, z, zp, config)?;
            assert_eq!((loss.dtype(), gz.dtype(), gz.dims()), (wide, dtype, z.dims()));
            for x in [&loss, &gz, &gzp] {
                assert_finite(x);
            }
            // One image sees no negative when its own tokens are left out.
            if shape.0 == 1 && config.same_image == SameImage::Exclude {
                assert_eq!(scalar(&loss), 0.0);
                assert!(flat(&gz).iter().all(|g| *g == 0.0));
            }
        }
    }
    Ok(())
}

#[test]
fn the_rarest_inputs_are_finite() -> Result<()> {
    for shape in [(1, 1, 4), (1, 9, 4), (5, 1, 4), (2, 3, 1), (3, 4, 8)] {
        for (negatives, same_image) in FORMS {
            let config =
                Contrastive { negatives, same_image, temperature: 0.01, ..Default::default() };
            for run in DIRECTIONS {
                check_rare(run, shape, &config)?;
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_stays_near_f32() -> Result<()> {
    let config = Contrastive::default();
    for (dtype, tol) in [(DType::F16, 1e-3), (DType::BF16, 1e-2)] {
        for run in DIRECTIONS {
            let (z, zp) = pair(7, (3, 5, 16), dtype)?;
            let wide = |v: &Var| Var::from_tensor(&v.to_dtype(DType::F32)?);
            let exact = evaluate(run, &wide(&z)?, &wide(&zp)?, &config)?;
            let got = evaluate(run, &z, &zp, &config)?;
            // The values are worked on in f32; only the gradient is rounded.
            assert_close(&[scalar(&got.0)], &[scalar(&exact.0)], 1e-6);
            for (got, exact) in [(&got.1, &exact.1), (&got.2, &exact.2)] {
                let largest = flat(exact).into_iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                let error = flat(&(got.to_dtype(DType::F32)? - exact)?)
                    .into_iter()
                    .fold(0.0, |a: f64, b| a.max(b.abs()));
                assert!(error <= tol * largest, "{error} of {largest}");
            }
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
    for run in DIRECTIONS {
        assert!(scalar(&run(&z, &zp, &Contrastive::default())?.loss).is_nan());
    }
    Ok(())
}

/// An anchor of weight 0 takes no part, whatever it holds, and its gradient is 0.
#[test]
fn anchors_of_weight_zero_may_hold_anything() -> Result<()> {
    let device = &Device::Cpu;
    for dtype in [DType::F32, DType::F64] {
        let rows = |rows: [[f64; 2]; 3]| Tensor::new(&rows, device)?.to_dtype(dtype);
        let candidates = rows([[1.0, 0.5], [-0.5, 1.0], [0.3, -2.0]])?;
        let sets = [TokenSet { tokens: &candidates, labels: &[0, 1, 2] }];
        let bad = Var::from_tensor(&rows([[1.0, 2.0], [f64::NAN, 1.0], [-1.0, 0.2]])?)?;
        let positives = rows([[0.9, 2.0], [f64::INFINITY, 0.0], [-1.0, 0.1]])?;
        let run = |z: &Tensor, zp: &Tensor, labels: &[u32], weights: &[f32]| {
            let anchors = TokenSet { tokens: z, labels };
            info_nce(anchors, zp, &sets, Some(weights), &Contrastive::default())
        };
        let out = run(&bad, &positives, &[0, 1, 2], &[1.0, 0.0, 3.0])?;
        let kept = |x: &Tensor| Tensor::cat(&[x.narrow(0, 0, 1)?, x.narrow(0, 2, 1)?], 0);
        let alone = run(&kept(&bad)?, &kept(&positives)?, &[0, 2], &[1.0, 3.0])?;
        assert_eq!(scalar(&out.loss), scalar(&alone.loss));
        assert_eq!(scalar(&out.accuracy), scalar(&alone.accuracy));
        let gradient = flat(out.loss.backward()?.get(&bad).expect("a gradient"));
        assert_eq!(gradient[2..4], [0.0, 0.0]);
        assert_eq!(gradient, flat(alone.loss.backward()?.get(&bad).expect("a gradient")));
    }
    Ok(())
}

#[test]
fn gradient_stops_where_a_side_is_detached() -> Result<()> {
    let (z, zp) = pair(9, (3, 4, 8), DType::F64)?;
    for run in DIRECTIONS {
        let config = Contrastive { negatives: Negatives::OtherView, ..Default::default() };
        let (_, both_z, both_zp) = evaluate(run, &z, &zp, &config)?;
        let grads = run(&z, &zp.detach(), &config)?.loss.backward()?;
        assert!(grads.get(&zp).is_none());
        assert_close(&flat(grads.get(&z).expect("a gradient")), &flat(&both_z), 1e-14);
        let grads = run(&z.detach(), &zp, &config)?.loss.backward()?;
        assert!(grads.get(&z).is_none());
        assert_close(&flat(grads.get(&zp).expect("a gradient")), &flat(&both_zp), 1e-14);
        assert!(!run(&z.detach(), &zp.detach(), &config)?.loss.track_op());
    }
    Ok(())
}

#[test]
fn the_chain_rule_goes_on_through_the_loss() -> Result<()> {
    let rng = &mut rng(10);
    let w = tokens(rng, (4, 6), DType::F64)?;
    let (x, y) = (tokens(rng, (2, 3, 4), DType::F64)?, tokens(rng, (2, 3, 4), DType::F64)?);
    for run in DIRECTIONS {
        let f = |w: &Tensor| -> ser_reg::Result<Tensor> {
            let map = |x: &Var| x.broadcast_matmul(w)?.tanh();
            let loss = run(&map(&x)?, &map(&y)?, &Contrastive::default())?.loss;
            Ok((loss.sqr()? * 3.0)?)
        };
        let grads = f(&w)?.backward()?;
        let at =
            |v: &[f64]| scalar(&f(&Tensor::from_slice(v, (4, 6), &Device::Cpu).unwrap()).unwrap());
        assert_close(
            &flat(grads.get(&w).expect("a gradient")),
            &differences(&flat(&w), 1e-5, at),
            1e-7,
        );
    }
    Ok(())
}

#[test]
fn strided_tokens_are_read_in_their_order() -> Result<()> {
    let (z, zp) = pair(11, (3, 4, 5), DType::F64)?;
    let (zt, zpt) = (z.transpose(1, 2)?, zp.transpose(1, 2)?);
    let config = Contrastive::default();
    for run in DIRECTIONS {
        let strided = run(&zt, &zpt, &config)?.loss;
        let packed = run(&zt.contiguous()?, &zpt.contiguous()?, &config)?.loss;
        assert_eq!(scalar(&strided), scalar(&packed));
        let (a, b) = (strided.backward()?, packed.backward()?);
        assert_close(
            &flat(a.get(&z).expect("a gradient")),
            &flat(b.get(&z).expect("a gradient")),
            1e-15,
        );
    }
    Ok(())
}

#[test]
fn each_process_finds_its_part_of_the_whole_gradient() -> Result<()> {
    let (images, n, d, world) = (6, 4, 8, 3);
    let (z, zp) = pair(12, (images, n, d), DType::F64)?;
    for (negatives, same_image) in FORMS {
        for run in DIRECTIONS {
            let config =
                Contrastive { negatives, same_image, temperature: 0.2, ..Default::default() };
            let (loss, gz, gzp) = evaluate(run, &z, &zp, &config)?;
            for rank in 0..world {
                let (first, count) = (rank * images / world, images / world);
                // What a gather without gradient returns, with the live slice of this process in
                // its place.
                let gathered = |v: &Var| -> Result<(Var, Tensor)> {
                    let local = Var::from_tensor(&v.narrow(0, first, count)?)?;
                    let before = v.narrow(0, 0, first)?.detach();
                    let rest = images - first - count;
                    let after = v.narrow(0, first + count, rest)?.detach();
                    let all = Tensor::cat(&[&before, local.as_tensor(), &after], 0)?;
                    Ok((local, all))
                };
                let ((local, all), (local_p, all_p)) = (gathered(&z)?, gathered(&zp)?);
                let out = run(&all, &all_p, &config)?;
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
    }
    Ok(())
}

#[test]
fn anchors_split_over_processes_add_up_to_the_whole() -> Result<()> {
    let (m, d) = (8, 5);
    let rng = &mut rng(13);
    let (z, zp) = (tokens(rng, (m, d), DType::F64)?, tokens(rng, (m, d), DType::F64)?);
    let ids = [0, 0, 0, 1, 1, 2, 2, 3];
    let config = Contrastive { temperature: 0.2, ..Default::default() };
    let sets = [&z, &zp].map(|tokens| TokenSet { tokens, labels: &ids });
    let whole = info_nce(sets[0], &zp, &sets, None, &config)?.loss;
    let parts = [(0, 3), (3, 5)]
        .into_iter()
        .map(|(first, count)| {
            let (a, p) = (z.narrow(0, first, count)?, zp.narrow(0, first, count)?);
            let anchors = TokenSet { tokens: &a, labels: &ids[first..first + count] };
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

/// The candidates and the labels of `info_nce` say what these settings say elsewhere.
#[test]
fn info_nce_reads_neither_negatives_nor_same_image() -> Result<()> {
    let (z, zp) = pair(14, (3, 4, 5), DType::F64)?;
    let (z, zp) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let ids: Vec<u32> = (0..12).map(|i| i / 4).collect();
    let sets = [&z, &zp].map(|tokens| TokenSet { tokens, labels: &ids });
    let paper = nt_xent_ragged(&z, &zp, &ids, None, &Contrastive::default())?.loss;
    for (negatives, same_image) in FORMS {
        let config = Contrastive { negatives, same_image, ..Default::default() };
        let out = info_nce(sets[0], &zp, &sets, None, &config)?;
        assert_close(&[scalar(&out.loss)], &[scalar(&paper)], 1e-14);
    }
    Ok(())
}

#[test]
fn settings_out_of_range_are_named() -> Result<()> {
    let (z, zp) = pair(14, (2, 3, 4), DType::F32)?;
    let (f, fp) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let ids = [0, 0, 0, 1, 1, 1];
    let set = TokenSet { tokens: &f, labels: &ids };
    let ok = Contrastive::default();
    let cold = |temperature| Contrastive { temperature, ..ok };
    let eps = |eps| Contrastive { eps, ..ok };
    let blocks = Contrastive { block_bytes: 0, ..ok };
    for (config, parts) in [
        (cold(0.0), ["temperature", "above 0", "got 0"]),
        (cold(-0.1), ["temperature", "above 0", "-1e-1"]),
        (cold(f64::NAN), ["temperature", "above 0", "NaN"]),
        (cold(f64::INFINITY), ["temperature", "finite", "inf"]),
        (eps(-1.0), ["eps", "0, or a finite value", "-1"]),
        (eps(f64::NAN), ["eps", "finite", "NaN"]),
        (blocks, ["block_bytes", "at least 1", "got 0"]),
    ] {
        for run in DIRECTIONS {
            assert_says(run(&z, &zp, &config), &parts);
        }
        assert_says(nt_xent_ragged(&f, &fp, &ids, None, &config), &parts);
        assert_says(info_nce(set, &fp, &[set], None, &config), &parts);
    }
    Ok(())
}

#[test]
fn tokens_that_do_not_fit_are_named() -> Result<()> {
    let (z, zp) = pair(14, (2, 3, 4), DType::F32)?;
    let (f, fp) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let (z, zp) = (z.as_tensor(), zp.as_tensor());
    let zeros = |shape: (usize, usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let other = zeros((2, 4, 4), DType::F32)?;
    let ints = zeros((2, 3, 4), DType::U32)?;
    let empty = zeros((0, 3, 4), DType::F32)?;
    let double = zp.to_dtype(DType::F64)?;
    let ok = Contrastive::default();
    for (a, b, parts) in [
        (z, &other, &["one shape", "[2, 3, 4]", "[2, 4, 4]"][..]),
        (&f, &fp, &["rank 3", "nt_xent_ragged", "[6, 4]"]),
        (z, &double, &["one type", "f32", "f64"]),
        (&ints, &ints, &["f16, bf16, f32 or f64", "u32"]),
        (&empty, &empty, &["at least one token", "[0, 3, 4]"]),
    ] {
        for (run, op) in DIRECTIONS.into_iter().zip(["nt_xent:", "nt_xent_symmetric:"]) {
            assert_says(run(a, b, &ok), parts);
            assert_says(run(a, b, &ok), &[op]);
        }
    }

    let ids = [0, 0, 0, 1, 1, 1];
    let vector = f.flatten_all()?;
    let none = f.narrow(0, 0, 0)?;
    let double = fp.to_dtype(DType::F64)?;
    let all = &ids[..];
    let ones = [1f32; 6];
    let (mut negative, mut nan) = (ones, ones);
    (negative[3], nan[1]) = (-1.0, f32::NAN);
    let zero = [0f32; 6];
    for (a, b, ids, weights, parts) in [
        (&vector, &vector, all, None, &["rank 2", "[24]"][..]),
        (&none, &none, all, None, &["at least one token", "[0, 4]"]),
        (&f, &double, all, None, &["one type", "f32", "f64"]),
        (&f, &fp, &ids[..5], None, &["one image id per token, 6", "got 5"]),
        (&f, &fp, all, Some(&ones[..5]), &["one weight per token, 6", "got 5"]),
        (&f, &fp, all, Some(&negative[..]), &["weights", "at least 0", "-1"]),
        (&f, &fp, all, Some(&nan[..]), &["finite weights", "NaN"]),
        (&f, &fp, all, Some(&zero[..]), &["one weight above 0", "all 0"]),
    ] {
        assert_says(nt_xent_ragged(a, b, ids, weights, &ok), parts);
    }
    assert!(nt_xent_ragged(&f, &fp, &ids, Some(&ones), &ok).is_ok());
    Ok(())
}

#[test]
fn candidates_that_do_not_fit_are_named() -> Result<()> {
    let (z, zp) = pair(14, (2, 3, 4), DType::F32)?;
    let (f, fp) = (z.flatten(0, 1)?, zp.flatten(0, 1)?);
    let ids = [0, 0, 0, 1, 1, 1];
    let set = TokenSet { tokens: &f, labels: &ids };
    let narrow = f.narrow(1, 0, 3)?;
    let double = f.to_dtype(DType::F64)?;
    let short = TokenSet { labels: &ids[1..], ..set };
    let thin = TokenSet { tokens: &narrow, ..set };
    let wide = TokenSet { tokens: &double, ..set };
    let maps = TokenSet { tokens: &z, ..set };
    let config = Contrastive::default();
    for (anchors, candidates, parts) in [
        (set, &[][..], &["at least one set of candidates", "none"][..]),
        (set, &[short], &["one label per token, 6", "got 5"]),
        (short, &[set], &["one label per token, 6", "got 5"]),
        (set, &[set, thin], &["(M, 4)", "[6, 3]"]),
        (set, &[wide], &["one type", "f32", "f64"]),
        (maps, &[set], &["rank 2", "[2, 3, 4]"]),
    ] {
        let out = info_nce(anchors, &fp, candidates, None, &config);
        assert_says(out, parts);
    }
    assert!(info_nce(set, &fp, &[set], None, &config).is_ok());
    Ok(())
}
