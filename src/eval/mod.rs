//! Perplexity as the field reports it: the text as one stream of tokens, cut into windows of the context length, the mean of the
//! windows' mean negative log-likelihoods, exponentiated.
//!
//! Multiple choice: [`tasks`] reads questions, [`choices`] asks a model, [`marks`] counts, [`exam`] does all of that for several tasks.
//! [`fidelity`]: how far the network is from the model in full precision. [`scores`]: the log-probability of every token of a prompt.

pub mod answers;
pub mod choices;
pub mod exam;
pub mod fidelity;
pub mod marks;
pub mod scores;
pub mod tasks;

use std::ops::ControlFlow;

use crate::data::{self, Windows};
use crate::eval::fidelity::Fidelity;
use crate::llama::Merged;
use crate::ops::linear_cross_entropy::linear_token_losses;
use crate::{Device, Error, Result};

/// Tokens that go through the network at once on the CPU, and on a GPU.
const TOKENS_AT_ONCE: [usize; 2] = [4096, 16384];

fn tokens_at_once(device: &Device) -> usize {
    TOKENS_AT_ONCE[usize::from(!device.is_cpu())]
}

/// The outcome of [`perplexity`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// exp of the mean of per-window means.
    pub perplexity: f64,
    /// Windows read.
    pub windows: usize,
    /// Tokens in them.
    pub tokens: usize,
}

/// Perplexity of a model on windows of text; `progress` is told how many windows are done and may stop.
///
/// # Errors
/// Those of [`Merged::logits`]; [`Error::Numeric`] where a loss is not finite; [`Error::Interrupted`] with the number of windows
/// where `progress` breaks.
pub fn perplexity(model: &Merged, text: &Windows, progress: impl FnMut(usize) -> ControlFlow<()>) -> Result<Perplexity> {
    Ok(perplexity_beside(model, None, text, progress)?.0)
}

/// [`perplexity`] and, where `full` is given, [fidelity](mod@fidelity) to it: the same model in full precision. Every window goes through
/// either network once.
///
/// # Errors
/// Those of [`perplexity`] and of [`fidelity()`](fidelity::fidelity).
pub fn perplexity_beside(
    model: &Merged,
    full: Option<&Merged>,
    text: &Windows,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(Perplexity, Option<Fidelity>)> {
    let seq = text.seq_len();
    let batch = (tokens_at_once(&model.embedding.device()) / seq).max(1);
    let (mut total, mut fidelity) = (0.0, full.map(|_| Fidelity::default()));
    let all: Vec<usize> = (0..text.len()).collect();
    for (i, windows) in all.chunks(batch).enumerate() {
        let tokens = text.batch(windows);
        let x = model.last_hidden(&tokens, seq)?;
        let losses = linear_token_losses(&x, &model.head, &data::targets(&tokens, seq))?;
        // The last position of a window has no target and a loss of zero.
        total += losses.chunks(seq).map(|w| w.iter().sum::<f64>() / (seq - 1) as f64).sum::<f64>();
        if !total.is_finite() {
            return Err(Error::numeric("evaluation", format!("the loss is {total} in windows {windows:?}")));
        }
        if let (Some(found), Some(full)) = (&mut fidelity, full) {
            found.add((&x, &model.head), (&full.last_hidden(&tokens, seq)?, &full.head), seq)?;
            found.finite()?;
        }
        if progress(i * batch + windows.len()).is_break() {
            return Err(Error::Interrupted { step: i * batch + windows.len() });
        }
    }
    let perplexity = (total / text.len() as f64).exp();
    Ok((Perplexity { perplexity, windows: text.len(), tokens: text.len() * seq }, fidelity))
}
