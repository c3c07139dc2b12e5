//! `print!`, `println!` and `eprintln!` for the whole package and its programs, in place of the standard ones.
//!
//! The standard macros panic if nobody reads (`moco_v3 | head`) or nothing more fits (`> /dev/full`). A training must not end
//! so: what cannot be written is dropped here.

use std::{
    fmt::Arguments,
    io::{self, Write},
};

/// Writes to standard output, or drops the text.
pub fn out(text: Arguments) {
    let _ = io::stdout().write_fmt(text);
}

/// Writes to standard error, or drops the text.
pub fn err(text: Arguments) {
    let _ = io::stderr().write_fmt(text);
}

/// Prints as the standard macro, without its panic.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::terminal::out(::std::format_args!($($text)*)) };
}

/// Prints a line as the standard macro, without its panic.
#[macro_export]
macro_rules! println {
    () => { $crate::terminal::out(::std::format_args!("\n")) };
    ($($text:tt)*) => {
        $crate::terminal::out(::std::format_args!("{}\n", ::std::format_args!($($text)*)))
    };
}

/// Prints a line to standard error as the standard macro, without its panic.
#[macro_export]
macro_rules! eprintln {
    ($($text:tt)*) => {
        $crate::terminal::err(::std::format_args!("{}\n", ::std::format_args!($($text)*)))
    };
}
