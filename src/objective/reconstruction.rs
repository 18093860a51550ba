//! Hidden states against those in full precision.

use std::sync::Arc;

use crate::llama::{Heading, RotatedWeights, RotationVars};
use crate::memory::Needs;
use crate::objective::{Batch, Objective, full_precision};
use crate::{DType, Error, Result, Tape, Tensor, Var};

/// The hidden states behind every layer of the quantised network against those of the full-precision one, in R1's basis:
/// `L = mean over layers of mean (y_l − x_l R1)² / mean x_l²`, with y of the quantised and x of the full-precision network. What is minimised
/// a layer at a time elsewhere (FlatQuant, arXiv 2410.09426), here of all layers at once, each fed by the quantised ones before it.
///
/// Costs a forward pass in full precision, and a product by R1 for each layer. The tape keeps two hidden states a layer besides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reconstruction;

impl Objective for Reconstruction {
    fn name(&self) -> String {
        "reconstruction".into()
    }
    fn about(&self) -> String {
        "of the hidden states behind every layer".into()
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        let Batch { model, tokens, seq, scheme, recompute } = *batch;
        if model.dtype() == DType::F16 {
            let message = "expected a model in bf16, f32 or f64, got f16, which its gradients are too small for";
            return Err(Error::argument("objective reconstruction", message));
        }
        let exact = states(batch)?;
        let tape = rotations.r1.tape();
        let mut total: Option<Var<'t>> = None;
        let run = Arc::new(model.run(scheme, seq)?);
        model.hidden_with(rotations, tokens, run, recompute, |l, y| {
            let (x, size) = &exact[l];
            let off = tape.constant(x.clone()).matmul(rotations.r1.clone())?.scale(-1.0)?.add(y.clone())?;
            let loss = off.mean_square()?.scale(1.0 / (size * exact.len() as f64))?;
            total = Some(match total.take() {
                Some(sum) => sum.add(loss)?,
                None => loss,
            });
            Ok(())
        })?;
        total.ok_or_else(|| Error::argument("objective", "a model without layers"))
    }
    fn needs(&self) -> Needs {
        Needs::States
    }
}

/// The hidden states behind every layer in full precision, `[tokens, C]`, and their mean squares.
fn states(batch: &Batch<'_>) -> Result<Vec<(Tensor, f64)>> {
    let run = batch.model.run(&full_precision(), batch.seq)?;
    let mut x = Tape::new().constant(batch.model.embedding.clone()).embedding(batch.tokens.into())?.into_value();
    let mut all = vec![];
    for block in &batch.model.blocks {
        let (block, tape) = (block.at_work(Heading::Around)?, Tape::new());
        x = block.forward(tape.constant(x), RotatedWeights::constants(&tape, &block.weights), &run)?.into_value();
        let size = Tape::new().constant(x.clone()).mean_square()?.value().item()?;
        if !(size > 0.0 && size.is_finite()) {
            return Err(Error::numeric("objective reconstruction", format!("the mean square behind a layer is {size}")));
        }
        all.push((x.clone(), size));
    }
    Ok(all)
}
