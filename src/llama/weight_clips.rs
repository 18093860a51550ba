//! Learned clip ratios of a model's weights: a layer's, on a tape or not.

use crate::llama::{Linear, Linears, LlamaConfig};
use crate::quant::Scheme;
use crate::rotation::{Rotations, WeightClips};
use crate::{Error, Result, Tensor, Var};

/// Clip ratios of weights on a tape.
#[derive(Clone)]
pub struct WeightClipVars<'t> {
    /// What grid they are for ([`WeightClips::grid`]).
    pub grid: String,
    /// Their logarithms `[kinds, 2]`, for every layer.
    pub layers: Vec<Linears<Var<'t>>>,
}

impl<'t> WeightClipVars<'t> {
    /// Each made a variable or a constant by `enter`.
    ///
    /// # Errors
    /// Logarithms that cannot be cut into layers.
    pub(crate) fn of(clips: &WeightClips, layers: usize, enter: impl Fn(Tensor) -> Var<'t>) -> Result<Self> {
        let layer = |l: usize| layer_of(clips, l)?.each(|_, t| Ok(enter(t.clone())));
        Ok(Self { grid: clips.grid().to_string(), layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    /// What `f` makes of each, layers stacked.
    ///
    /// # Errors
    /// The first of `f`; layers that differ in shape.
    pub(crate) fn stacked(&self, mut f: impl FnMut(&Var<'t>) -> Result<Tensor>) -> Result<WeightClips> {
        let mut stack = |linear: Linear| {
            let layers = self.layers.iter().map(|layer| f(&layer[linear])).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&layers)
        };
        let Linears(all) = Linears::try_from_fn(&mut stack)?;
        Ok(WeightClips::new(&self.grid, all))
    }
}

/// Those of layer `l`, `[kinds, 2]` a linear.
///
/// # Errors
/// No such layer.
pub(crate) fn layer_of(clips: &WeightClips, l: usize) -> Result<Linears<Tensor>> {
    Linears::from_vec(clips.iter().map(|(_, t)| t.index(l)).collect::<Result<_>>()?)
}

/// Rows of a linear's weight, or groups of all of them: what a scheme gives a scale each.
///
/// # Errors
/// A group that does not divide the row.
pub(crate) fn kinds(linear: Linear, config: &LlamaConfig, scheme: &Scheme) -> Result<usize> {
    let [out, inputs] = linear.shape(config);
    let group = scheme.sites(config.head_dim).weight.group_size(inputs)?;
    Ok(out * (inputs / group))
}

/// Checks that the clip ratios of weights that rotations have, if any, are those of a network of this configuration and scheme: a pair for
/// every scale. Where the scheme does not quantise weights they do not count.
///
/// # Errors
/// Those of [`Rotations::weight_clips_for`]; [`Error::Shape`] names a linear with another number of rows.
pub(crate) fn check(rotations: &Rotations, config: &LlamaConfig, scheme: &Scheme) -> Result<()> {
    let Some(clips) = rotations.weight_clips_for(scheme)? else { return Ok(()) };
    for (linear, (name, t)) in Linear::ALL.into_iter().zip(clips.iter()) {
        let expected = [config.layers, kinds(linear, config, scheme)?, 2];
        if t.shape() != expected {
            return Err(Error::shape(format!("clip ratios of weights, {name}"), format!("{expected:?}"), t.shape()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_have_their_names() {
        assert_eq!(Linear::ALL.map(|linear| linear.row().name), WeightClips::NAMES);
    }
}
