//! `spinquant bench`: checks kernels' answers against the f64 reference, then times them against a copy of the same tensor.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValue, PossibleValuesParser};
use spinquant::bench::{self, Record, Row};
use spinquant::ops::Case;
use spinquant::{DType, Device, Error, Result};

use crate::common::device;
use crate::console;

/// The table of every kernel.
const ALL: &str = "all";
/// A day: nobody waits longer for a table.
const LONGEST: u64 = 86_400;

#[derive(clap::Args)]
pub struct Args {
    /// Which kernel.
    #[arg(long, value_parser = names())]
    kernel: String,
    /// Row length (default: 4096, or what the table has for the kernel).
    #[arg(long)]
    n: Option<usize>,
    /// Rows (default: as many values as the table has for the kernel).
    #[arg(long)]
    rows: Option<usize>,
    /// f32, f16 or bf16 (default: the first type that the table has for the kernel). The table has types of its own.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<DType>,
    /// auto takes a GPU where there is one.
    #[arg(long, value_name = "auto|cpu|cuda", default_value = "auto")]
    device: String,
    /// Leave out what is left of the table after so many seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=LONGEST))]
    seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Compare with the JSON object of an earlier run: each line's time over the earlier one.
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Fail if a line takes more than so many percent longer than in the earlier run.
    #[arg(long, value_name = "PERCENT", requires = "baseline")]
    fail_above: Option<f64>,
}

fn names() -> PossibleValuesParser {
    let all = [PossibleValue::new(ALL).help("The table of every kernel")];
    let kernels = bench::kernels().into_iter().map(|(name, about)| PossibleValue::new(name).help(about));
    PossibleValuesParser::new(all.into_iter().chain(kernels))
}

pub fn run(args: &Args) -> Result<()> {
    if args.dtype.is_some_and(|t| t != DType::F32 && !t.is_half()) {
        return Err(Error::argument("--dtype", "expected f32, f16 or bf16"));
    }
    if args.n == Some(0) || args.rows == Some(0) {
        return Err(Error::argument("--n and --rows", "expected at least 1"));
    }
    if args.fail_above.is_some_and(|percent| !(0.0..=1e6).contains(&percent)) {
        return Err(Error::argument("--fail-above", "expected a percentage from 0 to 1000000"));
    }
    let baseline = args.baseline.as_deref().map(Record::read).transpose()?;
    let device = device(&args.device)?;
    let jobs = match args.kernel.as_str() {
        ALL => bench::table(&device),
        kernel => vec![bench::one(kernel, args.n, args.rows, args.dtype, &device)?],
    };
    let name = device.description();
    let say = |line: &str| if args.json { say!("{line}") } else { out!("{line}") };
    say(&format!("on {name}; \"of copy\" is the bytes a call must move over those of a copy of one tensor in the same time"));
    if let Some(baseline) = baseline.as_ref().filter(|b| b.device != name) {
        say!("note: the earlier run was on {}; times of different machines say little about each other", baseline.device);
    }
    say(&Row::title());
    let deadline = Instant::now() + Duration::from_secs(args.seconds);
    bench::warm_up(&device)?;
    let mut record = Record { device: name, seconds: args.seconds, rows: vec![], peak_bytes: None };
    for (case, dtype) in &jobs {
        if console::is_closed() {
            return Ok(()); // what is measured is only printed
        }
        let outcome =
            if Instant::now() > deadline { Err("left out: out of time".to_string()) } else { measure(case, *dtype, &device) };
        let mut row = Row::new(case, *dtype, outcome.as_ref().map_err(Clone::clone));
        row.of_baseline = baseline.as_ref().and_then(|b| b.ratio(&row));
        say(&row.text());
        record.rows.push(row);
    }
    record.peak_bytes = device.peak_bytes();
    if let Some(bytes) = record.peak_bytes {
        say(&format!("peak memory {:.2} GiB", bytes as f64 / f64::from(1 << 30)));
    }
    if args.json {
        let json = serde_json::to_string(&record).map_err(|e| Error::argument("--json", e.to_string()))?;
        out!("{json}");
    }
    verdict(&record, args.fail_above)
}

/// A measurement; neither an error nor a panic stops the others.
fn measure(case: &Case, dtype: DType, device: &Device) -> Result<bench::Measured, String> {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench::measure(case, dtype, device)));
    caught.unwrap_or_else(|_| Err(Error::numeric("bench", "panicked"))).map_err(|e| e.to_string())
}

fn verdict(record: &Record, fail_above: Option<f64>) -> Result<()> {
    let missing = record.rows.iter().filter(|r| r.error.is_some()).count();
    if missing > 0 {
        return Err(Error::numeric("bench", format!("{missing} of {} lines have no measurement", record.rows.len())));
    }
    let Some(percent) = fail_above else { return Ok(()) };
    let slower = record.slower(percent);
    if slower.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = slower.iter().map(|r| format!("{} {} x {} {}", r.kernel, r.rows, r.n, r.dtype)).collect();
    Err(Error::numeric("bench", format!("more than {percent} % slower than the earlier run: {}", lines.join(", "))))
}
