//! Clip ratios of activations, K and V: one constant a [`Site`], shared by all layers and found before the network runs, so that they
//! cost nothing while it does.
//!
//! The published ratio is 1: the grid covers the whole range of a row. Rotations make rows nearly Gaussian, where the best grid of few
//! levels leaves the tails out (Max 1960).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::quant::Site;
use crate::{Error, Result};

/// A clip ratio in (0, 1] for every [`Site`].
///
/// ```
/// use spinquant::quant::{ClipRatios, Site};
/// let ratios: ClipRatios = "activations=0.9,key=0.95".parse()?;
/// assert_eq!((ratios.at(Site::MlpInput), ratios.at(Site::Key), ratios.at(Site::Value)), (0.9, 0.95, 1.0));
/// assert_eq!("0.8".parse::<ClipRatios>()?, ClipRatios::uniform(0.8)?);
/// assert_eq!(ratios.to_string().parse::<ClipRatios>()?, ratios);
/// assert!("key=1.5".parse::<ClipRatios>().is_err());
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipRatios([f64; Site::ALL.len()]);

impl ClipRatios {
    /// The whole range everywhere, as published.
    pub const NONE: Self = Self([1.0; Site::ALL.len()]);

    /// One ratio for all sites.
    ///
    /// # Errors
    /// A number outside (0, 1].
    pub fn uniform(ratio: f64) -> Result<Self> {
        Ok(Self([checked(ratio)?; Site::ALL.len()]))
    }

    /// The ratio of a site.
    pub fn at(&self, site: Site) -> f64 {
        self.0[site as usize]
    }

    /// The same with another ratio at a site.
    ///
    /// # Errors
    /// A number outside (0, 1].
    pub fn with(mut self, site: Site, ratio: f64) -> Result<Self> {
        self.0[site as usize] = checked(ratio)?;
        Ok(self)
    }

    /// The one ratio, where all sites have the same.
    pub fn single(&self) -> Option<f64> {
        self.0.iter().all(|r| *r == self.0[0]).then_some(self.0[0])
    }
}

impl Default for ClipRatios {
    fn default() -> Self {
        Self::NONE
    }
}

fn checked(ratio: f64) -> Result<f64> {
    if ratio > 0.0 && ratio <= 1.0 {
        return Ok(ratio);
    }
    Err(Error::argument("clip ratio", format!("expected a number in (0, 1], got {ratio}")))
}

/// The inputs of linears: every site but K and V.
const INPUTS: [Site; 4] = [Site::AttentionInput, Site::AttentionOutput, Site::MlpInput, Site::DownInput];

impl FromStr for ClipRatios {
    type Err = Error;
    /// A number, or `site=number` separated by commas (1 for sites not named); `activations` names every site but `key` and `value`.
    fn from_str(s: &str) -> Result<Self> {
        let number = |t: &str| -> Result<f64> {
            checked(t.trim().parse().map_err(|_| Error::argument("clip ratio", format!("expected a number, got {t:?}")))?)
        };
        if !s.contains('=') {
            return Self::uniform(number(s)?);
        }
        s.split(',').try_fold(Self::NONE, |ratios, part| {
            let names = || Site::ALL.map(Site::name).join(", ");
            let unknown = || Error::argument("clip ratio", format!("expected activations or one of {}, got {part:?}", names()));
            let (name, ratio) = part.split_once('=').ok_or_else(unknown)?;
            let ratio = number(ratio)?;
            match Site::ALL.into_iter().find(|site| site.name() == name.trim()) {
                Some(site) => ratios.with(site, ratio),
                None if name.trim() == "activations" => INPUTS.into_iter().try_fold(ratios, |r, site| r.with(site, ratio)),
                None => Err(unknown()),
            }
        })
    }
}

impl fmt::Display for ClipRatios {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.single() {
            Some(ratio) => write!(f, "{ratio}"),
            None => {
                let each: Vec<String> = Site::ALL.iter().map(|&site| format!("{}={}", site.name(), self.at(site))).collect();
                f.write_str(&each.join(","))
            }
        }
    }
}

/// A number where all sites have the same ratio, else the text of [`ClipRatios::from_str`].
impl Serialize for ClipRatios {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self.single() {
            Some(ratio) => serializer.serialize_f64(ratio),
            None => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for ClipRatios {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        let ratios = match Either::deserialize(deserializer)? {
            Either::Number(ratio) => Self::uniform(ratio),
            Either::Text(text) => text.parse(),
        };
        ratios.map_err(serde::de::Error::custom)
    }
}
