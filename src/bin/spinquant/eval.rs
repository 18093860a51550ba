//! `spinquant eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use spinquant::data::Windows;
use spinquant::eval::{Perplexity, perplexity};
use spinquant::llama::Merged;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, RotationChoice, SchemeArgs, interrupted};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    /// Text to score.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// none, identity, hadamard[:SEED], orthogonal[:SEED], or a file that `learn` wrote.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    rotations: RotationChoice,
    /// How weights are quantised: rtn (round to nearest).
    #[arg(long, value_name = "HOW", default_value = "rtn")]
    weights: String,
    /// Read at most this many windows.
    #[arg(long, value_name = "N")]
    max_windows: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    if args.weights != "rtn" {
        return Err(Error::argument("--weights", format!("expected rtn, got {:?}", args.weights)));
    }
    let model = match args.rotations {
        RotationChoice::None => args.model.load_plain(&progress)?,
        _ => args.model.load(&progress)?,
    };
    let rotations = args.rotations.load(&model.config)?;
    let windows = limited(args.model.windows(&model.config, &args.text, args.seq_len)?, args.max_windows)?;
    let scheme = args.scheme.scheme();
    let merged = model.merge(rotations.as_ref(), &scheme)?;
    drop(model);
    let start = Instant::now();
    let score = score(&merged, &windows, &progress, &format!("{scheme}"))?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let Perplexity { perplexity, windows, tokens } = score;
        println!("{}", json!({"perplexity": perplexity, "windows": windows, "tokens": tokens, "seconds": seconds}));
    } else {
        let speed = score.tokens as f64 / seconds;
        println!("{scheme}, rotations {}, weights {}: perplexity {:.4}", args.rotations, args.weights, score.perplexity);
        println!("{} windows, {} tokens in {seconds:.1} s ({speed:.0} tokens/s)", score.windows, score.tokens);
    }
    Ok(())
}

/// Scores a model with a progress bar.
pub fn score(model: &Merged, windows: &Windows, progress: &Progress, what: &str) -> Result<Perplexity> {
    let mut task = progress.start(what, windows.len());
    perplexity(model, windows, |done| {
        task.at(done, "");
        interrupted()
    })
}

/// At most `count` windows.
pub fn limited(windows: Windows, count: Option<usize>) -> Result<Windows> {
    match count {
        Some(n) if n < windows.len() => {
            let all: Vec<usize> = (0..n.max(1)).collect();
            Windows::new(windows.batch(&all), windows.seq_len())
        }
        _ => Ok(windows),
    }
}

/// The name of a file for messages and tables.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
