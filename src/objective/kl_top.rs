//! Divergence from the full-precision model over its likeliest tokens.

use std::sync::Arc;

use crate::llama::RotationVars;
use crate::memory::Needs;
use crate::objective::{Batch, Kl, Objective, Predictions, of_network};
use crate::ops::kl_top::Rest;
use crate::{Error, Result, Var};

/// Mean divergence, over all positions, of the fake-quantised network's next-token probabilities q from the full-precision model's p, over
/// the K tokens S that p finds likeliest; [`Rest`] says what becomes of the others, and [`kl_top`](crate::ops::kl_top) has the formulas:
///
/// * `kl-top`, [`Rest::Event`]: all others are one event. Both sides are whole distributions on K + 1 events, so that the loss is at least 0, at
///   most [`Kl`], and falls with K: what the network makes of unlikely tokens among themselves does not count.
/// * `kl-top-partial`, [`Rest::Partial`]: `Σ_S p (log p − log q)` with both softmaxes over the whole vocabulary. It can be negative.
/// * `kl-top-gathered`, [`Rest::Gathered`]: the divergence of softmaxes over S alone. Nothing is said of tokens outside S.
///
/// The last two are those of OSTQuant (arXiv 2501.13987). With K tokens or fewer in the vocabulary all three are [`Kl`]. Of tokens that are
/// equally likely, those with smaller ids come first.
#[derive(Clone, Copy, Debug)]
pub struct KlTop {
    /// K, at least 1.
    pub tokens: usize,
    /// What becomes of all other tokens.
    pub rest: Rest,
}

impl Default for KlTop {
    fn default() -> Self {
        Self { tokens: 1000, rest: Rest::Event }
    }
}

impl KlTop {
    /// The name of its kind, without K.
    fn kind(&self) -> &'static str {
        match self.rest {
            Rest::Event => "kl-top",
            Rest::Partial => "kl-top-partial",
            Rest::Gathered => "kl-top-gathered",
        }
    }
}

impl Objective for KlTop {
    fn name(&self) -> String {
        let kind = self.kind();
        if self.tokens == Self::default().tokens { kind.into() } else { format!("{kind}:{}", self.tokens) }
    }
    fn about(&self) -> String {
        let k = Self::default().tokens;
        match self.rest {
            Rest::Event => format!("kl over that model's {k} likeliest tokens (kl-top:K for K), the others as one"),
            Rest::Partial => "the sum over these tokens alone, softmaxes over all; also :K".into(),
            Rest::Gathered => "softmaxes over these tokens alone; also :K".into(),
        }
    }
    fn with(&self, constant: &str) -> Result<Arc<dyn Objective>> {
        match constant.parse() {
            Ok(tokens) if tokens > 0 => Ok(Arc::new(Self { tokens, ..*self })),
            _ => {
                let message = format!("expected {}:K with a number of tokens above 0, got {constant:?}", self.kind());
                Err(Error::argument("objective", message))
            }
        }
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        of_network(self, rotations, batch)
    }
    fn of_predictions<'t>(&self, predictions: &Predictions<'t, '_>) -> Result<Var<'t>> {
        let teacher = predictions.teacher()?;
        predictions.logits()?.kl_top(teacher, self.tokens, self.rest)
    }
    fn rate(&self) -> f64 {
        Kl.rate()
    }
    fn needs(&self) -> Needs {
        Needs::Logits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_is_a_number_of_tokens() {
        for rest in [Rest::Event, Rest::Partial, Rest::Gathered] {
            let one = KlTop { rest, ..KlTop::default() };
            assert_eq!(one.with("50").unwrap().name(), format!("{}:50", one.kind()));
            assert_eq!(one.with("1000").unwrap().name(), one.kind());
            for bad in ["0", "-1", "many", ""] {
                let message = one.with(bad).unwrap_err().to_string();
                assert!(message.contains(&format!("expected {}:K", one.kind())), "{message}");
            }
        }
    }
}
