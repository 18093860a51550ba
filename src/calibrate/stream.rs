//! The calibration text on its way through a network, layer by layer.

use super::reconstruct::{Student, squares};
use super::{Calibration, QuantizedLayer, Reconstruct};
use crate::llama::{Affine, Around, Block, LayerWeights, Linear, LinearVars, Linears, Rotated, Run, plus};
use crate::quant::{Drift, Hessian, Moments, QuantSpec, QuantizedLinear, Site, WeightQuantizer, quantize_by};
use crate::ranks::Group;
use crate::{DType, Error, Result, Tape, Tensor, Var};

/// The text in the network that is being quantised, and in full precision where a quantiser wants drifts or layers are reconstructed.
pub(super) struct Streams {
    quantized: Stream,
    exact: Option<Stream>,
    /// Who else has windows of the text.
    ranks: Group,
}

impl Streams {
    /// In front of the first layer.
    pub fn new(rotated: &Rotated<'_>, quantizer: &dyn WeightQuantizer, c: &Calibration<'_>) -> Result<Self> {
        let learns = c.reconstruct.is_some();
        let two = learns || Site::ALL.into_iter().any(|site| quantizer.wants_drift(site));
        let exact = if two { Some(Stream::new(rotated, c, false)?) } else { None };
        let on = c.quantize_activations || quantizer.reads_quantized() || learns;
        Ok(Self { quantized: Stream::new(rotated, c, on)?, exact, ranks: c.ranks.clone() })
    }

    /// True where the full-precision stream is there.
    pub fn are_two(&self) -> bool {
        self.exact.is_some()
    }

    /// Quantises the weights of a layer, by clip ratios that were learned where there are some, those of one input at a time; afterwards [`Streams::pass`] has the layer's output left to make.
    pub fn quantize(
        &mut self,
        block: &Block,
        quantizer: &dyn WeightQuantizer,
        spec: &QuantSpec,
        clips: Option<&Linears<Tensor>>,
    ) -> Result<Linears<Affine<QuantizedLinear>>> {
        let mut w = block.weights.clone();
        let mut done = Linears([const { None }; 7]);
        for site in Site::ALL {
            let members: Vec<Linear> = Linear::at(site).collect();
            let weights: Vec<Tensor> = members.iter().map(|&l| w[l].weight.clone()).collect();
            let Some(first) = weights.first() else { continue };
            let moments = self.moments(site, block, &w, first.cols(), quantizer.wants_drift(site))?;
            let clips: Option<Vec<&Tensor>> = clips.map(|clips| members.iter().map(|&l| &clips[l]).collect());
            let weights_here: Vec<&Tensor> = weights.iter().collect();
            let quantized = quantize_by(quantizer, &weights_here, spec, Some(&moments), clips.as_deref())?;
            for (linear, quantized) in members.into_iter().zip(exactly(weights.len(), quantized)?) {
                w[linear].weight = quantized.weight.clone();
                done[linear] = Some(w[linear].with_weight(quantized));
            }
        }
        Ok(Linears(done.0.map(|l| l.expect("every linear is at one site"))))
    }

    /// Moves on inside a layer to the input of the linears at `site`, and measures it.
    fn moments(&mut self, site: Site, block: &Block, w: &LayerWeights, n: usize, with_drift: bool) -> Result<Moments> {
        let Self { quantized, exact, ranks } = self;
        if let Some(exact) = exact.as_mut() {
            exact.reach(site, block, &block.weights)?;
        }
        quantized.reach(site, block, w)?;
        let beside = exact.as_ref().filter(|_| with_drift);
        let (mut hessian, mut drift) = (Hessian::new(n), beside.map(|_| Drift::new(n)));
        for i in 0..quantized.x.len() {
            let x = quantized.input(site, block, i)?;
            hessian.add(&x)?;
            if let (Some(drift), Some(exact)) = (&mut drift, beside) {
                drift.add(&exact.input(site, block, i)?, &x)?;
            }
        }
        let sequences = quantized.sequences;
        let drift = drift.map(|d| d.over(ranks)?.finish(sequences)).transpose()?;
        Ok(Moments { hessian: hessian.over(ranks)?.finish(sequences)?, drift })
    }

    /// The hidden states of the quantised network in front of the current layer.
    pub fn inputs(&self) -> Vec<Tensor> {
        self.quantized.x.clone()
    }

    /// Learns what is free in a layer that is quantised, on `inputs`, the hidden states in front of it, and moves on behind it; as
    /// [`Streams::pass`] does, all of it or what [`Streams::quantize`] has left to do. Returns the layer, and the relative error of its
    /// output before and after. What is no better than the start is not kept.
    pub fn reconstruct(
        &mut self,
        rotated: &Rotated<'_>,
        (block, layer): (&Block, QuantizedLayer),
        (exact, whole): (&Block, bool),
        inputs: Vec<Tensor>,
        (by, stored): (&Reconstruct, Option<DType>),
    ) -> Result<(QuantizedLayer, (f64, f64))> {
        let none = || Error::argument("reconstruct", "expected a stream of the text in full precision");
        let stream = self.exact.as_mut().ok_or_else(none)?;
        stream.pass(exact, whole)?;
        let targets = &stream.x;
        self.quantized.rewind(inputs);
        let started = self.quantized.behind(block)?;
        let [error, size] = squares(&started.x, targets)?;
        let values: usize = targets.iter().map(Tensor::len).sum();
        let relative = |error: f64| if size > 0.0 { error / size } else { error };
        if error == 0.0 {
            self.quantized = started;
            return Ok((layer, (0.0, 0.0)));
        }
        drop(started);
        let learned = {
            let student = Student::new(by, (block, &layer), &self.quantized.run, &self.quantized.x, targets)?;
            let start = student.start(rotated.config(), rotated.scheme())?;
            let free = student.learn(by, start, error / values as f64)?;
            student.finish(&free, layer.clone(), stored)?
        };
        let ended = self.quantized.behind(&learned.block(block))?;
        let [last, _] = squares(&ended.x, targets)?;
        if last < error {
            self.quantized = ended;
            return Ok((learned, (relative(error), relative(last))));
        }
        drop(ended);
        self.quantized.pass(block, true)?;
        Ok((layer, (relative(error), relative(error))))
    }

    /// Moves on behind a layer: all of it where it was `loaded`, else what [`Streams::quantize`] has left to do. `exact` is the layer as it
    /// was, for the full-precision stream.
    pub fn pass(&mut self, block: &Block, exact: Option<&Block>, loaded: bool) -> Result<()> {
        self.quantized.pass(block, loaded)?;
        match (&mut self.exact, exact) {
            (Some(stream), Some(block)) => stream.pass(block, loaded),
            _ => Ok(()),
        }
    }
}

/// Some sequences at a time.
#[derive(Clone)]
struct Stream {
    run: Run,
    /// Of all ranks.
    sequences: usize,
    /// The hidden states `[tokens, C]` in front of the current layer, behind attention once o is quantised.
    x: Vec<Tensor>,
    /// The input of o, then that of down, of the weights quantised so far.
    inner: Vec<Tensor>,
}

impl Stream {
    /// In front of the first layer; activations, K and V are quantised or not.
    fn new(rotated: &Rotated<'_>, c: &Calibration<'_>, quantized: bool) -> Result<Self> {
        let seq = c.text.seq_len();
        if c.windows.is_empty() || c.at_once == 0 || c.windows.iter().any(|&w| w >= c.text.len()) {
            let message = format!("expected windows below {}, at least one and one at once", c.text.len());
            return Err(Error::argument("calibration", message));
        }
        c.check_shares()?;
        let scheme = match quantized {
            true => *rotated.scheme(),
            false => rotated.scheme().unquantized_activations(),
        };
        let table = rotated.embedding()?;
        let embed = |windows: &[usize]| {
            let tape = Tape::new();
            Ok(tape.constant(table.clone()).embedding(c.text.batch(windows).into())?.into_value())
        };
        let x = c.windows[c.ranks.share(c.windows.len())].chunks(c.at_once).map(embed).collect::<Result<_>>()?;
        let run = Run::new(rotated.config(), &scheme, seq, rotated.dtype(), rotated.device())?;
        Ok(Self { run, sequences: c.windows.len(), x, inner: vec![] })
    }

    /// Goes back to the hidden states in front of a layer.
    fn rewind(&mut self, x: Vec<Tensor>) {
        self.x = x;
        self.inner.clear();
    }

    /// The stream behind a layer, in front of which this one stays.
    fn behind(&self, block: &Block) -> Result<Self> {
        let mut stream = self.clone();
        stream.pass(block, true)?;
        Ok(stream)
    }

    /// Moves on behind a layer: all of it, or what is left behind the input of down_proj.
    fn pass(&mut self, block: &Block, whole: bool) -> Result<()> {
        let w = &block.weights;
        if whole {
            self.attend(block, w)?;
            self.add(&w[Linear::O])?;
            self.gate(block, w)?;
        }
        self.add(&w[Linear::Down])
    }

    /// Moves on inside a layer to the input of the linears at `site`, with the weights `w` so far.
    fn reach(&mut self, site: Site, block: &Block, w: &LayerWeights) -> Result<()> {
        match site {
            Site::AttentionOutput => self.attend(block, w),
            Site::MlpInput => self.add(&w[Linear::O]),
            Site::DownInput => self.gate(block, w),
            Site::AttentionInput | Site::Key | Site::Value => Ok(()),
        }
    }

    /// Part `i` of the input of the linears at the site that was reached last.
    fn input(&self, site: Site, block: &Block, i: usize) -> Result<Tensor> {
        let x = || self.x[i].clone();
        match site {
            Site::AttentionInput => value(|t| block.attention_input(t.constant(x()), &Around::default(), &self.run)),
            Site::MlpInput => value(|t| block.mlp_input(t.constant(x()), &Around::default(), &self.run)),
            _ => Ok(self.inner[i].clone()),
        }
    }

    /// `inner` becomes the input of o.
    fn attend(&mut self, block: &Block, w: &LayerWeights) -> Result<()> {
        for i in 0..self.x.len() {
            let h = self.input(Site::AttentionInput, block, i)?;
            self.inner.push(value(|t| {
                let qkv = [Linear::Q, Linear::K, Linear::V].map(|l| on(t, &w[l]));
                block.attend(t.constant(h), qkv, &Around::default(), &self.run)
            })?);
        }
        Ok(())
    }

    /// `inner` becomes the input of down.
    fn gate(&mut self, block: &Block, w: &LayerWeights) -> Result<()> {
        for i in 0..self.x.len() {
            let h = self.input(Site::MlpInput, block, i)?;
            self.inner.push(value(|t| {
                let gate_up = [Linear::Gate, Linear::Up].map(|l| on(t, &w[l]));
                block.gated(t.constant(h), gate_up, &Around::default(), &self.run)
            })?);
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
pub fn exactly(count: usize, linears: Vec<QuantizedLinear>) -> Result<Vec<QuantizedLinear>> {
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
