//! `spinquant eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use spinquant::Result;
use spinquant::data::Windows;
use spinquant::eval::{Perplexity, perplexity};
use spinquant::export::{is_native, load_native};
use spinquant::llama::Merged;
use spinquant::quant::Scheme;

use crate::common::{ModelArgs, Progress, RotationChoice, SchemeArgs, at_least_one, interrupted};
use crate::weights::{GptqArgs, Method};

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
    /// none, identity, hadamard[:SEED], block-hadamard[:SEED], orthogonal[:SEED], or a file that `learn` wrote.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    rotations: RotationChoice,
    /// How weights are quantised.
    #[arg(long, value_enum, default_value_t = Method::Rtn)]
    weights: Method,
    /// Calibration text for GPTQ.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    gptq: GptqArgs,
    /// Read at most this many windows.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    if is_native(&args.model.model) {
        let native = load_native(&args.model.model, &args.model.device()?)?;
        let windows = args.model.windows(&native.model.config, &args.text, args.seq_len)?;
        let scheme = native.model.scheme;
        return report(args, &native.model, &limited(windows, args.max_windows)?, &scheme, &progress, "as written");
    }
    let model = match args.rotations {
        RotationChoice::None => args.model.load_plain(&progress)?,
        _ => args.model.load(&progress)?,
    };
    let rotations = args.rotations.load(&model.config)?;
    let windows = limited(args.model.windows(&model.config, &args.text, args.seq_len)?, args.max_windows)?;
    let scheme = args.scheme.scheme_with(&args.rotations)?;
    let merged = match args.weights {
        Method::Rtn => model.merge(rotations.as_ref(), &scheme)?,
        Method::Gptq => {
            let text = args.gptq.text(&args.model, &model.config, args.calibration.as_ref(), args.seq_len)?;
            args.gptq.quantize(&model, rotations.as_ref(), &scheme, &text, &progress)?
        }
    };
    drop(model);
    let how = format!("rotations {}, weights {}", args.rotations, args.weights.name());
    report(args, &merged, &windows, &scheme, &progress, &how)
}

fn report(args: &Args, merged: &Merged, windows: &Windows, scheme: &Scheme, progress: &Progress, how: &str) -> Result<()> {
    let start = Instant::now();
    let score = score(merged, windows, progress, &format!("{scheme}"))?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let Perplexity { perplexity, windows: count, tokens } = score;
        out!(
            "{}",
            json!({
                "perplexity": perplexity, "windows": count, "tokens": tokens, "seconds": seconds,
                "starts_with": windows.first_token(),
            })
        );
    } else {
        let speed = score.tokens as f64 / seconds;
        out!("{scheme}, {how}: perplexity {:.4}", score.perplexity);
        out!("{} windows, {} tokens in {seconds:.1} s ({speed:.0} tokens/s)", score.windows, score.tokens);
        out!("the text starts with {}", windows.first_token());
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
    count.map_or(Ok(windows.clone()), |n| windows.limited(n))
}

/// The name of a file for messages and tables.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
