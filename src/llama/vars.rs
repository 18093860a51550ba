//! What is learned of a whole model, on a tape.

use crate::llama::WeightClipVars;
use crate::llama::rotate::{LayerClips, LayerScales, clips_of};
use crate::quant::Site;
use crate::ranks::Group;
use crate::rotation::{ClipEnds, Rotations, Scale, Scales, WeightClips};
use crate::{Result, Tape, Tensor, Var};

/// R1 and every R2 on a tape.
#[derive(Clone)]
pub struct RotationVars<'t> {
    /// `[C, C]`.
    pub r1: Var<'t>,
    /// `[D, D]`, or `[K, D, D]`, for every layer.
    pub r2: Vec<Var<'t>>,
    /// The same of R2b, where there is one: for every layer or none.
    pub r2b: Vec<Var<'t>>,
    /// The scales of every layer.
    pub scales: Vec<LayerScales<'t>>,
    /// The clip constants of every layer.
    pub clips: Vec<LayerClips<'t>>,
    /// The clip ratios of weights.
    pub weight_clips: Option<WeightClipVars<'t>>,
    /// The gradient passes straight through where a value was clamped by clip constants ([`Around`](crate::llama::Around)); no by default.
    pub straight: bool,
    /// Ranks that make the rows of the rotated, quantised weights together, each its own; alone by default. All of them run the network as often
    /// and in the same way (scheme, tokens, [`Recompute`](crate::llama::Recompute)), forward and back, and sum the gradients of rotations, scales
    /// and clip ratios: a rank has those of its rows of weights by all ranks' tokens.
    pub rows: Group,
}

impl<'t> RotationVars<'t> {
    /// Rotations whose gradients are wanted.
    ///
    /// # Errors
    /// R2 cannot be cut into layers.
    pub fn variables(tape: &'t Tape, rotations: &Rotations) -> Result<Self> {
        Self::new(rotations, |t| tape.variable(t), |t| tape.variable(t))
    }
    /// Rotations that stay as they are.
    ///
    /// # Errors
    /// R2 cannot be cut into layers.
    pub fn constants(tape: &'t Tape, rotations: &Rotations) -> Result<Self> {
        Self::new(rotations, |t| tape.constant(t), |t| tape.constant(t))
    }
    /// Rotations and scales, which leave the full-precision network alone, as variables; clip ratios stay as they are.
    ///
    /// # Errors
    /// Those of [`RotationVars::variables`].
    pub fn of_transforms(tape: &'t Tape, rotations: &Rotations) -> Result<Self> {
        Self::new(rotations, |t| tape.variable(t), |t| tape.constant(t))
    }
    /// Clip ratios, of weights too, which change the network's function, as variables; rotations and scales stay as they are.
    ///
    /// # Errors
    /// Those of [`RotationVars::variables`].
    pub fn of_clips(tape: &'t Tape, rotations: &Rotations) -> Result<Self> {
        Self::new(rotations, |t| tape.constant(t), |t| tape.variable(t))
    }
    fn new(rotations: &Rotations, enter: impl Fn(Tensor) -> Var<'t>, clip: impl Fn(Tensor) -> Var<'t>) -> Result<Self> {
        let layers = |t: &Tensor| (0..rotations.layers()).map(|i| Ok(enter(t.index(i)?))).collect::<Result<Vec<_>>>();
        let (r2, r2b) = (layers(&rotations.r2)?, rotations.r2b.as_ref().map(layers).transpose()?.unwrap_or_default());
        let scales = (0..rotations.layers()).map(|i| LayerScales::of(&rotations.scales, i, &enter)).collect::<Result<_>>()?;
        let clips = (0..rotations.layers()).map(|i| clips_of(&rotations.clips, i, &clip)).collect::<Result<_>>()?;
        let weights = |clips| WeightClipVars::of(clips, rotations.layers(), &clip);
        let weight_clips = rotations.weight_clips.as_ref().map(weights).transpose()?;
        Ok(Self { r1: enter(rotations.r1.clone()), r2, r2b, scales, clips, weight_clips, straight: false, rows: Group::alone() })
    }
    /// R1 and R2 on a tape, without scales and clip constants.
    pub fn without_scales(r1: Var<'t>, r2: Vec<Var<'t>>) -> Self {
        let scales = vec![LayerScales::default(); r2.len()];
        let clips = vec![LayerClips::default(); r2.len()];
        Self { r1, r2, r2b: vec![], scales, clips, weight_clips: None, straight: false, rows: Group::alone() }
    }
    /// Their values.
    ///
    /// # Errors
    /// Layers that differ in shape.
    pub fn values(&self) -> Result<Rotations> {
        let stack = |v: &[Var<'t>]| Tensor::stack(&v.iter().map(|r| r.value().clone()).collect::<Vec<_>>());
        let r2b = if self.r2b.is_empty() { None } else { Some(stack(&self.r2b)?) };
        let (scales, clips) = (self.stacked(|v| Ok(v.value().clone()))?, self.stacked_clips(|v| Ok(v.value().clone()))?);
        let weight_clips = self.weight_clips.as_ref().map(|w| w.stacked(|v| Ok(v.value().clone()))).transpose()?;
        let rotations = Rotations::new(self.r1.value().clone(), stack(&self.r2)?);
        Ok(Rotations { r2b, weight_clips, ..rotations.with_scales(scales).with_clips(clips) })
    }
    /// The gradients of the logarithms of scales.
    ///
    /// # Errors
    /// Those of [`Gradients::take`](crate::tape::Gradients::take).
    pub fn scale_gradients(&self, grads: &mut crate::tape::Gradients) -> Result<Scales> {
        self.stacked(|v| grads.take(v))
    }
    /// The gradients of the clip constants.
    ///
    /// # Errors
    /// Those of [`Gradients::take`](crate::tape::Gradients::take).
    pub fn clip_gradients(&self, grads: &mut crate::tape::Gradients) -> Result<ClipEnds> {
        self.stacked_clips(|v| grads.take(v))
    }
    /// The gradients of the clip ratios of weights, where there are some.
    ///
    /// # Errors
    /// Those of [`Gradients::take`](crate::tape::Gradients::take).
    pub fn weight_clip_gradients(&self, grads: &mut crate::tape::Gradients) -> Result<Option<WeightClips>> {
        self.weight_clips.as_ref().map(|w| w.stacked(|v| grads.take(v))).transpose()
    }
    /// What `f` makes of every clip constant, layers stacked.
    fn stacked_clips(&self, mut f: impl FnMut(&Var<'t>) -> Result<Tensor>) -> Result<ClipEnds> {
        let mut clips = ClipEnds::default();
        for site in Site::ALL {
            let layers = self.clips.iter().filter_map(|layer| layer[site as usize].as_ref());
            let layers = layers.map(&mut f).collect::<Result<Vec<_>>>()?;
            if !layers.is_empty() {
                clips.set(site, Some(Tensor::stack(&layers)?));
            }
        }
        Ok(clips)
    }
    /// What `f` makes of every scale, layers stacked.
    fn stacked(&self, mut f: impl FnMut(&Var<'t>) -> Result<Tensor>) -> Result<Scales> {
        let mut scales = Scales::default();
        for kind in Scale::ALL {
            let mut layers = vec![];
            for layer in &self.scales {
                let of: Vec<&Var<'t>> = match kind {
                    Scale::UpDown => layer.up_down.iter().collect(),
                    Scale::Values => layer.values.iter().collect(),
                    Scale::Norms => layer.norms.iter().flatten().collect(),
                    Scale::RopePairs => layer.rope_pairs.iter().collect(),
                    Scale::ValuesGeneral => layer.values_general.iter().collect(),
                };
                let mut parts = of.into_iter().map(&mut f).collect::<Result<Vec<_>>>()?;
                match (kind, parts.len()) {
                    (_, 0) => {}
                    (Scale::Norms, _) => layers.push(Tensor::stack(&parts)?),
                    _ => layers.extend(parts.pop()),
                }
            }
            if !layers.is_empty() {
                scales.set(kind, Some(Tensor::stack(&layers)?));
            }
        }
        Ok(scales)
    }
    /// dL/dR1 `[1, C, C]`, dL/dR2 `[L, D, D]` or `[L·K, D, D]`, and that of R2b where there is one, as an optimiser takes them.
    ///
    /// # Errors
    /// Those of [`Gradients::take`](crate::tape::Gradients::take).
    pub fn gradients(&self, grads: &mut crate::tape::Gradients) -> Result<Vec<Tensor>> {
        let r1 = grads.take(&self.r1)?;
        let n = r1.cols();
        let mut all = vec![r1.reshape([1, n, n])?];
        for matrices in [&self.r2, &self.r2b].into_iter().filter(|m| !m.is_empty()) {
            let layers = matrices.iter().map(|r| grads.take(r)).collect::<Result<Vec<_>>>()?;
            let stack = Tensor::stack(&layers)?;
            let n = stack.cols();
            let count = stack.len() / (n * n).max(1);
            all.push(stack.reshape([count, n, n])?);
        }
        Ok(all)
    }
}
