//! SmoothQuant: the ranges of activations moved into weights, in closed form.

use std::sync::{Arc, Mutex};

use super::Training;
use crate::data::Windows;
use crate::learn::Watch;
use crate::llama::{Linear, Llama};
use crate::quant::{Online, Scheme, Site};
use crate::rotation::{Rotations, Scale, Scales};
use crate::{DType, Device, Error, Result, Tensor};

/// The exponents that are tried: 0.3, 0.35, … 0.8.
const EXPONENTS: usize = 11;

/// What [`smooth_quant`] found.
#[derive(Clone, Debug)]
pub struct Smooth {
    /// Identity matrices, and the scales.
    pub rotations: Rotations,
    /// α, the best of those tried.
    pub exponent: f64,
    /// Mean cross entropy of the quantised network on the windows of the search, for every exponent tried.
    pub losses: Vec<(f64, f64)>,
    /// What it took.
    pub training: Training,
}

/// Scales of norm outputs, of up and down and of v and o, without rotations: channel j of what a linear reads is divided, and its column
/// multiplied, by
///
/// `s_j = max|x_j|^α / max|w_j|^(1−α)`,
///
/// with x over windows of text in full precision and w over all linears that read the channel (Xiao et al. 2023, arXiv 2211.10438, who do so
/// behind norms; the rest moves the ranges of down's and o's inputs alike). A channel or a column of zeros keeps a scale of 1. Of the exponents
/// 0.3, 0.35, … 0.8 the one with the least loss of the quantised network on the same windows is taken, of equal ones the smallest. The
/// scheme runs as it does without rotations ([`Scheme::unrotated`]).
///
/// # Errors
/// A model whose gains are not folded; no windows, or one there is not; a loss that is not finite; [`Error::Interrupted`].
pub fn smooth_quant(model: &Llama, scheme: &Scheme, text: &Windows, windows: &[usize], watch: &mut dyn Watch) -> Result<Smooth> {
    let (scheme, seq, begun) = (scheme.unrotated(), text.seq_len(), std::time::Instant::now());
    if windows.is_empty() {
        return Err(Error::argument("smoothquant", "expected at least one window to search on, got none"));
    }
    let ranges = Ranges::measure(model, text, windows)?;
    watch.begin("smoothquant, exponents", EXPONENTS);
    let mut losses: Vec<(f64, f64)> = vec![];
    for i in 0..EXPONENTS {
        let exponent = (30 + 5 * i) as f64 / 100.0;
        let rotations = ranges.rotations(model, exponent)?;
        let network = model.merge(Some(&rotations), &scheme)?;
        let mut loss = 0.0;
        for &w in windows {
            loss += network.token_losses(text.get(w), seq)?.iter().sum::<f64>() / (windows.len() * (seq - 1)) as f64;
        }
        if !loss.is_finite() {
            return Err(Error::numeric("smoothquant", format!("the loss is {loss} with exponent {exponent}")));
        }
        losses.push((exponent, loss));
        if watch.at(i + 1).is_break() {
            return Err(Error::Interrupted { step: i + 1 });
        }
    }
    let (exponent, _) = losses.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a }).expect("several exponents");
    let rotations = ranges.rotations(model, exponent)?;
    let training = Training::since(begun, (1 + EXPONENTS) * windows.len() * seq);
    Ok(Smooth { rotations, exponent, losses, training })
}

/// Where scales act: the site that reads the channels, and of norms which.
const PLACES: [(Scale, Site, usize); 4] = [
    (Scale::Norms, Site::AttentionInput, 0),
    (Scale::Norms, Site::MlpInput, 1),
    (Scale::Values, Site::AttentionOutput, 0),
    (Scale::UpDown, Site::DownInput, 0),
];

/// The largest magnitudes of every layer's channels and of the columns that read them, by [`PLACES`].
struct Ranges {
    layers: Vec<[(Vec<f64>, Vec<f64>); 4]>,
}

impl Ranges {
    fn measure(model: &Llama, text: &Windows, windows: &[usize]) -> Result<Self> {
        let config = &model.config;
        let seen = Arc::new(Mutex::new(vec![[const { Vec::<f64>::new() }; 4]; config.layers]));
        let network = model.merge_exact(None, &Scheme::FULL_PRECISION.online(Online::NONE))?;
        for &w in windows {
            let (seen, tokens) = (seen.clone(), text.get(w));
            let count = tokens.len();
            network.observe(tokens, count, move |layer, site, x| {
                let Some(place) = PLACES.iter().position(|(_, s, _)| *s == site) else { return Ok(()) };
                let mut seen = seen.lock().unwrap_or_else(|e| e.into_inner());
                widen(&mut seen[layer][place], x, x.len() / count)
            })?;
        }
        let mut seen = std::mem::take(&mut *seen.lock().unwrap_or_else(|e| e.into_inner()));
        let mut layers = vec![];
        for (block, seen) in model.blocks.iter().zip(&mut seen) {
            let mut of = |place: usize| -> Result<(Vec<f64>, Vec<f64>)> {
                let (kind, site, _) = PLACES[place];
                let mut columns = vec![];
                for linear in Linear::at(site) {
                    let w = &block.weights[linear].weight;
                    widen(&mut columns, w, w.cols())?;
                }
                let x = std::mem::take(&mut seen[place]);
                Ok(match kind {
                    // The query heads of a key and value head share its scales.
                    Scale::Values => {
                        (shared(&x, config.head_dim, config.group()), shared(&columns, config.head_dim, config.group()))
                    }
                    _ => (x, columns),
                })
            };
            layers.push([of(0)?, of(1)?, of(2)?, of(3)?]);
        }
        Ok(Self { layers })
    }

    /// Identity matrices with the scales of one exponent.
    fn rotations(&self, model: &Llama, exponent: f64) -> Result<Rotations> {
        let config = &model.config;
        let sizes = config.scale_sizes();
        let mut scales = Scales::default();
        for kind in [Scale::UpDown, Scale::Values, Scale::Norms] {
            let mut all = vec![];
            for layer in &self.layers {
                for ((x, w), _) in layer.iter().zip(PLACES).filter(|(_, (k, ..))| *k == kind) {
                    all.extend(x.iter().zip(w).map(|(x, w)| logarithm(*x, *w, exponent)));
                }
            }
            scales.set(kind, Some(Tensor::from_vec(all, kind.shape(&sizes))?));
        }
        Ok(Rotations::identity(config.hidden_size, config.head_dim, config.layers)?.with_scales(scales))
    }
}

/// `ln s`, within the bounds of scales ([`Scales::check`]); 0 where a range is.
fn logarithm(x: f64, w: f64, exponent: f64) -> f64 {
    if x == 0.0 || w == 0.0 { 0.0 } else { (exponent * x.ln() - (1.0 - exponent) * w.ln()).clamp(-20.0, 20.0) }
}

/// The larger of the ranges so far and those of the columns of x; none so far is 0.
fn widen(ranges: &mut Vec<f64>, x: &Tensor, cols: usize) -> Result<()> {
    let x = x.to_device(&Device::Cpu)?;
    ranges.resize(cols, 0.0);
    let mut each = |row: &mut dyn Iterator<Item = f64>| ranges.iter_mut().zip(row).for_each(|(r, x)| *r = r.max(x.abs()));
    if x.dtype() == DType::F64 {
        x.as_slice::<f64>()?.chunks(cols).for_each(|row| each(&mut row.iter().copied()));
    } else {
        let x = x.to_dtype(DType::F32)?;
        x.as_slice::<f32>()?.chunks(cols).for_each(|row| each(&mut row.iter().map(|x| f64::from(*x))));
    }
    Ok(())
}

/// The largest over the query heads of every key and value head.
fn shared(ranges: &[f64], head_dim: usize, group: usize) -> Vec<f64> {
    let heads = ranges.chunks(head_dim * group);
    let largest = |of: &[f64]| -> Vec<f64> {
        (0..head_dim).map(|d| of.iter().skip(d).step_by(head_dim).fold(0.0, |m: f64, x| m.max(*x))).collect()
    };
    heads.flat_map(largest).collect()
}
