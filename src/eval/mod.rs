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
use crate::ranks::Group;
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
    progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(Perplexity, Option<Fidelity>)> {
    perplexity_among(&Group::alone(), model, full, text, progress)
}

/// [`perplexity_beside`] with the windows shared by ranks, which all hold the networks and all get the scores: the same bits as one rank's,
/// unless there are more ranks than times that windows go through the network. `progress` is told how many windows are done, of those of all
/// ranks were they as fast as this one.
///
/// # Errors
/// Those of [`perplexity_beside`] and of [`Group::gather`].
pub fn perplexity_among(
    ranks: &Group,
    model: &Merged,
    full: Option<&Merged>,
    text: &Windows,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(Perplexity, Option<Fidelity>)> {
    let (seq, mut sums, mut fidelity) = (text.seq_len(), vec![], full.map(|_| Fidelity::default()));
    let scored = in_shares(ranks, &model.embedding.device(), text, &mut progress, |windows, tokens| {
        let x = model.last_hidden(tokens, seq)?;
        let losses = linear_token_losses(&x, &model.head, &data::targets(tokens, seq))?;
        // The last position of a window has no target and a loss of zero.
        let sum = losses.chunks(seq).map(|w| w.iter().sum::<f64>() / (seq - 1) as f64).sum::<f64>();
        if !sum.is_finite() {
            return Err(Error::numeric("evaluation", format!("the loss is {sum} in windows {windows:?}")));
        }
        sums.push(sum);
        if let (Some(found), Some(full)) = (&mut fidelity, full) {
            found.add((&x, &model.head), (&full.last_hidden(tokens, seq)?, &full.head), seq)?;
            found.finite()?;
        }
        Ok(())
    });
    scored.inspect_err(|e| ranks.fail(e))?;
    let total: f64 = ranks.gather_numbers("losses of windows", &sums)?.concat().iter().sum();
    let fidelity = fidelity.map(|found| found.gathered(ranks)).transpose()?;
    let perplexity = (total / text.len() as f64).exp();
    Ok((Perplexity { perplexity, windows: text.len(), tokens: text.len() * seq }, fidelity))
}

/// Gives `score` this rank's windows of a text with their tokens, as many at once as go through a network.
fn in_shares(
    ranks: &Group,
    device: &Device,
    text: &Windows,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    mut score: impl FnMut(&[usize], &[u32]) -> Result<()>,
) -> Result<()> {
    let at_once = (tokens_at_once(device) / text.seq_len()).max(1).min(ranks.largest_share(text.len()).max(1));
    let all: Vec<usize> = (0..text.len()).collect();
    let parts: Vec<&[usize]> = all.chunks(at_once).collect();
    let parts = &parts[ranks.share(parts.len())];
    let (mut done, share) = (0, parts.iter().map(|part| part.len()).sum::<usize>());
    for part in parts {
        score(part, &text.batch(part))?;
        done += part.len();
        let of_all = done * text.len() / share;
        if progress(of_all).is_break() {
            return Err(Error::Interrupted { step: of_all });
        }
    }
    Ok(())
}
