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

/// Groups of cells that vary one thing.
pub const SWEEPS: [&str; 7] =
    ["layer", "lambda", "temperature", "fraction", "group", "filter", "addons"];

/// Add-ons whose layer is varied: variants at the final layer, and at block 1 of 4, as deep as block 3 of 12.
pub const DECOUPLED: [[&str; 2]; 2] =
    [["EquiMod final", "EquiMod layer 1"], ["AugSelf final", "AugSelf layer 1"]];

/// The variant that a sweep departs from, and that its runs are paired with. Filters matter where something is resampled.
pub fn reference(group: &str) -> &'static str {
    match group {
        "filter" => "D4 and scales, bicubic",
        "addons" => "baseline",
        _ => "SER",
    }
}

/// Every cell. The preset's own configuration, `SER`, stands in `methods` only; the sweeps are read beside it.
pub fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (method, seeds) in [(Method::MocoV3, 5), (Method::Dino, 3), (Method::BarlowTwins, 3)] {
        cells.push(Cell::new("methods", method, "baseline", &["--baseline"], seeds));
        cells.push(Cell::new("methods", method, "λ=0", &["--lambda", "0"], seeds));
        cells.push(Cell::new("methods", method, "SER", &[], seeds));
    }
    let mut sweep = |group, variant: &str, options: &[&str]| {
        cells.push(Cell::new(group, Method::MocoV3, variant, options, 3));
    };
    for layer in ["1", "3", "4"] {
        sweep("layer", &format!("layer {layer}"), &["--layer", layer]);
    }
    sweep("group", "rotations", &["--group", "c4"]);
    sweep("group", "flips", &["--group", "flips"]);
    let scales = ["--scale", "0.7,1.3", "--aspect", "0.75,1.3333"];
    let only = ["--group", "trivial"];
    sweep("group", "scales", &[&only[..], &scales].concat());
    sweep("group", "crops", &[&only[..], &["--crops", "0.5,1"]].concat());
    for lambda in ["0.3", "3"] {
        sweep("lambda", &format!("λ={lambda}"), &["--lambda", lambda]);
    }
    for temperature in ["0.2", "0.5"] {
        let options = ["--temperature", temperature];
        sweep("temperature", &format!("τ={temperature}"), &options);
    }
    for (ratio, name) in [("0.0625", "1/16"), ("0.25", "1/4")] {
        sweep("fraction", &format!("fraction {name}"), &["--ratio", ratio]);
    }
    // Turns and flips need no filter, so this sweep has scales besides.
    for filter in ["nearest", "bilinear", "bicubic"] {
        let options = [&scales[..], &["--filter", filter]].concat();
        sweep("filter", &format!("D4 and scales, {filter}"), &options);
    }
    for ([coupled, decoupled], name) in DECOUPLED.into_iter().zip(["equimod", "augself"]) {
        for (variant, layer) in [(coupled, "4"), (decoupled, "1")] {
            let options = ["--baseline", "--addon", name, "--addon-layer", layer];
            sweep("addons", variant, &options);
        }
    }
    // Its base loss has the largest gradient of the three.
    let weaker = ["--lambda", "0.3"];
    cells.push(Cell::new("lambda", Method::BarlowTwins, "λ=0.3", &weaker, 3));
    cells
}
