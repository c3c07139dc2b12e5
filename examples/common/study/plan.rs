//! The runs of the study, the most important ones first.

use crate::settings::Method;

/// One configuration of a study, run with several seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// What it is compared within: `methods`, or the name of a sweep.
    pub group: &'static str,
    pub method: Method,
    /// What it is called in tables.
    pub variant: String,
    /// Options of the trainer.
    pub options: Vec<String>,
    pub seeds: u64,
}

impl Cell {
    fn new(
        group: &'static str,
        method: Method,
        variant: &str,
        options: &[&str],
        seeds: u64,
    ) -> Self {
        Self {
            group,
            method,
            variant: variant.to_string(),
            options: options.iter().map(|o| o.to_string()).collect(),
            seeds,
        }
    }

    /// The name of a run: of its folder, and of its line in the ledger.
    pub fn id(&self, seed: u64, epochs: usize) -> String {
        let variant = self.variant.replace([' ', '/', '='], "-");
        format!("{}-{variant}-seed{seed}-epochs{epochs}", self.method.name())
    }
}

/// Every cell. The preset's own configuration, `SER`, stands in `methods` only; the sweeps of MoCo-v3 are read beside it.
pub fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (method, seeds) in [
        (Method::MocoV3, 5),
        (Method::Dino, 3),
        (Method::BarlowTwins, 3),
    ] {
        cells.push(Cell::new(
            "methods",
            method,
            "baseline",
            &["--baseline"],
            seeds,
        ));
        cells.push(Cell::new(
            "methods",
            method,
            "λ=0",
            &["--lambda", "0"],
            seeds,
        ));
        cells.push(Cell::new("methods", method, "SER", &[], seeds));
    }
    let mut sweep = |group, variant: &str, options: &[&str], seeds| {
        cells.push(Cell::new(group, Method::MocoV3, variant, options, seeds));
    };
    for layer in ["1", "3", "4"] {
        sweep("layer", &format!("layer {layer}"), &["--layer", layer], 3);
    }
    sweep("group", "rotations", &["--group", "rotations"], 2);
    sweep("group", "flips", &["--group", "flips"], 2);
    sweep(
        "group",
        "scales",
        &[
            "--group",
            "none",
            "--scale",
            "0.7,1.3",
            "--aspect",
            "0.75,1.3333",
        ],
        2,
    );
    sweep(
        "group",
        "crops",
        &["--group", "none", "--crops", "0.5,1"],
        2,
    );
    for lambda in ["0.3", "3"] {
        sweep("lambda", &format!("λ={lambda}"), &["--lambda", lambda], 1);
    }
    for temperature in ["0.2", "0.5"] {
        sweep(
            "temperature",
            &format!("τ={temperature}"),
            &["--temperature", temperature],
            1,
        );
    }
    for (ratio, name) in [("0.0625", "1/16"), ("0.25", "1/4")] {
        sweep(
            "fraction",
            &format!("fraction {name}"),
            &["--ratio", ratio],
            1,
        );
    }
    // Turns and flips need no filter, so this sweep has scales besides.
    for filter in ["nearest", "bilinear", "bicubic"] {
        sweep(
            "filter",
            &format!("D4 and scales, {filter}"),
            &[
                "--scale",
                "0.7,1.3",
                "--aspect",
                "0.75,1.3333",
                "--filter",
                filter,
            ],
            1,
        );
    }
    cells
}
