//! Learning rates over the steps of a run.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How the learning rate falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// `lr`
    Constant,
    /// `lr (1 − s/total)`
    Linear,
    /// `½ lr (1 + cos(π s/total))`, without warm-up: the published recipe.
    #[default]
    Cosine,
}

impl Schedule {
    /// The rate of step `step` (0 first) of `total`; the last rate the formula gives from there on.
    pub fn at(self, step: usize, total: usize, base_lr: f64) -> f64 {
        let done = if total == 0 { 0.0 } else { (step as f64 / total as f64).min(1.0) };
        match self {
            Self::Constant => base_lr,
            Self::Linear => base_lr * (1.0 - done),
            Self::Cosine => 0.5 * base_lr * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

impl FromStr for Schedule {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Ok(match s {
            "constant" => Self::Constant,
            "linear" => Self::Linear,
            "cosine" => Self::Cosine,
            _ => return Err(Error::argument("schedule", format!("expected constant, linear or cosine, got {s:?}"))),
        })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        for name in ["constant", "linear", "cosine"] {
            let s: Schedule = name.parse().unwrap();
            assert_eq!(s.to_string(), name);
            assert_eq!(s.at(0, 100, 1.5), 1.5);
        }
        assert!("step".parse::<Schedule>().is_err());
        assert_eq!(Schedule::Linear.at(25, 100, 2.0), 1.5);
        assert!((Schedule::Cosine.at(50, 100, 1.5) - 0.75).abs() < 1e-15);
        assert_eq!(Schedule::Cosine.at(100, 100, 1.5), 0.0);
    }
}
