//! What a watch is told of layers that are quantised.

use std::ops::ControlFlow;

use crate::calibrate::LayerReport;
use crate::learn::Watch;

/// Tells a watch of layers, of Hessians that asked for more damping, and at the end of what reconstruction did.
pub struct LayerWatch<'a> {
    watch: &'a mut dyn Watch,
    damping: Option<f64>,
    errors: Vec<(f64, f64)>,
}

impl<'a> LayerWatch<'a> {
    /// In front of the first of so many layers, quantised by a method of this name; `damping` is what a quantiser was asked for.
    pub fn new(watch: &'a mut dyn Watch, name: &str, layers: usize, damping: Option<f64>) -> Self {
        watch.begin(&format!("{name}, layers"), layers);
        Self { watch, damping, errors: vec![] }
    }

    /// A layer is done.
    pub fn told(&mut self, report: &LayerReport) -> ControlFlow<()> {
        if let Some(damping) = report.damping.filter(|d| self.damping.is_some_and(|asked| *d > asked)) {
            let layer = report.done - 1;
            self.watch.note(&format!("layer {layer}: a Hessian is not positive definite; damping raised to {damping}"));
        }
        self.errors.extend(report.reconstruction);
        if report.done == report.layers && !self.errors.is_empty() {
            let mean = |of: fn(&(f64, f64)) -> f64| self.errors.iter().map(of).sum::<f64>() / self.errors.len() as f64;
            let kept = self.errors.iter().filter(|(before, after)| before == after).count();
            let unchanged = if kept == 0 { String::new() } else { format!("; {kept} left as they were") };
            let (layers, before, after) = (self.errors.len(), mean(|e| e.0), mean(|e| e.1));
            self.watch.note(&format!(
                "reconstruction of {layers} layers: relative squared distance of the output from full precision {before:.4e} -> {after:.4e}{unchanged}"
            ));
        }
        self.watch.at(report.done)
    }
}
