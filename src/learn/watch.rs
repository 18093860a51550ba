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

/// A place of a curve of learning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Optimiser steps done.
    pub step: usize,
    /// Wall-clock time since the start, scoring not included.
    pub seconds: f64,
    /// Mean cross entropy on the held-out windows.
    pub held_out: f64,
}

/// Tells another watch of learning by a name that says which run it is, and keeps the run's curve, its start aside.
pub(crate) struct Named<'a, W: Watch + ?Sized> {
    watch: &'a mut W,
    what: String,
    /// Of all steps, and what was spent before.
    pub(crate) seconds: f64,
    pub(crate) curve: Vec<Point>,
}

impl<'a, W: Watch + ?Sized> Named<'a, W> {
    pub(crate) fn new(watch: &'a mut W, what: String, seconds: f64) -> Self {
        Self { watch, what, seconds, curve: vec![] }
    }
}

impl<W: Watch + ?Sized> Watch for Named<'_, W> {
    fn begin(&mut self, what: &str, total: usize) {
        self.watch.begin(if what == "learning" { &self.what } else { what }, total);
    }
    fn at(&mut self, done: usize) -> ControlFlow<()> {
        self.watch.at(done)
    }
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.seconds += report.seconds;
        let (step, seconds) = (report.step, self.seconds);
        self.curve.extend(report.held_out.map(|held_out| Point { step, seconds, held_out }));
        self.watch.step(report)
    }
    fn clipped(&mut self, found: &ClipFound, by: ClipGoal) {
        self.watch.clipped(found, by);
    }
    fn note(&mut self, line: &str) {
        self.watch.note(line);
    }
}
