//! Two settings that are read from the environment, and cost half the speed when they are missing.

use std::{env, process::Command, thread};

use anyhow::{Context, Result};

/// Starts the program again with the settings in its environment, unless they are there.
///
/// - `RAYON_NUM_THREADS`: without it, candle 0.11 reads `/proc/cpuinfo` before every matrix product.
/// - `MALLOC_*_THRESHOLD_`: without them, glibc gives each large tensor back to the system and fetches new pages for the
///   next one.
///
/// Changing the environment of a running program is unsafe, so the program is replaced; elsewhere than on Unix nothing
/// is done.
pub fn prepare() -> Result<()> {
    if env::var_os("RAYON_NUM_THREADS").is_some() {
        return Ok(());
    }
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let mut command = Command::new(env::current_exe().context("cannot find the program itself")?);
    command
        .args(env::args_os().skip(1))
        .env("RAYON_NUM_THREADS", threads.to_string());
    for name in ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"] {
        if env::var_os(name).is_none() {
            command.env(name, (1usize << 30).to_string());
        }
    }
    #[cfg(unix)]
    return Err(std::os::unix::process::CommandExt::exec(&mut command))
        .context("cannot start the program again");
    #[cfg(not(unix))]
    Ok(())
}
