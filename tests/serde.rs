//! Settings of the loss as JSON.
#![cfg(feature = "serde")]

use ser_reg::loss::{Contrastive, Negatives, SameImage};
use ser_reg::ser::{Objective, StopGradient};
use ser_reg::{Channels, Filter, Layout, ProjectorConfig, Resample, SerConfig};

fn round_trip<T>(value: &T) -> T
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let text = serde_json::to_string(value).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn contrasts() -> Vec<Contrastive> {
    let mut all = vec![Contrastive::default()];
    for negatives in [Negatives::BothViews, Negatives::OtherView] {
        for same_image in [SameImage::Exclude, SameImage::Keep] {
            all.push(Contrastive {
                temperature: 0.1,
                negatives,
                same_image,
                eps: 1e-7,
                block_bytes: 1 << 20,
            });
        }
    }
    all
}

fn objectives() -> Vec<Objective> {
    let mut all: Vec<_> = contrasts().into_iter().map(Objective::NtXent).collect();
    all.extend([
        Objective::Mse,
        Objective::NormalizedMse { eps: 1e-6 },
        Objective::Cosine { eps: 0.0 },
        Objective::L1,
        Objective::SmoothL1 { beta: 0.3 },
    ]);
    all
}

#[test]
fn settings_round_trip() {
    for contrastive in contrasts() {
        assert_eq!(round_trip(&contrastive), contrastive);
    }
    for objective in objectives() {
        assert_eq!(round_trip(&objective), objective);
        for stop_gradient in [StopGradient::None, StopGradient::Keys] {
            for max_tokens in [None, Some(300)] {
                let config = SerConfig {
                    lambda: 0.1 + 0.2,
                    objective,
                    symmetric: false,
                    stop_gradient,
                    layout: Layout { prefix: 5, channels: Channels::Last },
                    max_tokens,
                    resample: Resample::from(Filter::BicubicAntialias),
                };
                assert_eq!(round_trip(&config), config);
            }
        }
    }
    let head = ProjectorConfig { hidden: 7, out: 9, norm: false };
    assert_eq!(round_trip(&head), head);
}

#[test]
fn missing_settings_take_their_default() {
    let parse = |text| serde_json::from_str::<SerConfig>(text).unwrap();
    assert_eq!(parse("{}"), SerConfig::default());
    let config = parse(r#"{"lambda": 0.5, "objective": {"nt-xent": {"temperature": 0.5}}}"#);
    let contrastive = Contrastive { temperature: 0.5, ..Default::default() };
    let expected =
        SerConfig { lambda: 0.5, objective: Objective::NtXent(contrastive), ..Default::default() };
    assert_eq!(config, expected);
    let objective: Objective = serde_json::from_str(r#""mse""#).unwrap();
    assert_eq!(objective, Objective::Mse);
    assert!(serde_json::from_str::<Objective>(r#""ntxent""#).is_err());
}
