//! `spinquant clip`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use spinquant::calibrate::{ClipFound, ClipGoal};
use spinquant::learn::search_clips_watched;
use spinquant::quant::Site;
use spinquant::rotation::{ClipEnds, RotationFile, Start};
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, at_least_one, note, rotations};
use crate::outputs;
use crate::ranks::{self, RanksArgs};
use crate::scheme::SchemeArgs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ranks: RanksArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    #[arg(long, value_name = "WHICH", help = Start::usage(&["none"]))]
    rotations: Start,
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

/// For people and for programs.
pub fn report(found: &ClipFound, goal: ClipGoal) -> (String, Value) {
    let (before, after) = found.goal;
    let ratios: BTreeMap<&str, f64> = Site::ALL.iter().map(|&s| (s.name(), found.ratios.at(s))).collect();
    let each: Vec<String> = Site::ALL.iter().map(|&s| format!("{} {}", s.name(), found.ratios.at(s))).collect();
    let line = format!("clip ratios by {goal} ({before:.4} -> {after:.4}, {} tried): {}", found.tried, each.join(", "));
    (line, json!({"goal": goal.to_string(), "ratios": ratios, "before": before, "after": after, "tried": found.tried}))
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let ranks = ranks::group();
    if ranks.is_first() {
        outputs::check(&[("--out", &args.out)], Some(&args.model.model), &[("--text", &args.text)])?;
    }
    RotationFile::check_holds_clips(&args.out)?;
    let mut scheme = args.scheme.scheme();
    let config = args.model.checked(&scheme, Some(args.seq_len))?;
    let mut file = rotations(&args.rotations, &config)?
        .ok_or_else(|| Error::argument("--rotations", "clip ratios are kept with rotations; none has no file"))?;
    scheme.online = args.scheme.scheme_online(Some(&file), &config)?.online;
    let windows = args.model.windows(&config, &args.text, args.seq_len)?;
    // By error a layer at a time is rotated; by loss the network is there beside the model.
    let networks = if args.goal == ClipGoal::Error { 1 } else { 2 };
    let model = args.model.load_placed(&progress, args.model.placement_of(networks, false)?)?;
    let how = (args.goal, args.windows);
    let found = search_clips_watched(&ranks, &model, &file.rotations, &scheme, &windows, how, &mut progress.watch())?;
    if !ranks.is_first() {
        return Ok(());
    }
    scheme.activation_clip = found.ratios;
    if !file.rotations.clips.is_empty() {
        note(&format!("the ratios stand in place of the clip constants that were learned with {}", args.rotations));
        file.rotations.clips = ClipEnds::default();
    }
    let file = file.with_clips_of(&scheme).with_online(scheme.online, config.head_dim, config.intermediate_size)?;
    file.write(&args.out)?;
    let (line, mut value) = report(&found, args.goal);
    let first = windows.first_token();
    value["starts_with"] = json!(first);
    match args.json {
        true => out!("{value}"),
        false => out!("{line}\nthe text starts with {first}\nwritten to {}", args.out.display()),
    }
    Ok(())
}
