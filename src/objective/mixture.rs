//! Cross entropy and a divergence together.

use std::sync::Arc;

use crate::llama::RotationVars;
use crate::memory::Needs;
use crate::objective::{Batch, Objective, Predictions, by_name, of_network};
use crate::{Error, Result, Var};

/// `Σ w_i L_i` of objectives of the network's predictions, which runs once for all of them: `0.5*cross-entropy+0.5*kl`. A weight of 1 need
/// not be written.
///
/// ```
/// use spinquant::objective;
/// assert_eq!(objective::by_name("0.5*cross-entropy + 1*kl-top:50")?.name(), "0.5*cross-entropy+kl-top:50");
/// let message = objective::by_name("cross-entropy+whip").unwrap_err().to_string();
/// assert!(message.contains("whip does not depend on the network's predictions alone"), "{message}");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mixture(Vec<(f64, Arc<dyn Objective>)>);

impl Mixture {
    /// Of objectives with their weights, at most one of which needs the logits of the full-precision model: each would keep logits of its own.
    ///
    /// # Errors
    /// Fewer than two objectives, or one twice; a weight that is not finite and above 0; an objective of something else than the network's
    /// predictions; two divergences.
    pub fn new(terms: Vec<(f64, Arc<dyn Objective>)>) -> Result<Self> {
        let refused = |message: String| Err(Error::argument("objective", message));
        if terms.len() < 2 {
            return refused(format!("expected a mixture of at least two, got {}", terms.len()));
        }
        if let Some((weight, _)) = terms.iter().find(|(weight, _)| !(*weight > 0.0 && weight.is_finite())) {
            return refused(format!("expected finite weights above 0, got {weight}"));
        }
        if let Some((_, o)) = terms.iter().find(|(_, o)| !o.needs().of_predictions()) {
            return refused(format!("{} does not depend on the network's predictions alone: it cannot be mixed", o.name()));
        }
        let names: Vec<String> = terms.iter().map(|(_, o)| o.name()).collect();
        if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
            return refused(format!("expected different objectives, got {name} again as number {}", i + 1));
        }
        let divergences: Vec<&str> =
            terms.iter().zip(&names).filter(|((_, o), _)| o.needs() == Needs::Logits).map(|(_, name)| name.as_str()).collect();
        if divergences.len() > 1 {
            let message =
                format!("expected at most one divergence, each keeps logits of its own; got {}", divergences.join(", "));
            return refused(message);
        }
        Ok(Self(terms))
    }

    /// Reads `W*NAME+W*NAME`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let term = |term: &str| -> Result<(f64, Arc<dyn Objective>)> {
            let Some((weight, name)) = term.split_once('*') else { return Ok((1.0, by_name(term.trim())?)) };
            let wrong = || Error::argument("objective", format!("expected a number in front of *, got {weight:?} in {term:?}"));
            Ok((weight.trim().parse().map_err(|_| wrong())?, by_name(name.trim())?))
        };
        Self::new(text.split('+').map(term).collect::<Result<_>>()?)
    }
}

impl Objective for Mixture {
    fn name(&self) -> String {
        let term = |(weight, o): &(f64, Arc<dyn Objective>)| match *weight {
            1.0 => o.name(),
            weight => format!("{weight}*{}", o.name()),
        };
        self.0.iter().map(term).collect::<Vec<_>>().join("+")
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        of_network(self, rotations, batch)
    }
    fn of_predictions<'t>(&self, predictions: &Predictions<'t, '_>) -> Result<Var<'t>> {
        // Those of few logits first: whole ones are then made once the others are gone.
        let mut terms: Vec<_> = self.0.iter().collect();
        terms.sort_by_key(|(_, o)| o.needs() == Needs::Logits);
        let mut sum: Option<Var<'t>> = None;
        for (weight, o) in terms {
            let loss = o.of_predictions(predictions)?.scale(*weight)?;
            sum = Some(match sum {
                Some(sum) => sum.add(loss)?,
                None => loss,
            });
        }
        sum.ok_or_else(|| Error::argument("objective", "a mixture of nothing"))
    }
    /// Gradients add up: the harmonic mean of the objectives' rates by weight, `1 / Σ w_i/rate_i`.
    fn rate(&self) -> f64 {
        1.0 / self.0.iter().map(|(weight, o)| weight / o.rate()).sum::<f64>()
    }
    fn needs(&self) -> Needs {
        let logits = self.0.iter().any(|(_, o)| o.needs() == Needs::Logits);
        if logits { Needs::Logits } else { Needs::Network }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::{CrossEntropy, Kl};

    #[test]
    fn mixtures_are_read_and_named() {
        for (text, name) in [
            ("cross-entropy+kl", "cross-entropy+kl"),
            ("0.25*kl + 2*cross-entropy", "0.25*kl+2*cross-entropy"),
            ("1*cross-entropy+0.5*kl-top-gathered:7", "cross-entropy+0.5*kl-top-gathered:7"),
        ] {
            let mixture = by_name(text).unwrap();
            assert_eq!(mixture.name(), name);
            assert_eq!(by_name(&mixture.name()).unwrap().name(), name);
            assert_eq!(mixture.needs(), Needs::Logits);
        }
        // One term is no mixture, and its weight no name.
        for (text, want) in [
            ("cross-entropy+mse", "expected one of cross-entropy"),
            ("cross-entropy+", "expected one of cross-entropy"),
            ("half*cross-entropy+kl", "expected a number in front of *, got \"half\""),
            ("0*cross-entropy+kl", "weights above 0, got 0"),
            ("nan*cross-entropy+kl", "weights above 0, got NaN"),
            ("kl+kl", "got kl again as number 2"),
            ("kl+kl-top", "at most one divergence, each keeps logits of its own; got kl, kl-top"),
            ("kl+kurtosis", "kurtosis does not depend on the network's predictions alone"),
            ("0.5*kl", "at least two, got 1"),
        ] {
            let message = by_name(text).unwrap_err().to_string();
            assert!(message.contains(want), "{text}: {message}");
        }
    }

    #[test]
    fn the_rate_is_that_of_the_summed_gradients() {
        let mixture = |a, b| Mixture::new(vec![(a, Arc::new(CrossEntropy)), (b, Arc::new(Kl))]).unwrap().rate();
        assert!((mixture(1.0, 1e-12) - 1.0).abs() < 1e-9);
        assert!((mixture(1e-12, 1.0) - Kl.rate()).abs() < 1e-9);
        assert!((mixture(0.5, 0.5) - 2.0 / (1.0 + 1.0 / Kl.rate())).abs() < 1e-12);
    }
}
