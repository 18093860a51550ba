//! From a model and rotations to a quantised network, layer by layer.
//!
//! For quantisers that need Hessians, calibration text runs through the network once. Every layer is fed by the already quantised
//! ones, and inside a layer q, k, v are quantised first, then o, then gate and up, then down, each on what its quantised predecessors
//! make of the text. Inputs are the rotated ones: o's values in R2's basis, down's input after R4.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::data::{self, Windows};
use crate::device::cpu;
use crate::llama::{Affine, Around, Block, LayerWeights, Linear, LinearVars, Linears, Llama, Merged, Rotated, Run, plus};
use crate::quant::{Hessian, QuantizedLinear, Scheme, Site, WeightQuantizer};
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tape, Tensor, Var};

/// Tokens that go through a layer at once.
const TOKENS_AT_ONCE: usize = 4096;

/// The text that Hessians are measured on.
#[derive(Clone, Debug)]
pub struct Calibration<'a> {
    /// Where it comes from.
    pub text: &'a Windows,
    /// Which windows.
    pub windows: Vec<usize>,
    /// Quantise activations, K and V as the scheme says while calibrating. As published, they are not.
    pub quantize_activations: bool,
    /// Sequences that go through a layer at once; changes only rounding.
    pub at_once: usize,
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
        Ok(Self { text, windows: (0..count).collect(), quantize_activations: false, at_once })
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
}

/// A layer's seven linears, quantised: what there is to keep of it.
#[derive(Clone, Debug)]
pub struct QuantizedLayer {
    /// Which layer, from 0.
    pub index: usize,
    /// Biases and norms are as they were.
    pub linears: Linears<Affine<QuantizedLinear>>,
}

impl QuantizedLayer {
    /// The weights to run with.
    pub fn weights(&self) -> LayerWeights {
        Linears(self.linears.0.each_ref().map(|l| l.with_weight(l.weight.weight.clone())))
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
    quantize_layers(&rotated, quantizer, calibration, store, progress, |block| blocks.push(block))?;
    Merged::new(&rotated, blocks)
}

/// Quantises a rotated model layer by layer. `keep` is given every layer in order; one that lets go of them needs the memory of
/// one layer, and of the hidden states of all calibration tokens T: T·(C + max(H·D, F)) values at most. `progress` hears of every
/// layer and may stop the run, after the layer was saved.
///
/// # Errors
/// No calibration text where it is needed; what the quantiser and the store report; [`Error::Interrupted`] when stopped.
pub fn quantize_layers(
    rotated: &Rotated<'_>,
    quantizer: &dyn WeightQuantizer,
    calibration: Option<&Calibration<'_>>,
    store: &mut dyn LayerStore,
    mut progress: impl FnMut(&LayerReport) -> ControlFlow<()>,
    mut keep: impl FnMut(Block),
) -> Result<()> {
    let layers = rotated.config().layers;
    let spec = rotated.scheme().sites(rotated.config().head_dim).weight;
    let saved = (0..layers).take_while(|&i| store.has(i)).count();
    let mut stream = match calibration {
        _ if !quantizer.needs_hessian() || !spec.is_active() || saved == layers => None,
        Some(c) => Some(Stream::new(rotated, c)?),
        None => return Err(Error::argument("calibration", format!("{} needs calibration text, got none", quantizer.name()))),
    };
    for index in 0..layers {
        let start = Instant::now();
        let loaded = index < saved;
        let (layer, block) = if loaded {
            let layer = store.load(index, rotated.dtype(), rotated.device())?;
            let block = rotated.block_of(index, layer.weights())?;
            (layer, block)
        } else {
            let block = rotated.block(index)?;
            let linears = match &mut stream {
                _ if !spec.is_active() => block.weights.each(|_, l| Ok(l.with_weight(QuantizedLinear::exact(&l.weight))))?,
                Some(stream) => stream.quantize(&block, |w, h| quantizer.quantize(w, &spec, Some(h)))?,
                None => {
                    let all = block.weights.0.each_ref().map(|l| &l.weight);
                    let mut done = exactly(all.len(), quantizer.quantize(&all, &spec, None)?)?.into_iter();
                    block.weights.each(|_, l| Ok(l.with_weight(done.next().expect("one for each"))))?
                }
            };
            let layer = QuantizedLayer { index, linears };
            let block = block.with_weights(layer.weights());
            (layer, block)
        };
        let last = index + 1 == layers;
        if let Some(stream) = stream.as_mut().filter(|_| !last) {
            stream.pass(&block, loaded)?;
        }
        if !loaded {
            store.save(&layer)?;
        }
        let damping = layer.linears.iter().filter_map(|(_, l)| l.weight.damping).reduce(f64::max);
        let seconds = start.elapsed().as_secs_f64();
        if progress(&LayerReport { done: index + 1, layers, loaded, damping, seconds }).is_break() && !last {
            return Err(Error::Interrupted { step: index + 1 });
        }
        keep(block);
    }
    if stream.take().is_some() {
        cpu::trim(); // what comes next uses other shapes
    }
    Ok(())
}

/// The calibration text on its way through the network, some sequences at a time.
struct Stream {
    run: Run,
    sequences: usize,
    /// The hidden states `[tokens, C]` in front of the current layer, behind attention once o is quantised.
    x: Vec<Tensor>,
    /// The input of o, then that of down, of the weights quantised so far.
    inner: Vec<Tensor>,
}

impl Stream {
    fn new(rotated: &Rotated<'_>, c: &Calibration<'_>) -> Result<Self> {
        let seq = c.text.seq_len();
        if c.windows.is_empty() || c.at_once == 0 || c.windows.iter().any(|&w| w >= c.text.len()) {
            let message = format!("expected windows below {}, at least one and one at once", c.text.len());
            return Err(Error::argument("calibration", message));
        }
        let scheme = match c.quantize_activations {
            true => *rotated.scheme(),
            false => Scheme { activation_bits: 16, key_bits: 16, value_bits: 16, ..*rotated.scheme() },
        };
        let table = rotated.embedding()?;
        let embed = |windows: &[usize]| {
            let tape = Tape::new();
            Ok(tape.constant(table.clone()).embedding(c.text.batch(windows).into())?.into_value())
        };
        let x = c.windows.chunks(c.at_once).map(embed).collect::<Result<_>>()?;
        let run = Run::new(rotated.config(), &scheme, seq, rotated.dtype(), rotated.device())?;
        Ok(Self { run, sequences: c.windows.len(), x, inner: vec![] })
    }

    /// Quantises the weights of a layer, those of one input at a time; afterwards `x` and `inner` hold what its output is made of.
    fn quantize(
        &mut self,
        block: &Block,
        quantize: impl Fn(&[&Tensor], &Tensor) -> Result<Vec<QuantizedLinear>>,
    ) -> Result<Linears<Affine<QuantizedLinear>>> {
        let mut w = block.weights.clone();
        let mut done = Linears([const { None }; 7]);
        for site in Site::ALL {
            let members: Vec<Linear> = Linear::at(site).collect();
            let weights: Vec<Tensor> = members.iter().map(|&l| w[l].weight.clone()).collect();
            let Some(first) = weights.first() else { continue };
            let mut h = Hessian::new(first.cols());
            self.reach(site, block, &w, |x| h.add(x))?;
            let quantized = quantize(&weights.iter().collect::<Vec<_>>(), &h.finish(self.sequences)?)?;
            for (linear, quantized) in members.into_iter().zip(exactly(weights.len(), quantized)?) {
                w[linear].weight = quantized.weight.clone();
                done[linear] = Some(w[linear].with_weight(quantized));
            }
        }
        Ok(Linears(done.0.map(|l| l.expect("every linear is at one site"))))
    }

    /// Moves on behind a layer: all of it, or what [`Stream::quantize`] has left to do.
    fn pass(&mut self, block: &Block, whole: bool) -> Result<()> {
        let w = &block.weights;
        if whole {
            self.attend(block, w, |_| Ok(()))?;
            self.add(&w[Linear::O])?;
            self.gate(block, w, |_| Ok(()))?;
        }
        self.add(&w[Linear::Down])
    }

    /// Moves on inside a layer to the input of the linears at `site`, which is shown to `see`, with the weights `w` so far.
    fn reach(&mut self, site: Site, block: &Block, w: &LayerWeights, mut see: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        match site {
            Site::AttentionInput => self
                .x
                .iter()
                .try_for_each(|x| see(&value(|t| block.attention_input(t.constant(x.clone()), &Around::default(), &self.run))?)),
            Site::AttentionOutput => self.attend(block, w, see),
            Site::MlpInput => {
                self.add(&w[Linear::O])?;
                self.x
                    .iter()
                    .try_for_each(|x| see(&value(|t| block.mlp_input(t.constant(x.clone()), &Around::default(), &self.run))?))
            }
            Site::DownInput => self.gate(block, w, see),
            Site::Key | Site::Value => Ok(()),
        }
    }

    /// `inner` becomes the input of o, which is shown to `see`.
    fn attend(&mut self, block: &Block, w: &LayerWeights, mut see: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        for x in &self.x {
            let a = value(|t| {
                let qkv = [Linear::Q, Linear::K, Linear::V].map(|l| on(t, &w[l]));
                let bare = &Around::default();
                block.attend(block.attention_input(t.constant(x.clone()), bare, &self.run)?, qkv, bare, &self.run)
            })?;
            see(&a)?;
            self.inner.push(a);
        }
        Ok(())
    }

    /// `inner` becomes the input of down, which is shown to `see`.
    fn gate(&mut self, block: &Block, w: &LayerWeights, mut see: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        for x in &self.x {
            let m = value(|t| {
                let gate_up = [Linear::Gate, Linear::Up].map(|l| on(t, &w[l]));
                let bare = &Around::default();
                block.gated(block.mlp_input(t.constant(x.clone()), bare, &self.run)?, gate_up, bare, &self.run)
            })?;
            see(&m)?;
            self.inner.push(m);
        }
        Ok(())
    }

    /// `x ← x + inner Wᵀ + b`; `inner` is used up.
    fn add(&mut self, l: &Affine) -> Result<()> {
        for (x, inner) in self.x.iter_mut().zip(self.inner.drain(..)) {
            *x = value(|t| {
                let Affine { weight, bias, .. } = on(t, l);
                plus(t.constant(x.clone()), bias)?.add(t.constant(inner).linear(weight)?)
            })?;
        }
        Ok(())
    }
}

/// As many results as were asked for.
fn exactly(count: usize, linears: Vec<QuantizedLinear>) -> Result<Vec<QuantizedLinear>> {
    let got = linears.len();
    let wrong = || Error::argument("weight quantiser", format!("expected {count} results, got {got}"));
    if got == count { Ok(linears) } else { Err(wrong()) }
}

/// A linear on a tape, as a constant.
fn on<'t>(tape: &'t Tape, l: &Affine) -> LinearVars<'t> {
    let constant = |t: &Tensor| tape.constant(t.clone());
    Affine { weight: constant(&l.weight), bias: l.bias.as_ref().map(constant), norm: l.norm.as_ref().map(constant) }
}

/// Runs a computation without gradients.
fn value(f: impl for<'t> FnOnce(&'t Tape) -> Result<Var<'t>>) -> Result<Tensor> {
    let tape = Tape::new();
    Ok(f(&tape)?.into_value())
}
