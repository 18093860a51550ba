//! The paper's table on one model: full precision, plain rounding, random Hadamards, learned rotations; with GPTQ weights and searched
//! clip ratios where they are wanted.
//!
//! ```
//! use spinquant::compare::{Comparison, Test, Unrotated};
//! use spinquant::learn::LearnOptions;
//! use spinquant::{demo, optim, quant::Scheme};
//!
//! let (model, scheme) = (demo::model()?, Scheme::new(4, 4, 4));
//! let (calibration, text) = (demo::windows(demo::CALIBRATION, 64)?, demo::windows(&demo::TEST[..8_000], 64)?);
//! let outcome = Comparison {
//!     model: &model,
//!     unrotated: Unrotated::score(&model, &scheme, Test::on(&text), None, &mut ())?,
//!     calibration: &calibration,
//!     test: Test::on(&text),
//!     scheme,
//!     learn_scheme: scheme,
//!     options: &LearnOptions { steps: 3, ..LearnOptions::default() },
//!     optimizer: &|| optim::by_name("cayley"),
//!     seeds: 2,
//!     learn_seeds: 1,
//!     gptq: None,
//!     clip: None,
//! }
//! .run(&mut ())?;
//! let names: Vec<&str> = outcome.rows.iter().map(|row| row.name).collect();
//! assert_eq!(names[..4], ["full precision", "full precision, rotated", "rtn", "hadamard mean"]);
//! assert!(outcome.rows[0].judged.perplexity < outcome.rows[2].judged.perplexity);
//! let divergence = |row: usize| outcome.rows[row].judged.fidelity.as_ref().map(|f| f.divergence().mean);
//! assert!(divergence(1) < Some(1e-5) && divergence(1) < divergence(3) && divergence(3) < divergence(2));
//! assert_eq!(outcome.runs[0].start_perplexity, Some(outcome.random[0].perplexity));
//! # Ok::<(), spinquant::Error>(())
//! ```

use std::ops::ControlFlow;

use crate::calibrate::{Calibration, ClipFound, ClipGoal, LayerReport, quantize_weights};
use crate::data::Windows;
use crate::eval::exam::Exam;
use crate::eval::fidelity::{self, Fidelity};
use crate::eval::marks::Marks;
use crate::eval::perplexity_beside;
use crate::learn::{ClipChoice, LearnOptions, Learned, Named, Watch, learn_watched, search_clips_watched};
use crate::llama::{Llama, Merged};
use crate::optim::Optimizer;
use crate::quant::{Gptq, Online, Scheme};
use crate::rotation::{ClipEnds, Rotations};
use crate::{Error, Result};

/// What a network scored, or several on average.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// Perplexity on the text.
    pub perplexity: f64,
    /// Fidelity on the text to the model in full precision, where that was at hand.
    pub fidelity: Option<Fidelity>,
    /// The same on text of another kind.
    pub other: Option<Fidelity>,
    /// The marks of every task of the exam; none without one.
    pub marks: Vec<Marks>,
}

impl Judged {
    /// The mean of several networks' perplexities, and of their fidelities window by window and marks question by question.
    ///
    /// # Errors
    /// No network; networks that read different windows or were asked different questions.
    pub fn mean(all: &[Self]) -> Result<Self> {
        if all.is_empty() {
            return Err(Error::argument("scores", "expected those of at least one network, got none"));
        }
        let perplexity = all.iter().map(|j| j.perplexity).sum::<f64>() / all.len() as f64;
        let tasks = all.iter().map(|j| j.marks.len()).min().unwrap_or(0);
        let task = |t: usize| Marks::mean(&all.iter().map(|j| j.marks[t].clone()).collect::<Vec<_>>());
        let fidelity = |of: fn(&Self) -> &Option<Fidelity>| -> Result<Option<Fidelity>> {
            let known: Option<Vec<Fidelity>> = all.iter().map(|j| of(j).clone()).collect();
            known.map(|known| Fidelity::mean(&known)).transpose()
        };
        let (fidelity, other) = (fidelity(|j| &j.fidelity)?, fidelity(|j| &j.other)?);
        Ok(Self { perplexity, fidelity, other, marks: (0..tasks).map(task).collect::<Result<_>>()? })
    }
}

/// What networks are scored on.
#[derive(Clone, Copy, Debug)]
pub struct Test<'a> {
    /// Text, for perplexity and fidelity.
    pub text: &'a Windows,
    /// Text of another kind, for fidelity.
    pub other: Option<&'a Windows>,
    /// Tasks.
    pub exam: Option<&'a Exam>,
}

impl<'a> Test<'a> {
    /// A text alone.
    pub fn on(text: &'a Windows) -> Self {
        Self { text, other: None, exam: None }
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is called.
    pub name: &'static str,
    /// What the network is quantised to.
    pub scheme: Scheme,
    /// Which rotations, in words.
    pub rotations: String,
    /// How weights are quantised: `full`, `rtn` or `gptq`.
    pub weights: &'static str,
    /// Its scores.
    pub judged: Judged,
}

/// GPTQ, and the text that it is calibrated on.
pub type GptqRun<'a> = (&'a Gptq, &'a Calibration<'a>);

/// Scores of a network without rotations.
#[derive(Clone, Debug)]
pub struct Unrotated {
    /// In full precision.
    pub full: Judged,
    /// Quantised by the scheme, weights rounded to nearest.
    pub rtn: Judged,
    /// The same with GPTQ weights.
    pub gptq: Option<Judged>,
}

impl Unrotated {
    /// Scores `plain`, the model as its files have it: RMSNorm gains not folded ([`Llama::load_plain`]).
    ///
    /// # Errors
    /// Those of merging, quantising and scoring; [`Error::Interrupted`].
    pub fn score(
        plain: &Llama,
        scheme: &Scheme,
        test: Test<'_>,
        gptq: Option<GptqRun<'_>>,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let exact = plain.merge(None, &Scheme::FULL_PRECISION)?;
        let full = judge(&exact, Some(&exact), test, watch, "full precision")?;
        let rtn = judge(&plain.merge(None, scheme)?, Some(&exact), test, watch, "rtn")?;
        let gptq = match gptq {
            Some(run) => Some(judge(&quantized(plain, None, scheme, run, watch)?, Some(&exact), test, watch, "gptq")?),
            None => None,
        };
        Ok(Self { full, rtn, gptq })
    }
}

/// What a table is made from.
pub struct Comparison<'a> {
    /// With RMSNorm gains folded, to be rotated.
    pub model: &'a Llama,
    /// The rows without rotations.
    pub unrotated: Unrotated,
    /// Text to learn and to search clip ratios on.
    pub calibration: &'a Windows,
    /// What networks are scored on.
    pub test: Test<'a>,
    /// What is scored.
    pub scheme: Scheme,
    /// Quantisation and online Hadamards while learning.
    pub learn_scheme: Scheme,
    /// How rotations are learned. Scheme, seed and clip ratios are the table's; [`ClipChoice::Learned`] says that those of the rows with
    /// clip ratios are learned on.
    pub options: &'a LearnOptions,
    /// Makes an optimiser for every run.
    pub optimizer: &'a dyn Fn() -> Result<Box<dyn Optimizer>>,
    /// Random Hadamards to score.
    pub seeds: u64,
    /// Of those, how many to learn from.
    pub learn_seeds: u64,
    /// Adds rows with GPTQ weights, learned rotations for them learned at W16.
    pub gptq: Option<GptqRun<'a>>,
    /// Adds rows with clip ratios searched on every start: by what, and on how many windows of the calibration text.
    pub clip: Option<(ClipGoal, usize)>,
}

/// A start that was scored with clip ratios.
#[derive(Clone, Debug)]
pub struct Clipped {
    /// Its scores with them.
    pub judged: Judged,
    /// The search.
    pub found: ClipFound,
}

/// A start that was learned from.
#[derive(Clone, Debug)]
pub struct Run {
    /// Of the Hadamard, the held-out windows and the order of the others.
    pub seed: u64,
    /// What the network was quantised to while learning.
    pub learned_at: Scheme,
    /// Perplexity of the start, where it was scored.
    pub start_perplexity: Option<f64>,
    /// Scores of what was learned.
    pub judged: Judged,
    /// Held-out cross entropy after so many steps, the start first.
    pub held_out: Vec<(usize, f64)>,
    /// The clip ratios that it was learned and scored with, where some were searched.
    pub clip: Option<ClipFound>,
    /// The rest.
    pub learned: Learned,
}

/// The table, and what is behind its means.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The table.
    pub rows: Vec<Row>,
    /// Scores of every random Hadamard, by seed.
    pub random: Vec<Judged>,
    /// The same with GPTQ weights.
    pub random_gptq: Vec<Judged>,
    /// The same with clip ratios.
    pub random_clip: Vec<Clipped>,
    /// What was learned, by seed.
    pub runs: Vec<Run>,
    /// The same with clip ratios.
    pub runs_clip: Vec<Run>,
    /// Scores with GPTQ weights and rotations learned at W16, by seed.
    pub learned_gptq: Vec<Judged>,
    /// What clip ratios were searched by.
    pub clip: Option<ClipGoal>,
}

/// Perplexity, fidelity to `full` (the model in full precision) where that is given, and marks, told to a watch.
///
/// # Errors
/// Those of [`perplexity_beside`] and [`Exam::take`].
pub fn judge(
    network: &Merged,
    full: Option<&Merged>,
    Test { text, other, exam }: Test<'_>,
    watch: &mut dyn Watch,
    what: &str,
) -> Result<Judged> {
    watch.begin(what, text.len());
    let (score, fidelity) = perplexity_beside(network, full, text, |done| watch.at(done))?;
    let other = match (full, other) {
        (Some(full), Some(other)) => {
            watch.begin(&format!("{what}, other text"), other.len());
            Some(fidelity::fidelity(network, full, other, |done| watch.at(done))?)
        }
        _ => None,
    };
    let marks = match exam {
        Some(exam) => {
            watch.begin(&format!("{what}, answers"), exam.requests().len());
            exam.take(network, |done| watch.at(done))?
        }
        None => vec![],
    };
    Ok(Judged { perplexity: score.perplexity, fidelity, other, marks })
}

/// Rotates a model and quantises its weights by GPTQ, told to a watch: layers, and where a Hessian asked for more damping.
///
/// # Errors
/// Those of [`quantize_weights`].
pub fn quantized(
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    (gptq, calibration): GptqRun<'_>,
    watch: &mut dyn Watch,
) -> Result<Merged> {
    watch.begin(&format!("{}, layers", gptq.correction), model.config.layers);
    let told = |report: &LayerReport| gptq_layer(gptq, report, watch);
    quantize_weights(model, rotations, scheme, gptq, Some(calibration), &mut (), told)
}

/// Tells a watch of a layer that GPTQ quantised.
pub fn gptq_layer(gptq: &Gptq, report: &LayerReport, watch: &mut dyn Watch) -> ControlFlow<()> {
    if let Some(damping) = report.damping.filter(|d| *d > gptq.damping) {
        let layer = report.done - 1;
        watch.note(&format!("layer {layer}: a Hessian is not positive definite; damping raised to {damping}"));
    }
    watch.at(report.done)
}

impl Comparison<'_> {
    fn hadamard(&self, seed: u64) -> Result<Rotations> {
        let c = &self.model.config;
        Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed)
    }

    /// The model in full precision, which shares the model's weights.
    fn full(&self) -> Result<Merged> {
        self.model.merge_exact(None, &Scheme::FULL_PRECISION.online(Online::NONE))
    }

    fn evaluate(&self, rotations: &Rotations, scheme: &Scheme, watch: &mut dyn Watch, what: &str) -> Result<Judged> {
        judge(&self.model.merge(Some(rotations), scheme)?, Some(&self.full()?), self.test, watch, what)
    }

    fn with_gptq(&self, run: GptqRun<'_>, rotations: &Rotations, watch: &mut dyn Watch, what: &str) -> Result<Judged> {
        let network = quantized(self.model, Some(rotations), &self.scheme, run, watch)?;
        judge(&network, Some(&self.full()?), self.test, watch, what)
    }

    fn learn(
        &self,
        seed: u64,
        scheme: Scheme,
        clip: Option<&ClipFound>,
        watch: &mut dyn Watch,
        what: String,
    ) -> Result<(Learned, Vec<(usize, f64)>)> {
        let options = LearnOptions { scheme, seed, clip: ClipChoice::Keep, ..self.options.clone() };
        let mut named = Named::new(watch, what, 0.0);
        let mut start = self.hadamard(seed)?;
        if let (Some(found), ClipChoice::Learned) = (clip, self.options.clip) {
            start.clips = ClipEnds::of_ratios(&scheme.active_sites(), &found.layers, self.model.config.kv_heads)?;
        }
        let learned = learn_watched(self.model, self.calibration, start, (self.optimizer)()?.as_mut(), &options, &mut named)?;
        Ok((learned, named.curve.iter().map(|p| (p.step, p.held_out)).collect()))
    }

    /// Makes the table.
    ///
    /// # Errors
    /// Those of merging, scoring, searching and learning; [`Error::Interrupted`].
    pub fn run(&self, watch: &mut dyn Watch) -> Result<Outcome> {
        let Self { scheme, learn_scheme, .. } = *self;
        let full = Scheme::FULL_PRECISION;
        let mut made = Outcome { clip: self.clip.map(|(goal, _)| goal), ..Outcome::default() };
        let row = |made: &mut Outcome, name, scheme, rotations: String, weights, judged| {
            made.rows.push(Row { name, scheme, rotations, weights, judged });
        };

        row(&mut made, "full precision", full, "none".into(), "full", self.unrotated.full.clone());
        let rotated = self.evaluate(&self.hadamard(0)?, &full.online(scheme.online), watch, "full precision, rotated")?;
        row(&mut made, "full precision, rotated", full, "hadamard:0".into(), "full", rotated);
        row(&mut made, "rtn", scheme, "none".into(), "rtn", self.unrotated.rtn.clone());
        for seed in 0..self.seeds {
            made.random.push(self.evaluate(&self.hadamard(seed)?, &scheme, watch, &format!("hadamard:{seed}"))?);
        }
        let random = made.random.clone();
        if !random.is_empty() {
            let by = |better: fn(&f64, &f64) -> bool| {
                (0..random.len()).reduce(|a, b| if better(&random[b].perplexity, &random[a].perplexity) { b } else { a })
            };
            let (best, worst) = (by(|a, b| a < b).unwrap_or(0), by(|a, b| a > b).unwrap_or(0));
            let rotations = format!("hadamard, {}", seeds(random.len()));
            row(&mut made, "hadamard mean", scheme, rotations, "rtn", Judged::mean(&random)?);
            row(&mut made, "hadamard best", scheme, format!("hadamard:{best}"), "rtn", random[best].clone());
            row(&mut made, "hadamard worst", scheme, format!("hadamard:{worst}"), "rtn", random[worst].clone());
        }
        if let Some(judged) = self.unrotated.gptq.clone() {
            row(&mut made, "gptq", scheme, "none".into(), "gptq", judged);
        }
        if let Some(run) = self.gptq {
            for seed in 0..self.seeds {
                let judged = self.with_gptq(run, &self.hadamard(seed)?, watch, &format!("hadamard:{seed} + gptq"))?;
                made.random_gptq.push(judged);
            }
            if !made.random_gptq.is_empty() {
                let rotations = format!("hadamard, {}", seeds(made.random_gptq.len()));
                let judged = Judged::mean(&made.random_gptq)?;
                row(&mut made, "hadamard + gptq mean", scheme, rotations, "gptq", judged);
            }
        }
        // Ratios belong to the scheme that is scored; rotations are learned with them.
        let mut clipped: Vec<(Scheme, ClipFound)> = vec![];
        if let Some(how) = self.clip {
            for seed in 0..self.seeds.max(self.learn_seeds) {
                let start = self.hadamard(seed)?;
                let found = search_clips_watched(self.model, &start, &scheme, self.calibration, how, watch)?;
                clipped.push((Scheme { activation_clip: found.ratios, ..scheme }, found));
            }
        }
        for (seed, (scored, found)) in (0..self.seeds).zip(&clipped) {
            let judged = self.evaluate(&self.hadamard(seed)?, scored, watch, &format!("hadamard:{seed} + clip"))?;
            made.random_clip.push(Clipped { judged, found: found.clone() });
        }
        if !made.random_clip.is_empty() {
            let all: Vec<Judged> = made.random_clip.iter().map(|c| c.judged.clone()).collect();
            let rotations = format!("hadamard, {}", seeds(all.len()));
            row(&mut made, "hadamard + clip mean", scheme, rotations, "rtn", Judged::mean(&all)?);
        }
        let w16_scheme = scheme.unquantized_weights().online(learn_scheme.online);
        for seed in 0..self.learn_seeds {
            if let Some(run) = self.gptq {
                let (learned, _) = self.learn(seed, w16_scheme, None, watch, format!("learning at W16 from hadamard:{seed}"))?;
                made.learned_gptq.push(self.with_gptq(run, &learned.rotations, watch, &format!("learned:{seed} + gptq"))?);
            }
            let start = made.random.get(seed as usize).map(|judged| judged.perplexity);
            made.runs.push(self.learned(seed, learn_scheme, (&scheme, None), start, watch)?);
            if let Some((scored, found)) = clipped.get(seed as usize) {
                let learn_scheme = Scheme { activation_clip: scored.activation_clip, ..learn_scheme };
                let start = made.random_clip.get(seed as usize).map(|c| c.judged.perplexity);
                made.runs_clip.push(self.learned(seed, learn_scheme, (scored, Some(found)), start, watch)?);
            }
        }
        let with = if w16_scheme.online == scheme.online { String::new() } else { format!(" with {}", w16_scheme.online) };
        let clipped = if self.options.clip == ClipChoice::Learned { "learned + learned clip" } else { "learned + clip" };
        for (name, clip) in [("learned", false), (clipped, true)] {
            let runs = if clip { &made.runs_clip } else { &made.runs };
            let all: Vec<Judged> = runs.iter().map(|run| run.judged.clone()).collect();
            if !all.is_empty() {
                let rotations = format!("learned at {learn_scheme}{with}, {}", seeds(all.len()));
                row(&mut made, name, scheme, rotations, "rtn", Judged::mean(&all)?);
            }
        }
        if !made.learned_gptq.is_empty() {
            let rotations = format!("learned at {w16_scheme}{with}, {}", seeds(made.learned_gptq.len()));
            let judged = Judged::mean(&made.learned_gptq)?;
            row(&mut made, "learned + gptq", scheme, rotations, "gptq", judged);
        }
        Ok(made)
    }

    /// Learns from the Hadamard of a seed under one scheme and scores under another; `start_perplexity` is the perplexity before.
    fn learned(
        &self,
        seed: u64,
        learned_at: Scheme,
        (scored, clip): (&Scheme, Option<&ClipFound>),
        start_perplexity: Option<f64>,
        watch: &mut dyn Watch,
    ) -> Result<Run> {
        let with = if clip.is_some() && learned_at.activation_clip != self.scheme.activation_clip { " + clip" } else { "" };
        let (learned, mut held_out) =
            self.learn(seed, learned_at, clip, watch, format!("learning from hadamard:{seed}{with}"))?;
        held_out.insert(0, (0, learned.held_out_first));
        let judged = self.evaluate(&learned.rotations, scored, watch, &format!("learned:{seed}{with}"))?;
        Ok(Run { seed, learned_at, start_perplexity, judged, held_out, clip: clip.cloned(), learned })
    }
}

fn seeds(n: usize) -> String {
    if n == 1 { "1 seed".into() } else { format!("{n} seeds") }
}
