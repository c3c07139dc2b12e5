//! Requests from outside: Ctrl-C, TERM and HUP stop the run with a checkpoint, USR1 writes one and goes on.

use std::{
    io,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

/// The status of a program that was asked to stop, as a shell has it for Ctrl-C.
pub const STOPPED: i32 = 130;

/// What was asked for.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    stop: AtomicBool,
    checkpoint: AtomicBool,
    /// While nothing would be lost: the last words of a program that ends at once.
    idle: Mutex<Option<String>>,
}

impl Interrupt {
    /// Listens from now on. Until [`Self::busy`], a request to stop ends the program at once, with `last_words`.
    pub fn listen(last_words: &str) -> Self {
        let this = Self::default();
        this.idle(last_words.to_string());
        // Where no handler can be set, a signal ends the program as it always does.
        let _ = listen(this.clone());
        this
    }

    /// Whether somebody asked to stop.
    pub fn asked(&self) -> bool {
        self.0.stop.load(Ordering::SeqCst)
    }

    /// Whether somebody asked for a checkpoint since the last call.
    pub fn take_checkpoint(&self) -> bool {
        self.0.checkpoint.swap(false, Ordering::SeqCst)
    }

    /// From now on all that is to be kept is on the disk: a request to stop, also an earlier one, ends the program at once.
    pub fn idle(&self, last_words: String) {
        let mut idle = self.lock();
        if self.asked() {
            end(&last_words);
        }
        *idle = Some(last_words);
    }

    /// From now on a request to stop waits for whoever reads [`Self::asked`].
    pub fn busy(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.0.idle.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Somebody asked to stop. A second Ctrl-C does not wait; a scheduler may send TERM and HUP to every process, and a
    /// parent sends them on, so these may come twice.
    fn stop(&self, ctrl_c: bool) {
        let idle = self.lock();
        let again = self.0.stop.swap(true, Ordering::SeqCst);
        match &*idle {
            Some(last_words) => end(last_words),
            None if again && ctrl_c => std::process::exit(STOPPED),
            None if again => {}
            None => eprintln!("\nstopping after this step; Ctrl-C once more stops at once"),
        }
    }

    /// Waits for the end of `child`, and sends requests on to it.
    pub fn wait(&self, child: Child) -> io::Result<ExitStatus> {
        Ok(self.wait_pausing(child, || false)?.0)
    }

    /// The same, but while `paused`, the child stands still. It gives the time of that too. A request to stop ends a pause.
    fn wait_pausing(
        &self,
        mut child: Child,
        paused: impl Fn() -> bool,
    ) -> io::Result<(ExitStatus, Duration)> {
        let mut sent = false;
        let (mut since, mut total) = (None::<Instant>, Duration::ZERO);
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok((status, total));
            }
            match (paused() && !self.asked(), since) {
                (true, None) => {
                    send(&child, Request::Pause);
                    since = Some(Instant::now());
                }
                (false, Some(begun)) => {
                    send(&child, Request::Continue);
                    total += begun.elapsed();
                    since = None;
                }
                _ => {}
            }
            if self.asked() && !sent {
                send(&child, Request::Stop);
                sent = true;
            }
            if self.take_checkpoint() {
                send(&child, Request::Checkpoint);
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// As [`Command::output`] with what the program says as an error alone, and the time for which it was `paused`; requests are
    /// sent on to the program.
    pub fn output(
        &self,
        command: &mut Command,
        paused: impl Fn() -> bool,
    ) -> io::Result<(Output, Duration)> {
        let mut said = tempfile::tempfile()?;
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?).spawn()?;
        let (status, time) = self.wait_pausing(child, paused)?;
        let mut stderr = Vec::new();
        io::Seek::rewind(&mut said)?;
        io::Read::read_to_end(&mut said, &mut stderr)?;
        Ok((Output { status, stdout: Vec::new(), stderr }, time))
    }
}

fn end(last_words: &str) -> ! {
    println!("{last_words}");
    std::process::exit(STOPPED)
}

enum Request {
    Stop,
    Checkpoint,
    Pause,
    Continue,
}

#[cfg(unix)]
fn listen(interrupt: Interrupt) -> io::Result<()> {
    use signal_hook::{
        consts::signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
        iterator::Signals,
    };
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    if !is_ignored(SIGHUP) {
        signals.add_signal(SIGHUP)?;
    }
    let listen = move || {
        for signal in signals.forever() {
            match signal {
                SIGUSR1 => interrupt.0.checkpoint.store(true, Ordering::SeqCst),
                signal => interrupt.stop(signal == SIGINT),
            }
        }
    };
    std::thread::Builder::new().name("signals".to_string()).spawn(listen)?;
    Ok(())
}

/// Whether the parent had the signal ignored, as `nohup` has HUP; where `/proc` does not tell, no.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

#[cfg(unix)]
fn send(child: &Child, request: Request) {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match request {
        Request::Stop => Signal::TERM,
        Request::Checkpoint => Signal::USR1,
        Request::Pause => Signal::STOP,
        Request::Continue => Signal::CONT,
    };
    // It has not been waited for, so its number is its own. If it has just ended there is nothing to send.
    let _ = kill_process(Pid::from_child(child), signal);
}

/// Ctrl-C reaches all processes of a console by itself, and nothing else is listened for.
#[cfg(not(unix))]
fn send(_: &Child, _: Request) {}

#[cfg(not(unix))]
fn listen(interrupt: Interrupt) -> io::Result<()> {
    use signal_hook::{consts::signal::SIGINT, flag};
    let asked = Arc::new(AtomicBool::new(false));
    // The second Ctrl-C does not wait for a step.
    flag::register_conditional_shutdown(SIGINT, STOPPED, asked.clone())?;
    flag::register(SIGINT, asked.clone())?;
    let listen = move || {
        while !asked.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(50));
        }
        interrupt.stop(true);
    };
    std::thread::Builder::new().name("signals".to_string()).spawn(listen)?;
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The state of a process, as the system has it: `T` is stopped.
    fn state(id: u32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    /// The pause ends when the child was seen to stand still; without that it would be at its end first.
    #[test]
    fn a_paused_child_stands_still_and_goes_on() {
        let child = Command::new("sleep").arg("2").spawn().unwrap();
        let id = child.id();
        let seen = AtomicBool::new(false);
        let paused = || {
            seen.fetch_or(state(id) == Some('T'), Ordering::SeqCst);
            !seen.load(Ordering::SeqCst)
        };
        let (status, time) = Interrupt::default().wait_pausing(child, paused).unwrap();
        assert!(status.success() && seen.into_inner() && time > Duration::ZERO);
    }

    #[test]
    fn a_request_to_stop_ends_a_pause() {
        let interrupt = Interrupt::default();
        let child = Command::new("sleep").arg("20").spawn().unwrap();
        let id = child.id();
        let paused = || {
            if state(id) == Some('T') {
                interrupt.0.stop.store(true, Ordering::SeqCst);
            }
            true
        };
        let (status, _) = interrupt.wait_pausing(child, paused).unwrap();
        assert!(!status.success(), "{status}");
    }
}
