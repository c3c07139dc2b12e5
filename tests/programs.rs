//! The examples that print, as programs: arguments that nobody reads, and output that nobody reads.

use std::{path::PathBuf, process::Command};

const NAMES: [&str; 4] = ["minimal", "fields", "symmetries", "companions"];

/// An example; `cargo test` builds them all.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let path: PathBuf = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is missing: run cargo build --examples", path.display());
    Command::new(path)
}

#[test]
fn unknown_arguments_are_refused() {
    let refused = |name: &str, args: &[&str]| {
        let output = program(name).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name} {args:?}");
        assert_ne!(output.status.code(), Some(101), "{name} {args:?} panics: {said}");
        assert!(said.contains(args[args.len() - 1]), "{name} {args:?}: {said}");
        assert!(output.stdout.is_empty(), "{name} {args:?} printed before");
    };
    for name in NAMES {
        refused(name, &["--nope"]);
        refused(name, &["nope"]);
    }
    refused("minimal", &["0", "1"]);
    refused("minimal", &["x"]);
    refused("fields", &["1"]);
    refused("symmetries", &["16", "16"]);
    refused("symmetries", &["16", "16", "1", "9"]);
    refused("symmetries", &["16", "16", "18446744073709551615"]);
    refused("companions", &["--target-ratio", "NaN"]);
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        for name in NAMES {
            let odd = std::ffi::OsStr::from_bytes(b"\xff");
            let output = program(name).arg(odd).output().unwrap();
            assert!(output.status.code().is_some_and(|code| code == 1 || code == 2), "{name}");
        }
    }
}

#[cfg(unix)]
#[test]
fn output_that_nobody_reads_ends_a_program_quietly() {
    use std::{
        fs::OpenOptions,
        io::{BufRead, BufReader},
        process::Stdio,
    };
    for name in NAMES {
        let mut command = program(name);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        // The end of the pipe is closed with the reader.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{name}");
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*said), (Some(0), ""), "{name}");
        // A full disk is no reader that has seen enough.
        if let Ok(full) = OpenOptions::new().write(true).open("/dev/full") {
            let output = program(name).stdout(full).stderr(Stdio::piped()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{name}: {said}");
            assert!(said.starts_with("Error: "), "{name}: {said}");
        }
    }
}
