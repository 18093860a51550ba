//! `spinquant clip`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::{Value, json};
use spinquant::calibrate::{ClipFound, ClipGoal, search_clips};
use spinquant::data::Windows;
use spinquant::llama::Llama;
use spinquant::quant::{ClipRatios, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{Error, Result};

use crate::common::{
    CLIP_RATIOS, CLIP_SCHEME, ModelArgs, Progress, RotationChoice, SchemeArgs, activation_bits, at_least_one, interrupted,
};
use crate::outputs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// identity, hadamard[:SEED], orthogonal[:SEED], or a file that `learn` wrote.
    #[arg(long, value_name = "WHICH")]
    rotations: RotationChoice,
    /// What to make small: error (of every quantiser, by itself) or loss (of the whole network).
    #[arg(long, value_name = "error|loss", default_value = "error")]
    goal: ClipGoal,
    /// Windows to search on.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    windows: usize,
    /// Where to write the rotations with their clip ratios; may be the file they came from.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Searches with a progress bar, on this many windows spread evenly, or on all where there are fewer.
pub fn search(
    model: &Llama,
    rotations: &Rotations,
    scheme: &Scheme,
    windows: &Windows,
    (goal, count): (ClipGoal, usize),
    progress: &Progress,
) -> Result<ClipFound> {
    if count == 0 {
        return Err(Error::argument("clip search", "expected at least one window to search on, got 0"));
    }
    let (count, mut task) = (count.min(windows.len()), None);
    let spread: Vec<usize> = (0..count).map(|i| i * windows.len() / count).collect();
    search_clips(model, Some(rotations), scheme, windows, &spread, goal, |done, total| {
        task.get_or_insert_with(|| progress.start("searching clip ratios", total)).at(done, "");
        interrupted()
    })
}

/// What a rotation file says of its clip ratios.
pub fn notes(ratios: ClipRatios, scheme: &Scheme) -> [(String, String); 2] {
    [(CLIP_RATIOS.to_string(), ratios.to_string()), (CLIP_SCHEME.to_string(), activation_bits(scheme))]
}

/// For people and for programs.
pub fn report(found: &ClipFound, goal: ClipGoal) -> (String, Value) {
    let (before, after) = found.goal;
    let ratios: BTreeMap<&str, f64> = Site::ALL.iter().map(|&s| (s.name(), found.ratios.at(s))).collect();
    let each: Vec<String> = Site::ALL.iter().map(|&s| format!("{} {}", s.name(), found.ratios.at(s))).collect();
    let line = format!("clip ratios by {goal} ({before:.4} -> {after:.4}, {} tried): {}", found.tried, each.join(", "));
    (line, json!({"goal": goal.to_string(), "ratios": ratios, "before": before, "after": after, "tried": found.tried}))
}

/// What `--clip` says.
#[derive(Clone, Copy, Debug)]
pub enum ClipChoice {
    /// Ratios of 1, as published.
    None,
    /// Search them.
    By(ClipGoal),
}

impl FromStr for ClipChoice {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "none" => Ok(Self::None),
            _ => s.parse().map(Self::By).map_err(|_| Error::argument("clip", format!("expected error, loss or none, got {s:?}"))),
        }
    }
}

impl ClipChoice {
    /// What there is to search: nothing where neither activations nor K nor V are quantised.
    pub fn goal(self, scheme: &Scheme) -> Option<ClipGoal> {
        match self {
            Self::By(goal) if [scheme.activation_bits, scheme.key_bits, scheme.value_bits].iter().any(|b| *b < 16) => Some(goal),
            _ => None,
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    outputs::check(&[("--out", &args.out)], Some(&args.model.model), &[("--text", &args.text)])?;
    let model = args.model.load(&progress)?;
    let rotations = args.rotations.load(&model.config)?;
    let rotations =
        rotations.ok_or_else(|| Error::argument("--rotations", "clip ratios are kept with rotations; none has no file"))?;
    let mut kept = match &args.rotations {
        RotationChoice::File(path) => Rotations::load_with(path)?.1,
        _ => BTreeMap::from([("start".to_string(), args.rotations.to_string())]),
    };
    let windows = args.model.windows(&model.config, &args.text, args.seq_len)?;
    let scheme = args.scheme.scheme();
    let found = search(&model, &rotations, &scheme, &windows, (args.goal, args.windows), &progress)?;
    kept.extend(notes(found.ratios, &scheme));
    rotations.save_with(&args.out, &kept)?;
    let (line, mut value) = report(&found, args.goal);
    let first = windows.first_token();
    value["starts_with"] = json!(first);
    match args.json {
        true => out!("{value}"),
        false => out!("{line}\nthe text starts with {first}\nwritten to {}", args.out.display()),
    }
    Ok(())
}
