//! The figures of a run, by name, from the files that it left.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::{
    eval::{Report, matching::Score},
    records::Record,
    run::finish::Outcome,
};

pub type Figures = BTreeMap<String, f64>;

/// Figures that each training has: the primary endpoints.
pub const PRIMARY: [&str; 4] = ["equivariance", "matching_d4_exact", "d4_mean", "probe"];

fn put(figures: &mut Figures, name: &str, value: Option<f64>) {
    if let Some(value) = value.filter(|v| v.is_finite()) {
        figures.insert(name.to_string(), value);
    }
}

/// What a training measured; `layer` is the tapped block.
pub fn training(figures: &mut Figures, outcome: &Outcome, records: &[Record], layer: usize) {
    let mut put = |name: &str, value| put(figures, name, value);
    put("knn", outcome.knn.first().copied());
    put("knn_poses", outcome.knn_poses);
    put("equivariance", outcome.score(layer));
    for (i, score) in outcome.equivariance.iter().enumerate() {
        put(&format!("equivariance_block{}", i + 1), *score);
    }
    put("feature_std", Some(f64::from(outcome.feature_std)));
    if let Some(last) = &outcome.last {
        put("invariance_loss", Some(f64::from(last.invariance)));
        put("equivariance_loss", last.equivariance.map(f64::from));
        put("matching", last.matching.map(|m| 100.0 * f64::from(m)));
    }
    put("images_per_s", Some(outcome.images_per_s));
    put("overhead_measured", outcome.overhead_measured);
    put("overhead_predicted", outcome.overhead_predicted);
    put("peak_mib", outcome.peak_mib);
    let ratios = gradient_ratios(records);
    put("gradient_ratio", median(&ratios));
    put("gradient_ratio_late", median(&ratios[ratios.len() / 2..]));
    let last = records.iter().rev().find_map(|record| match record {
        Record::Step(step) => Some(step.lambda),
        _ => None,
    });
    put("lambda_last", last);
}

/// `λ‖∇L_equiv‖ / ‖∇L_inv‖` on the shared parameters, at each step where both gradients were compared.
fn gradient_ratios(records: &[Record]) -> Vec<f64> {
    let lambda = |at: usize| {
        records.iter().find_map(|record| match record {
            Record::Step(step) if step.step == at => Some(step.lambda),
            _ => None,
        })
    };
    let ratio = |record: &Record| match record {
        Record::Balance(b) => Some(lambda(b.step)? * b.shared.ratio()?),
        _ => None,
    };
    records.iter().filter_map(ratio).collect()
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let above = *values.get(middle)?;
    match values.len() % 2 {
        0 => Some((values[middle - 1] + above) / 2.0),
        _ => Some(above),
    }
}

/// What an evaluation measured.
pub fn evaluation(figures: &mut Figures, report: &Report) {
    let mut put = |name: &str, value| put(figures, name, value);
    put("probe", report.probe.first().map(|r| r.accuracy));
    for row in &report.few {
        put(&format!("few{}_upright", row.labels_per_class), Some(row.upright));
        put(&format!("few{}_d4", row.labels_per_class), Some(row.d4));
    }
    for orbit in report.poses.first().iter().flat_map(|row| &row.orbits) {
        let name = &orbit.name;
        put(&format!("{name}_mean"), Some(orbit.probe.mean));
        put(&format!("{name}_moved"), Some(orbit.probe.moved));
        put(&format!("{name}_worst"), Some(orbit.probe.worst_element));
        put(&format!("{name}_consistency"), Some(orbit.probe.consistency));
        put(&format!("{name}_averaged"), Some(orbit.averaged));
    }
    if let Some(row) = report.matching.as_ref().and_then(|m| m.rows.first()) {
        let mut score = |kind: &str, score: Score| {
            put(&format!("matching_{kind}_exact"), Some(score.exact));
            put(&format!("matching_{kind}_near"), Some(score.near));
            put(&format!("matching_{kind}_matched"), Some(score.matched));
            put(&format!("matching_{kind}_registered"), Some(score.registered));
        };
        score("d4", row.d4);
        score("similarity", row.similarity);
    }
    let corruptions = report.corruptions.as_ref();
    put("corrupted", corruptions.map(|c| c.mean_accuracy));
    put("mce", corruptions.and_then(|c| c.mce));
    let flips = report
        .perturbations
        .as_ref()
        .map(|p| p.each.iter().map(|f| f.probability).sum::<f64>() / p.each.len() as f64);
    put("flips", flips);
}

/// A run without a finite value of a primary endpoint has failed.
pub fn check(figures: &Figures) -> Result<()> {
    let missing: Vec<&str> =
        PRIMARY.into_iter().filter(|name| !figures.contains_key(*name)).collect();
    ensure!(
        missing.is_empty(),
        "expected finite values of {}, got none of {}",
        PRIMARY.join(", "),
        missing.join(", ")
    );
    Ok(())
}

/// A paused run has no times: the trainer's clock went on.
pub fn without_times(figures: &mut Figures) {
    for name in ["images_per_s", "overhead_measured"] {
        figures.remove(name);
    }
}
