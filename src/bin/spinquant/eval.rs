//! `spinquant eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use spinquant::Result;
use spinquant::compare::quantized;
use spinquant::data::Windows;
use spinquant::eval::{Perplexity, perplexity};
use spinquant::export::{Record, is_native, load_native};
use spinquant::llama::Merged;
use spinquant::quant::Scheme;
use spinquant::rotation::Start;

use crate::common::{ModelArgs, Progress, SchemeArgs, at_least_one, check_length, contradicts, rotations};
use crate::stop;
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
    #[arg(long, value_name = "WHICH", help = format!("{} [default: none]", Start::usage(&[])))]
    rotations: Option<Start>,
    /// How weights are quantised [default: rtn].
    #[arg(long, value_enum)]
    weights: Option<Method>,
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
        return native(args, &progress);
    }
    let start = args.rotations.clone().unwrap_or(Start::None);
    let weights = args.weights.unwrap_or(Method::Rtn);
    let config = args.model.checked(&args.scheme.scheme(), Some(args.seq_len))?;
    let rotations = rotations(&start, &config)?;
    let scheme = args.scheme.scheme_with(rotations.as_ref());
    let rotations = rotations.map(|file| file.rotations);
    let windows = limited(args.model.windows(&config, &args.text, args.seq_len)?, args.max_windows)?;
    let calibration = match weights {
        Method::Rtn => None,
        Method::Gptq => Some(args.gptq.text(&args.model, &config, args.calibration.as_ref(), args.seq_len)?),
    };
    let model = match start {
        Start::None => args.model.load_plain(&progress)?,
        _ => args.model.load(&progress)?,
    };
    let merged = match &calibration {
        None => model.merge(rotations.as_ref(), &scheme)?,
        Some(text) => {
            let (gptq, calibration) = (args.gptq.quantizer(), args.gptq.calibration(text)?);
            quantized(&model, rotations.as_ref(), &scheme, (&gptq, &calibration), &mut progress.watch())?
        }
    };
    drop(model);
    let how = format!("rotations {start}, weights {}", weights.name());
    report(args, &merged, &windows, &scheme, &progress, &how)
}

/// Scores a quantised model as it was written; arguments may repeat what it was written with.
fn native(args: &Args, progress: &Progress) -> Result<()> {
    let dir = &args.model.model;
    let written = Record::read(dir)?;
    args.scheme.check_written(&written.scheme, dir)?;
    let given = [
        ("--rotations", args.rotations.as_ref().map(Start::to_string), written.rotations),
        ("--weights", args.weights.map(|method| method.name().to_string()), written.weights),
        ("--dtype", args.model.given_dtype().map(|dtype| dtype.to_string()), written.dtype.to_string()),
    ];
    for (name, given, written) in given {
        if let Some(given) = given.filter(|given| *given != written) {
            return Err(contradicts(name, dir, &written, &given));
        }
    }
    check_length(&written.config, args.seq_len)?;
    let windows = limited(args.model.windows(&written.config, &args.text, args.seq_len)?, args.max_windows)?;
    let model = load_native(dir, &args.model.device()?)?.model;
    report(args, &model, &windows, &written.scheme, progress, "as written")
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
        stop::asked()
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
