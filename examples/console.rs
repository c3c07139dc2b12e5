//! `println!` of the examples that only print: where nobody reads on, as in `| head -1`, the program ends quietly.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    process::exit,
};

pub fn line(text: Arguments) {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::BrokenPipe => exit(0),
        Err(e) => {
            let _ = writeln!(io::stderr(), "Error: cannot print: {e}");
            exit(1)
        }
    }
}

macro_rules! println {
    () => { $crate::console::line(format_args!("")) };
    ($($text:tt)*) => { $crate::console::line(format_args!($($text)*)) };
}
