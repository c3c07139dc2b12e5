//! The evaluation of a frozen encoder.
//!
//! Features are computed once, for a linear probe and for nearest neighbors. Then the probe classifies transformed, corrupted
//! and slowly changing images. At last the tokens of one block are read.

pub mod border;
pub mod corruption;
pub mod dense;
pub mod features;
pub mod few;
pub mod matching;
pub mod perturbation;
pub mod pose;
pub mod probe;
pub mod report;
pub mod stability;
pub mod subject;
pub mod watch;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use indicatif::ProgressBar;

pub use features::raw_pixels;
pub use report::Report;
pub use subject::Subject;
pub use watch::{Evaluation, POSES, pose_mean};

use self::{
    border::Border,
    corruption::{Corruption, SEVERITIES},
    perturbation::Perturbation,
    probe::{Probe, accuracy},
    report::{Counts, KnnRow, PoseRow, ProbeRow},
    stability::Classifier,
};
use super::{data::Images, knn::Bank};

/// A part of the evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Probe,
    Knn,
    Poses,
    Corruptions,
    Perturbations,
    Dense,
    Matching,
}

impl Part {
    pub const ALL: [Self; 7] = [
        Self::Probe,
        Self::Knn,
        Self::Poses,
        Self::Corruptions,
        Self::Perturbations,
        Self::Dense,
        Self::Matching,
    ];

    /// Whether the part classifies images, so that it needs their labels.
    pub fn needs_labels(self) -> bool {
        !matches!(self, Self::Dense | Self::Matching)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Knn => "knn",
            Self::Poses => "poses",
            Self::Corruptions => "corruptions",
            Self::Perturbations => "perturbations",
            Self::Dense => "dense",
            Self::Matching => "matching",
        }
    }
}

impl std::str::FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let part = Self::ALL.into_iter().find(|p| p.name() == name);
        let Some(part) = part else {
            let names = Self::ALL.map(Self::name).join(", ");
            bail!("expected some of {names}, got {name:?}");
        };
        Ok(part)
    }
}

/// What to measure, and on how many images.
#[derive(Clone, Debug)]
pub struct Options {
    pub parts: Vec<Part>,
    /// Test images that are moved, drawn by class; `None`: all.
    pub posed: Option<usize>,
    /// Numbers of labels a class that the part probe is measured with besides.
    pub few: Vec<usize>,
    /// Test images that are corrupted, drawn by class; `None`: all.
    pub corrupted: Option<usize>,
    /// Test images that perturbations start from, drawn by class, each with some thirty frames.
    pub sequences: usize,
    pub dense: dense::Options,
    pub matching: matching::Options,
    /// Whether to measure raw pixels, and the reference where it is not asked for anyway.
    pub floors: bool,
    /// Everything random follows from it.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            parts: Part::ALL.to_vec(),
            posed: None,
            few: Vec::new(),
            corrupted: None,
            sequences: 200,
            dense: dense::Options::default(),
            matching: matching::Options::default(),
            floors: true,
            seed: 0,
        }
    }
}

impl Options {
    /// All parts in little time: the encoder alone where no reference is needed, on `images` of the test images.
    pub fn quick(images: usize) -> Self {
        Self {
            posed: Some(images),
            corrupted: Some(images),
            sequences: 50.min(images),
            dense: dense::Options { train: 150, test: 75, ..dense::Options::default() },
            matching: matching::Options { images, ..matching::Options::default() },
            floors: false,
            ..Self::default()
        }
    }
}

/// Features of both sets and what was fitted to the first of them.
struct Fitted {
    train: Tensor,
    test: Tensor,
    probe: Option<Probe>,
    bank: Bank,
}

impl Fitted {
    fn new(train: Tensor, labels: &[u32], test: Tensor, probed: bool) -> Result<Self> {
        Ok(Self {
            probe: probed.then(|| Probe::fit(&train, labels)).transpose()?,
            bank: Bank::new(&train, labels)?,
            train,
            test,
        })
    }

    fn probe(&self) -> Result<&Probe> {
        self.probe.as_ref().context("no probe was fitted")
    }
}

/// Evaluates `subject`, with classifiers of the upright images `bank`, on `test`; corruptions and perturbations relative to
/// `reference`, by default the same encoder before its first step.
pub fn evaluate(
    subject: &Subject,
    reference: Option<&Subject>,
    bank: &Images,
    test: &Images,
    options: &Options,
    progress: &ProgressBar,
) -> Result<Report> {
    let has = |part: Part| options.parts.contains(&part);
    ensure!(!options.parts.is_empty(), "expected at least one part to evaluate, got none");
    let classified = options.parts.iter().any(|p| p.needs_labels());
    ensure!(
        !test.is_empty() && !bank.is_empty() && (bank.are_labelled() || !classified),
        "expected test images, and training images of at least two classes, got {} and {} of class {:?}",
        test.len(),
        bank.len(),
        bank.labels.first()
    );
    let relative = has(Part::Corruptions) || has(Part::Perturbations);
    let untrained;
    let reference = match reference {
        _ if !relative && !options.floors => None,
        Some(reference) => Some(reference),
        None => {
            untrained = Subject::untrained(&subject.card, &subject.device)?;
            Some(&untrained)
        }
    };
    for encoder in [Some(subject), reference].into_iter().flatten() {
        encoder.expect(bank)?;
        encoder.expect(test)?;
    }
    // One choice for all that moves images.
    let border = Border::of(test);
    let floor = reference.filter(|_| options.floors);

    // Two parts read tokens, all others features of whole images, and most of them by a probe.
    let needed = classified;
    let probed = relative || has(Part::Probe) || has(Part::Poses);
    let raw = options.floors && (has(Part::Probe) || has(Part::Knn));
    let encoders = 1 + usize::from(reference.is_some());
    let rows = 1 + usize::from(floor.is_some());
    let steps = |wanted: bool, count: usize| if wanted { count as u64 } else { 0 };
    progress.set_length(
        steps(needed, 2 * encoders)
            + steps(raw, 1)
            + steps(has(Part::Probe) && !options.few.is_empty(), 1)
            + steps(has(Part::Poses), rows * pose::ELEMENTS)
            + steps(has(Part::Corruptions), Corruption::ALL.len() * SEVERITIES)
            + steps(has(Part::Perturbations), Perturbation::ALL.len())
            + steps(has(Part::Dense), rows + usize::from(options.floors))
            + steps(has(Part::Matching), rows + usize::from(options.floors) + 1),
    );
    let begin = |what: &'static str| progress.set_message(what);
    let done = || progress.inc(1);

    let fit = |encoder: &Subject| -> Result<Fitted> {
        let (statistics, device) = (&encoder.card.statistics, &encoder.device);
        begin("features");
        let of = |images| features::of(images, statistics, device, None, |x| encoder.encode(x));
        let (train, test) = (of(bank)?, of(test)?);
        done();
        begin("probe");
        let fitted = Fitted::new(train, &bank.labels, test, probed)?;
        done();
        Ok(fitted)
    };
    let own = if needed { Some(fit(subject)?) } else { None };
    let other = match reference {
        Some(reference) if needed => Some((reference, fit(reference)?)),
        _ => None,
    };

    let mut report = Report {
        encoder: subject.name.clone(),
        reference: reference.map(|r| r.name.clone()),
        card: subject.card.clone(),
        data: String::new(),
        pictures: Counts { train: bank.len(), test: test.len() },
        seed: options.seed,
        border: Some(border),
        posed: None,
        few: Vec::new(),
        probe: Vec::new(),
        knn: Vec::new(),
        poses: Vec::new(),
        corruptions: None,
        perturbations: None,
        dense: None,
        matching: None,
    };
    let mut rows: Vec<(&str, &Fitted)> = Vec::new();
    rows.extend(own.iter().map(|own| (subject.name.as_str(), own)));
    let floors = other.iter().filter(|_| options.floors);
    rows.extend(floors.map(|(reference, fitted)| (reference.name.as_str(), fitted)));
    for (name, fitted) in &rows {
        report.add(name, fitted, test, &has)?;
    }
    if raw {
        begin("raw pixels");
        let of = |images: &Images| {
            let statistics = &subject.card.statistics;
            features::of(images, statistics, &subject.device, None, raw_pixels)
        };
        let fitted = Fitted::new(of(bank)?, &bank.labels, of(test)?, has(Part::Probe))?;
        report.add("raw pixels", &fitted, test, &has)?;
        done();
    }

    if let (true, false, Some(own)) = (has(Part::Probe), options.few.is_empty(), &own) {
        begin("few labels");
        let upright = few::Upright { train: &own.train, labels: &bank.labels, test: &own.test };
        report.few = {
            let (posed, seed) = (options.posed.unwrap_or(test.len()), options.seed);
            few::measure(subject, &upright, test, border, &options.few, posed, seed)?
        };
        done();
    }
    if has(Part::Poses) {
        begin("poses");
        let indices = test.drawn(options.posed.unwrap_or(test.len()));
        let shown = test.pick(&indices);
        report.posed = Some(shown.len());
        let rows: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        let mut add = |encoder: &Subject, fitted: &Fitted| -> Result<()> {
            let (probe, near) = (fitted.probe()?, &fitted.bank);
            let rows = Tensor::new(&rows[..], fitted.test.device())?;
            let upright = fitted.test.index_select(&rows, 0)?;
            report.poses.push(PoseRow {
                features: encoder.name.clone(),
                orbits: pose::measure(encoder, probe, near, &shown, &upright, border, done)?,
            });
            Ok(())
        };
        if let Some(own) = &own {
            add(subject, own)?;
        }
        if let (Some((reference, fitted)), Some(_)) = (&other, floor) {
            add(reference, fitted)?;
        }
    }
    if relative {
        let (own, other) = (own.as_ref(), other.as_ref());
        let (own, (reference, other)) = own.zip(other).context("no features to classify")?;
        let classifier = Classifier { subject, probe: own.probe()? };
        let reference = Classifier { subject: reference, probe: other.probe()? };
        let seed = options.seed;
        if has(Part::Corruptions) {
            begin("corruptions");
            let count = options.corrupted.unwrap_or(test.len());
            let errors = stability::corruptions(&classifier, &reference, test, count, seed, done)?;
            report.corruptions = Some(errors);
        }
        if has(Part::Perturbations) {
            begin("perturbations");
            let count = options.sequences;
            let flips =
                stability::perturbations(&classifier, &reference, test, border, count, seed, done)?;
            report.perturbations = Some(flips);
        }
    }
    let subjects: Vec<&Subject> = [Some(subject), floor].into_iter().flatten().collect();
    if has(Part::Dense) {
        begin("dense");
        let (options, floors, seed) = (&options.dense, options.floors, options.seed);
        let dense = dense::measure(&subjects, floors, bank, test, options, seed, done)?;
        report.dense = Some(dense);
    }
    if has(Part::Matching) {
        begin("matching");
        let (floors, seed, options) = (options.floors, options.seed, &options.matching);
        let matching = matching::measure(&subjects, floors, test, border, options, seed, done)?;
        report.matching = Some(matching);
    }
    Ok(report)
}

impl Report {
    fn add(
        &mut self,
        name: &str,
        fitted: &Fitted,
        test: &Images,
        has: &impl Fn(Part) -> bool,
    ) -> Result<()> {
        let features = name.to_string();
        if has(Part::Probe) {
            let probe = fitted.probe()?;
            self.probe.push(ProbeRow {
                features: features.clone(),
                accuracy: accuracy(&probe.predict(&fitted.test)?, &test.labels),
                l2: probe.l2,
                held_out: probe.held_out,
            });
        }
        if has(Part::Knn) {
            self.knn.push(KnnRow {
                features,
                accuracy: fitted.bank.accuracy(&fitted.test, &test.labels)?,
            });
        }
        Ok(())
    }
}
