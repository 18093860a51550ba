//! The control: what training on a text wins by adapting to it.

use std::sync::Arc;

use super::Trained;
use super::train::{Course, hidden, wide};
use crate::data::{Sampler, Windows, split_held_out};
use crate::learn::{LearnOptions, Watch};
use crate::llama::{Around, Llama, RotatedWeights};
use crate::memory::Needs;
use crate::objective::Predictions;
use crate::ops::log_scale::Along;
use crate::quant::{Online, Scheme};
use crate::{Device, Error, Result, Tape, Tensor};

/// The full-precision model with the gains of all its norms trained and nothing else, quantised nowhere: the objective, steps, batches and
/// windows of `options`, and Adam on logarithms at the rate of scales, as [`learn`](crate::learn::learn()) has them. Unlike scales,
/// gains alone change the function. The model's own gains may be folded into its weights; these stand beside them and begin at 1.
///
/// A window goes through the network at a time, and every layer keeps its values.
///
/// # Errors
/// An objective that does not depend on the network's predictions; a text too short for the batch; those of training;
/// [`Error::Interrupted`].
pub fn adapted(model: &Llama, text: &Windows, options: &LearnOptions, watch: &mut dyn Watch) -> Result<Trained> {
    let full = Scheme::FULL_PRECISION.online(Online::NONE);
    let (config, seq, objective) = (&model.config, text.seq_len(), &options.objective);
    let (layers, c) = (config.layers, config.hidden_size);
    if !objective.needs().of_predictions() {
        let message =
            format!("{} does not depend on the network's predictions, which are all that gains change", objective.name());
        return Err(Error::argument("adapted", message));
    }
    let (train, _) = split_held_out(text, options.held_out_of(text.len()), options.seed)?;
    let course = Course {
        what: "full precision, adapting gains",
        windows: text,
        sampler: Sampler::new(train, options.batch, options.seed)?,
        steps: options.steps,
        rate: options.scale_rate,
        schedule: options.schedule.unwrap_or_default(),
        device: model.device(),
        dtype: wide(model.dtype()),
    };
    let exact = model.merge_exact(None, &full)?;
    let run = Arc::new(model.run(&full, seq)?);
    // Logarithms of the reciprocals of gains: two norms a layer, and the last.
    let ones = (0..=2 * layers).map(|_| Tensor::zeros([c], course.dtype, &Device::Cpu)).collect::<Result<Vec<_>>>()?;
    let (gains, training, losses) = course.train(
        ones,
        &|tape, gains, tokens| {
            let teacher = if objective.needs() == Needs::Logits { Some(exact.logits(tokens, seq)?) } else { None };
            let x = hidden(model, tape, tokens, &run, |l| {
                let norms = [Some(gains[2 * l].clone()), Some(gains[2 * l + 1].clone())];
                let around = Around { norms, ..Around::default() };
                Ok(RotatedWeights { around, ..RotatedWeights::constants(tape, &model.blocks[l].weights) })
            })?;
            let hidden = x.log_scale(gains[2 * layers].clone(), Along::Columns, true)?;
            let head = tape.constant(model.head.clone());
            objective.of_predictions(&Predictions { hidden, head, tokens, seq, teacher })
        },
        watch,
    )?;
    let mut network = exact;
    for (l, block) in network.blocks.iter_mut().enumerate() {
        let gain = |which: usize| {
            let own = block.gains().map_or_else(|| Ok(vec![1.0; c]), |both| both[which].to_f64_vec())?;
            let gains = own.iter().zip(gains[2 * l + which].to_f64_vec()?).map(|(own, a)| own * (-a).exp()).collect::<Vec<_>>();
            Tensor::from_vec(gains, [c])?.to_dtype(model.dtype())?.to_device(&model.device())
        };
        *block = block.clone().with_gains([gain(0)?, gain(1)?]);
    }
    let tape = Tape::new();
    let last = tape.constant(gains[2 * layers].to_device(&model.device())?);
    network.head = tape.constant(network.head).log_scale(last, Along::Columns, true)?.into_value();
    Ok(Trained { network, training, losses })
}
