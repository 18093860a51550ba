//! Where the time of learning steps goes.

use std::ops::ControlFlow;

use super::time::time;
use crate::data::Windows;
use crate::device::Card;
use crate::device::cuda::Phase;
use crate::learn::{LearnOptions, Settings, StepReport, learn};
use crate::linalg::matmul::product;
use crate::llama::Llama;
use crate::memory::{Planned, Work, predict};
use crate::optim::Optimizer;
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tensor};

/// The fewest steps of a profile: the first is not timed, the last is watched.
const FEWEST: usize = 3;

/// What learning steps took. The first step is not timed, since it allocates; the last is watched, which costs time.
#[derive(Clone, Debug)]
pub struct Steps {
    /// How a step ran.
    pub settings: Settings,
    /// Wall-clock seconds of every step but the last.
    pub seconds: Vec<f64>,
    /// Wall-clock seconds of the step under watch.
    pub watched: f64,
    /// What ran on the GPU in the step under watch, the longest first; nothing on the CPU.
    pub phases: Vec<Phase>,
    /// The objective before every step.
    pub losses: Vec<f64>,
    /// The most memory at once in bytes: of tensors on a GPU, of the process on the CPU, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Time and memory as [`predict`] has them; on the CPU, for an H100.
    pub predicted: Planned,
    /// Bytes of layers that the last step but one copied from main memory.
    pub copied_bytes: usize,
    /// max|RᵀR − I| over all rotations at the end.
    pub orthogonality_error: f64,
    /// Tokens of a step.
    pub tokens: usize,
}

impl Steps {
    /// Seconds of the steps that were timed.
    pub fn timed(&self) -> &[f64] {
        &self.seconds[1..]
    }

    /// The median of [`Steps::timed`].
    pub fn median(&self) -> f64 {
        let mut sorted = self.timed().to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    /// Milliseconds of the step under watch in which the GPU worked.
    pub fn busy_ms(&self) -> f64 {
        self.phases.iter().map(|phase| phase.ms).sum()
    }
}

/// Checks that there are steps enough to time; a program may do it before it loads anything.
///
/// # Errors
/// [`Error::Argument`]: fewer than 3 steps.
pub fn check(options: &LearnOptions) -> Result<()> {
    if options.steps < FEWEST {
        let message = format!("expected at least {FEWEST}: the first is not timed, and the last is watched");
        return Err(Error::argument("steps", format!("{message}, got {}", options.steps)));
    }
    Ok(())
}

/// Learns from random Hadamards and times every step; `told` hears of each.
///
/// # Errors
/// Those of [`check`], of settling the options, of learning and of predicting.
pub fn profile(
    model: &Llama,
    windows: &Windows,
    optimizer: &mut dyn Optimizer,
    options: &LearnOptions,
    mut told: impl FnMut(&StepReport),
) -> Result<Steps> {
    check(options)?;
    let (config, device) = (&model.config, model.device());
    let settings = options.settle(model, windows, optimizer)?;
    // The same while learning, where what is free may be a little less.
    let options =
        &LearnOptions { micro_batch: Some(settings.micro_batch), recompute: Some(settings.recompute), ..options.clone() };
    let card = device.card()?.unwrap_or_else(Card::h100);
    let work = Work { placement: Some(model.placement()), ..options.work(config, windows.seq_len(), model.dtype())? };
    let predicted = predict(config, &work, settings.recompute.plan(), settings.micro_batch, &card)?;
    let start = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0)?;
    let (mut seconds, mut losses, mut phases, mut copied) = (vec![], vec![], Ok(vec![]), vec![]);
    let learned = learn(model, windows, start, optimizer, options, |step| {
        losses.push(step.loss);
        seconds.push(step.seconds);
        copied.push(model.copied());
        told(step);
        if let Device::Cuda(gpu) = &device {
            if step.step + 1 == options.steps {
                gpu.start_profile();
            } else if step.step == options.steps {
                phases = gpu.stop_profile();
            }
        }
        ControlFlow::Continue(())
    })?;
    let layer = model.blocks.first().map_or(0, |b| b.weights.tensors().map(Tensor::bytes).sum());
    Ok(Steps {
        settings,
        watched: seconds.pop().unwrap_or(f64::NAN),
        seconds,
        phases: phases?,
        losses,
        peak_bytes: device.peak_bytes(),
        predicted,
        copied_bytes: (copied[copied.len() - 2] - copied[copied.len() - 3]) * layer,
        orthogonality_error: learned.orthogonality_error,
        tokens: options.batch * windows.seq_len(),
    })
}

/// What a GPU reaches, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes a second that a copy reads and writes.
    pub copy: f64,
    /// Additions and multiplications a second of a large bf16 product.
    pub product: f64,
}

/// The rates of a copy and of a large product on a GPU; `None` on the CPU.
///
/// # Errors
/// Failing calls of the driver, no memory for 1.2 GB of matrices.
pub fn ceilings(device: &Device) -> Result<Option<Ceilings>> {
    if device.is_cpu() {
        return Ok(None);
    }
    let n = 8192;
    let values: Vec<f32> = (0..n * n).map(|i: usize| (i.wrapping_mul(2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect();
    let x = Tensor::from_vec(values, [n, n])?.to_dtype(DType::BF16)?.to_device(device)?;
    let many = vec![x.clone(); 8];
    let best = |f: &dyn Fn() -> Result<Tensor>| -> Result<f64> {
        Ok(time(device, |watch| watch.time(|| f().map(drop)))?.percentile(0) / 1e3)
    };
    let copy = best(&|| Tensor::stack(&many))?;
    let gemm = best(&|| product(&x, false, &x, true, false, DType::BF16))?;
    Ok(Some(Ceilings { copy: 2.0 * (8 * x.bytes()) as f64 / copy, product: 2.0 * (n as f64).powi(3) / gemm }))
}
