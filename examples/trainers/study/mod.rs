//! Many runs, paired by seed: what to run, what came out, and what it says.

pub mod endpoints;
pub mod first;
pub mod images;
pub mod ledger;
pub mod plan;
pub mod protocol;
pub mod record;
pub mod runs;
pub mod statistics;
pub mod summary;
pub mod tables;
