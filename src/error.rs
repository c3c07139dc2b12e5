//! The one error type of the crate: every message says what was expected, what came and what to do.

use std::fmt::Display;

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Configuration is checked when it is built, shapes at the call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value outside its range.
    #[error("{field}: expected {expected}, got {got}")]
    Config {
        /// The field or argument.
        field: &'static str,
        /// The values that are accepted.
        expected: String,
        /// The value that came.
        got: String,
    },
    /// A tensor, slice or grid whose shape, type or device does not fit the call.
    #[error("{op}: expected {expected}, got {got}")]
    Input {
        /// The operation that was called.
        op: &'static str,
        /// What it accepts, with the cure where there is one.
        expected: String,
        /// What came.
        got: String,
    },
    /// A tap that the forward pass did not reach exactly once.
    #[error("{0}")]
    Tap(String),
    /// Parameters that the gradient of a loss does not reach.
    #[error(
        "the gradient does not reach {} of {total} parameters{}{}{}; look for a layer that cuts the graph (candle-nn's \
         LayerNorm, RmsNorm and softmax_last_dim do, silently), a detach() on the way, or a weight of zero",
        absent.len() + zero.len() + not_finite.len(),
        list("no gradient", absent), list("all zero", zero), list("not finite", not_finite),
    )]
    Unreached {
        /// Parameters without a gradient: the graph is cut before them, or never held them.
        absent: Vec<String>,
        /// Parameters whose gradient is zero in every element.
        zero: Vec<String>,
        /// Parameters whose gradient holds a NaN or an infinity.
        not_finite: Vec<String>,
        /// How many parameters were checked.
        total: usize,
    },
    /// An error of candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub fn config(field: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Config {
            field,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    pub fn input(op: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Input {
            op,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

/// `; <what> at: a, b`, or nothing if there are no names.
fn list(what: &str, names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; {what} at: {}", names.join(", ")),
    }
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            e => candle_core::Error::wrap(e),
        }
    }
}
