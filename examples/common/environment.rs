//! Settings that candle and glibc read from the environment, and that training is slow without.

use std::{env, process::Command, thread};

/// Starts the program again with the settings in its environment, unless they are there.
///
/// - `RAYON_NUM_THREADS`: without it, candle 0.11 reads `/proc/cpuinfo` before every matrix product.
/// - `MALLOC_*_THRESHOLD_`: without them, glibc gives each large tensor back to the system and fetches new pages for the
///   next one.
///
/// Changing the environment of a running program is unsafe, so the program is replaced by itself. Where that cannot be
/// done it goes on, slower.
pub fn prepare() {
    let Ok(program) = env::current_exe() else {
        return;
    };
    if env::var_os("RAYON_NUM_THREADS").is_some() {
        return;
    }
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let mut command = Command::new(program);
    command
        .args(env::args_os().skip(1))
        .env("RAYON_NUM_THREADS", threads.to_string());
    for name in ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"] {
        if env::var_os(name).is_none() {
            command.env(name, (1usize << 30).to_string());
        }
    }
    // Returns only if it fails.
    #[cfg(unix)]
    let _ = std::os::unix::process::CommandExt::exec(&mut command);
}
