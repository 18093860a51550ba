//! Hearing how far a long run is, and stopping it.

use std::ops::ControlFlow;

use super::StepReport;
use crate::calibrate::{ClipFound, ClipGoal};

/// Hears how a run goes, and may stop it: a stopped run returns [`Error::Interrupted`](crate::Error::Interrupted), and leaves what it
/// was told to keep. `()` hears nothing.
pub trait Watch {
    /// A stretch of work of `total` units begins.
    fn begin(&mut self, _what: &str, _total: usize) {}

    /// So many units of it are done.
    fn at(&mut self, _done: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A step of learning ended; the stretch's unit is a step.
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.at(report.step)
    }

    /// Clip ratios were searched.
    fn clipped(&mut self, _found: &ClipFound, _by: ClipGoal) {}

    /// Something happened that a reader should know.
    fn note(&mut self, _line: &str) {}
}

impl Watch for () {}

/// [`learn`](super::learn())'s callback, which hears of steps only.
pub(super) struct Steps<F>(pub F);

impl<F: FnMut(&StepReport) -> ControlFlow<()>> Watch for Steps<F> {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        (self.0)(report)
    }
}
