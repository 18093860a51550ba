//! Objectives of the rotated activations alone.

use std::sync::{Arc, Mutex};

use crate::llama::RotationVars;
use crate::memory::Needs;
use crate::objective::{Batch, Objective, full_precision};
use crate::ops::spread::Measure;
use crate::quant::Site;
use crate::{DType, Error, Result, Tensor, Var};

/// A [`Measure`] of what the quantisers see, averaged over layers: the normalised residual stream (the inputs of q, k, v and of gate,
/// up) as R1 turns it, and values and the input of o, head by head, as R2 of their layer turns them (Shao et al. 2025, arXiv 2511.04063).
///
/// The activations are captured from the full-precision model and every row is brought to mean square 1, which rotations keep: no
/// gradient passes through the model, and neither weights nor the scheme matter. The tape keeps the captured rows: `2·tokens·C` and
/// about as many of V and o's input a layer, in `f32`; smaller micro-batches keep less.
#[derive(Clone, Copy, Debug)]
pub struct Local(pub Measure);

impl Objective for Local {
    fn name(&self) -> String {
        match self.0 {
            Measure::Whip => "whip".into(),
            Measure::Kurtosis => "kurtosis".into(),
        }
    }

    fn about(&self) -> String {
        match self.0 {
            Measure::Whip => "spread of rotated activations".into(),
            Measure::Kurtosis => "their fourth moment".into(),
        }
    }

    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        let config = &batch.model.config;
        let tape = rotations.r1.tape();
        let captured = capture(batch)?;
        let mean = 1.0 / (2 * config.layers) as f64;
        let mut total: Option<Var<'t>> = None;
        for (layer, site, x) in captured {
            let (r, d) = match site {
                Site::AttentionInput | Site::MlpInput => (&rotations.r1, config.hidden_size),
                _ => (rotations.r2.get(layer).ok_or_else(|| too_few(layer))?, config.head_dim),
            };
            let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let (tokens, rows) = (x.rows(), x.len() / d);
            let rows = tape.constant(x.clone().to_dtype(wide)?.reshape([rows, d])?).rms_norm(1e-12)?;
            let rows = match *r.value().shape() {
                // An R2 for each key and value head: heads that share one lie behind one another once heads come first.
                [kinds, ..] if r.value().shape().len() == 3 => {
                    let heads = rows.reshape([tokens, x.len() / d / tokens, d])?.swap_axes()?;
                    heads.reshape([kinds, x.len() / d / kinds, d])?
                }
                _ => rows,
            };
            let loss = rows.matmul(r.clone())?.spread(self.0)?.scale(mean)?;
            total = Some(match total {
                Some(sum) => sum.add(loss)?,
                None => loss,
            });
        }
        total.ok_or_else(|| Error::argument("objective", "a model without layers"))
    }

    fn rate(&self) -> f64 {
        match self.0 {
            Measure::Whip => 13.0,
            // Cayley SGD at 0.225, 0.5, 1, 2, 4 (100 steps of 4 x 512 tokens, wiki-llama-15m, W16A4KV4, no clipping): 3.0089, 3.0007,
            // 3.0007, 3.0020, 3.0002 on 100 windows of 1024 tokens of the validation text. Level from 0.5 on.
            Measure::Kurtosis => 2.7,
        }
    }

    fn needs(&self) -> Needs {
        Needs::Rows
    }
}

fn too_few(layer: usize) -> Error {
    Error::argument("rotations", format!("no R2 for layer {layer}"))
}

/// The full-precision model's activations that R1 and R2 turn: layer, site, values.
fn capture(batch: &Batch<'_>) -> Result<Vec<(usize, Site, Tensor)>> {
    let seen = Arc::new(Mutex::new(vec![]));
    let see = {
        let seen = seen.clone();
        move |layer: usize, site: Site, x: &Tensor| {
            if !matches!(site, Site::Key | Site::DownInput) {
                seen.lock().unwrap_or_else(|e| e.into_inner()).push((layer, site, x.clone()));
            }
            Ok(())
        }
    };
    batch.model.merge_exact(None, &full_precision())?.observe(batch.tokens, batch.seq, see)?;
    let captured = std::mem::take(&mut *seen.lock().unwrap_or_else(|e| e.into_inner()));
    Ok(captured)
}
