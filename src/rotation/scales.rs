//! Scales: what else changes the weights of a LLaMA and not its function, at no cost while it runs.
//!
//! | | shape | divides | multiplies | in front of |
//! |---|---|---|---|---|
//! | [`Scale::UpDown`] | `[L, F]` | rows of W_up and b_up | columns of W_down | R4 |
//! | [`Scale::Values`] | `[L, K·D]` | rows of W_v and b_v | columns of W_o, for every query head of a KV head | R2 |
//! | [`Scale::Norms`] | `[L, 2, C]` | the gain of a norm | columns of q, k, v; of gate, up | behind R1 |
//! | [`Scale::RopePairs`] | `[L, K, 2, P]` | pairs of rows of W_q and b_q, for every query head of a KV head | those of W_k and b_k | RoPE |
//! | [`Scale::ValuesGeneral`] | `[L, K·D]` | rows of R2ᵀ W_v and R2ᵀ b_v | columns of W_o R2, for every query head of a KV head | R2b, behind R2 |
//!
//! up is multiplied by the gate entry by entry, and attention mixes values without touching their entries, so the first two cancel. The
//! third stands behind R1, where a norm has no gain left: it stays in the network as an ordinary RMSNorm gain (OSTQuant,
//! arXiv 2501.13987). The fourth turns each of the P pairs that the rotary embedding turns by an angle too, of q and of k by the same one:
//! both commute with the embedding and leave the products of queries and keys alone (FPTQuant, arXiv 2506.04985). The last stands between
//! two rotations, `v R2 diag(e⁻ᵃ) R2b`: by the singular value decomposition every invertible matrix is such a product. Scales are kept as their
//! logarithms: an exponential is never 0.

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
    /// Of the pairs of keys and queries that the rotary embedding turns, and angles: row 0 has the logarithms, row 1 the angles.
    RopePairs,
    /// Of values between R2 and R2b ([`Rotations::r2b`](super::Rotations::r2b)): with both, any invertible matrix of every head.
    ValuesGeneral,
}

impl Scale {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::UpDown, Self::Values, Self::Norms, Self::RopePairs, Self::ValuesGeneral];

    /// Its name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UpDown => "up-down",
            Self::Values => "values",
            Self::Norms => "norms",
            Self::RopePairs => "rope-pairs",
            Self::ValuesGeneral => "values-general",
        }
    }

    /// The shape of the logarithms of a model with these sizes.
    pub fn shape(self, sizes: &Sizes) -> Vec<usize> {
        let Sizes { layers, hidden, intermediate, kv_heads, head_dim, pairs, .. } = *sizes;
        match self {
            Self::UpDown => vec![layers, intermediate],
            Self::Values | Self::ValuesGeneral => vec![layers, kv_heads * head_dim],
            Self::Norms => vec![layers, 2, hidden],
            Self::RopePairs => vec![layers, kv_heads, 2, pairs],
        }
    }

    /// Why a model with these sizes cannot have it.
    pub fn refused(self, sizes: &Sizes) -> Option<&'static str> {
        let norms = self == Self::RopePairs && sizes.head_norms;
        norms.then_some("this model norms every head of q and k in front of the rotary embedding, and turned pairs do not pass a norm with a gain")
    }

    /// The logarithms and the angles among its values.
    ///
    /// # Errors
    /// A failing copy from a GPU.
    pub fn split(self, t: &Tensor) -> Result<(Vec<f64>, Vec<f64>)> {
        let (values, cols) = (t.to_f64_vec()?, t.cols().max(1));
        if self != Self::RopePairs {
            return Ok((values, vec![]));
        }
        let rows = |first: usize| values.chunks(cols).skip(first).step_by(2).flatten().copied().collect();
        Ok((rows(0), rows(1)))
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

/// The sizes of a model that scales depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// L.
    pub layers: usize,
    /// C.
    pub hidden: usize,
    /// F.
    pub intermediate: usize,
    /// K.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Pairs of a head that the rotary embedding turns, P.
    pub pairs: usize,
    /// Heads of q and k have norms.
    pub head_norms: bool,
}

/// The logarithms of the scales that there are; none by default.
#[derive(Clone, Debug, Default)]
pub struct Scales([Option<Tensor>; Scale::ALL.len()]);

impl Scales {
    /// Scales of 1, of these kinds, in `f64`; angles are 0.
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

    /// Checks that they fit a model, are finite, and within e^±20 of 1; angles need only be finite.
    ///
    /// # Errors
    /// Names the kind, what was expected and what came.
    pub fn check(&self, sizes: &Sizes) -> Result<()> {
        for (kind, t) in self.iter() {
            let (name, expected) = (format!("scales {kind}"), kind.shape(sizes));
            if let Some(why) = kind.refused(sizes) {
                return Err(Error::argument(name, format!("expected none: {why}")));
            }
            if t.shape() != expected {
                return Err(Error::shape(name, format!("{expected:?} for this model"), t.shape()));
            }
            let (logarithms, angles) = kind.split(t)?;
            if let Some(worst) = logarithms.into_iter().find(|a| !(a.abs() <= 20.0)) {
                return Err(Error::numeric(name, format!("expected logarithms from -20 to 20, got {worst}")));
            }
            if let Some(worst) = angles.into_iter().find(|a| !a.is_finite()) {
                return Err(Error::numeric(name, format!("expected finite angles, got {worst}")));
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
        let sizes = Sizes { layers: 2, hidden: 8, intermediate: 12, kv_heads: 1, head_dim: 4, pairs: 2, head_norms: false };
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
        let mut pairs = Scales::ones(&[Scale::RopePairs], &sizes).unwrap();
        let message = pairs.check(&Sizes { head_norms: true, ..sizes }).unwrap_err().to_string();
        assert!(message.contains("rope-pairs") && message.contains("norms every head"), "{message}");
        // Large angles are angles, large logarithms are none.
        let values = |odd: usize, value: f64| {
            let mut all = vec![0.0; 8];
            all[odd] = value;
            Some(Tensor::from_vec(all, [2, 1, 2, 2]).unwrap())
        };
        pairs.set(Scale::RopePairs, values(2, 30.0));
        pairs.check(&sizes).unwrap();
        for (odd, value, says) in [(1, 30.0, "from -20 to 20, got 30"), (7, f64::NAN, "finite angles, got NaN")] {
            pairs.set(Scale::RopePairs, values(odd, value));
            assert!(pairs.check(&sizes).unwrap_err().to_string().contains(says));
        }
    }
}
