//! `spinquant compare`: the paper's table on one model.

use std::path::PathBuf;

use serde_json::{Value, json};
use spinquant::data::Windows;
use spinquant::learn::Learned;
use spinquant::llama::Llama;
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, SchemeArgs};
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
    /// Score at most this many windows.
    #[arg(long, value_name = "N")]
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
}

/// The table, and what was learned.
pub struct Outcome {
    rows: Vec<Row>,
    /// Perplexity of every random Hadamard.
    random: Vec<f64>,
    /// The same with GPTQ weights.
    random_gptq: Vec<f64>,
    runs: Vec<Value>,
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
    };
    let outcome = comparison.run(&progress)?;
    if args.json {
        println!("{}", outcome.json());
    } else {
        println!("{} on {}, windows of {}", file_name(&args.model.model), file_name(&args.text), args.seq_len);
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
        let mut runs: Vec<Value> = vec![];
        let (mut first, mut learned, mut learned_gptq) = (None, vec![], vec![]);
        for seed in 0..self.learn_seeds {
            if let Some(args) = self.gptq {
                let options = recipe.options(w16_scheme, seed, calibration, self.model)?;
                let what = format!("learning at W16 from hadamard:{seed}");
                let result = recipe.learn(self.model, calibration, self.hadamard(seed)?, &options, progress, &what, |_| {})?;
                learned_gptq.push(gptq(args, &result.rotations, &format!("learned:{seed} + gptq"))?);
            }
            let options = recipe.options(learn_scheme, seed, calibration, self.model)?;
            let what = format!("learning from hadamard:{seed}");
            let mut held_out = vec![];
            let result = recipe.learn(self.model, calibration, self.hadamard(seed)?, &options, progress, &what, |step| {
                held_out.extend(step.held_out.map(|loss| json!([step.step, loss])));
            })?;
            held_out.insert(0, json!([0, result.held_out_first]));
            let perplexity = evaluate(&result.rotations, &scheme, &format!("learned:{seed}"))?;
            learned.push(perplexity);
            runs.push(json!({
                "seed": seed, "learned_at": learn_scheme.to_string(), "start_perplexity": random.get(seed as usize),
                "perplexity": perplexity, "loss_first": result.loss_first, "loss_last": result.loss_last,
                "held_out_first": result.held_out_first, "held_out_last": result.held_out_last, "held_out": held_out,
                "orthogonality_error": result.orthogonality_error, "seconds_per_step": result.seconds_per_step,
            }));
            first.get_or_insert(result);
        }
        if !learned.is_empty() {
            let rotations = format!("learned at {learn_scheme}{with}, {}", seeds(learned.len()));
            row("learned", scheme, rotations, "rtn", mean(&learned));
        }
        if !learned_gptq.is_empty() {
            let rotations = format!("learned at {w16_scheme}{with}, {}", seeds(learned_gptq.len()));
            row("learned + gptq", scheme, rotations, "gptq", mean(&learned_gptq));
        }
        Ok(Outcome { rows, random, random_gptq, runs, learned_gptq, learned: first })
    }
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
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(), "hadamard": by_seed(&self.random),
            "hadamard_gptq": by_seed(&self.random_gptq), "learned": self.runs, "learned_gptq": by_seed(&self.learned_gptq),
        })
    }

    pub fn print(&self) {
        println!("{:<26} {:<12} {:<32} {:<8} {:>12}", "", "scheme", "rotations", "weights", "perplexity");
        for r in &self.rows {
            println!("{:<26} {:<12} {:<32} {:<8} {:>12.3}", r.name, r.scheme, r.rotations, r.weights, r.perplexity);
        }
        for run in &self.runs {
            let number = |name: &str| run[name].as_f64().unwrap_or(f64::NAN);
            println!(
                "seed {}: held-out loss {:.4} -> {:.4}, perplexity {:.3} -> {:.3}, max|RᵀR − I| {:.1e}, {:.2} s a step",
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
