//! The paper's table on one model: full precision, plain rounding, random Hadamards, learned rotations; with weights by GPTQ and its
//! successors, and searched clip ratios, where they are wanted.
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
//!     unrotated: Unrotated::score(&model, &scheme, Test::on(&text), &[], &mut ())?,
//!     calibration: &calibration,
//!     test: Test::on(&text),
//!     scheme,
//!     learn_scheme: scheme,
//!     options: &LearnOptions { steps: 3, ..LearnOptions::default() },
//!     optimizer: &|| optim::by_name("cayley"),
//!     seeds: 2,
//!     learn_seeds: 1,
//!     quantizers: &[],
//!     baselines: None,
//!     clip: None,
//! }
//! .run(&mut ())?;
//! let names: Vec<&str> = outcome.rows.iter().map(|row| &row.name[..]).collect();
//! assert_eq!(names[..4], ["full precision", "full precision, rotated", "rtn", "hadamard mean"]);
//! assert!(outcome.rows[0].judged.perplexity < outcome.rows[2].judged.perplexity);
//! let divergence = |row: usize| outcome.rows[row].judged.fidelity.as_ref().map(|f| f.divergence().mean);
//! assert!(divergence(1) < Some(1e-5) && divergence(1) < divergence(3) && divergence(3) < divergence(2));
//! assert_eq!(outcome.runs[0].start_perplexity, Some(outcome.random[0].perplexity));
//! # Ok::<(), spinquant::Error>(())
//! ```

mod judged;
mod layers;
mod seeds;

pub use judged::{Judged, Row, Test, judge};
pub use layers::LayerWatch;

use std::time::Instant;

use crate::baselines::{QatOptions, Training, adapted, llm_qat, smooth_quant};
use crate::calibrate::{Calibration, ClipFound, ClipGoal, quantize_weights};
use crate::data::Windows;
use crate::learn::{ClipChoice, LearnOptions, Learned, Named, Watch, WeightClip, learn_watched, search_clips_watched};
use crate::llama::{Llama, Merged};
use crate::optim::Optimizer;
use crate::quant::{Gptq, Online, Scheme};
use crate::ranks::Group;
use crate::rotation::{ClipEnds, Rotations};
use crate::{Error, Result};

/// GPTQ, the text that it is calibrated on, and what is learned of every layer then.
pub type GptqRun<'a> = (&'a Gptq, &'a Calibration<'a>);

/// Scores of a network without rotations.
#[derive(Clone, Debug)]
pub struct Unrotated {
    /// In full precision.
    pub full: Judged,
    /// Quantised by the scheme, weights rounded to nearest.
    pub rtn: Judged,
    /// The same with weights by every quantiser, and what they took.
    pub quantized: Vec<(Judged, Training)>,
    /// The same with weights that were trained ([`Unrotated::train`]).
    pub qat: Option<(Judged, Training)>,
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
        quantizers: &[GptqRun<'_>],
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let exact = plain.merge(None, &Scheme::FULL_PRECISION)?;
        let full = judge(&exact, Some(&exact), test, watch, "full precision")?;
        let rtn = judge(&plain.merge(None, scheme)?, Some(&exact), test, watch, "rtn")?;
        let mut quantized = vec![];
        for run in quantizers {
            let (network, training) = timed_gptq(plain, None, scheme, *run, watch)?;
            quantized.push((judge(&network, Some(&exact), test, watch, &name_of(*run))?, training));
        }
        Ok(Self { full, rtn, quantized, qat: None })
    }

    /// Adds the scores of weights that were trained through their quantisers ([`llm_qat`]); tells the watch why not where they do not fit on the
    /// GPU.
    ///
    /// # Errors
    /// Those of [`llm_qat`] but for a GPU without room, and of scoring.
    pub fn train(
        &mut self,
        plain: &Llama,
        scheme: &Scheme,
        test: Test<'_>,
        options: &QatOptions,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let trained = llm_qat(plain, scheme, options, watch);
        // All ranks have the row, or none.
        let fits = !matches!(trained, Err(Error::Device { .. }));
        let trained = match trained {
            Ok(_) if test.ranks.any("whether LLM-QAT does not fit", !fits)? => return Ok(()),
            Err(e @ Error::Device { .. }) => {
                test.ranks.any("whether LLM-QAT does not fit", !fits)?;
                watch.note(&format!("no row of LLM-QAT: {e}"));
                return Ok(());
            }
            trained => trained?,
        };
        let exact = plain.merge(None, &Scheme::FULL_PRECISION)?;
        self.qat = Some((judge(&trained.network, Some(&exact), test, watch, "llm-qat")?, trained.training));
        Ok(())
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
    /// How rotations are learned, and by which [ranks](LearnOptions::ranks). Scheme, seed and clip ratios are the table's, and at W16 those of weights are not learned; [`ClipChoice::Learned`] says that those of the rows with
    /// clip ratios are learned on.
    pub options: &'a LearnOptions,
    /// Makes an optimiser for every run.
    pub optimizer: &'a dyn Fn() -> Result<Box<dyn Optimizer>>,
    /// Random Hadamards to score.
    pub seeds: u64,
    /// Of those, how many to learn from.
    pub learn_seeds: u64,
    /// Adds rows with weights by each of these, learned rotations for them learned at W16 (with clip ratios where [`Comparison::clip`] asks for
    /// some), and one with these rotations before weights are quantised. The same as [`Unrotated::score`] was given.
    pub quantizers: &'a [GptqRun<'a>],
    /// Adds the rows of SmoothQuant, searched on so many windows of the calibration text, and of the full-precision model with its own gains
    /// trained as rotations are ([`baselines`](crate::baselines)).
    pub baselines: Option<usize>,
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
    /// The same with weights by every quantiser: its name, and scores by seed.
    pub random_quantized: Vec<(String, Vec<Judged>)>,
    /// The same with clip ratios.
    pub random_clip: Vec<Clipped>,
    /// What was learned, by seed.
    pub runs: Vec<Run>,
    /// The same with clip ratios.
    pub runs_clip: Vec<Run>,
    /// Scores with rotations learned at W16, weights not quantised, by seed.
    pub learned_w16: Vec<Judged>,
    /// The same with weights by every quantiser: its name, and scores by seed.
    pub learned_quantized: Vec<(String, Vec<Judged>)>,
    /// What clip ratios were searched by.
    pub clip: Option<ClipGoal>,
}

/// Rotates a model and quantises its weights by GPTQ or a successor, told to a watch ([`LayerWatch`]).
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
    let mut layers = LayerWatch::new(watch, &name_of((gptq, calibration)), model.config.layers, Some(gptq.damping));
    quantize_weights(model, rotations, scheme, gptq, Some(calibration), &mut (), |report| layers.told(report))
}

/// The same, and what it took.
fn timed_gptq(
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    run: GptqRun<'_>,
    watch: &mut dyn Watch,
) -> Result<(Merged, Training)> {
    let begun = Instant::now();
    let network = quantized(model, rotations, scheme, run, watch)?;
    Ok((network, Training::since(begun, run.1.windows.len() * run.1.text.seq_len())))
}

/// What a quantiser is called in the table.
fn name_of((gptq, calibration): GptqRun<'_>) -> String {
    match calibration.reconstruct {
        None => gptq.correction.to_string(),
        Some(by) => format!("{}+{}", gptq.correction, by.to_string().replace(',', "+")),
    }
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
        self.evaluate_on(self.test, rotations, scheme, watch, what)
    }

    fn evaluate_on(
        &self,
        test: Test<'_>,
        rotations: &Rotations,
        scheme: &Scheme,
        watch: &mut dyn Watch,
        what: &str,
    ) -> Result<Judged> {
        judge(&self.model.merge(Some(rotations), scheme)?, Some(&self.full()?), test, watch, what)
    }

    fn with_gptq(
        &self,
        test: Test<'_>,
        (gptq, calibration): GptqRun<'_>,
        (rotations, scheme): (&Rotations, &Scheme),
        watch: &mut dyn Watch,
        what: &str,
    ) -> Result<(Judged, Training)> {
        // Who scores alone calibrates alone.
        let ranks = if test.ranks.world() == 1 { Group::alone() } else { calibration.ranks.clone() };
        let calibration = &Calibration { ranks, ..calibration.clone() };
        let (network, training) = timed_gptq(self.model, Some(rotations), scheme, (gptq, calibration), watch)?;
        Ok((judge(&network, Some(&self.full()?), test, watch, what)?, training))
    }

    /// What a run of learning took.
    fn training_of(&self, learned: &Learned) -> Training {
        let LearnOptions { steps, batch, .. } = *self.options;
        let tokens = steps * batch * self.calibration.seq_len();
        Training { tokens, steps, seconds: steps as f64 * learned.seconds_per_step }
    }

    /// The full-precision model with its own gains trained; tells the watch where the objective does not depend on them.
    fn adapted(&self, watch: &mut dyn Watch) -> Result<Option<Row>> {
        if !self.options.objective.needs().of_predictions() {
            watch.note(&format!("no row of adapted gains: {} does not depend on them", self.options.objective.name()));
            return Ok(None);
        }
        let options = LearnOptions { seed: 0, ..self.options.clone() };
        let (trained, name) = (adapted(self.model, self.calibration, &options, watch)?, "full precision, adapted");
        let judged = judge(&trained.network, Some(&self.full()?), self.test, watch, name)?;
        let (scheme, rotations) = (Scheme::FULL_PRECISION, "none, gains trained".into());
        Ok(Some(Row { name: name.into(), scheme, rotations, weights: "full".into(), judged, training: trained.training }))
    }

    fn smooth(&self, windows: usize, watch: &mut dyn Watch) -> Result<Row> {
        let found = smooth_quant(self.model, &self.scheme, self.calibration, &self.calibration.spread(windows), watch)?;
        let (network, name) = (self.model.merge(Some(&found.rotations), &self.scheme.unrotated())?, "smoothquant");
        let judged = judge(&network, Some(&self.full()?), self.test, watch, name)?;
        let rotations = format!("none, scales with α = {}", found.exponent);
        Ok(Row { name: name.into(), scheme: self.scheme, rotations, weights: "rtn".into(), judged, training: found.training })
    }

    fn learn(
        &self,
        seed: u64,
        scheme: Scheme,
        clip: Option<&ClipFound>,
        watch: &mut dyn Watch,
        what: String,
    ) -> Result<(Learned, Vec<(usize, f64)>)> {
        let weight_clip = if scheme.weight_bits < 16 { self.options.weight_clip } else { WeightClip::Search };
        let mut options = LearnOptions { scheme, seed, clip: ClipChoice::Keep, weight_clip, ..self.options.clone() };
        let mut named = Named::new(watch, what, 0.0);
        let mut start = self.hadamard(seed)?;
        if let (Some(found), ClipChoice::Learned) = (clip, self.options.clip) {
            start.clips = ClipEnds::of_ratios(&scheme.active_sites(), &found.layers, self.model.config.kv_heads)?;
        }
        // Not every row learns clip ratios.
        if options.clone().with_clips_of(&start)?.check_clip_objective().is_err() {
            options.clip_objective = None;
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
        let none = Training::default();
        let row = |made: &mut Outcome, name: &str, scheme, rotations: String, weights: &str, (judged, training)| {
            made.rows.push(Row { name: name.into(), scheme, rotations, weights: weights.into(), judged, training });
        };

        row(&mut made, "full precision", full, "none".into(), "full", (self.unrotated.full.clone(), none));
        let rotated = self.evaluate(&self.hadamard(0)?, &full.online(scheme.online), watch, "full precision, rotated")?;
        row(&mut made, "full precision, rotated", full, "hadamard:0".into(), "full", (rotated, none));
        if self.baselines.is_some() {
            made.rows.extend(self.adapted(watch)?);
        }
        row(&mut made, "rtn", scheme, "none".into(), "rtn", (self.unrotated.rtn.clone(), none));
        if let Some(windows) = self.baselines {
            made.rows.push(self.smooth(windows, watch)?);
        }
        if let Some(trained) = self.unrotated.qat.clone() {
            row(&mut made, "llm-qat", scheme, "none".into(), "qat", trained);
        }
        let scored = self.seeds(self.seeds, watch, |seed, test, watch| {
            let judged = self.evaluate_on(test, &self.hadamard(seed)?, &scheme, watch, &format!("hadamard:{seed}"))?;
            Ok((judged, none))
        })?;
        made.random = scored.into_iter().map(|(judged, _)| judged).collect();
        let random = made.random.clone();
        if !random.is_empty() {
            let by = |better: fn(&f64, &f64) -> bool| {
                (0..random.len()).reduce(|a, b| if better(&random[b].perplexity, &random[a].perplexity) { b } else { a })
            };
            let (best, worst) = (by(|a, b| a < b).unwrap_or(0), by(|a, b| a > b).unwrap_or(0));
            let rotations = format!("hadamard, {}", seeds(random.len()));
            row(&mut made, "hadamard mean", scheme, rotations, "rtn", (Judged::mean(&random)?, none));
            row(&mut made, "hadamard best", scheme, format!("hadamard:{best}"), "rtn", (random[best].clone(), none));
            row(&mut made, "hadamard worst", scheme, format!("hadamard:{worst}"), "rtn", (random[worst].clone(), none));
        }
        for (run, scored) in self.quantizers.iter().zip(&self.unrotated.quantized) {
            let name = name_of(*run);
            row(&mut made, &name, scheme, "none".into(), &name, scored.clone());
        }
        for run in self.quantizers {
            let name = name_of(*run);
            let scored = self.seeds(self.seeds, watch, |seed, test, watch| {
                let what = format!("hadamard:{seed} + {name}");
                self.with_gptq(test, *run, (&self.hadamard(seed)?, &scheme), watch, &what)
            })?;
            let (all, trainings): (Vec<_>, Vec<_>) = scored.into_iter().unzip();
            if !all.is_empty() {
                let rotations = format!("hadamard, {}", seeds(all.len()));
                let scored = (Judged::mean(&all)?, Training::mean(&trainings));
                row(&mut made, &format!("hadamard + {name} mean"), scheme, rotations, &name, scored);
            }
            made.random_quantized.push((name, all));
        }
        // Ratios belong to the scheme that is scored; rotations are learned with them.
        let mut clipped: Vec<(Scheme, ClipFound)> = vec![];
        let mut searches = vec![];
        if let Some(how) = self.clip {
            for seed in 0..self.seeds.max(self.learn_seeds) {
                let (start, begun) = (self.hadamard(seed)?, Instant::now());
                let found = search_clips_watched(&self.options.ranks, self.model, &start, &scheme, self.calibration, how, watch)?;
                // By error the windows are read once, whatever is tried on them.
                let times = if how.0 == ClipGoal::Loss { found.tried } else { 1 };
                let tokens = times * self.calibration.spread(how.1).len() * self.calibration.seq_len();
                searches.push(Training::since(begun, tokens));
                clipped.push((Scheme { activation_clip: found.ratios, ..scheme }, found));
            }
        }
        let with_ratios = self.seeds.min(clipped.len() as u64);
        let judged = self.seeds(with_ratios, watch, |seed, test, watch| {
            let (scored, what) = (&clipped[seed as usize].0, format!("hadamard:{seed} + clip"));
            Ok((self.evaluate_on(test, &self.hadamard(seed)?, scored, watch, &what)?, none))
        })?;
        let both = judged.into_iter().zip(&clipped);
        made.random_clip = both.map(|((judged, _), (_, found))| Clipped { judged, found: found.clone() }).collect();
        if !made.random_clip.is_empty() {
            let all: Vec<Judged> = made.random_clip.iter().map(|c| c.judged.clone()).collect();
            let rotations = format!("hadamard, {}", seeds(all.len()));
            row(&mut made, "hadamard + clip mean", scheme, rotations, "rtn", (Judged::mean(&all)?, Training::mean(&searches)));
        }
        let w16_scheme = scheme.unquantized_weights().online(learn_scheme.online);
        let mut w16_trainings = vec![];
        let mut quantized: Vec<(String, Vec<(Judged, Training)>)> =
            self.quantizers.iter().map(|run| (name_of(*run), vec![])).collect();
        for seed in 0..self.learn_seeds {
            if !self.quantizers.is_empty() {
                // With clip ratios where there are rows with them.
                let (scored, found) = clipped.get(seed as usize).map_or((scheme, None), |(scored, found)| (*scored, Some(found)));
                let w16_scheme = Scheme { activation_clip: scored.activation_clip, ..w16_scheme };
                let (learned, _) = self.learn(seed, w16_scheme, found, watch, format!("learning at W16 from hadamard:{seed}"))?;
                let (rotations, unquantized) = (&learned.rotations, scored.unquantized_weights());
                made.learned_w16.push(self.evaluate(rotations, &unquantized, watch, &format!("learned:{seed}, W16"))?);
                let searching = if found.is_some() { Training::mean(&searches) } else { none };
                let learning = searching.and(self.training_of(&learned));
                w16_trainings.push(learning);
                for (run, (name, scores)) in self.quantizers.iter().zip(&mut quantized) {
                    let (judged, training) =
                        self.with_gptq(self.test, *run, (rotations, &scored), watch, &format!("learned:{seed} + {name}"))?;
                    scores.push((judged, learning.and(training)));
                }
            }
            let start = made.random.get(seed as usize).map(|judged| judged.perplexity);
            made.runs.push(self.learned(seed, learn_scheme, (&scheme, None), start, watch)?);
            if let Some((scored, found)) = clipped.get(seed as usize) {
                let learn_scheme = Scheme { activation_clip: scored.activation_clip, ..learn_scheme };
                let start = made.random_clip.get(seed as usize).map(|c| c.judged.perplexity);
                made.runs_clip.push(self.learned(seed, learn_scheme, (scored, Some(found)), start, watch)?);
            }
        }
        let clipped_runs = !clipped.is_empty();
        let with = if w16_scheme.online == scheme.online { String::new() } else { format!(" with {}", w16_scheme.online) };
        let clipped = if self.options.clip == ClipChoice::Learned { "learned + learned clip" } else { "learned + clip" };
        for (name, clip) in [("learned", false), (clipped, true)] {
            let runs = if clip { &made.runs_clip } else { &made.runs };
            let all: Vec<Judged> = runs.iter().map(|run| run.judged.clone()).collect();
            if !all.is_empty() {
                let weights = self.options.weight_clip == WeightClip::Learned;
                let too = if weights { ", clip ratios of weights too" } else { "" };
                let rotations = format!("learned at {learn_scheme}{with}{too}, {}", seeds(all.len()));
                let learning: Vec<Training> = runs.iter().map(|run| self.training_of(&run.learned)).collect();
                let searching = if clip { Training::mean(&searches) } else { none };
                let scored = (Judged::mean(&all)?, searching.and(Training::mean(&learning)));
                row(&mut made, name, scheme, rotations, "rtn", scored);
            }
        }
        if !made.learned_w16.is_empty() {
            let rotations = format!("learned at {w16_scheme}{with}, {}", seeds(made.learned_w16.len()));
            let scored = (Judged::mean(&made.learned_w16)?, Training::mean(&w16_trainings));
            let clipped = if clipped_runs { clipped } else { "learned" };
            row(&mut made, &format!("{clipped} at W16"), scheme.unquantized_weights(), rotations.clone(), "full", scored);
            for (name, scores) in quantized {
                let (all, trainings): (Vec<Judged>, Vec<Training>) = scores.into_iter().unzip();
                let scored = (Judged::mean(&all)?, Training::mean(&trainings));
                row(&mut made, &format!("{clipped} + {name}"), scheme, rotations.clone(), &name, scored);
                made.learned_quantized.push((name, all));
            }
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
