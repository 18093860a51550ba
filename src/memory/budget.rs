//! The memory that a run may take, and sizes in words.

use std::fmt;
use std::str::FromStr;

use crate::device::cpu::available_bytes;
use crate::{Error, Result};

/// The memory that a run may take.
///
/// ```
/// use spinquant::memory::Budget;
/// assert_eq!("24GiB".parse::<Budget>()?, Budget::Bytes(24 << 30));
/// assert_eq!("auto".parse::<Budget>()?, Budget::Free);
/// assert_eq!(Budget::Bytes(1000).bytes(50), 1000);
/// assert_eq!(Budget::Free.bytes(5000), 4800); // a little is left to the driver
/// assert!("much".parse::<Budget>().is_err());
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Budget {
    /// What is free, less 4 % for the driver and for what cannot be foreseen.
    #[default]
    Free,
    /// This many bytes.
    Bytes(usize),
}

impl Budget {
    /// The bytes allowed where so many are free.
    pub fn bytes(self, free: usize) -> usize {
        match self {
            Self::Free => free - free / 25,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// Bytes that a plan may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// On the card.
    pub card: usize,
    /// Of main memory, for layers that do not stay on the card.
    pub host: usize,
    /// Layers that neither has room for may be read from the model's files, again in every pass.
    pub files: bool,
}

impl Room {
    /// Of a card with so many bytes free, and of main memory with what is free of it now, within a budget of each.
    pub fn here(card: Budget, free: usize, main: Budget) -> Self {
        let available = available_bytes().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
        Self { card: card.bytes(free), host: main.bytes(available), files: false }
    }
}

impl From<usize> for Room {
    /// Of a card alone.
    fn from(card: usize) -> Self {
        Self { card, host: 0, files: false }
    }
}

impl FromStr for Budget {
    type Err = Error;
    /// `auto`, or what [`parse_bytes`] reads.
    fn from_str(s: &str) -> Result<Self> {
        if s == "auto" { Ok(Self::Free) } else { parse_bytes(s).map(Self::Bytes) }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Free => f.pad("auto"),
            Self::Bytes(bytes) => f.pad(&bytes.to_string()),
        }
    }
}

/// Bytes from `24GiB`, `24GB`, `512MiB` or a number of bytes.
///
/// # Errors
/// Anything else.
pub fn parse_bytes(s: &str) -> Result<usize> {
    let bad = || Error::argument("memory", format!("expected auto or a size such as 24GiB, 80GB or 512MiB, got {s:?}"));
    let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let number: f64 = s[..digits].parse().map_err(|_| bad())?;
    let unit = match s[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "mib" | "m" => f64::from(1 << 20),
        "gib" | "g" => f64::from(1 << 30),
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(bad()),
    };
    let bytes = number * unit;
    if (1.0..1e15).contains(&bytes) { Ok(bytes as usize) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("24GiB").unwrap(), 24 << 30);
        assert_eq!(parse_bytes("1.5gb").unwrap(), 1_500_000_000);
        assert_eq!(parse_bytes("1000").unwrap(), 1000);
        for bad in ["", "much", "24 tons", "-3GiB", "1e30GiB", "0"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
