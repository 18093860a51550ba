//! `spinquant profile`: checks the small goldens, then says where the time of learning steps goes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use spinquant::bench::steps::{Ceilings, Steps, ceilings, check, profile};
use spinquant::bench::{goldens, growth};
use spinquant::device::cuda::Phase;
use spinquant::quant::Scheme;
use spinquant::{Device, Error, Result, io};

use crate::common::{ModelArgs, Progress};
use crate::recipe::Recipe;
use crate::scheme::SchemeArgs;

const GIB: f64 = (1u64 << 30) as f64;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Text to learn on.
    #[arg(long, value_name = "FILE", default_value = "synthetic")]
    text: PathBuf,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// The folder of the golden tests [default: $SPINQUANT_GOLDENS, else those that are part of the program].
    #[arg(long, value_name = "DIR")]
    goldens: Option<PathBuf>,
    /// Instead: how time and memory grow with layers, batch, sequence length and width, as growth.csv and growth.png in this folder.
    #[arg(long, value_name = "DIR")]
    growth: Option<PathBuf>,
    /// Rows of the table of phases.
    #[arg(long, default_value_t = 40)]
    rows: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let scheme = args.scheme.scheme();
    let mut optimizer = args.recipe.optimizer()?;
    let mut options = args.recipe.options(scheme, 0);
    options.held_out = Some(0);
    options.held_out_every = usize::MAX;
    options.check(optimizer.as_ref())?;
    if args.growth.is_none() {
        check(&options)?;
    }
    let device = args.model.device()?;
    let own = args.goldens.clone().or_else(|| std::env::var_os("SPINQUANT_GOLDENS").map(PathBuf::from));
    let worst = goldens::check(own.as_deref(), &device)?;
    progress
        .say(&format!("goldens in f32 on {device}: loss within {:.1e}, cosine of dR1 at least {:.6}", worst.loss, worst.cosine));
    if let Some(folder) = &args.growth {
        return grow(folder, scheme, &device, args.json);
    }
    let config = args.model.checked(&scheme, Some(args.seq_len))?;
    let windows = args.model.windows(&config, &args.text, args.seq_len)?;
    options.check_text(&windows)?;
    let ceilings = ceilings(&device)?;

    let start = Instant::now();
    let model = args.model.load_placed(&progress, args.recipe.placement(1, &args.model, &options, &config, args.seq_len)?)?;
    device.synchronize()?;
    let loading = start.elapsed().as_secs_f64();
    let settings = options.settle(&model, &windows, optimizer.as_ref())?;
    (options.micro_batch, options.recompute) = (Some(settings.micro_batch), Some(settings.recompute));
    let plan = settings.recompute.plan();
    progress.say(&format!(
        "{scheme}, {} x {} tokens a step, {plan:?}, micro-batch {}, {} engine",
        options.batch, args.seq_len, settings.micro_batch, options.engine
    ));
    let steps = profile(&model, &windows, optimizer.as_mut(), &options, |step| {
        progress.say(&format!(
            "step {}: {:.3} s, loss {:.4}, max|RᵀR − I| {:.1e}",
            step.step, step.seconds, step.loss, step.orthogonality_error
        ));
    })?;
    if !args.json {
        print(&steps, ceilings.as_ref(), loading, args.rows);
        return Ok(());
    }
    let report = json!({
        "scheme": scheme.to_string(), "engine": options.engine.name(), "integer_linears": steps.predicted.on_integers, "layers": config.layers, "batch": options.batch, "seq_len": args.seq_len,
        "plan": {"recompute": plan.recompute.min(config.layers), "keep_weights": plan.keep_weights, "sequences": plan.sequences,
            "micro_batch": settings.micro_batch, "layers_in_main_memory": model.placement().streamed(config.layers) - model.placement().read(config.layers),
            "layers_read_again": model.placement().read(config.layers)},
        "copied_bytes_per_step": steps.copied_bytes, "predicted_copied_bytes": steps.predicted.moved,
        "seconds": steps.median(), "predicted_seconds": steps.predicted.seconds,
        "predicted_gib": steps.predicted.bytes() as f64 / GIB, "all_seconds": steps.seconds, "losses": steps.losses,
        "peak_gib": steps.peak_bytes.unwrap_or(0) as f64 / GIB, "loading_seconds": loading,
        "orthogonality_error": steps.orthogonality_error, "tokens_per_second": steps.tokens as f64 / steps.median(),
        "copy_gb_per_s": ceilings.as_ref().map(|c| c.copy / 1e9), "gemm_tflops": ceilings.as_ref().map(|c| c.product / 1e12),
        "phases": steps.phases.iter().map(phase).collect::<Vec<_>>(),
    });
    out!("{report}");
    Ok(())
}

fn print(steps: &Steps, ceilings: Option<&Ceilings>, loading: f64, rows: usize) {
    let median = steps.median();
    out!(
        "{median:.3} s a step ({:.0} tokens/s; {} timed), peak memory {:.2} GiB, max|RᵀR − I| {:.1e}, weights ready in {loading:.1} s",
        steps.tokens as f64 / median,
        steps.timed().len(),
        steps.peak_bytes.unwrap_or(0) as f64 / GIB,
        steps.orthogonality_error
    );
    let predicted = &steps.predicted;
    out!("predicted: {:.3} s a step, peak memory {:.2} GiB", predicted.seconds, predicted.bytes() as f64 / GIB);
    if steps.copied_bytes > 0 {
        out!(
            "{:.1} GiB of layers copied from main memory a step (predicted: {:.1}), {:.1} GB/s of the step",
            steps.copied_bytes as f64 / GIB,
            predicted.moved as f64 / GIB,
            steps.copied_bytes as f64 / median / 1e9
        );
    }
    if let Some(Ceilings { copy, product }) = ceilings {
        out!("ceilings in this run: copy {:.0} GB/s, bf16 product {:.0} TFLOP/s", copy / 1e9, product / 1e12);
    }
    let (sum, watched) = (steps.busy_ms(), 1e3 * steps.watched);
    out!("one step under watch: {watched:.0} ms, of which {:.0} ms idle", watched - sum);
    out!("{:<10} {:<10} {:<20} {:>7} {:>9} {:>6} {:>9} {:>8}", "pass", "part", "work", "calls", "ms", "%", "TFLOP/s", "GB/s");
    for r in steps.phases.iter().take(rows) {
        let rate = |x: f64, unit: f64| if x > 0.0 { format!("{:.0}", x / r.ms / unit) } else { String::new() };
        let percent = 100.0 * r.ms / sum;
        out!(
            "{:<10} {:<10} {:<20} {:>7} {:>9.2} {percent:>6.1} {:>9} {:>8}",
            r.pass,
            r.part,
            r.what,
            r.count,
            r.ms,
            rate(r.flops, 1e9),
            rate(r.bytes, 1e6)
        );
    }
}

fn phase(p: &Phase) -> Value {
    json!({"pass": p.pass, "part": p.part, "work": p.what, "calls": p.count, "ms": p.ms, "bytes": p.bytes, "flops": p.flops})
}

/// Measures how steps grow, prints the points and writes `growth.csv` and `growth.png`.
fn grow(folder: &Path, scheme: Scheme, device: &Device, json: bool) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let growth = growth::measure(scheme, device, |point| {
        if !json {
            out!("{}", point.csv());
        }
    })?;
    io::write_atomically(&folder.join("growth.csv"), |out| std::io::Write::write_all(out, growth.csv().as_bytes()))?;
    growth.draw(&folder.join("growth.png"))?;
    let base = &growth.base;
    if json {
        let point = |p: &growth::Point| {
            json!({
                "what": p.axis.to_string(), "shape": p.size.shape, "layers": p.size.layers, "batch": p.size.batch,
                "seq_len": p.size.seq, "size": p.along, "seconds": p.measured.seconds, "predicted_seconds": p.measured.predicted.seconds,
                "bytes": p.measured.bytes, "predicted_bytes": p.measured.predicted.bytes(),
            })
        };
        let points: Vec<Value> = growth.points.iter().map(point).collect();
        out!("{}", json!({"base_seconds": base.seconds, "base_bytes": base.bytes, "points": points, "out": folder}));
        return Ok(());
    }
    let size = growth::BASE;
    out!(
        "base: {} of {} layers, {} x {} tokens: {:.3} s, {:.2} GiB",
        size.shape,
        size.layers,
        size.batch,
        size.seq,
        base.seconds,
        base.bytes as f64 / GIB
    );
    Ok(())
}
