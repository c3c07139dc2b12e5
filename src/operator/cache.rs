//! Chains that were built before: training meets the same few elements on the same few grids over and over.

use std::{
    any::Any,
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{Resample, Sample};
use crate::{Result, TokenGrid, group::GroupAction};

/// Bytes of operators that are kept, of all kinds together.
const MOST_BYTES: usize = 16 << 20;

/// How many are kept: looking through them must cost less than building one.
const MOST: usize = 64;

static CACHE: Mutex<Cache> = Mutex::new(Cache {
    entries: VecDeque::new(),
    bytes: 0,
});

/// The entries, the one used last in front.
struct Cache {
    entries: VecDeque<Entry>,
    bytes: usize,
}

/// What `element` does from one grid to another.
struct Entry {
    element: Box<dyn Any + Send>,
    place: Place,
    sample: Sample,
    bytes: usize,
}

/// What besides the element decides on its operator.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Place {
    pub from: TokenGrid,
    pub to: TokenGrid,
    pub resample: Resample,
}

/// The operator of `element` there: one that was kept, or what `build` makes, which is kept then.
pub(super) fn get<G: GroupAction>(
    element: &G,
    place: Place,
    build: impl FnOnce() -> Result<Sample>,
) -> Result<Sample> {
    if let Some(sample) = lock().find(element, place) {
        return Ok(sample);
    }
    // Others may look, and build, meanwhile.
    let sample = build()?;
    lock().insert(element, place, sample.clone());
    Ok(sample)
}

fn lock() -> MutexGuard<'static, Cache> {
    // A panic in somebody's comparison of elements leaves the entries whole.
    CACHE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    fn find<G: GroupAction>(&mut self, element: &G, place: Place) -> Option<Sample> {
        let same = |entry: &Entry| {
            entry.place == place && entry.element.downcast_ref::<G>() == Some(element)
        };
        let at = self.entries.iter().position(same)?;
        let entry = self.entries.remove(at)?;
        let sample = entry.sample.clone();
        self.entries.push_front(entry);
        Some(sample)
    }

    fn insert<G: GroupAction>(&mut self, element: &G, place: Place, sample: Sample) {
        let bytes = sample.bytes();
        if bytes > MOST_BYTES / 8 {
            return;
        }
        self.bytes += bytes;
        self.entries.push_front(Entry {
            element: Box::new(element.clone()),
            place,
            sample,
            bytes,
        });
        while self.entries.len() > MOST || self.bytes > MOST_BYTES {
            let Some(oldest) = self.entries.pop_back() else {
                break;
            };
            self.bytes -= oldest.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        GridOperator,
        group::{D4, Element, Window},
    };

    fn operator<G: GroupAction>(g: &G, side: usize, resample: Resample) -> GridOperator {
        GridOperator::new(
            std::slice::from_ref(g),
            TokenGrid::square(side).unwrap(),
            &resample,
        )
        .unwrap()
    }

    fn is_shared(a: &GridOperator, b: &GridOperator) -> bool {
        Arc::ptr_eq(&a.samples[0].chain, &b.samples[0].chain)
    }

    // One test: the cache is one for the process, and others of this file's tests would push entries out.
    #[test]
    fn an_operator_is_built_once_for_each_element_grid_and_filter_and_the_oldest_is_dropped() {
        let plain = Resample::default();
        let turn = operator(&D4::rot90(1), 9, plain);
        assert!(is_shared(&turn, &operator(&D4::rot90(1), 9, plain)));
        assert!(!is_shared(&turn, &operator(&D4::rot90(3), 9, plain)));
        assert!(!is_shared(&turn, &operator(&D4::rot90(1), 11, plain)));
        let nearest = crate::Filter::Nearest.into();
        assert!(!is_shared(&turn, &operator(&D4::rot90(1), 9, nearest)));
        // equal elements of another type are others
        let element = operator(&Element::from(D4::rot90(1)), 9, plain);
        assert!(!is_shared(&turn, &element));
        // the adjoint is found once, too
        let adjoint = |operator: &GridOperator| operator.adjoint().samples[0].chain.clone();
        assert!(Arc::ptr_eq(&adjoint(&turn), &adjoint(&turn)));

        let window = |i: usize| Window::new(0.0, 0.0, 1.0, 0.5 + i as f64 / 1e4).unwrap();
        let first = operator(&window(0), 9, plain);
        for i in 1..2 * MOST {
            operator(&window(i), 9, plain);
        }
        assert!(!is_shared(&first, &operator(&window(0), 9, plain)));
        assert!(lock().entries.len() <= MOST);

        for side in (200..1200).step_by(50) {
            operator(&D4::rot90(1), side, plain);
        }
        let cache = lock();
        assert!(cache.bytes <= MOST_BYTES);
        assert_eq!(
            cache.bytes,
            cache.entries.iter().map(|e| e.bytes).sum::<usize>()
        );
        assert!(cache.entries.len() > 1);
    }
}
