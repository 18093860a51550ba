//! `spinquant race`: optimisers and objectives against one another on one model, held-out loss against steps and seconds.

mod entry;
mod outcome;

use std::path::PathBuf;

use serde_json::json;
use spinquant::data::{Bos, Windows};
use spinquant::learn::{ClipChoice, LearnOptions, Learned, learn, search_clips_watched};
use spinquant::llama::{Llama, LlamaConfig, Recompute};
use spinquant::optim::{self, Schedule};
use spinquant::quant::{ClipRatios, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Error, Result, demo, objective};

use crate::common::{ModelArgs, Progress, at_least_one};
use crate::eval::{file_name, limited, score};
use crate::stop;
use entry::{Entry, default_entries};
use outcome::{Baseline, Outcome, Point, Run};

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face folder: config.json, *.safetensors, tokenizer.json (default: the embedded model, on the CPU).
    #[arg(long, value_name = "DIR", requires_all = ["calibration", "text"])]
    pub model: Option<PathBuf>,
    /// auto takes a GPU where there is one.
    #[arg(long, value_name = "auto|cpu|cuda", default_value = "auto")]
    device: String,
    /// Arithmetic: f32, bf16, f16 (or f64 on the CPU). Default: f32 on the CPU, bf16 on a GPU.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<DType>,
    /// The token that a text starts with (with --model): auto (what the tokenizer's post-processor adds; default), none, or its id.
    #[arg(long, value_name = "auto|none|ID", requires = "model")]
    bos: Option<Bos>,
    /// Text to learn on (with --model).
    #[arg(long, value_name = "FILE", requires = "model")]
    calibration: Option<PathBuf>,
    /// Text to score (with --model).
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// What races, separated by commas: OPTIMIZER[/OBJECTIVE][@RATE[|RATE...]][+error|+loss], or hadamard[+error|+loss]
    /// for random rotations. Of several rates, the first seed finds the best by held-out loss. Default: every optimiser on
    /// cross-entropy, cayley on every objective, and clip ratios.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    entries: Vec<Entry>,
    /// Schemes, separated by commas.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "W4A4KV4")]
    schemes: Vec<Scheme>,
    /// Numbers of steps, separated by commas.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "100")]
    steps: Vec<usize>,
    /// Seeds: of the Hadamard start, the held-out windows and the order of the others.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first of them.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    first_seed: u64,
    /// Sequences a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence (default: 2048, or 128 of the embedded model).
    #[arg(long)]
    seq_len: Option<usize>,
    /// constant, linear or cosine.
    #[arg(long, default_value = "cosine")]
    schedule: Schedule,
    /// Windows held out of training to draw progress on.
    #[arg(long, value_name = "N", default_value_t = 8)]
    held_out: usize,
    /// Steps between points of a curve.
    #[arg(long, default_value_t = 10)]
    held_out_every: usize,
    /// Windows to search clip ratios on.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    clip_windows: usize,
    /// Score at most this many windows of --text.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// The folder for runs.csv, curves.csv, table.md, steps.png and seconds.png; rows are written as runs end.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// How an entry learns at a rate.
    fn options(&self, entry: &Entry, rate: f64) -> Result<LearnOptions> {
        Ok(LearnOptions {
            batch: self.batch,
            micro_batch: Some(self.batch),
            learning_rate: Some(rate),
            schedule: Some(self.schedule),
            held_out: Some(self.held_out),
            held_out_every: self.held_out_every,
            recompute: Some(Recompute::None),
            clip: ClipChoice::Keep,
            objective: objective::by_name(&entry.objective)?,
            ..LearnOptions::default()
        })
    }

    fn seeds(&self) -> std::ops::Range<u64> {
        self.first_seed..self.first_seed.saturating_add(self.seeds)
    }
}

struct Track {
    name: String,
    model: Llama,
    /// Perplexity of the model as it is.
    full: f64,
    calibration: Windows,
    text: Windows,
}

impl Track {
    /// Opens the model and its texts, which must be long enough to learn with these options.
    fn open(args: &Args, options: Option<&LearnOptions>, progress: &Progress) -> Result<Self> {
        let check = |config: &LlamaConfig, calibration: &Windows| {
            args.schemes.iter().try_for_each(|scheme| config.check_scheme(scheme))?;
            options.map_or(Ok(()), |options| options.check_text(calibration))
        };
        let (Some(folder), Some(calibration), Some(text)) = (&args.model, &args.calibration, &args.text) else {
            let seq_len = args.seq_len.unwrap_or(128);
            let (calibration, text) = (demo::windows(demo::CALIBRATION, seq_len)?, demo::windows(demo::TEST, seq_len)?);
            let text = limited(text, args.max_windows)?;
            let model = demo::model()?;
            check(&model.config, &calibration)?;
            let full = unquantized(&model, &text, progress)?;
            return Ok(Self { name: "the embedded model".into(), model, full, calibration, text });
        };
        let place = ModelArgs::new(folder.clone(), args.device.clone(), args.dtype, args.bos.unwrap_or_default());
        let seq_len = args.seq_len.unwrap_or(2048);
        let config = place.checked(&Scheme::FULL_PRECISION, Some(seq_len))?;
        let calibration = place.windows(&config, calibration, seq_len)?;
        let text = limited(place.windows(&config, text, seq_len)?, args.max_windows)?;
        check(&config, &calibration)?;
        // One model at a time: the plain one is gone before the one that is rotated comes.
        let full = unquantized(&place.load_plain(progress)?, &text, progress)?;
        Ok(Self { name: file_name(folder), model: place.load(progress)?, full, calibration, text })
    }

    fn perplexity(&self, rotations: &Rotations, scheme: &Scheme, what: &str, progress: &Progress) -> Result<f64> {
        Ok(score(&self.model.merge(Some(rotations), scheme)?, &self.text, progress, what)?.perplexity)
    }

    fn start(&self, seed: u64) -> Result<Rotations> {
        let c = &self.model.config;
        Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed)
    }
}

/// Perplexity of a model as it is, unrotated.
fn unquantized(plain: &Llama, text: &Windows, progress: &Progress) -> Result<f64> {
    Ok(score(&plain.merge(None, &Scheme::FULL_PRECISION)?, text, progress, "full precision")?.perplexity)
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let entries = if args.entries.is_empty() { default_entries()? } else { args.entries.clone() };
    if args.seeds == 0 || args.steps.contains(&0) {
        return Err(Error::argument("race", "expected at least one seed and one step"));
    }
    // All that can be refused is, before results are touched and anything is loaded.
    let learning = || entries.iter().filter(|entry| entry.learns());
    for entry in learning() {
        let optimizer = optim::by_name(&entry.optimizer)?;
        entry.rates.iter().try_for_each(|&rate| args.options(entry, rate)?.check(optimizer.as_ref()))?;
    }
    std::fs::create_dir_all(&args.out).map_err(Error::io(&args.out))?;
    Outcome::check(&args.out)?;
    let first = learning().next().map(|entry| args.options(entry, 1.0)).transpose()?;
    let track = Track::open(args, first.as_ref(), &progress)?;
    let _careful = stop::AfterStep::new();
    let mut outcome = Outcome::create(&args.out)?;
    let full = track.full;
    let say = |line: &str| {
        if !args.json {
            out!("{line}");
        }
    };
    let first = track.text.first_token();
    let seq_len = track.calibration.seq_len();
    say(&format!("{}, windows of {seq_len}, the text starts with {first}: full precision {full:.3}", track.name));
    for scheme in &args.schemes {
        let random = args
            .seeds()
            .map(|seed| track.perplexity(&track.start(seed)?, scheme, &format!("{scheme} hadamard:{seed}"), &progress))
            .collect::<Result<Vec<f64>>>()?;
        let baseline = Baseline { scheme: *scheme, full, first_seed: args.first_seed, random };
        say(&format!("{scheme}: random Hadamard {:.3}", baseline.mean()));
        outcome.baselines.push(baseline);
    }
    let raced = every_run(args, &track, &entries, &mut outcome, &say, &progress);
    // What an interrupted race has is worth its table and pictures.
    let table = outcome.table(&track.name);
    let written = outcome.write(&args.out, &table);
    match args.json {
        true => {
            let mut all = outcome.json();
            all["starts_with"] = json!(first);
            out!("{all}");
        }
        false => out!("{table}curves in {}", args.out.display()),
    }
    raced.and(written)
}

/// Seeds after numbers of steps, so that an interrupted race has every entry once.
fn every_run(
    args: &Args,
    track: &Track,
    entries: &[Entry],
    outcome: &mut Outcome,
    say: &dyn Fn(&str),
    progress: &Progress,
) -> Result<()> {
    // Of every scheme and entry, the rate that the first number of steps and seed found.
    let mut best: Vec<Vec<Option<f64>>> = vec![vec![None; entries.len()]; args.schemes.len()];
    for &steps in &args.steps {
        for seed in args.seeds() {
            for (scheme, best) in args.schemes.iter().zip(&mut best) {
                for (entry, best) in entries.iter().zip(best) {
                    if !entry.learns() && steps != args.steps[0] {
                        continue;
                    }
                    let rates = best.map_or_else(|| entry.rates.clone(), |rate| vec![rate]);
                    let mut tried: Vec<(f64, f64)> = vec![];
                    // An entry that does not learn has one run and no rate.
                    for rate in if entry.learns() { rates } else { vec![f64::NAN] } {
                        let run = one(args, track, entry, rate, scheme, steps, seed, progress)?;
                        say(&run.line(outcome.recovered(&run)));
                        tried.push((rate, run.held_out_last()));
                        outcome.add(run)?;
                    }
                    if entry.learns() && best.is_none() {
                        *best = tried.into_iter().reduce(|a, b| if b.1 < a.1 { b } else { a }).map(|(rate, _)| rate);
                    }
                }
            }
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn one(
    args: &Args,
    track: &Track,
    entry: &Entry,
    rate: f64,
    scheme: &Scheme,
    steps: usize,
    seed: u64,
    progress: &Progress,
) -> Result<Run> {
    let start = track.start(seed)?;
    let began = std::time::Instant::now();
    let mut scheme = Scheme { activation_clip: ClipRatios::NONE, ..*scheme };
    if let Some(goal) = entry.clip {
        let found = search_clips_watched(
            &track.model,
            &start,
            &scheme,
            &track.calibration,
            (goal, args.clip_windows),
            &mut progress.watch(),
        )?;
        scheme.activation_clip = found.ratios;
    }
    let searching = began.elapsed().as_secs_f64();
    let what = format!("{scheme} {entry}:{seed}");
    let mut run = Run {
        entry: entry.to_string(),
        optimizer: entry.optimizer.clone(),
        objective: if entry.learns() { entry.objective.clone() } else { String::new() },
        rate,
        clip: entry.clip.map(|_| scheme.activation_clip),
        scheme,
        steps: if entry.learns() { steps } else { 0 },
        seed,
        curve: vec![],
        perplexity: f64::NAN,
        seconds: searching,
        orthogonality_error: f64::NAN,
    };
    if !entry.learns() {
        run.perplexity = track.perplexity(&start, &scheme, &what, progress)?;
        return Ok(run);
    }
    let stop = Some(stop::flag());
    let options = LearnOptions { scheme, steps, seed, stop, ..args.options(entry, rate)? };
    let mut optimizer = optim::by_name(&entry.optimizer)?;
    let mut task = progress.start(&what, steps);
    let learned: Result<Learned> = learn(&track.model, &track.calibration, start, optimizer.as_mut(), &options, |report| {
        run.seconds += report.seconds;
        if let Some(held_out) = report.held_out {
            run.curve.push(Point { step: report.step, seconds: run.seconds, held_out });
        }
        task.at(report.step, "");
        stop::asked()
    });
    let learned = match learned {
        Ok(learned) => learned,
        // A rate that is too high is a result, not the end of the race.
        Err(Error::Numeric { what, message }) if stop::asked().is_continue() => {
            progress.say(&format!("{entry} at {rate}: {what}: {message}"));
            return Ok(run);
        }
        Err(e) => return Err(e),
    };
    run.curve.insert(0, Point { step: 0, seconds: searching, held_out: learned.held_out_first });
    run.orthogonality_error = learned.orthogonality_error;
    run.perplexity = track.perplexity(&learned.rotations, &scheme, &what, progress)?;
    Ok(run)
}
