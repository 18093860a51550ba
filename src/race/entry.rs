//! What races: an optimiser on an objective at some learning rates, perhaps with clip ratios.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::calibrate::ClipGoal;
use crate::learn::LearnOptions;
use crate::objective::{self, CrossEntropy, Objective};
use crate::optim::{self, Optimizer};
use crate::{Error, Result};

/// The name of random Hadamards, which do not learn.
pub const HADAMARD: &str = "hadamard";

/// Makes an optimiser, a new one for every run.
pub type MakeOptimizer = Arc<dyn Fn() -> Result<Box<dyn Optimizer>> + Send + Sync>;

/// What races: an optimiser on an objective, or random Hadamards.
///
/// ```
/// use spinquant::race::Entry;
/// let entry: Entry = "cayley/kl@1.5|10+loss".parse()?;
/// assert_eq!((entry.name.as_str(), entry.rates.as_slice()), ("cayley", &[1.5, 10.0][..]));
/// assert_eq!(entry.to_string(), "cayley/kl+loss");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone)]
pub struct Entry {
    /// What it is called in tables: the optimiser's name unless set otherwise, or [`HADAMARD`].
    pub name: String,
    /// How its optimiser is made; `None` for random Hadamards.
    pub optimizer: Option<MakeOptimizer>,
    /// What it minimises.
    pub objective: Arc<dyn Objective>,
    /// Learning rates of the first step. Of several, the first seed finds the best.
    pub rates: Vec<f64>,
    /// What clip ratios are searched by on every start, if they are.
    pub clip: Option<ClipGoal>,
    /// Those of every layer and site are learned on with the rotations ([`ClipChoice::Learned`](crate::learn::ClipChoice)).
    pub learned_clips: bool,
    /// Clip ratios of weights are learned with the rotations, from those that the search finds ([`WeightClip::Learned`](crate::learn::WeightClip)).
    pub learned_weights: bool,
}

/// What the name of an entry ends with whose clip ratios of weights are learned.
const WEIGHTS: &str = "+weights";

impl Entry {
    /// An optimiser on an objective, at its default learning rate and without clip ratios.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn new(
        make: impl Fn() -> Result<Box<dyn Optimizer>> + Send + Sync + 'static,
        objective: Arc<dyn Objective>,
    ) -> Result<Self> {
        let optimizer = make()?;
        let options = LearnOptions { objective: objective.clone(), ..LearnOptions::default() };
        let (name, rates) = (optimizer.name().to_string(), vec![options.rate(optimizer.as_ref())]);
        Ok(Self {
            name,
            optimizer: Some(Arc::new(make)),
            objective,
            rates,
            clip: None,
            learned_clips: false,
            learned_weights: false,
        })
    }

    /// Random Hadamards.
    pub fn hadamard() -> Self {
        Self {
            name: HADAMARD.into(),
            optimizer: None,
            objective: Arc::new(CrossEntropy),
            rates: vec![],
            clip: None,
            learned_clips: false,
            learned_weights: false,
        }
    }

    /// Learns rather than being random.
    pub fn learns(&self) -> bool {
        self.optimizer.is_some()
    }
}

impl FromStr for Entry {
    type Err = Error;
    /// `OPTIMIZER[/OBJECTIVE][@RATE[|RATE…]][+error|+loss|+learned][+weights]`, or `hadamard[+error|+loss]`.
    fn from_str(s: &str) -> Result<Self> {
        // A mixture of objectives has pluses of its own.
        let (whole, learned_weights) = (s, s.ends_with(WEIGHTS));
        let goal = |clip: &str| {
            let odd = || format!("expected +error, +loss or +learned, then +weights, got {clip:?} in {whole:?}");
            clip.parse::<ClipGoal>().map_err(|_| Error::argument("entry", odd()))
        };
        let s = s.strip_suffix(WEIGHTS).unwrap_or(s);
        let (rest, clip, learned_clips) = match s.rsplit_once('+') {
            Some((rest, "learned")) => (rest, Some(ClipGoal::Error), true),
            Some((rest, clip)) if goal(clip).is_ok() || !rest.contains('/') => (rest, Some(goal(clip)?), false),
            _ => (s, None, false),
        };
        let (rest, rates) = match rest.split_once('@') {
            Some((rest, rates)) => (rest, Some(rates)),
            None => (rest, None),
        };
        let (optimizer, objective) = rest.split_once('/').unwrap_or((rest, "cross-entropy"));
        if optimizer == HADAMARD {
            return match rest == HADAMARD && rates.is_none() && !learned_clips && !learned_weights {
                true => Ok(Self { clip, ..Self::hadamard() }),
                false => Err(Error::argument(
                    "entry",
                    format!("{HADAMARD} does not learn: no objective, rate or learned clip ratios, got {whole:?}"),
                )),
            };
        }
        let name = optimizer.to_string();
        let mut entry = Self::new(move || optim::by_name(&name), objective::by_name(objective)?)?;
        let number = |t: &str| match t.parse::<f64>() {
            Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
            _ => Err(Error::argument("entry", format!("expected a positive learning rate, got {t:?} in {whole:?}"))),
        };
        if let Some(rates) = rates {
            entry.rates = rates.split('|').map(number).collect::<Result<_>>()?;
        }
        Ok(Self { clip, learned_clips, learned_weights, ..entry })
    }
}

/// Without the rates, which are columns of their own.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = self.name.clone();
        if self.learns() {
            name += &format!("/{}", self.objective.name());
        }
        if self.learned_clips {
            name += "+learned";
        } else if let Some(goal) = self.clip {
            name += &format!("+{goal}");
        }
        if self.learned_weights {
            name += WEIGHTS;
        }
        f.pad(&name)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("name", &self.to_string()).field("rates", &self.rates).finish_non_exhaustive()
    }
}

/// What `spinquant race` lets race by default: every optimiser on cross entropy, Cayley SGD on every objective, clip ratios.
pub fn default_entries() -> Vec<Entry> {
    let optimizers = optim::all().into_iter().map(|o| o.name().to_string()).filter(|name| name != "cayley-parity");
    let objectives = objective::all().into_iter().skip(1).map(|o| format!("cayley/{}", o.name()));
    let clipped = [format!("{HADAMARD}+error"), "cayley+error".to_string()];
    let parse = |text: String| text.parse().expect("the name of an optimiser or an objective of this crate");
    optimizers.chain(objectives).chain(clipped).map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read() {
        let e: Entry = "cayley/kl@1.5|10+loss".parse().unwrap();
        assert_eq!((e.name.as_str(), e.objective.name().as_str(), &e.rates[..]), ("cayley", "kl", &[1.5, 10.0][..]));
        assert_eq!((e.clip, e.to_string().as_str()), (Some(ClipGoal::Loss), "cayley/kl+loss"));
        let e: Entry = "cayley+learned".parse().unwrap();
        assert!(e.learned_clips && e.to_string() == "cayley/cross-entropy+learned");
        for text in ["cayley/kl+weights", "cayley/0.5*cross-entropy+0.5*kl+learned+weights", "cayley/kl+error+weights"] {
            let e: Entry = text.parse().unwrap();
            assert!(e.learned_weights && e.learned_clips == text.contains("learned") && e.to_string() == text, "{e}");
        }
        let e: Entry = "adam-polar/kl".parse().unwrap();
        assert_eq!((&e.rates[..], e.to_string().as_str()), (&[0.02][..], "adam-polar/kl"));
        for text in ["cayley/0.5*cross-entropy+0.5*kl", "cayley/0.5*cross-entropy+0.5*kl+loss"] {
            let rates = format!("cayley/0.5*cross-entropy+0.5*kl@1|2{}", &text["cayley/0.5*cross-entropy+0.5*kl".len()..]);
            let e: Entry = rates.parse().unwrap();
            assert_eq!((e.to_string().as_str(), &e.rates[..]), (text, &[1.0, 2.0][..]));
        }
        assert_eq!("hadamard+error".parse::<Entry>().unwrap().to_string(), "hadamard+error");
        for (text, part) in [
            ("newton", "expected one of cayley"),
            ("cayley/mse", "expected one of cross-entropy"),
            ("cayley@fast", "expected a positive learning rate, got \"fast\""),
            ("cayley@1.5|0", "got \"0\""),
            ("cayley+much", "expected +error, +loss or +learned, then +weights, got \"much\" in \"cayley+much\""),
            ("hadamard@1", "does not learn"),
            ("hadamard+learned", "does not learn"),
            ("hadamard+weights", "does not learn"),
            ("hadamard/kl", "does not learn"),
        ] {
            let message = text.parse::<Entry>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
        let all = default_entries();
        assert!(all.len() > 10 && all.iter().all(|e| e.rates.len() == usize::from(e.learns())));
    }
}
