//! `spinquant compare`: the paper's table on one model.

use std::path::PathBuf;

use serde_json::{Value, json};
use spinquant::calibrate::ClipGoal;
use spinquant::data::{FirstToken, Windows};
use spinquant::learn::Learned;
use spinquant::llama::Llama;
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{Error, Result};

use crate::clip::{self, ClipChoice};
use crate::common::{ModelArgs, Progress, SchemeArgs, at_least_one};
use crate::eval::{file_name, limited, score};
use crate::learn::Recipe;
use crate::weights::GptqArgs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Text to learn on.
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Text to score.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Random Hadamard starts to score.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Of those, how many to learn from.
    #[arg(long, default_value_t = 1)]
    learn_seeds: u64,
    /// Quantisation while learning (default: the scheme itself, as is right for round-to-nearest weights).
    #[arg(long, value_name = "W.A.KV.")]
    learn_scheme: Option<Scheme>,
    /// Hadamards in the graph while learning (default: those of --online).
    #[arg(long, value_name = "WHICH")]
    learn_online: Option<Online>,
    /// Add rows with GPTQ weights, learned rotations for them learned at W16.
    #[arg(long)]
    gptq: bool,
    #[command(flatten)]
    gptq_args: GptqArgs,
    /// Add rows with clip ratios of activations, K and V searched on every random Hadamard, and with rotations learned from it with
    /// them: error (of every quantiser, by itself) or loss (of the whole network). The paper clips nothing.
    #[arg(long, value_name = "error|loss|none", default_value = "none", conflicts_with = "activation_clip")]
    clip: ClipChoice,
    /// Windows of --calibration to search them on.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    clip_windows: usize,
    /// Score at most this many windows.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// One line of the table.
struct Row {
    name: &'static str,
    scheme: Scheme,
    rotations: String,
    weights: &'static str,
    perplexity: f64,
}

/// Perplexities of a network without rotations, quantised by its scheme.
pub struct Unrotated {
    full: f64,
    rtn: f64,
    gptq: Option<f64>,
}

impl Unrotated {
    /// Scores `plain`, the model as it is: RMSNorm gains not folded. GPTQ too, where it is asked for.
    pub fn score(
        plain: &Llama,
        scheme: &Scheme,
        (calibration, text): (&Windows, &Windows),
        gptq: Option<&GptqArgs>,
        progress: &Progress,
    ) -> Result<Self> {
        let rtn =
            |scheme: &Scheme, what: &str| Ok::<_, Error>(score(&plain.merge(None, scheme)?, text, progress, what)?.perplexity);
        let with_gptq = |args: &GptqArgs| {
            let merged = args.quantize(plain, None, scheme, calibration, progress)?;
            Ok::<_, Error>(score(&merged, text, progress, "gptq")?.perplexity)
        };
        Ok(Self {
            full: rtn(&Scheme::FULL_PRECISION, "full precision")?,
            rtn: rtn(scheme, "rtn")?,
            gptq: gptq.map(with_gptq).transpose()?,
        })
    }
}

/// What a table is made from.
pub struct Comparison<'a> {
    /// With RMSNorm gains folded, to be rotated.
    pub model: &'a Llama,
    /// The rows without rotations.
    pub unrotated: Unrotated,
    pub calibration: &'a Windows,
    pub text: &'a Windows,
    pub scheme: Scheme,
    /// Quantisation and online Hadamards while learning.
    pub learn_scheme: Scheme,
    pub recipe: &'a Recipe,
    pub seeds: u64,
    pub learn_seeds: u64,
    pub gptq: Option<&'a GptqArgs>,
    /// By what clip ratios are searched, and on how many windows.
    pub clip: Option<(ClipGoal, usize)>,
}

/// The table, and what was learned.
pub struct Outcome {
    rows: Vec<Row>,
    /// What the scored text starts with.
    starts_with: FirstToken,
    /// Perplexity of every random Hadamard.
    random: Vec<f64>,
    /// The same with GPTQ weights.
    random_gptq: Vec<f64>,
    /// The same with clip ratios, and which.
    random_clip: Vec<Value>,
    runs: Vec<Value>,
    /// With clip ratios.
    runs_clip: Vec<Value>,
    /// Perplexity with GPTQ weights and rotations learned at W16, by seed.
    learned_gptq: Vec<f64>,
    /// Rotations of the first seed.
    pub learned: Option<Learned>,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let config = args.model.config()?;
    let calibration = args.model.windows(&config, &args.calibration, args.seq_len)?;
    let text = limited(args.model.windows(&config, &args.text, args.seq_len)?, args.max_windows)?;
    let (scheme, gptq) = (args.scheme.scheme(), args.gptq.then_some(&args.gptq_args));
    // One model at a time: the plain one is gone before the one that is rotated comes.
    let unrotated = Unrotated::score(&args.model.load_plain(&progress)?, &scheme, (&calibration, &text), gptq, &progress)?;
    let model = args.model.load(&progress)?;
    let learn_scheme = args.learn_scheme.map_or(scheme, |s| Scheme {
        weight_bits: s.weight_bits,
        activation_bits: s.activation_bits,
        key_bits: s.key_bits,
        value_bits: s.value_bits,
        ..scheme
    });
    let comparison = Comparison {
        model: &model,
        unrotated,
        calibration: &calibration,
        text: &text,
        scheme,
        learn_scheme: learn_scheme.online(args.learn_online.unwrap_or(scheme.online)),
        recipe: &args.recipe,
        seeds: args.seeds,
        learn_seeds: args.learn_seeds,
        gptq,
        clip: args.clip.goal(&scheme).map(|goal| (goal, args.clip_windows)),
    };
    let outcome = comparison.run(&progress)?;
    if args.json {
        out!("{}", outcome.json());
    } else {
        out!("{} on {}, windows of {}", file_name(&args.model.model), file_name(&args.text), args.seq_len);
        outcome.print();
    }
    Ok(())
}

impl Comparison<'_> {
    fn hadamard(&self, seed: u64) -> Result<Rotations> {
        let c = &self.model.config;
        Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed)
    }

    fn evaluate(&self, rotations: &Rotations, scheme: &Scheme, progress: &Progress, what: &str) -> Result<f64> {
        Ok(score(&self.model.merge(Some(rotations), scheme)?, self.text, progress, what)?.perplexity)
    }

    /// Makes the table.
    pub fn run(&self, progress: &Progress) -> Result<Outcome> {
        let Self { scheme, learn_scheme, recipe, calibration, .. } = *self;
        let evaluate = |rotations: &Rotations, scheme: &Scheme, what: &str| self.evaluate(rotations, scheme, progress, what);
        let full = Scheme::FULL_PRECISION;
        let mut rows = vec![];
        let mut row = |name, scheme, rotations: String, weights, perplexity| {
            rows.push(Row { name, scheme, rotations, weights, perplexity });
        };

        row("full precision", full, "none".into(), "full", self.unrotated.full);
        let rotated = evaluate(&self.hadamard(0)?, &full.online(scheme.online), "full precision, rotated")?;
        row("full precision, rotated", full, "hadamard:0".into(), "full", rotated);
        row("rtn", scheme, "none".into(), "rtn", self.unrotated.rtn);
        let random = (0..self.seeds)
            .map(|seed| evaluate(&self.hadamard(seed)?, &scheme, &format!("hadamard:{seed}")))
            .collect::<Result<Vec<f64>>>()?;
        if !random.is_empty() {
            let by = |better: fn(&f64, &f64) -> bool| {
                (0..random.len()).reduce(|a, b| if better(&random[b], &random[a]) { b } else { a })
            };
            let (best, worst) = (by(|a, b| a < b).unwrap_or(0), by(|a, b| a > b).unwrap_or(0));
            row("hadamard mean", scheme, format!("hadamard, {}", seeds(random.len())), "rtn", mean(&random));
            row("hadamard best", scheme, format!("hadamard:{best}"), "rtn", random[best]);
            row("hadamard worst", scheme, format!("hadamard:{worst}"), "rtn", random[worst]);
        }
        let gptq = |args: &GptqArgs, rotations: &Rotations, what: &str| {
            let merged = args.quantize(self.model, Some(rotations), &scheme, calibration, progress)?;
            Ok::<f64, Error>(score(&merged, self.text, progress, what)?.perplexity)
        };
        let w16_scheme = scheme.unquantized_weights().online(learn_scheme.online);
        let with = if w16_scheme.online == scheme.online { String::new() } else { format!(" with {}", w16_scheme.online) };
        let mut random_gptq = vec![];
        if let Some(perplexity) = self.unrotated.gptq {
            row("gptq", scheme, "none".into(), "gptq", perplexity);
        }
        if let Some(args) = self.gptq {
            for seed in 0..self.seeds {
                random_gptq.push(gptq(args, &self.hadamard(seed)?, &format!("hadamard:{seed} + gptq"))?);
            }
            if !random_gptq.is_empty() {
                let rotations = format!("hadamard, {}", seeds(random_gptq.len()));
                row("hadamard + gptq mean", scheme, rotations, "gptq", mean(&random_gptq));
            }
        }
        // Ratios belong to the scheme that is scored; rotations are learned with them.
        let mut clipped: Vec<(Scheme, Value)> = vec![];
        if let Some(how) = self.clip {
            for seed in 0..self.seeds.max(self.learn_seeds) {
                let found = clip::search(self.model, &self.hadamard(seed)?, &scheme, calibration, how, progress)?;
                clipped.push((Scheme { activation_clip: found.ratios, ..scheme }, clip::report(&found, how.0).1));
            }
        }
        let mut random_clip = vec![];
        for (seed, (scored, found)) in (0..self.seeds).zip(&clipped) {
            let perplexity = evaluate(&self.hadamard(seed)?, scored, &format!("hadamard:{seed} + clip"))?;
            random_clip.push(json!({"seed": seed, "perplexity": perplexity, "clip": found}));
        }
        if !random_clip.is_empty() {
            let rotations = format!("hadamard, {}", seeds(random_clip.len()));
            row("hadamard + clip mean", scheme, rotations, "rtn", mean(&perplexities(&random_clip)));
        }
        let (mut runs, mut runs_clip): (Vec<Value>, Vec<Value>) = (vec![], vec![]);
        let (mut first, mut learned_gptq) = (None, vec![]);
        for seed in 0..self.learn_seeds {
            if let Some(args) = self.gptq {
                let options = recipe.options(w16_scheme, seed, calibration, self.model)?;
                let what = format!("learning at W16 from hadamard:{seed}");
                let result = recipe.learn(self.model, calibration, self.hadamard(seed)?, &options, progress, &what, |_| {})?;
                learned_gptq.push(gptq(args, &result.rotations, &format!("learned:{seed} + gptq"))?);
            }
            let (result, run) = self.learned(seed, (&learn_scheme, &scheme), random.get(seed as usize).copied(), progress)?;
            first.get_or_insert(result);
            runs.push(run);
            if let Some((scored, found)) = clipped.get(seed as usize) {
                let learn_scheme = Scheme { activation_clip: scored.activation_clip, ..learn_scheme };
                let start = random_clip.get(seed as usize).and_then(|r| r["perplexity"].as_f64());
                let (_, mut run) = self.learned(seed, (&learn_scheme, scored), start, progress)?;
                run["clip"] = found.clone();
                runs_clip.push(run);
            }
        }
        let learned = [("learned", &runs), ("learned + clip", &runs_clip)];
        for (name, runs) in learned.into_iter().filter(|(_, runs)| !runs.is_empty()) {
            let rotations = format!("learned at {learn_scheme}{with}, {}", seeds(runs.len()));
            row(name, scheme, rotations, "rtn", mean(&perplexities(runs)));
        }
        if !learned_gptq.is_empty() {
            let rotations = format!("learned at {w16_scheme}{with}, {}", seeds(learned_gptq.len()));
            row("learned + gptq", scheme, rotations, "gptq", mean(&learned_gptq));
        }
        let starts_with = self.text.first_token();
        Ok(Outcome { rows, starts_with, random, random_gptq, random_clip, runs, runs_clip, learned_gptq, learned: first })
    }

    /// Learns from the Hadamard of a seed under one scheme and scores under another; `start` is the perplexity before.
    fn learned(
        &self,
        seed: u64,
        (at, scored): (&Scheme, &Scheme),
        start: Option<f64>,
        progress: &Progress,
    ) -> Result<(Learned, Value)> {
        let clip = if self.clip.is_some() && at.activation_clip != self.scheme.activation_clip { " + clip" } else { "" };
        let options = self.recipe.options(*at, seed, self.calibration, self.model)?;
        let what = format!("learning from hadamard:{seed}{clip}");
        let mut held_out = vec![];
        let start_at = self.hadamard(seed)?;
        let result = self.recipe.learn(self.model, self.calibration, start_at, &options, progress, &what, |step| {
            held_out.extend(step.held_out.map(|loss| json!([step.step, loss])));
        })?;
        held_out.insert(0, json!([0, result.held_out_first]));
        let perplexity = self.evaluate(&result.rotations, scored, progress, &format!("learned:{seed}{clip}"))?;
        let run = json!({
            "seed": seed, "learned_at": at.to_string(), "start_perplexity": start,
            "perplexity": perplexity, "loss_first": result.loss_first, "loss_last": result.loss_last,
            "held_out_first": result.held_out_first, "held_out_last": result.held_out_last, "held_out": held_out,
            "orthogonality_error": result.orthogonality_error, "seconds_per_step": result.seconds_per_step,
        });
        Ok((result, run))
    }
}

fn perplexities(runs: &[Value]) -> Vec<f64> {
    runs.iter().map(|run| run["perplexity"].as_f64().unwrap_or(f64::NAN)).collect()
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn seeds(n: usize) -> String {
    if n == 1 { "1 seed".into() } else { format!("{n} seeds") }
}

impl Outcome {
    pub fn json(&self) -> Value {
        let row = |r: &Row| {
            json!({"name": r.name, "scheme": r.scheme.to_string(), "rotations": r.rotations, "weights": r.weights,
                "perplexity": r.perplexity})
        };
        let by_seed = |all: &[f64]| -> Vec<Value> {
            all.iter().enumerate().map(|(seed, p)| json!({"seed": seed, "perplexity": p})).collect()
        };
        json!({
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(), "starts_with": self.starts_with, "hadamard": by_seed(&self.random),
            "hadamard_gptq": by_seed(&self.random_gptq), "learned": self.runs, "learned_gptq": by_seed(&self.learned_gptq),
            "hadamard_clip": self.random_clip, "learned_clip": self.runs_clip,
        })
    }

    pub fn print(&self) {
        out!("{:<26} {:<12} {:<32} {:<8} {:>12}", "", "scheme", "rotations", "weights", "perplexity");
        for r in &self.rows {
            out!("{:<26} {:<12} {:<32} {:<8} {:>12.3}", r.name, r.scheme, r.rotations, r.weights, r.perplexity);
        }
        out!("the text starts with {}", self.starts_with);
        let clipped = self.runs_clip.iter().map(|run| (" + clip", run));
        for (with, run) in self.runs.iter().map(|run| ("", run)).chain(clipped) {
            let number = |name: &str| run[name].as_f64().unwrap_or(f64::NAN);
            out!(
                "seed {}{with}: held-out loss {:.4} -> {:.4}, perplexity {:.3} -> {:.3}, max|RᵀR − I| {:.1e}, {:.2} s a step",
                run["seed"],
                number("held_out_first"),
                number("held_out_last"),
                number("start_perplexity"),
                number("perplexity"),
                number("orthogonality_error"),
                number("seconds_per_step")
            );
        }
    }
}
