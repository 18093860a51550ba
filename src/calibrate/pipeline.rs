//! From a model and rotations to a quantised network, layer by layer.
//!
//! For quantisers that need Hessians, calibration text runs through the network once. Every layer is fed by the already quantised
//! ones, and inside a layer q, k, v are quantised first, then o, then gate and up, then down, each on what its quantised predecessors
//! make of the text. Inputs are the rotated ones: o's values in R2's basis, down's input after R4.
//!
//! A quantiser that wants to know how far these inputs are from those in full precision ([`WeightQuantizer::wants_drift`]) makes the text run
//! through a second time, beside the first: through the same rotated and merged layers with nothing quantised. So does a layer that learns what
//! is free in it after its weights are quantised ([`Reconstruct`]).

use std::ops::ControlFlow;
use std::time::Instant;

use super::Reconstruct;
use super::stream::{Streams, exactly};
use crate::data::{self, Windows};
use crate::device::cpu;
use crate::llama::{Affine, Block, LayerWeights, Linears, Llama, Merged, Rotated};
use crate::quant::{QuantizedLinear, Scheme, Site, WeightQuantizer, quantize_by};
use crate::ranks::Group;
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tensor, io};

/// Tokens that go through a layer at once.
const TOKENS_AT_ONCE: usize = 4096;

/// The text that Hessians are measured on.
#[derive(Clone, Debug)]
pub struct Calibration<'a> {
    /// Where it comes from.
    pub text: &'a Windows,
    /// Which windows.
    pub windows: Vec<usize>,
    /// Quantise activations, K and V as the scheme says while calibrating. As published, they are not. Quantisers that correct for the
    /// difference to full precision do it in any case ([`WeightQuantizer::reads_quantized`]).
    pub quantize_activations: bool,
    /// Sequences that go through a layer at once. Changes only rounding, and what a step of [`Calibration::reconstruct`] reads.
    pub at_once: usize,
    /// What is learned of every layer once its weights are quantised. Activations, K and V are then quantised while calibrating.
    pub reconstruct: Option<Reconstruct>,
    /// The processes that share the windows: each runs some through the network, Hessians are summed, and all quantise all weights, to the
    /// same bits. Rank 0's [`LayerStore`] alone is asked and told. Nothing is reconstructed then.
    pub ranks: Group,
}

impl<'a> Calibration<'a> {
    /// The first `count` windows of a text.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are fewer: says how many there are.
    pub fn first(text: &'a Windows, count: usize) -> Result<Self> {
        if count == 0 || count > text.len() {
            let message = format!("expected 1 to {} windows of {} tokens, got {count}", text.len(), text.seq_len());
            return Err(Error::argument("calibration", format!("{message}; the text has no more")));
        }
        let at_once = (TOKENS_AT_ONCE / text.seq_len()).max(1);
        Ok(Self {
            text,
            windows: (0..count).collect(),
            quantize_activations: false,
            at_once,
            reconstruct: None,
            ranks: Group::alone(),
        })
    }

    /// `count` different windows of a text, drawn by `seed`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the text has fewer windows, or `count` is 0.
    pub fn random(text: &'a Windows, count: usize, seed: u64) -> Result<Self> {
        let windows = data::Sampler::new((0..text.len()).collect(), count.clamp(1, text.len()), seed)?.step(0);
        Ok(Self { windows, ..Self::first(text, count)? })
    }

    /// The same with activations, K and V quantised or not.
    pub fn quantize_activations(self, on: bool) -> Self {
        Self { quantize_activations: on, ..self }
    }

    /// The same with the windows shared by ranks.
    pub fn among(self, ranks: Group) -> Self {
        Self { ranks, ..self }
    }

    /// Checks that every rank has a window.
    ///
    /// # Errors
    /// [`Error::Argument`] with both numbers.
    pub fn check_shares(&self) -> Result<()> {
        let (windows, ranks) = (self.windows.len(), self.ranks.world());
        if windows >= ranks {
            return Ok(());
        }
        Err(Error::argument("calibration", format!("expected at least a window for each of {ranks} ranks, got {windows}")))
    }

    /// The same with something to learn of every layer, or nothing.
    pub fn reconstruct(self, reconstruct: Option<Reconstruct>) -> Self {
        Self { reconstruct, ..self }
    }
}

/// A layer's seven linears, quantised: what there is to keep of it.
#[derive(Clone, Debug)]
pub struct QuantizedLayer {
    /// Which layer, from 0.
    pub index: usize,
    /// Biases and norms are as they were.
    pub linears: Linears<Affine<QuantizedLinear>>,
    /// Clip constants that were learned after the weights were quantised, as in [`Block::with_clips`]; they stand in place of the layer's.
    pub clips: [Option<Tensor>; Site::ALL.len()],
}

impl QuantizedLayer {
    /// The weights to run with.
    pub fn weights(&self) -> LayerWeights {
        Linears(self.linears.0.each_ref().map(|l| l.with_weight(l.weight.weight.clone())))
    }

    /// The layer to run, made of the rotated one.
    pub fn block(&self, rotated: &Block) -> Block {
        let block = rotated.with_weights(self.weights());
        if self.clips.iter().any(Option::is_some) { block.with_clips(self.clips.clone()) } else { block }
    }
}

/// Keeps quantised layers, so that an interrupted run can go on where it stopped. `()` keeps nothing.
pub trait LayerStore {
    /// True of a layer saved earlier, by the same run.
    fn has(&self, index: usize) -> bool;
    /// A layer saved earlier, its weights in this type and on this device.
    ///
    /// # Errors
    /// The layer was not saved, or its file cannot be read or does not fit.
    fn load(&mut self, index: usize, dtype: DType, device: &Device) -> Result<QuantizedLayer>;
    /// Called with every new layer, in order.
    ///
    /// # Errors
    /// The layer cannot be written.
    fn save(&mut self, layer: &QuantizedLayer) -> Result<()>;
}

impl LayerStore for () {
    fn has(&self, _: usize) -> bool {
        false
    }
    fn load(&mut self, index: usize, _: DType, _: &Device) -> Result<QuantizedLayer> {
        Err(Error::argument("layer", format!("{index} was not kept")))
    }
    fn save(&mut self, _: &QuantizedLayer) -> Result<()> {
        Ok(())
    }
}

/// What happened to one layer, as told to the callback.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReport {
    /// Layers done, this one included.
    pub done: usize,
    /// Layers in all.
    pub layers: usize,
    /// The layer came from the [`LayerStore`].
    pub loaded: bool,
    /// The largest damping that a linear of this layer was given, where one was: more than asked for if a Hessian was not positive
    /// definite.
    pub damping: Option<f64>,
    /// Where the layer learned something after its weights were quantised ([`Calibration::reconstruct`]): the relative error
    /// `‖y − y₀‖² / ‖y₀‖²` of its output before and after.
    pub reconstruction: Option<(f64, f64)>,
    /// Wall-clock time of this layer.
    pub seconds: f64,
}

/// Merges rotations into the weights as [`Llama::merge`] does, and quantises them by `quantizer` on `calibration` text (which a
/// quantiser that needs no Hessian does without). `None`: the plain network ([`Scheme::unrotated`]). More in [`quantize_layers`].
///
/// # Errors
/// Those of [`quantize_layers`]; rotations of another size, or not orthogonal.
#[allow(clippy::too_many_arguments)]
pub fn quantize_weights(
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    quantizer: &dyn WeightQuantizer,
    calibration: Option<&Calibration<'_>>,
    store: &mut dyn LayerStore,
    progress: impl FnMut(&LayerReport) -> ControlFlow<()>,
) -> Result<Merged> {
    let rotated = Rotated::new(model, rotations, scheme)?;
    let mut blocks = Vec::with_capacity(model.config.layers);
    let placer = rotated.placer()?;
    quantize_layers(&rotated, quantizer, calibration, store, progress, |block| blocks.push(placer.place(blocks.len(), &block)))?;
    Merged::new(&rotated, blocks.into_iter().collect::<Result<_>>()?)
}

/// Quantises a rotated model layer by layer. `keep` is given every layer in order; one that lets go of them needs the memory of
/// one layer, and of the hidden states of all calibration tokens T: T·(C + max(H·D, F)) values at most. A quantiser that wants drifts needs
/// these twice, the layer's weights twice, and for an input of n values, besides its Hessian and factor, four more n×n matrices in `f64`.
/// A layer that learns ([`Calibration::reconstruct`]) needs the hidden states in front of and behind it in both networks, and what a step of
/// the layer on [`Calibration::at_once`] sequences keeps.
/// `progress` hears of every layer and may stop the run, after the layer was saved.
///
/// # Errors
/// No calibration text where it is needed; what the quantiser and the store report; [`Error::Interrupted`] when stopped; [`Error::Rank`] of
/// another of [`Calibration::ranks`].
pub fn quantize_layers(
    rotated: &Rotated<'_>,
    quantizer: &dyn WeightQuantizer,
    calibration: Option<&Calibration<'_>>,
    store: &mut dyn LayerStore,
    progress: impl FnMut(&LayerReport) -> ControlFlow<()>,
    keep: impl FnMut(Block),
) -> Result<()> {
    let ranks = calibration.map_or(Group::nobody(), |c| &c.ranks);
    layers_among(ranks, rotated, quantizer, calibration, store, progress, keep).inspect_err(|e| ranks.fail(e))
}

/// A layer that rank 0 has, with its weights at every rank.
fn handed_on(ranks: &Group, rotated: &Rotated<'_>, index: usize, layer: Option<QuantizedLayer>) -> Result<QuantizedLayer> {
    let bytes = |w: &Tensor| Ok(io::bytes(&w.to_device(&Device::Cpu)?)?.to_vec());
    if let Some(layer) = layer {
        if ranks.world() > 1 {
            layer
                .linears
                .iter()
                .try_for_each(|(_, l)| ranks.broadcast("weights of a layer", bytes(&l.weight.weight)?).map(drop))?;
        }
        return Ok(layer);
    }
    let linears = rotated.block(index)?.weights.each(|_, l| {
        let bytes = ranks.broadcast("weights of a layer", vec![])?;
        let weight = io::from_bytes(l.weight.dtype(), l.weight.shape(), &bytes)?.to_device(rotated.device())?;
        Ok(l.with_weight(QuantizedLinear::exact(&weight)))
    })?;
    Ok(QuantizedLayer { index, linears, clips: Default::default() })
}

fn layers_among(
    ranks: &Group,
    rotated: &Rotated<'_>,
    quantizer: &dyn WeightQuantizer,
    calibration: Option<&Calibration<'_>>,
    store: &mut dyn LayerStore,
    mut progress: impl FnMut(&LayerReport) -> ControlFlow<()>,
    mut keep: impl FnMut(Block),
) -> Result<()> {
    let layers = rotated.config().layers;
    let spec = rotated.scheme().sites(rotated.config().head_dim).weight;
    ranks.attach(rotated.device())?;
    let saved = if ranks.is_first() { (0..layers).take_while(|&i| store.has(i)).count() } else { 0 };
    let saved = ranks.broadcast("how many layers are kept", saved.to_string().into())?;
    let saved = String::from_utf8_lossy(&saved).parse().unwrap_or(0);
    let reconstruct = calibration.and_then(|c| c.reconstruct.as_ref());
    if reconstruct.is_some() && ranks.world() > 1 {
        let message = format!("layers are reconstructed by one process, got {} ranks", ranks.world());
        return Err(Error::argument("reconstruct", message));
    }
    reconstruct.map_or(Ok(()), |by| by.check(rotated.scheme()))?;
    let sweeps = quantizer.needs_hessian() && spec.is_active();
    let mut streams = match calibration {
        _ if !sweeps && reconstruct.is_none() || saved == layers => None,
        Some(c) => Some(Streams::new(rotated, quantizer, c)?),
        None => return Err(Error::argument("calibration", format!("{} needs calibration text, got none", quantizer.name()))),
    };
    for index in 0..layers {
        let start = Instant::now();
        let loaded = index < saved;
        let exact = if loaded && !streams.as_ref().is_some_and(Streams::are_two) { None } else { Some(rotated.block(index)?) };
        let inputs = streams.as_ref().filter(|_| !loaded && reconstruct.is_some()).map(Streams::inputs);
        let (mut layer, mut block) = if loaded {
            let kept = ranks.is_first().then(|| store.load(index, rotated.dtype(), rotated.device())).transpose()?;
            let layer = handed_on(ranks, rotated, index, kept)?;
            let block = layer.block(&rotated.block_of(index, layer.weights())?);
            (layer, block)
        } else {
            let block = exact.clone().expect("of a layer that is not loaded");
            let linears = match &mut streams {
                _ if !spec.is_active() => block.weights.each(|_, l| Ok(l.with_weight(QuantizedLinear::exact(&l.weight))))?,
                Some(streams) if sweeps => streams.quantize(&block, quantizer, &spec, rotated.weight_clips(index)?.as_ref())?,
                _ => {
                    let all = block.weights.0.each_ref().map(|l| &l.weight);
                    let clips = rotated.weight_clips(index)?;
                    let clips = clips.as_ref().map(|clips| clips.0.each_ref());
                    let done = quantize_by(quantizer, &all, &spec, None, clips.as_ref().map(|clips| &clips[..]))?;
                    let mut done = exactly(all.len(), done)?.into_iter();
                    block.weights.each(|_, l| Ok(l.with_weight(done.next().expect("one for each"))))?
                }
            };
            let layer = QuantizedLayer { index, linears, clips: Default::default() };
            let block = layer.block(&block);
            (layer, block)
        };
        let (last, whole) = (index + 1 == layers, loaded || !sweeps);
        let mut reconstruction = None;
        match (streams.as_mut(), inputs, reconstruct, &exact) {
            (Some(streams), Some(inputs), Some(by), Some(exact)) => {
                let how = (by, quantizer.stores_scales_as());
                let errors;
                (layer, errors) = streams.reconstruct(rotated, (&block, layer), (exact, whole), inputs, how)?;
                block = layer.block(&block);
                reconstruction = Some(errors);
            }
            (Some(streams), ..) if !last => streams.pass(&block, exact.as_ref(), whole)?,
            _ => {}
        }
        drop(exact);
        if !loaded && ranks.is_first() {
            store.save(&layer)?;
        }
        let damping = layer.linears.iter().filter_map(|(_, l)| l.weight.damping).reduce(f64::max);
        let seconds = start.elapsed().as_secs_f64();
        let stop = progress(&LayerReport { done: index + 1, layers, loaded, damping, reconstruction, seconds }).is_break();
        if ranks.any("whether to stop behind a layer", stop)? && !last {
            return Err(Error::Interrupted { step: index + 1 });
        }
        keep(block);
    }
    if streams.take().is_some() {
        cpu::trim(); // what comes next uses other shapes
    }
    Ok(())
}
