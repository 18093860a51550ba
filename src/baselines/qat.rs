//! LLM-QAT: weights trained through their quantisers, on text that the model generated.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Trained;
use super::train::{Course, hidden, wide};
use crate::data::{Sampler, Windows};
use crate::device::Card;
use crate::generate::{Sampling, generate};
use crate::learn::Watch;
use crate::llama::{Affine, Linear, Linears, Llama, LlamaConfig, Merged, Plan, RotatedWeights};
use crate::memory::{self, Needs, Work};
use crate::objective::{Kl, Objective, Predictions};
use crate::optim::Schedule;
use crate::quant::Scheme;
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// How weights are trained.
#[derive(Clone, Copy, Debug)]
pub struct QatOptions {
    /// Windows that the model writes.
    pub windows: usize,
    /// Tokens of each, at most the model's context.
    pub seq: usize,
    /// Optimiser steps, and windows of each.
    pub steps: usize,
    /// Windows a step.
    pub batch: usize,
    /// Adam's learning rate of the first step.
    pub rate: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Decides the text and the order of its windows.
    pub seed: u64,
}

impl Default for QatOptions {
    /// The rate and the schedule of the paper, for as many steps and windows a step as rotations are learned in.
    fn default() -> Self {
        Self { windows: 16, seq: 2048, steps: 100, batch: 8, rate: 2e-5, schedule: Schedule::Cosine, seed: 0 }
    }
}

/// Text that a network writes, in windows of `seq` tokens. As in the paper, every text begins with a random token, goes on with the likeliest
/// one three to five times, and is drawn at temperature 1 from there on. A text that ends is followed by another in the same window.
///
/// # Errors
/// No windows; `seq` below 2 or beyond the model's context; a logit that is NaN; [`Error::Interrupted`].
pub fn generated_text(model: &Merged, windows: usize, seq: usize, seed: u64, watch: &mut dyn Watch) -> Result<Windows> {
    let config = &model.config;
    if windows == 0 || seq < 2 || seq > config.max_position_embeddings {
        let most = config.max_position_embeddings;
        let message = format!("expected at least one window of 2 to {most} tokens, got {windows} of {seq}");
        return Err(Error::argument("generated text", message));
    }
    let (mut random, mut all) = (ChaCha8Rng::seed_from_u64(seed), Vec::with_capacity(windows * seq));
    random.set_stream(u64::MAX); // apart from the draws of every text
    watch.begin("tokens generated", windows * seq);
    let (mut texts, ends) = (0u64, &config.eos_token_ids);
    for window in 1..=windows {
        while all.len() < window * seq {
            let start = all.len();
            let first = (random.random::<f64>() * config.vocab_size as f64) as u32;
            let greedy = 3 + (random.random::<f64>() * 3.0) as usize;
            all.push(first);
            let sampling = Sampling { temperature: 1.0, seed: seed.wrapping_add(texts), ..Sampling::GREEDY };
            for (most, sampling) in [(greedy, Sampling::GREEDY), (usize::MAX, sampling)] {
                let (prompt, room) = (all[start..].to_vec(), window * seq - all.len());
                let count = most.min(room);
                let made = generate(model, &prompt, count, &sampling, ends, |token| {
                    all.push(token);
                    Ok(watch.at(all.len()))
                })?;
                if made < count {
                    break; // the text has ended
                }
            }
            texts += 1;
        }
    }
    Windows::new(all, seq)
}

/// Trains the weights of all seven linears of every layer, straight through the quantisers of a scheme without rotations, to the predictions of
/// the same model in full precision ([`Kl`]) on [`generated_text`]. What a scheme does not quantise (the embedding, the head, gains and biases)
/// stays as it is. `plain` is the model as its files have it ([`Llama::load_plain`]).
///
/// A window goes through the network at a time and every layer keeps its values, so that this is for models that fit ([`qat_bytes`]).
///
/// # Errors
/// Those of [`generated_text`]; fewer windows than a batch; a GPU without so much memory: says how much is needed; those of training;
/// [`Error::Interrupted`].
pub fn llm_qat(plain: &Llama, scheme: &Scheme, options: &QatOptions, watch: &mut dyn Watch) -> Result<Trained> {
    let QatOptions { windows, seq, steps, batch, rate, schedule, seed } = *options;
    let (sampler, scheme) = (Sampler::new((0..windows).collect(), batch, seed)?, scheme.unrotated());
    if let Some(card) = plain.device().card()? {
        let (needed, free) = (qat_bytes(&plain.config, &scheme, seq, plain.dtype())?, card.free + plain.bytes());
        if needed > free {
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            let message = format!("training all weights needs {:.1} GiB, {:.1} GiB are free", gib(needed), gib(free));
            return Err(Error::device("llm-qat", message));
        }
    }
    let full = plain.merge_exact(None, &Scheme::FULL_PRECISION)?;
    let text = generated_text(&full, windows, seq, seed, watch)?;
    let course =
        Course { what: "llm-qat", windows: &text, sampler, steps, rate, schedule, device: plain.device(), dtype: plain.dtype() };
    let run = Arc::new(plain.run(&scheme, seq)?);
    let weight = run.sites.weight;
    let begin = plain.blocks.iter().flat_map(|b| b.weights.iter().map(|(_, l)| &l.weight));
    let begin: Vec<Tensor> = begin.map(|w| w.to_device(&Device::Cpu)?.to_dtype(wide(w.dtype()))).collect::<Result<_>>()?;
    let (weights, training, losses) = course.train(
        begin,
        &|tape, vars, tokens| {
            let teacher = Some(full.logits(tokens, seq)?);
            let hidden = hidden(plain, tape, tokens, &run, |l| {
                let frozen = RotatedWeights::constants(tape, &plain.blocks[l].weights);
                let quantized = |linear: Linear| {
                    let Affine { bias, norm, .. } = frozen.linears[linear].clone();
                    let w = vars[7 * l + linear as usize].clone().fake_quant(&weight)?;
                    Ok(Affine { weight: w, bias, norm })
                };
                Ok(RotatedWeights { linears: Linears::try_from_fn(quantized)?, ..frozen })
            })?;
            Kl.of_predictions(&Predictions { hidden, head: tape.constant(plain.head.clone()), tokens, seq, teacher })
        },
        watch,
    )?;
    let mut network = plain.merge_exact(None, &scheme)?;
    let tape = Tape::new();
    for (l, block) in network.blocks.iter_mut().enumerate() {
        let trained = |linear: Linear, old: &Tensor| {
            let w = weights[7 * l + linear as usize].to_dtype(old.dtype())?.to_device(&old.device())?;
            Ok(tape.constant(w).fake_quant(&weight)?.into_value())
        };
        *block = block.with_weights(block.weights.map_weights(trained)?);
    }
    Ok(Trained { network, training, losses })
}

/// Bytes of a device that [`llm_qat`] needs with windows of `seq` tokens, the model's own among them: a step of one window that keeps all
/// values, and of every trained weight a copy and its gradients, summed in `f32`. Adam's part is on the host.
///
/// # Errors
/// Sizes whose bytes a machine word cannot count.
pub fn qat_bytes(config: &LlamaConfig, scheme: &Scheme, seq: usize, dtype: DType) -> Result<usize> {
    let work = Work { needs: Needs::Logits, ..Work::new(*scheme, 1, seq, dtype) };
    let step = memory::predict(config, &work, Plan::KEEP_ALL, 1, &Card::h100())?.bytes();
    let trained: usize = Linear::ALL.map(|l| l.shape(config).into_iter().product::<usize>()).iter().sum();
    Ok(step + config.layers * trained * (2 * dtype.size() + wide(dtype).size()))
}
