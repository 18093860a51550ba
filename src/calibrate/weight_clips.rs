//! The clip ratios of weights that learning begins with: those that the scheme's rule finds on the rotated weights, row by row.

use std::ops::ControlFlow;

use crate::llama::{Linear, Linears, Llama, Rotated, weight_clip_kinds};
use crate::ops::fake_quant::scales;
use crate::quant::{Clip, QuantSpec, Scheme};
use crate::ranks::Group;
use crate::rotation::{Rotations, WeightClips};
use crate::{Error, Result, Tensor};

/// The ratio of every row (or group) of every weight, both ends alike, as the scheme's rule for weights has it: what the search finds, or the
/// ratio that is given. The network that they quantise is the one that the rule does. In `f64`; `progress` hears of every layer and may
/// stop.
///
/// # Errors
/// A scheme that does not quantise weights; rotations of another model; [`Error::Interrupted`].
pub fn search_weight_clips(
    model: &Llama,
    rotations: &Rotations,
    scheme: &Scheme,
    progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<WeightClips> {
    search_weight_clips_among(&Group::alone(), model, rotations, scheme, progress)
}

/// [`search_weight_clips`] with the layers shared by ranks; all get all ratios. `progress` hears of every layer of this rank's share.
///
/// # Errors
/// Those of [`search_weight_clips`] and of [`Group::gather`].
pub fn search_weight_clips_among(
    ranks: &Group,
    model: &Llama,
    rotations: &Rotations,
    scheme: &Scheme,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<WeightClips> {
    let (config, spec) = (&model.config, scheme.sites(model.config.head_dim).weight);
    if !spec.is_active() {
        return Err(Error::argument("clip ratios of weights", format!("expected weights of 2 to 8 bits, got {scheme}")));
    }
    // Nothing is clipped otherwise while the search looks.
    let rotations = rotations.clone().with_weight_clips(None);
    let rotated = Rotated::new(model, Some(&rotations), scheme)?;
    let mut found = Linears([const { vec![] }; Linear::ALL.len()]);
    let share = ranks.share(config.layers);
    for l in share.clone() {
        let block = rotated.block(l)?;
        for (linear, w) in block.weights.iter() {
            found[linear].extend(logarithms(&w.weight, &spec)?);
        }
        let done = l + 1 - share.start;
        if progress(done, share.len()).is_break() && done < share.len() {
            return Err(Error::Interrupted { step: 0 });
        }
    }
    for linear in Linear::ALL {
        found[linear] = ranks.gather_numbers("clip ratios of weights", &found[linear])?.concat();
    }
    let mut tensor = |linear| {
        let shape = [config.layers, weight_clip_kinds(linear, config, scheme)?, 2];
        Tensor::from_vec(std::mem::take(&mut found[linear]), shape)
    };
    let Linears(linears) = Linears::try_from_fn(&mut tensor)?;
    Ok(WeightClips::new(scheme.weight_grid_name(), linears))
}

/// Both logarithms of every row's (or group's) ratio.
fn logarithms(w: &Tensor, spec: &QuantSpec) -> Result<Vec<f64>> {
    let (found, whole) = (scales(w, spec)?.to_f64_vec()?, scales(w, &spec.clipped(Clip::Ratio(1.0)))?.to_f64_vec()?);
    let ratio = |found: f64, whole: f64| match spec.clip {
        // A candidate of the search, to its last bit.
        Clip::Search => (100.0 * found / whole).round() / 100.0,
        Clip::Ratio(ratio) => ratio,
    };
    Ok(found.into_iter().zip(whole).flat_map(|(found, whole)| [ratio(found, whole).ln(); 2]).collect())
}
