//! A layer that keeps only its input for the backward pass and runs a second time there, as [`checkpoint`](crate::tape::checkpoint)
//! does. Its weights are rotated and quantised once a pass, however few sequences go through it at a time: fewer sequences cost less
//! memory and no more rotations. A layer that is streamed from main memory always runs so, and its weights are made again, whatever the
//! plan: a tape must not hold a buffer that the next layers pass through.

use std::sync::Arc;

use crate::llama::Heading;
use crate::llama::block::{Block, Run};
use crate::llama::rotate::{LayerLearned, RotatedWeights};
use crate::profile::enter_pass;
use crate::ranks::Group;
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Tape, Var};
use crate::{DType, Error, Result, Tensor};

/// What a step keeps in memory and what it computes again. See [`crate::llama::Recompute`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// So many layers, from the first, keep only their input; the others keep everything.
    pub recompute: usize,
    /// Those layers keep their rotated, quantised weights from the forward to the backward pass; otherwise they are made again.
    pub keep_weights: bool,
    /// Sequences that go through one of those layers at once; 0: all.
    pub sequences: usize,
}

impl Plan {
    /// Every layer keeps everything: the fastest.
    pub const KEEP_ALL: Self = Self { recompute: 0, keep_weights: true, sequences: 0 };
    /// Every layer keeps only its input.
    pub const INPUTS: Self = Self { recompute: usize::MAX, keep_weights: false, sequences: 0 };
    /// As little as there is: a sequence at a time.
    pub const LEAN: Self = Self { sequences: 1, ..Self::INPUTS };

    /// Runs layer `index` as planned: `x` [tokens, C] in R1's basis, and out again.
    pub(crate) fn run<'t>(&self, block: &Arc<Block>, x: Var<'t>, by: LayerLearned<'t>, run: &Arc<Run>) -> Result<Var<'t>> {
        let tokens = x.value().rows();
        let rotate = || by.weights(block, &run.sites, tokens);
        // A layer that is not on the device to stay: nothing that outlives its turn may be made of its weights.
        let streamed = block.is_streamed();
        if block.index >= self.recompute && !streamed {
            return block.forward(x, rotate()?, run);
        }
        let (tape, straight, shared) = (x.tape(), by.straight, by.rows.clone());
        let rotated = self.keep_weights && !streamed;
        let slots = if rotated { rotate()?.into_slots() } else { by.into_slots() };
        let learns = x.requires_grad() || slots.iter().flatten().any(Var::requires_grad);
        let heading = if learns { Heading::Forth } else { Heading::Around };
        let (rows, filled) = (self.sequences * run.seq, slots.iter().map(Option::is_some).collect());
        let layer = Layer { block: block.clone(), run: run.clone(), heading, rows, rotated, filled, tokens, straight, shared };
        tape.record(layer, [x].into_iter().chain(slots.into_iter().flatten()).collect())
    }
}

/// Operands: the input, then the rotated weights (if `rotated`) or what they are made by, of their slots those that are filled.
struct Layer {
    block: Arc<Block>,
    run: Arc<Run>,
    /// Of the forward pass.
    heading: Heading,
    /// Tokens at once; 0: all.
    rows: usize,
    rotated: bool,
    filled: Vec<bool>,
    tokens: usize,
    /// As in [`Around`](crate::llama::Around).
    straight: bool,
    /// As in [`LayerLearned::rows`].
    shared: Group,
}

/// Values back into the slots that are filled.
fn into_slots<'t>(vars: Vec<Var<'t>>, filled: impl IntoIterator<Item = bool>) -> Vec<Option<Var<'t>>> {
    let mut vars = vars.into_iter();
    filled.into_iter().map(|filled| if filled { vars.next() } else { None }).collect()
}

impl Layer {
    /// The weights to run with, made of the operands after the first.
    fn weights<'t>(&self, block: &Block, operands: Vec<Var<'t>>) -> Result<RotatedWeights<'t>> {
        let slots = into_slots(operands, self.filled.iter().copied());
        if self.rotated {
            return RotatedWeights::from_slots(slots, self.straight);
        }
        LayerLearned::from_slots(slots, self.straight, &self.shared)?.weights(block, &self.run.sites, self.tokens)
    }

    /// First row and number of rows of every part.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let (tokens, rows) = (self.tokens, if self.rows == 0 { self.tokens } else { self.rows });
        (0..tokens).step_by(rows.max(1)).map(move |first| (first, rows.min(tokens - first)))
    }

    fn whole(&self) -> bool {
        self.rows == 0 || self.rows >= self.tokens
    }
}

impl Op for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }

    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let inputs = inputs.into_vec();
        if save.wants_any() {
            inputs.iter().for_each(|t| save.push(t.clone()));
        }
        let block = self.block.at_work(self.heading)?;
        let tape = Tape::new();
        let mut operands = inputs.into_iter().map(|t| tape.constant(t));
        let x = operands.next().ok_or_else(|| Error::Tape("layer: no input".into()))?;
        let weights = self.weights(&block, operands.collect())?;
        if self.whole() {
            return Ok(block.forward(x, weights, &self.run)?.into_value());
        }
        let part = |(first, rows)| {
            let x = tape.constant(x.value().slice(first, rows)?);
            Ok(block.forward(x, weights.clone(), &self.run)?.into_value())
        };
        Tensor::concat(&self.parts().map(part).collect::<Result<Vec<_>>>()?)
    }

    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let mut saved = saved.into_vec();
        let x = saved.remove(0);
        let block = self.block.at_work(Heading::Back)?;
        // The weights' own tape, where they are made again; their gradients enter it once all parts have been through.
        let outer = Tape::new();
        let enter = |(t, &want)| if want { outer.variable(t) } else { outer.constant(t) };
        let operands: Vec<_> = saved.into_iter().zip(&want[1..]).map(enter).collect();
        let weights = {
            let _pass = enter_pass("recompute");
            self.weights(&block, operands.clone())?.into_slots()
        };
        let filled: Vec<bool> = weights.iter().map(Option::is_some).collect();
        let weights: Vec<Var<'_>> = weights.into_iter().flatten().collect();
        let mut sums: Vec<Option<Tensor>> = weights.iter().map(|_| None).collect();
        let mut dx = vec![];
        for (first, rows) in self.parts() {
            let tape = Tape::for_gradients();
            let x = x.slice(first, rows)?;
            let x = if want[0] { tape.variable(x) } else { tape.constant(x) };
            let enter = |w: &Var<'_>| {
                let t = w.value().clone();
                if w.requires_grad() { tape.variable(t) } else { tape.constant(t) }
            };
            let inner: Vec<_> = weights.iter().map(enter).collect();
            let y = {
                let _pass = enter_pass("recompute");
                let weights = RotatedWeights::from_slots(into_slots(inner.clone(), filled.iter().copied()), self.straight)?;
                block.forward(x.clone(), weights, &self.run)?
            };
            let mut grads = tape.backward_from(y, dy.slice(first, rows)?)?;
            if want[0] {
                dx.push(grads.take(&x)?);
            }
            for (sum, w) in sums.iter_mut().zip(&inner).filter(|(_, w)| w.requires_grad()) {
                let dw = grads.take(w)?;
                // Parts are added in f32: as if they had been one.
                let wide = |t: Tensor| if self.whole() || t.dtype() == DType::F64 { Ok(t) } else { t.to_dtype(DType::F32) };
                *sum = Some(match sum.take() {
                    Some(sum) => Tensor::axpby(1.0, sum, 1.0, wide(dw)?)?,
                    None => wide(dw)?,
                });
            }
        }
        drop(x);
        let dx = want[0].then(|| Tensor::concat(&dx)).transpose()?;
        let narrowed = weights.iter().zip(sums).map(|(w, sum)| sum.map(|s| s.to_dtype(w.value().dtype())).transpose());
        let sums: Vec<Option<Tensor>> = narrowed.collect::<Result<_>>()?;
        if self.rotated {
            return Ok([dx].into_iter().chain(sums).collect());
        }
        let ends = weights.into_iter().zip(sums).filter_map(|(w, sum)| Some((w, sum?))).collect();
        let mut grads = outer.backward_from_all(ends)?;
        let rest = operands.iter().zip(&want[1..]).map(|(x, &want)| want.then(|| grads.take(x)).transpose());
        [Ok(dx)].into_iter().chain(rest).collect()
    }
}
