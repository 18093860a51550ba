//! Fidelity: how far a quantised network's predictions are from those of the model in full precision.
//!
//! Perplexity on a text rewards what suits the text: training nothing but the norm gains of a network that is not quantised lowers it.
//! The divergence from the full-precision model is zero for a quantisation that does no harm, and only for such a one.

use std::ops::ControlFlow;

use super::in_shares;
use super::marks::Mean;
use crate::data::Windows;
use crate::linalg::matmul;
use crate::llama::Merged;
use crate::ops::kl_divergence::token_divergences;
use crate::ops::linear_cross_entropy::rows_at_once;
use crate::ranks::Group;
use crate::{DType, Error, Result, Tensor};

/// What every window of a text says of a network, beside the model in full precision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fidelity {
    /// The mean over a window's tokens of KL(full precision ‖ network) of the next token's probabilities, in nats.
    pub divergence: Vec<f64>,
    /// The part of a window's tokens after which both networks find the same token likeliest.
    pub agreement: Vec<f64>,
}

impl Fidelity {
    /// KL(full precision ‖ network) in nats a token, with the standard error over windows.
    pub fn divergence(&self) -> Mean {
        Mean::of(&self.divergence)
    }

    /// The part of tokens with the same likeliest next token, with the standard error over windows.
    pub fn agreement(&self) -> Mean {
        Mean::of(&self.agreement)
    }

    /// Adds windows of `seq` tokens: of either network what its head reads, `[tokens, C]`, and the head.
    pub(crate) fn add(&mut self, network: (&Tensor, &Tensor), full: (&Tensor, &Tensor), seq: usize) -> Result<()> {
        let (divergences, agree) = compared(network, full)?;
        for (divergences, agree) in divergences.chunks(seq).zip(agree.chunks(seq)) {
            self.divergence.push(divergences.iter().sum::<f64>() / seq as f64);
            self.agreement.push(agree.iter().filter(|a| **a).count() as f64 / seq as f64);
        }
        Ok(())
    }

    /// Checks that every divergence is a number.
    pub(crate) fn finite(&self) -> Result<()> {
        match self.divergence.iter().position(|d| !d.is_finite()) {
            Some(window) => {
                let divergence = self.divergence[window];
                Err(Error::numeric("fidelity", format!("the divergence is {divergence} in window {window}")))
            }
            None => Ok(()),
        }
    }

    /// The windows of all ranks that share a text, in their order.
    pub(crate) fn gathered(&self, ranks: &Group) -> Result<Self> {
        let of = |what, values: &[f64]| Ok(ranks.gather_numbers(what, values)?.concat());
        Ok(Self { divergence: of("divergences", &self.divergence)?, agreement: of("agreements", &self.agreement)? })
    }

    /// Window by window, the mean of several networks' fidelities (of several seeds, say).
    ///
    /// # Errors
    /// No network; networks that read different numbers of windows.
    pub fn mean(all: &[Self]) -> Result<Self> {
        let first = all.first().ok_or_else(|| Error::argument("fidelity", "expected that of at least one network, got none"))?;
        let windows = first.divergence.len();
        if let Some(other) = all.iter().find(|f| f.divergence.len() != windows) {
            let message = format!("expected {windows} windows, got {}", other.divergence.len());
            return Err(Error::argument("fidelity", message));
        }
        let column = |of: fn(&Self) -> &Vec<f64>| {
            (0..windows).map(|w| all.iter().map(|f| of(f)[w]).sum::<f64>() / all.len() as f64).collect()
        };
        Ok(Self { divergence: column(|f| &f.divergence), agreement: column(|f| &f.agreement) })
    }

    /// Window by window, what this network has more than another one: [`divergence`](Self::divergence) and
    /// [`agreement`](Self::agreement) of it are paired differences.
    ///
    /// # Errors
    /// Networks that read different numbers of windows.
    pub fn minus(&self, other: &Self) -> Result<Self> {
        let (expected, got) = (self.divergence.len(), other.divergence.len());
        if expected != got {
            return Err(Error::argument("fidelity", format!("expected {expected} windows, got {got}")));
        }
        let less = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect();
        let divergence = less(&self.divergence, &other.divergence);
        Ok(Self { divergence, agreement: less(&self.agreement, &other.agreement) })
    }
}

/// Fidelity of a network to `full`, the same model in full precision, at every position of every window; `progress` is told how many
/// windows are done and may stop. Logits are made a few rows at a time, in `f32` where weights have 16 bits.
///
/// # Errors
/// Models of different vocabularies or on different devices; those of [`Merged::logits`]; [`Error::Numeric`] where a divergence is not
/// finite; [`Error::Interrupted`] with the number of windows where `progress` breaks.
pub fn fidelity(
    network: &Merged,
    full: &Merged,
    text: &Windows,
    progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Fidelity> {
    fidelity_among(&Group::alone(), network, full, text, progress)
}

/// [`fidelity`] with the windows shared by ranks, which all hold both networks and all get the result, as
/// [`perplexity_among`](super::perplexity_among) does it.
///
/// # Errors
/// Those of [`fidelity`] and of [`Group::gather`].
pub fn fidelity_among(
    ranks: &Group,
    network: &Merged,
    full: &Merged,
    text: &Windows,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Fidelity> {
    let (seq, mut found) = (text.seq_len(), Fidelity::default());
    let scored = in_shares(ranks, &network.embedding.device(), text, &mut progress, |_, tokens| {
        let (x, teacher) = (network.last_hidden(tokens, seq)?, full.last_hidden(tokens, seq)?);
        found.add((&x, &network.head), (&teacher, &full.head), seq)?;
        found.finite()
    });
    scored.inspect_err(|e| ranks.fail(e))?;
    found.gathered(ranks)
}

/// Row by row, the logits `x W_headᵀ` of a network beside those of another one.
fn compared((x, head): (&Tensor, &Tensor), (teacher, teacher_head): (&Tensor, &Tensor)) -> Result<(Vec<f64>, Vec<bool>)> {
    let rows = rows_at_once(head.rows());
    let wide = |t: &Tensor| if t.dtype().is_half() { DType::F32 } else { t.dtype() };
    let logits = |x: &Tensor, head: &Tensor, first: usize| {
        let part = x.slice(first, rows.min(x.rows() - first))?;
        matmul::product(&part, false, head, true, false, wide(head))
    };
    let (mut divergences, mut agree) = (vec![], vec![]);
    for first in (0..x.rows()).step_by(rows) {
        let (d, a) = token_divergences(&logits(x, head, first)?, &logits(teacher, teacher_head, first)?)?;
        divergences.extend(d);
        agree.extend(a);
    }
    Ok((divergences, agree))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo;
    use crate::quant::{Online, Scheme};
    use crate::rotation::Rotations;

    #[test]
    fn a_network_is_faithful_to_itself_and_the_less_the_fewer_bits_it_has() {
        let model = demo::model().unwrap();
        let text = demo::windows(&demo::TEST[..2_000], 64).unwrap();
        let full = model.merge_exact(None, &Scheme::FULL_PRECISION.online(Online::NONE)).unwrap();
        let of = |network: &Merged| fidelity(network, &full, &text, |_| ControlFlow::Continue(())).unwrap();
        let itself = of(&full);
        assert!(itself.divergence().mean.abs() < 1e-6 && itself.agreement().mean == 1.0);
        let c = &model.config;
        let rotations = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0).unwrap();
        let at = |bits| of(&model.merge(Some(&rotations), &Scheme::new(bits, bits, bits)).unwrap());
        let rotated = at(16);
        assert!(rotated.divergence().mean.abs() < 1e-5 && rotated.agreement().mean > 0.99);
        let (eight, four) = (at(8), at(4));
        assert!(eight.divergence().mean < 0.2 * four.divergence().mean);
        assert!(eight.agreement().mean > four.agreement().mean);
        let apart = four.minus(&eight).unwrap().divergence();
        assert!(apart.mean > 3.0 * apart.standard_error, "{apart:?}");
        let both = Fidelity::mean(&[eight.clone(), four.clone()]).unwrap();
        assert!((both.divergence[1] - (eight.divergence[1] + four.divergence[1]) / 2.0).abs() < 1e-15);
        // By the definition, from whole logits.
        let network = model.merge(Some(&rotations), &Scheme::new(4, 4, 4)).unwrap();
        let (x, t) = (network.logits(text.get(0), 64).unwrap(), full.logits(text.get(0), 64).unwrap());
        let want = token_divergences(&x, &t).unwrap().0.iter().sum::<f64>() / 64.0;
        assert!((four.divergence[0] - want).abs() < 1e-6 * want);
        assert!(Fidelity::mean(&[]).is_err() && Fidelity::default().minus(&four).is_err());
    }

    #[test]
    fn progress_may_stop() {
        let model = demo::model().unwrap();
        let text = demo::windows(&demo::TEST[..8_000], 64).unwrap();
        let full = model.merge_exact(None, &Scheme::FULL_PRECISION).unwrap();
        let stopped = fidelity(&full, &full, &text, |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(Error::Interrupted { step }) if step > 0));
    }
}
