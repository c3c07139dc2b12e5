//! The outcome of an evaluation: one value that goes to JSON, and tables for the terminal. Figures are percentages.

use serde::{Deserialize, Serialize};

use super::{
    border::Border,
    dense::Dense,
    detect::Detect,
    few::FewRow,
    matching::Matching,
    pose::Orbit,
    stability::{Corruptions, Perturbations},
};
use crate::encoder::Card;

/// All that was measured of an encoder; what was not asked for is empty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub encoder: String,
    /// What corruption errors and flips are relative to.
    pub reference: Option<String>,
    pub card: Card,
    /// Where the images come from and how they were divided.
    pub data: String,
    pub pictures: Counts,
    pub seed: u64,
    /// What lay beyond the border of moved images; `None` in files of older versions, where it was black.
    #[serde(default)]
    pub border: Option<Border>,
    /// Test images that were moved, drawn by class; `None` if none were.
    #[serde(default)]
    pub posed: Option<usize>,
    /// The probe on few labels, where that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub few: Vec<FewRow>,
    pub probe: Vec<ProbeRow>,
    pub knn: Vec<KnnRow>,
    pub poses: Vec<PoseRow>,
    pub corruptions: Option<Corruptions>,
    pub perturbations: Option<Perturbations>,
    pub dense: Option<Dense>,
    #[serde(default)]
    pub matching: Option<Matching>,
    #[serde(default)]
    pub boxes: Option<Detect>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub train: usize,
    pub test: usize,
}

/// The linear probe on one kind of features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProbeRow {
    pub features: String,
    pub accuracy: f64,
    /// Strength of the penalty, picked on a tenth of the training images.
    pub l2: f64,
    /// Accuracy on that tenth.
    pub held_out: Option<f64>,
}

/// Weighted 20-nearest neighbors on one kind of features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnnRow {
    pub features: String,
    pub accuracy: f64,
}

/// Robustness of one kind of features to transformations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoseRow {
    pub features: String,
    pub orbits: Vec<Orbit>,
}

impl Report {
    /// Prints a table for each part.
    pub fn print(&self) {
        println!("\n{} ({})", self.encoder, self.data);
        self.print_upright();
        self.print_few();
        self.print_poses();
        if let Some(corruptions) = &self.corruptions {
            print_corruptions(corruptions, self.pictures.test);
        }
        if let Some(perturbations) = &self.perturbations {
            print_perturbations(perturbations, self.pictures.test);
            println!("beyond the border: {}", self.border());
        }
        if let Some(dense) = &self.dense {
            print_dense(dense);
        }
        if let Some(matching) = &self.matching {
            print_matching(matching, self.pictures.test);
            println!("beyond the border: {}", self.border());
        }
        if let Some(boxes) = &self.boxes {
            print_boxes(boxes);
        }
    }

    fn border(&self) -> &'static str {
        self.border.map_or("black", Border::name)
    }

    fn print_upright(&self) {
        if self.probe.is_empty() && self.knn.is_empty() {
            return;
        }
        println!("\nUpright accuracy in %: linear probe, and weighted 20-nearest neighbors");
        println!("{:<22}{:>8}{:>8}{:>10}", "features", "probe", "20-NN", "L2");
        let mut names: Vec<&String> = self.probe.iter().map(|r| &r.features).collect();
        if names.is_empty() {
            names = self.knn.iter().map(|r| &r.features).collect();
        }
        for name in names {
            let probe = self.probe.iter().find(|r| &r.features == name);
            let knn = self.knn.iter().find(|r| &r.features == name);
            println!(
                "{name:<22}{:>8}{:>8}{:>10}",
                shown(probe.map(|r| r.accuracy)),
                shown(knn.map(|r| r.accuracy)),
                probe.map_or("-".to_string(), |r| format!("{:.0e}", r.l2)),
            );
        }
    }

    fn print_few(&self) {
        if self.few.is_empty() {
            return;
        }
        println!(
            "\nAccuracy in % of the probe on few labels, mean over draws; d4: mean over the eight elements"
        );
        println!("{:<22}{:>8}{:>9}{:>8}", "labels a class", "draws", "upright", "d4");
        for row in &self.few {
            println!(
                "{:<22}{:>8}{:>9.1}{:>8.1}",
                row.labels_per_class, row.draws, row.upright, row.d4
            );
        }
    }

    fn print_poses(&self) {
        if self.poses.is_empty() {
            return;
        }
        println!(
            "\nAccuracy in % over an orbit: d4, and small rotations, scales and shifts; on {}; beyond the border: {}",
            drawn(self.posed.unwrap_or(self.pictures.test), self.pictures.test),
            self.border()
        );
        print!("{:<22}{:<12}{:<7}", "features", "orbit", "by");
        for title in ["upright", "mean", "moved", "worst g", "all g", "agree", "averaged"] {
            print!("{title:>9}");
        }
        println!();
        for row in &self.poses {
            for orbit in &row.orbits {
                for (by, r) in [("probe", &orbit.probe), ("20-NN", &orbit.knn)] {
                    print!("{:<22}{:<12}{by:<7}", row.features, orbit.name);
                    let upright = r.accuracy.first().copied();
                    let averaged = (by == "probe").then_some(orbit.averaged);
                    for value in [
                        upright,
                        Some(r.mean),
                        Some(r.moved),
                        Some(r.worst_element),
                        Some(r.worst_case),
                        Some(r.consistency),
                        averaged,
                    ] {
                        print!("{:>9}", shown(value));
                    }
                    println!();
                }
            }
        }
    }
}

/// How many of all test images.
fn drawn(count: usize, all: usize) -> String {
    match count < all {
        true => format!("{count} of {all} test images, drawn by class"),
        false => format!("all {all} test images"),
    }
}

fn print_corruptions(c: &Corruptions, all: usize) {
    println!(
        "\nErrors of the probe in % on {} under 15 corruptions; CE relative to: {}",
        drawn(c.pictures, all),
        c.reference
    );
    println!(
        "{:<16}{:>7}{:>7}{:>7}{:>7}{:>7}{:>8}{:>8}{:>9}",
        "corruption", "1", "2", "3", "4", "5", "mean", "CE", "rel. CE"
    );
    for row in &c.each {
        print!("{:<16}", row.name);
        for error in &row.errors {
            print!("{error:>7.1}");
        }
        let mean = row.errors.iter().sum::<f64>() / row.errors.len().max(1) as f64;
        println!("{mean:>8.1}{:>8}{:>9}", shown(row.ce), shown(row.relative_ce));
    }
    println!(
        "clean error {:.1} (reference {:.1}), mean accuracy {:.1}, mCE {}, relative mCE {}",
        c.clean_error,
        c.clean_error_of_reference,
        c.mean_accuracy,
        shown(c.mce),
        shown(c.relative_mce)
    );
}

fn print_perturbations(p: &Perturbations, all: usize) {
    println!(
        "\nFlips of the probe in %, sequences of each kind from {}; rate relative to: {}",
        drawn(p.sequences, all),
        p.reference
    );
    println!("{:<16}{:>8}{:>11}{:>8}", "perturbation", "flips", "reference", "rate");
    for row in &p.each {
        println!(
            "{:<16}{:>8.2}{:>11.2}{:>8}",
            row.name,
            row.probability,
            row.probability_of_reference,
            shown(row.rate)
        );
    }
    println!("mFR {}", shown(p.mfr));
}

fn print_dense(d: &Dense) {
    println!(
        "\nTokens of block {} ({}x{} on canvases of {} pixels, {} to fit and {} to test), in %",
        d.layer, d.grid, d.grid, d.canvas_side, d.train_canvases, d.test_canvases
    );
    println!(
        "{:<22}{:>8}{:>12}{:>10}{:>8}{:>8}{:>8}{:>8}",
        "features", "mIoU", "token acc.", "box IoU", "AP@.5", "PCK@1", "exact", "chance"
    );
    for row in &d.rows {
        let c = &row.correspondence;
        println!(
            "{:<22}{:>8.1}{:>12.1}{:>10.1}{:>8.1}{:>8.1}{:>8.1}{:>8.1}",
            row.features,
            row.miou,
            row.token_accuracy,
            row.box_iou,
            row.ap50,
            c.pck1,
            c.exact,
            c.chance
        );
    }
}

fn print_matching(m: &Matching, all: usize) {
    println!(
        "\nMutual matches of the tokens of block {} ({}x{}) between two poses in %, on {}: that are exact or within a cell, \
         tokens that match, and relative poses found within half a token",
        m.layer,
        m.grid,
        m.grid,
        drawn(m.images, all)
    );
    print!("{:<22}{:<12}", "features", "poses");
    println!("{:>8}{:>8}{:>9}{:>12}", "exact", "near", "matched", "registered");
    for row in &m.rows {
        for (poses, s) in [("d4", row.d4), ("similarity", row.similarity)] {
            println!(
                "{:<22}{poses:<12}{:>8.1}{:>8.1}{:>9.1}{:>12.1}",
                row.features, s.exact, s.near, s.matched, s.registered
            );
        }
    }
}

fn print_boxes(d: &Detect) {
    println!("\nBoxes ({})", d.data);
    println!(
        "found by the tokens of block {} in windows of {} pixels, images scaled by {:.3}, {} to fit and {} to test; in %, \
         upright and on average over the seven other elements of D4",
        d.layer, d.window, d.scale, d.train_images, d.test_images
    );
    print!("{:<22}{:<9}{:>8}{:>8}{:>8}", "features", "poses", "AP@.5", "mIoU", "recall");
    d.classes.iter().for_each(|class| print!("  {class:>8}"));
    println!();
    for row in &d.rows {
        for score in row.poses.first().into_iter().chain([&row.moved]) {
            print!("{:<22}{:<9}", row.features, score.pose);
            for value in [Some(score.ap50), score.miou, Some(score.recall)] {
                print!("{:>8}", shown(value));
            }
            score.classes.iter().for_each(|value| print!("  {:>8}", shown(*value)));
            println!();
        }
    }
}

fn shown(value: Option<f64>) -> String {
    value.map_or("-".to_string(), |v| format!("{v:.1}"))
}
