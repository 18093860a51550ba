//! Scores on windows that are not learned on.

use std::sync::Arc;

use super::Faithful;
use crate::data::Windows;
use crate::eval::fidelity::Fidelity;
use crate::llama::{Llama, Recompute, RotationVars};
use crate::quant::{Online, Scheme};
use crate::ranks::Group;
use crate::rotation::Rotations;
use crate::{Result, Tape};

/// Mean cross entropy of the network being learned on fixed windows.
///
/// # Errors
/// Those of [`Llama::loss`](crate::llama::Llama::loss).
pub fn held_out_loss(
    model: &Llama,
    windows: &Windows,
    held_out: &[usize],
    rotations: &Rotations,
    scheme: &Scheme,
    at_once: usize,
) -> Result<f64> {
    let set = Set { model, windows, held_out, scheme, at_once, ranks: &Group::alone() };
    Ok(set.loss(rotations, &|| false)?.unwrap_or(f64::NAN))
}

/// Windows to score on, so many at once, and the ranks that share them.
pub(super) struct Set<'a> {
    pub model: &'a Llama,
    pub windows: &'a Windows,
    pub held_out: &'a [usize],
    pub scheme: &'a Scheme,
    pub at_once: usize,
    pub ranks: &'a Group,
}

impl Set<'_> {
    /// This rank's windows.
    fn share(&self) -> &[usize] {
        &self.held_out[self.ranks.share(self.held_out.len())]
    }

    /// Mean cross entropy, or none where it was stopped, at whichever rank.
    pub fn loss(&self, rotations: &Rotations, stopped: &dyn Fn() -> bool) -> Result<Option<f64>> {
        if self.held_out.is_empty() {
            return Ok(Some(f64::NAN));
        }
        // The sum, and how many ranks were stopped.
        let mut found = [0.0, 0.0];
        for part in self.share().chunks(self.at_once) {
            if stopped() {
                found[1] = 1.0;
                break;
            }
            let tape = Tape::new();
            let vars = RotationVars::constants(&tape, rotations)?;
            let tokens = self.windows.batch(part);
            let loss = self.model.loss(&vars, &tokens, self.windows.seq_len(), self.scheme, Recompute::None)?;
            found[0] += loss.value().item()? * part.len() as f64;
        }
        self.ranks.sum("held-out losses", &mut found)?;
        Ok((found[1] == 0.0).then_some(found[0] / self.held_out.len() as f64))
    }

    /// Fidelity to the model in full precision, or none where it was stopped, at whichever rank.
    pub fn fidelity(&self, rotations: &Rotations, stopped: &dyn Fn() -> bool) -> Result<Option<Faithful>> {
        if self.held_out.is_empty() {
            return Ok(Some(Faithful::UNKNOWN));
        }
        let (model, seq) = (self.model, self.windows.seq_len());
        let full = model.merge_exact(None, &Scheme::FULL_PRECISION.online(Online::NONE))?;
        let (mut found, mut here) = (Fidelity::default(), false);
        for part in self.share().chunks(self.at_once) {
            here = stopped();
            if here {
                break;
            }
            let (tape, tokens) = (Tape::new(), self.windows.batch(part));
            let run = Arc::new(model.run(self.scheme, seq)?);
            let x = model.hidden(&RotationVars::constants(&tape, rotations)?, &tokens, run, Recompute::None)?.into_value();
            found.add((&x, &model.head), (&full.last_hidden(&tokens, seq)?, &full.head), seq)?;
        }
        if self.ranks.any("whether scoring was stopped", here)? {
            return Ok(None);
        }
        let found = found.gathered(self.ranks)?;
        Ok(Some(Faithful { divergence: found.divergence().mean, agreement: found.agreement().mean }))
    }
}
