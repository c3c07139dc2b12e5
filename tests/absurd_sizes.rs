//! Sizes and indices beyond reason are errors or harmless: no panic, no overflow, no allocation that cannot exist.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use rand::{SeedableRng, rngs::StdRng};
use ser_reg::{
    GridOperator, Layout, MapPair, Partition, Projector, ProjectorConfig, Regularizer, Resample,
    SerConfig, SerLoss, TokenGrid, ViewConfig, ViewSampler,
    fibre::FibreOperator,
    group::{D4, FieldType, Subgroup},
    loss::{self, Contrastive},
    metric::EqScore,
    schedule::Schedule,
};

const ABSURD: [usize; 5] = [usize::MAX, usize::MAX - 1, 1 << 63, (1 << 53) + 3, u32::MAX as usize];

type Case<'a> = (&'a str, Box<dyn Fn(usize) -> ser_reg::Result<()> + 'a>);

fn case<'a>(name: &'a str, run: impl Fn(usize) -> ser_reg::Result<()> + 'a) -> Case<'a> {
    (name, Box::new(run))
}

#[test]
fn absurd_sizes_and_indices_are_errors_or_harmless() {
    let device = &Device::Cpu;
    let grid = TokenGrid::square(2).unwrap();
    let tokens = Tensor::rand(0f32, 1.0, (2, 4, 3), device).unwrap();
    let tokens = &tokens;
    let variables = VarMap::new();
    let vb = || VarBuilder::from_varmap(&variables, DType::F32, device);
    let two = &GridOperator::new(&[D4::ROT90, D4::IDENTITY], grid, &Resample::default()).unwrap();
    let pair = |config: SerConfig| -> ser_reg::Result<()> {
        let sampler = ViewSampler::new(grid, ViewConfig::default())?;
        let views = sampler.sample_pair(&mut StdRng::seed_from_u64(0), 2)?;
        SerLoss::new(config)?.forward(&MapPair::new([tokens, tokens], &views.relative()))?;
        Ok(())
    };
    let pair = &pair;
    // `true`: every absurd value is refused.
    let cases: Vec<(bool, Case)> = vec![
        (true, case("rows", |n| TokenGrid::new(n, n).map(drop))),
        (true, case("square", |n| TokenGrid::square(n).map(drop))),
        (true, case("sample of an operator", |n| two.valid(n).map(drop))),
        (true, case("element of D4", |n| D4::from_index(n).map(drop))),
        (
            true,
            case("channels of a regular field", |n| {
                let field = FieldType::regular(Subgroup::D4, n - n % 8)?;
                FibreOperator::new(&field, &[D4::ROT90])?.apply(tokens).map(drop)
            }),
        ),
        (
            true,
            case("hidden width", |n| {
                let config = ProjectorConfig { hidden: n, ..Default::default() };
                Projector::new(3, config, vb()).map(drop)
            }),
        ),
        (
            true,
            case("output width", |n| {
                let config = ProjectorConfig { out: n, ..Default::default() };
                Projector::new(3, config, vb()).map(drop)
            }),
        ),
        (
            true,
            case("input channels", |n| {
                Projector::new(n, ProjectorConfig::default(), vb()).map(drop)
            }),
        ),
        (
            true,
            case("channels of a regularizer", |n| {
                Regularizer::new("x", grid, n, SerConfig::default(), vb()).map(drop)
            }),
        ),
        (
            true,
            case("views of a batch", |n| {
                let sampler = ViewSampler::new(grid, ViewConfig::default())?;
                sampler.sample_pair(&mut StdRng::seed_from_u64(0), n).map(drop)
            }),
        ),
        (false, case("batch of a partition", |n| Partition::new(n, 0.1).map(drop))),
        (
            true,
            case("prefix tokens", |n| {
                let layout = Layout { prefix: n, ..Default::default() };
                layout.tokens(tokens, grid).map(drop)
            }),
        ),
        (
            true,
            case("prefix of a regularizer", |n| {
                pair(SerConfig {
                    layout: Layout { prefix: n, ..Default::default() },
                    ..Default::default()
                })
            }),
        ),
        (
            false,
            case("most tokens", |n| pair(SerConfig { max_tokens: Some(n), ..Default::default() })),
        ),
        (
            false,
            case("bytes of a block", |n| {
                let contrastive = Contrastive { block_bytes: n, ..Default::default() };
                loss::nt_xent(tokens, tokens, &contrastive).map(drop)
            }),
        ),
        (
            false,
            case("images of a chunk", |n| {
                let score = EqScore { chunk: n, ..EqScore::new(grid) };
                let images = Tensor::rand(0f32, 1.0, (2, 3, 2, 2), device)?;
                score
                    .measure(&images, &D4::ALL, &mut StdRng::seed_from_u64(0), |x| Ok(x.clone()))
                    .map(drop)
            }),
        ),
        (
            false,
            case("steps of a schedule", |n| {
                for schedule in [Schedule::linear(0.0, 1.0, n)?, Schedule::cosine(0.0, 1.0, n)?] {
                    for schedule in
                        [schedule, schedule.warm_up(n), schedule.delay(n).warm_up_inclusive(n)]
                    {
                        for step in [0, 1, n - 1, n] {
                            assert!((0.0..=1.0).contains(&schedule.at(step)));
                        }
                    }
                }
                Ok(())
            }),
        ),
    ];
    for (refused, (name, run)) in &cases {
        for n in ABSURD {
            let result = catch_unwind(AssertUnwindSafe(|| run(n)));
            let result = result.unwrap_or_else(|_| panic!("{name}: panic at {n}"));
            assert!(!refused || result.is_err(), "{name}: {n} was accepted");
        }
    }
}
