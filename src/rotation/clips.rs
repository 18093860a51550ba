//! Learned clip constants: what costs nothing while a network runs and *does* change its function, so that it is kept apart from the
//! transforms, which do not.

use std::collections::BTreeMap;

use crate::quant::{ClipRatios, Site};
use crate::{Error, Result, Tensor};

/// The smallest and largest logarithm of a ratio: a range of a hundredth of the row's, and one twice as wide.
const LOGARITHMS: [f64; 2] = [-4.7, 0.7];

/// The clip ratios of the lower and the upper end of what is quantised, for every layer and [`Site`], and for every head of K and V: their
/// logarithms, `[L, kinds, 2]` a site. A row that spans [lo, hi] gets a grid over `[e^a₀ lo, e^a₁ hi]`. Sites that have none are
/// clipped as the scheme says ([`ClipRatios`]); none has by default.
#[derive(Clone, Debug, Default)]
pub struct ClipEnds(BTreeMap<Site, Tensor>);

impl ClipEnds {
    /// How many pairs of ends a layer has at a site: one, or one a key and value head.
    pub fn kinds(site: Site, kv_heads: usize) -> usize {
        if matches!(site, Site::Key | Site::Value) { kv_heads } else { 1 }
    }

    /// Equal ends at these sites, from the ratios of every layer; in `f64`.
    ///
    /// # Errors
    /// Sizes too large for memory.
    pub fn of_ratios(sites: &[Site], layers: &[ClipRatios], kv_heads: usize) -> Result<Self> {
        let at = |&site: &Site| {
            let kinds = Self::kinds(site, kv_heads);
            let logarithms = layers.iter().flat_map(|ratios| vec![ratios.at(site).ln(); 2 * kinds]).collect();
            Ok((site, Tensor::from_vec(logarithms, [layers.len(), kinds, 2])?))
        };
        Ok(Self(sites.iter().map(at).collect::<Result<_>>()?))
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of one site, `[L, kinds, 2]`.
    pub fn get(&self, site: Site) -> Option<&Tensor> {
        self.0.get(&site)
    }

    /// Replaces those of one site.
    pub fn set(&mut self, site: Site, logarithms: Option<Tensor>) {
        match logarithms {
            Some(t) => drop(self.0.insert(site, t)),
            None => drop(self.0.remove(&site)),
        }
    }

    /// Those that there are, in the order of [`Site::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Site, &Tensor)> {
        self.0.iter().map(|(site, t)| (*site, t))
    }

    /// What `f` makes of each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(Site, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self(self.iter().map(|(site, t)| Ok((site, f(site, t)?))).collect::<Result<_>>()?))
    }

    /// Logarithms moved to the nearest that [`ClipEnds::check`] accepts.
    ///
    /// # Errors
    /// A failing copy.
    pub fn bounded(logarithms: Tensor) -> Result<Tensor> {
        let [low, high] = LOGARITHMS;
        let bounded: Vec<f64> = logarithms.to_f64_vec()?.into_iter().map(|a| a.clamp(low, high)).collect();
        Tensor::from_vec(bounded, logarithms.shape())?.to_dtype(logarithms.dtype())?.to_device(&logarithms.device())
    }

    /// Checks that they fit a model with so many layers and key and value heads, are finite, and neither far above 1 nor near 0.
    ///
    /// # Errors
    /// Names the site, what was expected and what came.
    pub fn check(&self, layers: usize, kv_heads: usize) -> Result<()> {
        for (site, t) in self.iter() {
            let (name, expected) = (clip_name(site), [layers, Self::kinds(site, kv_heads), 2]);
            if t.shape() != expected {
                return Err(Error::shape(name, format!("{expected:?} for this model"), t.shape()));
            }
            Self::check_range(&name, t)?;
        }
        Ok(())
    }

    /// Checks that logarithms are finite, and those of ratios neither far above 1 nor near 0.
    pub(super) fn check_range(name: &str, t: &Tensor) -> Result<()> {
        let [low, high] = LOGARITHMS;
        match t.to_f64_vec()?.into_iter().find(|a| !(low - 1e-6..=high + 1e-6).contains(a)) {
            Some(odd) => Err(Error::numeric(name, format!("expected logarithms of ratios from {low} to {high}, got {odd}"))),
            None => Ok(()),
        }
    }
}

/// The name of the clip constants of a site in files.
pub(crate) fn clip_name(site: Site) -> String {
    format!("clips.{}", site.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_start_at_ratios_and_fit_a_model() {
        let layers = [ClipRatios::uniform(0.5).unwrap(), "key=0.8".parse().unwrap()];
        let ends = ClipEnds::of_ratios(&[Site::Key, Site::MlpInput], &layers, 3).unwrap();
        assert_eq!(ends.get(Site::Key).unwrap().shape(), [2, 3, 2]);
        assert_eq!(ends.get(Site::MlpInput).unwrap().to_f64_vec().unwrap(), [0.5f64.ln(), 0.5f64.ln(), 0.0, 0.0]);
        assert_eq!(ends.get(Site::Key).unwrap().to_f64_vec().unwrap()[6..], [0.8f64.ln(); 6]);
        assert!(ends.get(Site::Value).is_none() && !ends.is_empty());
        ends.check(2, 3).unwrap();
        for (layers, kv_heads, wanted) in [(3, 3, "[3, 3, 2] for this model"), (2, 1, "[2, 1, 2]")] {
            let message = ends.check(layers, kv_heads).unwrap_err().to_string();
            assert!(message.contains(wanted) && message.contains("clips."), "{message}");
        }
        for odd in [f64::NAN, 1.0, -5.0] {
            let broken = ends.map(|_, t| Tensor::from_vec(vec![odd; t.len()], t.shape())).unwrap();
            assert!(broken.check(2, 3).unwrap_err().to_string().contains("from -4.7 to 0.7"));
        }
    }
}
