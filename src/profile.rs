//! Names for what is being computed, so that a profile can say where time went. A node remembers the part it was recorded in, and
//! its backward pass counts there too.

use std::cell::Cell;

thread_local! {
    static NOW: Cell<(&'static str, &'static str)> = const { Cell::new(("forward", "")) };
}

/// Ends with the guard.
#[must_use = "the part ends when this is dropped"]
#[derive(Debug)]
pub struct Part {
    before: (&'static str, &'static str),
}

impl Drop for Part {
    fn drop(&mut self) {
        NOW.set(self.before);
    }
}

/// What this thread computes from here on, until the guard is dropped: a part of the model such as `attention`.
pub fn enter(part: &'static str) -> Part {
    let before = NOW.get();
    NOW.set((before.0, part));
    Part { before }
}

/// The same for the pass: `forward`, `recompute`, `backward`, `update`.
pub(crate) fn enter_pass(pass: &'static str) -> Part {
    let before = NOW.get();
    NOW.set((pass, before.1));
    Part { before }
}

/// The pass and the part.
pub(crate) fn part() -> (&'static str, &'static str) {
    NOW.get()
}
