//! Settings that candle and glibc read from the environment, and that training is slow without.

use std::{env, process::Command, thread};

/// Starts the program again with the settings in its environment, unless they are there.
///
/// - `RAYON_NUM_THREADS`: without it, candle 0.11 reads `/proc/cpuinfo` before every matrix product.
/// - `CANDLE_BARRIER_POOL_SPIN_LIMIT`: at its default, the threads of candle's second pool, which adds and multiplies, spin
///   on for a while after each operation, on the cores that the first pool needs for products.
/// - `MALLOC_*_THRESHOLD_`: without them, glibc gives each large tensor back to the system and fetches new pages for the
///   next one.
///
/// Changing the environment of a running program is unsafe, so the program is replaced by itself. Where that cannot be
/// done it goes on, slower.
pub fn prepare() {
    let Ok(program) = env::current_exe() else {
        return;
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let settings = settings(threads);
    if settings.iter().all(|(name, _)| env::var_os(name).is_some()) {
        return;
    }
    let mut command = Command::new(program);
    command.args(env::args_os().skip(1));
    for (name, value) in settings {
        if env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    // Returns only if it fails.
    #[cfg(unix)]
    let _ = std::os::unix::process::CommandExt::exec(&mut command);
}

/// The settings for this number of threads.
pub fn settings(threads: usize) -> [(&'static str, String); 4] {
    let gigabyte = 1 << 30;
    [
        ("RAYON_NUM_THREADS", threads),
        ("CANDLE_BARRIER_POOL_SPIN_LIMIT", 0),
        ("MALLOC_MMAP_THRESHOLD_", gigabyte),
        ("MALLOC_TRIM_THRESHOLD_", gigabyte),
    ]
    .map(|(name, value)| (name, value.to_string()))
}
