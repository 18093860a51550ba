//! `spinquant demo`: the paper's table on the embedded model, and a picture of its outliers.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use spinquant::compare::{Comparison, Test, Unrotated};
use spinquant::{Result, demo, inspect};

use crate::common::Progress;
use crate::compare::{json, print};
use crate::inspect::activations;
use crate::recipe::Recipe;
use crate::scheme::SchemeArgs;

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
    // Its table is the paper's.
    let recipe = args.recipe.clone().or_published();
    let options = recipe.options(scheme, 0);
    let optimizer = recipe.optimizer()?;
    options.check(optimizer.as_ref())?;
    options.check_text(&calibration)?;
    config.check_scheme(&scheme)?;
    let mut watch = progress.watch();
    let comparison = Comparison {
        model: &model,
        // All gains are 1: it is its own plain network.
        unrotated: Unrotated::score(&model, &scheme, Test::on(&text), &[], &mut watch)?,
        calibration: &calibration,
        test: Test::on(&text),
        scheme,
        learn_scheme: scheme,
        options: &options,
        optimizer: &|| recipe.optimizer(),
        seeds: args.seeds,
        learn_seeds: args.learn_seeds,
        quantizers: &[],
        baselines: None,
        clip: options.clip.goal(&scheme, optimizer.as_ref()).map(|goal| (goal, options.clip_windows)),
    };
    let outcome = comparison.run(&mut watch)?;
    drop(watch);

    let before = inspect::unquantized(&model, None, &scheme)?;
    let mut networks = vec![("before".to_string(), &before)];
    let after = outcome.runs.first().map(|r| inspect::unquantized(&model, Some(&r.learned.rotations), &scheme)).transpose()?;
    networks.extend(after.iter().map(|network| ("after".to_string(), network)));
    // The table does not depend on the picture.
    let drawn = activations(&args.picture, &networks, text.get(0), 0);

    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let mut json = json(&outcome, &text.first_token(), None)?;
        json["seconds"] = json!(seconds);
        json["picture"] = json!(drawn.is_ok().then_some(&args.picture));
        out!("{json}");
    } else {
        print(&outcome, &text.first_token(), None)?;
        if drawn.is_ok() {
            out!("{seconds:.0} s; activations before and after in {}", args.picture.display());
        }
    }
    drawn
}
