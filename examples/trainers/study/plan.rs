//! The runs of docs/study/protocol.md, in the order in which they are made.

use std::{fmt, ops::Range, str::FromStr};

use anyhow::{Result, bail};

use crate::settings::Method;

/// A group of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    A,
    B,
    C,
    D,
    E,
    F,
    G,
    H,
    I,
}

impl Group {
    pub const ALL: [Self; 9] =
        [Self::A, Self::B, Self::C, Self::D, Self::E, Self::F, Self::G, Self::H, Self::I];

    pub fn name(self) -> &'static str {
        ["A", "B", "C", "D", "E", "F", "G", "H", "I"][self as usize]
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::A => "MoCo-v3 on three sets of images",
            Self::B => "DINO and Barlow Twins",
            Self::C => "λ, its balance and its decay",
            Self::D => "layers",
            Self::E => "one more epoch of a finished baseline",
            Self::F => "all of CIFAR-10, ten epochs",
            Self::G => "boxes of BCCD",
            Self::H => "few labels, on the encoders of A",
            Self::I => "corruptions and perturbations, on the encoders of A",
        }
    }
}

impl FromStr for Group {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|group| group.name() == name) {
            Some(group) => Ok(group),
            None => bail!("expected groups of the study, A to I, got {name}"),
        }
    }
}

/// A set of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    Eurosat,
    Cifar10,
    /// Without a choice of images.
    Cifar10All,
    FashionMnist,
    Bccd,
}

impl Set {
    pub const ALL: [Self; 5] =
        [Self::Eurosat, Self::Cifar10, Self::Cifar10All, Self::FashionMnist, Self::Bccd];

    pub fn name(self) -> &'static str {
        match self {
            Self::Eurosat => "eurosat",
            Self::Cifar10 => "cifar10",
            Self::Cifar10All => "cifar10-all",
            Self::FashionMnist => "fashion-mnist",
            Self::Bccd => "bccd",
        }
    }

    /// The name under which `--data` gives its folder; `None`: it comes with the repository.
    pub fn given_as(self) -> Option<&'static str> {
        match self {
            Self::Cifar10All => Some("cifar10"),
            Self::FashionMnist => None,
            _ => Some(self.name()),
        }
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a run consists of.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// A training with these options, and an evaluation.
    Train(Vec<String>),
    /// The same from the finished encoder of this variant of group A, of one seed and one set.
    Continue(&'static str, Vec<String>),
    /// An evaluation alone, with these options, of the encoder of group A of the same variant.
    Evaluate(Vec<String>),
    /// What this version cannot run, and why.
    Missing(&'static str),
}

/// One configuration of the study, run with several seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub group: Group,
    pub set: Set,
    pub method: Method,
    /// What it is called in tables.
    pub variant: String,
    pub epochs: usize,
    pub seeds: Range<u64>,
    pub work: Work,
}

impl Cell {
    /// The name of a run: of its folder, and of its line in the ledger.
    pub fn id(&self, seed: u64) -> String {
        let letters = |c: char| if "+/=, ".contains(c) { '-' } else { c };
        let variant: String = self.variant.chars().map(letters).collect();
        format!(
            "{}-{}-{}-{variant}-seed{seed}-epochs{}",
            self.group.name(),
            self.set,
            self.method.name(),
            self.epochs
        )
    }

    /// The run of group A whose encoder it needs.
    pub fn source(&self, seed: u64) -> Option<String> {
        let (variant, epochs) = match &self.work {
            Work::Continue(variant, _) => (variant.to_string(), EPOCHS),
            Work::Evaluate(_) => (self.variant.clone(), self.epochs),
            Work::Train(_) | Work::Missing(_) => return None,
        };
        Some(Self { group: Group::A, variant, epochs, ..self.clone() }.id(seed))
    }
}

/// Epochs of a run, unless its group has others.
pub const EPOCHS: usize = 5;
/// No trial had a seed from here on.
pub const FIRST_SEED: u64 = 100;

/// The variants of group A.
pub const VARIANTS: [&str; 4] = ["baseline", "λ=0", "paper", "own"];
/// The sets of color images in which poses matter.
pub const COLOR: [Set; 2] = [Set::Eurosat, Set::Cifar10];

const BASELINE: &[&str] = &["--baseline"];
const PAPER: &[&str] = &["--ser-images", "batch"];
const OWN: &[&str] = &["--ser-images", "own"];
/// Gradients are compared as often in all runs with the loss. It does not change the training.
const WATCHED: &[&str] = &["--balance-every", "50"];
/// Whatever the presets are later.
const FIXED: &[&str] =
    &["--preset", "fashion-tiny", "--group", "d4", "--ratio", "0.125", "--temperature", "0.3"];

fn options(parts: &[&[&str]]) -> Vec<String> {
    [FIXED].iter().chain(parts).flat_map(|part| part.iter()).map(|o| o.to_string()).collect()
}

/// Options of a run with the loss.
fn ser(form: &[&str], lambda: &str, layer: &str, more: &[&str]) -> Vec<String> {
    options(&[form, &["--lambda", lambda, "--layer", layer], WATCHED, more])
}

/// Options of a variant of group A.
fn variant(name: &str) -> Vec<String> {
    let block = &["--layer", "2"][..];
    match name {
        "baseline" => options(&[BASELINE, block]),
        "λ=0" => options(&[PAPER, &["--lambda", "0"], block]),
        "paper" => ser(PAPER, "1", "2", &[]),
        _ => ser(OWN, "1", "2", &[]),
    }
}

/// Candidates for the default that group C adds to those of group A.
pub fn candidates() -> Vec<(String, Vec<String>)> {
    let mut candidates = Vec::new();
    for (name, form) in [("own", OWN), ("paper", PAPER)] {
        for lambda in ["0.1", "0.3"] {
            candidates.push((format!("{name}, λ={lambda}"), ser(form, lambda, "2", &[])));
        }
    }
    candidates.push(("own, λ=3".to_string(), ser(OWN, "3", "2", &[])));
    for target in ["0.05", "0.2"] {
        let name = format!("own, balance {target}");
        candidates.push((name, ser(OWN, "1", "2", &["--balance-target", target])));
    }
    candidates.push(("own, λ 1 to 0".to_string(), ser(OWN, "1", "2", &["--lambda-end", "0"])));
    candidates
}

/// Every cell, the most important ones first. `extended` names a candidate that gets as many seeds as group A.
pub fn cells(extended: Option<&str>) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut add = |group, set, method, variant: &str, epochs, seeds, work| {
        let (variant, seeds) = (variant.to_string(), FIRST_SEED..FIRST_SEED + seeds);
        cells.push(Cell { group, set, method, variant, epochs, seeds, work });
    };
    let of_a = |set| if set == Set::FashionMnist { 5 } else { 8 };
    let sets = [Set::Eurosat, Set::Cifar10, Set::FashionMnist];
    let moco = Method::MocoV3;
    for set in sets {
        for name in VARIANTS {
            add(Group::A, set, moco, name, EPOCHS, of_a(set), Work::Train(variant(name)));
        }
    }
    for set in COLOR {
        for (name, options) in candidates() {
            let seeds = if extended == Some(&name) { 8 } else { 4 };
            add(Group::C, set, moco, &name, EPOCHS, seeds, Work::Train(options));
        }
    }
    for method in [Method::Dino, Method::BarlowTwins] {
        for name in ["baseline", "paper", "own"] {
            let work = Work::Train(variant(name));
            add(Group::B, Set::Eurosat, method, name, EPOCHS, 5, work);
        }
    }
    for layer in ["1", "3", "4"] {
        let work = Work::Train(ser(OWN, "1", layer, &[]));
        add(Group::D, Set::Eurosat, moco, &format!("own, layer {layer}"), EPOCHS, 4, work);
    }
    for set in COLOR {
        for name in ["baseline", "own"] {
            let work = Work::Continue("baseline", variant(name));
            add(Group::E, set, moco, &format!("+1 epoch, {name}"), 1, 8, work);
        }
    }
    for name in ["baseline", "own"] {
        add(Group::F, Set::Cifar10All, moco, name, 10, 2, Work::Train(variant(name)));
    }
    for name in ["baseline", "paper", "own"] {
        let why = "its runs are not built yet";
        add(Group::G, Set::Bccd, moco, name, EPOCHS, 4, Work::Missing(why));
    }
    let words = |words: &[&str]| Work::Evaluate(words.iter().map(|w| w.to_string()).collect());
    for set in sets {
        for name in VARIANTS {
            let few = words(&["--only", "probe", "--labels-per-class", "1,5,20"]);
            add(Group::H, set, moco, name, EPOCHS, of_a(set), few);
        }
    }
    for set in COLOR {
        for name in VARIANTS {
            let work = words(&["--only", "probe,corruptions,perturbations"]);
            add(Group::I, set, moco, name, EPOCHS, 5, work);
        }
    }
    cells
}

/// What a smoke run makes, on images that come with the repository: two trainings of as many epochs as the trainers make of it,
/// and an evaluation with few labels.
pub fn smoke() -> Vec<Cell> {
    let mut cells = cells(None);
    cells.retain(|cell| {
        let chosen = match cell.group {
            Group::A => ["baseline", "own"].contains(&cell.variant.as_str()),
            Group::H => cell.variant == "own",
            _ => false,
        };
        chosen && cell.set == Set::FashionMnist
    });
    for cell in &mut cells {
        cell.epochs = 2;
        cell.seeds = FIRST_SEED..FIRST_SEED + 1;
    }
    cells
}
