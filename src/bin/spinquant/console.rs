//! What the program says: results on standard output, progress and messages on standard error.
//!
//! Neither stream can end a run. Whoever reads them may leave (`… | head -1`, a `tee` that died) and their disk may be full; the work
//! goes on and its files are written. Only then does [`finish`] report what could not be printed.

use std::fmt::Arguments;
use std::io::{Error, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The first failure of standard output.
static FAULT: Mutex<Option<Error>> = Mutex::new(None);

/// True of a process whose work another one reports.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Prints nothing from now on: of processes that share a run one speaks.
pub fn silence() {
    SILENT.store(true, Ordering::SeqCst);
}

/// Prints again.
pub fn speak() {
    SILENT.store(false, Ordering::SeqCst);
}

/// Whether nothing is printed.
pub fn is_silent() -> bool {
    SILENT.load(Ordering::SeqCst)
}

/// Prints a line of results.
pub fn out(line: Arguments<'_>) {
    if is_silent() {
        return;
    }
    let mut fault = FAULT.lock().unwrap_or_else(PoisonError::into_inner);
    if fault.is_none() {
        let mut stdout = std::io::stdout().lock();
        *fault = writeln!(stdout, "{line}").and_then(|()| stdout.flush()).err();
    }
}

/// Prints part of a line of results.
pub fn piece(text: &str) {
    if is_silent() {
        return;
    }
    let mut fault = FAULT.lock().unwrap_or_else(PoisonError::into_inner);
    if fault.is_none() {
        let mut stdout = std::io::stdout().lock();
        *fault = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).err();
    }
}

/// Prints a line for the reader; one that nobody can read is dropped.
pub fn say(line: Arguments<'_>) {
    if is_silent() {
        return;
    }
    // Whole, so that lines of several threads do not mix.
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// True once nothing more can be printed: there is no point in results that are only printed.
pub fn is_closed() -> bool {
    FAULT.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Whether all results were printed. A reader who left early has seen what it wanted; any other failure is one.
///
/// # Errors
/// The first failure of standard output, unless the pipe was closed at its other end.
pub fn finish() -> Result<(), Error> {
    match FAULT.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(e) if e.kind() != ErrorKind::BrokenPipe => Err(e),
        _ => Ok(()),
    }
}

/// Prints a line of results on standard output, like `println!`, and never panics.
macro_rules! out {
    ($($arg:tt)*) => { $crate::console::out(format_args!($($arg)*)) };
}

/// Prints a line for the reader on standard error, like `eprintln!`, and never panics.
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::say(format_args!($($arg)*)) };
}
