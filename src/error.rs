//! The error type of the crate. Each message says what was expected, what came, and what to do.

use std::fmt::{self, Display};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Settings are checked when they are built, shapes at the call.
///
/// `Debug` prints the message, so that `fn main() -> Result<()>` shows it.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting outside its range.
    #[error("{field}: expected {expected}, got {got}")]
    Config {
        /// The setting or argument.
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
        /// The inputs that are accepted, with the cure where there is one.
        expected: String,
        /// The input that came.
        got: String,
    },
    /// No token of the batch counts: the views of every image have no token in common, or all weights are 0.
    ///
    /// A trainer can match on it and skip the step.
    #[error(
        "SerLoss: expected at least one token of weight above 0 that both views see, got no overlap in any of {images} \
         images (draw larger crops, smaller angles and shifts, or set ViewConfig::min_overlap)"
    )]
    NoOverlap {
        /// The number of images in the batch.
        images: usize,
    },
    /// Parameters that the gradient of a loss does not reach.
    #[error(
        "the gradient does not reach {} of {total} parameters{}{}{}. SER's gradient reaches the layers before the tap only: \
         leave out those behind it. Before the tap, look for a layer that cuts the graph: replace candle-nn's LayerNorm by \
         `candle_nn::ops::layer_norm_slow`, `softmax_last_dim` by `candle_nn::ops::softmax(x, D::Minus1)`, and look for a \
         `detach()`. Pass `out.unweighted`, which has a gradient at lambda 0 too",
        absent.len() + zero.len() + not_finite.len(),
        list("no gradient", absent), list("all zero", zero), list("not finite", not_finite),
    )]
    Unreached {
        /// Parameters without a gradient: the graph is cut before them, or never contained them.
        absent: Vec<String>,
        /// Parameters whose gradient is zero in every element.
        zero: Vec<String>,
        /// Parameters whose gradient contains a NaN or an infinity.
        not_finite: Vec<String>,
        /// The number of parameters that were checked.
        total: usize,
    },
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A setting outside its range: `{field}: expected {expected}, got {got}`.
    pub fn config(field: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Config { field, expected: expected.to_string(), got: short(got) }
    }

    /// An input that does not fit the call: `{op}: expected {expected}, got {got}`.
    pub fn input(op: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Input { op, expected: expected.to_string(), got: short(got) }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}

/// The text of `value`; a number of many digits, such as 1e300, with its exponent.
pub(crate) fn short(value: impl Display) -> String {
    let text = value.to_string();
    match text.parse::<f64>() {
        Ok(number) if text.len() > 20 => format!("{number:e}"),
        _ => text,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_many_digits_are_short() {
        let text = |got: f64| Error::config("x", "less", got).to_string();
        assert_eq!(text(1e300), "x: expected less, got 1e300");
        assert_eq!(text(-3e-300), "x: expected less, got -3e-300");
        assert_eq!(text(0.25), "x: expected less, got 0.25");
        let text = Error::input("x", "less", usize::MAX).to_string();
        assert_eq!(text, "x: expected less, got 18446744073709551615");
    }
}
