//! Memory against time: values that are computed again instead of kept.

use crate::profile::enter_pass;
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Tape, Var};
use crate::{Result, Tensor};

/// Runs `f` without keeping what is inside it: forward saves only `inputs`, backward runs `f` again.
///
/// What needs a gradient must be among `inputs`; `f` has no other way to reach the tape. Trades one more forward pass for memory
/// (Griewank & Walther 2000; Chen et al. 2016).
///
/// # Errors
/// Those of `f` and of [`Tape::record`].
pub fn checkpoint<'t>(
    tape: &'t Tape,
    inputs: Vec<Var<'t>>,
    f: impl for<'s> Fn(&'s Tape, Vec<Var<'s>>) -> Result<Var<'s>> + 'static,
) -> Result<Var<'t>> {
    tape.record(Checkpoint(f), inputs)
}

struct Checkpoint<F>(F);

impl<F: for<'s> Fn(&'s Tape, Vec<Var<'s>>) -> Result<Var<'s>>> Op for Checkpoint<F> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let inputs = inputs.into_vec();
        if save.wants_any() {
            inputs.iter().for_each(|t| save.push(t.clone()));
        }
        let tape = Tape::new();
        let inputs = inputs.into_iter().map(|t| tape.constant(t)).collect();
        Ok((self.0)(&tape, inputs)?.into_value())
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let tape = Tape::for_gradients();
        let enter = |(t, &want)| if want { tape.variable(t) } else { tape.constant(t) };
        let inputs: Vec<_> = saved.into_vec().into_iter().zip(want).map(enter).collect();
        let y = {
            let _pass = enter_pass("recompute");
            (self.0)(&tape, inputs.clone())?
        };
        let mut grads = tape.backward_from(y, dy)?;
        inputs.iter().zip(want).map(|(x, &want)| want.then(|| grads.take(x)).transpose()).collect()
    }
}
