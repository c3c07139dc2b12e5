//! Records that a work-stealing pool ran away from their capture.
//!
//! A pool may run a part of a capture's forward pass on another of its threads. There the record finds no capture. In the
//! meantime the capture's own thread may run another forward pass that records the same name. So a capture on a thread of a
//! pool asks here whether its layer was also recorded on another thread, outside of captures and shields.

use std::{
    fmt::Display,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// The number of watches, so that a record without a capture costs one load while there are none.
static OPEN: AtomicUsize = AtomicUsize::new(0);
static WATCHES: Mutex<Vec<Arc<Seen>>> = Mutex::new(Vec::new());

fn watches() -> MutexGuard<'static, Vec<Arc<Seen>>> {
    WATCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The layers of a capture, and whether each was recorded elsewhere.
struct Seen(Vec<(String, AtomicBool)>);

impl Seen {
    fn flag(&self, name: &str) -> Option<&AtomicBool> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, flag)| flag)
    }
}

/// Watches the layers of one capture until it is dropped.
pub struct Watch(Arc<Seen>);

impl Watch {
    /// `None` outside of pools, where no other forward pass can run on the capture's thread.
    pub fn open(names: &[impl AsRef<str>]) -> Option<Self> {
        rayon::current_thread_index()?;
        let flags = names.iter().map(|n| (n.as_ref().to_string(), AtomicBool::new(false)));
        let seen = Arc::new(Seen(flags.collect()));
        watches().push(seen.clone());
        OPEN.fetch_add(1, Ordering::SeqCst);
        Some(Self(seen))
    }

    /// Whether `name` was recorded on a thread of a pool, outside of captures and shields.
    pub fn strayed(&self, name: &str) -> bool {
        self.0.flag(name).is_some_and(|flag| flag.load(Ordering::SeqCst))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::SeqCst);
        watches().retain(|seen| !Arc::ptr_eq(seen, &self.0));
    }
}

/// Tells the watches of a record that found neither a capture nor a shield.
pub fn record(name: impl Display) {
    if OPEN.load(Ordering::SeqCst) == 0 || rayon::current_thread_index().is_none() {
        return;
    }
    let name = name.to_string();
    for flag in watches().iter().filter_map(|seen| seen.flag(&name)) {
        flag.store(true, Ordering::SeqCst);
    }
}
