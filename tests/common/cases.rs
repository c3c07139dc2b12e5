//! How often a property is tested, and what is kept of a failure.
#![allow(dead_code)]

use proptest::{prelude::ProptestConfig, test_runner::FileFailurePersistence};

/// The configuration of a property: `PROPTEST_CASES` cases, or `default`, which is small enough for
/// every run of the suite. A failing case is written to `tests/NAME.proptest-regressions`, which is
/// committed.
pub fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|v| v.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource(
            "proptest-regressions",
        ))),
        ..ProptestConfig::default()
    }
}
