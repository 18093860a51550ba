//! `spinquant bench`: checks a kernel's answer against the f64 reference, then times it against a copy of the same tensor.

mod exact;
mod gptq;
#[cfg(feature = "cuda")]
mod gpu;
mod run;

use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use spinquant::{DType, Device, Error, Result};

use crate::common::{device, peak_bytes};
use crate::console;

/// What can be timed, and what `--n` and `--rows` are of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// The table of every kernel
    All,
    /// Copy on one device
    Copy,
    /// Hadamard transform of rows of n
    Hadamard,
    /// Hadamard transform and asymmetric 4-bit quantisation (one pass on a GPU)
    HadamardFakeQuant,
    /// Asymmetric 4-bit quantisation of rows of n
    FakeQuant,
    /// Symmetric 4-bit weights with the clip ratio searched, rows of n
    ClipSearch,
    /// RMSNorm of rows of n
    RmsNorm,
    /// Its gradient
    RmsNormBackward,
    /// SwiGLU of rows of n
    Swiglu,
    /// Its gradients
    SwigluBackward,
    /// Rotary embedding of rows of n / 128 heads
    Rope,
    /// Its gradient: the rotation back
    RopeBackward,
    /// Sum of two tensors
    Add,
    /// Rows of n of a table of 32000, for `rows` tokens
    Embedding,
    /// Mean cross entropy of rows of n logits, the gradient included
    CrossEntropy,
    /// Causal attention of `rows` sequences of n tokens, 32 heads of 128
    Attention,
    /// Its gradients
    AttentionBackward,
    /// A Cayley step of `rows` matrices of n x n, re-orthonormalised and audited
    Cayley,
    /// The audit alone
    CayleyAudit,
    /// [rows, n] times [n, n]
    Gemm,
    /// GPTQ of a LLaMA layer of width n, rotated, on `rows` tokens of text: seven linears
    GptqLayer,
    /// The same for a model of 32 such layers: everything but reading and writing files
    GptqModel,
}

impl Kernel {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
struct Job {
    kernel: Kernel,
    n: usize,
    rows: usize,
    dtype: DType,
}

/// What a job did.
struct Measured {
    /// Milliseconds a call.
    ms: f64,
    /// How that was measured.
    how: &'static str,
    /// Bytes that must be moved: every operand read once, every result written once.
    bytes: f64,
    /// Additions and multiplications, where they are what limits.
    flops: f64,
    /// Milliseconds of copying one tensor, and the bytes that moves (read and written).
    copy: Option<(f64, f64)>,
}

#[derive(clap::Args)]
pub struct Args {
    /// Which kernel.
    #[arg(long)]
    kernel: Kernel,
    /// Row length (default: 4096; 2048 tokens for attention).
    #[arg(long)]
    n: Option<usize>,
    /// Rows (default: 2^28 values on a GPU, 2^24 on the CPU).
    #[arg(long)]
    rows: Option<usize>,
    /// f32, f16 or bf16 (default: bf16 on a GPU, f32 on the CPU). The table has types of its own.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<DType>,
    /// auto takes a GPU where there is one.
    #[arg(long, value_name = "auto|cpu|cuda", default_value = "auto")]
    device: String,
    /// Leave out what is left of the table after so many seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let device = device(&args.device)?;
    if args.dtype.is_some_and(|t| t != DType::F32 && !t.is_half()) {
        return Err(Error::argument("--dtype", "expected f32, f16 or bf16"));
    }
    if args.n == Some(0) || args.rows == Some(0) {
        return Err(Error::argument("--n and --rows", "expected at least 1"));
    }
    let jobs = if args.kernel == Kernel::All { table(&device) } else { vec![one(args, &device)] };
    let name = device_name(&device);
    let say = |line: &str| if args.json { say!("{line}") } else { out!("{line}") };
    say(&format!("on {name}; \"of copy\" is the bytes a call must move over those of a copy of one tensor in the same time"));
    let title = ["kernel", "n", "rows", "type", "ms", "GB/s", "of copy", "TFLOP/s", "measured by"].map(str::to_string);
    say(&line(&title));
    let deadline = Instant::now() + Duration::from_secs(args.seconds);
    run::warm_up(&device)?;
    let (mut rows, mut failures) = (vec![], 0);
    for job in &jobs {
        if console::is_closed() {
            return Ok(()); // what is measured is only printed
        }
        let outcome = if Instant::now() > deadline { Err("left out: out of time".to_string()) } else { measure(job, &device) };
        let (text, value) = report(job, &outcome);
        say(&text);
        rows.push(value);
        failures += usize::from(outcome.is_err());
    }
    let peak = peak_bytes(&device);
    if let Some(bytes) = peak {
        say(&format!("peak memory {:.2} GiB", bytes as f64 / f64::from(1 << 30)));
    }
    if args.json {
        out!("{}", json!({"device": name, "seconds": args.seconds, "rows": rows, "peak_bytes": peak}));
    }
    if failures > 0 {
        return Err(Error::numeric("bench", format!("{failures} of {} lines have no measurement", jobs.len())));
    }
    Ok(())
}

/// A job's measurement; neither an error nor a panic stops the others.
fn measure(job: &Job, device: &Device) -> Result<Measured, String> {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run::run(job, device)));
    caught.unwrap_or_else(|_| Err(Error::numeric("bench", "panicked"))).map_err(|e| e.to_string())
}

fn line(cells: &[String; 9]) -> String {
    let [kernel, n, rows, dtype, ms, rate, fraction, flops, how] = cells;
    format!("{kernel:<20} {n:>6} {rows:>8} {dtype:>5} {ms:>9} {rate:>7} {fraction:>7} {flops:>8}  {how}").trim_end().to_string()
}

fn report(job: &Job, outcome: &Result<Measured, String>) -> (String, Value) {
    let Job { n, rows, dtype, .. } = *job;
    let kernel = job.kernel.name();
    let mut value = json!({"kernel": kernel, "n": n, "rows": rows, "dtype": dtype.to_string()});
    let start = [kernel, n.to_string(), rows.to_string(), dtype.to_string()];
    let rest = match outcome {
        Err(e) => {
            value["error"] = json!(e);
            [String::new(), String::new(), String::new(), String::new(), format!("error: {e}")]
        }
        Ok(m) => {
            let rate = m.bytes / m.ms / 1e6;
            let fraction = m.copy.map(|(ms, bytes)| rate / (bytes / ms / 1e6));
            let flops = (m.flops > 0.0).then_some(m.flops / m.ms / 1e9);
            value["ms"] = json!(m.ms);
            value["measured_by"] = json!(m.how);
            value["gb_per_s"] = json!((m.bytes > 0.0).then_some(rate));
            value["of_copy"] = json!(fraction);
            value["tflop_per_s"] = json!(flops);
            let number = |x: Option<f64>, digits: usize| x.map_or_else(String::new, |x| format!("{x:.digits$}"));
            let ms = format!("{:.*}", if m.ms < 0.1 { 5 } else { 3 }, m.ms);
            [
                ms,
                number((m.bytes > 0.0).then_some(rate), 0),
                number(fraction, 2),
                number(flops, if m.flops / m.ms > 1e10 { 1 } else { 3 }),
                m.how.to_string(),
            ]
        }
    };
    let [a, b, c, d] = start;
    let [e, f, g, h, i] = rest;
    (line(&[a, b, c, d, e, f, g, h, i]), value)
}

fn device_name(device: &Device) -> String {
    match device {
        Device::Cuda(d) => d.name().unwrap_or_else(|_| "a GPU".into()),
        _ => format!("the CPU, {} threads", std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn one(args: &Args, device: &Device) -> Job {
    let kernel = args.kernel;
    let (cpu, values) = if device.is_cpu() { (true, 1 << 24) } else { (false, 1 << 28) };
    let attention = matches!(kernel, Kernel::Attention | Kernel::AttentionBackward);
    let cayley = matches!(kernel, Kernel::Cayley | Kernel::CayleyAudit);
    let n = args.n.unwrap_or(match cpu {
        true if attention || cayley => 512,
        true if matches!(kernel, Kernel::GptqLayer | Kernel::GptqModel) => 256,
        false if attention => 2048,
        _ => 4096,
    });
    let rows = args.rows.unwrap_or(match kernel {
        _ if attention => {
            if cpu {
                1
            } else {
                16
            }
        }
        _ if cayley => 1,
        Kernel::GptqLayer | Kernel::GptqModel => {
            if cpu {
                2048
            } else {
                128 * 2048
            }
        }
        Kernel::ClipSearch => {
            if cpu {
                256
            } else {
                4096
            }
        }
        Kernel::Gemm => {
            if cpu {
                512
            } else {
                16384
            }
        }
        // Whole sequences of 2048 for the rotary embedding.
        _ => (values / n).next_multiple_of(if values / n > 2048 { 2048 } else { 1 }).max(1),
    });
    let dtype = args.dtype.unwrap_or(if cpu || cayley { DType::F32 } else { DType::BF16 });
    Job { kernel, n, rows, dtype }
}

/// What is recorded: every kernel at the sizes of models.
fn table(device: &Device) -> Vec<Job> {
    use DType::{BF16, F16, F32};
    use Kernel::*;
    let job = |kernel, n, rows, dtype| Job { kernel, n, rows, dtype };
    if device.is_cpu() {
        let values = 1 << 24;
        let by_rows = [Copy, Hadamard, FakeQuant, HadamardFakeQuant, RmsNorm, RmsNormBackward, Swiglu, SwigluBackward];
        let mut jobs = vec![];
        for kernel in by_rows {
            jobs.extend([4096, 11008].map(|n| job(kernel, n, values / n, F32)));
        }
        jobs.extend([Rope, RopeBackward].map(|k| job(k, 4096, values / 4096, F32)));
        jobs.extend([Add, Embedding].map(|k| job(k, 4096, values / 4096, F32)));
        jobs.push(job(CrossEntropy, 32000, values / 32000, F32));
        jobs.push(job(ClipSearch, 4096, 64, F32));
        jobs.extend([Attention, AttentionBackward].map(|k| job(k, 512, 1, F32)));
        jobs.extend([Cayley, CayleyAudit].map(|k| job(k, 384, 1, F32)));
        jobs.push(job(Gemm, 1024, 1024, F32));
        jobs.push(job(GptqLayer, 256, 2048, F32));
        return jobs;
    }
    let values = 1 << 28;
    // The slow checks last.
    let mut jobs = vec![job(Copy, 4096, values / 4096, BF16), job(Copy, 4096, values / 4096, F32)];
    for n in (6..16).map(|m| 1 << m) {
        jobs.extend([F16, BF16, F32].map(|t| job(Hadamard, n, values / n, t)));
    }
    for n in [5120, 6144, 8960, 11008, 13824, 14336, 18944, 28672] {
        jobs.extend([F16, BF16, F32].map(|t| job(Hadamard, n, 16384, t)));
    }
    jobs.extend([4096, 8192, 11008, 14336, 28672].map(|n| job(FakeQuant, n, values / n, BF16)));
    jobs.extend([F16, F32].map(|t| job(FakeQuant, 4096, values / 4096, t)));
    jobs.extend([4096, 8192, 11008, 14336, 28672].map(|n| job(HadamardFakeQuant, n, values / n, BF16)));
    for kernel in [Hadamard, FakeQuant, HadamardFakeQuant] {
        for n in [4096, 11008] {
            jobs.extend([1, 8, 64].map(|rows| job(kernel, n, rows, BF16)));
        }
    }
    for (kernel, n) in [(RmsNorm, 4096), (RmsNormBackward, 4096), (Rope, 4096), (RopeBackward, 4096)] {
        jobs.extend([BF16, F32].map(|t| job(kernel, n, 16384, t)));
    }
    for kernel in [Swiglu, SwigluBackward] {
        jobs.extend([BF16, F32].map(|t| job(kernel, 11008, 16384, t)));
    }
    for (kernel, n, rows) in
        [(Add, 4096, 16384), (Embedding, 4096, 16384), (CrossEntropy, 32000, 8192), (CrossEntropy, 128256, 2048)]
    {
        jobs.extend([BF16, F32].map(|t| job(kernel, n, rows, t)));
    }
    jobs.push(job(ClipSearch, 4096, 4096, BF16));
    jobs.extend([job(Gemm, 8192, 8192, BF16), job(Gemm, 4096, 16384, BF16), job(Gemm, 4096, 4096, F32)]);
    jobs.extend([Cayley, CayleyAudit].map(|k| job(k, 4096, 1, F32)));
    jobs.extend([Attention, AttentionBackward].map(|k| job(k, 2048, 16, BF16)));
    jobs.push(job(GptqLayer, 4096, 128 * 2048, BF16));
    jobs
}
