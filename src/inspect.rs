//! What the quantisers of a network are given: outliers, kurtosis and quantisation error of every quantiser's input, before and
//! after rotation.
//!
//! Numbers are of the network without quantisation ([`unquantized`]), so that they speak of the activations and not of errors made
//! before; each quantiser is then tried on its input by itself.
//!
//! ```
//! use spinquant::{demo, inspect, quant::{Scheme, Site}, rotation::Rotations};
//! let (model, scheme) = (demo::model()?, Scheme::new(4, 4, 4));
//! let text = demo::windows(&demo::TEST[..8000], 64)?;
//! let c = &model.config;
//! let hadamard = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0)?;
//! let kurtosis = |rotations| -> spinquant::Result<f64> {
//!     let stats = inspect::sites(&inspect::unquantized(&model, rotations, &scheme)?, &text, 2, &scheme)?;
//!     Ok(stats.iter().find(|s| s.site == Site::DownInput).unwrap().kurtosis)
//! };
//! assert!(kurtosis(None)? > 3.0 * kurtosis(Some(&hadamard))?);
//! # Ok::<(), spinquant::Error>(())
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::data::Windows;
use crate::llama::{Llama, Merged};
use crate::quant::{QuantSpec, Scheme, Site};
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// Statistics of one quantiser's input over some text.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteStats {
    /// Which layer, from 0.
    pub layer: usize,
    /// Where in it.
    pub site: Site,
    /// Values seen.
    pub values: u64,
    /// The largest magnitude.
    pub absmax: f64,
    /// `E (x − μ)⁴ / σ⁴` over all values: 3 for a normal distribution, large where there are outliers.
    pub kurtosis: f64,
    /// Signal to quantisation noise, `10 log₁₀(Σ x² / Σ (x − Q(x))²)` in decibels; infinite where nothing is quantised or all is
    /// exact.
    pub sqnr_db: f64,
    /// The largest magnitude of every channel; heads follow one another.
    pub channel_absmax: Vec<f32>,
}

/// Rotations merged, nothing quantised, the scheme's Hadamards running: the network to look into.
///
/// # Errors
/// Rotations that do not fit.
pub fn unquantized(model: &Llama, rotations: Option<&Rotations>, scheme: &Scheme) -> Result<Merged> {
    model.merge_exact(rotations, &Scheme::FULL_PRECISION.online(scheme.online))
}

/// Statistics of every layer and site over the first `windows` windows of a text, the quantisers being those of `scheme`. In the
/// order of the layers, and in them of [`Site::ALL`].
///
/// # Errors
/// No windows, and what the network reports.
pub fn sites(model: &Merged, text: &Windows, windows: usize, scheme: &Scheme) -> Result<Vec<SiteStats>> {
    if windows == 0 {
        return Err(Error::argument("inspect", "expected at least one window"));
    }
    let specs = scheme.sites(model.config.head_dim);
    let moments = Arc::new(Mutex::new(BTreeMap::<(usize, Site), Moments>::new()));
    for i in 0..windows.min(text.len()) {
        let tokens = text.get(i);
        let (seen, count) = (moments.clone(), tokens.len());
        model.observe(tokens, tokens.len(), move |layer, site, x| {
            let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let mut all = seen.lock().unwrap_or_else(|e| e.into_inner());
            all.entry((layer, site)).or_insert_with(|| Moments::new(x.len() / count)).add(&x, specs.at(site))
        })?;
    }
    let moments = moments.lock().unwrap_or_else(|e| e.into_inner());
    Ok(moments.iter().map(|(&(layer, site), m)| m.stats(layer, site)).collect())
}

/// |x| of one quantiser's input, `[tokens, channels]` in `f32`; heads follow one another along the channels.
///
/// # Errors
/// A layer that is not there, and what the network reports.
pub fn magnitudes(model: &Merged, tokens: &[u32], layer: usize, site: Site) -> Result<Tensor> {
    let found = Arc::new(Mutex::new(None));
    let put = found.clone();
    model.observe(tokens, tokens.len(), move |l, s, x| {
        if (l, s) == (layer, site) {
            *put.lock().unwrap_or_else(|e| e.into_inner()) = Some(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?);
        }
        Ok(())
    })?;
    let found = found.lock().unwrap_or_else(|e| e.into_inner()).take();
    let layers = model.config.layers;
    let x = found.ok_or_else(|| Error::argument("layer", format!("expected one below {layers}, got {layer}")))?;
    let channels = x.len() / tokens.len();
    let values = x.as_slice::<f32>()?.iter().map(|x| x.abs()).collect();
    Tensor::from_vec(values, [tokens.len(), channels])
}

/// Sums over the values of one site.
struct Moments {
    count: u64,
    /// Σ x, Σ x², Σ x³, Σ x⁴.
    powers: [f64; 4],
    noise: f64,
    channels: Vec<f32>,
}

impl Moments {
    fn new(channels: usize) -> Self {
        Self { count: 0, powers: [0.0; 4], noise: 0.0, channels: vec![0.0; channels] }
    }

    fn add(&mut self, x: &Tensor, spec: &QuantSpec) -> Result<()> {
        let quantized = if spec.is_active() {
            let tape = Tape::new();
            tape.constant(x.clone()).fake_quant(spec)?.into_value()
        } else {
            x.clone()
        };
        let (x, q) = (x.as_slice::<f32>()?, quantized.as_slice::<f32>()?);
        for (x, q) in x.iter().zip(q) {
            let (x, q) = (f64::from(*x), f64::from(*q));
            let square = x * x;
            let terms = [x, square, square * x, square * square];
            self.powers.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            self.noise += (x - q) * (x - q);
        }
        for row in x.chunks(self.channels.len().max(1)) {
            self.channels.iter_mut().zip(row).for_each(|(m, x)| *m = m.max(x.abs()));
        }
        self.count += x.len() as u64;
        Ok(())
    }

    fn stats(&self, layer: usize, site: Site) -> SiteStats {
        let [m1, m2, m3, m4] = self.powers.map(|p| p / self.count as f64);
        let variance = m2 - m1 * m1;
        let fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1 * m1 * m2 - 3.0 * m1.powi(4);
        SiteStats {
            layer,
            site,
            values: self.count,
            absmax: f64::from(self.channels.iter().fold(0f32, |m, x| m.max(*x))),
            kurtosis: fourth / (variance * variance),
            sqnr_db: 10.0 * (self.powers[1] / self.noise).log10(),
            channel_absmax: self.channels.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;

    #[test]
    fn moments_of_known_values() {
        // Two of ±1: kurtosis 1; a normal sample: 3; one far value among zeros: nearly as many as there are.
        let stats = |x: Tensor, bits: u32| {
            let mut m = Moments::new(x.cols());
            m.add(&x.to_dtype(DType::F32).unwrap(), &QuantSpec::activation(bits, false)).unwrap();
            m.stats(0, Site::Key)
        };
        let sign = Tensor::from_vec((0..64).map(|i| 2.0 * f64::from(i % 2) - 1.0).collect::<Vec<_>>(), [4, 16]).unwrap();
        let s = stats(sign, 4);
        assert!((s.kurtosis - 1.0).abs() < 1e-9 && s.absmax == 1.0 && s.values == 64);
        let normal = stats(ops::randn([512, 128], 0), 4);
        assert!((normal.kurtosis - 3.0).abs() < 0.1, "{}", normal.kurtosis);
        // A step of s makes an error of s²/12: rows of 128 normal values span about 5.2 σ in 15 steps.
        assert!((18.0..21.5).contains(&normal.sqnr_db), "{}", normal.sqnr_db);
        assert!(stats(ops::randn([512, 128], 0), 8).sqnr_db > normal.sqnr_db + 20.0);
        let mut far = vec![0f64; 100];
        far[37] = -50.0;
        let s = stats(Tensor::from_vec(far, [1, 100]).unwrap(), 16);
        assert!(s.kurtosis > 90.0 && s.channel_absmax[37] == 50.0 && s.channel_absmax[36] == 0.0 && s.sqnr_db == f64::INFINITY);
    }
}
