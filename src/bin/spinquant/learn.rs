//! `spinquant learn`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use spinquant::calibrate::{ClipFound, ClipGoal};
use spinquant::device::Card;
use spinquant::learn::{ClipChoice, LearnOptions, StepReport, Watch, WeightClip, learn_watched};
use spinquant::memory::{Needs, Planned};
use spinquant::optim::Optimizer;
use spinquant::quant::{ClipRatios, Engine, Online, R4, Scheme};
use spinquant::rotation::{ClipEnds, RotationFile, Rotations, Start};
use spinquant::{DType, Error, Result};

use crate::clip;
use crate::common::{ModelArgs, Progress, Told, at_least_one, note, rotations};
use crate::eval::file_name;
use crate::outputs;
use crate::ranks::{self, RanksArgs};
use crate::recipe::{Recipe, free};
use crate::scheme::SchemeArgs;
use crate::stop;

impl Recipe {
    /// Prints the plan; allocates nothing.
    fn dry_run(&self, args: &Args) -> Result<()> {
        let scheme = args.scheme.scheme();
        let mut options = self.options(scheme, args.seed);
        options.clip = args.clip.unwrap_or(options.clip);
        options.check(self.optimizer()?.as_ref())?;
        options.check_batch(args.ranks.count())?;
        if !matches!(args.start, Some(Start::File(_))) {
            options.check_clip_objective()?; // a file may hold some that are learned on
        }
        let config = args.model.checked(&scheme, Some(args.seq_len))?;
        args.check_outputs()?;
        let start = match &args.start {
            Some(file @ Start::File(_)) => rotations(file, &config)?,
            _ => None,
        };
        (options.scheme.activation_clip, options.clip) = args.clip(start.as_ref());
        let from = start.map(|start| args.scheme.learned(&start, &options.scheme));
        let transforms = from.as_ref().map_or(options.transforms, |from| from.transforms().with(&options.transforms));
        RotationFile::check_holds(&args.out, &transforms.of(&config.scale_sizes())?)?;
        args.check_holds_clips(from.as_ref(), &options, self.optimizer()?.as_ref())?;
        say_if_idle(&options.scheme);
        let dtype = args.model.given_dtype().unwrap_or(DType::BF16);
        let card = args.model.device()?.card()?.unwrap_or_else(|| {
            say!("no GPU here: planned for an H100");
            Card::h100()
        });
        let room = options.room(free(&card));
        let (ranks, sizes) = (args.ranks.count(), (args.seq_len, dtype));
        let share = options.batch.div_ceil(ranks); // the largest
        let (planned, card) = self.planned(&args.model, &options, &config, sizes, ranks, room, &card)?;
        let Some(planned) = planned else {
            return Err(Error::argument("--dry-run", "there is nothing to plan with --micro-batch or --recompute"));
        };
        let (objective, of_clips) = (options.objective.name(), options.clip_objective.as_ref());
        let needs = of_clips.unwrap_or(&options.objective).needs(); // a local objective plans nothing where another runs the network
        let together = options.shares_rows(ranks) && needs != Needs::Rows;
        if args.json {
            let items: serde_json::Map<String, Value> =
                planned.items.iter().map(|(what, bytes)| (what.to_string(), (*bytes).into())).collect();
            let plan = planned.plan;
            out!(
                "{}",
                json!({
                    "scheme": scheme.to_string(), "objective": objective, "clip_objective": of_clips.map(|o| o.name()), "batch": share, "ranks_share_rows": together, "seq_len": args.seq_len,
                    "dtype": dtype.to_string(), "engine": options.engine.name(), "integer_linears": planned.on_integers, "device": card.name, "budget_bytes": room.card, "main_memory_free_bytes": room.host,
                    "plan": {"recompute": plan.recompute.min(config.layers), "keep_weights": plan.keep_weights,
                        "sequences": plan.sequences, "micro_batch": planned.micro_batch,
                        "layers_in_main_memory": planned.placement.streamed(config.layers) - planned.placement.read(config.layers),
                        "layers_read_again": planned.placement.read(config.layers)},
                    "bytes": items, "peak_bytes": planned.bytes(), "main_memory_bytes": planned.host, "copied_bytes_per_step": planned.moved, "read_bytes_per_step": planned.read, "seconds_per_step": planned.seconds, "steps": options.steps,
                })
            );
            return Ok(());
        }
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        out!(
            "{scheme}, {objective}{}, {} x {} tokens a step, {dtype}, within {:.1} GiB on {}",
            of_clips.map(|o| format!(" (clip ratios: {})", o.name())).unwrap_or_default(),
            share,
            args.seq_len,
            gib(room.card),
            card.name
        );
        out!("plan: {}", describe(&planned, config.layers, needs));
        if ranks > 1 {
            let how = if together {
                "rotates and quantises a part of the rows of weights"
            } else {
                "rotates and quantises all weights"
            };
            out!("each of {ranks} ranks {how}");
        }
        if options.engine == Engine::Integer {
            out!("engine: integer, for {} of the 7 linears of a layer", planned.on_integers);
        }
        for (what, bytes) in &planned.items {
            out!("{what:<46} {:>8.2} GiB", gib(*bytes));
        }
        out!("{:<46} {:>8.2} GiB", "peak", gib(planned.bytes()));
        let streamed = planned.placement.streamed(config.layers);
        if streamed > 0 {
            let once = if ranks > 1 { ", once for all ranks" } else { "" };
            out!("{:<46} {:>8.2} GiB of {:.1} free{once}", "main memory", gib(planned.host), gib(room.host));
            let read = planned.placement.read(config.layers);
            let place = |from: usize, to: usize, what: &str| match to - from {
                0 => format!("none {what}"),
                _ => format!("layers {from} to {} {what}", to - 1),
            };
            let mut layers = vec![place(streamed, config.layers, "on the card"), place(read, streamed, "in main memory")];
            if read > 0 {
                layers.push(place(0, read, "read from files"));
            }
            let layers = layers.join(", ");
            out!(
                "{layers}; {:.1} GiB copied a step, {:.2} s at {:.0} GB/s",
                gib(planned.moved),
                planned.moved as f64 / card.uploads,
                card.uploads / 1e9
            );
            if read > 0 {
                out!(
                    "{:.1} GiB of them read from files, {:.2} s at {:.2} GB/s",
                    gib(planned.read),
                    planned.read as f64 / card.reads,
                    card.reads / 1e9
                );
            }
        }
        out!(
            "predicted: {:.2} s a step, {:.0} s for {} steps",
            planned.seconds,
            planned.seconds * options.steps as f64,
            options.steps
        );
        Ok(())
    }
}

/// Says so where a scheme leaves nothing to learn.
fn say_if_idle(scheme: &Scheme) {
    if scheme.weight_bits == 16 && scheme.active_sites().is_empty() {
        note(&format!("{scheme} quantises nothing: no rotation changes what the network says, and there is nothing to learn"));
    }
}

/// A plan in words.
fn describe(planned: &Planned, layers: usize, needs: Needs) -> String {
    if needs == Needs::Rows {
        return format!("rows of {} sequences captured at once; no backward pass through the layers", planned.micro_batch);
    }
    let plan = planned.plan;
    let streamed = planned.placement.streamed(layers);
    let recompute = plan.recompute.max(streamed).min(layers);
    let at_once = if plan.sequences == 0 { planned.micro_batch } else { plan.sequences };
    let mut words = vec![format!("{} sequences through the network at once", planned.micro_batch)];
    if recompute > 0 {
        words.push(format!("{recompute} of {layers} layers computed again for their gradients, {at_once} sequences at a time"));
    } else {
        words.push("every layer keeps its values".into());
    }
    if streamed > 0 {
        let read = planned.placement.read(layers);
        words.push(format!("{} layers in main memory", streamed - read));
        if read > 0 {
            words.push(format!("{read} read from files again in every pass"));
        }
    }
    words.push(format!("rotated weights {}", if plan.keep_weights || recompute == 0 { "kept" } else { "made twice" }));
    words.join("; ")
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
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
    #[arg(long, value_name = "WHICH",
        help = format!("Where to start: {} [default: hadamard:SEED with --seed]", Start::usage(&["none"])))]
    start: Option<Start>,
    /// Clip ratios of activations, K and V, searched on the start, learned with, and kept with the rotations: error (of every
    /// quantiser, by itself) or loss (of the whole network; needs room for a second copy of the weights); learned: searched by error,
    /// then learned with the rotations, for every layer, both ends apart; none: 1, as published.
    /// Default: what --activation-clip says or a --start file holds, else the recipe's.
    #[arg(long, value_name = "error|loss|learned|none", conflicts_with = "activation_clip")]
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
    fn clip(&self, start: Option<&RotationFile>) -> (ClipRatios, ClipChoice) {
        match (self.clip, self.scheme.given_clip(start)) {
            (Some(choice), _) => (ClipRatios::NONE, choice),
            (None, Some(given)) => (given, ClipChoice::Keep),
            (None, None) => (ClipRatios::NONE, self.recipe.named(self.scheme.scheme()).clip),
        }
    }
}

impl Args {
    /// How the work is shared; a plan is made by one process.
    pub fn shared(&self) -> Option<&RanksArgs> {
        (!self.dry_run).then_some(&self.ranks)
    }

    /// Fails where `--out` cannot hold the clip ratios that there will be, those of a start included.
    fn check_holds_clips(&self, from: Option<&Rotations>, options: &LearnOptions, optimizer: &dyn Optimizer) -> Result<()> {
        let of_weights = from.map(|from| from.weight_clips_for(&options.scheme)).transpose()?.flatten().is_some();
        if of_weights || options.weight_clip == WeightClip::Learned {
            RotationFile::check_holds_weight_clips(&self.out)?;
        }
        let kept = options.scheme.activation_clip != ClipRatios::NONE || from.is_some_and(|from| !from.clips.is_empty());
        if kept || options.clip == ClipChoice::Learned || options.clip.goal(&options.scheme, optimizer).is_some() {
            RotationFile::check_holds_clips(&self.out)?;
        }
        Ok(())
    }

    /// Tries every file that will be written; returns the path of the state.
    fn check_outputs(&self) -> Result<PathBuf> {
        let state = state_path(&self.out);
        let (model, mut inputs) = (Some(self.model.model.as_path()), vec![("--text", self.text.as_path())]);
        outputs::check(&[("--out", &self.out), ("the state", &state)], model, &inputs)?;
        if let Some(log) = &self.log {
            inputs.extend([("--out", self.out.as_path()), ("the state", &state)]);
            if let Some(Start::File(start)) = &self.start {
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
    // Rank 0 writes all files.
    let state = if ranks::group().is_first() { args.check_outputs()? } else { state_path(&args.out) };
    let mut optimizer = args.recipe.optimizer()?;
    let choice = args.start.clone().unwrap_or(Start::Hadamard(args.seed));
    let mut options = args.recipe.options(args.scheme.scheme(), args.seed);
    options.clip_windows = args.clip_windows;
    options.clip = args.clip.unwrap_or(options.clip);
    options.ranks = ranks::group();
    let first = options.ranks.is_first();
    options.check(optimizer.as_ref())?;
    let config = args.model.checked(&options.scheme, Some(args.seq_len))?;
    let start = rotations(&choice, &config)?.ok_or_else(|| Error::argument("--start", "none leaves nothing to learn"))?;
    options.scheme.online = args.scheme.scheme_online(Some(&start), &config)?.online;
    (options.scheme.activation_clip, options.clip) = args.clip(Some(&start));
    say_if_idle(&options.scheme);
    options.check(optimizer.as_ref())?;
    let mut from = args.scheme.learned(&start, &options.scheme);
    if args.clip.is_some_and(|choice| choice != ClipChoice::Learned) {
        from.clips = ClipEnds::default();
    }
    if args.recipe.weight_clip == Some(WeightClip::Search) {
        from.weight_clips = None;
    }
    let transforms = start.rotations.transforms().with(&options.transforms).of(&config.scale_sizes())?;
    RotationFile::check_holds(&args.out, &transforms)?;
    let keeps_weight_clips = from.weight_clips_for(&options.scheme)?.is_some();
    if from.weight_clips.is_some() && !keeps_weight_clips {
        note(&format!("the clip ratios of weights of {choice} are not used: {} quantises no weights", options.scheme));
    }
    args.check_holds_clips(Some(&from), &options, optimizer.as_ref())?;
    options.transforms = transforms;
    options.check(optimizer.as_ref())?;
    options.clone().with_clips_of(&from)?.check_clip_objective()?;
    // Of a random start each head gets a matrix of its own; one that was chosen stays the network that it is.
    let alike = transforms.heads() && choice.seed().is_none();
    let from = if alike { from.per_head(config.kv_heads, None)? } else { from };
    let windows = args.model.windows(&config, &args.text, args.seq_len)?;
    options.check_text(&windows)?;
    options.checkpoint = Some((state.clone(), args.checkpoint_every.unwrap_or(usize::MAX)));
    options.resume = args.resume;
    options.stop = Some(stop::flag());

    options.ranks.attach(&args.model.device()?)?;
    let complete = options.clone().with_clips_of(&from)?;
    let placement = args.recipe.placement(1, &args.model, &complete, &config, args.seq_len)?;
    let model = args.model.load_among(&options.ranks, &progress, placement)?;
    if let Some(why) = model.why_apart() {
        note(&format!("every rank of this machine has its own copy of the layers in main memory: {why}"));
    }
    // From here on there is something to keep, until it is written.
    let _careful = stop::AfterStep::new();
    let mut watch = Logged {
        told: progress.watch(),
        path: args.log.as_deref().filter(|_| first),
        resume: args.resume,
        log: None,
        failed: None,
    };
    let learned = learn_watched(&model, &windows, from, optimizer.as_mut(), &options, &mut watch);
    let log_failed = watch.failed.take();
    drop(watch);
    let learned = learned.inspect_err(|e| {
        if matches!(e, Error::Interrupted { step } if *step > 0) {
            progress.say(&format!("the state is in {}: continue with --resume", state.display()));
        }
    })?;
    if let Some(e) = log_failed {
        say!("warning: the log is incomplete: {e}");
    }
    if !first {
        return Ok(());
    }
    let scheme = learned.settings.scheme;
    let file = learned
        .file(&config)?
        .with_note("scheme", scheme)
        .with_note("start", &choice)
        .with_note("steps", options.steps)
        .with_note("seed", args.seed)
        .with_note("optimizer", &args.recipe.optimizer)
        .with_note("objective", options.objective.name())
        .with_note("transforms", transforms)
        .with_note("clips", if learned.rotations.clips.is_empty() { "ratios" } else { "learned" })
        .with_note("learning_rate", learned.settings.learning_rate)
        .with_note("calibration", windows.checksum());
    let file = match &options.clip_objective {
        Some(objective) => file.with_note("clip_objective", objective.name()),
        None => file,
    };
    let file = if learned.rotations.weight_clips.is_some() { file.with_note("weight_clips", "learned") } else { file };
    file.write(&args.out).inspect_err(|_| rescue(&file, &args.out))?;
    let unrecorded = Online { r4: R4::Whole.unrecorded(config.intermediate_size)?, ..Online::BOTH };
    if RotationFile::is_torch_name(&args.out) && scheme.online != unrecorded {
        note(&format!("an R.bin does not say which Hadamards run: it is to be used with --online {}", scheme.online));
    }
    if args.resume || args.checkpoint_every.is_some() {
        let _ = std::fs::remove_file(&state); // it has served its purpose
    }
    if args.json {
        out!(
            "{}",
            json!({
                "loss_first": learned.loss_first, "loss_last": learned.loss_last,
                "held_out_first": learned.held_out_first, "held_out_last": learned.held_out_last,
                "kl_first": learned.fidelity_first.divergence, "kl_last": learned.fidelity_last.divergence,
                "top1_first": learned.fidelity_first.agreement, "top1_last": learned.fidelity_last.agreement,
                "orthogonality_error": learned.orthogonality_error, "seconds_per_step": learned.seconds_per_step,
                "peak_bytes": model.device().peak_bytes(), "clip": learned.clip.as_ref().map(|(found, by)| clip::report(found, *by).1),
                "starts_with": windows.first_token(),
            })
        );
    } else {
        out!("{scheme}: loss {:.4} -> {:.4}", learned.loss_first, learned.loss_last);
        out!("the text starts with {}", windows.first_token());
        let (before, after) = (learned.fidelity_first, learned.fidelity_last);
        out!(
            "held-out loss {:.4} -> {:.4}, KL to full precision {:.4} -> {:.4}, the same likeliest token after {:.1} % -> {:.1} %",
            learned.held_out_first,
            learned.held_out_last,
            before.divergence,
            after.divergence,
            100.0 * before.agreement,
            100.0 * after.agreement
        );
        out!("max|RᵀR − I| {:.1e}, {:.2} s a step", learned.orthogonality_error, learned.seconds_per_step);
        out!("rotations written to {}", args.out.display());
    }
    Ok(())
}

/// Keeps rotations that could not be written where they should: beside that, or else among the system's temporary files.
fn rescue(file: &RotationFile, out: &Path) {
    let name = format!("{}.rescued", file_name(out));
    let places = [out.with_file_name(&name), std::env::temp_dir().join(format!("{name}-{}", std::process::id()))];
    if let Some(place) = places.iter().find(|place| !place.exists() && file.write(place).is_ok()) {
        say!("the rotations could not be written to {}; they are in {}", out.display(), place.display());
    }
}

/// Logs every step.
struct Logged<'a> {
    told: Told<'a>,
    path: Option<&'a Path>,
    resume: bool,
    log: Option<File>,
    failed: Option<Error>,
}

impl Watch for Logged<'_> {
    fn begin(&mut self, what: &str, total: usize) {
        self.told.begin(what, total);
    }
    fn at(&mut self, done: usize) -> ControlFlow<()> {
        self.told.at(done)
    }
    fn step(&mut self, r: &StepReport) -> ControlFlow<()> {
        if let Some(path) = self.path {
            let line = json!({
                "step": r.step, "loss": r.loss, "learning_rate": r.learning_rate, "held_out": r.held_out,
                "orthogonality_error": r.orthogonality_error, "seconds": r.seconds,
            });
            let file = match self.log.take() {
                Some(file) => Ok(file),
                None => open_log(path, if self.resume { r.step } else { 0 }),
            };
            let written = file.and_then(|file| writeln!(self.log.insert(file), "{line}").map_err(Error::io(path)));
            if let Err(e) = written {
                self.failed.get_or_insert(e);
            }
        }
        self.told.step(r)
    }
    fn clipped(&mut self, found: &ClipFound, by: ClipGoal) {
        self.told.note(&clip::report(found, by).0);
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
