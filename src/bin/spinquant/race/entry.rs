//! What races: an optimiser on an objective at some learning rates, perhaps with clip ratios.

use std::fmt;
use std::str::FromStr;

use spinquant::calibrate::ClipGoal;
use spinquant::{Error, Result, objective, optim};

/// Random Hadamards, not learned.
pub const HADAMARD: &str = "hadamard";

/// `NAME[/OBJECTIVE][@RATE[|RATE…]][+CLIP]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// An optimiser, or [`HADAMARD`].
    pub optimizer: String,
    pub objective: String,
    /// Of several, the first seed finds the best.
    pub rates: Vec<f64>,
    pub clip: Option<ClipGoal>,
}

impl Entry {
    /// Learns rather than being random.
    pub fn learns(&self) -> bool {
        self.optimizer != HADAMARD
    }
}

impl FromStr for Entry {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (rest, clip) = match s.split_once('+') {
            Some((rest, clip)) => (rest, Some(clip.parse()?)),
            None => (s, None),
        };
        let (rest, rates) = match rest.split_once('@') {
            Some((rest, rates)) => (rest, Some(rates)),
            None => (rest, None),
        };
        let (optimizer, objective) = rest.split_once('/').unwrap_or((rest, "cross-entropy"));
        let entry = Self { optimizer: optimizer.into(), objective: objective.into(), rates: vec![], clip };
        if optimizer == HADAMARD {
            return match rest == HADAMARD && rates.is_none() {
                true => Ok(entry),
                false => Err(Error::argument("entry", format!("{HADAMARD} does not learn: no objective or rate, got {s:?}"))),
            };
        }
        let (o, f) = (optim::by_name(optimizer)?, objective::by_name(objective)?);
        let number = |t: &str| match t.parse::<f64>() {
            Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
            _ => Err(Error::argument("entry", format!("expected a positive learning rate, got {t:?} in {s:?}"))),
        };
        let rates = match rates {
            Some(rates) => rates.split('|').map(number).collect::<Result<_>>()?,
            None => vec![o.default_learning_rate() * if o.is_scale_free() { 1.0 } else { f.rate() }],
        };
        Ok(Self { rates, ..entry })
    }
}

/// Without the rates, which are columns of their own.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = self.optimizer.clone();
        if self.learns() {
            name += &format!("/{}", self.objective);
        }
        if let Some(goal) = self.clip {
            name += &format!("+{goal}");
        }
        f.pad(&name)
    }
}

/// What races unless asked otherwise: every optimiser on cross entropy, Cayley SGD on every objective, clip ratios.
pub fn default_entries() -> Result<Vec<Entry>> {
    let optimizers = optim::all().into_iter().map(|o| o.name().to_string()).filter(|name| name != "cayley-parity");
    let objectives = objective::all().into_iter().skip(1).map(|o| format!("cayley/{}", o.name()));
    let clipped = [format!("{HADAMARD}+error"), "cayley+error".to_string()];
    optimizers.chain(objectives).chain(clipped).map(|text| text.parse()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read() {
        let e: Entry = "cayley/kl@1.5|10+loss".parse().unwrap();
        assert_eq!((e.optimizer.as_str(), e.objective.as_str(), &e.rates[..]), ("cayley", "kl", &[1.5, 10.0][..]));
        assert_eq!((e.clip, e.to_string().as_str()), (Some(ClipGoal::Loss), "cayley/kl+loss"));
        let e: Entry = "adam-polar/kl".parse().unwrap();
        assert_eq!((&e.rates[..], e.to_string().as_str()), (&[0.02][..], "adam-polar/kl"));
        assert_eq!("hadamard+error".parse::<Entry>().unwrap().to_string(), "hadamard+error");
        for (text, part) in [
            ("newton", "expected one of cayley"),
            ("cayley/mse", "expected one of cross-entropy"),
            ("cayley@fast", "expected a positive learning rate, got \"fast\""),
            ("cayley@1.5|0", "got \"0\""),
            ("cayley+much", "expected error or loss"),
            ("hadamard@1", "does not learn"),
            ("hadamard/kl", "does not learn"),
        ] {
            let message = text.parse::<Entry>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
        let all = default_entries().unwrap();
        assert!(all.len() > 10 && all.iter().all(|e| e.rates.len() == usize::from(e.learns())));
    }
}
