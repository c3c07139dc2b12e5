//! What is contrasted with what.

use candle_core::{DType, Tensor};

use crate::loss::contrastive::Negatives;

/// Distinct token sets, known by their index. A tensor in several roles is entered once and has one gradient.
#[derive(Default)]
pub(in crate::loss) struct Sets(pub(super) Vec<Tensor>);

impl Sets {
    /// The index of `x` (…, D), whose rows are its tokens. A new tensor is added.
    pub(in crate::loss) fn enter(&mut self, x: &Tensor) -> usize {
        match self.0.iter().position(|known| known.id() == x.id()) {
            Some(index) => index,
            None => {
                self.0.push(x.clone());
                self.0.len() - 1
            }
        }
    }
}

/// The sets of one direction by index, with the labels of their rows.
pub(in crate::loss) struct Roles<'a> {
    pub(in crate::loss) anchors: (usize, &'a [u32]),
    pub(in crate::loss) positives: usize,
    pub(in crate::loss) candidates: Vec<(usize, &'a [u32])>,
}

/// What is contrasted with what.
pub(in crate::loss) enum Task<'a> {
    Directed(Roles<'a>),
    /// The mean of both directions between two sets whose rows correspond and share their labels.
    Symmetric {
        pair: [usize; 2],
        labels: &'a [u32],
    },
}

impl<'a> Task<'a> {
    /// One direction between two sets whose rows correspond.
    pub(in crate::loss) fn toward(
        [anchors, positives]: [usize; 2],
        labels: &'a [u32],
        negatives: Negatives,
    ) -> Roles<'a> {
        let candidates = match negatives {
            Negatives::BothViews => vec![(anchors, labels), (positives, labels)],
            Negatives::OtherView => vec![(positives, labels)],
        };
        Roles { anchors: (anchors, labels), positives, candidates }
    }

    pub(super) fn anchors(&self) -> &'a [u32] {
        match self {
            Self::Directed(roles) => roles.anchors.1,
            Self::Symmetric { labels, .. } => labels,
        }
    }
}

/// The margin by which a positive must beat every negative to count as correct.
///
/// It is larger than the rounding of two kernels, so that a collapsed encoder has accuracy 0.
pub(super) fn margin(width: usize, dtype: DType) -> f64 {
    let epsilon = match dtype {
        DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON),
    };
    8.0 * epsilon * (width as f64).sqrt()
}
