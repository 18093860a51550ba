//! `spinquant demo`: the paper's table on the embedded model, and a picture of its outliers.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use spinquant::{Result, demo, inspect};

use crate::common::{Progress, SchemeArgs};
use crate::compare::{Comparison, Unrotated};
use crate::inspect::activations;
use crate::learn::Recipe;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Random Hadamards to score.
    #[arg(long, default_value_t = 8)]
    seeds: u64,
    /// Of those, how many to learn from.
    #[arg(long, default_value_t = 1)]
    learn_seeds: u64,
    /// Where to write the picture.
    #[arg(long, value_name = "FILE", default_value = "spinquant-demo.png")]
    picture: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let (progress, start) = (Progress::new(), Instant::now());
    spinquant::io::check_writable(&args.picture)?;
    let model = demo::model()?;
    let config = &model.config;
    progress.say(&format!(
        "a LLaMA of {} layers, width {}, trained on made-up stories; its outliers are planted (spinquant::demo)",
        config.layers, config.hidden_size
    ));
    let calibration = demo::windows(demo::CALIBRATION, demo::CONTEXT)?;
    let text = demo::windows(demo::TEST, demo::CONTEXT)?;
    let scheme = args.scheme.scheme();
    let comparison = Comparison {
        model: &model,
        // All gains are 1: it is its own plain network.
        unrotated: Unrotated::score(&model, &scheme, (&calibration, &text), None, &progress)?,
        calibration: &calibration,
        text: &text,
        scheme,
        learn_scheme: scheme,
        recipe: &args.recipe,
        seeds: args.seeds,
        learn_seeds: args.learn_seeds,
        gptq: None,
        clip: None,
    };
    let outcome = comparison.run(&progress)?;

    let before = inspect::unquantized(&model, None, &scheme)?;
    let mut networks = vec![("before".to_string(), &before)];
    let after = outcome.learned.as_ref().map(|l| inspect::unquantized(&model, Some(&l.rotations), &scheme)).transpose()?;
    networks.extend(after.iter().map(|network| ("after".to_string(), network)));
    // The table does not depend on the picture.
    let drawn = activations(&args.picture, &networks, text.get(0), 0);

    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let mut json = outcome.json();
        json["seconds"] = json!(seconds);
        json["picture"] = json!(drawn.is_ok().then_some(&args.picture));
        out!("{json}");
    } else {
        outcome.print();
        if drawn.is_ok() {
            out!("{seconds:.0} s; activations before and after in {}", args.picture.display());
        }
    }
    drawn
}
