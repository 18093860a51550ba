//! `spinquant compare`: the paper's table on one model.

use std::path::PathBuf;

use serde_json::{Value, json};
use spinquant::Result;
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;

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

struct Row {
    name: &'static str,
    scheme: Scheme,
    rotations: String,
    weights: &'static str,
    perplexity: f64,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let model = args.model.load(&progress)?;
    let plain = args.model.load_plain(&progress)?;
    let config = model.config.clone();
    let calibration = args.model.windows(&config, &args.calibration, args.seq_len)?;
    let text = limited(args.model.windows(&config, &args.text, args.seq_len)?, args.max_windows)?;
    let scheme = args.scheme.scheme();
    let learn_online = args.learn_online.unwrap_or(scheme.online);
    let learn_scheme = args.learn_scheme.map_or(scheme, |s| Scheme {
        weight_bits: s.weight_bits,
        activation_bits: s.activation_bits,
        key_bits: s.key_bits,
        value_bits: s.value_bits,
        ..scheme
    });
    let learn_scheme = learn_scheme.online(learn_online);
    let w16_scheme = scheme.unquantized_weights().online(learn_online);
    let with = if learn_online == scheme.online { String::new() } else { format!(" with {learn_online}") };
    let evaluate = |rotations: Option<&Rotations>, scheme: &Scheme, what: &str| {
        let merged = if rotations.is_some() { model.merge(rotations, scheme) } else { plain.merge(None, scheme) };
        Ok::<f64, spinquant::Error>(score(&merged?, &text, &progress, what)?.perplexity)
    };
    let hadamard = |seed| Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, seed);
    let full = Scheme::FULL_PRECISION;
    let mut rows = vec![];
    let mut row = |name, scheme, rotations: String, weights, perplexity| {
        rows.push(Row { name, scheme, rotations, weights, perplexity });
    };

    row("full precision", full, "none".into(), "full", evaluate(None, &full, "full precision")?);
    let rotated = evaluate(Some(&hadamard(0)?), &full.online(scheme.online), "full precision, rotated")?;
    row("full precision, rotated", full, "hadamard:0".into(), "full", rotated);
    row("rtn", scheme, "none".into(), "rtn", evaluate(None, &scheme, "rtn")?);
    let random = (0..args.seeds)
        .map(|seed| evaluate(Some(&hadamard(seed)?), &scheme, &format!("hadamard:{seed}")))
        .collect::<Result<Vec<f64>>>()?;
    if !random.is_empty() {
        let by =
            |better: fn(&f64, &f64) -> bool| (0..random.len()).reduce(|a, b| if better(&random[b], &random[a]) { b } else { a });
        let (best, worst) = (by(|a, b| a < b).unwrap_or(0), by(|a, b| a > b).unwrap_or(0));
        let mean = random.iter().sum::<f64>() / random.len() as f64;
        row("hadamard mean", scheme, format!("hadamard, {} seeds", random.len()), "rtn", mean);
        row("hadamard best", scheme, format!("hadamard:{best}"), "rtn", random[best]);
        row("hadamard worst", scheme, format!("hadamard:{worst}"), "rtn", random[worst]);
    }
    let gptq = |rotations: Option<&Rotations>, what: &str| {
        let from = if rotations.is_some() { &model } else { &plain };
        let merged = args.gptq_args.quantize(from, rotations, &scheme, &calibration, &progress)?;
        Ok::<f64, spinquant::Error>(score(&merged, &text, &progress, what)?.perplexity)
    };
    let mut random_gptq = vec![];
    if args.gptq {
        row("gptq", scheme, "none".into(), "gptq", gptq(None, "gptq")?);
        for seed in 0..args.seeds {
            random_gptq.push(gptq(Some(&hadamard(seed)?), &format!("hadamard:{seed} + gptq"))?);
        }
        if !random_gptq.is_empty() {
            let mean = random_gptq.iter().sum::<f64>() / random_gptq.len() as f64;
            row("hadamard + gptq mean", scheme, format!("hadamard, {} seeds", random_gptq.len()), "gptq", mean);
        }
    }
    let mut runs: Vec<Value> = vec![];
    let mut learned = vec![];
    let mut learned_gptq = vec![];
    for seed in 0..args.learn_seeds {
        if args.gptq {
            let options = args.recipe.options(w16_scheme, seed, &calibration, &model)?;
            let what = format!("learning at W16 from hadamard:{seed}");
            let result = args.recipe.learn(&model, &calibration, hadamard(seed)?, &options, &progress, &what, |_| {})?;
            learned_gptq.push(gptq(Some(&result.rotations), &format!("learned:{seed} + gptq"))?);
        }
        let options = args.recipe.options(learn_scheme, seed, &calibration, &model)?;
        let what = format!("learning from hadamard:{seed}");
        let result = args.recipe.learn(&model, &calibration, hadamard(seed)?, &options, &progress, &what, |_| {})?;
        let perplexity = evaluate(Some(&result.rotations), &scheme, &format!("learned:{seed}"))?;
        learned.push(perplexity);
        runs.push(json!({
            "seed": seed, "learned_at": learn_scheme.to_string(), "start_perplexity": random.get(seed as usize),
            "perplexity": perplexity, "loss_first": result.loss_first, "loss_last": result.loss_last,
            "held_out_first": result.held_out_first, "held_out_last": result.held_out_last,
            "orthogonality_error": result.orthogonality_error, "seconds_per_step": result.seconds_per_step,
        }));
    }
    if !learned.is_empty() {
        let rotations = format!("learned at {learn_scheme}{with}, {} seeds", learned.len());
        row("learned", scheme, rotations, "rtn", learned.iter().sum::<f64>() / learned.len() as f64);
    }
    if !learned_gptq.is_empty() {
        let rotations = format!("learned at {w16_scheme}{with}, {} seeds", learned_gptq.len());
        let mean = learned_gptq.iter().sum::<f64>() / learned_gptq.len() as f64;
        row("learned + gptq", scheme, rotations, "gptq", mean);
    }

    if args.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|r| {
                json!({"name": r.name, "scheme": r.scheme.to_string(), "rotations": r.rotations, "weights": r.weights,
                    "perplexity": r.perplexity})
            })
            .collect();
        let by_seed = |all: &[f64]| -> Vec<Value> {
            all.iter().enumerate().map(|(seed, p)| json!({"seed": seed, "perplexity": p})).collect()
        };
        println!(
            "{}",
            json!({
                "rows": rows, "hadamard": by_seed(&random), "hadamard_gptq": by_seed(&random_gptq), "learned": runs,
                "learned_gptq": by_seed(&learned_gptq),
            })
        );
        return Ok(());
    }
    println!("{} on {}, windows of {}", file_name(&args.model.model), file_name(&args.text), args.seq_len);
    println!("{:<26} {:<12} {:<32} {:<8} {:>12}", "", "scheme", "rotations", "weights", "perplexity");
    for r in &rows {
        println!("{:<26} {:<12} {:<32} {:<8} {:>12.3}", r.name, r.scheme, r.rotations, r.weights, r.perplexity);
    }
    for run in &runs {
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
    Ok(())
}
