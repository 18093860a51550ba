//! Text through a quantised network whose layers are made one at a time.

use std::sync::{Arc, Mutex};

use crate::llama::block::{Observer, Run};
use crate::llama::model::check_tokens;
use crate::llama::{Block, Rotated, RotatedWeights};
use crate::quant::Site;
use crate::{Error, Result, Tape, Tensor};

/// Whole sequences on their way through a network, all of them through a layer before the next one: what [`Merged`](crate::llama::Merged)
/// computes, with one rotated layer in memory, and the hidden states `[tokens, C]` of every part.
pub struct Walk<'a> {
    rotated: &'a Rotated<'a>,
    run: Run,
    /// In front of the next layer, of every part.
    x: Vec<Tensor>,
    next: usize,
}

impl<'a> Walk<'a> {
    /// In front of the first layer. Every part is whole sequences of `seq` ids, and goes through a layer at once.
    ///
    /// # Errors
    /// Tokens that are not whole sequences, or outside the vocabulary.
    pub fn new(rotated: &'a Rotated<'a>, parts: &[&[u32]], seq: usize) -> Result<Self> {
        let config = rotated.config();
        let embed = |tokens: &&[u32]| {
            check_tokens(config, tokens, seq, config.layers)?;
            rotated.embed(tokens)
        };
        let x = parts.iter().map(embed).collect::<Result<_>>()?;
        let run = Run::new(config, rotated.scheme(), seq, rotated.dtype(), rotated.device())?;
        Ok(Self { rotated, run, x, next: 0 })
    }

    /// Goes through the next layer, its weights rotated and quantised to nearest, and shows `see` the input of each of its quantisers:
    /// part, site, values. False behind the last layer.
    ///
    /// # Errors
    /// The first error of `see`.
    pub fn layer(&mut self, see: impl Fn(usize, Site, &Tensor) -> Result<()> + Clone + Send + Sync + 'static) -> Result<bool> {
        if self.next == self.rotated.config().layers {
            return Ok(false);
        }
        let block = self.rotated.nearest(self.next)?;
        for (i, x) in self.x.iter_mut().enumerate() {
            let see = see.clone();
            *x = observed(&self.run, move |_, site, values| see(i, site, values), |run| through(&block, x, run))?;
        }
        self.next += 1;
        Ok(true)
    }
}

/// A hidden state behind a layer.
fn through(block: &Block, x: &Tensor, run: &Run) -> Result<Tensor> {
    let tape = Tape::new();
    Ok(block.forward(tape.constant(x.clone()), RotatedWeights::constants(&tape, &block.weights), run)?.into_value())
}

/// Runs something while `see` is shown the input of every quantiser.
///
/// # Errors
/// The first error of `see`, and whatever is reported by what runs.
pub(crate) fn observed<T>(
    run: &Run,
    see: impl Fn(usize, Site, &Tensor) -> Result<()> + Send + Sync + 'static,
    f: impl FnOnce(&Run) -> Result<T>,
) -> Result<T> {
    let failed: Arc<Mutex<Option<Error>>> = Arc::default();
    let note = failed.clone();
    let observer: Arc<Observer> = Arc::new(move |layer, site, x: &Tensor| {
        if let Err(e) = see(layer, site, x) {
            note.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
        }
    });
    let value = f(&Run { observer: Some(observer), ..run.clone() })?;
    let failed = failed.lock().unwrap_or_else(|e| e.into_inner()).take();
    failed.map_or(Ok(value), Err)
}
