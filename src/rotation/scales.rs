//! Scales: what else changes the weights of a LLaMA and not its function, at no cost while it runs.
//!
//! | | shape | divides | multiplies | in front of |
//! |---|---|---|---|---|
//! | [`Scale::UpDown`] | `[L, F]` | rows of W_up and b_up | columns of W_down | R4 |
//! | [`Scale::Values`] | `[L, K·D]` | rows of W_v and b_v | columns of W_o, for every query head of a KV head | R2 |
//! | [`Scale::Norms`] | `[L, 2, C]` | the gain of a norm | columns of q, k, v; of gate, up | behind R1 |
//!
//! up is multiplied by the gate entry by entry, and attention mixes values without touching their entries, so the first two cancel. The
//! third stands behind R1, where a norm has no gain left: it stays in the network as an ordinary RMSNorm gain (OSTQuant,
//! arXiv 2501.13987). Scales are kept as their logarithms: an exponential is never 0.

use std::fmt;
use std::str::FromStr;

use crate::{DType, Device, Error, Result, Tensor};

/// A kind of scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scale {
    /// Of up's output and down's input.
    UpDown,
    /// Of v's output and o's input.
    Values,
    /// Of both norms' outputs.
    Norms,
}

impl Scale {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::UpDown, Self::Values, Self::Norms];

    /// Its name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UpDown => "up-down",
            Self::Values => "values",
            Self::Norms => "norms",
        }
    }

    /// The shape of the logarithms of a model with these sizes.
    pub fn shape(self, sizes: &Sizes) -> Vec<usize> {
        let Sizes { layers, hidden, intermediate, values } = *sizes;
        match self {
            Self::UpDown => vec![layers, intermediate],
            Self::Values => vec![layers, values],
            Self::Norms => vec![layers, 2, hidden],
        }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scale {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|scale| scale.name() == s);
        found.ok_or_else(|| Error::argument("scales", format!("expected one of {}, got {s:?}", names())))
    }
}

/// What is learned and leaves the network's function alone, as the command line has it: `published` (R1 and R2), `all`, or a list of `r1`,
/// `r2` and kinds of scales. R1 and R2 are always learned.
///
/// ```
/// use spinquant::rotation::{Scale, Transforms};
/// let some: Transforms = "r1,r2,up-down".parse()?;
/// assert_eq!(some, Transforms { scales: vec![Scale::UpDown] });
/// assert_eq!(some.to_string(), "r1,r2,up-down");
/// assert_eq!("published".parse::<Transforms>()?, Transforms::default());
/// assert_eq!("all".parse::<Transforms>()?.scales, Scale::ALL);
/// assert!("up-down".parse::<Transforms>().is_err());
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transforms {
    /// Kinds of scales, besides R1 and R2; in the order of [`Scale::ALL`], each once.
    pub scales: Vec<Scale>,
}

impl Transforms {
    /// These and others.
    pub fn with(&self, others: &Self) -> Self {
        let either = |kind: &Scale| self.scales.contains(kind) || others.scales.contains(kind);
        Self { scales: Scale::ALL.into_iter().filter(either).collect() }
    }
}

impl FromStr for Transforms {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let list: Vec<&str> = match s {
            "published" => vec!["r1", "r2"],
            "all" => ["r1", "r2"].into_iter().chain(Scale::ALL.map(Scale::name)).collect(),
            _ => s.split(',').map(str::trim).collect(),
        };
        let kinds = Scale::ALL.map(Scale::name).join(", ");
        let known = |name: &str| ["r1", "r2"].contains(&name) || name.parse::<Scale>().is_ok();
        if let Some(odd) = list.iter().find(|name| !known(name)) {
            let message = format!("expected published, all, or a list of r1, r2, {kinds}, got {odd:?}");
            return Err(Error::argument("transforms", message));
        }
        if !["r1", "r2"].iter().all(|name| list.contains(name)) {
            return Err(Error::argument("transforms", format!("expected r1 and r2 among them, got {s:?}")));
        }
        Ok(Self { scales: Scale::ALL.into_iter().filter(|kind| list.contains(&kind.name())).collect() })
    }
}

impl fmt::Display for Transforms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = ["r1", "r2"].into_iter().chain(self.scales.iter().map(|s| s.name())).collect();
        f.pad(&names.join(","))
    }
}

/// The sizes of a model that scales depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// L.
    pub layers: usize,
    /// C.
    pub hidden: usize,
    /// F.
    pub intermediate: usize,
    /// K·D: all key and value heads together.
    pub values: usize,
}

/// The logarithms of the scales that there are; none by default.
#[derive(Clone, Debug, Default)]
pub struct Scales([Option<Tensor>; Scale::ALL.len()]);

impl Scales {
    /// Scales of 1, of these kinds, in `f64`.
    ///
    /// # Errors
    /// Sizes too large for memory.
    pub fn ones(kinds: &[Scale], sizes: &Sizes) -> Result<Self> {
        let mut scales = Self::default();
        for &kind in kinds {
            scales.set(kind, Some(Tensor::zeros(kind.shape(sizes), DType::F64, &Device::Cpu)?));
        }
        Ok(scales)
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The logarithms of one kind.
    pub fn get(&self, kind: Scale) -> Option<&Tensor> {
        self.0[kind as usize].as_ref()
    }

    /// Replaces those of one kind.
    pub fn set(&mut self, kind: Scale, logarithms: Option<Tensor>) {
        self.0[kind as usize] = logarithms;
    }

    /// Those that there are.
    pub fn iter(&self) -> impl Iterator<Item = (Scale, &Tensor)> {
        Scale::ALL.into_iter().filter_map(|kind| Some((kind, self.get(kind)?)))
    }

    /// What `f` makes of each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(Scale, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut mapped = Self::default();
        for (kind, t) in self.iter() {
            mapped.set(kind, Some(f(kind, t)?));
        }
        Ok(mapped)
    }

    /// Checks that they fit a model, are finite, and within e^±20 of 1.
    ///
    /// # Errors
    /// Names the kind, what was expected and what came.
    pub fn check(&self, sizes: &Sizes) -> Result<()> {
        for (kind, t) in self.iter() {
            let (name, expected) = (format!("scales {kind}"), kind.shape(sizes));
            if t.shape() != expected {
                return Err(Error::shape(name, format!("{expected:?} for this model"), t.shape()));
            }
            if let Some(worst) = t.to_f64_vec()?.into_iter().find(|a| !(a.abs() <= 20.0)) {
                return Err(Error::numeric(name, format!("expected logarithms from -20 to 20, got {worst}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names_and_shapes() {
        let sizes = Sizes { layers: 2, hidden: 8, intermediate: 12, values: 4 };
        for kind in Scale::ALL {
            assert_eq!(kind.to_string().parse::<Scale>().unwrap(), kind);
            let scales = Scales::ones(&[kind], &sizes).unwrap();
            assert!(!scales.is_empty() && scales.iter().count() == 1);
            scales.check(&sizes).unwrap();
            let message = scales.check(&Sizes { layers: 3, ..sizes }).unwrap_err().to_string();
            assert!(message.contains(kind.name()) && message.contains("for this model"), "{message}");
            let broken = scales.map(|_, t| Tensor::from_vec(vec![f64::NAN; t.len()], t.shape())).unwrap();
            assert!(broken.check(&sizes).unwrap_err().to_string().contains("from -20 to 20"));
        }
        assert!("gains".parse::<Scale>().unwrap_err().to_string().contains("up-down, values, norms"));
        assert!(Scales::default().is_empty());
    }
}
