//! `spinquant eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use spinquant::Result;
use spinquant::data::Windows;
use spinquant::eval::{Perplexity, perplexity};
use spinquant::llama::Merged;

use crate::common::{Progress, at_least_one};
use crate::network::NetworkArgs;
use crate::stop;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Text to score.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Read at most this many windows.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let network = args.network.checked(args.seq_len, true)?;
    let windows = limited(args.network.model.windows(&network.config, &args.text, args.seq_len)?, args.max_windows)?;
    let merged = network.load(&progress)?;
    let start = Instant::now();
    let score = score(&merged, &windows, &progress, &network.scheme.to_string())?;
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
        out!("{}, {}: perplexity {:.4}", network.scheme, network.how(), score.perplexity);
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
