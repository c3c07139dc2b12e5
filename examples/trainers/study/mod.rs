//! Many runs, paired by seed: what to run, what came out, and what it says.

pub mod ledger;
pub mod plan;
pub mod statistics;
pub mod summary;
