//! GPTQ of LLaMA layers: for each, the rotation of its weights, the calibration text through it, four Hessians, their factors,
//! seven sweeps.

use std::ops::ControlFlow;
use std::time::Instant;

use spinquant::calibrate::{Calibration, quantize_layers};
use spinquant::llama::{LlamaConfig, Rotated, synthetic};
use spinquant::quant::{Clip, Gptq, Hessian, QuantSpec, Scheme, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::{Device, Error, Result, Tensor};

use super::run::random;
use super::{Job, Kernel, Measured};

const SEQ: usize = 2048;

/// A LLaMA's shapes at this width: heads of 128 (64, 32, 16 where that does not divide it), an MLP of 43/16 of it.
fn config(n: usize, layers: usize) -> Result<LlamaConfig> {
    let head_dim = [128, 64, 32, 16].into_iter().find(|d| n.is_multiple_of(*d));
    let head_dim = head_dim.ok_or_else(|| Error::argument("--n", format!("expected a multiple of 16, got {n}")))?;
    let (intermediate_size, heads) = (n / 16 * 43, n / head_dim);
    let llama = synthetic::shape("llama-2-7b")?;
    Ok(LlamaConfig { hidden_size: n, intermediate_size, layers, heads, kv_heads: heads, head_dim, ..llama })
}

/// The middle one of three layers (the first one's time includes opening libraries, the last one feeds no other), or 32 layers with
/// embedding and head.
pub fn run(job: &Job, device: &Device) -> Result<Measured> {
    check(job, device)?;
    let seq = SEQ.min(job.rows);
    let (n, tokens) = (job.n, job.rows / seq * seq);
    let count = if job.kernel == Kernel::GptqModel { 32 } else { 3 };
    let config = config(n, count)?;
    let model = synthetic::model(&config, 1, job.dtype, device)?;
    let text = synthetic::text(&config, tokens / seq, seq, 1)?;
    let calibration = Calibration::first(&text, tokens / seq)?;
    let rotations = Rotations::random_hadamard(n, config.head_dim, count, 1)?;
    let start = Instant::now();
    let rotated = Rotated::new(&model, Some(&rotations), &Scheme::new(4, 4, 4))?;
    let mut seconds = f64::NAN;
    let mut merged = vec![];
    let watch = |report: &spinquant::calibrate::LayerReport| {
        if report.done == 2 {
            seconds = report.seconds;
        }
        ControlFlow::Continue(())
    };
    quantize_layers(&rotated, &Gptq::default(), Some(&calibration), &mut (), watch, |block| merged.push(block))?;
    let tables = (rotated.embedding()?, rotated.head()?);
    if merged.len() != count {
        return Err(Error::numeric("bench", format!("{} layers of {count}", merged.len())));
    }
    drop(tables);
    // Hessians and the pass through the layer; the rest is small beside them.
    let (c, f, t) = (n as f64, config.intermediate_size as f64, tokens as f64);
    let flops = 2.0 * t * (3.0 * c * c + f * f) + 2.0 * t * (4.0 * c * c + 3.0 * c * f);
    if count == 3 {
        return Ok(Measured { ms: seconds * 1e3, how: "one layer of three", bytes: 0.0, flops, copy: None });
    }
    let (ms, flops) = (start.elapsed().as_secs_f64() * 1e3, count as f64 * flops);
    Ok(Measured { ms, how: "32 layers, once", bytes: 0.0, flops, copy: None })
}

/// The GPU's sweep against the CPU's on one small linear: few rows may differ (a rounding that crosses a tie moves the rest of its
/// row), and the losses agree.
fn check(job: &Job, device: &Device) -> Result<()> {
    let (rows, n) = (64, 256);
    let x = random([1024, n], 7, job.dtype, device)?;
    let mut h = Hessian::new(n);
    h.add(&x)?;
    let h = h.finish(1)?;
    let w = random([rows, n], 8, job.dtype, device)?;
    let spec = QuantSpec::weight(4, true).clipped(Clip::Search);
    let one = |w: &Tensor| Ok::<_, Error>(Gptq::default().quantize(&[w], &spec, Some(&h))?.remove(0));
    let (ours, want) = (one(&w)?, one(&w.to_device(&Device::Cpu)?)?);
    let missing = || Error::numeric("wrong answer", "GPTQ gave no codes");
    let codes = [&ours, &want].map(|q| q.codes.as_ref().map(|c| c.codes.clone()).ok_or_else(missing));
    let [a, b] = codes;
    let moved = a?.chunks(n).zip(b?.chunks(n)).filter(|(a, b)| a != b).count();
    let ratio = ours.loss.unwrap_or(f64::NAN) / want.loss.unwrap_or(f64::NAN);
    if moved * 5 > rows || !((ratio - 1.0).abs() <= 0.01) {
        return Err(Error::numeric(
            "wrong answer",
            format!("GPTQ: {moved} of {rows} rows differ, the loss is {ratio} times the CPU's"),
        ));
    }
    Ok(())
}
