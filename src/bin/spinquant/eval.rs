//! `spinquant eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use spinquant::data::Windows;
use spinquant::eval::fidelity::{self, Fidelity};
use spinquant::eval::marks::Mean;
use spinquant::eval::{Perplexity, perplexity_among};
use spinquant::llama::Merged;
use spinquant::quant::Engine;
use spinquant::{Error, Result};

use crate::common::{Progress, at_least_one};
use crate::network::NetworkArgs;
use crate::ranks::{self, RanksArgs};
use crate::stop;
use crate::zeroshot::shown;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub ranks: RanksArgs,
    /// Text to score.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Read at most this many windows.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_windows: Option<usize>,
    /// Text of another kind, to score fidelity to the model in full precision on too.
    #[arg(long, value_name = "FILE", conflicts_with = "no_fidelity")]
    fidelity_text: Option<PathBuf>,
    /// The model in full precision that fidelity is to: the folder that a quantised one was made from [default: --model, where it is not
    /// quantised].
    #[arg(long, value_name = "DIR", conflicts_with = "no_fidelity")]
    full_precision: Option<PathBuf>,
    /// Score perplexity alone, in half the time.
    #[arg(long)]
    no_fidelity: bool,
    /// How quantised linear layers are computed, for a folder that `quantize` wrote: by products of the values that codes stand for, or of
    /// the codes.
    #[arg(long, value_name = "simulated|integer", default_value_t = Engine::Simulated)]
    engine: Engine,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let network = args.network.checked(args.seq_len, true)?;
    let windows = limited(args.network.model.windows(&network.config, &args.text, args.seq_len)?, args.max_windows)?;
    let other = match &args.fidelity_text {
        Some(text) => Some(limited(args.network.model.windows(&network.config, text, args.seq_len)?, args.max_windows)?),
        None => None,
    };
    if let Some(text) = args.fidelity_text.as_ref().filter(|_| args.full_precision.is_none() && network.is_written()) {
        let message = format!("{} is quantised: expected --full-precision DIR for fidelity", args.network.model.model.display());
        return Err(Error::argument(format!("--fidelity-text {}", text.display()), message));
    }
    let network = if args.engine == Engine::Integer { network.on_integers()? } else { network };
    let (merged, full) = match args.no_fidelity {
        true => (network.load(&progress)?, None),
        false => network.load_with_full(args.full_precision.as_ref(), &progress)?,
    };
    let [integer, linears] = merged.integer_linears();
    let start = Instant::now();
    let scored = score(&merged, full.as_ref(), &windows, &progress, &network.scheme.to_string())?;
    let seconds = start.elapsed().as_secs_f64();
    let other = match (&full, &other) {
        (Some(full), Some(text)) => {
            let mut task = progress.start("other text", text.len());
            Some(fidelity::fidelity_among(&ranks::group(), &merged, full, text, |done| {
                task.at(done, "");
                stop::asked()
            })?)
        }
        _ => None,
    };
    let (score, fidelity) = scored;
    if args.json {
        let Perplexity { perplexity, windows: count, tokens } = score;
        out!(
            "{}",
            json!({
                "perplexity": perplexity, "windows": count, "tokens": tokens, "seconds": seconds,
                "engine": args.engine.name(), "integer_linears": integer,
                "starts_with": windows.first_token(), "fidelity": fidelity.as_ref().map(self::fidelity),
                "fidelity_other": other.as_ref().map(self::fidelity),
            })
        );
    } else {
        let speed = score.tokens as f64 / seconds;
        out!("{}, {}: perplexity {:.4}", network.scheme, network.how(), score.perplexity);
        out!("{} windows, {} tokens in {seconds:.1} s ({speed:.0} tokens/s)", score.windows, score.tokens);
        if args.engine == Engine::Integer {
            out!("{integer} of {linears} linear layers on integers");
        }
        for (what, fidelity) in [("", fidelity), (" on the other text", other)] {
            let Some(fidelity) = fidelity else { continue };
            let (divergence, agreement) = (fidelity.divergence(), fidelity.agreement());
            let percent = Mean { mean: 100.0 * agreement.mean, standard_error: 100.0 * agreement.standard_error };
            let (divergence, percent) = (shown(divergence, 5), shown(percent, 2));
            out!("fidelity{what}: KL {divergence} nats a token, the same likeliest token after {percent} %");
        }
        out!("the text starts with {}", windows.first_token());
    }
    Ok(())
}

/// Fidelity, for programs.
pub fn fidelity(f: &Fidelity) -> Value {
    let mean = |mean: Mean| json!({"mean": mean.mean, "standard_error": mean.standard_error});
    json!({"kl": mean(f.divergence()), "top1": mean(f.agreement())})
}

/// Scores a model with a progress bar, beside the same one in full precision where that is given.
fn score(
    model: &Merged,
    full: Option<&Merged>,
    windows: &Windows,
    progress: &Progress,
    what: &str,
) -> Result<(Perplexity, Option<Fidelity>)> {
    let mut task = progress.start(what, windows.len());
    perplexity_among(&ranks::group(), model, full, windows, |done| {
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
