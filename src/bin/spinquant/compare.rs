//! `spinquant compare`: the paper's table on one model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use spinquant::Result;
use spinquant::calibrate::ClipFound;
use spinquant::compare::{Clipped, Comparison, Outcome, Row, Run, Unrotated};
use spinquant::data::FirstToken;
use spinquant::learn::ClipChoice;
use spinquant::quant::{Online, Scheme};

use crate::clip;
use crate::common::{ModelArgs, Progress, SchemeArgs, at_least_one};
use crate::eval::{file_name, limited};
use crate::learn::Recipe;
use crate::weights::GptqArgs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
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

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let scheme = args.scheme.scheme();
    let learn_scheme = args.learn_scheme.map_or(scheme, |s| Scheme {
        weight_bits: s.weight_bits,
        activation_bits: s.activation_bits,
        key_bits: s.key_bits,
        value_bits: s.value_bits,
        ..scheme
    });
    let options = args.recipe.options(scheme, 0);
    let goal = args.clip.goal(&scheme, args.recipe.optimizer()?.as_ref());
    let clip = goal.map(|goal| (goal, args.clip_windows));
    options.check(args.recipe.optimizer()?.as_ref())?;
    args.gptq_args.check()?;
    let config = args.model.checked(&scheme, Some(args.seq_len))?;
    let calibration = args.model.windows(&config, &args.calibration, args.seq_len)?;
    if args.learn_seeds > 0 {
        options.check_text(&calibration)?;
    }
    let text = limited(args.model.windows(&config, &args.text, args.seq_len)?, args.max_windows)?;
    let quantizer = args.gptq_args.quantizer();
    let sample = if args.gptq { Some(args.gptq_args.calibration(&calibration)?) } else { None };
    let gptq = sample.as_ref().map(|sample| (&quantizer, sample));
    let mut watch = progress.watch();
    // One model at a time: the plain one is gone before the one that is rotated comes.
    let unrotated = Unrotated::score(&args.model.load_plain(&progress)?, &scheme, &text, gptq, &mut watch)?;
    let model = args.model.load(&progress)?;
    let comparison = Comparison {
        model: &model,
        unrotated,
        calibration: &calibration,
        text: &text,
        scheme,
        learn_scheme: learn_scheme.online(args.learn_online.unwrap_or(scheme.online)),
        options: &options,
        optimizer: &|| args.recipe.optimizer(),
        seeds: args.seeds,
        learn_seeds: args.learn_seeds,
        gptq,
        clip,
    };
    let outcome = comparison.run(&mut watch)?;
    drop(watch);
    if args.json {
        out!("{}", json(&outcome, &text.first_token()));
    } else {
        out!("{} on {}, windows of {}", file_name(Path::new(&args.model.name())), file_name(&args.text), args.seq_len);
        print(&outcome, &text.first_token());
    }
    Ok(())
}

/// Everything, for programs.
pub fn json(outcome: &Outcome, first: &FirstToken) -> Value {
    let row = |r: &Row| {
        json!({"name": r.name, "scheme": r.scheme.to_string(), "rotations": r.rotations, "weights": r.weights,
            "perplexity": r.perplexity})
    };
    let by_seed =
        |all: &[f64]| -> Vec<Value> { all.iter().enumerate().map(|(seed, p)| json!({"seed": seed, "perplexity": p})).collect() };
    // Starts are searched by one goal.
    let searched = |found: &ClipFound| outcome.clip.map(|goal| clip::report(found, goal).1);
    let clipped = |(seed, c): (usize, &Clipped)| json!({"seed": seed, "perplexity": c.perplexity, "clip": searched(&c.found)});
    let run = |run: &Run| {
        let learned = &run.learned;
        let mut value = json!({
            "seed": run.seed, "learned_at": run.learned_at.to_string(), "start_perplexity": run.start_perplexity,
            "perplexity": run.perplexity, "loss_first": learned.loss_first, "loss_last": learned.loss_last,
            "held_out_first": learned.held_out_first, "held_out_last": learned.held_out_last,
            "held_out": run.held_out.iter().map(|(step, loss)| json!([step, loss])).collect::<Vec<_>>(),
            "orthogonality_error": learned.orthogonality_error, "seconds_per_step": learned.seconds_per_step,
        });
        if let Some(found) = &run.clip {
            value["clip"] = json!(searched(found));
        }
        value
    };
    json!({
        "rows": outcome.rows.iter().map(row).collect::<Vec<_>>(), "starts_with": first, "hadamard": by_seed(&outcome.random),
        "hadamard_gptq": by_seed(&outcome.random_gptq), "learned": outcome.runs.iter().map(run).collect::<Vec<_>>(),
        "learned_gptq": by_seed(&outcome.learned_gptq),
        "hadamard_clip": outcome.random_clip.iter().enumerate().map(clipped).collect::<Vec<_>>(),
        "learned_clip": outcome.runs_clip.iter().map(run).collect::<Vec<_>>(),
    })
}

/// The table, and a line for every run.
pub fn print(outcome: &Outcome, first: &FirstToken) {
    out!("{:<26} {:<12} {:<32} {:<8} {:>12}", "", "scheme", "rotations", "weights", "perplexity");
    for r in &outcome.rows {
        out!("{:<26} {:<12} {:<32} {:<8} {:>12.3}", r.name, r.scheme, r.rotations, r.weights, r.perplexity);
    }
    out!("the text starts with {first}");
    let clipped = outcome.runs_clip.iter().map(|run| (" + clip", run));
    for (with, run) in outcome.runs.iter().map(|run| ("", run)).chain(clipped) {
        out!(
            "seed {}{with}: held-out loss {:.4} -> {:.4}, perplexity {:.3} -> {:.3}, max|RᵀR − I| {:.1e}, {:.2} s a step",
            run.seed,
            run.learned.held_out_first,
            run.learned.held_out_last,
            run.start_perplexity.unwrap_or(f64::NAN),
            run.perplexity,
            run.learned.orthogonality_error,
            run.learned.seconds_per_step
        );
    }
}
