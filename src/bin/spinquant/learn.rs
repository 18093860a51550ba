//! `spinquant learn`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
#[cfg(feature = "cuda")]
use spinquant::Device;
use spinquant::calibrate::ClipGoal;
use spinquant::data::Windows;
use spinquant::device::Card;
use spinquant::learn::{LearnOptions, Learned, StepReport, learn};
use spinquant::llama::{Llama, LlamaConfig, Recompute};
use spinquant::memory::{self, Needs, Planned, Work};
use spinquant::objective;
use spinquant::optim::{self, Schedule};
use spinquant::quant::{ClipRatios, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Error, Result};

use crate::clip::{self, ClipChoice};
use crate::common::{ModelArgs, Progress, RotationChoice, SchemeArgs, at_least_one, interrupted, peak_bytes};
use crate::eval::file_name;
use crate::outputs;

/// The optimiser that does what the published code does, which clips nothing.
const PARITY: &str = "cayley-parity";

/// The recipe; the defaults are the published ones.
#[derive(clap::Args, Clone)]
pub struct Recipe {
    /// Optimiser steps.
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Sequences a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Sequences that go through the network at once (default: the batch).
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Learning rate of the first step (default: by optimiser and objective; 1.5 for cayley and cross-entropy).
    #[arg(long)]
    lr: Option<f64>,
    /// constant, linear or cosine.
    #[arg(long, default_value = "cosine")]
    schedule: Schedule,
    /// cayley, cayley-parity (the published code's arithmetic, drift included), sgd-qr, sgd-polar, adam-qr, adam-polar,
    /// adam-polar-elementwise, or qr-orth.
    #[arg(long, value_name = "NAME", default_value = "cayley")]
    optimizer: String,
    /// What to minimise: cross-entropy, kl (to the full-precision model), whip or kurtosis (of rotated activations).
    #[arg(long, value_name = "NAME", default_value = "cross-entropy")]
    objective: String,
    /// Windows held out of training to score progress on (default: an eighth of them, at most 64).
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
    /// Steps between scores.
    #[arg(long, default_value_t = 25)]
    held_out_every: usize,
    /// Keep only each layer's input and compute the rest again: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// GPU memory to stay within, such as 24GiB: the fastest way of running a step that fits is planned, unless --micro-batch or
    /// --recompute say how to. auto: what is free.
    #[arg(long, value_name = "auto|SIZE", default_value = "auto")]
    memory: String,
}

impl Recipe {
    pub fn options(&self, scheme: Scheme, seed: u64, windows: &Windows, model: &Llama) -> Result<LearnOptions> {
        let plan: Option<Planned> = match model.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let card = device.card()?;
                let budget = self.budget(card.free + model.bytes())?;
                self.plan(&model.config, scheme, windows.seq_len(), model.dtype(), budget, &card)?
            }
            _ => None,
        };
        Ok(LearnOptions {
            scheme,
            steps: self.steps,
            batch: self.batch,
            micro_batch: self.micro_batch.or(plan.as_ref().map(|p: &Planned| p.micro_batch)).unwrap_or(self.batch),
            learning_rate: self.learning_rate()?,
            schedule: self.schedule,
            seed,
            held_out: self.held_out.unwrap_or((windows.len() / 8).clamp(1, 64)),
            held_out_every: self.held_out_every,
            objective: objective::by_name(&self.objective)?,
            recompute: match plan {
                _ if self.recompute => Recompute::All,
                Some(planned) => Recompute::Planned(planned.plan),
                None => Recompute::None,
            },
            checkpoint: None,
            resume: false,
        })
    }

    /// Bytes that `--memory` allows, of those that are free.
    fn budget(&self, free: usize) -> Result<usize> {
        match self.memory.as_str() {
            // A little is left to the driver and to what cannot be foreseen.
            "auto" => Ok(free - free / 25),
            size => memory::parse_bytes(size),
        }
    }

    /// How to run a step, unless the user said how.
    fn plan(
        &self,
        config: &LlamaConfig,
        scheme: Scheme,
        seq: usize,
        dtype: DType,
        budget: usize,
        card: &Card,
    ) -> Result<Option<Planned>> {
        if self.recompute || self.micro_batch.is_some() {
            return Ok(None);
        }
        let needs = objective::by_name(&self.objective)?.needs();
        memory::plan(config, &Work { needs, batch: self.batch, seq, scheme, dtype }, budget, card).map(Some)
    }

    /// Prints the plan; allocates nothing.
    fn dry_run(&self, args: &Args) -> Result<()> {
        let config = args.model.config()?;
        let (card, dtype) = match args.model.device()? {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => (device.card()?, args.model.dtype(DType::BF16)),
            _ => {
                say!("no GPU here: planned for an H100");
                (Card::h100(), args.model.dtype(DType::BF16))
            }
        };
        let (scheme, budget) = (args.scheme.scheme(), self.budget(card.free)?);
        let Some(planned) = self.plan(&config, scheme, args.seq_len, dtype, budget, &card)? else {
            return Err(Error::argument("--dry-run", "there is nothing to plan with --micro-batch or --recompute"));
        };
        let needs = objective::by_name(&self.objective)?.needs();
        if args.json {
            let items: serde_json::Map<String, Value> =
                planned.items.iter().map(|(what, bytes)| (what.to_string(), (*bytes).into())).collect();
            let plan = planned.plan;
            out!(
                "{}",
                json!({
                    "scheme": scheme.to_string(), "objective": self.objective, "batch": self.batch, "seq_len": args.seq_len,
                    "dtype": dtype.to_string(), "device": card.name, "budget_bytes": budget,
                    "plan": {"recompute": plan.recompute.min(config.layers), "keep_weights": plan.keep_weights,
                        "sequences": plan.sequences, "micro_batch": planned.micro_batch},
                    "bytes": items, "peak_bytes": planned.bytes(), "seconds_per_step": planned.seconds, "steps": self.steps,
                })
            );
            return Ok(());
        }
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        out!(
            "{scheme}, {}, {} x {} tokens a step, {dtype}, within {:.1} GiB on {}",
            self.objective,
            self.batch,
            args.seq_len,
            gib(budget),
            card.name
        );
        out!("plan: {}", describe(&planned, config.layers, needs));
        for (what, bytes) in &planned.items {
            out!("{what:<46} {:>8.2} GiB", gib(*bytes));
        }
        out!("{:<46} {:>8.2} GiB", "peak", gib(planned.bytes()));
        out!("predicted: {:.2} s a step, {:.0} s for {} steps", planned.seconds, planned.seconds * self.steps as f64, self.steps);
        Ok(())
    }

    /// Optimiser steps.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The optimiser by its name.
    pub fn optimizer(&self) -> Result<Box<dyn optim::Optimizer>> {
        optim::by_name(&self.optimizer)
    }

    /// Of the first step.
    fn learning_rate(&self) -> Result<f64> {
        let (optimizer, objective) = (optim::by_name(&self.optimizer)?, objective::by_name(&self.objective)?);
        let factor = if optimizer.is_scale_free() { 1.0 } else { objective.rate() };
        Ok(self.lr.unwrap_or(factor * optimizer.default_learning_rate()))
    }

    /// Learns with a progress bar.
    #[allow(clippy::too_many_arguments)]
    pub fn learn(
        &self,
        model: &Llama,
        windows: &Windows,
        start: Rotations,
        options: &LearnOptions,
        progress: &Progress,
        what: &str,
        mut on_step: impl FnMut(&StepReport),
    ) -> Result<Learned> {
        let mut optimizer = optim::by_name(&self.optimizer)?;
        let mut task = progress.start(what, self.steps);
        let mut held_out = String::new();
        learn(model, windows, start, optimizer.as_mut(), options, |report| {
            on_step(report);
            if let Some(loss) = report.held_out {
                held_out = format!(", held out {loss:.4}");
            }
            task.at(report.step, &format!("loss {:.4}{held_out}, {:.2} s a step", report.loss, report.seconds));
            interrupted()
        })
    }
}

/// A plan in words.
fn describe(planned: &Planned, layers: usize, needs: Needs) -> String {
    if needs == Needs::Rows {
        return format!("rows of {} sequences captured at once; no backward pass through the layers", planned.micro_batch);
    }
    let plan = planned.plan;
    let recompute = plan.recompute.min(layers);
    let at_once = if plan.sequences == 0 { planned.micro_batch } else { plan.sequences };
    let mut words = vec![format!("{} sequences through the network at once", planned.micro_batch)];
    if recompute > 0 {
        words.push(format!("{recompute} of {layers} layers computed again for their gradients, {at_once} sequences at a time"));
    } else {
        words.push("every layer keeps its values".into());
    }
    words.push(format!("rotated weights {}", if plan.keep_weights || recompute == 0 { "kept" } else { "made twice" }));
    words.join("; ")
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Decides the start, the held-out windows and the order of the others.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to start: hadamard[:SEED] (default: --seed), orthogonal[:SEED], identity, or a file.
    #[arg(long, value_name = "WHICH")]
    start: Option<RotationChoice>,
    /// Clip ratios of activations, K and V, searched on the start, learned with, and kept with the rotations: error (of every
    /// quantiser, by itself) or loss (of the whole network; needs room for a second copy of the weights); none: 1, as published.
    /// Default: what --activation-clip says or a --start file holds, else none with cayley-parity, else error.
    #[arg(long, value_name = "error|loss|none", conflicts_with = "activation_clip")]
    clip: Option<ClipChoice>,
    /// Windows to search them on.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    clip_windows: usize,
    /// Where to write the rotations.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Append one JSON line a step to this file.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Keep a resumable state beside --out every so many steps (and always on Ctrl-C).
    #[arg(long, value_name = "STEPS")]
    checkpoint_every: Option<usize>,
    /// Continue from that state if it exists.
    #[arg(long)]
    resume: bool,
    /// Print how a step would be run, what it needs and how long it takes, and stop there.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The clip ratios to begin with, and whether to search others.
    fn clip(&self, start: &RotationChoice) -> Result<(ClipRatios, ClipChoice)> {
        if let Some(asked) = self.clip {
            return Ok((ClipRatios::NONE, asked));
        }
        let given = self.scheme.given_clip(start)?;
        let asked = match given {
            None if self.recipe.optimizer != PARITY => ClipChoice::By(ClipGoal::Error),
            _ => ClipChoice::None,
        };
        Ok((given.unwrap_or_default(), asked))
    }
}

impl Args {
    /// Tries every file that will be written; returns the path of the state.
    fn check_outputs(&self) -> Result<PathBuf> {
        let state = state_path(&self.out);
        let (model, mut inputs) = (Some(self.model.model.as_path()), vec![("--text", self.text.as_path())]);
        outputs::check(&[("--out", &self.out), ("the state", &state)], model, &inputs)?;
        if let Some(log) = &self.log {
            inputs.extend([("--out", self.out.as_path()), ("the state", &state)]);
            if let Some(RotationChoice::File(start)) = &self.start {
                inputs.push(("--start", start));
            }
            outputs::check_log("--log", log, model, &inputs)?;
        }
        Ok(state)
    }
}

pub fn run(args: &Args) -> Result<()> {
    if args.dry_run {
        return args.recipe.dry_run(args);
    }
    let progress = Progress::new();
    let state = args.check_outputs()?;
    let mut log: Option<File> = None;
    let model = args.model.load(&progress)?;
    let choice = args.start.clone().unwrap_or(RotationChoice::Hadamard(args.seed));
    let start = choice.load(&model.config)?.ok_or_else(|| Error::argument("--start", "none leaves nothing to learn"))?;
    let windows = args.model.windows(&model.config, &args.text, args.seq_len)?;
    let mut scheme = args.scheme.scheme();
    // Searched again when a run is resumed: equal inputs give equal ratios, and the state refuses others.
    let (given, asked) = args.clip(&choice)?;
    scheme.activation_clip = given;
    let mut clip = None;
    if let Some(goal) = asked.goal(&scheme) {
        let found = clip::search(&model, &start, &scheme, &windows, (goal, args.clip_windows), &progress)?;
        scheme.activation_clip = found.ratios;
        let (line, value) = clip::report(&found, goal);
        progress.say(&line);
        clip = Some(value);
    }
    let mut options = args.recipe.options(scheme, args.seed, &windows, &model)?;
    options.checkpoint = Some((state.clone(), args.checkpoint_every.unwrap_or(usize::MAX)));
    options.resume = args.resume;

    let mut log_failed = None;
    let learned = args.recipe.learn(&model, &windows, start, &options, &progress, "learning", |r| {
        if let Some(path) = &args.log {
            let line = json!({
                "step": r.step, "loss": r.loss, "learning_rate": r.learning_rate, "held_out": r.held_out,
                "orthogonality_error": r.orthogonality_error, "seconds": r.seconds,
            });
            let file = match log.take() {
                Some(file) => Ok(file),
                None => open_log(path, if args.resume { r.step } else { 0 }),
            };
            let written = file.and_then(|file| writeln!(log.insert(file), "{line}").map_err(Error::io(path)));
            if let Err(e) = written {
                log_failed.get_or_insert(e);
            }
        }
    });
    let learned = learned.inspect_err(|e| {
        if matches!(e, Error::Interrupted { .. }) {
            progress.say(&format!("the state is in {}: continue with --resume", state.display()));
        }
    })?;
    if let Some(e) = log_failed {
        say!("warning: the log is incomplete: {e}");
    }
    let notes = [
        ("scheme", scheme.to_string()),
        ("online", scheme.online.to_string()),
        ("start", choice.to_string()),
        ("steps", args.recipe.steps.to_string()),
        ("seed", args.seed.to_string()),
        ("optimizer", args.recipe.optimizer.clone()),
        ("objective", args.recipe.objective.clone()),
        ("learning_rate", options.learning_rate.to_string()),
        ("calibration", windows.checksum()),
    ];
    let mut notes: BTreeMap<String, String> = notes.map(|(k, v)| (k.to_string(), v)).into();
    if scheme.activation_clip != ClipRatios::NONE {
        notes.extend(clip::notes(scheme.activation_clip, &scheme));
    }
    learned.rotations.save_with(&args.out, &notes).inspect_err(|_| rescue(&learned.rotations, &args.out, &notes))?;
    if args.resume || args.checkpoint_every.is_some() {
        let _ = std::fs::remove_file(&state); // it has served its purpose
    }
    if args.json {
        out!(
            "{}",
            json!({
                "loss_first": learned.loss_first, "loss_last": learned.loss_last,
                "held_out_first": learned.held_out_first, "held_out_last": learned.held_out_last,
                "orthogonality_error": learned.orthogonality_error, "seconds_per_step": learned.seconds_per_step,
                "peak_bytes": peak_bytes(&model.device()), "clip": clip, "starts_with": windows.first_token(),
            })
        );
    } else {
        out!("{scheme}: loss {:.4} -> {:.4}", learned.loss_first, learned.loss_last);
        out!("the text starts with {}", windows.first_token());
        out!("held-out loss {:.4} -> {:.4}", learned.held_out_first, learned.held_out_last);
        out!("max|RᵀR − I| {:.1e}, {:.2} s a step", learned.orthogonality_error, learned.seconds_per_step);
        out!("rotations written to {}", args.out.display());
    }
    Ok(())
}

/// Keeps rotations that could not be written where they should: beside that, or else among the system's temporary files.
fn rescue(rotations: &Rotations, out: &Path, notes: &BTreeMap<String, String>) {
    let name = format!("{}.rescued", file_name(out));
    let places = [out.with_file_name(&name), std::env::temp_dir().join(format!("{name}-{}", std::process::id()))];
    if let Some(place) = places.iter().find(|place| !place.exists() && rotations.save_with(place, notes).is_ok()) {
        say!("the rotations could not be written to {}; they are in {}", out.display(), place.display());
    }
}

/// The resumable state beside an output: `R.safetensors` → `R.safetensors.state`.
fn state_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".state");
    name.into()
}

/// Opens the log for the line of step `first`, behind what is there. A run that was killed may have logged more than its state knows of:
/// where it goes on, its lines from that step on are cut off.
fn open_log(path: &Path, first: usize) -> Result<File> {
    let mut file = OpenOptions::new().append(true).create(true).open(path).map_err(Error::io(path))?;
    if !path.is_file() {
        return Ok(file); // a pipe or a device
    }
    let old = std::fs::read(path).map_err(Error::io(path))?;
    let kept = if first > 1 { kept_bytes(&old, first as u64) } else { old.len() };
    let cut = if kept < old.len() { file.set_len(kept as u64) } else { Ok(()) };
    let end = if kept > 0 && old[kept - 1] != b'\n' { file.write_all(b"\n") } else { Ok(()) };
    cut.and(end).map_err(Error::io(path))?;
    Ok(file)
}

/// How much of a log stays when its last run goes on with step `first`. Lines of runs before it stay in any case: they are in front of
/// a line whose step is not lower than the next one's.
fn kept_bytes(log: &[u8], first: u64) -> usize {
    let step = |line: &[u8]| serde_json::from_slice::<Value>(line).ok()?["step"].as_u64();
    let (mut kept, mut next) = (log.len(), u64::MAX);
    if !log.ends_with(b"\n") {
        kept = log.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1); // half a line
    }
    while kept > 0 {
        let start = log[..kept - 1].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        match step(&log[start..kept]) {
            Some(s) if s >= first && s < next => (kept, next) = (start, s),
            _ => break,
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_runs_later_lines_are_cut() {
        let log = |steps: &[u64]| steps.iter().map(|s| format!("{{\"step\":{s}}}\n")).collect::<String>();
        for (before, first, after) in [
            (log(&[1, 2, 3]), 3, log(&[1, 2])),
            (log(&[1, 2, 3, 4, 1, 2, 3]), 2, log(&[1, 2, 3, 4, 1])),
            (log(&[1, 2, 3, 4, 1]), 2, log(&[1, 2, 3, 4, 1])),
            (log(&[1, 2, 3]) + "{\"st", 3, log(&[1, 2])),
            (log(&[1, 2]) + "a note\n" + &log(&[2, 3]), 2, log(&[1, 2]) + "a note\n"),
            (String::new(), 5, String::new()),
        ] {
            assert_eq!(&before[..kept_bytes(before.as_bytes(), first)], after, "{before:?} from {first}");
        }
    }
}
