//! `spinquant compare`: the paper's table on one model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use spinquant::baselines::{QatOptions, Training};
use spinquant::calibrate::{Calibration, ClipFound};
use spinquant::compare::{Clipped, Comparison, Judged, Outcome, Row, Run, Test, Unrotated};
use spinquant::data::{FirstToken, Windows};
use spinquant::eval::exam::{Exam, Report};
use spinquant::eval::fidelity::Fidelity;
use spinquant::eval::marks::Mean;
use spinquant::learn::{ClipChoice, LearnOptions, WeightClip};
use spinquant::llama::{LlamaConfig, Placement};
use spinquant::quant::{Correction, Gptq, Online, Scheme};
use spinquant::{Error, Result};

use crate::clip;
use crate::common::{ModelArgs, Progress, at_least_one};
use crate::eval::{fidelity, file_name, limited};
use crate::ranks::{self, RanksArgs};
use crate::recipe::Recipe;
use crate::scheme::SchemeArgs;
use crate::weights::GptqArgs;
use crate::zeroshot::{self, TaskArgs, exam, shown};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ranks: RanksArgs,
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
    /// Text of another kind, to score fidelity to the model in full precision on too: what was learned on one text may not serve another.
    #[arg(long, value_name = "FILE")]
    fidelity_text: Option<PathBuf>,
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
    /// Hadamards in the graph while learning, as for --online (default: those of --online).
    #[arg(long, value_name = "WHICH")]
    learn_online: Option<Online>,
    /// Add rows with GPTQ weights, learned rotations for them learned at W16: --weights gptq.
    #[arg(long, conflicts_with = "weights")]
    gptq: bool,
    /// Add rows with weights by these quantisers: gptq,gptaq[:ALPHA],qep[:PART],qronos,foem[:BETA]. Learned rotations for them are learned at
    /// W16, and scored before weights are quantised too.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    weights: Vec<Correction>,
    #[command(flatten)]
    gptq_args: GptqArgs,
    /// Add rows with clip ratios of activations, K and V searched on every random Hadamard, and with rotations learned from it with
    /// them: error (of every quantiser, by itself), loss (of the whole network), or learned (by error, and learned on with the rotations).
    /// The paper clips nothing (default: none, or the recipe's).
    #[arg(long, value_name = "error|loss|learned|none", conflicts_with = "activation_clip")]
    clip: Option<ClipChoice>,
    /// Windows of --calibration to search them, and the exponent of SmoothQuant, on.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    clip_windows: usize,
    /// Add rows of other methods, with the training that every row needed: SmoothQuant; LLM-QAT, which trains all weights, on models that
    /// fit; and the full-precision model with its own norms' gains trained as the rotations are, which is what adapting to the text wins
    /// by itself.
    #[arg(long)]
    baselines: bool,
    #[command(flatten)]
    qat: QatArgs,
    #[command(flatten)]
    tasks: TaskArgs,
    /// Score at most this many windows.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// LLM-QAT. Steps, batches and seed are those of learning.
#[derive(clap::Args)]
struct QatArgs {
    /// Windows of text that the model writes for LLM-QAT.
    #[arg(long, value_name = "N", default_value_t = QatOptions::default().windows, value_parser = at_least_one, requires = "baselines")]
    qat_windows: usize,
    /// Learning rate of its first step.
    #[arg(long, value_name = "RATE", default_value_t = QatOptions::default().rate, requires = "baselines")]
    qat_lr: f64,
}

impl QatArgs {
    fn options(&self, options: &LearnOptions, seq: usize) -> Result<QatOptions> {
        let (rate, windows) = (self.qat_lr, self.qat_windows);
        if !(rate > 0.0 && rate.is_finite()) {
            return Err(Error::argument("--qat-lr", format!("expected a finite number above 0, got {rate}")));
        }
        if windows < options.batch {
            let message = format!("expected at least --batch, {}, got {windows}", options.batch);
            return Err(Error::argument("--qat-windows", message));
        }
        let schedule = options.schedule.unwrap_or_default();
        Ok(QatOptions { windows, seq, steps: options.steps, batch: options.batch, rate, schedule, seed: 0 })
    }
}

impl Args {
    /// What weights are calibrated on: text alone, and the same with what is learned of every layer where that is asked for.
    fn samples<'a>(&self, text: &'a Windows, wanted: &[Correction]) -> Result<Vec<Calibration<'a>>> {
        let reconstruct = self.gptq_args.reconstruct();
        if wanted.is_empty() {
            let missing = || Err(Error::argument("--reconstruct", "needs --weights LIST or --gptq"));
            return if reconstruct.is_some() { missing() } else { Ok(vec![]) };
        }
        let sample = self.gptq_args.calibration(text)?;
        let plain = sample.clone().reconstruct(None).among(ranks::group());
        plain.check_shares()?;
        Ok(if reconstruct.is_some() { vec![plain, sample] } else { vec![plain] })
    }
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    if args.seeds == 0 {
        return Err(Error::argument("--seeds", "expected at least 1, got 0"));
    }
    let scheme = args.scheme.scheme();
    args.gptq_args.reconstruct().map_or(Ok(()), |by| by.check(&scheme))?;
    let learn_scheme = args.learn_scheme.map_or(scheme, |given| args.scheme.scheme_of(given));
    let mut options = args.recipe.options(scheme, 0);
    options.ranks = ranks::group();
    options.clip = args.clip.unwrap_or(options.clip);
    let goal = options.clip.goal(&scheme, args.recipe.optimizer()?.as_ref());
    let clip = goal.map(|goal| (goal, args.clip_windows));
    options.check(args.recipe.optimizer()?.as_ref())?;
    options.check_clip_objective()?;
    let grids = [&learn_scheme, &scheme].map(Scheme::weight_grid_name);
    if options.weight_clip == WeightClip::Learned && grids[0] != grids[1] {
        if !args.recipe.asks_for_weight_clips() {
            options.weight_clip = WeightClip::Search;
        } else {
            let message = format!("expected weights to be learned at as they are scored at, {}, got {}", grids[1], grids[0]);
            return Err(Error::argument("--weight-clip learned", message));
        }
    }
    args.gptq_args.check()?;
    let qat = args.qat.options(&options, args.seq_len);
    let mut qat = if args.baselines { Some(qat?) } else { None };
    let tasks = args.tasks.read()?;
    let config = args.model.checked(&scheme, Some(args.seq_len))?;
    let learn_scheme = learn_scheme.online(args.learn_online.unwrap_or(scheme.online));
    config.check_scheme(&learn_scheme)?;
    if let Some(qat) = &mut qat {
        qat.seq = qat.seq.min(config.max_position_embeddings);
    }
    let exam = if tasks.is_empty() { None } else { Some(exam(tasks, &args.model, &config)?) };
    let calibration = args.model.windows(&config, &args.calibration, args.seq_len)?;
    if args.learn_seeds > 0 || args.baselines {
        options.check_text(&calibration)?;
    }
    let text = limited(args.model.windows(&config, &args.text, args.seq_len)?, args.max_windows)?;
    let read = |file: &PathBuf| limited(args.model.windows(&config, file, args.seq_len)?, args.max_windows);
    let other = args.fidelity_text.as_ref().map(read).transpose()?;
    let test = Test { text: &text, other: other.as_ref(), exam: exam.as_ref(), ranks: &options.ranks };
    let wanted = if args.gptq { &[Correction::None][..] } else { &args.weights };
    let samples = args.samples(&calibration, wanted)?;
    let quantizers: Vec<Gptq> = wanted.iter().map(|&correction| args.gptq_args.quantizer(correction)).collect();
    // Each as it is, then with what is learned behind it.
    let quantizers: Vec<_> = quantizers.iter().flat_map(|gptq| samples.iter().map(move |sample| (gptq, sample))).collect();
    options.ranks.attach(&args.model.device()?)?;
    let mut watch = progress.watch();
    // One model at a time: the plain one is gone before the one that is rotated comes.
    let unrotated = {
        let place = args.all_there(args.model.placement_of(2, !quantizers.is_empty())?, &config)?;
        let plain = args.model.load_plain_placed(&progress, place)?;
        let mut unrotated = Unrotated::score(&plain, &scheme, test, &quantizers, &mut watch)?;
        if let Some(qat) = &qat {
            unrotated.train(&plain, &scheme, test, qat, &mut watch)?;
        }
        unrotated
    };
    let learns = args.learn_seeds > 0 || args.baselines;
    let two = args.model.placement_of(2, !quantizers.is_empty())?;
    let learning =
        if learns { args.recipe.placement(options.ranks.world(), &args.model, &options, &config, args.seq_len)? } else { two };
    let resident = two.resident.min(learning.resident);
    let model = args.model.load_placed(&progress, args.all_there(Placement { resident, ..two }, &config)?)?;
    let comparison = Comparison {
        model: &model,
        unrotated,
        calibration: &calibration,
        test,
        scheme,
        learn_scheme,
        options: &options,
        optimizer: &|| args.recipe.optimizer(),
        seeds: args.seeds,
        learn_seeds: args.learn_seeds,
        quantizers: &quantizers,
        baselines: args.baselines.then_some(args.clip_windows),
        clip,
    };
    let outcome = comparison.run(&mut watch)?;
    drop(watch);
    if args.json {
        out!("{}", json(&outcome, &text.first_token(), exam.as_ref())?);
    } else {
        out!("{} on {}, windows of {}", file_name(Path::new(&args.model.name())), file_name(&args.text), args.seq_len);
        print(&outcome, &text.first_token(), exam.as_ref())?;
        if args.baselines {
            print_training(&outcome);
        }
    }
    Ok(())
}

impl Args {
    /// A placement, which must be of all layers on the device where weights themselves are learned.
    fn all_there(&self, placement: Placement, config: &LlamaConfig) -> Result<Placement> {
        match placement.streamed(config.layers) {
            streamed if self.baselines && streamed > 0 => {
                let message = format!(
                    "learns weights, and needs every layer on the device; {streamed} of {} are in main memory",
                    config.layers
                );
                Err(Error::argument("--baselines", message))
            }
            _ => Ok(placement),
        }
    }
}

/// How far a network's answers are from those in full precision, task by task, question by question.
fn differences(outcome: &Outcome, judged: &Judged, exam: &Exam) -> Result<Report> {
    let full = outcome.rows.first().map_or(&[][..], |row| &row.judged.marks);
    let differences: Result<Vec<_>> = judged.marks.iter().zip(full).map(|(marks, full)| marks.minus(full)).collect();
    Ok(exam.report(&differences?))
}

/// Everything, for programs.
pub fn json(outcome: &Outcome, first: &FirstToken, exam: Option<&Exam>) -> Result<Value> {
    let with = |mut value: Value, judged: &Judged| -> Result<Value> {
        value["perplexity"] = json!(judged.perplexity);
        for (name, of) in [("fidelity", &judged.fidelity), ("fidelity_other", &judged.other)] {
            if let Some(of) = of {
                value[name] = fidelity(of);
            }
        }
        if let Some(exam) = exam {
            let mut tasks = zeroshot::json(&exam.report(&judged.marks));
            tasks.insert("minus_full_precision".into(), zeroshot::json(&differences(outcome, judged, exam)?).into());
            value["zeroshot"] = tasks.into();
        }
        Ok(value)
    };
    let row = |r: &Row| {
        let Training { tokens, steps, seconds } = r.training;
        let value = json!({
            "name": r.name, "scheme": r.scheme.to_string(), "rotations": r.rotations, "weights": r.weights,
            "training": {"tokens": tokens, "steps": steps, "seconds": seconds},
        });
        with(value, &r.judged)
    };
    let by_seed = |all: &[Judged]| -> Result<Vec<Value>> {
        all.iter().enumerate().map(|(seed, judged)| with(json!({"seed": seed}), judged)).collect()
    };
    // Starts are searched by one goal.
    let searched = |found: &ClipFound| outcome.clip.map(|goal| clip::report(found, goal).1);
    let clipped = |(seed, c): (usize, &Clipped)| with(json!({"seed": seed, "clip": searched(&c.found)}), &c.judged);
    let run = |run: &Run| {
        let learned = &run.learned;
        let mut value = json!({
            "seed": run.seed, "learned_at": run.learned_at.to_string(), "start_perplexity": run.start_perplexity,
            "loss_first": learned.loss_first, "loss_last": learned.loss_last,
            "held_out_first": learned.held_out_first, "held_out_last": learned.held_out_last,
            "held_out": run.held_out.iter().map(|(step, loss)| json!([step, loss])).collect::<Vec<_>>(),
            "orthogonality_error": learned.orthogonality_error, "seconds_per_step": learned.seconds_per_step,
        });
        if let Some(found) = &run.clip {
            value["clip"] = json!(searched(found));
        }
        with(value, &run.judged)
    };
    let runs = |all: &[Run]| all.iter().map(run).collect::<Result<Vec<_>>>();
    let mut value = json!({
        "rows": outcome.rows.iter().map(row).collect::<Result<Vec<_>>>()?, "starts_with": first,
        "hadamard": by_seed(&outcome.random)?, "learned": runs(&outcome.runs)?,
        "hadamard_clip": outcome.random_clip.iter().enumerate().map(clipped).collect::<Result<Vec<_>>>()?,
        "learned_clip": runs(&outcome.runs_clip)?,
    });
    for (rotations, quantized) in [("hadamard", &outcome.random_quantized), ("learned", &outcome.learned_quantized)] {
        for (name, scores) in quantized {
            value[format!("{rotations}_{name}")] = by_seed(scores)?.into();
        }
    }
    if !outcome.learned_w16.is_empty() {
        value["learned_w16"] = by_seed(&outcome.learned_w16)?.into();
    }
    Ok(value)
}

/// The table, that of the tasks where there are some, and a line for every run.
pub fn print(outcome: &Outcome, first: &FirstToken, exam: Option<&Exam>) -> Result<()> {
    let has_other = outcome.rows.iter().any(|r| r.judged.other.is_some());
    let widest = |of: fn(&Row) -> usize, least: usize| outcome.rows.iter().map(of).fold(least, usize::max);
    let (name, weights) = (widest(|r| r.name.len(), 24), widest(|r| r.weights.len(), 7));
    let rotations = widest(|r| r.rotations.len(), 32);
    let other = if has_other { format!(" {:>16} {:>7}", "KL, other text", "top-1") } else { String::new() };
    out!(
        "{:<name$} {:<11} {:<rotations$} {:<weights$} {:>10} {:>16} {:>7}{other}",
        "",
        "scheme",
        "rotations",
        "weights",
        "perplexity",
        "KL",
        "top-1"
    );
    let faithful = |f: &Option<Fidelity>| match f {
        Some(f) => {
            // Of equal networks it is rounding, on either side of 0.
            let divergence = Mean { mean: f.divergence().mean.max(0.0), ..f.divergence() };
            format!(" {:>16} {:>5.1} %", shown(divergence, 4), 100.0 * f.agreement().mean)
        }
        None => String::new(),
    };
    for r in &outcome.rows {
        let Judged { perplexity, fidelity, other, .. } = &r.judged;
        let (fidelity, other) = (faithful(fidelity), faithful(other));
        out!(
            "{:<name$} {:<11} {:<rotations$} {:<weights$} {perplexity:>10.3}{fidelity}{other}",
            r.name,
            r.scheme,
            r.rotations,
            r.weights
        );
    }
    out!("KL to full precision in nats a token ± standard error; top-1: tokens after which both find the same one likeliest");
    out!("the text starts with {first}");
    if let Some(exam) = exam {
        print_tasks(outcome, exam)?;
    }
    let clipped = outcome.runs_clip.iter().map(|run| (" + clip", run));
    for (with, run) in outcome.runs.iter().map(|run| ("", run)).chain(clipped) {
        out!(
            "seed {}{with}: held-out loss {:.4} -> {:.4}, perplexity {:.3} -> {:.3}, max|RᵀR − I| {:.1e}, {:.2} s a step",
            run.seed,
            run.learned.held_out_first,
            run.learned.held_out_last,
            run.start_perplexity.unwrap_or(f64::NAN),
            run.judged.perplexity,
            run.learned.orthogonality_error,
            run.learned.seconds_per_step
        );
    }
    Ok(())
}

/// What every row took besides the model.
fn print_training(outcome: &Outcome) {
    let name = outcome.rows.iter().map(|r| r.name.len()).fold(24, usize::max);
    out!("{:<name$} {:>15} {:>16} {:>10}", "training", "tokens read", "optimiser steps", "seconds");
    for r in &outcome.rows {
        let Training { tokens, steps, seconds } = r.training;
        out!("{:<name$} {tokens:>15} {steps:>16} {seconds:>10.1}", r.name);
    }
}

/// Means over the tasks with their differences to full precision, then every task's accuracy.
fn print_tasks(outcome: &Outcome, exam: &Exam) -> Result<()> {
    let name = outcome.rows.iter().map(|r| r.name.len()).fold(26, usize::max);
    out!("zero-shot, mean of {}; − is the difference to full precision, paired by question", count(exam.tasks().len(), "task"));
    out!("{:<name$} {:>15} {:>16} {:>15} {:>16} {:>17} {:>16}", "", "acc", "−", "acc_norm", "−", "gold log-lik.", "−");
    for r in &outcome.rows {
        let (at, less) = (exam.report(&r.judged.marks), differences(outcome, &r.judged, exam)?);
        out!(
            "{:<name$} {:>15} {:>16} {:>15} {:>16} {:>17} {:>16}",
            r.name,
            shown(at.acc, 4),
            shown(less.acc, 4),
            shown(at.acc_norm, 4),
            shown(less.acc_norm, 4),
            shown(at.gold, 3),
            shown(less.gold, 3)
        );
    }
    let names = exam.tasks().iter().map(|task| format!(" {:>13}", task.name)).collect::<String>();
    out!("{:<name$}{names}", "acc");
    for r in &outcome.rows {
        let accuracies = r.judged.marks.iter().map(|marks| format!(" {:>13.4}", marks.scores().acc.mean)).collect::<String>();
        out!("{:<name$}{accuracies}", r.name);
    }
    Ok(())
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
