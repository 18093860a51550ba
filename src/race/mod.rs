//! A race: optimisers and objectives against one another on one model, from the same starts and with the same held-out windows, so that
//! held-out loss can be compared against steps and seconds.
//!
//! An [`Entry`] is an optimiser, an objective, the learning rates to try and perhaps a search for clip ratios. Any
//! [`Optimizer`](crate::optim::Optimizer) and any [`Objective`](crate::objective::Objective) may enter, of this crate or not.
//!
//! ```
//! use std::sync::Arc;
//! use spinquant::learn::LearnOptions;
//! use spinquant::objective::CrossEntropy;
//! use spinquant::optim::{CayleySgd, Mode, Optimizer};
//! use spinquant::race::{Course, Entry, Outcome, Track, full_precision};
//! use spinquant::{demo, quant::Scheme};
//!
//! let mine = || -> spinquant::Result<Box<dyn Optimizer>> { Ok(Box::new(CayleySgd::new(Mode::Default))) }; // or your own
//! let mut entry = Entry::new(mine, Arc::new(CrossEntropy))?;
//! (entry.name, entry.rates) = ("mine".into(), vec![0.5, 1.5]);
//! let course = Course {
//!     entries: vec!["hadamard".parse()?, "adam-polar/whip".parse()?, entry],
//!     schemes: vec![Scheme::new(4, 4, 4)],
//!     steps: vec![2],
//!     seeds: 0..1,
//!     learn: LearnOptions { batch: 4, held_out: Some(4), ..LearnOptions::default() },
//! };
//! course.check()?;
//! let text = demo::windows(&demo::TEST[..8_000], 64)?;
//! let model = demo::model()?;
//! let full = full_precision(&model, &text, &mut ())?;
//! let track = Track { model, full, calibration: demo::windows(demo::CALIBRATION, 64)?, text };
//! let mut outcome = Outcome::default();
//! course.run(&track, &mut outcome, &mut ())?;
//! println!("{}", outcome.table("the embedded model"));
//! assert_eq!(outcome.runs().len(), 1 + 1 + 2); // one run for each rate
//! # Ok::<(), spinquant::Error>(())
//! ```

mod entry;
mod files;
mod outcome;

use std::ops::Range;
use std::time::Instant;

pub use entry::{Entry, HADAMARD, MakeOptimizer, default_entries};
pub use files::Files;
pub use outcome::{Baseline, Outcome, Run};

use crate::compare::{Judged, Test, judge};
use crate::data::Windows;
use crate::learn::{ClipChoice, LearnOptions, Named, Point, Watch, WeightClip, learn_watched, search_clips_watched};
use crate::llama::Llama;
use crate::quant::{ClipRatios, Online, Scheme};
use crate::ranks::Group;
use crate::rotation::{ClipEnds, Rotations};
use crate::{Error, Result};

/// Hears how a race goes, and may stop it. `()` hears nothing.
pub trait Spectator: Watch {
    /// Random Hadamards were scored at a scheme.
    fn scored(&mut self, _baseline: &Baseline) {}

    /// A run ended; `recovered` is the part of the gap from random Hadamards to full precision that it closed.
    ///
    /// # Errors
    /// What keeps the spectator from writing the run down; it ends the race.
    fn ended(&mut self, _run: &Run, _recovered: f64) -> Result<()> {
        Ok(())
    }
}

impl Spectator for () {}

/// What is raced on: a model and its texts.
#[derive(Debug)]
pub struct Track {
    /// With RMSNorm gains folded, to be rotated.
    pub model: Llama,
    /// Perplexity of the model as it is: [`full_precision`].
    pub full: f64,
    /// Text to learn and to search clip ratios on.
    pub calibration: Windows,
    /// Text to score.
    pub text: Windows,
}

impl Track {
    fn start(&self, seed: u64) -> Result<Rotations> {
        let c = &self.model.config;
        Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed)
    }

    /// Perplexity, and fidelity to the model in full precision.
    fn score(&self, rotations: &Rotations, scheme: &Scheme, watch: &mut dyn Watch, what: &str) -> Result<Judged> {
        let full = self.model.merge_exact(None, &Scheme::FULL_PRECISION.online(Online::NONE))?;
        judge(&self.model.merge(Some(rotations), scheme)?, Some(&full), Test::on(&self.text), watch, what)
    }
}

/// Perplexity in full precision of a model as its files have it ([`Llama::load_plain`]).
///
/// # Errors
/// Those of merging and scoring; [`Error::Interrupted`].
pub fn full_precision(plain: &Llama, text: &Windows, watch: &mut dyn Watch) -> Result<f64> {
    Ok(judge(&plain.merge(None, &Scheme::FULL_PRECISION)?, None, Test::on(text), watch, "full precision")?.perplexity)
}

/// What races, and how far.
#[derive(Clone, Debug)]
pub struct Course {
    /// What races. Entries of the same name count as one.
    pub entries: Vec<Entry>,
    /// What the network is quantised to.
    pub schemes: Vec<Scheme>,
    /// Numbers of optimiser steps.
    pub steps: Vec<usize>,
    /// Seeds of the Hadamard start, of the held-out windows and of the order of the others.
    pub seeds: Range<u64>,
    /// How every entry learns. Scheme, steps, seed, learning rate, objective and clip ratios are the race's.
    pub learn: LearnOptions,
}

impl Course {
    fn options(&self, entry: &Entry, rate: f64) -> LearnOptions {
        let micro_batch = self.learn.micro_batch.or(Some(self.learn.batch));
        let weight_clip = if entry.learned_weights { WeightClip::Learned } else { WeightClip::Search };
        LearnOptions {
            weight_clip,
            learning_rate: Some(rate),
            objective: entry.objective.clone(),
            clip: ClipChoice::Keep,
            micro_batch,
            ..self.learn.clone()
        }
    }

    /// Checks what needs neither text nor model; a program may do it before it loads anything.
    ///
    /// # Errors
    /// [`Error::Argument`]: no seed, a number of steps of 0, clip ratios to be searched on no window; those of
    /// [`LearnOptions::check`] for any entry, and of making its optimiser.
    pub fn check(&self) -> Result<()> {
        if self.seeds.is_empty() || self.steps.contains(&0) {
            return Err(Error::argument("race", "expected at least one seed and one step"));
        }
        if self.learn.clip_windows == 0 && self.entries.iter().any(|entry| entry.clip.is_some()) {
            return Err(Error::argument("race", "expected at least one window to search clip ratios on, got 0"));
        }
        for entry in &self.entries {
            if let Some(make) = &entry.optimizer {
                let optimizer = make()?;
                for (&rate, scheme) in entry.rates.iter().flat_map(|rate| self.schemes.iter().map(move |scheme| (rate, scheme))) {
                    LearnOptions { scheme: *scheme, ..self.options(entry, rate) }.check(optimizer.as_ref())?;
                }
            }
        }
        Ok(())
    }

    /// Checks that a text is long enough to learn on, where anything learns.
    ///
    /// # Errors
    /// Those of [`LearnOptions::check_text`].
    pub fn check_text(&self, calibration: &Windows) -> Result<()> {
        if self.entries.iter().any(Entry::learns) { self.learn.check_text(calibration) } else { Ok(()) }
    }

    /// Races. Random Hadamards are scored first; seeds come after numbers of steps and entries after seeds, so that an interrupted race
    /// has every entry once. `outcome` then holds what there is.
    ///
    /// A run that diverges is a result, with a perplexity of NaN, and not the end of the race.
    ///
    /// # Errors
    /// Those of [`Course::check`] and [`Course::check_text`]; of merging, scoring, searching and learning; of the spectator;
    /// [`Error::Interrupted`].
    pub fn run(&self, track: &Track, outcome: &mut Outcome, spectator: &mut dyn Spectator) -> Result<()> {
        self.check()?;
        self.check_text(&track.calibration)?;
        for scheme in &self.schemes {
            let random = |seed| track.score(&track.start(seed)?, scheme, spectator, &format!("{scheme} hadamard:{seed}"));
            let random = self.seeds.clone().map(random).collect::<Result<Vec<Judged>>>()?;
            let divergence = random.iter().filter_map(|j| Some(j.fidelity.as_ref()?.divergence().mean)).collect();
            let random = random.iter().map(|j| j.perplexity).collect();
            let baseline = Baseline { scheme: *scheme, full: track.full, first_seed: self.seeds.start, random, divergence };
            spectator.scored(&baseline);
            outcome.baselines.push(baseline);
        }
        // Of every scheme and entry, the rate that the first number of steps and seed found.
        let mut best: Vec<Vec<Option<f64>>> = vec![vec![None; self.entries.len()]; self.schemes.len()];
        for &steps in &self.steps {
            for seed in self.seeds.clone() {
                for (scheme, best) in self.schemes.iter().zip(&mut best) {
                    for (entry, best) in self.entries.iter().zip(best) {
                        if !entry.learns() && steps != self.steps[0] {
                            continue;
                        }
                        let found = self.entry(track, entry, *best, (scheme, steps, seed), outcome, spectator)?;
                        *best = best.or(found);
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs an entry at its best rate, or at all of its rates: the one that ends with the least held-out loss.
    fn entry(
        &self,
        track: &Track,
        entry: &Entry,
        best: Option<f64>,
        at: (&Scheme, usize, u64),
        outcome: &mut Outcome,
        spectator: &mut dyn Spectator,
    ) -> Result<Option<f64>> {
        let mut tried: Vec<(f64, f64)> = vec![];
        let rates = match best {
            // An entry that does not learn has one run and no rate.
            _ if !entry.learns() => vec![f64::NAN],
            Some(rate) => vec![rate],
            None => entry.rates.clone(),
        };
        for rate in rates {
            let run = self.one(track, entry, rate, at, spectator)?;
            spectator.ended(&run, outcome.recovered(&run))?;
            tried.push((rate, run.held_out_last()));
            outcome.add(run);
        }
        Ok(tried.into_iter().reduce(|a, b| if b.1 < a.1 { b } else { a }).map(|(rate, _)| rate).filter(|_| entry.learns()))
    }

    fn one(
        &self,
        track: &Track,
        entry: &Entry,
        rate: f64,
        (scheme, steps, seed): (&Scheme, usize, u64),
        spectator: &mut dyn Spectator,
    ) -> Result<Run> {
        let mut start = track.start(seed)?;
        let began = Instant::now();
        let mut scheme = Scheme { activation_clip: ClipRatios::NONE, ..*scheme };
        if let Some(goal) = entry.clip {
            let how = (goal, self.learn.clip_windows);
            let found = search_clips_watched(Group::nobody(), &track.model, &start, &scheme, &track.calibration, how, spectator)?;
            scheme.activation_clip = found.ratios;
            if entry.learned_clips {
                start.clips = ClipEnds::of_ratios(&scheme.active_sites(), &found.layers, track.model.config.kv_heads)?;
            }
        }
        let searching = began.elapsed().as_secs_f64();
        let what = format!("{scheme} {entry}:{seed}");
        let mut run = Run {
            entry: entry.to_string(),
            optimizer: entry.name.clone(),
            objective: if entry.learns() { entry.objective.name() } else { String::new() },
            rate,
            clip: entry.clip.map(|_| scheme.activation_clip),
            scheme,
            steps: if entry.learns() { steps } else { 0 },
            seed,
            curve: vec![],
            perplexity: f64::NAN,
            fidelity: None,
            seconds: searching,
            orthogonality_error: f64::NAN,
        };
        let Some(make) = &entry.optimizer else {
            let judged = track.score(&start, &scheme, spectator, &what)?;
            (run.perplexity, run.fidelity) = (judged.perplexity, judged.fidelity);
            return Ok(run);
        };
        let options = LearnOptions { scheme, steps, seed, ..self.options(entry, rate) };
        let mut named = Named::new(spectator, what.clone(), searching);
        let learned = learn_watched(&track.model, &track.calibration, start, make()?.as_mut(), &options, &mut named);
        (run.seconds, run.curve) = (named.seconds, named.curve);
        let learned = match learned {
            Ok(learned) => learned,
            // A rate that is too high is a result.
            Err(Error::Numeric { what, message }) => {
                spectator.note(&format!("{entry} at {rate}: {what}: {message}"));
                return Ok(run);
            }
            Err(e) => return Err(e),
        };
        run.curve.insert(0, Point { step: 0, seconds: searching, held_out: learned.held_out_first });
        run.orthogonality_error = learned.orthogonality_error;
        let judged = track.score(&learned.rotations, &scheme, spectator, &what)?;
        (run.perplexity, run.fidelity) = (judged.perplexity, judged.fidelity);
        Ok(run)
    }
}
