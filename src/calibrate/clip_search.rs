//! Finding the clip ratio of every quantiser site on calibration text.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use crate::data::Windows;
use crate::eval::perplexity_among;
use crate::llama::{Llama, Merged, Rotated, Walk};
use crate::ops::mean_square::square;
use crate::quant::{Clip, ClipRatios, Scheme, Site};
use crate::ranks::Group;
use crate::rotation::{ClipEnds, Rotations};
use crate::{Error, Result, Tape, Tensor};

/// What a clip ratio should make small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClipGoal {
    /// The relative error `‖x − Q(x)‖² / ‖x‖²` of what is quantised, averaged over layers: each site by itself.
    Error,
    /// The cross entropy of the whole quantised network, one site after the other; holds that network beside the model, which takes as
    /// much memory again.
    Loss,
}

impl FromStr for ClipGoal {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "error" => Ok(Self::Error),
            "loss" => Ok(Self::Loss),
            _ => Err(Error::argument("clip search", format!("expected error or loss, got {s:?}"))),
        }
    }
}

impl fmt::Display for ClipGoal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "error",
            Self::Loss => "loss",
        })
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipFound {
    /// The ratios.
    pub ratios: ClipRatios,
    /// Those of every layer: by [`ClipGoal::Error`] the best of the layer by itself, otherwise the same for all.
    pub layers: Vec<ClipRatios>,
    /// The goal at ratios of 1 and at these. For [`ClipGoal::Error`] the mean over the sites that are quantised.
    pub goal: (f64, f64),
    /// How many ratios were tried.
    pub tried: usize,
}

/// Distance of neighbouring candidates.
const STEP: f64 = 0.05;
/// Candidates of a site: 1, 0.95, … 0.5.
const CANDIDATES: usize = 11;

/// Finds the clip ratio of every site of a rotated network whose activations, K or V a scheme quantises, on windows of text.
///
/// By [`ClipGoal::Error`]: what reaches the quantisers of the quantised network is read once, a layer at a time ([`Walk`]), and every
/// candidate ratio tried on it. By [`ClipGoal::Loss`]: from ratios of 1, the sites in the order a layer meets them, each set to the best
/// candidate; then each to the better of its neighbours half a step away, as long as one is better. Ties keep the larger ratio.
/// `progress` is told how many of about how many evaluations are done, and may stop.
///
/// # Errors
/// No windows, or one there is not; a loss that is not finite; [`Error::Interrupted`].
pub fn search_clips(
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    text: &Windows,
    windows: &[usize],
    goal: ClipGoal,
    progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<ClipFound> {
    search_clips_among(Group::nobody(), model, rotations, scheme, (text, windows), goal, progress)
}

/// [`search_clips`] with the windows shared by ranks; all find the same, what one rank finds.
///
/// # Errors
/// Those of [`search_clips`] and of [`Group::gather`].
pub fn search_clips_among(
    ranks: &Group,
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    (text, windows): (&Windows, &[usize]),
    goal: ClipGoal,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<ClipFound> {
    if windows.is_empty() {
        return Err(Error::argument("clip search", "expected at least one window to search on, got 0"));
    }
    if windows.iter().any(|w| *w >= text.len()) {
        return Err(Error::argument("clip search", format!("expected windows below {}, got {windows:?}", text.len())));
    }
    let start = Scheme { activation_clip: ClipRatios::NONE, ..*scheme };
    // Nothing is clipped while the search looks.
    let rotations = rotations.map(|r| r.clone().with_clips(ClipEnds::default()));
    let rotations = rotations.as_ref();
    let rotated = Rotated::new(model, rotations, &start)?;
    let sites = rotated.scheme().active_sites();
    if sites.is_empty() {
        let layers = vec![ClipRatios::NONE; model.config.layers];
        return Ok(ClipFound { ratios: ClipRatios::NONE, layers, goal: (0.0, 0.0), tried: 0 });
    }
    match goal {
        ClipGoal::Error => by_error(ranks, &rotated, (text, windows), &sites, &mut progress),
        ClipGoal::Loss => by_loss(ranks, model.merge(rotations, &start)?, (text, windows), &sites, &mut progress),
    }
}

fn candidate(i: usize) -> f64 {
    1.0 - STEP * i as f64
}

type Report<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

fn told(progress: Report<'_>, done: usize, total: usize) -> Result<()> {
    if progress(done, total.max(done)).is_break() { Err(Error::Interrupted { step: done }) } else { Ok(()) }
}

/// The relative error of every candidate, by site, window and layer: summed in that order, in whichever they come.
type Errors = BTreeMap<(Site, usize, usize), [f64; CANDIDATES]>;

/// The errors on the windows of all ranks.
fn gathered(ranks: &Group, own: Errors) -> Result<Errors> {
    let mut numbers = vec![];
    for ((site, window, layer), errors) in own {
        let site = Site::ALL.into_iter().position(|s| s == site).expect("one of all");
        numbers.extend([site, window, layer].map(|i| i as f64));
        numbers.extend(errors);
    }
    let all = ranks.gather_numbers("errors of clip ratios", &numbers)?.concat();
    let one = |x: &[f64]| ((Site::ALL[x[0] as usize], x[1] as usize, x[2] as usize), std::array::from_fn(|i| x[3 + i]));
    Ok(all.chunks_exact(3 + CANDIDATES).map(one).collect())
}

fn by_error(
    ranks: &Group,
    rotated: &Rotated<'_>,
    (text, windows): (&Windows, &[usize]),
    sites: &[Site],
    progress: Report<'_>,
) -> Result<ClipFound> {
    let seen: Arc<Mutex<Errors>> = Arc::default();
    let (config, specs) = (rotated.config(), rotated.scheme().sites(rotated.config().head_dim));
    let measure = move |site: Site, x: &Tensor| -> Result<[f64; CANDIDATES]> {
        let whole = square(x)?;
        let mut errors = [0.0; CANDIDATES];
        for (i, error) in errors.iter_mut().enumerate().filter(|_| whole > 0.0) {
            let spec = specs.at(site).clipped(Clip::Ratio(candidate(i)));
            let y = Tape::new().constant(x.clone()).fake_quant(&spec)?.into_value();
            *error = square(&Tensor::axpby(1.0, y, -1.0, x.clone())?)? / whole;
        }
        Ok(errors)
    };
    let share = ranks.share(windows.len());
    let parts: Vec<&[u32]> = windows[share.clone()].iter().map(|&w| text.get(w)).collect();
    let mut walk = Walk::new(rotated, &parts, text.seq_len())?;
    for layer in (0..config.layers).filter(|_| !parts.is_empty()) {
        let (seen, sites) = (seen.clone(), sites.to_vec());
        walk.layer(move |window, site, x| {
            if sites.contains(&site) {
                let errors = measure(site, x)?;
                seen.lock().unwrap_or_else(|e| e.into_inner()).insert((site, share.start + window, layer), errors);
            }
            Ok(())
        })?;
        told(progress, layer + 1, config.layers)?;
    }
    let mut sums: BTreeMap<Site, [f64; CANDIDATES]> = BTreeMap::new();
    let mut by_layer: BTreeMap<(usize, Site), [f64; CANDIDATES]> = BTreeMap::new();
    let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(|e| e.into_inner()));
    for ((site, _, layer), errors) in gathered(ranks, seen)? {
        for sum in [sums.entry(site).or_default(), by_layer.entry((layer, site)).or_default()] {
            sum.iter_mut().zip(errors).for_each(|(sum, e)| *sum += e);
        }
    }
    let best_of = |errors: &[f64; CANDIDATES]| (1..CANDIDATES).fold(0, |best, i| if errors[i] < errors[best] { i } else { best });
    let (mut ratios, mut goal) = (ClipRatios::NONE, (0.0, 0.0));
    let count = (sums.len() * windows.len() * config.layers) as f64;
    for (site, errors) in &sums {
        let best = best_of(errors);
        if !errors[best].is_finite() {
            return Err(Error::numeric("clip search", format!("the error at {} is {}", site.name(), errors[best])));
        }
        ratios = ratios.with(*site, candidate(best))?;
        goal = (goal.0 + errors[0] / count, goal.1 + errors[best] / count);
    }
    let mut layers = vec![ClipRatios::NONE; config.layers];
    for ((layer, site), errors) in &by_layer {
        layers[*layer] = layers[*layer].with(*site, candidate(best_of(errors)))?;
    }
    Ok(ClipFound { ratios, layers, goal, tried: CANDIDATES * sums.len() })
}

fn by_loss(
    ranks: &Group,
    mut network: Merged,
    (text, windows): (&Windows, &[usize]),
    sites: &[Site],
    progress: Report<'_>,
) -> Result<ClipFound> {
    let text = Windows::new(text.batch(windows), text.seq_len())?;
    let (mut tried, about) = (0, 1 + sites.len() * (CANDIDATES + 2));
    let mut loss = |ratios: ClipRatios| -> Result<f64> {
        network.scheme.activation_clip = ratios;
        let scored = perplexity_among(ranks, &network, None, &text, |_| ControlFlow::Continue(()));
        let failed = |e| match e {
            e @ Error::Rank { .. } => e,
            e => Error::numeric(format!("clip ratios {ratios}"), e),
        };
        let mean = scored.map_err(failed)?.0.perplexity.ln();
        tried += 1;
        told(progress, tried, about)?;
        Ok(mean)
    };
    let mut ratios = ClipRatios::NONE;
    let first = loss(ratios)?;
    let mut best = first;
    for &site in sites {
        for i in 1..CANDIDATES {
            let with = ratios.with(site, candidate(i))?;
            let new = loss(with)?;
            if new < best {
                (best, ratios) = (new, with);
            } else if candidate(i) < ratios.at(site) - 3.5 * STEP {
                break; // well past the minimum
            }
        }
    }
    for &site in sites {
        for toward in [0.5 * STEP, -0.5 * STEP] {
            let near = ratios.at(site) + toward;
            if near <= 1.0 {
                let with = ratios.with(site, near)?;
                let new = loss(with)?;
                if new < best {
                    (best, ratios) = (new, with);
                    break;
                }
            }
        }
    }
    let layers = vec![ratios; network.config.layers];
    Ok(ClipFound { ratios, layers, goal: (first, best), tried })
}
