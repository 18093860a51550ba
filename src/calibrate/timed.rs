//! What the benches time here: GPTQ of LLaMA layers. Of each: the rotation of its weights, the calibration text through it, four
//! Hessians, their factors, seven sweeps.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use super::{Calibration, LayerReport, quantize_layers};
use crate::grid::{Clip, QuantSpec};
use crate::llama::{LlamaConfig, Rotated, synthetic};
use crate::ops::{At, Call, Case, Place, Run, repeated};
use crate::quant::{Gptq, Hessian, Scheme, WeightQuantizer};
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tensor};

const SIZES: &[At] = &[(Place::Cpu, 256, 2048, &[DType::F32]), (Place::Gpu, 4096, 128 * 2048, &[DType::BF16])];
/// Timed only where it is named.
const MODEL_SIZES: &[At] = &[(Place::Cpu, 256, 2048, &[]), (Place::Gpu, 4096, 128 * 2048, &[])];
const SEQ: usize = 2048;
/// The linear whose sweep is checked: rows and columns.
const SMALL: (usize, usize) = (64, 256);

/// The timed cases of this module.
pub fn cases() -> Vec<Case> {
    [Case::table(layer, SIZES), Case::table(model, MODEL_SIZES)].concat()
}

/// The middle one of three layers: the first one's time includes opening libraries, the last one feeds no other.
fn layer(n: usize, tokens: usize) -> Case {
    let about = "GPTQ of a LLaMA layer of width n, rotated, on so many tokens of text: seven linears";
    case(("gptq", "gptq-layer", about), n, tokens, 3, 1)
}

fn model(n: usize, tokens: usize) -> Case {
    let about = "The same for a model of 32 such layers: everything but reading and writing files";
    case(("gptq", "gptq-model", about), n, tokens, 32, 32)
}

fn case(what: (&'static str, &'static str, &'static str), n: usize, tokens: usize, layers: usize, timed: usize) -> Case {
    let what_is_timed = if timed == 1 { "one layer of three" } else { "32 layers, once" };
    let milliseconds = move |dtype, device: &Device| milliseconds(n, tokens, layers, timed, dtype, device);
    let run = Run::Whole(Arc::new(sweep), Arc::new(milliseconds), what_is_timed);
    let (width, mlp, t) = (n as f64, n as f64 / 16.0 * 43.0, tokens as f64);
    let weights = 4.0 * width * width + 3.0 * width * mlp;
    // Hessians and the pass through the layer; the rest is small beside them.
    let flops = 2.0 * t * (3.0 * width * width + mlp * mlp) + 2.0 * t * weights;
    Case::timed(what, (n, tokens), vec![], run, check)
        .computes(timed as f64 * flops)
        .holds(2.0 * layers as f64 * weights + 3.0 * t * width + 128e3 * width)
        .drawn(|dtype, device| {
            Ok(vec![repeated([1024, SMALL.1], 7, dtype, device)?, repeated([SMALL.0, SMALL.1], 8, dtype, device)?])
        })
}

/// GPTQ of one small linear, for the check: codes, and the loss.
fn quantized(x: &[Tensor], device: &Device) -> Result<(Vec<i16>, f64)> {
    let mut h = Hessian::new(SMALL.1);
    h.add(&x[0])?;
    let spec = QuantSpec::weight(4, true).clipped(Clip::Search);
    let w = x[1].to_device(device)?;
    let mut quantized = Gptq::default().quantize(&[&w], &spec, Some(&h.finish(1)?.into()))?;
    let missing = || Error::numeric("wrong answer", "GPTQ gave no codes");
    let one = quantized.pop().ok_or_else(missing)?;
    Ok((one.codes.ok_or_else(missing)?.codes, one.loss.unwrap_or(f64::NAN)))
}

fn sweep(x: &[Tensor]) -> Result<Call> {
    let x = x.to_vec();
    Ok(Call::new(move || {
        let (codes, loss) = quantized(&x, &x[1].device())?;
        let codes = codes.into_iter().map(f64::from).collect();
        Ok(vec![Tensor::from_vec(codes, [SMALL.0, SMALL.1])?, Tensor::scalar(loss)])
    }))
}

/// A GPU's sweep against the CPU's: few rows may differ (a rounding that crosses a tie moves the rest of its row), and the losses
/// agree. The CPU repeats itself to the bit.
fn check(x: &[Tensor], results: &[Tensor]) -> Result<()> {
    let (want, loss) = quantized(x, &Device::Cpu)?;
    let got = results[0].to_f64_vec()?;
    let differ = |(a, b): &(&[f64], &[i16])| a.iter().zip(*b).any(|(a, b)| *a != f64::from(*b));
    let moved = got.chunks(SMALL.1).zip(want.chunks(SMALL.1)).filter(differ).count();
    let ratio = results[1].item()? / loss;
    let (rows, slack) = if x[1].device().is_cpu() { (0, 0.0) } else { (SMALL.0 / 5, 0.01) };
    if got.len() != want.len() || moved > rows || !((ratio - 1.0).abs() <= slack) {
        let message = format!("GPTQ: {moved} of {} rows differ, the loss is {ratio} times the CPU's", SMALL.0);
        return Err(Error::numeric("wrong answer", message));
    }
    Ok(())
}

/// A LLaMA's shapes at this width: heads of 128 (64, 32, 16 where that does not divide it), an MLP of 43/16 of it.
fn config(n: usize, layers: usize) -> Result<LlamaConfig> {
    let head_dim = [128, 64, 32, 16].into_iter().find(|d| n.is_multiple_of(*d));
    let head_dim = head_dim.ok_or_else(|| Error::argument("--n", format!("expected a multiple of 16, got {n}")))?;
    let (intermediate_size, heads) = (n / 16 * 43, n / head_dim);
    let llama = synthetic::shape("llama-2-7b")?;
    Ok(LlamaConfig { hidden_size: n, intermediate_size, layers, heads, kv_heads: heads, head_dim, ..llama })
}

fn milliseconds(n: usize, tokens: usize, layers: usize, timed: usize, dtype: DType, device: &Device) -> Result<f64> {
    let seq = SEQ.min(tokens);
    let windows = tokens / seq;
    let config = config(n, layers)?;
    let model = synthetic::model(&config, 1, dtype, device)?;
    let text = synthetic::text(&config, windows, seq, 1)?;
    let calibration = Calibration::first(&text, windows)?;
    let rotations = Rotations::random_hadamard(n, config.head_dim, layers, 1)?;
    let start = Instant::now();
    let rotated = Rotated::new(&model, Some(&rotations), &Scheme::new(4, 4, 4))?;
    let mut middle = f64::NAN;
    let mut merged = vec![];
    let watch = |report: &LayerReport| {
        if report.done == 2 {
            middle = report.seconds;
        }
        ControlFlow::Continue(())
    };
    quantize_layers(&rotated, &Gptq::default(), Some(&calibration), &mut (), watch, |block| merged.push(block))?;
    drop((rotated.embedding()?, rotated.head()?));
    if merged.len() != layers {
        return Err(Error::numeric("bench", format!("{} layers of {layers}", merged.len())));
    }
    Ok(1e3 * if timed == 1 { middle } else { start.elapsed().as_secs_f64() })
}
