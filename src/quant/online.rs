//! The Hadamard rotations that run with the network.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::hadamard::Hadamard;
use crate::{Error, Result};

/// The Hadamard rotations that run with the network. Written as on the command line: `none`, `r3`, `r4`, `r3,r4`, and with R4 in
/// blocks `r3,r4=block:256`.
///
/// ```
/// use spinquant::quant::{Online, R4};
/// assert_eq!("r3,r4".parse::<Online>()?, Online::BOTH);
/// let blocks: Online = "r4=block:256".parse()?;
/// assert_eq!(blocks, Online { r3: false, r4: R4::Blocks(256) });
/// assert_eq!(blocks.to_string(), "r4=block:256");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Online {
    /// On q and k of every head after RoPE, so that the K cache quantises well.
    pub r3: bool,
    /// On the input of down_proj.
    pub r4: R4,
}

/// R4, the Hadamard on the input of down_proj. In JSON `false`, `true` or `"block:N"`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum R4 {
    /// None.
    Off,
    /// One over the whole row, as published: [`Hadamard::new`].
    Whole,
    /// Every N values of the row by themselves: [`Hadamard::in_blocks`]. Runtimes have fast kernels for powers of two only, and
    /// few models' rows are that long.
    Blocks(usize),
}

impl R4 {
    /// Whether there is one.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }

    /// The map of rows of `width` values; `None` where there is none.
    ///
    /// # Errors
    /// Blocks that do not divide the row, or that no Hadamard is known for.
    pub fn map(self, width: usize) -> Result<Option<Hadamard>> {
        match self {
            Self::Off => Ok(None),
            Self::Whole => Hadamard::new(width).map(Some),
            Self::Blocks(size) => Hadamard::in_blocks(width, size).map(Some),
        }
    }

    /// What a file means that says "whole" and does not record the map: rows of some widths had blocks of [`Hadamard::unrecorded`].
    ///
    /// # Errors
    /// Rows of no values.
    pub fn unrecorded(self, width: usize) -> Result<Self> {
        let before = Hadamard::unrecorded(width)?;
        Ok(match self {
            Self::Whole if before != Hadamard::new(width)? => Self::Blocks(width / before.blocks()),
            other => other,
        })
    }
}

/// As a field that says whether there is one: what files and states had before there were blocks.
impl fmt::Debug for R4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("false"),
            Self::Whole => f.write_str("true"),
            Self::Blocks(size) => write!(f, "block:{size}"),
        }
    }
}

impl Serialize for R4 {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Blocks(_) => s.collect_str(&format_args!("{self:?}")),
            on => s.serialize_bool(on.is_on()),
        }
    }
}

impl<'de> Deserialize<'de> for R4 {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected r4: false, true or \"block:N\"")]
        enum Written {
            On(bool),
            Text(String),
        }
        match Written::deserialize(d)? {
            Written::On(on) => Ok(if on { Self::Whole } else { Self::Off }),
            Written::Text(text) => blocks(&text)
                .ok_or_else(|| serde::de::Error::custom(format!("expected r4: false, true or \"block:N\", got {text:?}"))),
        }
    }
}

/// `block:N`.
fn blocks(text: &str) -> Option<R4> {
    text.strip_prefix("block:")?.parse().ok().filter(|size| *size > 0).map(R4::Blocks)
}

impl Online {
    /// R3 and the whole R4.
    pub const BOTH: Self = Self { r3: true, r4: R4::Whole };
    /// Neither: what a plain runtime offers.
    pub const NONE: Self = Self { r3: false, r4: R4::Off };
}

impl FromStr for Online {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let bad = || {
            let expected =
                "expected none, r3, r4 or r3,r4, where r4 may be r4=block:N (N values by themselves), r4=whole or r4=none";
            Error::argument("online rotations", format!("{expected}, got {s:?}"))
        };
        if s == "none" {
            return Ok(Self::NONE);
        }
        let (mut r3, mut r4) = (None, None);
        for part in s.split(',') {
            let first = match part {
                "r3" => r3.replace(true).is_none(),
                "r4" | "r4=whole" => r4.replace(R4::Whole).is_none(),
                "r4=none" => r4.replace(R4::Off).is_none(),
                other => {
                    let size = other.strip_prefix("r4=").and_then(blocks).ok_or_else(bad)?;
                    r4.replace(size).is_none()
                }
            };
            if !first {
                return Err(bad());
            }
        }
        Ok(Self { r3: r3.unwrap_or(false), r4: r4.unwrap_or(R4::Off) })
    }
}

impl fmt::Display for Online {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r4 = match self.r4 {
            R4::Off => String::new(),
            R4::Whole => "r4".into(),
            R4::Blocks(size) => format!("r4=block:{size}"),
        };
        f.pad(&match (self.r3, r4.as_str()) {
            (false, "") => "none".into(),
            (true, "") => "r3".into(),
            (false, r4) => r4.to_string(),
            (true, r4) => format!("r3,{r4}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_back() {
        let of = |r3, r4| Online { r3, r4 };
        for (text, online) in [
            ("none", Online::NONE),
            ("r3", of(true, R4::Off)),
            ("r4", of(false, R4::Whole)),
            ("r3,r4", Online::BOTH),
            ("r3,r4=block:2048", of(true, R4::Blocks(2048))),
            ("r4=block:1", of(false, R4::Blocks(1))),
        ] {
            assert_eq!(text.parse::<Online>().unwrap(), online);
            assert_eq!(online.to_string(), text);
            let json = serde_json::to_string(&online).unwrap();
            assert_eq!(serde_json::from_str::<Online>(&json).unwrap(), online, "{json}");
        }
        for (text, online) in
            [("r4,r3", Online::BOTH), ("r3,r4=whole", Online::BOTH), ("r3,r4=none", of(true, R4::Off)), ("r4=none", Online::NONE)]
        {
            assert_eq!(text.parse::<Online>().unwrap(), online);
        }
        for bad in ["", "r5", "r3,r3", "r4,r4=block:4", "none,r3", "r4=block:0", "r4=block:", "r4=block:-4", "r4=4", "r3=block:4"]
        {
            let message = bad.parse::<Online>().unwrap_err().to_string();
            assert!(message.contains("r4=block:N") && message.contains(&format!("got {bad:?}")), "{message}");
        }
    }

    /// What was written before there were blocks.
    #[test]
    fn as_it_was_written() {
        let json = |r4| serde_json::from_str::<Online>(&format!(r#"{{"r3":true,"r4":{r4}}}"#));
        assert_eq!(json("true").unwrap(), Online::BOTH);
        assert_eq!(serde_json::to_string(&Online::BOTH).unwrap(), r#"{"r3":true,"r4":true}"#);
        assert_eq!(format!("{:?}", Online::BOTH), "Online { r3: true, r4: true }");
        for bad in ["2", "\"block:x\"", "\"whole\"", "null"] {
            let message = json(bad).unwrap_err().to_string();
            assert!(message.contains("expected r4"), "{bad}: {message}");
        }
    }

    #[test]
    fn whole_before_records() {
        for (width, now) in [(29568, R4::Blocks(4224)), (13696, R4::Blocks(128)), (11008, R4::Whole), (18944, R4::Whole)] {
            assert_eq!(R4::Whole.unrecorded(width).unwrap(), now);
        }
        assert_eq!(R4::Off.unrecorded(29568).unwrap(), R4::Off);
        assert_eq!(R4::Blocks(128).unrecorded(29568).unwrap(), R4::Blocks(128));
    }
}
