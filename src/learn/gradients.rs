//! The gradients of a step: of one objective, or of one for what leaves the full-precision network alone and another for clip ratios.

use std::sync::{Arc, Mutex};

use super::{LearnOptions, Settings};
use crate::data::Windows;
use crate::llama::{Llama, Recompute, RotationVars};
use crate::objective::{Batch, Objective};
use crate::optim::Gradients;
use crate::rotation::Rotations;
use crate::{Error, Result, Tape, ranks};

/// Whose gradients a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Everything,
    /// Rotations and scales, which preserve the network's function.
    Transforms,
    /// Clip ratios, of weights too, which change it.
    Clips,
}

/// Mean loss of a batch and its gradients, micro-batches averaged, summed over ranks that have a share of it each. The loss is that of
/// [`LearnOptions::objective`], whatever clip ratios follow.
pub(super) fn gradients(
    model: &Llama,
    windows: &Windows,
    batch: &[usize],
    rotations: &Rotations,
    (options, settings): (&LearnOptions, &Settings),
) -> Result<(f64, Gradients)> {
    let rows = if settings.share_rows { &options.ranks } else { ranks::Group::nobody() };
    let mut total: Option<(f64, Gradients)> = None;
    for part in batch[options.ranks.share(batch.len())].chunks(settings.micro_batch) {
        let weight = part.len() as f64 / batch.len() as f64;
        let tokens = windows.batch(part);
        let Settings { scheme, recompute, .. } = settings;
        let batch = Batch { model, tokens: &tokens, seq: windows.seq_len(), scheme, recompute: *recompute };
        let of = |group, objective: &dyn Objective| pass(group, objective, rotations, (options.straight, rows), weight, &batch);
        let (value, grads) = match &options.clip_objective {
            None => of(Group::Everything, options.objective.as_ref())?,
            Some(of_clips) => {
                let (value, first) = of(Group::Transforms, options.objective.as_ref())?;
                let (_, second) = of(Group::Clips, of_clips.as_ref())?;
                (value, Gradients { clips: second.clips, weight_clips: second.weight_clips, ..first })
            }
        };
        total = Some(match total {
            None => (value, grads),
            Some((sum, old)) => (sum + value, old.plus(grads)?),
        });
    }
    let (value, grads) = total.ok_or_else(|| Error::argument("learn", "a step without windows"))?;
    summed(&options.ranks, value, grads)
}

/// The sums over ranks: of the gradients as one buffer.
fn summed(ranks: &ranks::Group, value: f64, grads: Gradients) -> Result<(f64, Gradients)> {
    if ranks.world() == 1 {
        return Ok((value, grads));
    }
    let (mut parts, mut value) = (vec![], [value]);
    grads.map(|t| {
        parts.push(t.clone());
        Ok(t.clone())
    })?;
    ranks.sum("the loss of a step", &mut value)?;
    let mut sums = ranks.all_reduce_packed("the gradients of a step", parts)?.into_iter();
    Ok((value[0], grads.map(|_| Ok(sums.next().expect("one for each")))?))
}

/// An objective's value, times a weight, and its gradients by a group; no others are formed.
fn pass(
    group: Group,
    objective: &dyn Objective,
    rotations: &Rotations,
    (straight, rows): (bool, &ranks::Group),
    weight: f64,
    batch: &Batch<'_>,
) -> Result<(f64, Gradients)> {
    let tape = Tape::new();
    let vars = match group {
        Group::Everything => RotationVars::variables(&tape, rotations)?,
        Group::Transforms => RotationVars::of_transforms(&tape, rotations)?,
        Group::Clips => RotationVars::of_clips(&tape, rotations)?,
    };
    let vars = RotationVars { straight, rows: rows.clone(), ..vars };
    let loss = objective.loss(&vars, batch)?;
    let loss = if weight == 1.0 { loss } else { loss.scale(weight)? };
    let value = loss.value().clone();
    let (mut found, mut grads) = (tape.backward(loss)?, Gradients::default());
    if group != Group::Clips {
        grads.rotations = vars.gradients(&mut found)?;
        grads.scales = vars.scale_gradients(&mut found)?;
    }
    if group != Group::Transforms {
        grads.clips = vars.clip_gradients(&mut found)?;
        grads.weight_clips = vars.weight_clip_gradients(&mut found)?;
    }
    let value = value.item()?;
    if !value.is_finite() {
        let what = if group == Group::Clips { "loss of clip ratios" } else { "loss" };
        let place = first_not_finite(&vars, batch)?;
        return Err(Error::numeric(what, format!("is {value}{place}; the last good rotations are kept")));
    }
    Ok((value, grads))
}

/// Where in the network the first value is that is not finite, in words.
fn first_not_finite(vars: &RotationVars<'_>, batch: &Batch<'_>) -> Result<String> {
    let found = Arc::new(Mutex::new(None));
    let mut run = batch.model.run(batch.scheme, batch.seq)?;
    let seen = found.clone();
    run.observer = Some(Arc::new(move |layer, site, x| {
        let mut found = seen.lock().unwrap_or_else(|e| e.into_inner());
        if found.is_none() && !x.to_f64_vec().is_ok_and(|x| x.iter().all(|v| v.is_finite())) {
            *found = Some((layer, site));
        }
    }));
    let tape = Tape::new();
    batch.model.hidden(&RotationVars::constants(&tape, &vars.values()?)?, batch.tokens, Arc::new(run), Recompute::None)?;
    let found = *found.lock().unwrap_or_else(|e| e.into_inner());
    Ok(found.map_or_else(|| " after the last layer".into(), |(layer, site)| format!(" from layer {layer} on ({})", site.name())))
}
