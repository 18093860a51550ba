//! Ctrl-C and SIGTERM. A command ends at once, since what it writes is whole or absent; one that has learned something first ends its
//! step and keeps it. The exit status is 128 and the signal's number: 130 or 143.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

/// The signal that came, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// How many parts of the program end by themselves, after their step.
static CAREFUL: AtomicUsize = AtomicUsize::new(0);
/// What an end at once leaves, in words.
static KEPT: Mutex<Option<String>> = Mutex::new(None);

/// While it lives, a first signal is only noted: whoever holds it looks at [`asked`] after every step.
pub struct AfterStep(());

impl AfterStep {
    pub fn new() -> Self {
        CAREFUL.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for AfterStep {
    fn drop(&mut self) {
        CAREFUL.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Says what an end at once leaves from now on.
pub fn kept(what: impl Into<String>) {
    *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = Some(what.into());
}

/// Break once the user has asked to stop.
pub fn asked() -> ControlFlow<()> {
    if ASKED.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// The same for the library to look at.
pub fn flag() -> Arc<AtomicBool> {
    ASKED.clone()
}

/// The exit status of a run that was stopped.
pub fn status() -> ExitCode {
    match SIGNAL.load(Ordering::SeqCst) {
        0 => ExitCode::FAILURE,
        signal => ExitCode::from(128 + signal as u8),
    }
}

/// Who gets the signals in this process's place.
static PASSED: OnceLock<Box<dyn Fn(i32) + Send + Sync>> = OnceLock::new();

/// From now on signals are passed on, to whoever does the work.
pub fn pass_on(to: impl Fn(i32) + Send + Sync + 'static) {
    let _ = PASSED.set(Box::new(to));
}

/// A signal that the launcher passes on.
#[cfg(unix)]
pub fn passed_on(signal: i32) {
    if asked().is_continue() {
        heard(signal, |status| signal_hook::low_level::exit(status));
    }
}

fn heard(signal: i32, exit: impl FnOnce(i32)) {
    if let Some(to) = PASSED.get() {
        return to(signal);
    }
    SIGNAL.store(signal, Ordering::SeqCst);
    let again = ASKED.swap(true, Ordering::SeqCst);
    if again || CAREFUL.load(Ordering::SeqCst) == 0 {
        let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        say!("\nstopped: {}", kept.as_deref().unwrap_or("nothing was written"));
        return exit(128 + signal);
    }
    say!("\nstopping after this step (again: at once)");
}

/// Listens from now on. SIGHUP stays ignored where it is, as `nohup` wants it.
#[cfg(unix)]
pub fn listen() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok()).unwrap_or(0);
    let hangs_up = ignored >> (SIGHUP - 1) & 1 == 0;
    let wanted = [SIGINT, SIGTERM].into_iter().chain(hangs_up.then_some(SIGHUP));
    // A terminal sends these to the launcher too, which passes them on.
    let ignored = |signal: &i32| crate::launch::is_launched() && [SIGINT, SIGHUP].contains(signal);
    match Signals::new(wanted) {
        Ok(mut signals) => {
            let mut heard = move |signal| heard(signal, |status| signal_hook::low_level::exit(status));
            let listen = move || signals.forever().filter(|signal| !ignored(signal)).for_each(&mut heard);
            std::thread::spawn(listen);
        }
        Err(e) => say!("warning: Ctrl-C will end the program at once: {e}"),
    }
}

/// The model that is read, for a message.
#[cfg(target_os = "linux")]
static MODEL: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// Files of this model will be mapped: one that is cut short meanwhile ends the program with a line that says so, not without a word.
#[cfg(target_os = "linux")]
pub fn reads(model: &std::path::Path) {
    use signal_hook::consts::SIGBUS;
    let message = format!("error: {}: a file was cut short while it was read (SIGBUS); is it being written?\n", model.display());
    if MODEL.set(message).is_err() {
        return; // listening already
    }
    // Reads a value that is set, writes and exits: all of it may be done in a signal handler.
    let handler = || {
        let message = MODEL.get().map_or("", String::as_str);
        let _ = rustix::io::write(rustix::stdio::stderr(), message.as_bytes());
        signal_hook::low_level::exit(128 + SIGBUS)
    };
    // SAFETY: the handler makes two system calls, takes no lock and allocates nothing.
    let registered = unsafe { signal_hook::low_level::register(SIGBUS, handler) };
    let _ = registered; // without it the program ends as it would anyhow
}

/// Other systems say so themselves.
#[cfg(not(target_os = "linux"))]
pub fn reads(_model: &std::path::Path) {}

/// Listens from now on.
#[cfg(not(unix))]
pub fn listen() {
    if let Err(e) = ctrlc::set_handler(|| heard(2, |status| std::process::exit(status))) {
        say!("warning: Ctrl-C will end the program at once: {e}");
    }
}
