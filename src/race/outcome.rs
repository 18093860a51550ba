//! What a race comes to: its runs, a table, pictures.

use std::fmt::Write as _;

#[cfg(feature = "cli")]
use std::path::Path;

#[cfg(feature = "cli")]
use crate::Result;
use crate::eval::fidelity::Fidelity;
use crate::learn::Point;
#[cfg(feature = "cli")]
use crate::plot::{Axes, Panel, Series, lines};
use crate::quant::{ClipRatios, Scheme};

/// One run of one entry.
#[derive(Clone, Debug)]
pub struct Run {
    /// The entry as tables have it: optimiser, objective, what clip ratios were searched by.
    pub entry: String,
    /// The entry's name.
    pub optimizer: String,
    /// The objective's name; empty where nothing was learned.
    pub objective: String,
    /// Learning rate of the first step; NaN where nothing was learned.
    pub rate: f64,
    /// Clip ratios that were searched.
    pub clip: Option<ClipRatios>,
    /// What the network was quantised to, those ratios included.
    pub scheme: Scheme,
    /// Optimiser steps; 0 where nothing was learned.
    pub steps: usize,
    /// Seed of the start, of the held-out windows and of the order of the others.
    pub seed: u64,
    /// Held-out cross entropy, the start first; empty for a run that diverged or did not learn.
    pub curve: Vec<Point>,
    /// Perplexity on the text that is scored; NaN for a run that diverged.
    pub perplexity: f64,
    /// Fidelity on that text to the model in full precision; none for a run that diverged.
    pub fidelity: Option<Fidelity>,
    /// Wall-clock time of learning and of searching clip ratios; scoring not included.
    pub seconds: f64,
    /// max|RᵀR − I| over all rotations at the end; NaN where nothing was learned.
    pub orthogonality_error: f64,
}

impl Run {
    /// KL(full precision ‖ network) on the text that is scored, in nats a token; NaN for a run that diverged.
    pub fn divergence(&self) -> f64 {
        self.fidelity.as_ref().map_or(f64::NAN, |f| f.divergence().mean)
    }

    /// Held-out cross entropy at the end; NaN without a curve, so that a run that diverged is not the best of any.
    pub fn held_out_last(&self) -> f64 {
        self.curve.last().map_or(f64::NAN, |p| p.held_out)
    }
}

/// What a scheme's runs are measured against.
#[derive(Clone, Debug)]
pub struct Baseline {
    /// What the network was quantised to.
    pub scheme: Scheme,
    /// Perplexity of the model as it is, in full precision.
    pub full: f64,
    /// The seed of the first random Hadamard.
    pub first_seed: u64,
    /// Perplexity of random Hadamards, of this seed and the following ones.
    pub random: Vec<f64>,
    /// KL(full precision ‖ network) of the same, in nats a token.
    pub divergence: Vec<f64>,
}

impl Baseline {
    /// Mean perplexity of the random Hadamards.
    pub fn mean(&self) -> f64 {
        mean(&self.random)
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// All runs so far, and what they are measured against.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub(super) baselines: Vec<Baseline>,
    runs: Vec<Run>,
}

/// Runs of all seeds of an entry at one scheme, number of steps and rate.
struct Group<'a> {
    first: &'a Run,
    runs: Vec<&'a Run>,
}

impl Outcome {
    /// What the runs of every scheme are measured against.
    pub fn baselines(&self) -> &[Baseline] {
        &self.baselines
    }

    /// Every run that has ended, in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub(super) fn add(&mut self, run: Run) {
        self.runs.push(run);
    }

    /// The part of the gap from the random Hadamard of the same seed to full precision that a run closed; NaN where that Hadamard was
    /// not scored.
    pub fn recovered(&self, run: &Run) -> f64 {
        let same = |b: &&Baseline| b.scheme.to_string() == run.scheme.to_string();
        self.baselines.iter().find(same).map_or(f64::NAN, |b| {
            let random = b.random.get((run.seed - b.first_seed) as usize).copied().unwrap_or(f64::NAN);
            (random - run.perplexity) / (random - b.full)
        })
    }

    fn groups(&self) -> Vec<Group<'_>> {
        let key = |r: &Run| (r.entry.clone(), r.scheme.to_string(), r.steps, r.rate.to_bits());
        let mut groups: Vec<Group<'_>> = vec![];
        for run in &self.runs {
            match groups.iter_mut().find(|g| key(g.first) == key(run)) {
                Some(group) => group.runs.push(run),
                None => groups.push(Group { first: run, runs: vec![run] }),
            }
        }
        groups
    }

    /// A table in Markdown for each scheme, the best mean perplexity first; `name` is the model's.
    pub fn table(&self, name: &str) -> String {
        let mut table = String::new();
        for b in &self.baselines {
            let (scheme, full, random) = (b.scheme, b.full, b.mean());
            let apart = mean(&b.divergence);
            let _ = writeln!(
                table,
                "\n{name}, {scheme}: full precision {full:.3}, random Hadamard {random:.3} (KL {apart:.4} from full precision)\n"
            );
            let _ = writeln!(
                table,
                "| entry | rate | steps | seeds | perplexity (mean, range) | gap recovered | KL | top-1 | seconds |\n\
                 |---|---|---|---|---|---|---|---|---|"
            );
            let mut groups = self.groups();
            groups.retain(|g| g.first.scheme.to_string() == scheme.to_string());
            let score = |g: &Group<'_>| mean(&g.runs.iter().map(|r| r.perplexity).collect::<Vec<_>>());
            groups.sort_by(|a, b| score(a).total_cmp(&score(b)));
            for g in &groups {
                let of = |f: &dyn Fn(&Run) -> f64| g.runs.iter().map(|r| f(r)).collect::<Vec<f64>>();
                let perplexity = of(&|r| r.perplexity);
                let range = [f64::min, f64::max].map(|f| perplexity.iter().copied().reduce(f).unwrap_or(f64::NAN));
                let rate = if g.first.rate.is_nan() { String::new() } else { g.first.rate.to_string() };
                let _ = writeln!(
                    table,
                    "| {} | {rate} | {} | {} | {:.3} ({:.3}–{:.3}) | {:.1} % | {:.4} | {:.1} % | {:.2} |",
                    g.first.entry,
                    g.first.steps,
                    g.runs.len(),
                    mean(&perplexity),
                    range[0],
                    range[1],
                    100.0 * mean(&of(&|r| self.recovered(r))),
                    mean(&of(&|r| r.divergence())),
                    100.0 * mean(&of(&|r| r.fidelity.as_ref().map_or(f64::NAN, |f| f.agreement().mean))),
                    mean(&of(&|r| r.seconds)),
                );
            }
        }
        table
    }

    /// Held-out loss against something, a panel a scheme: of every entry the rate and the number of steps that ended best.
    #[cfg(feature = "cli")]
    pub(super) fn draw(&self, path: &Path, x: &str, of: fn(&Point) -> f64) -> Result<()> {
        let last = |g: &Group<'_>| mean(&g.runs.iter().map(|r| r.held_out_last()).collect::<Vec<_>>());
        let panel = |b: &Baseline| {
            let mut best: Vec<Group<'_>> = vec![];
            for g in self.groups().into_iter().filter(|g| g.first.scheme.to_string() == b.scheme.to_string()) {
                match best.iter_mut().find(|old| old.first.entry == g.first.entry) {
                    Some(old) if last(&g) < last(old) => *old = g,
                    Some(_) => {}
                    None => best.push(g),
                }
            }
            // One that diverged stays, without points, so that an entry has one colour in all panels.
            best.retain(|g| g.first.steps > 0);
            let series = best.iter().map(|g| {
                // The mean over seeds, as far as all have a point.
                let points = g.runs.iter().map(|r| r.curve.len()).min().unwrap_or(0);
                let at = |i: usize, f: fn(&Point) -> f64| mean(&g.runs.iter().map(|r| f(&r.curve[i])).collect::<Vec<_>>());
                let points = (0..points).map(|i| (at(i, of), at(i, |p| p.held_out))).collect();
                Series { name: g.first.entry.clone(), points }
            });
            Panel { title: b.scheme.to_string(), series: series.collect() }
        };
        let finite = |s: &Series| s.points.iter().any(|(x, y)| x.is_finite() && y.is_finite());
        let panels: Vec<Panel> = self.baselines.iter().map(panel).filter(|p| p.series.iter().any(finite)).collect();
        if panels.is_empty() {
            return Ok(()); // nothing learned, nothing to draw
        }
        let axes = Axes { x, y: "held-out cross entropy (nats a token)", log_y: false };
        lines(path, (560 * panels.len() as u32 + 380, 560), &panels, axes)
    }
}
