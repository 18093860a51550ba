//! By what the products of quantised linears are computed.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How the products of linears are computed whose weights and inputs are both quantised. The two differ by rounding alone.
///
/// ```
/// use spinquant::quant::Engine;
/// assert_eq!("integer".parse::<Engine>()?, Engine::Integer);
/// assert_eq!(Engine::default().to_string(), "simulated");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Of the values that codes stand for, in the element type.
    #[default]
    Simulated,
    /// Of the codes, exact up to the scales, wherever that is possible and no slower.
    Integer,
}

impl Engine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Simulated, Self::Integer];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Simulated => "simulated",
            Self::Integer => "integer",
        }
    }
}

impl FromStr for Engine {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|e| e.name() == s);
        found.ok_or_else(|| Error::argument("engine", format!("expected simulated or integer, got {s:?}")))
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
