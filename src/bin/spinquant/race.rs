//! `spinquant race`: optimisers and objectives against one another on one model, held-out loss against steps and seconds.

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::{Value, json};
use spinquant::data::{Bos, FirstToken, Windows};
use spinquant::learn::{LearnOptions, Watch};
use spinquant::llama::{LlamaConfig, Recompute};
use spinquant::optim::Schedule;
use spinquant::quant::Scheme;
use spinquant::race::{Baseline, Course, Entry, Files, Outcome, Run, Spectator, Track, default_entries, full_precision};
use spinquant::{DType, Error, Result, demo};

use crate::common::{ModelArgs, Progress, Told, at_least_one};
use crate::eval::{fidelity, file_name, limited};
use crate::stop;

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face folder, or the name of a model: org/name[@revision] (default: the embedded model, on the CPU).
    #[arg(long, value_name = "DIR|NAME", requires_all = ["calibration", "text"])]
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
    /// What races, separated by commas: OPTIMIZER[/OBJECTIVE][@RATE[|RATE...]][+error|+loss|+learned][+weights], or hadamard[+error|+loss]
    /// for random rotations; +weights learns the clip ratios of weights. Of several rates, the first seed finds the best by held-out loss. Default: every optimiser on
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
    fn course(&self) -> Course {
        Course {
            entries: if self.entries.is_empty() { default_entries() } else { self.entries.clone() },
            schemes: self.schemes.clone(),
            steps: self.steps.clone(),
            seeds: self.first_seed..self.first_seed.saturating_add(self.seeds),
            learn: LearnOptions {
                batch: self.batch,
                schedule: Some(self.schedule),
                held_out: Some(self.held_out),
                held_out_every: self.held_out_every,
                recompute: Some(Recompute::None),
                clip_windows: self.clip_windows,
                stop: Some(stop::flag()),
                ..LearnOptions::default()
            },
        }
    }

    /// Opens the model and its texts, which must be long enough to learn with; and the model's name.
    fn track(&self, course: &Course, progress: &Progress) -> Result<(String, Track)> {
        let check = |config: &LlamaConfig, calibration: &Windows| {
            course.schemes.iter().try_for_each(|scheme| config.check_scheme(scheme))?;
            course.check_text(calibration)
        };
        let (Some(folder), Some(calibration), Some(text)) = (&self.model, &self.calibration, &self.text) else {
            let seq_len = self.seq_len.unwrap_or(128);
            let (calibration, text) = (demo::windows(demo::CALIBRATION, seq_len)?, demo::windows(demo::TEST, seq_len)?);
            let text = limited(text, self.max_windows)?;
            let model = demo::model()?;
            check(&model.config, &calibration)?;
            let full = full_precision(&model, &text, &mut progress.watch())?;
            return Ok(("the embedded model".into(), Track { model, full, calibration, text }));
        };
        let place = ModelArgs::new(folder.clone(), self.device.clone(), self.dtype, self.bos.unwrap_or_default());
        let seq_len = self.seq_len.unwrap_or(2048);
        let config = place.checked(&Scheme::FULL_PRECISION, Some(seq_len))?;
        let calibration = place.windows(&config, calibration, seq_len)?;
        let text = limited(place.windows(&config, text, seq_len)?, self.max_windows)?;
        check(&config, &calibration)?;
        // One model at a time: the plain one is gone before the one that is rotated comes.
        let full = full_precision(&place.load_plain(progress)?, &text, &mut progress.watch())?;
        Ok((file_name(folder), Track { model: place.load(progress)?, full, calibration, text }))
    }
}

/// Prints a race as it goes and writes its rows.
struct Reporter<'a> {
    told: Told<'a>,
    files: Files,
    json: bool,
}

impl Reporter<'_> {
    fn say(&self, line: &str) {
        if !self.json {
            out!("{line}");
        }
    }
}

impl Watch for Reporter<'_> {
    fn begin(&mut self, what: &str, total: usize) {
        self.told.begin(what, total);
    }
    fn at(&mut self, done: usize) -> ControlFlow<()> {
        self.told.at(done)
    }
    fn note(&mut self, line: &str) {
        self.told.note(line);
    }
}

impl Spectator for Reporter<'_> {
    fn scored(&mut self, baseline: &Baseline) {
        self.say(&format!("{}: random Hadamard {:.3}", baseline.scheme, baseline.mean()));
    }
    fn ended(&mut self, run: &Run, recovered: f64) -> Result<()> {
        self.say(&line(run, recovered));
        self.files.add(run, recovered)
    }
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    // All that can be refused is, before results are touched and anything is loaded.
    let course = args.course();
    course.check()?;
    std::fs::create_dir_all(&args.out).map_err(Error::io(&args.out))?;
    Files::check(&args.out)?;
    let (name, track) = args.track(&course, &progress)?;
    let _careful = stop::AfterStep::new();
    let mut reporter = Reporter { told: progress.watch(), files: Files::create(&args.out)?, json: args.json };
    let (first, seq_len) = (track.text.first_token(), track.calibration.seq_len());
    let full = track.full;
    reporter.say(&format!("{name}, windows of {seq_len}, the text starts with {first}: full precision {full:.3}"));
    let mut outcome = Outcome::default();
    let raced = course.run(&track, &mut outcome, &mut reporter);
    // What an interrupted race has is worth its table and pictures.
    let written = reporter.files.finish(&outcome, &name);
    match args.json {
        true => out!("{}", json(&outcome, &first)),
        false => out!("{}curves in {}", outcome.table(&name), args.out.display()),
    }
    raced.and(written)
}

/// A run, for people, as soon as it is known.
fn line(run: &Run, recovered: f64) -> String {
    let learning = match run.curve.first() {
        Some(first) => {
            format!("rate {}, {} steps, held out {:.4} -> {:.4}, ", run.rate, run.steps, first.held_out, run.held_out_last())
        }
        None => String::new(),
    };
    format!(
        "{:<9} {:<32} seed {}: {learning}perplexity {:.3}, {:.1} % of the gap, KL {:.4}, {:.2} s",
        run.scheme.to_string(),
        run.entry,
        run.seed,
        run.perplexity,
        100.0 * recovered,
        run.divergence(),
        run.seconds
    )
}

/// Everything, for programs.
fn json(outcome: &Outcome, first: &FirstToken) -> Value {
    let runs = outcome.runs().iter().map(|r| {
        let curve: Vec<Value> = r.curve.iter().map(|p| json!([p.step, p.seconds, p.held_out])).collect();
        json!({
            "entry": r.entry, "optimizer": r.optimizer, "objective": r.objective, "learning_rate": r.rate,
            "clip": r.clip, "scheme": r.scheme.to_string(), "steps": r.steps, "seed": r.seed, "perplexity": r.perplexity,
            "fidelity": r.fidelity.as_ref().map(fidelity),
            "recovered": outcome.recovered(r), "seconds": r.seconds, "orthogonality_error": r.orthogonality_error, "curve": curve,
        })
    });
    let baselines = outcome
        .baselines()
        .iter()
        .map(|b| json!({"scheme": b.scheme.to_string(), "full": b.full, "random": b.random, "kl": b.divergence}));
    json!({"baselines": baselines.collect::<Vec<_>>(), "runs": runs.collect::<Vec<_>>(), "starts_with": first})
}
