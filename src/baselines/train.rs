//! Ordinary parameters of a network, trained by Adam.

use std::sync::Arc;
use std::time::Instant;

use super::Training;
use crate::data::{Sampler, Windows};
use crate::learn::Watch;
use crate::llama::{Llama, RotatedWeights, Run};
use crate::optim::{Adam, Optimizer, Schedule};
use crate::{DType, Device, Error, Result, Tape, Tensor, Var};

/// How parameters are trained.
pub(super) struct Course<'a> {
    /// What a watch is told.
    pub what: &'a str,
    pub windows: &'a Windows,
    /// Which windows a step reads.
    pub sampler: Sampler,
    pub steps: usize,
    /// Adam's rate of the first step, and how it falls.
    pub rate: f64,
    pub schedule: Schedule,
    /// Where and in which type parameters enter the tape; Adam keeps them on the CPU in `f32`, or `f64`.
    pub device: Device,
    pub dtype: DType,
}

/// The loss of one window, from parameters on a tape and its tokens.
pub(super) type Loss<'a> = dyn for<'t> Fn(&'t Tape, &[Var<'t>], &[u32]) -> Result<Var<'t>> + 'a;

impl Course<'_> {
    /// Trains `params`, a window at a time: gradients of a step's windows are averaged in `f32`. Returns what they came to, and the losses of
    /// the first and the last step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: names the step; those of `loss`; [`Error::Interrupted`].
    pub fn train(
        &self,
        mut params: Vec<Tensor>,
        loss: &Loss<'_>,
        watch: &mut dyn Watch,
    ) -> Result<(Vec<Tensor>, Training, (f64, f64))> {
        let (mut adam, begun, mut losses, mut tokens) = (Adam::default(), Instant::now(), (f64::NAN, f64::NAN), 0);
        watch.begin(self.what, self.steps);
        for step in 0..self.steps {
            let failed = |e: Error| Error::numeric(format!("{}: step {}", self.what, step + 1), e);
            let indices = self.sampler.step(step);
            tokens += indices.len() * self.windows.seq_len();
            let (value, grads) = self.gradients(&params, &indices, loss).map_err(failed)?;
            adam.step(&mut params, grads, self.schedule.at(step, self.steps, self.rate)).map_err(failed)?;
            losses = (if step == 0 { value } else { losses.0 }, value);
            if watch.at(step + 1).is_break() && step + 1 < self.steps {
                return Err(Error::Interrupted { step: step + 1 });
            }
        }
        let training = Training { tokens, steps: self.steps, seconds: begun.elapsed().as_secs_f64() };
        Ok((params, training, losses))
    }

    /// Mean loss of windows and its gradients, on the CPU in the type of the parameters.
    fn gradients(&self, params: &[Tensor], indices: &[usize], loss: &Loss<'_>) -> Result<(f64, Vec<Tensor>)> {
        let on_device: Vec<Tensor> =
            params.iter().map(|p| p.to_dtype(self.dtype)?.to_device(&self.device)).collect::<Result<_>>()?;
        let (mut mean, mut sums): (f64, Vec<Option<Tensor>>) = (0.0, params.iter().map(|_| None).collect());
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        for &i in indices {
            let tape = Tape::new();
            let vars: Vec<Var<'_>> = on_device.iter().map(|p| tape.variable(p.clone())).collect();
            let loss = loss(&tape, &vars, self.windows.get(i))?.scale(1.0 / indices.len() as f64)?;
            mean += loss.value().item()?;
            if !mean.is_finite() {
                return Err(Error::numeric("loss", format!("is {mean}")));
            }
            let mut grads = tape.backward(loss)?;
            for (sum, var) in sums.iter_mut().zip(&vars) {
                let g = grads.take(var)?.to_dtype(wide)?;
                *sum = Some(match sum.take() {
                    Some(sum) => Tensor::axpby(1.0, sum, 1.0, g)?,
                    None => g,
                });
            }
        }
        let host = |(sum, p): (Option<Tensor>, &Tensor)| {
            let none = || Error::argument("train", "a step without windows");
            sum.ok_or_else(none)?.to_device(&Device::Cpu)?.to_dtype(p.dtype())
        };
        Ok((mean, sums.into_iter().zip(params).map(host).collect::<Result<_>>()?))
    }
}

/// What the head of an unrotated network reads before its last norm's gain, `[tokens, C]`, with the weights of every layer.
///
/// # Errors
/// Those of the operations.
pub(super) fn hidden<'t>(
    model: &Llama,
    tape: &'t Tape,
    tokens: &[u32],
    run: &Arc<Run>,
    mut weights: impl FnMut(usize) -> Result<RotatedWeights<'t>>,
) -> Result<Var<'t>> {
    let mut x = tape.constant(model.embedding.clone()).embedding(tokens.into())?;
    for (l, block) in model.blocks.iter().enumerate() {
        x = block.forward(x, weights(l)?, run)?;
    }
    x.rms_norm(model.config.rms_norm_eps)
}

/// The type that Adam keeps parameters of a model in.
pub(super) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
